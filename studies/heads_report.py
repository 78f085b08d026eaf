"""The study's tables and picture from results/heads.csv, as far as it has got.

    python -m studies.heads_report  # prints Markdown, writes results/study.png and study_curves.png
    # two heads alone, paired by seed
    python -m studies.heads_report --compare=cosine/harmonic/4,euclidean/harmonic

Stage 1: the best setting of each head and link so far, and the difference to its softmax twin, the
    same geometry without HarMax. Stage 2: means over seeds with 95 % intervals (Student's t), and
    differences to cross_entropy and to the twin, paired by seed. Its energy is that of stage 5's
    tokens: what a head spends until it is where cross_entropy ends, of what cross_entropy spends.
    Stages 3 and 4: mostly one seed; differences to cross_entropy and the twin in the same place,
    and to the same head without the change. Losses of stages 2 to 4 are those of the test split,
    which has decided nothing; of the validation split where a corpus has no other.
"""

import itertools
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import t as student
from scipy.stats import ttest_rel

from base.command_line import cli, parse
from base.errors import UserError
from base.files import write_whole
from studies.heads import (
    EXPONENT_STEP,
    LINKS,
    LONGER,
    MULTIPLES,
    PENALTY,
    RATE_STEP,
    RATES,
    Rows,
    loss,
)
from studies.table import number, on_edge

BASELINE = ("cross_entropy", "control")
MEANS = {  # of stage 2's columns, over seeds: how they are shown
    "grad_norm_mean": ".2f", "grad_norm_cv": ".3f", "grad_spikes": ".1%", "grad_clipped": ".0%",
    "prototype_radius": ".2f",
    "pca_components_90": ".0f", "pca_top2": ".3f", "effective_rank": ".0f",
}  # fmt: skip
COLORS = dict(zip((*LINKS, "control"), ("#0072b2", "#e69f00", "#59616b"), strict=True))


@dataclass
class ReportConfig:
    """The study's tables"""

    table: str = "results/heads.csv"
    """the study's rows"""
    out: str = "results/study.png"
    """the picture; the curves of stage 2 go beside it"""
    compare: str | None = None
    """two heads, head/link or head/link/4 for stage 4's doubled exponent: their differences paired
    by seed, and nothing else"""


def name(row: dict) -> str:
    return row["head"] + "".join(f" {k}={row[k]}" for k in "pq" if row[k])


def final(row: dict) -> float:
    """A long run's loss: of the test split, if its corpus has one."""
    return number(row["test_loss"]) if row["test_loss"] not in ("", "nan") else loss(row)


def groups(rows: list[dict], stage: str) -> dict[tuple[str, str], list[dict]]:
    """(head with its options, link) -> its rows of a stage."""
    found = {}
    for row in rows:
        if row["stage"] == stage:
            found.setdefault((name(row), row["link"]), []).append(row)
    return found


def best_settings(rows: list[dict]) -> list[dict]:
    """Stage 1: the winner of each head and link, lowest loss first, with its difference to the twin
    where both are there."""
    winners = {key: min(group, key=loss) for key, group in groups(rows, "1").items()}
    counts = {key: len(group) for key, group in groups(rows, "1").items()}
    found = []
    for (head, link), row in winners.items():
        twin = winners.get((head, "softmax")) if link == "harmonic" else None
        difference = loss(row) - loss(twin) if twin else None
        found.append({**row, "name": head, "settings": counts[head, link], "harmax": difference})
    return sorted(found, key=loss)


def interval(values: list[float]) -> tuple[float, float]:
    """-> (mean, half width of the 95 % interval; NaN for one value)."""
    n = len(values)
    half = student.ppf(0.975, n - 1) * np.std(values, ddof=1) / math.sqrt(n) if n > 1 else math.nan
    return float(np.mean(values)), float(half)


def reached(row: dict, level: float) -> float:
    """The iteration at which a run's validation loss is at `level`, between its evaluations by a
    straight line; infinite if it never is."""
    values = [float(v) for v in row["val_losses"].split()]
    for i, (before, after) in enumerate(itertools.pairwise(values)):
        if before > level >= after:
            return int(row["iters"]) / (len(values) - 1) * (i + (before - level) / (before - after))
    return math.inf


def by_seed(rows: list[dict]) -> dict[tuple[str, str], dict[str, dict]]:
    """(head with its options, link) -> seed -> its row of stage 2."""
    return {key: {r["seed"]: r for r in group} for key, group in groups(rows, "2").items()}


def paired(runs: dict[str, dict], others: dict[str, dict]) -> tuple[float, float] | None:
    """Mean and half width of the losses' differences; both: seed -> row. None without a seed in
    common."""
    differences = [final(r) - final(others[seed]) for seed, r in runs.items() if seed in others]
    return interval(differences) if differences else None


def holm(p: dict) -> dict:
    """p-values corrected for their number (Holm 1979): each times how many are not below it, and no
    less than those below."""
    found, largest = {}, 0.0
    for i, key in enumerate(sorted(p, key=p.get)):
        largest = max(largest, min(1.0, p[key] * (len(p) - i)))
        found[key] = largest
    return found


def p_values(rows: list[dict]) -> str:
    """Stage 2, heads with several seeds: paired t-tests of the losses, corrected among those of one
    kind."""
    every = {key: runs for key, runs in by_seed(rows).items() if len(runs) > 1}
    twins = {(head, link): (head, "softmax") for head, link in every if link == "harmonic"}
    kinds = {"its softmax twin": twins} | {
        other[0]: dict.fromkeys(every, other) for other in (BASELINE, PENALTY)
    }
    cells = []
    for kind, pairs in kinds.items():
        shared = {
            a: [s for s in every[a] if s in every[b]]
            for a, b in pairs.items()
            if a != b and b in every
        }
        losses = {
            a: [[final(every[key][s]) for s in seeds] for key in (a, pairs[a])]
            for a, seeds in shared.items()
        }
        p = {a: float(ttest_rel(*values).pvalue) for a, values in losses.items()}
        corrected = holm(p)
        cells += [
            [
                *a,
                kind,
                with_half(paired(every[a], every[pairs[a]]), "+.4f", ".4f"),
                f"{p[a]:.4f}",
                f"{corrected[a]:.3f}",
            ]
            for a in corrected
        ]
    return markdown(["head", "link", "less", "difference", "p", "Holm"], cells)


def compared(rows: list[dict], text: str) -> str:
    """Differences of two heads' losses and other measures, paired by seed."""
    chosen = []
    for words in (part.strip().split("/") for part in text.split(",")):
        rest = (
            [r for r in rows if r["stage"] == "4" and r["ablation"] == LONGER]
            if words[2:] == ["4"]
            else [r for r in rows if r["stage"] == "2"]
        )
        chosen.append({r["seed"]: r for r in rest if [name(r), r["link"]] == words[:2]})
    if len(chosen) != 2 or not set(chosen[0]) & set(chosen[1]):
        raise UserError(
            f"compare={text}: name two heads that have a seed in common, such as"
            " cosine/harmonic,cross_entropy/control"
        )
    a, b = chosen
    values = lambda key: [float(a[s][key]) - float(b[s][key]) for s in a if s in b]
    lines = [["loss", with_half(paired(a, b), "+.4f", ".4f")]] + [
        [key, with_half(interval(values(key)), "+.4g", ".3g")] for key in MEANS
    ]
    return markdown(["measure", text.replace(",", " less ")], lines)


def long_runs(rows: list[dict]) -> list[dict]:
    """Stage 2: each head and link over its seeds."""
    every = by_seed(rows)
    for (head, link), group in groups(rows, "2").items():
        if len(group) > len(every[head, link]):
            raise UserError(
                f"stage 2 has several runs of {head}, {link}, with one seed: keep those of one"
                " length and setting in the table"
            )
    baseline = every.get(BASELINE, {})
    length = np.mean([int(r["iters"]) for r in baseline.values()]) if baseline else math.nan
    costs = {
        key: (float(r["tokens_per_s"]), float(r["joules_per_token"]))
        for key, (r, *_) in groups(rows, "5").items()
    }
    found = []
    for (head, link), runs in every.items():
        row = {"name": head, "link": link, "seeds": len(runs)}
        row["loss"], row["half"] = interval([final(r) for r in runs.values()])
        row["bits"] = float(np.mean([float(r["bits_per_byte"] or "nan") for r in runs.values()]))
        twin = every.get((head, "softmax"), {}) if link == "harmonic" else {}
        for key, others in (
            ("above_ce", baseline),
            ("above_penalty", every.get(PENALTY, {})),
            ("harmax", twin),
        ):
            row[key] = paired(runs, others)
        row |= {
            key: next(iter(runs.values()))[key]
            for key in ("exponent", "scale", "init_std", "learning_rate")
        }
        times = [reached(r, loss(baseline[s])) for s, r in runs.items() if s in baseline]
        row["times"] = [t for t in times if math.isfinite(t)]
        row["reached"] = float(np.mean(times)) if times else math.inf
        for key in MEANS:
            values = [float(r[key]) for r in runs.values() if r[key]]
            row[key] = float(np.mean(values)) if values else None
        cost, base = costs.get((head, link)), costs.get(BASELINE)
        row["tokens_per_s"], row["joules"] = (None, None) if cost is None else cost
        row["energy"] = (
            cost[1] / base[1] * row["reached"] / length
            if cost and base and math.isfinite(row["reached"])
            else None
        )
        found.append(row)
    return sorted(found, key=lambda r: r["loss"])


def shown(value, form: str) -> str:
    return "" if value is None else format(value, form)


def with_half(pair, form: str = "+.3f", form_half: str = ".3f") -> str:
    """A mean and the half width of its interval, which one value alone has not."""
    return (
        ""
        if pair is None
        else format(pair[0], form)
        + ("" if math.isnan(pair[1]) else f" ± {format(pair[1], form_half)}")
    )


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    return "\n".join(
        f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *rows)
    )


def setting(row: dict) -> list[str]:
    """Exponent or scale, init std and learning rate."""
    strength = {"harmonic": row["exponent"], "softmax": row["scale"]}.get(row["link"], "")
    return [
        f"{float(strength):.4g}" if strength else "",
        row["init_std"],
        f"{float(row['learning_rate']):.4g}",
    ]


SETTING = ["n (softmax: s)", "init std", "learning rate"]


def stage_one(rows: list[dict]) -> str:
    cells = [
        [
            r["name"],
            r["link"],
            *setting(r),
            f"{loss(r):.4f}",
            shown(r["harmax"], "+.4f"),
            str(r["settings"]),
        ]
        for r in best_settings(rows)
    ]
    columns = ["head", "link", *SETTING, "val loss", "less its softmax twin", "settings"]
    return f"{markdown(columns, cells)}\n\n{edges(rows)}"


def edges(rows: list[dict]) -> str:
    """How many of the sweeps, variants' aside, end with a winner on the edge of the learning rates
    and exponents (or scales) tried."""
    found = []
    for (_, link), group in groups(rows, "1").items():
        if len(group) >= len(RATES) * len(MULTIPLES):
            second, costs = "init_std" if link == "control" else "exponent", {}
            for r in group:
                place = float(r[second]), float(r["learning_rate"])
                costs[place] = min(loss(r), costs.get(place, math.inf))
            found.append(costs)
    return on_edge(found, (EXPONENT_STEP, RATE_STEP))


def stage_two(rows: list[dict]) -> str:
    """Losses."""
    columns = [
        "head",
        "link",
        *SETTING,
        "seeds",
        "test loss",
        "perplexity",
        "val bits/byte",
        "less cross_entropy",
        "less euclidean_squared",
    ]
    cells = []
    for r in long_runs(rows):
        cells.append(
            [
                r["name"],
                r["link"],
                *setting(r),
                str(r["seeds"]),
                with_half((r["loss"], r["half"]), ".4f"),
            ]
        )
        cells[-1] += [
            f"{math.exp(r['loss']):,.1f}",
            f"{r['bits']:.4f}",
            *(with_half(r[k]) for k in ("above_ce", "above_penalty", "harmax")),
        ]
        cells[-1].append(
            f"{np.mean(r['times']):.0f} ({len(r['times'])} of {r['seeds']})" if r["times"] else ""
        )
    return markdown([*columns, "less its softmax twin", "at cross_entropy's loss"], cells)


def stage_two_training(rows: list[dict]) -> str:
    """Gradients, prototypes and costs."""
    columns = [
        "gradient norm",
        "CV",
        "spikes",
        "clipped",
        "radius",
        "PCs for 90 %",
        "top 2 PCs",
        "effective rank",
    ]
    cells = []
    for r in long_runs(rows):
        cells.append([r["name"], r["link"], *(shown(r[key], form) for key, form in MEANS.items())])
        cells[-1] += [
            shown(r["tokens_per_s"], ",.0f"),
            shown(r["joules"] and 1000 * r["joules"], ".2f"),
            shown(r["energy"], ".2f"),
        ]
    return markdown(
        ["head", "link", *columns, "tokens/s", "mJ/token", "energy to that loss"], cells
    )


def stage_three(rows: list[dict]) -> str:
    """The best heads elsewhere, by place."""
    third = [r for r in rows if r["stage"] == "3"]
    cells = []
    for place in dict.fromkeys((r["arch"], r["dataset"]) for r in third):
        mine = {(name(r), r["link"]): final(r) for r in third if (r["arch"], r["dataset"]) == place}
        for (head, link), value in sorted(mine.items(), key=lambda x: x[1]):
            above = value - mine.get(BASELINE, math.nan)
            twin = mine.get((head, "softmax")) if link == "harmonic" else None
            row = next(
                r
                for r in third
                if (r["arch"], r["dataset"], name(r), r["link"]) == (*place, head, link)
            )
            bits = (
                "" if place[0] == "bert" else f"{float(row['bits_per_byte']):.4f}"
            )  # masked prediction has no likelihood of a text
            cells.append(
                [
                    *place,
                    head,
                    link,
                    f"{value:.4f}",
                    bits,
                    f"{above:+.3f}",
                    shown(twin and value - twin, "+.3f"),
                ]
            )
    return markdown(
        [
            "arch",
            "corpus",
            "head",
            "link",
            "loss",
            "val bits/byte",
            "less cross_entropy",
            "less its softmax twin",
        ],
        cells,
    )


def stage_four(rows: list[dict]) -> str:
    """One thing changed: the loss, less those of stage 2's unchanged runs with the same seeds: its
    own, cross_entropy's, its twin's."""
    every, found, cells = by_seed(rows), {}, []
    for r in rows:
        if r["stage"] == "4":
            found.setdefault((name(r), r["link"], r["ablation"]), {})[r["seed"]] = r
    for (head, link, changed), runs in found.items():
        cells.append(
            [
                head,
                link,
                changed,
                str(len(runs)),
                with_half(interval([final(r) for r in runs.values()]), ".4f"),
            ]
        )
        others = (head, link), BASELINE, (head, "softmax") if link == "harmonic" else None
        cells[-1] += [with_half(paired(runs, every.get(other, {}))) for other in others]
    columns = [
        "head",
        "link",
        "changed",
        "seeds",
        "loss",
        "less unchanged",
        "less cross_entropy",
        "less its softmax twin, unchanged",
    ]
    return markdown(columns, cells)


STAGES = (
    ("1", stage_one),
    ("2", stage_two),
    ("2", stage_two_training),
    ("2", p_values),
    ("3", stage_three),
    ("4", stage_four),
)


def draw(rows: list[dict], path: Path):
    """Left, stage 1: a dot for every setting, the best ringed. Right, stage 2: means over seeds and
    their intervals."""
    from matplotlib.figure import Figure

    best, long = best_settings(rows), long_runs(rows)
    heads = list(dict.fromkeys(r["name"] for r in best))
    y = {
        (h, link): i + (0 if link == "control" else (j - 0.5) * 0.36)
        for i, h in enumerate(heads)
        for j, link in enumerate(COLORS)
    }
    figure = Figure(figsize=(12 if long else 8, 0.9 + 0.36 * len(heads)), layout="constrained")
    panels = figure.subplots(1, 2 if long else 1, sharey=True, squeeze=False)[0]
    low = loss(best[0])
    for (head, link), place in y.items():
        group = [
            loss(r) for r in rows if r["stage"] == "1" and name(r) == head and r["link"] == link
        ]
        if group:
            dots = dict(color=COLORS[link], markersize=3.5, alpha=0.5, markeredgewidth=0)
            panels[0].plot([min(v, low + 2) for v in group], [place] * len(group), "o", **dots)
            panels[0].plot(
                min(group), place, "o", color="none", markeredgecolor=COLORS[link], markersize=8
            )
    panels[0].set_xlim(low - 0.05, low + 2.05)
    panels[0].set_xlabel(
        "stage 1: validation loss, nats a token\n(what is above the edge lies on it; ringed: the"
        " best setting)"
    )
    for r in long:
        half = 0 if math.isnan(r["half"]) else r["half"]
        panels[1].errorbar(
            r["loss"],
            y[r["name"], r["link"]],
            xerr=half,
            fmt="o",
            color=COLORS[r["link"]],
            markersize=5,
            capsize=2,
            linewidth=1,
        )
        if r["link"] == "control" and r["name"] == "cross_entropy":
            panels[1].axvline(r["loss"], color=COLORS["control"], linewidth=0.8, linestyle=":")
    if long:
        panels[1].set_xlim(
            long[0]["loss"] - 0.1, min(long[0]["loss"] + 2.1, max(r["loss"] for r in long) + 0.1)
        )
        panels[1].set_xlabel(
            "stage 2: test loss, nats a token\n(means over seeds, 95 % intervals; dotted:"
            " cross_entropy)"
        )
    for link, color in COLORS.items():
        panels[0].plot([], [], "o", color=color, label=link)
    panels[0].set_yticks(range(len(heads)), heads)
    panels[0].invert_yaxis()
    panels[0].legend(frameon=False, fontsize=8)
    for axes in panels:
        axes.grid(axis="x", alpha=0.2)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def draw_curves(rows: list[dict], path: Path):
    """Stage 2: a panel for each head, validation loss less cross_entropy's with the same seed at
    the same iteration, means over seeds.
    Heads that end near cross_entropy have a shaded panel, of a finer scale."""
    from matplotlib.figure import Figure

    values = lambda r: np.array(
        [float(v) for v in r["val_losses"].split()][1:]
    )  # from the first evaluation after the start
    long = {
        key: [r for r in group if r["val_losses"]] for key, group in groups(rows, "2").items()
    }  # without runs that were stopped
    baseline = {r["seed"]: values(r) for r in long[BASELINE]}
    pairs = {
        key: [values(r) - baseline[r["seed"]] for r in group if r["seed"] in baseline]
        for key, group in long.items()
    }
    above = {key: np.mean(found, 0) for key, found in pairs.items() if found}
    heads = list(dict.fromkeys(r["name"] for r in long_runs(rows) if r["name"] != BASELINE[0]))
    width = min(4, len(heads))
    figure = Figure(figsize=(3 * width, 2.3 * math.ceil(len(heads) / width)), layout="constrained")
    x = np.linspace(0, int(long[BASELINE][0]["iters"]), 1 + len(above[BASELINE]))[1:]
    for i, head in enumerate(heads):
        axes = figure.add_subplot(math.ceil(len(heads) / width), width, i + 1)
        axes.axhline(0, color="0.6", linewidth=0.8, linestyle=":")
        for link, color in COLORS.items():
            if (head, link) in above:
                axes.plot(x, above[head, link], marker=".", color=color, label=link)
        near = min(values[-1] for (name, _), values in above.items() if name == head) < 0.25
        axes.set_ylim(*((-0.15, 0.35) if near else (-0.05, 1.55)))
        axes.set_facecolor("#eef3f8" if near else "none")
        axes.set_title(head, loc="left", fontsize=9)
        axes.legend(frameon=False, fontsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supylabel("nats above cross_entropy", fontsize=9)
    figure.supxlabel("iteration", fontsize=9)
    figure.savefig(path, dpi=110)


def main():
    (c,) = parse(sys.argv[1:], ReportConfig)
    if not Path(c.table).is_file():
        raise UserError(f"no table {c.table}: python -m studies.heads writes it")
    rows = Rows(Path(c.table)).rows
    if c.compare:
        print(compared(rows, c.compare))
        return
    for stage, table in STAGES:
        count = sum(r["stage"] == stage for r in rows)
        print(
            f"Stage {stage}: {count} runs\n\n{table(rows)}\n"
            if count
            else f"Stage {stage}: no runs yet\n"
        )
    pictures = {Path(c.out): draw, Path(c.out).with_stem(f"{Path(c.out).stem}_curves"): draw_curves}
    if BASELINE not in groups(rows, "2"):
        pictures.popitem()
    for place, picture in pictures.items():
        write_whole(place, lambda path, picture=picture: picture(rows, path))
    print(f"wrote {' and '.join(map(str, pictures))}")


if __name__ == "__main__":
    cli(main)
