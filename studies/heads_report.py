"""Tables and pictures of the study of heads, from the rows in results/heads.csv so far.

    # prints Markdown; writes results/study.png, study_curves.png and study_lowest.png
    python -m studies.heads_report
    # only two heads, paired by seed
    python -m studies.heads_report --compare=cosine/harmonic/4,euclidean/harmonic

Stage 1: the best setting of each head and link so far, and the difference to its softmax twin, the
    same distance without HarMax.
Stage 2: means over seeds with 95 % intervals (Student's t), and differences to cross_entropy and to
    the twin, paired by seed. "energy to reach cross_entropy's loss" is the energy until a head has
    the final loss of cross_entropy, divided by the energy of cross_entropy. It uses the energy per
    token that stage 5 measured.
Stages 3 and 4: mostly one seed. Differences are to cross_entropy and to the twin with the same
    model and data, and in stage 4 also to the same head without the change.

The losses of stages 2 to 4 are those of the test split, which is used for no decision. A corpus
without a test split has the validation loss.
"""

import itertools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis import figures
from analysis.intervals import holm, mean_and_half, p_value, shown_p
from analysis.tables import Column, Columns, interval, markdown, read_csv
from base.command_line import cli, parse
from base.errors import UserError
from studies.heads import (
    COLUMNS,
    LONGER,
    MULTIPLES,
    PENALTY,
    RATES,
    loss,
)
from studies.runner import Row
from studies.search import Setting, number, on_edge
from training.objective import objective_of

BASELINE = ("cross_entropy", "control")
# Heads that the page of results compares beside those of the tables, as --compare takes them.
PAIRS = (
    "mahalanobis/softmax,cosine/softmax",
    "mahalanobis/harmonic,euclidean/harmonic",
    "mahalanobis/harmonic,mahalanobis/softmax",
    "minkowski/harmonic,minkowski/softmax",
    "manhattan/harmonic,manhattan/softmax",
    "euclidean/harmonic,euclidean/softmax",
    "euclidean/harmonic,cross_entropy/control",
    "euclidean/harmonic/4,euclidean/softmax/4",
    "cosine/harmonic,cosine/softmax",
    "cosine/harmonic,cross_entropy/control",
    "cosine/harmonic,euclidean/harmonic",
    "cosine/harmonic/4,cosine/softmax",
    "cosine/harmonic/4,cross_entropy/control",
    "cosine/harmonic/4,euclidean/harmonic",
    "cosine/harmonic/4,euclidean/harmonic/4",
)
LINKS = ("harmonic", "softmax", "control")
# The name of a head with its options, and its link.
Key = tuple[str, str]
# A mean, and half the width of its interval.
Pair = tuple[float, float]

HEAD = [Column("name", "head"), Column("link")]
SETTING = [
    Column("strength", "n (softmax: s)", ".4g"),
    Column("init_std", "init std"),
    Column("learning_rate", "learning rate", ".4g"),
]
# Means over seeds.
TRAINING = [
    Column("grad_norm_mean", "gradient norm", ".2f"),
    Column("grad_norm_cv", "CV", ".3f"),
    Column("grad_spikes", "spikes", ".1%"),
    Column("grad_clipped", "clipped", ".0%"),
    Column("prototype_radius", "radius", ".2f"),
    Column("pca_components_90", "PCs for 90 %", ".0f"),
    Column("pca_top2", "top 2 PCs", ".3f"),
    Column("effective_rank", "effective rank", ".0f"),
]


@dataclass
class ReportConfig:
    """The study's tables"""

    table: str = "results/heads.csv"
    """rows of studies.heads"""
    out: str = "results/study.png"
    """the picture; the curves of stage 2 are written beside it"""
    compare: str | None = None
    """print only the differences of two heads, paired by seed; a head is head/link, or head/link/4
    with the doubled exponent of stage 4"""


# ---- rows --------------------------------------------------------------------------------------


def name(row: Row) -> str:
    """The name of a row's head with its options."""
    return row["head"] + "".join(f" {k}={row[k]}" for k in "pq" if row[k])


def strength(row: Row) -> str:
    """The exponent of a harmonic head, or the scale of a softmax twin."""
    return {"harmonic": row["exponent"], "softmax": row["scale"]}.get(row["link"], "")


def final(row: Row) -> float:
    """The loss of a long run, on the test split if its corpus has one."""
    return number(row["test_loss"]) if row["test_loss"] not in ("", "nan") else loss(row)


def groups(rows: list[Row], stage: str) -> dict[Key, list[Row]]:
    """The rows of a stage by head and link."""
    found: dict[Key, list[Row]] = {}
    for row in rows:
        if row["stage"] == stage:
            found.setdefault((name(row), row["link"]), []).append(row)
    return found


def by_seed(rows: list[Row]) -> dict[Key, dict[str, Row]]:
    """The rows of stage 2: head and link -> seed -> row."""
    return {key: {r["seed"]: r for r in group} for key, group in groups(rows, "2").items()}


def paired(runs: dict[str, Row], others: dict[str, Row]) -> Pair | None:
    """The mean difference of losses, paired by seed. None without a common seed.

    runs, others: seed -> row.
    """
    differences = by_seeds(runs, others)
    return mean_and_half(differences) if differences else None


def by_seeds(runs: dict[str, Row], others: dict[str, Row]) -> list[float]:
    """The differences of losses of each seed that both have."""
    return [final(r) - final(others[seed]) for seed, r in runs.items() if seed in others]


def shown(pair: Pair | None, form: str = "+.3f") -> str:
    return "" if pair is None else interval(*pair, form)


def reached(row: Row, level: float) -> float:
    """The iteration at which a run's validation loss reaches `level`; infinite if it never does.

    Between two evaluations it is interpolated linearly.
    """
    values = [float(v) for v in row["val_losses"].split()]
    for i, (before, after) in enumerate(itertools.pairwise(values)):
        if before > level >= after:
            return int(row["iters"]) / (len(values) - 1) * (i + (before - level) / (before - after))
    return math.inf


def best_settings(rows: list[Row]) -> list[dict]:
    """Stage 1: the winner of each head and link, the lowest loss first.

    `harmax` is the difference to the softmax twin, or None.
    """
    every = groups(rows, "1")
    winners = {key: min(group, key=loss) for key, group in every.items()}
    found = []
    for (head, link), row in winners.items():
        twin = winners.get((head, "softmax")) if link == "harmonic" else None
        found.append(
            {
                **row,
                "name": head,
                "strength": strength(row),
                "loss": loss(row),
                "settings": len(every[head, link]),
                "harmax": loss(row) - loss(twin) if twin else None,
            }
        )
    return sorted(found, key=loss)


def long_runs(rows: list[Row]) -> list[dict]:
    """Stage 2: means of each head and link over its seeds, the lowest loss first."""
    every = by_seed(rows)
    for key, group in groups(rows, "2").items():
        if len(group) > len(every[key]):
            raise UserError(
                f"stage 2 has several runs of {', '.join(key)}, with one seed: keep those of one"
                " length and setting in the table"
            )
    tokens = {key: group[0] for key, group in groups(rows, "5").items()}
    found = []
    for key, runs in every.items():
        head, link = key
        twin = every.get((head, "softmax"), {}) if link == "harmonic" else {}
        first = next(iter(runs.values()))
        row: dict[str, Any] = {
            "name": head,
            "link": link,
            "strength": strength(first),
            "seeds": len(runs),
            "init_std": first["init_std"],
            "learning_rate": first["learning_rate"],
        }
        row["loss"], row["half"] = mean_and_half([final(r) for r in runs.values()])
        row["bits"] = float(np.mean([float(r["bits_per_byte"] or "nan") for r in runs.values()]))
        row["above_ce"] = paired(runs, every.get(BASELINE, {})) if key != BASELINE else None
        row["above_penalty"] = paired(runs, every.get(PENALTY, {})) if key != PENALTY else None
        row["harmax"] = paired(runs, twin)
        for column in TRAINING:
            values = [float(r[column.key]) for r in runs.values() if r[column.key]]
            row[column.key] = float(np.mean(values)) if values else None
        row |= _costs(runs, every.get(BASELINE, {}), tokens.get((head, link)), tokens.get(BASELINE))
        found.append(row)
    return sorted(found, key=lambda r: r["loss"])


def _costs(
    runs: dict[str, Row], baseline: dict[str, Row], tokens: Row | None, base: Row | None
) -> dict:
    """When the runs of a head reach the losses of cross_entropy, and what that costs.

    Args:
        runs, baseline: seed -> row, of the head and of cross_entropy.
        tokens, base: the rows of stage 5, of the head and of cross_entropy.
    """
    times = [reached(r, loss(baseline[seed])) for seed, r in runs.items() if seed in baseline]
    row: dict[str, Any] = {
        "times": [time for time in times if math.isfinite(time)],
        "reached": float(np.mean(times)) if times else math.inf,
        "tokens_per_s": tokens and float(tokens["tokens_per_s"]),
        "joules": tokens and float(tokens["joules_per_token"]),
        "energy": None,
    }
    if tokens and base and math.isfinite(row["reached"]):
        length = np.mean([int(r["iters"]) for r in baseline.values()])
        share = row["joules"] / float(base["joules_per_token"])
        row["energy"] = share * row["reached"] / length
    return row


# ---- tables ------------------------------------------------------------------------------------


def stage_one(rows: list[Row]) -> str:
    """The best setting of each head and link."""
    columns: Columns = [
        *HEAD,
        *SETTING,
        Column("loss", "val loss", ".4f"),
        Column("harmax", "minus its softmax twin", "+.4f"),
        Column("settings"),
    ]
    return f"{markdown(best_settings(rows), columns)}\n\n{edges(rows)}"


def edges(rows: list[Row]) -> str:
    """How many winners are on the edge of the tried settings. Sweeps of variants do not count."""
    found = []
    for (_, link), group in groups(rows, "1").items():
        if len(group) >= len(RATES) * len(MULTIPLES):
            second = "init_std" if link == "control" else "exponent"
            costs: dict[Setting, float] = {}
            for r in group:
                place = float(r[second]), float(r["learning_rate"])
                costs[place] = min(loss(r), costs.get(place, math.inf))
            found.append(costs)
    return on_edge(found)


def stage_two(rows: list[Row]) -> str:
    """The losses of the long runs, and their differences."""
    columns: Columns = [
        *HEAD,
        *SETTING,
        Column("seeds"),
        Column("mean", "test loss"),
        Column("perplexity", form=",.1f"),
        Column("bits", "val bits/byte", ".4f"),
        Column("less_ce", "minus cross_entropy"),
        Column("less_penalty", "minus euclidean_squared"),
        Column("less_twin", "minus its softmax twin"),
        Column("when", "iteration that reaches cross_entropy's loss"),
    ]
    lines = []
    for r in long_runs(rows):
        line = {
            "mean": interval(r["loss"], r["half"], ".4f"),
            "perplexity": math.exp(r["loss"]),
            "less_ce": shown(r["above_ce"]),
            "less_penalty": shown(r["above_penalty"]),
            "less_twin": shown(r["harmax"]),
        }
        if r["times"]:
            line["when"] = f"{np.mean(r['times']):.0f} ({len(r['times'])} of {r['seeds']})"
        lines.append(r | line)
    return markdown(lines, columns)


def stage_two_training(rows: list[Row]) -> str:
    """Gradients, prototypes and costs of the long runs."""
    columns: Columns = [
        *HEAD,
        *TRAINING,
        Column("tokens_per_s", "tokens/s", ",.0f"),
        Column("millijoules", "mJ/token", ".2f"),
        Column("energy", "energy to reach cross_entropy's loss", ".2f"),
    ]
    lines = [r | {"millijoules": r["joules"] and 1000 * r["joules"]} for r in long_runs(rows)]
    return markdown(lines, columns)


def p_values(rows: list[Row]) -> str:
    """Paired t-tests of the losses in stage 2, for heads with several seeds.

    p-values are corrected (Holm) within each of the three kinds of comparison.
    """
    every = {key: runs for key, runs in by_seed(rows).items() if len(runs) > 1}
    twins = {(head, link): (head, "softmax") for head, link in every if link == "harmonic"}
    kinds = {
        "its softmax twin": twins,
        BASELINE[0]: dict.fromkeys(every, BASELINE),
        PENALTY[0]: dict.fromkeys(every, PENALTY),
    }
    lines = []
    for kind, pairs in kinds.items():
        p = {}
        for key, other in pairs.items():
            if key != other and other in every:
                p[key] = p_value(by_seeds(every[key], every[other]))
        for key, corrected in holm(p).items():
            difference = paired(every[key], every[pairs[key]])
            line = {"name": key[0], "link": key[1], "less": kind}
            line |= {"p": shown_p(p[key]), "holm": shown_p(corrected)}
            lines.append(line | {"difference": shown(difference, "+.4f")})
    columns: Columns = [
        *HEAD,
        Column("less", "minus"),
        "difference",
        "p",
        Column("holm", "p after Holm's correction"),
    ]
    return markdown(lines, columns)


def pairs(rows: list[Row]) -> str:
    """PAIRS: differences of the losses, of the gradient norm's variation and of the prototypes'
    shape."""
    measures = {"grad_norm_cv": "+.3f", "pca_components_90": "+.1f", "pca_top2": "+.3f"}
    lines = []
    for text in PAIRS:
        a, b = _chosen(rows, text)
        heads = [words.replace("/", ", ").replace(", 4", ", doubled") for words in text.split(",")]
        line = {"a": heads[0].removesuffix(", control"), "b": heads[1].removesuffix(", control")}
        line |= {"seeds": str(len(set(a) & set(b))), "loss": shown(paired(a, b))}
        for measure, form in measures.items():
            line[measure] = _difference(a, b, measure, form)
        lines.append(line)
    columns: Columns = [
        Column("a", "head"),
        Column("b", "minus"),
        "seeds",
        Column("loss", "test loss"),
        Column("grad_norm_cv", "CV of the gradient norm"),
        Column("pca_components_90", "PCs for 90 %"),
        Column("pca_top2", "top 2 PCs"),
    ]
    return markdown(lines, columns)


def compared(rows: list[Row], text: str) -> str:
    """The differences of two heads in loss and other measures, paired by seed.

    text: the value of --compare.
    Raises: UserError if it does not name two heads with a common seed.
    """
    a, b = _chosen(rows, text)
    lines = [{"measure": "loss", "difference": shown(paired(a, b), "+.4f")}]
    for column in TRAINING:
        difference = _difference(a, b, column.key, "+.4g")
        lines.append({"measure": column.key, "difference": difference})
    return markdown(lines, ["measure", Column("difference", text.replace(",", " less "))])


def _chosen(rows: list[Row], text: str) -> tuple[dict[str, Row], dict[str, Row]]:
    """The runs of two heads that --compare names, seed -> row. UserError where none is paired."""
    second = [r for r in rows if r["stage"] == "2"]
    longer = [r for r in rows if r["stage"] == "4" and r["ablation"] == LONGER]
    chosen = []
    for words in (part.strip().split("/") for part in text.split(",")):
        among = longer if words[2:] == ["4"] else second
        chosen.append({r["seed"]: r for r in among if [name(r), r["link"]] == words[:2]})
    if len(chosen) != 2 or not set(chosen[0]) & set(chosen[1]):
        raise UserError(
            f"compare={text}: name two heads that have a seed in common, such as"
            " cosine/harmonic,cross_entropy/control"
        )
    return chosen[0], chosen[1]


def _difference(a: dict[str, Row], b: dict[str, Row], measure: str, form: str) -> str:
    pairs = [(a[s][measure], b[s][measure]) for s in a if s in b]
    if not all(mine and other for mine, other in pairs):
        return "a run diverged"
    values = [float(mine) - float(other) for mine, other in pairs]
    return shown(mean_and_half(values), form)


def stage_three(rows: list[Row]) -> str:
    """The best heads with other models and data."""
    places: dict[tuple[str, str], dict[Key, Row]] = {}
    for r in rows:
        if r["stage"] == "3":
            places.setdefault((r["arch"], r["dataset"]), {})[name(r), r["link"]] = r
    lines = []
    for runs in places.values():
        losses = {key: final(r) for key, r in runs.items()}
        for head, link in sorted(losses, key=losses.__getitem__):
            r, value = runs[head, link], losses[head, link]
            line = {"name": head, "loss": value}
            line["less_ce"] = value - losses.get(BASELINE, math.nan)
            if link == "harmonic" and (head, "softmax") in losses:
                line["less_twin"] = value - losses[head, "softmax"]
            if objective_of(r["arch"]).masked:
                # Masked language modelling gives no likelihood of a text.
                line["bits_per_byte"] = None
            lines.append(r | line)
    columns: Columns = [
        Column("arch"),
        Column("dataset", "corpus"),
        *HEAD,
        Column("loss", form=".4f"),
        Column("bits_per_byte", "val bits/byte", ".4f"),
        Column("less_ce", "minus cross_entropy", "+.3f"),
        Column("less_twin", "minus its softmax twin", "+.3f"),
    ]
    return markdown(lines, columns)


def stage_four(rows: list[Row]) -> str:
    """The losses with one change, and differences to stage 2 with the same seeds.

    They are differences to the unchanged head, to cross_entropy and to the twin.
    """
    every = by_seed(rows)
    found: dict[tuple[str, str, str], dict[str, Row]] = {}
    for r in rows:
        if r["stage"] == "4":
            found.setdefault((name(r), r["link"], r["ablation"]), {})[r["seed"]] = r
    lines = []
    for (head, link, changed), runs in found.items():
        twin = every.get((head, "softmax"), {}) if link == "harmonic" else {}
        line = {
            "name": head,
            "link": link,
            "changed": changed,
            "seeds": len(runs),
            "loss": interval(*mean_and_half([final(r) for r in runs.values()]), ".4f"),
            "less_own": shown(paired(runs, every.get((head, link), {}))),
            "less_ce": shown(paired(runs, every.get(BASELINE, {}))),
            "less_twin": shown(paired(runs, twin)),
        }
        lines.append(line)
    columns: Columns = [
        *HEAD,
        "changed",
        "seeds",
        "loss",
        Column("less_own", "minus unchanged"),
        Column("less_ce", "minus unchanged cross_entropy"),
        Column("less_twin", "minus its unchanged softmax twin"),
    ]
    return markdown(lines, columns)


STAGES = (
    ("1", stage_one),
    ("2", stage_two),
    ("2", stage_two_training),
    ("2", p_values),
    ("3", stage_three),
    ("4", stage_four),
)


# ---- pictures ----------------------------------------------------------------------------------


def draw(rows: list[Row], path: Path) -> None:
    """Draws stage 1 on the left, with a dot for each setting, and stage 2 on the right.

    The best setting has a large dot. Stage 2 shows means over seeds with intervals.
    """
    best, long = best_settings(rows), long_runs(rows)
    heads = list(dict.fromkeys(r["name"] for r in best))
    height: dict[Key, float] = {}
    for i, head in enumerate(heads):
        height |= {(head, "harmonic"): i - 0.18, (head, "softmax"): i + 0.18, (head, "control"): i}
    figure = figures.figure(1.4 + 0.26 * len(heads))
    panels = figure.subplots(1, 2 if long else 1, sharey=True, squeeze=False)[0]
    _draw_settings(panels[0], groups(rows, "1"), height)
    if long:
        _draw_long_runs(panels[1], long, height)
    panels[0].set_yticks(range(len(heads)), heads)
    panels[0].set_ylim(len(heads) - 0.4, -0.6)
    _legend_of_links(figure, panels[0], lines=False)
    for axes in panels:
        axes.grid(axis="x", alpha=0.2)
        axes.set_axisbelow(True)
    figures.save(figure, path)


def _legend_of_links(figure: Figure, axes: Axes, lines: bool) -> None:
    """A legend that tells the links apart, whatever the head. lines: of curves, not of dots."""
    faces = {"harmonic link, or control": figures.GREY, "softmax link": "white"}
    for (name, face), line in zip(faces.items(), ("-", "--"), strict=True):
        style: dict[str, Any] = dict(color=figures.GREY, markerfacecolor=face, label=name)
        axes.plot([], [], f"o{line}" if lines else "o", markersize=4, **style)
    figures.legend_below(figure, [axes])


def _dots(key: Key) -> dict[str, Any]:
    """The colours of a head's dots. A name has options after the head's own."""
    return figures.dots(key[0].split()[0], key[1])


def _draw_settings(axes: Axes, every: dict[Key, list[Row]], height: dict[Key, float]) -> None:
    low = min(loss(r) for group in every.values() for r in group)
    for key, group in every.items():
        losses, y = [loss(r) for r in group], height[key]
        shown = [min(value, low + 2) for value in losses]
        axes.plot(shown, [y] * len(shown), "o", markersize=3, alpha=0.5, **_dots(key))
        axes.plot(min(losses), y, "o", markersize=6.5, **_dots(key))
    axes.set_xlim(low - 0.1, low + 2.05)
    axes.set_title("Stage 1: every setting (large: the best)")
    axes.set_xlabel("validation loss, nats a token\n(a higher one is drawn at the right edge)")


def _draw_long_runs(axes: Axes, long: list[dict], height: dict[Key, float]) -> None:
    for r in long:
        key = r["name"], r["link"]
        half = 0 if math.isnan(r["half"]) else r["half"]
        bar: dict[str, Any] = dict(fmt="o", markersize=5, capsize=2, linewidth=1)
        axes.errorbar(r["loss"], height[key], xerr=half, **bar, **_dots(key))
        if key == BASELINE:
            color = figures.head_color(BASELINE[0])
            axes.axvline(r["loss"], color=color, linewidth=0.8, linestyle=":")
    low, high = long[0]["loss"], long[-1]["loss"]
    axes.set_xlim(low - 0.1, min(low + 2.1, high + 0.1))
    axes.set_title("Stage 2: means over seeds, 95 % intervals")
    axes.set_xlabel("test loss, nats a token\n(dotted: cross_entropy; long intervals are cut)")


def draw_lowest(rows: list[Row], path: Path) -> None:
    """Draws the curves of the four heads that end lowest."""
    draw_curves(rows, path, most=4)


def draw_curves(rows: list[Row], path: Path, most: int | None = None) -> None:
    """Draws a panel for each head of stage 2: its validation loss minus that of cross_entropy.

    Differences are for the same seed and iteration, averaged over seeds. Heads that end near
    cross_entropy have a shaded panel with a finer scale.
    """
    above = curves_above(rows)
    finished = {head for head, _ in above}
    heads = list(dict.fromkeys(r["name"] for r in long_runs(rows) if r["name"] != BASELINE[0]))
    heads = [head for head in heads if head in finished][:most]
    width = min(4, len(heads))
    height = math.ceil(len(heads) / width)
    figure = figures.figure(1.65 * height + 0.6)
    iterations = int(groups(rows, "2")[BASELINE][0]["iters"])
    x = np.linspace(0, iterations, 1 + len(above[BASELINE]))[1:]
    for i, head in enumerate(heads):
        axes = figure.add_subplot(height, width, i + 1)
        axes.axhline(0, color="0.6", linewidth=0.8, linestyle=":")
        mine = {link: above[head, link] for link in LINKS if (head, link) in above}
        for link, values in mine.items():
            line = figures.LINES.get(link, "-")
            axes.plot(x, values, line, marker="o", markersize=3.5, **_dots((head, link)))
        near = min(values[-1] for values in mine.values()) < 0.25
        axes.set_ylim(*((-0.15, 0.35) if near else (-0.05, 1.55)))
        axes.set_facecolor("#eef3f8" if near else "none")
        axes.set_title(head)
        axes.set_xlim(0, 1.04 * iterations)
        axes.set_xticks([0, iterations // 2, iterations])
        if i % width == 0:
            axes.set_ylabel("nats a token\nabove cross_entropy")
        if i + width >= len(heads):
            axes.set_xlabel("iteration")
    _legend_of_links(figure, axes, lines=True)
    figures.save(figure, path)


def curves_above(rows: list[Row]) -> dict[Key, np.ndarray]:
    """The validation losses of stage 2 minus those of cross_entropy, averaged over seeds.

    They begin at the first evaluation after the start. Runs that were stopped are left out.
    """
    curves: dict[Key, dict[str, np.ndarray]] = {}
    for key, runs in by_seed(rows).items():
        for seed, r in runs.items():
            if r["val_losses"]:
                values = np.array([float(v) for v in r["val_losses"].split()][1:])
                curves.setdefault(key, {})[seed] = values
    found = {}
    for key, mine in curves.items():
        seeds = [seed for seed in mine if seed in curves.get(BASELINE, {})]
        if seeds:
            found[key] = np.mean([mine[seed] - curves[BASELINE][seed] for seed in seeds], 0)
    return found


def main() -> None:
    (c,) = parse(sys.argv[1:], ReportConfig)
    if not Path(c.table).is_file():
        raise UserError(f"no table {c.table}: python -m studies.heads writes it")
    rows = read_csv(c.table, COLUMNS)
    if c.compare:
        print(compared(rows, c.compare))
        return
    for stage, table in STAGES:
        count = sum(r["stage"] == stage for r in rows)
        if count:
            print(f"Stage {stage}: {count} runs\n\n{table(rows)}\n")
        else:
            print(f"Stage {stage}: no runs yet\n")
    out = Path(c.out)
    pictures: dict[Path, Callable] = {out: draw}
    if set(curves_above(rows)) - {BASELINE}:
        pictures[out.with_stem(f"{out.stem}_curves")] = draw_curves
        pictures[out.with_stem(f"{out.stem}_lowest")] = draw_lowest
    for place, picture in pictures.items():
        picture(rows, place)
    print(f"wrote {' and '.join(map(str, pictures))}")


if __name__ == "__main__":
    cli(main)
