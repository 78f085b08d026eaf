"""Image classifiers: the data's formats, what is held out, backbones, and a small run."""

import gzip
import struct

import numpy as np
import pytest
import torch
from conftest import script_here

from base.errors import UserError
from studies import vision, vision_report
from studies.runner import Table


@pytest.fixture(scope="module")
def digits():
    return vision.load("digits")


def test_digits_are_standardised_and_apart(digits):
    assert (
        digits.x.shape == (1438, 1, 8, 8)
        and digits.test_x.shape == (359, 1, 8, 8)
        and digits.classes == 10
    )
    assert abs(digits.x.mean()) < 1e-4 and digits.x.std() == pytest.approx(1, abs=1e-3)
    few = vision.load("digits", limit=100)
    # The test is the same whatever is trained on.
    assert len(few.x) == 100 and torch.equal(few.test_y, digits.test_y)


def test_the_idx_format(tmp_path):
    images = np.random.default_rng(0).integers(256, size=(3, 4, 5), dtype=np.uint8)
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(struct.pack(">HBBIII", 0, 8, 3, 3, 4, 5) + images.tobytes()))
    assert np.array_equal(vision.idx(path), images)


@pytest.fixture
def folder(tmp_path):
    """Two classes of coloured images, as a user has them: a folder for each class under train/ and
    test/."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for part, count in (("train", 12), ("test", 5)):
        for k, name in enumerate(("night", "day")):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                picture = np.clip(rng.normal(60 + 120 * k, 20, (16, 16, 3)), 0, 255).astype(
                    np.uint8
                )
                Image.fromarray(picture).save(tmp_path / part / name / f"{i}.png")
    return tmp_path


def test_a_folder_of_images(folder, tmp_path):
    found = vision.load(str(folder), size=8)
    assert (
        found.x.shape == (24, 3, 8, 8)
        and found.test_x.shape == (10, 3, 8, 8)
        and found.classes == 2
    )
    model = vision.Classifier(found, "cnn", "euclidean", "harmonic", 1.0)
    vision.train(model, found, 3e-3, 10, 0)
    _, logits = vision.outputs(model.eval(), found.test_x)
    assert (logits.argmax(-1) == found.test_y).all()


def test_images_of_several_sizes_need_one(folder):
    from PIL import Image

    Image.new("RGB", (20, 10)).save(folder / "train/day/wide.png")
    with pytest.raises(UserError, match="several sizes: give --size"):
        vision.load(str(folder))
    assert vision.load(str(folder), size=8).x.shape == (25, 3, 8, 8)
    for path in folder.rglob("*.png"):
        Image.new("RGB", (20, 10)).save(path)
    with pytest.raises(UserError, match="10 x 20 pixels, and the models need squares: give --size"):
        vision.load(str(folder))


@pytest.mark.parametrize(
    "backbone, channels, size",
    [("resnet50", 3, 32), ("pvt_v2", 3, 32), ("cnn", 1, 9), ("mlp", 3, 7), ("linear", 1, 5)],
)
def test_backbones(backbone, channels, size):
    """Forward, a step backward, and features of the width that they say."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(4, channels, size, size, generator=g), torch.tensor([0, 1, 2, 0])
    torch.manual_seed(0)
    model = vision.Classifier(vision.Images(x, y, x, y), backbone, "manhattan", "harmonic", 1.0)
    features = model.features(x)
    assert features.shape == (4, model.head.weight.shape[1]) and model(x).shape == (4, 3)
    loss = model.head.loss(features, y)
    loss.backward()
    assert loss.isfinite() and model.head.weight.grad.abs().sum() > 0
    if backbone != "linear":
        assert all(
            p.grad is not None and p.grad.isfinite().all()
            for p in model.features.parameters()
            if p.requires_grad
        )


def test_training_stops_early_and_keeps_the_best(digits, monkeypatch):
    torch.manual_seed(0)
    model = vision.Classifier(digits, "mlp", "cross_entropy", "control", 1.0)
    seen = []
    monkeypatch.setattr(
        vision, "outputs", lambda m, x, real=vision.outputs: seen.append(len(x)) or real(m, x)
    )
    best = vision.train(model, digits, 3e-2, 40, 0)
    # A tenth of the training images decides, never a test image.
    assert best["epochs"] < 40 and set(seen) == {143}
    order = torch.randperm(1438, generator=torch.Generator().manual_seed(0))
    _, logits = vision.outputs(model, digits.x[order[:143]])
    assert torch.nn.functional.cross_entropy(logits, digits.y[order[:143]]).item() == pytest.approx(
        best["val_loss"], rel=1e-5
    )


def test_a_run_the_report_and_its_pictures(tmp_path):
    c = vision.VisionConfig(
        datasets="digits",
        backbones="linear cnn",
        runs=str(tmp_path / "runs"),
        epochs=2,
        seeds=2,
        limit=300,
        only="cosine",
    )
    table = Table(tmp_path / "v.csv", vision.COLUMNS, vision.KEY)
    for stage, backbone in (
        ("sweep", "linear"),
        ("sweep", "cnn"),
        ("main", "linear"),
        ("main", "cnn"),
    ):
        key = dict(stage=stage, dataset="digits", backbone=backbone, head="cosine", link="harmonic")
        (job,) = [job for job in vision.wanted(table, c) if job.key == key]
        table.add(*job.function(*job.arguments))
    rows = table.rows
    swept = [r for r in rows if r["stage"] == "sweep" and r["backbone"] == "cnn"]
    grid = len(vision.RATES) * len(vision.MULTIPLES)
    assert grid <= len(swept) <= grid + vision.EDGES and all(
        r["test_accuracy"] == "" for r in swept
    )
    best = min(swept, key=lambda r: float(r["val_loss"]))
    assert {(r["learning_rate"], r["multiple"]) for r in rows[-2:]} == {
        (best["learning_rate"], best["multiple"])
    }
    done = script_here(
        "-m",
        "studies.vision_report",
        f"--table={tmp_path / 'v.csv'}",
        f"--runs={tmp_path / 'runs'}",
        f"--out={tmp_path / 'v'}",
    )
    mean = np.mean([100 * float(r["test_accuracy"]) for r in rows[-2:]])
    assert (
        done.returncode == 0
        and f"| {mean:.2f} ± " in done.stdout
        and "digits, cnn, 300 training images" in done.stdout
    ), done.stderr
    assert all(
        (tmp_path / f"v_{name}.png").stat().st_size > 1500 for name in ("prototypes", "gradcam")
    )
    # Models of another table are not in its pictures.
    report = vision_report.ReportConfig(runs=str(tmp_path / "runs"))
    images = vision.load("digits", 0, 300)
    for table_rows, count in ((rows, 1), ([{**r, "val_loss": "9"} for r in rows], 0)):
        found = vision_report.stored(report, table_rows, images, "digits", "linear")
        assert len(found) == count
    for path in (tmp_path / "runs").rglob("model.pt"):  # as another version wrote it
        torch.save(torch.load(path, weights_only=True)["weights"], path)
    (tmp_path / "v_prototypes.png").unlink()
    words = [f"--{key}={tmp_path / value}" for key, value in (("table", "v.csv"), ("out", "v"))]
    done = script_here("-m", "studies.vision_report", *words, f"--runs={tmp_path / 'runs'}")
    assert done.returncode == 0 and "of another table or version" in done.stderr
    assert not (tmp_path / "v_prototypes.png").exists()
    assert float(rows[-1]["kwh"]) > 0 and vision_report.places(rows) == [
        ("digits", "linear"),
        ("digits", "cnn"),
    ]


@pytest.mark.parametrize(
    "flag, words",
    [
        ("--datasets=mnits", "mnits is neither a folder nor one of"),
        ("--backbones=vgg", "unknown vgg"),
        ("--only=cosin", "is not a head"),
        ("--limit=-1", "limit=-1"),
        ("--limit=5", "limit=5: a tenth of the images is held out"),
    ],
)
def test_bad_flags(flag, words, tmp_path):
    done = script_here("-m", "studies.vision", flag, f"--out={tmp_path / 'v.csv'}")
    assert done.returncode == 2 and words in done.stderr


def test_a_dataset_that_cannot_be_had(monkeypatch):
    import datasets

    def fails(*_, **__):
        raise ConnectionError("no route to the hub\nmore")

    monkeypatch.setattr(datasets, "load_dataset", fails)
    with pytest.raises(UserError, match="cannot load uoft-cs/cifar10: no route to the hub$"):
        vision.load("cifar10")
