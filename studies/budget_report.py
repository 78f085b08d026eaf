"""What longer training changes, from the rows in results/budget.csv so far.

    # prints Markdown; writes results/budget.png
    python -m studies.budget_report

Three questions: Do distances keep their lead over cross_entropy with more tokens? Does the harmonic
link differ from its softmax twin? Does the order of heads after 0.6 M tokens predict the later
ones? Differences are of test losses, paired by seed, with 95 % intervals (Student's t). The
p-values of a table are corrected for their number (Holm), the intervals are not.
"""

import itertools
import math
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator
from scipy.stats import rankdata, spearmanr

from analysis import figures
from analysis.intervals import holm, mean_and_half, p_value, shown_p
from analysis.tables import Column, Columns, interval, markdown
from base.command_line import cli, parse
from studies.budget import (
    ALL,
    COLUMNS,
    HEADS,
    KEY,
    LONG,
    RATES,
    SEEDS,
    Head,
    Plan,
    base,
    strength,
    summary,
)
from studies.budget import TOKENS as AN_ITERATION
from studies.runner import Row, Table
from studies.search import Setting, next_setting, number

BASELINE = "cross_entropy"
# Stages that train longer and longer on one corpus, and their millions of tokens.
TOKENS = {"0.6M": 0.6, "2M": 2.0, "6M": 6.0, "20M": 20.0}
# All stages whose test losses are compared, and what readers call them.
BUDGETS = {stage: f"{tokens:g} M" for stage, tokens in TOKENS.items()}
BUDGETS |= {"dropout": "20 M, dropout 0.1", "imdb": "2 M of imdb", "wiki": "2 M of wiki"}
# A head, and the head that it is compared with.
LEADS = [(head, BASELINE) for head in HEADS if head != BASELINE]
NORMALISED = [("cosine", BASELINE), ("cosine softmax", BASELINE)]
TWINS = [(head, f"{head} softmax") for head in HEADS if f"{head} softmax" in HEADS]
# A control, and a near relative or cross_entropy.
PARTS = [
    ("student_t", "euclidean"),  # without the pole
    ("student_t", BASELINE),
    ("stablemax", BASELINE),  # with a power law, but no distance
    ("nGPT", "cosine softmax"),  # with a scale for each token
    ("nGPT", BASELINE),
    ("IsoMax+", "euclidean softmax"),  # on the sphere, with a trained scale
    ("IsoMax+", BASELINE),
]
# Stages whose runs are long enough for a validation loss to turn.
LATE = ("6M", "20M")
# Ranks of fewer heads say nothing.
FEWEST = 5
NOTHING = "No runs yet."
# The points of heads whose colours are much alike. Others are round.
MARKERS = {"mahalanobis": "s", "euclidean_squared": "^"}
# Measures other than the loss, and the form of their differences.
MEASURES = {"components_90": "+.1f", "grad_norm_cv": "+.3f", "ece": "+.4f"}

# Seed -> test loss.
Losses = dict[str, float]


@dataclass
class BudgetReportConfig:
    """The tables and the figure of longer training"""

    table: str = "results/budget.csv"
    """rows of studies.budget; it may be missing"""
    out: str = "results/budget.png"
    """the figure of the ends of runs; beside it, NAME_curves.png has their course, and
    NAME_energy.png their energy"""


class _AllDone(Table):
    """A table in which every run is found, so that the plan lists all of its runs. The setting in
    the middle is the best of each sweep, so none goes on beyond an edge."""

    def find(self, key: dict) -> Row:
        return {"val_loss": "0" if key == {**base(key["name"]), "learning_rate": RATES[1]} else "1"}

    row = find


def values_of(rows: list[Row], stage: str, head: str, column: str = "test_loss") -> Losses:
    """Seed -> the value of a column, which is infinite for a run that diverged."""
    mine = [row for row in rows if (row["stage"], row["name"]) == (stage, head)]
    return {str(row["seed"]): number(row[column]) for row in mine}


def paired(rows: list[Row], stage: str, head: str, other: str, column: str = "test_loss") -> Losses:
    """The difference of test losses, or of another column, of each seed that both heads have."""
    mine, theirs = values_of(rows, stage, head, column), values_of(rows, stage, other, column)
    return {seed: mine[seed] - theirs[seed] for seed in mine if seed in theirs}


def differences(
    rows: list[Row], stage: str, head: str, other: str, column: str = "test_loss"
) -> list[float]:
    """The differences of `paired` without their seeds."""
    return list(paired(rows, stage, head, other, column).values())


def change(rows: list[Row], stage: str, head: str, other: str) -> list[float]:
    """How much a difference has grown since the fewest tokens, of each seed that both stages have;
    nothing for another corpus."""
    first = next(iter(TOKENS))
    if stage == first or stage not in TOKENS:
        return []
    early, late = (paired(rows, s, head, other) for s in (first, stage))
    return [late[seed] - early[seed] for seed in late if seed in early]


def verdict(found: list[float], p: float | None) -> str:
    """What differences between a head and another one say about the head; below 0 is better. p:
    corrected; None for fewer than two differences."""
    mean, _ = mean_and_half(found)
    if not math.isfinite(mean):
        return "a run diverged"
    if p is None:
        return "one seed"
    if p > 0.05:
        return "not told apart"
    return "ahead" if mean < 0 else "behind"


# ---- tables ------------------------------------------------------------------------------------


def progress(rows: list[Row]) -> str:
    """How many runs of each stage are done, and how many there will be at least."""
    planned = Counter(key["stage"] for key in Plan(_AllDone("", COLUMNS, KEY)).settings())
    done = Counter(row["stage"] for row in rows)
    lines = [{"stage": s, "done": done[s], "planned": n} for s, n in planned.items()]
    columns = [
        Column("stage"),
        Column("done", "runs done"),
        Column("planned", "runs planned, at least"),
    ]
    table = markdown(lines, columns)
    kept = (done & planned).total()  # A sweep can have more than the planned ones.
    done_of = f"{kept} of {planned.total()} planned runs are done"
    return f"{done_of}, not counting those that a sweep adds beyond an edge.\n\n{table}"


def settings(rows: list[Row]) -> str:
    """The best setting of each head's sweep so far, by validation loss."""
    lines, edges = [], 0
    for name in ALL:
        mine = [row for row in rows if (row["stage"], row["name"]) == ("sweep", name)]
        if mine:
            best = min(mine, key=lambda row: number(row["val_loss"]))
            lines.append({**best, "tried": len(mine), "strength": best[strength(name)]})
            edges += next_setting(_setting(best), [_setting(row) for row in mine]) is not None
    if not lines:
        return NOTHING
    columns: Columns = [
        Column("name", "head"),
        Column("tried", "settings tried"),
        Column("learning_rate", "learning rate"),
        Column("strength", "n (else the size of prototypes)"),
        Column("val_loss", unit="nats", form=".4f"),
    ]
    found = f"{edges} of {len(lines)} lie on the edge of what was tried so far."
    return f"{markdown(lines, columns)}\n\n{found}"


def checks(rows: list[Row]) -> str:
    """Validation losses of the longest runs with other settings than the sweep's best. All have the
    same seed."""
    first = [row for row in rows if (row["stage"], str(row["seed"])) == ("20M", str(SEEDS[0]))]
    found = {row["name"]: row for row in first}
    lines = []
    for row in [*first, *(row for row in rows if row["stage"] == "20M settings")]:
        line: dict[str, Any] = {**row, "strength": row[strength(row["name"])]}
        for key, other in (("own", row["name"]), ("base", BASELINE)):
            if other in found and row is not found[other]:
                line[key] = number(row["val_loss"]) - number(found[other]["val_loss"])
        lines.append(line)
    if not lines:
        return NOTHING
    order = list(HEADS)
    lines.sort(key=lambda line: order.index(line["name"]))
    columns: Columns = [
        Column("name", "head"),
        Column("learning_rate", "learning rate"),
        Column("strength", "n (else the size of prototypes)"),
        Column("val_loss", unit="nats", form=".4f"),
        Column("own", "minus the sweep's setting", "+.3f"),
        Column("base", "minus cross_entropy", "+.3f"),
    ]
    return markdown(lines, columns)


def _setting(row: Row) -> Setting:
    return float(row[strength(row["name"])]), float(row["learning_rate"])


def compared(
    rows: list[Row], pairs: Iterable[tuple[str, str]], stages: Iterable[str] = tuple(BUDGETS)
) -> str:
    """A line for each pair of heads and each of these stages that has runs.

    p-values are corrected for all tests that are planned, so that they change little with the runs
    of other heads.
    """
    found = {
        (head, other, stage): some
        for head, other in pairs
        for stage in stages
        if (some := differences(rows, stage, head, other))
    }
    tests = {
        key: p_value(values)
        for key, values in found.items()
        if len(values) > 1 and np.isfinite(values).all()
    }
    planned = {
        (head, other, stage): 1.0  # A test whose runs are missing counts too.
        for head, other in pairs
        for stage in stages
        if stage != "dropout" and (stage != "20M" or head in LONG)  # Those have one seed, or none.
    }
    corrected = holm(planned | tests)
    lines = []
    for key, values in found.items():
        head, other, stage = key
        p = corrected[key] if key in tests else None
        line = {"head": head, "less": other, "tokens": BUDGETS[stage], "seeds": len(values)}
        line |= {"difference": interval(*mean_and_half(values))}
        line |= {"p": None if p is None else shown_p(p)}
        if since := change(rows, stage, head, other):
            line["change"] = interval(*mean_and_half(since))
        lines.append(line | {"verdict": verdict(values, p)})
    if not lines:
        return NOTHING
    columns: Columns = [
        "head",
        Column("less", "minus"),
        "tokens",
        "seeds",
        Column("difference", unit="nats"),
        Column("p", "p, Holm"),
        "verdict",
    ]
    if any("change" in line for line in lines):
        columns = [*columns, Column("change", "change since 0.6 M")]
    return markdown(lines, columns)


def leads(rows: list[Row]) -> str:
    """Do distances keep their lead over cross_entropy?"""
    return compared(rows, LEADS)


def links(rows: list[Row]) -> str:
    """Does the harmonic link differ from its softmax twin?"""
    return compared(rows, TWINS)


def controls(rows: list[Row]) -> str:
    """What makes a difference: the pole, the tail, the norms or the distance?"""
    return compared(rows, PARTS, ("2M",))


def ranks(rows: list[Row]) -> str:
    """Does the order of heads after the fewest tokens predict the later ones?"""
    first, *later = TOKENS
    lines = []
    for stage in later:
        found = {
            name: (values_of(rows, first, name), values_of(rows, stage, name)) for name in HEADS
        }
        both = [pair for pair in found.values() if pair[0].keys() & pair[1].keys()]
        if len(both) < FEWEST:
            continue
        # Seeds differ more than heads, so all means are over the same seeds.
        seeds = set.intersection(*(set(losses) for pair in both for losses in pair))
        if seeds:
            means = [
                [np.mean([losses[seed] for seed in seeds]) for losses in order]
                for order in zip(*both, strict=True)
            ]
            line = {"early": BUDGETS[first], "late": BUDGETS[stage], "heads": len(both)}
            line |= {"seeds": len(seeds), "correlation": f"{spearmanr(*means).statistic:+.2f}"}
            lines.append(line | {"p": _rank_p(*means)})
    if not lines:
        return NOTHING
    columns: Columns = [
        Column("early", "order after"),
        Column("late", "and after"),
        "heads",
        Column("seeds", "seeds that all have"),
        Column("correlation", "Spearman's correlation"),
        Column("p", form=".2f"),
    ]
    return markdown(lines, columns)


def _rank_p(a: list, b: list) -> float:
    """The exact p-value of Spearman's correlation of a few numbers: the share of all orders of `b`
    whose correlation with `a` is at least as strong."""
    mine, other = (rankdata(x) - (len(x) + 1) / 2 for x in (a, b))
    found = np.abs(np.array(list(itertools.permutations(other))) @ mine)
    return float(np.mean(found > abs(other @ mine) - 1e-9))


def turns(rows: list[Row]) -> str:
    """Where the validation loss of long runs is lowest, and how far it ends above that."""
    lines = []
    for stage in LATE:
        for name in HEADS:
            if found := curves(rows, stage, name):
                tokens, mean = next(iter(found.values()))[0], _mean(found)
                least, end = float(mean.min()), float(mean[-1])
                at = f"{tokens[mean.argmin()]:.1f} of {tokens[-1]:.1f} M"
                line = {"head": name, "seeds": len(found), "at": at, "lowest": least}
                lines.append(line | {"rise": end - least})
    if not lines:
        return NOTHING
    columns: Columns = ["head", "seeds", Column("at", "tokens at the lowest val_loss")]
    lowest = Column("lowest", "lowest val_loss", ".4f", "nats")
    return markdown(lines, [*columns, lowest, Column("rise", "rise until the end", "+.4f", "nats")])


def halfway(rows: list[Row]) -> str:
    """Validation losses minus cross_entropy's half-way through runs and at their ends."""
    lines = []
    for stage in TOKENS:
        base = curves(rows, stage, BASELINE)
        for name in HEADS:
            found = curves(rows, stage, name)
            gaps = [found[seed][1] - base[seed][1] for seed in found if seed in base]
            if gaps and name != BASELINE:
                line = {"head": name, "tokens": BUDGETS[stage], "seeds": len(gaps)}
                for at, place in (("half", len(gaps[0]) // 2), ("end", -1)):
                    line[at] = interval(*mean_and_half([float(gap[place]) for gap in gaps]))
                lines.append(line)
    if not lines:
        return NOTHING
    columns: Columns = ["head", "tokens", "seeds", Column("half", "half-way", unit="nats")]
    return markdown(lines, [*columns, Column("end", "at the end", unit="nats")])


def curves(rows: list[Row], stage: str, name: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Millions of tokens and validation losses along each run of a head, by seed."""
    found = {}
    for row in rows:
        if (row["stage"], row["name"]) == (stage, name) and row.get("val_losses"):
            losses = np.array([float(text) for text in row["val_losses"].split()])
            last = round(float(row["tokens"]) * 1e6 / AN_ITERATION)
            each = math.ceil(
                last / 20
            )  # The interval of evaluations, as in studies.budget.training.
            steps = np.minimum(each * np.arange(len(losses)), last)
            found[str(row["seed"])] = steps * AN_ITERATION / 1e6, losses
    return found


def _mean(found: dict[str, tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """The mean validation losses over the seeds of `curves`."""
    return np.mean([losses for _, losses in found.values()], 0)


def measures(rows: list[Row]) -> str:
    """Other measures than the loss, paired by seed. p-values are not computed."""
    lines = []
    for head, other in [*NORMALISED, *TWINS]:
        for stage in TOKENS:
            line: dict[str, object] = {"head": head, "other": other, "tokens": BUDGETS[stage]}
            for column, form in MEASURES.items():
                found = differences(rows, stage, head, other, column)
                if found:
                    line |= {"seeds": len(found), column: interval(*mean_and_half(found), form)}
            if "seeds" in line:
                lines.append(line)
    if not lines:
        return NOTHING
    columns: Columns = [
        "head",
        Column("other", "minus"),
        *("tokens", "seeds"),
        Column("components_90", "PCs for 90 %"),
        Column("grad_norm_cv", "CV of the gradient norm"),
        Column("ece", "calibration error"),
    ]
    return markdown(lines, columns)


def cost(rows: list[Row]) -> dict[str, list[float]]:
    """Joules a token of each head, by its runs of the stage `cost`."""
    heads = dict.fromkeys(row["name"] for row in rows if row["stage"] == "cost")
    return {
        head: list(values_of(rows, "cost", head, "joules_per_token").values()) for head in heads
    }


def energy(rows: list[Row]) -> str:
    """The energy of a token, and of the longest run."""
    found, lines = cost(rows), []
    for name, joules in found.items():
        mean, half = mean_and_half(joules)
        line = {"head": name, "runs": len(joules), "token": interval(1e3 * mean, 1e3 * half, ".2f")}
        if BASELINE in found:
            line["share"] = mean / mean_and_half(found[BASELINE])[0]
        more = differences(rows, "cost", name, BASELINE, "joules_per_token")
        if more and name != BASELINE:
            line["more"] = interval(*mean_and_half([1e3 * joules for joules in more]), "+.2f")
        lines.append(line | {"run": mean * TOKENS["20M"] * 1e3})
    if not lines:
        return NOTHING
    columns: Columns = [
        "head",
        "runs",
        Column("token", unit="mJ"),
        Column("share", "times that of cross_entropy", ".2f"),
        Column("more", "minus that of cross_entropy", unit="mJ"),
        Column("run", "20 M tokens", ".0f", "kJ"),
    ]
    return markdown(lines, columns)


# ---- the figures -------------------------------------------------------------------------------


def _style(head: Head) -> dict[str, Any]:
    """The line and the points of a head."""
    shape = {"marker": MARKERS.get(head.head, "o"), "linestyle": figures.LINES[head.link]}
    return shape | figures.dots(head.head, head.link)


def draw(rows: list[Row], path: Path) -> None:
    """Test loss against tokens of training, and what is paired with cross_entropy's."""
    figure = figures.figure(3.6)
    left, right = figure.subplots(1, 2)
    # Heads stand beside each other, so that no interval hides another.
    shifts = np.geomspace(0.93, 1 / 0.93, len(HEADS))
    for (name, head), shift in zip(HEADS.items(), shifts, strict=True):
        style = _style(head)
        found = {s: list(values_of(rows, s, name).values()) for s in TOKENS}
        _line(left, found, name, shift, style)
        if name != BASELINE:
            found = {s: differences(rows, s, name, BASELINE) for s in TOKENS}
            _line(right, found, name, shift, style)
    right.axhline(0, color=figures.head_color(BASELINE), linewidth=0.8)
    left.set_ylabel("test loss, nats a token")
    right.set_ylabel("test loss minus that of\ncross_entropy, nats a token")
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xticks(list(TOKENS.values()), [f"{tokens:g}" for tokens in TOKENS.values()])
        axes.minorticks_off()
        axes.set_xlim(0.5, 24)
        axes.set_xlabel("tokens of training, millions")
        axes.grid(alpha=0.2)
    if not any(row["stage"] in TOKENS for row in rows):
        left.text(0.5, 0.5, "no runs yet", transform=left.transAxes, ha="center")
    figures.legend_below(figure, [left])
    figures.save(figure, path)


def draw_curves(rows: list[Row], path: Path) -> None:
    """Validation loss along the longest runs that all LONG heads have, and what is paired with
    cross_entropy's."""
    stages = [s for s in LATE if all(curves(rows, s, name) for name in LONG)]
    figure = figures.figure(3.6)
    left, right = figure.subplots(1, 2)
    for name, head in HEADS.items() if stages else ():
        found, base = curves(rows, stages[-1], name), curves(rows, stages[-1], BASELINE)
        style = {"color": figures.head_color(head.head), "linestyle": figures.LINES[head.link]}
        if found:
            tokens = next(iter(found.values()))[0]
            left.plot(tokens[1:], _mean(found)[1:], label=name, **style)
        if name != BASELINE and (seeds := [seed for seed in found if seed in base]):
            gap = np.mean([found[seed][1] - base[seed][1] for seed in seeds], 0)
            right.plot(tokens[4:], gap[4:], **style)  # The early gaps are ten times larger.
    right.axhline(0, color=figures.head_color(BASELINE), linewidth=0.8)
    left.set_ylabel("validation loss, nats a token")
    right.set_ylabel("validation loss minus that of\ncross_entropy, nats a token")
    for axes in (left, right):
        axes.set_xlabel("tokens of training, millions")
        axes.grid(alpha=0.2)
    if stages:
        figures.legend_below(figure, [left])
    figures.save(figure, path)


def draw_energy(rows: list[Row], path: Path) -> None:
    """Bits per byte at the end of runs against the energy of their tokens."""
    figure = figures.figure(3.6)
    axes = figure.subplots()
    for name, joules in cost(rows).items():
        head = ALL[name]
        style = _style(head)
        each, ends = mean_and_half(joules)[0], {}
        for stage, tokens in TOKENS.items():
            mine = [row for row in rows if (row["stage"], row["name"]) == (stage, name)]
            if mine:
                ends[each * tokens * 1e3] = np.mean([number(row["bits_per_byte"]) for row in mine])
        axes.plot(list(ends), list(ends.values()), label=name, markersize=4, **style)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.set_xlabel("energy of training, kJ")
    axes.set_ylabel("bits per byte of the validation split")
    axes.grid(alpha=0.2)
    axes.legend(frameon=False)
    figures.save(figure, path)


def _line(axes: Axes, found: dict[str, list[float]], label: str, shift: float, style: dict) -> None:
    """Means over seeds, and their 95 % intervals where there are two seeds or more."""
    run = {
        TOKENS[stage] * shift: mean_and_half(values) for stage, values in found.items() if values
    }
    if not run:
        return
    means, halves = ([pair[i] for pair in run.values()] for i in (0, 1))
    bars: dict[str, Any] = dict(markersize=4, capsize=2, elinewidth=1)
    axes.errorbar(list(run), means, yerr=halves, label=label, **bars, **style)


def main() -> None:
    (c,) = parse(sys.argv[1:], BudgetReportConfig)
    rows = Table(c.table, COLUMNS, KEY).rows
    tables = {
        "Runs": progress,
        "Settings": settings,
        "Do these settings serve 20 M tokens?": checks,
        "Test losses": summary,
        "Do distances keep their lead over cross_entropy?": leads,
        "What makes a difference: the pole, the tail, the norms or the distance?": controls,
        "Does the harmonic link differ from its softmax twin?": links,
        "Does the order after 0.6 M tokens predict the later ones?": ranks,
        "Does the middle of a run predict its end?": halfway,
        "When does the validation loss turn?": turns,
        "What does a token cost?": energy,
    }
    for title, table in tables.items():
        print(f"{title}\n\n{table(rows)}\n")
    out = Path(c.out)
    draw(rows, out)
    along = out.with_stem(f"{out.stem}_curves")
    draw_curves(rows, along)
    print(f"wrote {out} and {along}")
    if cost(rows):
        costs = out.with_stem(f"{out.stem}_energy")
        draw_energy(rows, costs)
        print(f"wrote {costs}")


if __name__ == "__main__":
    cli(main)
