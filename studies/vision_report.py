"""Tables and pictures of the image classifiers, from results/vision.csv and the models in
out/vision.

    # prints Markdown; writes results/vision*.png
    python -m studies.vision_report

Tables have means over seeds with 95 % intervals (Student's t). "PCs" is the number of principal
components that have 90 % of the variance of the features on test images. For the one-layer model,
whose features are the pixels, it is that of the prototypes.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis import figures
from analysis.intervals import mean_and_half
from analysis.tables import Column, interval, markdown
from base.command_line import cli, parse
from base.errors import UserError
from studies.algorithmic import HEADS
from studies.algorithmic_report import title
from studies.runner import Row, Table, run_name
from studies.search import on_edge
from studies.vision import (
    COLUMNS,
    KEY,
    Classifier,
    Images,
    load,
    swept,
)

GRAD_CAM = [("cross_entropy", "control")]
GRAD_CAM += [
    (head, "harmonic")
    for head in ("euclidean", "manhattan", "cosine", "canberra", "bray_curtis_abs")
]

# With both links.
TWINS = ("euclidean", "manhattan", "cosine")


@dataclass
class ReportConfig:
    """Tables and pictures of the image classifiers"""

    table: str = "results/vision.csv"
    """rows of studies.vision"""
    runs: str = "out/vision"
    """folder of its models; missing ones are left out of the pictures"""
    out: str = "results/vision"
    """names of the pictures, without _prototypes.png and _gradcam.png"""


def places(rows: list[Row]) -> list[tuple[str, str]]:
    """(dataset, backbone) pairs, in order of appearance."""
    return list(dict.fromkeys((r["dataset"], r["backbone"]) for r in rows if r["stage"] == "main"))


def select(rows: list[Row], dataset: str, backbone: str, head: str, link: str) -> list[Row]:
    """The rows of a head, one for each seed."""
    wanted = dict(stage="main", dataset=dataset, backbone=backbone, head=head, link=link)
    return [r for r in rows if r.items() >= wanted.items()]


# ---- tables ------------------------------------------------------------------------------------


def mean(rows: list[Row], key: str) -> float:
    return float(np.mean([float(r[key] or "nan") for r in rows]))


def accuracy(rows: list[Row]) -> tuple[float, float]:
    """The mean test accuracy in %, and half the width of its interval over seeds."""
    return mean_and_half([100 * float(r["test_accuracy"]) for r in rows])


def shown_accuracy(rows: list[Row]) -> str:
    return interval(*accuracy(rows), ".2f")


def shown_structure(rows: list[Row]) -> str:
    return f"{mean(rows, 'components_90'):.1f}; {mean(rows, 'top2'):.2f}"


def by_place(rows: list[Row], cell: Callable[[list[Row]], str]) -> str:
    """A table with a line for each head, and a column for each dataset and backbone.

    cell: turns the rows of all seeds into the text of a cell.
    """
    columns = {place: f"{Path(place[0]).name}, {place[1]}" for place in places(rows)}
    lines = []
    for head, link in HEADS:
        line = {}
        for place in columns:
            if mine := select(rows, *place, head, link):
                line["/".join(place)] = cell(mine)
        if line:
            lines.append({"head": title(head, link)} | line)
    return markdown(
        lines, ["head", *(Column("/".join(place), name) for place, name in columns.items())]
    )


def overview(rows: list[Row]) -> str:
    """Test accuracy in %, with its interval over seeds."""
    return by_place(rows, shown_accuracy)


def structure(rows: list[Row]) -> str:
    """The number of components with 90 % of the variance, and the share of the first two."""
    return by_place(rows, shown_structure)


def twins(rows: list[Row]) -> str:
    """Test accuracy minus the softmax twin's, in points, paired by seed."""

    def by_seed(head: str, link: str) -> dict[str, float]:
        mine = select(rows, dataset, backbone, head, link)
        return {row["seed"]: 100 * float(row["test_accuracy"]) for row in mine}

    lines: dict[str, dict] = {}
    columns = []
    for dataset, backbone in places(rows):
        key = f"{dataset}/{backbone}"
        columns.append(Column(key, f"{dataset}, {backbone}"))
        for head in TWINS:
            mine, twin = by_seed(head, "harmonic"), by_seed(head, "softmax")
            differences = [mine[seed] - twin[seed] for seed in mine if seed in twin]
            if differences:
                line = lines.setdefault(head, {"head": head})
                line[key] = interval(*mean_and_half(differences), "+.2f")
    return markdown(list(lines.values()), ["head", *columns])


def table(rows: list[Row], dataset: str, backbone: str) -> str:
    """The heads for one dataset and backbone, the best first."""
    found = {}
    for head in HEADS:
        if mine := select(rows, dataset, backbone, *head):
            found[head] = mine
    lines = []
    for head in sorted(found, key=lambda head: -accuracy(found[head])[0]):
        mine = found[head]
        line = {
            "head": title(*head),
            "multiple": mine[0]["multiple"],
            "learning_rate": mine[0]["learning_rate"],
            "accuracy": shown_accuracy(mine),
            "f1": 100 * mean(mine, "macro_f1"),
            "watt_hours": 1000 * mean(mine, "kwh"),
        }
        lines.append({key: mean(mine, key) for key in ("components_90", "top2", "seconds")} | line)
    columns = [
        Column("head"),
        Column("multiple"),
        Column("learning_rate", "learning rate"),
        Column("accuracy", "test accuracy", unit="%"),
        Column("f1", "macro F1", ".2f", "%"),
        Column("components_90", "PCs for 90 %", ".1f"),
        Column("top2", "top 2 PCs", ".2f"),
        Column("watt_hours", "Wh", ".3f"),
        Column("seconds", form=".1f"),
    ]
    return markdown(lines, columns)


# ---- pictures ----------------------------------------------------------------------------------


def model_file(c: ReportConfig, dataset: str, backbone: str, head: str, link: str) -> Path:
    key = dict(zip(KEY, ("main", dataset, backbone, head, link), strict=True))
    return Path(c.runs) / run_name(key) / "model.pt"


def weights(
    c: ReportConfig, rows: list[Row], dataset: str, backbone: str, head: str, link: str
) -> dict | None:
    """The saved weights of the first seed. None if there are none, or if another table or version
    has written them."""
    path = model_file(c, dataset, backbone, head, link)
    mine = select(rows, dataset, backbone, head, link)
    if not mine or not path.is_file():
        return None
    kept = torch.load(path, weights_only=True)
    if kept.get("val_loss") != mine[0]["val_loss"]:
        print(f"{path} is of another table or version: left out", file=sys.stderr)
        return None
    found: dict = kept["weights"]
    return found


def stored(
    c: ReportConfig, rows: list[Row], images: Images, dataset: str, backbone: str
) -> dict[tuple[str, str], Classifier]:
    """The saved models of the first seed, by head and link."""
    found = {}
    for head, link in HEADS:
        kept = weights(c, rows, dataset, backbone, head, link)
        if kept is not None:
            first = select(rows, dataset, backbone, head, link)[0]
            model = Classifier(images, backbone, head, link, float(first["multiple"]))
            model.load_state_dict(kept)
            if link == "softmax":
                model.head.set_strength(float(first["scale"]))
            found[head, link] = model.eval()
    return found


def pictured(rows: list[dict], dataset: str) -> Images:
    """The images that the models were trained on."""
    row = next(r for r in rows if (r["stage"], r["dataset"]) == ("main", dataset))
    return load(dataset, int(row["size"]), int(row["train_images"]))


def draw_prototypes(c: ReportConfig, rows: list[Row], dataset: str, path: Path) -> None:
    """Draws the prototypes of the one-layer model as images.

    There is a row for each head and a column for each class.
    """
    images = pictured(rows, dataset)
    found = stored(c, rows, images, dataset, "linear")
    figure, panels = image_grid(len(found), images.classes)
    for line, (key, model) in zip(panels, found.items(), strict=True):
        prototypes = model.head.prototypes().detach()
        pictures = prototypes.view(images.classes, *images.x.shape[1:]).mean(1)
        edge = pictures.abs().quantile(0.995).item() or 1.0
        for axes, picture in zip(line, pictures, strict=True):
            axes.imshow(picture.numpy(), cmap="RdBu_r", vmin=-edge, vmax=edge)
            axes.spines[:].set(visible=True, color="0.6", linewidth=0.5)
        name_line(line[0], title(*key).replace(", ", "\n"))
    figures.save(figure, path)


def draw_grad_cam(c: ReportConfig, rows: list[Row], dataset: str, path: Path) -> None:
    """Draws Grad-CAM (captum) of the CNN's last convolution, for the predicted class.

    It uses the first test image of each class. A wrong prediction has a thick orange frame.
    """
    from captum.attr import LayerAttribution, LayerGradCam

    images = pictured(rows, dataset)
    first = [int((images.test_y == k).nonzero()[0]) for k in range(images.classes)]
    x = images.test_x[first]
    every = stored(c, rows, images, dataset, "cnn")
    found = {key: every[key] for key in GRAD_CAM if key in every}
    figure, panels = image_grid(len(found), len(first))
    for line, ((head, _), model) in zip(panels, found.items(), strict=True):
        guess = model(x).argmax(-1)
        cam = LayerGradCam(model, model.features.get_submodule("2"))
        heat = cam.attribute(x, target=guess, relu_attributions=True)
        heat = LayerAttribution.interpolate(heat, tuple(x.shape[2:]), "bilinear").detach()
        right = (guess == images.test_y[first]).tolist()
        for axes, picture, warm, is_right in zip(line, x, heat, right, strict=True):
            axes.imshow(picture.mean(0).numpy(), cmap="gray")
            strength = (warm[0] / warm.max().clamp_min(1e-9)).numpy()
            axes.imshow(strength, cmap="inferno", alpha=0.55, vmin=0, vmax=1)
            frame = dict(color="0.3", linewidth=0.5)
            if not is_right:
                frame = dict(color=figures.VERMILLION, linewidth=2.5)
            axes.spines[:].set(visible=True, **frame)
        name_line(line[0], head)
    figures.save(figure, path)


def image_grid(lines: int, classes: int) -> tuple[Figure, np.ndarray]:
    """A figure, and its panels (lines, classes) without ticks, under the numbers of the classes."""
    # The names of the lines need the width of about 2.6 classes.
    side = figures.WIDTH / (classes + 2.6)
    figure = figures.figure(0.3 + side * lines)
    figure.set_layout_engine("constrained", w_pad=0.015, h_pad=0.015, wspace=0, hspace=0)
    panels = figure.subplots(lines, classes, squeeze=False)
    for axes in panels.flat:
        axes.set_xticks([])
        axes.set_yticks([])
    for k, axes in enumerate(panels[0]):
        axes.set_title(str(k), loc="center")
    return figure, panels


def name_line(axes: Axes, name: str) -> None:
    axes.set_ylabel(name, rotation=0, ha="right", va="center")


def main() -> None:
    (c,) = parse(sys.argv[1:], ReportConfig)
    rows = Table(c.table, COLUMNS, KEY).rows
    if not places(rows):
        raise UserError(f"no rows in {c.table}: python -m studies.vision writes them")
    trained_on = {r["dataset"]: r["train_images"] for r in rows if r["stage"] == "main"}
    for dataset, backbone in places(rows):
        count = trained_on[dataset]
        print(f"{dataset}, {backbone}, {count} training images\n")
        print(f"{table(rows, dataset, backbone)}\n")
    print(f"{on_edge(list(swept(rows).values()))}\n")
    pictures = (
        ("linear", "_prototypes.png", draw_prototypes, HEADS),
        ("cnn", "_gradcam.png", draw_grad_cam, GRAD_CAM),
    )
    for backbone, ending, draw, heads in pictures:
        kept = []
        for dataset, other in places(rows):
            if other == backbone and any(
                weights(c, rows, dataset, backbone, *head) is not None for head in heads
            ):
                kept.append(dataset)
        if kept:
            draw(c, rows, kept[0], Path(c.out + ending))
            print(f"wrote {c.out}{ending}")


if __name__ == "__main__":
    cli(main)
