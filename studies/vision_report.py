"""Tables and pictures of the image classifiers, from results/vision.csv and the models in
out/vision.

    python -m studies.vision_report             # prints Markdown; writes results/vision*.png

Means over seeds with 95 % intervals (Student's t). PCs: components for 90 % of the variance of the
features of the test images, of the one-layer model, whose features are the pixels, of the
prototypes.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from base.command_line import cli, parse
from base.errors import UserError
from base.files import write_whole
from studies.algorithmic import HEADS
from studies.algorithmic_report import title
from studies.heads_report import interval, markdown, with_half
from studies.picture import save
from studies.table import on_edge
from studies.vision import (
    JOB,
    MULTIPLE_STEP,
    RATE_STEP,
    Classifier,
    Images,
    Rows,
    load,
    run_folder,
    swept,
)

GRAD_CAM = [
    ("cross_entropy", "control"),
    *((h, "harmonic") for h in ("euclidean", "manhattan", "cosine", "canberra", "bray_curtis_abs")),
]


@dataclass
class ReportConfig:
    """Tables and pictures of the image classifiers"""

    table: str = "results/vision.csv"
    """rows of studies.vision"""
    runs: str = "out/vision"
    """its models; what is missing there is left out of the pictures"""
    out: str = "results/vision"
    """the pictures' names, before _prototypes.png and _gradcam.png"""


def places(rows: list[dict]) -> list[tuple[str, str]]:
    """(dataset, backbone) pairs, in order of appearance."""
    return list(dict.fromkeys((r["dataset"], r["backbone"]) for r in rows if r["stage"] == "main"))


def select(rows: list[dict], dataset: str, backbone: str, head: str, link: str) -> list[dict]:
    """A head's rows, a seed each."""
    wanted = dict(stage="main", dataset=dataset, backbone=backbone, head=head, link=link)
    return [r for r in rows if r.items() >= wanted.items()]


def by_place(rows: list[dict], cell: Callable[[list[dict]], str]) -> str:
    """A line for each head, a column for each dataset and backbone; cell: (rows of the seeds) ->
    what is shown of them."""
    found = []
    for head, link in HEADS:
        seeds = [select(rows, *place, head, link) for place in places(rows)]
        if any(seeds):
            found.append([title(head, link), *(cell(mine) if mine else "" for mine in seeds)])
    return markdown(["head", *(f"{Path(d).name}, {b}" for d, b in places(rows))], found)


def overview(rows: list[dict]) -> str:
    """Test accuracy, %, with its interval over the seeds."""
    accuracy = lambda mine: interval([100 * float(r["test_accuracy"]) for r in mine])
    return by_place(rows, lambda mine: with_half(accuracy(mine), ".2f", ".2f"))


def structure(rows: list[dict]) -> str:
    """Components for 90 % of the variance of the features (one-layer: of the prototypes), and the
    share of the first two."""
    mean = lambda mine, key: np.mean([float(r[key] or "nan") for r in mine])
    return by_place(
        rows, lambda mine: f"{mean(mine, 'components_90'):.1f}; {mean(mine, 'top2'):.2f}"
    )


def table(rows: list[dict], dataset: str, backbone: str) -> str:
    found = []
    for head, link in HEADS:
        mine = select(rows, dataset, backbone, head, link)
        if not mine:
            continue
        mean = lambda key, mine=mine: np.mean([float(r[key] or "nan") for r in mine])
        accuracy = interval([100 * float(r["test_accuracy"]) for r in mine])
        cells = [title(head, link), mine[0]["multiple"], mine[0]["learning_rate"]]
        cells += [with_half(accuracy, ".2f", ".2f"), f"{100 * mean('macro_f1'):.2f}"]
        cells += [
            f"{mean('components_90'):.1f}",
            f"{mean('top2'):.2f}",
            f"{1000 * mean('kwh'):.3f}",
        ]
        found.append((accuracy[0], [*cells, f"{mean('seconds'):.1f}"]))
    columns = [
        "head",
        "multiple",
        "learning rate",
        "test accuracy, %",
        "macro F1, %",
        "PCs for 90 %",
        "top 2 PCs",
        "Wh",
        "seconds",
    ]
    return markdown(columns, [cells for _, cells in sorted(found, key=lambda x: -x[0])])


def model_file(c: ReportConfig, dataset: str, backbone: str, head: str, link: str) -> Path:
    return (
        run_folder(c.runs, dict(zip(JOB, ("main", dataset, backbone, head, link), strict=True)))
        / "model.pt"
    )


def stored(
    c: ReportConfig,
    rows: list[dict],
    images: Images,
    dataset: str,
    backbone: str,
    head: str,
    link: str,
) -> Classifier | None:
    """The trained model of the first seed, or None."""
    path = model_file(c, dataset, backbone, head, link)
    mine = select(rows, dataset, backbone, head, link)
    if not path.is_file() or not mine:
        return None
    model = Classifier(images, backbone, head, link, float(mine[0]["multiple"]))
    model.load_state_dict(torch.load(path, weights_only=True))
    if link == "softmax":
        model.head.set_strength(float(mine[0]["scale"]))  # of the first seed
    return model.eval()


def pictured(rows: list[dict], dataset: str) -> Images:
    """The images as they were trained on."""
    row = next(r for r in rows if (r["stage"], r["dataset"]) == ("main", dataset))
    return load(dataset, int(row["size"]), int(row["train_images"]))


def draw_prototypes(c: ReportConfig, rows: list[dict], dataset: str, path: Path):
    """The one-layer model's prototypes, which are images: a row for each head, a column for each
    class."""
    from matplotlib.figure import Figure

    images = pictured(rows, dataset)
    found = [(h, m) for h in HEADS if (m := stored(c, rows, images, dataset, "linear", *h))]
    figure = Figure(
        figsize=(1 + 0.62 * images.classes, 0.3 + 0.62 * len(found)), layout="constrained"
    )
    for line, ((head, link), model) in zip(
        figure.subplots(len(found), images.classes, squeeze=False), found, strict=True
    ):
        pictures = (
            model.head.prototypes().detach().view(images.classes, *images.x.shape[1:]).mean(1)
        )
        edge = pictures.abs().quantile(0.995).item() or 1.0
        for axes, picture in zip(line, pictures, strict=True):
            axes.imshow(picture.numpy(), cmap="RdBu_r", vmin=-edge, vmax=edge)
            axes.set_xticks([])
            axes.set_yticks([])
        line[0].set_ylabel(
            title(head, link).replace(", ", "\n"), fontsize=6, rotation=0, ha="right", va="center"
        )
    save(figure, path, 90)


def draw_grad_cam(c: ReportConfig, rows: list[dict], dataset: str, path: Path):
    """Grad-CAM (captum) of the CNN's last convolution for the class that it predicts, on the first
    test image of each class."""
    from captum.attr import LayerAttribution, LayerGradCam
    from matplotlib.figure import Figure

    images = pictured(rows, dataset)
    first = [int((images.test_y == k).nonzero()[0]) for k in range(images.classes)]
    x = images.test_x[first]
    found = [(h, m) for h in GRAD_CAM if (m := stored(c, rows, images, dataset, "cnn", *h))]
    figure = Figure(figsize=(1 + 0.7 * len(first), 0.3 + 0.7 * len(found)), layout="constrained")
    for line, ((head, _), model) in zip(
        figure.subplots(len(found), len(first), squeeze=False), found, strict=True
    ):
        guess = model(x).argmax(-1)
        heat = LayerGradCam(model, model.features[2]).attribute(
            x, target=guess, relu_attributions=True
        )
        heat = LayerAttribution.interpolate(heat, tuple(x.shape[2:]), "bilinear").detach()
        for axes, picture, map_, right in zip(
            line, x, heat, (guess == images.test_y[first]).tolist(), strict=True
        ):
            axes.imshow(picture.mean(0).numpy(), cmap="gray")
            axes.imshow(
                (map_[0] / map_.max().clamp_min(1e-9)).numpy(),
                cmap="inferno",
                alpha=0.55,
                vmin=0,
                vmax=1,
            )
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[["top", "right", "left", "bottom"]].set_color("0.3" if right else "#d55e00")
            axes.spines[["top", "right", "left", "bottom"]].set_linewidth(0.5 if right else 2.5)
        line[0].set_ylabel(head, fontsize=7, rotation=0, ha="right", va="center")
    save(figure, path, 90)


def main():
    (c,) = parse(sys.argv[1:], ReportConfig)
    rows = Rows(Path(c.table)).rows
    if not places(rows):
        raise UserError(f"no rows in {c.table}: python -m studies.vision writes them")
    for dataset, backbone in places(rows):
        images = next(
            r["train_images"] for r in rows if (r["stage"], r["dataset"]) == ("main", dataset)
        )
        print(
            f"{dataset}, {backbone}, {images} training images\n\n{table(rows, dataset, backbone)}\n"
        )
    print(f"{on_edge(list(swept(rows).values()), (MULTIPLE_STEP, RATE_STEP))}\n")
    pictures = (
        ("linear", "_prototypes.png", draw_prototypes, HEADS),
        ("cnn", "_gradcam.png", draw_grad_cam, GRAD_CAM),
    )
    for backbone, ending, draw, heads in pictures:
        there = lambda d, b=backbone, heads=heads: any(
            model_file(c, d, b, *h).is_file() for h in heads
        )
        kept = [d for d, b in places(rows) if b == backbone and there(d)]
        if kept:
            write_whole(
                Path(c.out + ending),
                lambda path, draw=draw, dataset=kept[0]: draw(c, rows, dataset, path),
            )
            print(f"wrote {c.out}{ending}")


if __name__ == "__main__":
    cli(main)
