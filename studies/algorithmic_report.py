"""Tables and pictures of the algorithmic tasks, from results/algorithmic.csv and the curves in
out/algorithmic.

    # prints Markdown; writes results/algorithmic*.png and .gif
    python -m studies.algorithmic_report

A seed succeeds if it ever reaches 99 % of the test examples. Intervals of shares are Wilson's
(95 %). Medians of steps are over all seeds, and the steps of a seed that fails are infinite. A
picture is drawn only if its curves exist.
"""

import itertools
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.axes import Axes
from matplotlib.colors import hsv_to_rgb
from scipy.stats import binomtest

from analysis import figures
from analysis.geometry import principal
from analysis.intervals import mean_and_half
from analysis.tables import Column, interval, markdown
from base.command_line import cli, parse
from base.errors import UserError
from base.files import write_whole
from studies.algorithmic import (
    COLUMNS,
    FEW,
    HEADS,
    KEY,
    curves_file,
    swept,
)
from studies.runner import Row, Table
from studies.search import on_edge

BASELINE = ("cross_entropy", "control")
SHOWN = [BASELINE]
SHOWN += [
    (head, "harmonic")
    for head in ("euclidean", "mahalanobis", "manhattan", "chebyshev", "cosine", "bray_curtis_abs")
]
MOVING = [BASELINE, ("euclidean", "harmonic"), ("cosine", "harmonic")]


@dataclass
class ReportConfig:
    """Tables and pictures of the algorithmic tasks"""

    table: str = "results/algorithmic.csv"
    """rows of studies.algorithmic"""
    runs: str = "out/algorithmic"
    """folder of its curves; missing ones are left out of the pictures"""
    out: str = "results/algorithmic"
    """names of the pictures, without .png, _curves.png and .gif"""


def median_step(rows: list[Row], key: str) -> float:
    """The median, over all seeds, of the step at which a level was reached.

    It is infinite if half of them never reached it.
    """
    return float(np.median([float(r[key] or "inf") for r in rows]))


def median_gap(rows: list[Row]) -> float | None:
    """The median, over all seeds, of the steps from 99 % in training to 99 % in the test.

    None if half of them never reached it.
    """
    ends = [(float(r["train_99"] or "inf"), float(r["test_99"] or "inf")) for r in rows]
    median = float(np.median([math.inf if math.isinf(b) else b - a for a, b in ends]))
    return None if math.isinf(median) else median


def step(value: float) -> str:
    return "never" if math.isinf(value) else f"{value:.0f}"


def title(head: str, link: str) -> str:
    return head + (", softmax twin" if link == "softmax" else "")


def select(rows: list[Row], stage: str, task: str, head: str, link: str) -> list[Row]:
    wanted = dict(stage=stage, task=task, head=head, link=link)
    return [r for r in rows if r.items() >= wanted.items()]


def success(rows: list[Row]) -> str:
    k = sum(r["test_99"] != "" for r in rows)
    low, high = binomtest(k, len(rows)).proportion_ci(method="wilson")
    return f"{k}/{len(rows)} ({100 * low:.0f}-{100 * high:.0f} %)"


# ---- tables ------------------------------------------------------------------------------------


def main_table(rows: list[Row]) -> str:
    """Every head on every task, with settings swept on addition."""
    return _task_table(rows, "main")


def tuned_table(rows: list[Row]) -> str:
    """A few heads, with settings swept on the task itself."""
    return _task_table(rows, "tuned")


def _task_table(rows: list[Row], stage: str) -> str:
    tasks = list(dict.fromkeys(r["task"] for r in rows if r["stage"] == stage))
    columns = [Column("head")]
    for task in tasks:
        columns.append(Column(f"{task} success", f"{task}: seeds that reach 99 %"))
        columns.append(Column(f"{task} steps", "median steps"))
        columns.append(Column(f"{task} accuracy", "mean accuracy", ".2f"))
        columns.append(Column(f"{task} top2", "top 2 PCs", ".2f"))
    lines = []
    for head, link in HEADS:
        line: dict[str, Any] = {"head": title(head, link)}
        for task in tasks:
            if mine := select(rows, stage, task, head, link):
                line[f"{task} success"] = success(mine)
                line[f"{task} steps"] = step(median_step(mine, "test_99"))
                line[f"{task} accuracy"] = np.mean([float(r["test_accuracy"]) for r in mine])
                line[f"{task} top2"] = np.median([float(r["top2"]) for r in mine])
        if len(line) > 1:
            lines.append(line)
    return markdown(lines, columns)


def gap_table(rows: list[Row]) -> str:
    """Grokking: how many steps after the training examples the test examples are learnt."""
    runs = (
        ("grokking", "addition113", "MLP, p = 113, 30 %"),
        ("decoder", "addition", "decoder, p = 31, 80 %"),
    )
    lines = []
    for (stage, task, model), (head, link) in itertools.product(runs, FEW):
        if mine := select(rows, stage, task, head, link):
            last = [float(r["test_accuracy"]) for r in mine]
            line = {
                "model": model,
                "head": title(head, link),
                "train": step(median_step(mine, "train_99")),
                "test": step(median_step(mine, "test_99")),
                "gap": median_gap(mine),
                "success": success(mine),
                "end": f"{sum(a >= 0.99 for a in last)}/{len(last)}",
                "accuracy": np.mean(last),
            }
            lines.append(line)
    columns = [
        Column("model"),
        Column("head"),
        Column("train", "step of 99 % in training"),
        Column("test", "step of 99 % in the test"),
        Column("gap", "median gap", ".0f"),
        Column("success", "seeds that reach 99 % in the test"),
        Column("end", "seeds at 99 % at the end"),
        Column("accuracy", "final test accuracy", ".3f"),
    ]
    return markdown(lines, columns)


def fraction_table(rows: list[Row]) -> str:
    fractions = sorted({r["fraction"] for r in rows if r["stage"] == "fraction"})
    lines = []
    for head, link in FEW:
        line: dict[str, list[float]] = {}
        for r in select(rows, "fraction", "addition", head, link):
            line.setdefault(r["fraction"], []).append(float(r["test_accuracy"]))
        if line:
            means = {fraction: np.mean(values) for fraction, values in line.items()}
            lines.append({"head": title(head, link)} | means)
    shares = [Column(fraction, f"{100 * float(fraction):.0f} %", ".2f") for fraction in fractions]
    return markdown(lines, [Column("head"), *shares])


def fraction_twins(rows: list[Row]) -> str:
    """Test accuracy minus the softmax twin's, against the share of examples trained on."""
    runs = [r for r in rows if r["stage"] == "fraction"]
    shares = {f: f"{100 * float(f):.0f} %" for f in sorted({r["fraction"] for r in runs})}
    return _less_twins(runs, "test_accuracy", "fraction", shares)


def task_twins(rows: list[Row]) -> str:
    """The share of the top 2 components minus the softmax twin's, of each task."""
    runs = [r for r in rows if r["stage"] == "main"]
    return _less_twins(runs, "top2", "task", {r["task"]: r["task"] for r in runs})


def tuned_twins(rows: list[Row]) -> str:
    """Test accuracy minus the softmax twin's, with settings swept on the task itself."""
    runs = [r for r in rows if r["stage"] == "tuned"]
    return _less_twins(runs, "test_accuracy", "task", {r["task"]: r["task"] for r in runs})


def step_twins(rows: list[Row]) -> str:
    """The step of 99 % in the test minus the softmax twin's, of each task.

    Nothing where a seed of either head never reached it.
    """
    runs = [r for r in rows if r["stage"] == "main"]
    tasks = {r["task"]: r["task"] for r in runs}
    return _less_twins(runs, "test_99", "task", tasks, form="+.1f")


def _less_twins(
    runs: list[Row], measure: str, place: str, titles: dict[str, str], form: str = "+.2f"
) -> str:
    """Differences of a measure, paired by seed: a line for each of FEW that has a twin, a column
    for each value of `place`."""
    values = {}
    for r in runs:
        values[r["head"], r["link"], r[place], r["seed"]] = float(r[measure] or "inf")
    seeds = dict.fromkeys(r["seed"] for r in runs)
    lines = []
    for head in dict.fromkeys(name for name, link in FEW if link == "softmax"):
        line = {"head": head}
        for where in titles:
            differences = []
            for seed in seeds:
                mine = values.get((head, "harmonic", where, seed))
                twin = values.get((head, "softmax", where, seed))
                if mine is not None and twin is not None:
                    differences.append(mine - twin)
            if differences and np.isfinite(differences).all():
                line[where] = interval(*mean_and_half(differences), form)
        lines.append(line)
    columns = [Column(where, title) for where, title in titles.items()]
    return markdown(lines, [Column("head"), *columns])


# ---- pictures ----------------------------------------------------------------------------------


def curves(
    folder: str, rows: list[Row], stage: str, task: str, head: str, link: str
) -> dict | None:
    """The stored curves of a batch, or None."""
    mine = select(rows, stage, task, head, link)
    if not mine:
        return None
    path = curves_file(folder, {name: mine[0][name] for name in KEY})
    return torch.load(path, weights_only=True) if path.is_file() else None


def plane(axes: Axes, x: np.ndarray, names: Callable[[int], str], label: str) -> None:
    """Draws named points (M, 2). Their colours follow their order: around a circle for addition,
    whose last number is next to its first."""
    order = np.linspace(0, 1, len(x), endpoint=False)
    if len(x) == 31:
        colors = hsv_to_rgb(np.stack([order, np.full(len(x), 0.85), np.full(len(x), 0.8)], -1))
    else:
        colors = matplotlib.colormaps["viridis"](0.9 * order)
    axes.scatter(x[:, 0], x[:, 1], c=colors, s=10)
    middle, size = x.mean(0), np.ptp(x, axis=0)
    small: dict[str, Any] = dict(fontsize=6.5, textcoords="offset points", ha="center", va="center")
    for i, point in enumerate(x):
        # Away from the middle, where there is most room.
        away = (point - middle) / size
        shift = 7 * away / max(float(np.linalg.norm(away)), 1e-9)
        axes.annotate(names(i), point, xytext=shift, color=0.7 * colors[i][:3], **small)
    axes.margins(0.12)
    axes.set_title(label)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set(visible=True, color="0.85")


def corner(i: int) -> str:
    """The name of a lattice point."""
    return f"{i % 5},{i // 5}"


def projected(table: torch.Tensor, onto: torch.Tensor | None = None) -> np.ndarray:
    """Projects rows (V, C) on the top 2 principal components of `onto`, or their own: (V, 2)."""
    onto = table if onto is None else onto
    _, _, directions = principal(onto)
    return ((table.double() - onto.double().mean(0)) @ directions[:, :2]).numpy()


def draw_embeddings(c: ReportConfig, rows: list[Row], path: Path) -> None:
    """Draws embeddings: a block of panels for each task, a panel for each head.

    It shows the seed with the median share of variance in the top 2 components.
    """
    tasks: dict[str, tuple[str, Callable[[int], str]]] = {
        "addition": (
            "Addition: prototypes of 31 numbers on two principal components (% of the variance)",
            str,
        ),
        "lattice": ("Lattice: those of the 25 points (x, y) of a grid", corner),
    }
    width = 4
    height = math.ceil(len(SHOWN) / width)
    figure = figures.figure(2.2 * height * len(tasks) + 0.5)
    blocks = figure.subfigures(len(tasks), 1, squeeze=False)[:, 0]
    for block, (task, (heading, names)) in zip(blocks, tasks.items(), strict=True):
        block.suptitle(heading, fontsize=10, x=0.01, ha="left")
        panels = block.subplots(height, width, squeeze=False).ravel()
        for axes in panels:
            axes.axis("off")
        for axes, (head, link) in zip(panels, SHOWN, strict=False):
            kept = curves(c.runs, rows, "main", task, head, link)
            if kept is None:
                continue
            axes.axis("on")
            shares = [float(r["top2"]) for r in select(rows, "main", task, head, link)]
            seed = int(np.argsort(shares)[len(shares) // 2])
            label = f"{head}, {100 * shares[seed]:.0f} %"
            plane(axes, projected(kept["prototypes"][seed]), names, label)
    figures.save(figure, path)


def draw_curves(c: ReportConfig, rows: list[Row], path: Path) -> None:
    """Draws grokking of MLP and decoder, and the accuracy for each share of training examples.

    The training accuracy is a thin line of the same style as the test accuracy.
    """
    figure = figures.figure(6.4)
    panels = figure.subplots(2, 2, sharey=True)
    first, second, third = panels.flat[:3]
    panels.flat[3].axis("off")
    for (head, link), style in zip(FEW, styles_of(FEW), strict=True):
        grokking = curves(c.runs, rows, "grokking", "addition113", head, link)
        decoder = curves(c.runs, rows, "decoder", "addition", head, link)
        for axes, kept in ((first, grokking), (second, decoder)):
            if kept is not None:
                steps, test, known = (kept[k][1:] for k in ("steps", "test", "train"))
                axes.plot(steps, test.mean(1), **style)
                axes.plot(steps, known.mean(1), linewidth=0.6, **style)
        found: dict[float, list[float]] = {}
        for r in select(rows, "fraction", "addition", head, link):
            found.setdefault(float(r["fraction"]), []).append(float(r["test_accuracy"]))
        fractions = sorted(found)
        means = [np.mean(found[fraction]) for fraction in fractions]
        dots = {"marker": "o", "markersize": 4} | figures.dots(head, link)
        third.plot(fractions, means, label=title(head, link), **(style | dots))
    for axes in (first, second):
        axes.set_xscale("log")
        axes.set_xlabel("step")
        axes.set_ylabel("accuracy (thin: training)")
    third.set_xlabel("share of the examples trained on")
    third.set_ylabel("test accuracy")
    first.set_title("MLP, modulo 113, trained on 30 % of the examples")
    second.set_title("Decoder, modulo 31, trained on 80 %")
    third.set_title("MLP, modulo 31")
    panels.flat[3].legend(*third.get_legend_handles_labels(), loc="center left")
    for axes in (first, second, third):
        axes.set_ylim(-0.02, 1.02)
        axes.grid(alpha=0.2)
        axes.yaxis.set_tick_params(labelleft=True)
    figures.save(figure, path)


def styles_of(heads: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    """`color` and `linestyle` of heads; the rows call the link of a control `control`."""
    return figures.head_styles(
        [(name, link if link in figures.LINES else None) for name, link in heads]
    )


def draw_animation(c: ReportConfig, rows: list[Row], path: Path) -> None:
    """Animates the embedding of addition modulo 31, on its final principal components."""
    shown = {}
    for key in MOVING:
        kept = curves(c.runs, rows, "main", "addition", *key)
        if kept is not None:
            shown[key] = kept
    figure = figures.figure(2.9, 2.6 * len(shown))
    panels = figure.subplots(1, len(shown), squeeze=False)[0]

    def frame(i: int) -> None:
        for axes, ((head, _), kept) in zip(panels, shown.items(), strict=True):
            axes.clear()
            label = f"{head}, step {int(kept['steps'][i])}, test {100 * kept['test'][i, 0]:.0f} %"
            plane(axes, projected(kept["path"][i], kept["path"][-1]), str, label)
            edge = 1.1 * np.abs(projected(kept["path"][-1])).max()
            axes.set_xlim(-edge, edge)
            axes.set_ylim(-edge, edge)

    count = len(next(iter(shown.values()))["steps"])
    frames = [*range(count), *[count - 1] * 8]
    animation = FuncAnimation(figure, frame, frames=frames)
    write_whole(path, lambda aside: animation.save(aside, PillowWriter(fps=8), dpi=100))


def main() -> None:
    (c,) = parse(sys.argv[1:], ReportConfig)
    rows = Table(c.table, COLUMNS, KEY).rows
    if not rows:
        raise UserError(f"no rows in {c.table}: python -m studies.algorithmic writes them")
    tables = {
        "The tasks": main_table,
        "Steps, minus the softmax twin's": step_twins,
        "Settings swept on the task itself": tuned_table,
        "Their test accuracy, minus the softmax twin's": tuned_twins,
        "Grokking (the median gap of the seeds)": gap_table,
        "Data efficiency": fraction_table,
    }
    for name, table in tables.items():
        print(f"{name}\n\n{table(rows)}\n")
    print(f"{on_edge(list(swept(rows).values()))}\n")
    needs = (
        (".png", draw_embeddings, [("main", "addition"), ("main", "lattice")], SHOWN),
        ("_curves.png", draw_curves, [("grokking", "addition113"), ("decoder", "addition")], FEW),
        (".gif", draw_animation, [("main", "addition")], MOVING),
    )
    for ending, picture, stages, heads in needs:
        if not any(curves(c.runs, rows, *stage, *key) for stage in stages for key in heads):
            print(
                f"no {c.out}{ending}: its curves are not in {c.runs} (python -m studies.algorithmic"
                " keeps them)"
            )
            continue
        picture(c, rows, Path(c.out + ending))
        print(f"wrote {c.out}{ending}")


if __name__ == "__main__":
    cli(main)
