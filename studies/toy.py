"""The toy problems of the papers: only prototypes are trained, on separable points of a plane.

    # some six minutes; writes results/toy.png and results/toy.csv
    python -m studies.toy

One toy has five points, one for each class. The other has eight classes on a circle, with twelve
points each. They show where prototypes go, and whether they stop. If the loss of a head has a
finite minimum, prototypes move to the classes and stop. Prototypes of cross-entropy grow forever,
because a longer vector always has a lower loss.

Each head has STARTS random starts. The picture shows the one with the lowest loss, and the table
counts those that separate the classes. In a plane a cosine prototype cannot pass the direction of
another class, because its distance would be 0 there.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.colors
import torch
from matplotlib.axes import Axes
from tqdm import tqdm

from analysis import figures
from analysis.tables import Column, cells, markdown, text, write_csv
from analysis.theory import toy
from base.command_line import cli, parse
from base.errors import too_small
from base.files import result_file, writable
from harmonic import CONTROLS, DISTANCES
from studies.algorithmic import OTHERS

FIVE = torch.tensor([[1.0, 0.2], [0.2, 1.1], [-0.9, 0.6], [-0.5, -0.9], [0.8, -0.8]])
COLOURS = (*figures.PALETTE, figures.GREY)
COLUMNS = [
    Column("toy"),
    Column("head"),
    Column("fits"),
    Column("loss", form=".3g"),
    Column("W", form=".3g"),
    Column("growth", form=".3g"),
    Column("to_centres", form=".3g"),
]
CIRCLE = ("cross_entropy", "euclidean", "manhattan", "cosine", "bray_curtis_abs")
# The plane is drawn from -EDGE to EDGE.
EDGE = 1.7
STARTS = 5
# Curves with a colour and a name. The others are grey.
NAMED = ("cross_entropy", "cosine_linear", "euclidean", "manhattan", "cosine", "bray_curtis_abs")


@dataclass
class ToyConfig:
    """The toys"""

    out: str = "results/toy"
    """names of the picture and the table, without .png and .csv"""
    steps: int = 2000
    """steps of Adam"""

    def problems(self) -> list[str]:
        return too_small(self, steps=4)


def circle() -> tuple[torch.Tensor, torch.Tensor]:
    """Eight classes around the unit circle: points (96, 2) and classes (96,)."""
    g = torch.Generator().manual_seed(0)
    angle = torch.arange(8) * (2 * torch.pi / 8) + 0.2
    centres = torch.stack([angle.cos(), angle.sin()], 1)
    points = centres[:, None] + 0.08 * torch.randn(8, 12, 2, generator=g)
    return points.flatten(0, 1), torch.arange(8).repeat_interleave(12)


def centres(points: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The mean point of each class."""
    return torch.stack([points[targets == k].mean(0) for k in targets.unique()])


def row(name: str, task: str, found: dict, middle: torch.Tensor) -> dict:
    """A row of the table.

    growth: |W| at the end divided by |W| halfway. to_centres: the mean distance from prototypes to
    the centres of their classes.
    """
    norms = found["norms"]
    return {
        "toy": task,
        "head": name,
        "fits": f"{found['fits']}/{STARTS}",
        "loss": found["losses"][-1],
        "W": norms[-1],
        "growth": norms[-1] / norms[len(norms) // 2],
        "to_centres": (found["path"][-1] - middle).norm(dim=-1).mean().item(),
    }


def table(rows: list[dict[str, str]]) -> str:
    """All rows of toy.csv."""
    return markdown(rows, COLUMNS)


@torch.no_grad()
def panel(axes: Axes, name: str, found: dict, targets: torch.Tensor) -> None:
    """Draws decision regions, the points, and the paths of prototypes.

    A stronger colour means a higher probability.
    """
    line = torch.linspace(-EDGE, EDGE, 160)
    plane = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1)
    p = found["head"].eval()(plane).softmax(-1)
    palette = torch.tensor([matplotlib.colors.to_rgb(c) for c in COLOURS[: p.shape[-1]]])
    best, of = p.max(-1)
    strength = (0.1 + 0.5 * best)[..., None]
    regions = ((1 - strength) + strength * palette[of]).numpy()
    extent = (-EDGE, EDGE, -EDGE, EDGE)
    axes.imshow(regions, origin="lower", extent=extent, interpolation="bilinear")
    dots: dict[str, Any] = dict(s=10, edgecolors="white", linewidths=0.6, zorder=3)
    x, y = found["points"].T
    axes.scatter(x, y, c=[COLOURS[t] for t in targets], **dots)
    cross: dict[str, Any] = dict(
        color="black", markersize=4, markeredgewidth=1.2, zorder=4, clip_on=True
    )
    for k, path in enumerate(found["path"].unbind(1)):
        axes.plot(*path.T, color="black", linewidth=1.4, zorder=2)
        axes.plot(*path.T, color=COLOURS[k], linewidth=0.8, zorder=2)
        axes.plot(*path[-1], "x", **cross)
    axes.set_xlim(-EDGE, EDGE)
    axes.set_ylim(-EDGE, EDGE)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.set_title(name, fontsize=8, pad=3)
    box = dict(boxstyle="square,pad=0.15", facecolor="white", edgecolor="none", alpha=0.8)
    corner: dict[str, Any] = dict(transform=axes.transAxes, ha="right", bbox=box, zorder=5)
    axes.text(0.97, 0.04, f"norm {found['norms'][-1]:.2g}", fontsize=7.5, **corner)


def curves(axes: Axes, runs: dict, title: str) -> None:
    """Draws the norm over the steps. Some heads have their own colour, and the others are grey."""
    for name, found in runs.items():
        style: dict[str, Any] = dict(color="0.8", linewidth=0.8, zorder=1)
        if name in NAMED:
            style = dict(color=figures.head_color(name), label=name)
        axes.plot(found["norms"], **style)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("step of Adam")
    axes.set_ylabel("norm of all prototypes")
    axes.set_title(title)
    axes.grid(alpha=0.2)


def draw(five: dict, around: dict, targets: torch.Tensor, path: Path) -> None:
    rows = -(-len(five) // 5)
    side = 1.75
    figure = figures.figure(side * (rows + 1) + 0.6 + 3.4)
    ratios = [side * rows + 0.3, side + 0.3, 3.4]
    upper, lower, last = figure.subfigures(3, 1, squeeze=False, height_ratios=ratios)[:, 0]
    left: dict[str, Any] = dict(fontsize=10, x=0.01, ha="left")
    upper.suptitle("Five points, one for each class", **left)
    lower.suptitle("Eight classes on a circle", **left)
    panels = upper.subplots(rows, 5, squeeze=False).ravel()
    for axes in panels[len(five) :]:
        axes.axis("off")
    for axes, (name, found) in zip(panels[: len(five)], five.items(), strict=True):
        panel(axes, name, found, torch.arange(5))
    for axes, (name, found) in zip(lower.subplots(1, 5), around.items(), strict=True):
        panel(axes, name, found, targets)
    first, second = last.subplots(1, 2, sharey=True)
    curves(first, five, "Five points (grey: other heads)")
    curves(second, around, "Eight classes on a circle")
    figures.legend_below(last, [first], ncols=6)
    figures.save(figure, path)


def starts(name: str, steps: int, points: torch.Tensor, targets: torch.Tensor) -> dict:
    """The best of STARTS runs. `fits` tells how many of them classify every point correctly."""
    runs = [toy(name, steps, points, targets, seed) for seed in range(STARTS)]
    fits = [bool((r["head"].eval()(points).argmax(-1) == targets).all()) for r in runs]
    return min(runs, key=lambda r: r["losses"][-1]) | {"fits": sum(fits)}


def main() -> None:
    (c,) = parse(sys.argv[1:], ToyConfig)
    # For such small tensors a second thread is slower.
    torch.set_num_threads(1)
    table, picture = result_file(c.out + ".csv"), writable(Path(c.out + ".png"))
    points, targets = circle()
    heads = [name for name in (*CONTROLS, *DISTANCES) if name not in ("euclidean_squared", *OTHERS)]
    five, around = {}, {}
    for name in tqdm(heads, desc="five points", disable=None):
        five[name] = starts(name, c.steps, FIVE, torch.arange(5))
    for name in tqdm(CIRCLE, desc="circle", disable=None):
        around[name] = starts(name, c.steps, points, targets)
    rows = [row(name, "five", found, FIVE) for name, found in five.items()]
    rows += [row(name, "circle", found, centres(points, targets)) for name, found in around.items()]
    print(text(rows, COLUMNS))
    shown = [dict(zip(rows[0], line, strict=True)) for line in cells(rows, COLUMNS)]
    write_csv(table, shown)
    draw(five, around, targets, picture)
    print(f"wrote {table} and {picture}")


if __name__ == "__main__":
    cli(main)
