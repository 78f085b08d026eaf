"""The toys of the papers: prototypes alone, trained on separable points of the plane. Where do they
go, and do they stay?

    python -m studies.toy  # half a minute; writes results/toy.png and results/toy.csv

Five points, one a class, and a circle of eight classes with twelve points each. A head with a
finite minimiser brings its prototypes to the classes and rests there; those of cross-entropy run
outwards for ever, for a longer vector always pays. Of STARTS random starts the one with the lowest
loss is shown, and the table counts those that separate the classes: in the plane a prototype of
cosine cannot turn past the point of another class, whose distance would be 0.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib.colors
import torch
from tqdm import tqdm

from analysis.runs import table, write_csv
from analysis.theory import toy
from base.command_line import cli, parse
from base.files import write_whole
from harmonic import CONTROLS, DISTANCES
from studies.picture import save

FIVE = torch.tensor([[1.0, 0.2], [0.2, 1.1], [-0.9, 0.6], [-0.5, -0.9], [0.8, -0.8]])
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31", "#59616b"]
CIRCLE = ("cross_entropy", "euclidean", "manhattan", "cosine", "bray_curtis_abs")
EDGE = 1.7  # of the plane that is drawn
STARTS = 5


@dataclass
class ToyConfig:
    """The toys"""

    out: str = "results/toy"
    """names of the picture and the table, before .png and .csv"""
    steps: int = 2000
    """steps of Adam"""

    def problems(self) -> list[str]:
        return [] if self.steps >= 4 else [f"steps={self.steps} must be at least 4"]


def circle() -> tuple[torch.Tensor, torch.Tensor]:
    """Eight classes around the unit circle: (96, 2) points, (96,) classes."""
    g = torch.Generator().manual_seed(0)
    angle = torch.arange(8) * (2 * torch.pi / 8) + 0.2
    centres = torch.stack([angle.cos(), angle.sin()], 1)
    return (centres[:, None] + 0.08 * torch.randn(8, 12, 2, generator=g)).flatten(
        0, 1
    ), torch.arange(8).repeat_interleave(12)


def centres(points: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return torch.stack([points[targets == k].mean(0) for k in targets.unique()])


def row(name: str, task: str, found: dict, middle: torch.Tensor) -> dict:
    """growth: |W| at the end over |W| half-way. to_centres: the mean distance of a prototype to its
    class's centre."""
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


@torch.no_grad()
def panel(axes, name: str, found: dict, targets: torch.Tensor):
    """Decision regions (strength: probability), the points, the prototypes' paths."""
    line = torch.linspace(-EDGE, EDGE, 160)
    plane = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1)
    p = found["head"].eval()(plane).softmax(-1)
    palette = torch.tensor([matplotlib.colors.to_rgb(c) for c in COLOURS[: p.shape[-1]]])
    best, of = p.max(-1)
    strength = (0.1 + 0.5 * best)[..., None]
    axes.imshow(
        ((1 - strength) + strength * palette[of]).numpy(),
        origin="lower",
        extent=(-EDGE, EDGE, -EDGE, EDGE),
        interpolation="bilinear",
    )
    axes.scatter(
        *found["points"].T,
        c=[COLOURS[t] for t in targets],
        s=14,
        edgecolors="white",
        linewidths=0.6,
        zorder=3,
    )
    for k, path in enumerate(found["path"].unbind(1)):
        axes.plot(*path.T, color="black", linewidth=1.6, zorder=2)
        axes.plot(*path.T, color=COLOURS[k], linewidth=0.9, zorder=2)
        axes.plot(
            *path[-1], "x", color="black", markersize=5, markeredgewidth=1.5, zorder=4, clip_on=True
        )
    axes.set_xlim(-EDGE, EDGE)
    axes.set_ylim(-EDGE, EDGE)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
    axes.set_title(f"{name}, |W| {found['norms'][-1]:.2g}", fontsize=8, loc="left", pad=2)


def curves(axes, runs: dict, title: str):
    """|W| over the steps: controls in warm colours, distances in grey but for a few."""
    shown = dict(
        zip(CIRCLE, ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#56b4e9"), strict=True)
    ) | {"cosine_linear": "#e69f00"}
    for name, found in runs.items():
        axes.plot(
            found["norms"],
            color=shown.get(name, "0.75"),
            linewidth=1.6 if name in shown else 0.8,
            label=shown.get(name) and name,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_title(title, fontsize=9, loc="left")
    axes.grid(alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=7)


def draw(five: dict, around: dict, targets: torch.Tensor, path: Path):
    from matplotlib.figure import Figure

    rows = -(-len(five) // 5)
    figure = Figure(figsize=(11, 2.3 * (rows + 1) + 3), layout="constrained")
    upper, lower, last = figure.subfigures(3, 1, height_ratios=[2.3 * rows, 2.3, 3])
    upper.suptitle(
        "Five points: decision regions, and the way of each prototype to its cross",
        fontsize=10,
        x=0.01,
        ha="left",
    )
    lower.suptitle("Eight classes on a circle", fontsize=10, x=0.01, ha="left")
    for axes, (name, found) in zip(upper.subplots(rows, 5).flat, five.items(), strict=True):
        panel(axes, name, found, torch.arange(5))
    for axes, (name, found) in zip(lower.subplots(1, len(around)), around.items(), strict=True):
        panel(axes, name, found, targets)
    left, right = last.subplots(1, 2)
    curves(left, five, "five points: |W|")
    curves(right, around, "circle: |W|")
    save(figure, path, 110)


def starts(name: str, steps: int, points: torch.Tensor, targets: torch.Tensor) -> dict:
    """The best of STARTS runs, and in `fits` how many of them put every point into its class."""
    runs = [toy(name, steps, points, targets, seed) for seed in range(STARTS)]
    fits = [bool((r["head"].eval()(points).argmax(-1) == targets).all()) for r in runs]
    return min(runs, key=lambda r: r["losses"][-1]) | {"fits": sum(fits)}


def main():
    (c,) = parse(sys.argv[1:], ToyConfig)
    torch.set_num_threads(1)  # two wait for each other, over tensors this small
    points, targets = circle()
    five = {
        h: starts(h, c.steps, FIVE, torch.arange(5))
        for h in tqdm(
            [*CONTROLS, *(h for h in DISTANCES if h != "euclidean_squared")],
            desc="five points",
            disable=None,
        )
    }
    around = {
        h: starts(h, c.steps, points, targets) for h in tqdm(CIRCLE, desc="circle", disable=None)
    }
    rows = [row(name, "five", found, FIVE) for name, found in five.items()]
    rows += [row(name, "circle", found, centres(points, targets)) for name, found in around.items()]
    rows = [{k: f"{v:.3g}" if isinstance(v, float) else str(v) for k, v in r.items()} for r in rows]
    print(table(list(rows[0]), [list(r.values()) for r in rows]))
    write_csv(rows, Path(c.out + ".csv"))
    write_whole(Path(c.out + ".png"), lambda path: draw(five, around, targets, path))
    print(f"wrote {c.out}.csv and {c.out}.png")


if __name__ == "__main__":
    cli(main)
