"""Training: every head, architecture and link; what a run's folder holds; other precisions,
compiling and loggers."""

import json
import math
import shutil
import subprocess

import pytest
import torch
import yaml
from conftest import ROOT, TINY, script
from safetensors.torch import load_file

from harmonic import CONTROLS, DISTANCES
from model import Model
from training.metrics import read_metrics
from training.start import runs_train
from training.step import norms
from training.verify import history

COMBINATIONS = [(d, link) for d in DISTANCES for link in ("harmonic", "softmax")] + [
    (c, "harmonic") for c in CONTROLS
]
# Every head and link with one of the architectures in turn, the other pairs in the slow tests.
EVERY_HEAD = [
    pytest.param(arch, *pair, marks=[] if (turn + i) % 3 == 0 else pytest.mark.slow)
    for turn, pair in enumerate(COMBINATIONS)
    for i, arch in enumerate(("gpt", "bert", "qwen"))
]


@pytest.mark.parametrize(("arch", "head", "link"), EVERY_HEAD)
def test_every_head_trains(train, tmp_path, arch, head, link):
    status, out, err = train(arch=arch, head=head, link=link)
    assert status == 0, err
    assert "iter 0: val loss" in out  # the loss before the first step is reported
    lines = read_metrics(tmp_path / "run")
    steps = [r for r in lines if "train_loss" in r]
    assert [r["iter"] for r in steps] == [0, 1] and [
        r["iter"] for r in lines if "val_loss" in r
    ] == [0, 2]
    assert all(
        r["grad_norm"] > 0 and r["grad_norm_head"] > 0 and r["prototype_radius"] > 0 for r in steps
    )
    # where every coordinate of h lies outside all prototypes', the signs of a softmax of -s |h-w|
    # are equal and its trunk gets no gradient
    assert all(r["grad_norm_trunk"] > 0 for r in steps) or link == "softmax"
    if head in DISTANCES:
        assert all(0 < r["target_distance_min"] <= r["target_distance_mean"] for r in steps)
    start = lines[0]
    assert ("kl_to_softmax" in start) == (
        head in DISTANCES and DISTANCES[head].kernel == "l2" and link == "harmonic"
    )
    assert ("bits_per_byte" in start) == (arch != "bert")
    assert lines[-1]["val_loss"] != start["val_loss"]


def test_a_tiny_model_learns(train, tmp_path):
    """300 steps of text with a bigram structure: far below the loss of a uniform guess, log(300) =
    5.7."""
    for head in ("cosine", "cross_entropy"):
        status, _, err = train(
            head=head, max_iters=300, learning_rate=1e-2, eval_interval=300, out_dir=head
        )
        assert status == 0, err
        assert read_metrics(tmp_path / head)[-1]["val_loss"] < 3.0


def test_the_run_folder_is_as_documented(train, tmp_path):
    status, out, _ = train(
        head="mahalanobis", max_iters=4, eval_interval=2, emissions=True, log_interval=2
    )
    assert status == 0 and "Wh" in out and "ETA" in out and "tokens/s" in out
    run = tmp_path / "run"
    assert {p.name for p in run.iterdir()} == {
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "emissions.csv",
        "tokenizer.json",
        "ckpt",
    }
    stored = yaml.safe_load((run / "config.yaml").read_text())
    assert (
        stored["head"] == "mahalanobis"
        and stored["vocab_size"] == 320
        and stored["real_vocab_size"] == 300
        and stored["tokenizer"] == "bpe:300"
    )
    environment = json.loads((run / "environment.json").read_text())
    assert (
        environment["versions"]["torch"] == torch.__version__
        and "train.py" in environment["command"]
        and torch.backends.cpu.get_cpu_capability() in environment["device"]
    )
    if shutil.which("git"):
        git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        assert environment["git_commit"] == (git.stdout.strip() or None)
    assert len((run / "emissions.csv").read_text().splitlines()) == 2
    folders = sorted(p.name for p in (run / "ckpt").iterdir())
    assert (
        "iter_000004" in folders
        and len(folders) <= 3
        and not any(f.startswith(".") for f in folders)
    )
    manifest = json.loads((run / "ckpt/iter_000004/manifest.json").read_text())
    assert manifest["iter"] == 4 and set(manifest["sha256"]) == {
        "model.safetensors",
        "train_state.safetensors",
    }
    weights = load_file(run / "ckpt/iter_000004/model.safetensors")
    assert "tokens.weight" not in weights  # tied: stored once, as head.weight
    # Mahalanobis' parameters train.
    assert not torch.allclose(weights["head.distance_parameters.factor"], torch.eye(16), atol=1e-5)


def test_accumulation_does_not_change_the_losses(train, tmp_path):
    for batch, steps in ((8, 1), (2, 4)):
        eval_iters = 16 // batch  # the same 16 validation windows
        train(
            batch_size=batch,
            gradient_accumulation_steps=steps,
            eval_iters=eval_iters,
            max_iters=5,
            out_dir=f"b{batch}",
            head="cosine",
        )
    one, two = (read_metrics(tmp_path / d) for d in ("b8", "b2"))
    for a, b in zip(one, two, strict=True):
        assert a.get("train_loss", a.get("val_loss")) == pytest.approx(
            b.get("train_loss", b.get("val_loss")), abs=1e-5
        )


def test_evaluation_does_not_disturb_training(train, tmp_path):
    for interval in (1, 100):
        train(
            max_iters=5,
            eval_interval=interval,
            out_dir=f"e{interval}",
            dropout=0.1,
            head="hamming_gumbel",
        )
    one, two = (
        [r["train_loss"] for r in read_metrics(tmp_path / d) if "train_loss" in r]
        for d in ("e1", "e100")
    )
    assert one == two


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_autocast_trains(train, tmp_path, dtype):
    for d in ("float32", dtype):
        status, _, err = train(dtype=d, max_iters=10, head="euclidean", exponent="dim", out_dir=d)
        assert status == 0, err
    full, half = (
        [r.get("train_loss", r.get("val_loss")) for r in read_metrics(tmp_path / d)]
        for d in ("float32", dtype)
    )
    assert full != half and full == pytest.approx(half, abs=0.02)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_training_equals_eager(train, tmp_path, monkeypatch, backend):
    """Without the C++ compiler in the quick run: it takes most of a minute."""
    compile_blocks = Model.compile_blocks
    monkeypatch.setattr(
        Model, "compile_blocks", lambda model, **kw: compile_blocks(model, **kw, backend=backend)
    )
    for flag in (True, False):
        status, _, err = train(compile=flag, max_iters=5, head="cosine", out_dir=f"c{flag}")
        assert status == 0, err
    one, two = (
        [r.get("train_loss", r.get("val_loss")) for r in read_metrics(tmp_path / d)]
        for d in ("cTrue", "cFalse")
    )
    assert one == pytest.approx(two, abs=1e-4)


def test_learnt_exponent_is_reported(train, tmp_path):
    train(head="cosine", learn_exponent=True, max_iters=5, learning_rate=0.05)
    values = [r["strength"] for r in read_metrics(tmp_path / "run") if "strength" in r]
    # sqrt(16), and it moves.
    assert values[0] == pytest.approx(4.0) and abs(values[-1] - 4.0) > 0.01


def test_eval_only_writes_nothing(train, tmp_path, monkeypatch):
    train(head="cosine")
    before = (tmp_path / "run/metrics.jsonl").read_text()
    status, out, err = train(init_from="resume", eval_only=True, **{k: None for k in TINY})
    assert status == 0, err
    stored = read_metrics(tmp_path / "run")[-1]["val_loss"]
    assert (
        f"val_loss {stored:.4f}" in out and (tmp_path / "run/metrics.jsonl").read_text() == before
    )
    with monkeypatch.context() as patch:
        patch.setattr("training.evaluation.Evaluation.__call__", lambda *_: {"val_loss": math.nan})
        status, out, _ = train(init_from="resume", eval_only=True, **{k: None for k in TINY})
    assert status == 3 and "val_loss nan" in out


@pytest.mark.slow
def test_tensorboard_and_wandb_offline(tiny_data, tmp_path):
    """Both get every number of metrics.jsonl, the run's own files, and nothing is sent."""
    flags = [
        f"--{k}={v}"
        for k, v in {
            **TINY,
            "dataset": tiny_data,
            "out_dir": tmp_path / "run",
            "max_iters": 3,
        }.items()
    ]
    environment = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    done = script("train.py", *flags, "--tensorboard=true", "--wandb=true", env=environment)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = {m["iter"]: m["train_loss"] for m in lines if "train_loss" in m}

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    assert {e.step: e.value for e in events.Scalars("train_loss")} == pytest.approx(
        losses, rel=1e-6
    ) and len(losses) == 3
    (kept,) = (tmp_path / "run/wandb").glob("offline-run-*/*.wandb")
    assert b"train_loss" in kept.read_bytes() and b"n_embd" in kept.read_bytes()
    # A resumed run is the same W&B run, with its new settings.
    more = [f"--out_dir={tmp_path / 'run'}", "--init_from=resume", "--max_iters=5", "--wandb=true"]
    done = script("train.py", *more, env=environment)
    assert done.returncode == 0, done.stderr
    parts = list((tmp_path / "run/wandb").glob("offline-run-*/*.wandb"))
    assert len(parts) == 2 and len({part.name for part in parts}) == 1


def test_tensorboard_keeps_the_evaluation_from_which_a_run_resumes(train, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = dict(head="cross_entropy", eval_interval=2, tensorboard=True)
    assert train(max_iters=4, **flags)[0] == 0
    assert train(max_iters=6, init_from="resume", **flags)[0] == 0
    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    board = {e.step: e.value for e in events.Scalars("val_loss")}
    losses = {m["iter"]: m["val_loss"] for m in read_metrics(tmp_path / "run") if "val_loss" in m}
    assert board == pytest.approx(losses) and list(losses) == [0, 2, 4, 6]


# bad input: one message, exit status 2, no traceback, nothing written


def test_only_train_py_starts_again():
    for words, again in (
        ("python train.py --head=cosine", True),
        ("python -u /a/train.py", True),
        ("python -m train", True),
        ("python -m pytest tests/test_train.py", False),
        ("python -m studies.budget", False),
    ):
        assert runs_train(words.split()) == again


@pytest.mark.slow
def test_a_run_that_compiles_its_kernels_is_the_same_run(tiny_data, tmp_path):
    """Numba rounds differently in the process that compiles. So train.py starts again there."""
    flags = {**TINY, "dataset": tiny_data, "head": "manhattan", "max_iters": 8}
    for out in ("cold", "warm"):
        done = script(
            "train.py",
            *(f"--{k}={v}" for k, v in flags.items()),
            f"--out_dir={tmp_path / out}",
            env={"NUMBA_CACHE_DIR": str(tmp_path / "cache")},
        )
        assert done.returncode == 0, done.stderr
        assert ("starting again" in done.stderr) == (out == "cold")
    assert history(tmp_path / "cold") == history(tmp_path / "warm")


@pytest.mark.parametrize("arch", ["gpt", "bert", "qwen"])
def test_doc_mask_trains(train, arch):
    status, _, err = train(arch=arch, doc_mask=True, head="cosine")
    assert status == 0, err


def test_norms_are_exact():
    tensors = [torch.randn(2003, 770), torch.randn(3), torch.zeros(0, 7)]
    expected = torch.stack([t.double().norm() for t in tensors])
    torch.testing.assert_close(norms(tensors).double(), expected, rtol=1e-6, atol=0)
