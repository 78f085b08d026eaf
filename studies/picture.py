"""Draws what a distance head is: the plane of hidden states, coloured by the likeliest of six
prototypes, for every family of distance.

    python -m studies.picture          # writes results/heads.png

Colour says which prototype is likeliest, its strength how likely; the dots are the prototypes. A
dot product can only cut the plane into cones from the origin; a distance gives each prototype a
region around itself.
"""

import matplotlib.colors
import torch
from matplotlib.figure import Figure
from PIL import Image

from harmonic import HEADS, harmonic_logits

PROTOTYPES = torch.tensor(
    [[1.0, 0.3], [0.3, 1.2], [-0.9, 0.7], [-0.5, -0.8], [0.7, -0.9], [0.35, 0.25]]
)
COLOURS = [
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
]  # Okabe and Ito: distinct to colour-blind eyes
EXPONENT = 4.0
SHOWN = [
    "cross_entropy", "euclidean", "manhattan", "minkowski", "chebyshev", "cosine", "hamming_soft",
    "canberra", "bray_curtis_abs",
    "mahalanobis",
]  # fmt: skip
SETTINGS = {
    "minkowski": {"p": 0.5},
    "mahalanobis": {"factor": torch.tensor([[1.0, 0.0], [1.2, 0.6]])},
}


def save(figure: Figure, path, dpi: int):
    """A picture of many colours as a PNG of 256: a fifth of the bytes."""
    figure.savefig(path, dpi=dpi)
    Image.open(path).convert("RGB").quantize(256, Image.Quantize.FASTOCTREE).save(path)


def main():
    side = torch.linspace(-1.6, 1.6, 400)
    plane = torch.stack(torch.meshgrid(side, side, indexing="xy"), -1)  # (400, 400, 2)
    palette = torch.tensor([matplotlib.colors.to_rgb(c) for c in COLOURS])
    figure = Figure(figsize=(12, 5.4), layout="constrained")
    for axes, name in zip(figure.subplots(2, 5).flat, SHOWN, strict=True):
        kw = {} if name == "cross_entropy" else {"exponent": EXPONENT, **SETTINGS.get(name, {})}
        scale = EXPONENT if name == "cross_entropy" else 1.0
        p, best = (scale * harmonic_logits(plane, PROTOTYPES, name, **kw)).softmax(-1).max(-1)
        strength = ((p - 1 / len(COLOURS)) / (1 - 1 / len(COLOURS)))[..., None]
        axes.imshow(
            (1 - strength * (1 - palette[best])).numpy(),
            origin="lower",
            extent=(-1.6, 1.6, -1.6, 1.6),
        )
        axes.scatter(*PROTOTYPES.T.numpy(), c=COLOURS, s=34, edgecolors="black", linewidths=0.8)
        settings = "".join(
            f", {k}={v:g}" for k, v in SETTINGS.get(name, {}).items() if isinstance(v, float)
        )
        axes.set_title(name + settings, fontsize=11)
        axes.set_xticks([])
        axes.set_yticks([])
    assert all(n in HEADS for n in SHOWN)
    figure.savefig("results/heads.png", dpi=80)
    print("wrote results/heads.png")


if __name__ == "__main__":
    main()
