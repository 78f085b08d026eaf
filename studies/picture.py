"""Draws the regions of six prototypes in a plane of hidden states, for every family of distance.

    # writes results/heads.png
    python -m studies.picture

Dots are prototypes. The colour of a point shows its most likely prototype, and a stronger colour
means a higher probability. A dot product can only cut the plane into cones from the origin. A
distance gives each prototype a region around itself.
"""

import sys
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib.colors
import torch

from analysis import figures
from base.command_line import cli, parse
from base.files import write_result
from harmonic import harmonic_logits

PROTOTYPES = torch.tensor(
    [[1.0, 0.3], [0.3, 1.2], [-0.9, 0.7], [-0.5, -0.8], [0.7, -0.9], [0.35, 0.25]]
)
COLOURS = figures.PALETTE[: len(PROTOTYPES)]
EXPONENT = 4.0
EDGE = 1.6
SHOWN = [
    "cross_entropy", "euclidean", "manhattan", "minkowski", "chebyshev", "cosine", "hamming_soft",
    "canberra", "bray_curtis_abs", "mahalanobis",
]  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {
    "minkowski": {"p": 0.5},
    "mahalanobis": {"factor": torch.tensor([[1.0, 0.0], [1.2, 0.6]])},
}


def logits(plane: torch.Tensor, name: str) -> torch.Tensor:
    """The logits of the six prototypes: points (H, W, 2) -> (H, W, 6)."""
    if name == "cross_entropy":
        return EXPONENT * harmonic_logits(plane, PROTOTYPES, name)
    settings = SETTINGS.get(name, {})
    return harmonic_logits(plane, PROTOTYPES, name, exponent=EXPONENT, **settings)


def title(name: str) -> str:
    numbers = {k: v for k, v in SETTINGS.get(name, {}).items() if isinstance(v, float)}
    return name + "".join(f", {k}={v:g}" for k, v in numbers.items())


@dataclass
class PictureConfig:
    """The picture of the heads in a plane"""

    out: str = "results/heads.png"
    """the picture to write"""


def main() -> None:
    (c,) = parse(sys.argv[1:], PictureConfig)
    side = torch.linspace(-EDGE, EDGE, 400)
    plane = torch.stack(torch.meshgrid(side, side, indexing="xy"), -1)
    palette = torch.tensor([matplotlib.colors.to_rgb(c) for c in COLOURS])
    chance = 1 / len(COLOURS)
    figure = figures.figure(3.7)
    for axes, name in zip(figure.subplots(2, 5).flat, SHOWN, strict=True):
        p, best = logits(plane, name).softmax(-1).max(-1)
        strength = ((p - chance) / (1 - chance))[..., None]
        colours = 1 - strength * (1 - palette[best])
        axes.imshow(colours.numpy(), origin="lower", extent=(-EDGE, EDGE, -EDGE, EDGE))
        axes.scatter(*PROTOTYPES.T.numpy(), c=COLOURS, s=16, edgecolors="black", linewidths=0.8)
        axes.set_title(title(name))
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(True)
    figure.supxlabel("first coordinate of the hidden state", fontsize=9)
    figure.supylabel("second coordinate", fontsize=9)
    # figures.save would reduce it to 256 colours, which show as bands.
    drawn = BytesIO()
    figure.savefig(drawn, format="png", dpi=160)
    write_result(Path(c.out), drawn.getvalue())
    print(f"wrote {c.out}")


if __name__ == "__main__":
    cli(main)
