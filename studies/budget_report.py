"""What longer training changes, from results/budget.csv, as far as the study has got.

    # prints Markdown; writes results/budget.png
    python -m studies.budget_report

Three questions: Do cosines keep their lead over cross_entropy with more tokens? Does the harmonic
link differ from its softmax twin? Does the order of heads after 0.6 M tokens predict the later
ones? Differences are of test losses, paired by seed, with 95 % intervals (Student's t). They are
not corrected for their number.
"""

import math
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from scipy.stats import spearmanr

from analysis import figures
from analysis.tables import Column, Columns, interval, markdown
from base.command_line import cli, parse
from studies.budget import ALL, COLUMNS, HEADS, KEY, RATES, Plan, summary
from studies.intervals import mean_and_half
from studies.runner import Row, Table
from studies.search import number

BASELINE = "cross_entropy"
# Stages that train longer and longer on one corpus, and their millions of tokens.
TOKENS = {"0.6M": 0.6, "2M": 2.0, "6M": 6.0, "20M": 20.0}
# All stages whose test losses are compared, and what readers call them.
BUDGETS = {stage: f"{tokens:g} M" for stage, tokens in TOKENS.items()}
BUDGETS |= {"dropout": "20 M, dropout 0.1", "wiki": "2 M of wiki"}
# A head, and the head that it is compared with.
NORMALISED = [("cosine", BASELINE), ("cosine softmax", BASELINE)]
TWINS = [(head, f"{head} softmax") for head in HEADS if f"{head} softmax" in HEADS]
# Ranks of fewer heads say nothing.
FEWEST = 3
NOTHING = "No runs yet."

# Seed -> test loss.
Losses = dict[str, float]


@dataclass
class BudgetReportConfig:
    """The tables and the figure of longer training"""

    table: str = "results/budget.csv"
    """rows of studies.budget; it may be missing"""
    out: str = "results/budget.png"
    """the figure"""


class _AllDone(Table):
    """A table in which every run is found, so that the plan lists all of its runs."""

    def find(self, key: dict) -> Row:
        return {"val_loss": "0"}

    row = find


def losses(rows: list[Row], stage: str, head: str) -> Losses:
    """A run that diverged has an infinite loss."""
    mine = [row for row in rows if (row["stage"], row["name"]) == (stage, head)]
    return {str(row["seed"]): number(row["test_loss"]) for row in mine}


def differences(rows: list[Row], stage: str, head: str, other: str) -> list[float]:
    """Of test losses, one for each seed that both heads have."""
    mine, theirs = losses(rows, stage, head), losses(rows, stage, other)
    return [mine[seed] - theirs[seed] for seed in mine if seed in theirs]


def verdict(found: list[float]) -> str:
    """What differences between a head and another one say about the head; below 0 is better."""
    mean, half = mean_and_half(found)
    if not math.isfinite(mean):
        return "a run diverged"
    if len(found) == 1:
        return "one seed"
    if abs(mean) <= half:
        return "not told apart"
    return "ahead" if mean < 0 else "behind"


# ---- tables ------------------------------------------------------------------------------------


def progress(rows: list[Row]) -> str:
    """How many runs of each stage are done, and how many there will be."""
    planned = Counter(key["stage"] for key in Plan(_AllDone("", COLUMNS, KEY)).settings())
    done = Counter(row["stage"] for row in rows)
    lines = [{"stage": s, "done": done[s], "planned": n} for s, n in planned.items()]
    columns = [Column("stage"), Column("done", "runs done"), Column("planned", "runs planned")]
    table = markdown(lines, columns)
    return f"{len(rows)} of {planned.total()} runs are done.\n\n{table}"


def rates(rows: list[Row]) -> str:
    """The validation loss of the sweep at each learning rate. The smallest chooses the rate."""
    lines = []
    for name in ALL:
        mine = [row for row in rows if (row["stage"], row["name"]) == ("sweep", name)]
        found = {f"{float(row['learning_rate']):g}": number(row["val_loss"]) for row in mine}
        if found:
            best = min(found, key=lambda rate: found[rate]) if len(found) == len(RATES) else None
            lines.append({"head": name, **found, "best": best})
    if not lines:
        return NOTHING
    columns = [Column(f"{rate:g}", unit="nats", form=".4f") for rate in RATES]
    return markdown(lines, ["head", *columns, "best"])


def compared(rows: list[Row], pairs: Iterable[tuple[str, str]]) -> str:
    """A line for each pair of heads and each budget that has runs."""
    lines = []
    for head, other in pairs:
        for stage, budget in BUDGETS.items():
            if found := differences(rows, stage, head, other):
                line = {"head": head, "less": other, "tokens": budget, "seeds": len(found)}
                line["difference"] = interval(*mean_and_half(found))
                lines.append(line | {"verdict": verdict(found)})
    if not lines:
        return NOTHING
    columns: Columns = ["head", "less", "tokens", "seeds", Column("difference", unit="nats")]
    return markdown(lines, [*columns, "verdict"])


def normalised(rows: list[Row]) -> str:
    """Do cosines keep their lead over cross_entropy?"""
    return compared(rows, NORMALISED)


def links(rows: list[Row]) -> str:
    """Does the harmonic link differ from its softmax twin?"""
    return compared(rows, TWINS)


def ranks(rows: list[Row]) -> str:
    """Does the order of heads after the fewest tokens predict the later ones?"""
    first, *later = TOKENS
    lines = []
    for stage in later:
        both = [h for h in HEADS if losses(rows, first, h) and losses(rows, stage, h)]
        if len(both) >= FEWEST:
            means = [
                [np.mean(list(losses(rows, s, head).values())) for head in both]
                for s in (first, stage)
            ]
            line = {"early": BUDGETS[first], "late": BUDGETS[stage], "heads": len(both)}
            lines.append(line | {"correlation": f"{spearmanr(*means).statistic:+.2f}"})
    if not lines:
        return NOTHING
    columns = [Column("early", "order after"), Column("late", "and after"), Column("heads")]
    return markdown(lines, [*columns, Column("correlation", "Spearman's correlation")])


# ---- the figure --------------------------------------------------------------------------------


def draw(rows: list[Row], path: Path) -> None:
    """Test loss against tokens of training, and what is paired with cross_entropy's."""
    figure = figures.figure(3.6)
    left, right = figure.subplots(1, 2)
    styles = figures.head_styles([(head.head, head.link) for head in HEADS.values()])
    for name, style in zip(HEADS, styles, strict=True):
        _line(left, {s: list(losses(rows, s, name).values()) for s in TOKENS}, name, style)
        if name != BASELINE:
            found = {s: differences(rows, s, name, BASELINE) for s in TOKENS}
            _line(right, found, name, style)
    right.axhline(0, color=figures.head_color(BASELINE), linewidth=0.8)
    left.set_title("test loss, nats a token")
    right.set_title("less cross_entropy's, paired by seed")
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xticks(list(TOKENS.values()), [f"{tokens:g}" for tokens in TOKENS.values()])
        axes.minorticks_off()
        axes.set_xlim(0.5, 24)
        axes.set_xlabel("million tokens of training")
        axes.grid(alpha=0.2)
    if not any(row["stage"] in TOKENS for row in rows):
        left.text(0.5, 0.5, "no runs yet", transform=left.transAxes, ha="center")
    lines, names = left.get_legend_handles_labels()
    figure.legend(lines, names, loc="outside lower center", ncols=4)
    figures.save(figure, path)


def _line(axes: Axes, found: dict[str, list[float]], label: str, style: dict) -> None:
    """Means over seeds; the band is their 95 % interval, where there are two seeds or more."""
    run = {TOKENS[stage]: mean_and_half(values) for stage, values in found.items() if values}
    means = np.array([mean for mean, _ in run.values()])
    halves = np.array([half for _, half in run.values()])
    axes.plot(list(run), means, marker="o", markersize=3, label=label, **style)
    axes.fill_between(list(run), means - halves, means + halves, color=style["color"], alpha=0.12)


def main() -> None:
    (c,) = parse(sys.argv[1:], BudgetReportConfig)
    rows = Table(c.table, COLUMNS, KEY).rows
    tables = {
        "Runs": progress,
        "Learning rates": rates,
        "Test losses": summary,
        "Do cosines keep their lead over cross_entropy?": normalised,
        "Does the harmonic link differ from its softmax twin?": links,
        "Does the order after 0.6 M tokens predict the later ones?": ranks,
    }
    for title, table in tables.items():
        print(f"{title}\n\n{table(rows)}\n")
    draw(rows, Path(c.out))
    print(f"wrote {c.out}")


if __name__ == "__main__":
    cli(main)
