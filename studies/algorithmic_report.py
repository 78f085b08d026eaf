"""Tables and pictures of the algorithmic tasks, from results/algorithmic.csv and the curves in
out/algorithmic.

    # prints Markdown; writes results/algorithmic*.png and .gif
    python -m studies.algorithmic_report

A seed succeeds if it ever reaches 99 % of the test examples; those that do not are counted.
Intervals of shares are Wilson's (95 %); medians of steps are over all seeds, failures last. A
picture whose curves are missing is not drawn.
"""

import itertools
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from analysis.geometry import principal
from base.command_line import cli, parse
from base.errors import UserError
from base.files import write_whole
from studies.algorithmic import FEW, HEADS, MODELS, MULTIPLE_STEP, RATE_STEP, Job, Rows, scored
from studies.heads_report import markdown
from studies.table import on_edge

SHOWN = [("cross_entropy", "control")] + [
    (h, "harmonic")
    for h in ("euclidean", "mahalanobis", "manhattan", "chebyshev", "cosine", "bray_curtis_abs")
]
MOVING = [("cross_entropy", "control"), ("euclidean", "harmonic"), ("cosine", "harmonic")]
COLORS = dict(
    zip(
        FEW,
        ["#59616b", "#0072b2", "#56b4e9", "#d55e00", "#e69f00", "#009e73", "#8fd6b4"],
        strict=True,
    )
)


@dataclass
class ReportConfig:
    """Tables and pictures of the algorithmic tasks"""

    table: str = "results/algorithmic.csv"
    """rows of studies.algorithmic"""
    runs: str = "out/algorithmic"
    """its curves; what is missing there is left out of the pictures"""
    out: str = "results/algorithmic"
    """the pictures' names, before .png, _curves.png and .gif"""


def wilson(k: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a share k of n."""
    middle, half = (
        k / n + z * z / (2 * n),
        z * math.sqrt(k / n * (1 - k / n) / n + z * z / (4 * n * n)),
    )
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


def median_step(rows: list[dict], key: str) -> float:
    """The median over all seeds of the step at which a level was reached; infinite where half of
    them never did."""
    return float(np.median([float(r[key] or "inf") for r in rows]))


def step(value: float) -> str:
    return "never" if math.isinf(value) else f"{value:.0f}"


def title(head: str, link: str) -> str:
    return head + (", softmax twin" if link == "softmax" else "")


def select(rows: list[dict], stage: str, task: str, head: str, link: str) -> list[dict]:
    return [
        r
        for r in rows
        if (r["stage"], r["task"], r["head"], r["link"]) == (stage, task, head, link)
    ]


def success(rows: list[dict]) -> str:
    k = sum(r["test_99"] != "" for r in rows)
    low, high = wilson(k, len(rows))
    return f"{k}/{len(rows)} ({100 * low:.0f}-{100 * high:.0f} %)"


def main_table(rows: list[dict]) -> str:
    tasks = list(dict.fromkeys(r["task"] for r in rows if r["stage"] == "main"))
    cells = []
    for head, link in HEADS:
        row = [title(head, link)]
        for task in tasks:
            mine = select(rows, "main", task, head, link)
            if mine:
                row += [
                    success(mine),
                    step(median_step(mine, "test_99")),
                    f"{np.median([float(r['top2']) for r in mine]):.2f}",
                ]
            else:
                row += ["", "", ""]
        if any(row[1:]):
            cells.append(row)
    return markdown(
        ["head", *(x for t in tasks for x in (f"{t}: seeds at 99 %", "steps", "top 2 PCs"))], cells
    )


def gap_table(rows: list[dict]) -> str:
    """Grokking: how long after the training set the test set is known."""
    cells = []
    for stage, task, model in (
        ("grokking", "addition113", "MLP, p = 113, 30 %"),
        ("decoder", "addition", "decoder, p = 31, 80 %"),
    ):
        for head, link in FEW:
            if mine := select(rows, stage, task, head, link):
                known, general = median_step(mine, "train_99"), median_step(mine, "test_99")
                gap = "" if math.isinf(general) else f"{general - known:.0f}"
                last = [float(r["test_accuracy"]) for r in mine]
                end = [f"{sum(a >= 0.99 for a in last)}/{len(last)}", f"{np.mean(last):.3f}"]
                cells.append(
                    [model, title(head, link), step(known), step(general), gap, success(mine), *end]
                )
    columns = [
        "",
        "head",
        "train 99 %",
        "test 99 %",
        "gap",
        "seeds at 99 % of the test",
        "and at the end",
        "last test accuracy",
    ]
    return markdown(columns, cells)


def fraction_table(rows: list[dict]) -> str:
    fractions = sorted({r["fraction"] for r in rows if r["stage"] == "fraction"})
    cells = []
    for head, link in FEW:
        if not (mine := select(rows, "fraction", "addition", head, link)):
            continue
        found = [[float(r["test_accuracy"]) for r in mine if r["fraction"] == f] for f in fractions]
        cells.append([title(head, link), *(f"{np.mean(a):.2f}" if a else "" for a in found)])
    return markdown(["head", *(f"{100 * float(f):.0f} %" for f in fractions)], cells)


def curves(
    folder: str, rows: list[dict], stage: str, task: str, head: str, link: str
) -> dict | None:
    """What a batch kept, or None."""
    if not (mine := select(rows, stage, task, head, link)):
        return None
    job = Job(stage, task, mine[0]["model"], head, link, float(mine[0]["fraction"]), 0, 0)
    path = Path(folder) / ("-".join(job.key()) + ".pt")
    return torch.load(path, weights_only=True) if path.is_file() else None


def plane(axes, x, names, label: str):
    """Points (M, 2) in colours of their order, a few of them named."""
    axes.scatter(*x.T, c=range(len(x)), cmap="hsv" if len(x) == 31 else "viridis", s=14)
    for i in range(len(x)):
        axes.annotate(
            names(i), x[i], fontsize=4.5, color="0.3", xytext=(2, 2), textcoords="offset points"
        )
    axes.set_title(label, fontsize=7, loc="left")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[["top", "right", "left", "bottom"]].set_color("0.85")


def projected(table: torch.Tensor, onto: torch.Tensor | None = None) -> np.ndarray:
    """Rows (V, C) on the top 2 principal components of `onto`, or of themselves: (V, 2)."""
    onto = table if onto is None else onto
    _, _, directions = principal(onto)
    return ((table.double() - onto.double().mean(0)) @ directions[:, :2]).numpy()


def draw_embeddings(c: ReportConfig, rows: list[dict], path: Path):
    """Rows: tasks; columns: heads. Of each head the seed whose share of the top 2 is the median."""
    from matplotlib.figure import Figure

    tasks = {"addition": str, "lattice": lambda i: f"{i % 5},{i // 5}"}
    figure = Figure(figsize=(1.6 * len(SHOWN), 1.75 * len(tasks)), layout="constrained")
    panels = figure.subplots(len(tasks), len(SHOWN), squeeze=False)
    for line, (task, names) in zip(panels, tasks.items(), strict=True):
        for axes, (head, link) in zip(line, SHOWN, strict=True):
            kept = curves(c.runs, rows, "main", task, head, link)
            if kept is None:
                axes.axis("off")
                continue
            shares = [float(r["top2"]) for r in select(rows, "main", task, head, link)]
            seed = int(np.argsort(shares)[len(shares) // 2])
            plane(
                axes,
                projected(kept["prototypes"][seed]),
                names,
                f"{head}\n{task}, top 2: {100 * shares[seed]:.0f} %",
            )
    figure.savefig(path, dpi=170)


def draw_curves(c: ReportConfig, rows: list[dict], path: Path):
    """Grokking of the MLP and of the decoder; accuracy against the share trained on."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    timed = (
        ("grokking", "addition113", "MLP, modulo 113, 30 % of the examples"),
        ("decoder", "addition", "decoder, modulo 31, 80 %"),
    )
    for axes, (stage, task, label) in zip(panels, timed, strict=False):
        for key, color in COLORS.items():
            kept = curves(c.runs, rows, stage, task, *key)
            if kept is not None:
                axes.plot(kept["steps"][1:], kept["test"][1:].mean(1), color=color)
                axes.plot(
                    kept["steps"][1:],
                    kept["train"][1:].mean(1),
                    color=color,
                    linestyle=":",
                    linewidth=1,
                )
        axes.set_xscale("log")
        axes.set_xlabel("step (solid: test accuracy, dotted: training accuracy)")
        axes.set_title(label, loc="left", fontsize=9)
    for key, color in COLORS.items():
        mine = select(rows, "fraction", "addition", *key)
        fractions = sorted({float(r["fraction"]) for r in mine})
        means = [
            np.mean([float(r["test_accuracy"]) for r in mine if float(r["fraction"]) == f])
            for f in fractions
        ]
        panels[2].plot(fractions, means, color=color, marker=".", label=title(*key))
    panels[2].set_xlabel("share of the examples trained on")
    panels[2].set_title("MLP, modulo 31: test accuracy", loc="left", fontsize=9)
    figure.legend(
        *panels[2].get_legend_handles_labels(),
        loc="outside upper center",
        ncols=len(COLORS),
        frameon=False,
        fontsize=8,
    )
    for axes in panels:
        axes.set_ylim(-0.02, 1.02)
        axes.grid(alpha=0.2)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def draw_animation(c: ReportConfig, rows: list[dict], path: Path):
    """The embedding of addition modulo 31 over training, on the principal components that it ends
    with."""
    from matplotlib.animation import FuncAnimation, PillowWriter
    from matplotlib.figure import Figure

    shown = {
        key: kept for key in MOVING if (kept := curves(c.runs, rows, "main", "addition", *key))
    }
    kept = list(shown.values())
    figure = Figure(figsize=(2.6 * len(shown), 2.9), layout="constrained")
    panels = figure.subplots(1, len(shown), squeeze=False)[0]

    def frame(i):
        for axes, key, k in zip(panels, shown, kept, strict=True):
            axes.clear()
            label = f"{key[0]}, step {int(k['steps'][i])}, test {100 * k['test'][i, 0]:.0f} %"
            plane(axes, projected(k["path"][i], k["path"][-1]), str, label)
            edge = 1.1 * np.abs(projected(k["path"][-1])).max()
            axes.set_xlim(-edge, edge)
            axes.set_ylim(-edge, edge)

    frames = [*range(len(kept[0]["steps"])), *[len(kept[0]["steps"]) - 1] * 8]
    FuncAnimation(figure, frame, frames=frames).save(path, PillowWriter(fps=8), dpi=66)


def main():
    (c,) = parse(sys.argv[1:], ReportConfig)
    rows = Rows(Path(c.table)).rows
    if not rows:
        raise UserError(f"no rows in {c.table}: python -m studies.algorithmic writes them")
    for name, table in (
        ("The tasks", main_table),
        ("Grokking", gap_table),
        ("Data efficiency", fraction_table),
    ):
        print(f"{name}\n\n{table(rows)}\n")
    sweeps = [
        found
        for model, head in itertools.product(MODELS, HEADS)
        if (found := scored(rows, model, *head))
    ]
    print(f"{on_edge(sweeps, (MULTIPLE_STEP, RATE_STEP))}\n")
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
        write_whole(Path(c.out + ending), lambda path, picture=picture: picture(c, rows, path))
        print(f"wrote {c.out}{ending}")


if __name__ == "__main__":
    cli(main)
