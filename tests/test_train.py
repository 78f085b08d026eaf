"""Training: every head, architecture and link; what a run's folder holds; resuming; processes;
every bad input."""

import contextlib
import errno
import itertools
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
import yaml
from conftest import ROOT, TINY, script, script_here
from safetensors.torch import load_file

import train as train_script
from base import machine
from base.command_line import cli
from base.errors import UserError
from base.files import locked, seal, sha256, unseal
from base.output import say
from harmonic import CONTROLS, DISTANCES, HEADS, HarmonicHead
from model import Model, ModelConfig
from tests.faults.storm import workers
from text.token_files import load_data
from training import advice, checkpoint, distributed, folder, telemetry
from training.config import TrainConfig
from training.distributed import StopSignals, launcher
from training.evaluation import Evaluation
from training.optimizers import make_optimizer
from training.start import runs_train
from training.step import Gradients
from training.telemetry import Metrics, kept_starts, norms, read_metrics
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


def test_newest_and_best_checkpoints_are_kept(train, tmp_path):
    """A learning rate that destroys the model: the best checkpoint is an early one, and stays."""
    status, _, err = train(
        head="cross_entropy",
        max_iters=6,
        eval_interval=1,
        learning_rate=3.0,
        warmup_iters=4,
        grad_clip=0,
    )
    assert status == 0, err
    losses = {
        r["iter"]: r["val_loss"]
        for r in read_metrics(tmp_path / "run")
        if "val_loss" in r and r["iter"] > 0
    }
    best = min(losses, key=losses.get)
    assert best < 6
    assert {f.name for f in checkpoint.manifests(tmp_path / "run")} == {
        f"iter_{best:06d}",
        "iter_000005",
        "iter_000006",
    }
    assert checkpoint.best(tmp_path / "run").name == f"iter_{best:06d}"


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"arch": "bert", "dropout": 0.1},
        {"head": "hamming_gumbel"},
        {"dropout": 0.2, "head": "cosine", "optimizer": "muon", "head_learning_rate": 2e-3},
    ],
)
def test_resuming_gives_the_same_run(train, tmp_path, settings):
    """Stopped at 3 of 6 and resumed: the same losses and weights, bit for bit, and no line of
    metrics twice or missing."""
    common = dict(eval_interval=3, lr_decay_iters=6, **settings)
    assert train(max_iters=6, out_dir="whole", **common)[0] == 0
    assert train(max_iters=3, out_dir="halves", **common)[0] == 0
    status, out, err = train(
        max_iters=6,
        out_dir="halves",
        init_from="resume",
        **{k: None for k in ("dataset", *TINY) if k != "max_iters"},
    )
    assert status == 0 and "resuming at iteration 3 of 6" in out, err
    assert re.search(r"done: halves, .* since iteration 3$", out, re.M)
    one, two = (
        [
            {k: v for k, v in r.items() if k not in ("tokens_per_s", "elapsed_s")}
            for r in read_metrics(tmp_path / d)
        ]
        for d in ("whole", "halves")
    )
    assert one == two
    a, b = (
        load_file(tmp_path / d / "ckpt/iter_000006/model.safetensors") for d in ("whole", "halves")
    )
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_killed_run_goes_on_from_its_checkpoint(tiny_data, tmp_path):
    """A real process, killed without warning in mid-run, then --init_from=auto: the metrics are
    those of a run never interrupted."""
    flags = [
        f"--{k}={v}"
        for k, v in {
            **TINY,
            "dataset": tiny_data,
            "max_iters": 300,  # so long that it lives when it is killed
            "eval_interval": 20,
            # No head with kernels of Numba: the process that compiles them differs in last bits.
            "head": "cross_entropy",
            "dropout": 0.1,
        }.items()
    ]
    whole = script_here("train.py", *flags, f"--out_dir={tmp_path / 'whole'}")
    assert whole.returncode == 0, whole.stderr
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "train.py",
        *flags,
        f"--out_dir={tmp_path / 'killed'}",
        "--init_from=auto",
    ]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    while not [c for c in checkpoint.folders(tmp_path / "killed") if c.name >= "iter_000040"]:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = script(*command[1:])
    assert done.returncode == 0, done.stderr
    one, two = (
        [(r["iter"], r.get("train_loss"), r.get("val_loss")) for r in read_metrics(tmp_path / d)]
        for d in ("whole", "killed")
    )
    assert one == two
    assert [f.name for f in (tmp_path / "killed/ckpt").iterdir() if f.name.startswith(".")] == []
    again = script_here(*command[1:])
    assert again.returncode == 0 and "already trained to iteration 300" in again.stdout


@pytest.mark.parametrize(
    ("arch", "processes", "batch", "accumulation"),
    [pytest.param("gpt", 2, 4, 1, marks=pytest.mark.slow), ("bert", 2, 1, 3)],
)
def test_processes_do_not_change_the_losses(
    tiny_data, tmp_path, arch, processes, batch, accumulation
):
    """torchrun with gloo against one process; 2 processes share 3 windows of training and 3 of
    validation: one has none in a round."""
    settings = {
        **TINY,
        "dataset": tiny_data,
        "max_iters": 20,
        "arch": arch,
        "head": "cosine",
        "batch_size": batch,
        "gradient_accumulation_steps": accumulation,
        "eval_iters": max(1, 3 // batch),
    }
    flags = [f"--{k}={v}" for k, v in settings.items()]
    assert script_here("train.py", *flags, f"--out_dir={tmp_path / 'one'}").returncode == 0
    many = script(
        *launcher(processes), "train.py", *flags, f"--out_dir={tmp_path / 'many'}", "--backend=gloo"
    )
    assert many.returncode == 0, many.stderr
    assert f"{processes} processes" in many.stdout and many.stdout.count("iter 0: val loss") == 1
    one, two = (read_metrics(tmp_path / d) for d in ("one", "many"))
    assert len(one) == len(two) == 22
    assert one[0]["val_loss"] == pytest.approx(two[0]["val_loss"], rel=1e-6)
    for a, b in zip(one, two, strict=True):
        for key in set(a) - {"tokens_per_s", "elapsed_s"}:
            # Signs in manhattan's gradient make rounding grow. Freed memory would be far off.
            assert a[key] == pytest.approx(b[key], abs=1e-4, rel=5e-3), (a["iter"], key)


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


def test_eval_only_writes_nothing(train, tmp_path):
    train(head="cosine")
    before = (tmp_path / "run/metrics.jsonl").read_text()
    status, out, err = train(init_from="resume", eval_only=True, **{k: None for k in TINY})
    assert status == 0, err
    stored = read_metrics(tmp_path / "run")[-1]["val_loss"]
    assert (
        f"val_loss {stored:.4f}" in out and (tmp_path / "run/metrics.jsonl").read_text() == before
    )


@pytest.mark.parametrize("head", HEADS)
def test_a_loss_that_is_not_finite_stops_the_run(train, tmp_path, head):
    """No factorisation or sort of a head meets the infinite weights first."""
    status, out, err = train(
        head=head, learning_rate=1e30, grad_clip=0, max_iters=20, warmup_iters=0
    )
    assert (
        status == 3 and "stopped: " in err and "iteration" in err and "last good checkpoint" in err
    )
    assert (
        "nan" in (tmp_path / "run/metrics.jsonl").read_text()
        or "inf" in (tmp_path / "run/metrics.jsonl").read_text()
    )


def test_tensorboard_and_wandb_ask_for_their_packages(train, tmp_path, monkeypatch):
    monkeypatch.setattr("training.telemetry._installed", lambda package: False)
    status, _, err = train(tensorboard=True, wandb=True)
    assert (
        status == 2
        and "pip install tensorboard" in err
        and "pip install wandb" in err
        and not (tmp_path / "run").exists()
    )


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


# bad input: one message, exit status 2, no traceback, nothing written

BAD = {
    "unknown key": (dict(n_layr=3), ["n_layr: unknown key", "did you mean n_layer?"]),
    "negative theta": (dict(arch="qwen", rope_theta=-1), ["rope_theta=-1.0 must be positive"]),
    "negative std": (
        dict(head_init_std=-1, dropout=2),
        ["2 problems", "head_init_std=-1.0 must be positive", "dropout=2.0 is not in"],
    ),
    "huge timeout": (dict(timeout=1e300), ["timeout=1e+300 is above 2,000,000 seconds"]),
    "no numbers": (
        dict(learning_rate=".inf", grad_clip="1e400", max_iters="1:30"),
        [
            "3 problems",
            "learning_rate=.inf: expected a number",
            "grad_clip=1e400: expected a number",
            "max_iters=1:30: expected a whole",
        ],
    ),
    "no such source": (dict(source="nowhere/x"), ["source=nowhere/x"]),
    "unknown head": (dict(head="euclidian"), ["unknown head", "did you mean euclidean?"]),
    "another name": (dict(head="softmax"), ["unknown head", "did you mean cross_entropy?"]),
    "unknown arch": (dict(arch="gtp"), ["unknown arch", "did you mean gpt?"]),
    "unknown link": (dict(link="softmx"), ["unknown link", "did you mean softmax?"]),
    "wrong type": (dict(n_layer="three"), ["n_layer=three: expected a whole number"]),
    "wrong type, float": (dict(learning_rate="fast"), ["learning_rate=fast: expected a number"]),
    "wrong type, bool": (dict(compile="maybe"), ["compile=maybe: expected true or false"]),
    "several": (
        dict(n_layr=3, arch="gtp", learning_rate="x"),
        ["3 problems", "n_layr", "gtp", "learning_rate=x"],
    ),
    "n_embd and n_head": (dict(n_embd=15), ["n_embd=15 is not divisible by n_head=2"]),
    "n_head and n_kv_head": (
        dict(arch="qwen", n_head=8, n_kv_head=3),
        ["n_head=8 is not divisible by n_kv_head=3"],
    ),
    "block_size": (
        dict(block_size=10_000_000),
        ["block_size=10000000 is too long", "train.bin", "val.bin"],
    ),
    "no data": (dict(dataset="nowhere"), ["no data folder", "nowhere", "prepare_openwebtext.py"]),
    "vocab_size": (dict(vocab_size=64), ["vocab_size=64 is smaller than the data's 300"]),
    "tokenizer": (dict(tokenizer="gpt2"), ["tokenizer=gpt2", "prepared with bpe:300"]),
    "eot_id": (
        dict(doc_mask=True, eot_id=9999),
        [
            "eot_id=9999 is not a token of bpe:300, which has ids below 300: leave --eot_id out"
            " to use the data's, 0"
        ],
    ),
    "resume and overwrite": (
        dict(init_from="auto", overwrite=True),
        ["overwrite=true deletes the run in run, and init_from=auto resumes it"],
    ),
    "resume nothing": (dict(init_from="resume", out_dir="empty"), ["empty holds no checkpoint"]),
    "exponent": (dict(head="cosine", exponent=-1), ["exponent must be a positive number"]),
    "exponent, text": (
        dict(head="cosine", exponent="dims"),
        ["exponent=dims: expected a number, dim/4, sqrt_dim, dim, 2dim or 4dim"],
    ),
    "useless option": (
        dict(head="manhattan", head_p=2),
        ["head_p=2 does nothing with head=manhattan"],
    ),
    "no cuda": (dict(device="cuda"), ["device=cuda: this machine has no CUDA device"]),
    "unknown device": (dict(device="gpu"), ["unknown device"]),
    "batch_size": (dict(batch_size=0), ["batch_size=0 must be at least 1"]),
    "learning_rate": (dict(learning_rate=0), ["learning_rate=0.0 must be positive"]),
    "max_iters": (dict(max_iters=-1), ["max_iters=-1"]),
    "min_lr": (dict(min_lr=-1), ["min_lr=-1.0 must not be negative"]),
    "seed": (dict(seed=99999999999), ["seed=99999999999 is not in"]),
    "country": (dict(emissions_country="XX"), ["three letters"]),
    "unknown country": (
        dict(emissions=True, emissions_country="ZZZ"),
        ["emissions_country=ZZZ: CodeCarbon knows no such country"],
    ),
    "link of a control": (
        dict(head="cross_entropy", link="softmax"),
        ["link=softmax does nothing with head=cross_entropy"],
    ),
    "exponent of a control": (
        dict(head="cross_entropy", exponent=3),
        ["exponent=3.0 does nothing with head=cross_entropy: a control has no distance"],
    ),
    "scale of a harmonic link": (
        dict(head="cosine", scale=16),
        ["train.py: head=cosine: scale=16.0 is for the softmax link: set link=softmax too"],
    ),
    "names that are not read": (
        dict(head="cosin", link="sofmax", scale=16, max_iters=-5),
        ["3 problems", "did you mean cosine?", "did you mean softmax?", "max_iters=-5"],
    ),
    "rope of gpt": (dict(rope_theta=1e4), ["rope_theta=10000.0 is for arch=qwen"]),
    "meta device": (dict(device="meta"), ["unknown device"]),
    "out_dir under a file": (
        dict(out_dir="/dev/null/x"),
        ["out_dir=/dev/null/x cannot be written"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(train, tmp_path, case):
    flags, words = BAD[case]
    status, out, err = train(**flags)
    assert status == 2 and out == ""
    assert err.startswith("train.py: ") and "Traceback" not in err
    assert all(word in err for word in words), err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("n_layer: [1", "is not YAML"),
        ("- 1\n- 2\n", "expected flat"),
        ("model:\n  n_layer: 2\n", "expected flat"),
        ("n_layers: 2\n", "did you mean n_layer?"),
        ("seed: 1\nn_layer: 2\nseed: 2\n", "seed is given 2 times"),
        ("<<: {seed: 1}\n<<: {n_layer: 2}\nnonsense: 1\n", "nonsense: unknown key"),
        ("wandb: !!map foo\n", "is not YAML"),
        ("5: 2\n", "5 is not the name of a setting"),
        ("tokenizer: 123\n", "tokenizer: YAML reads the value as 123, which is not a text"),
        ("sample_interval: 1:30\n", "sample_interval=1:30: expected a whole"),
        ("weight_decay: .inf\n", "weight_decay=.inf: expected a number"),
        ("n_layer: !!int\n", "is not YAML"),
        ("init_from: true\n", "init_from: YAML reads the value as True"),
        ("head:\n", "head=null: unknown head"),
        ("wandb: 2024-01-01\n", "expected true or false"),
        (None, "no config file"),
    ],
)
def test_bad_config_file(train, tmp_path, text, words):
    path = tmp_path / "c.yaml"
    if text is not None:
        path.write_text(text)
    status, _, err = train(str(path))
    assert status == 2 and words in err and not (tmp_path / "run").exists()


def test_a_config_file_that_cannot_be_read(train, tmp_path, monkeypatch):
    """A folder with its name is no suggestion for it."""
    (tmp_path / "c.yaml").mkdir()
    status, _, err = train("c.yaml")
    assert status == 2 and "no config file c.yaml" in err and "mean c.yaml" not in err
    (tmp_path / "d.yaml").write_text("")

    def closed(*_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "read_text", closed)
    status, _, err = train("d.yaml")
    assert status == 2 and "d.yaml cannot be read: Permission denied" in err


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


def test_two_positional_words(train):
    status, _, err = train(str(ROOT / "configs/demo.yaml"), "more")
    assert status == 2 and "unexpected word 'more'" in err


def test_an_existing_run_is_not_overwritten(train, tmp_path, monkeypatch):
    train(head="cosine")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}
    status, _, err = train(head="manhattan")
    assert status == 2 and "--init_from=resume" in err and "--overwrite=true" in err
    with locked(tmp_path / "run/.lock"):  # As another process does that trains there.
        status, _, err = train(head="cosine", init_from="auto", max_iters=9)
    assert status == 2 and "another process trains in run: stop it, or name another" in err
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")} == before

    @contextlib.contextmanager
    def late(path):
        """Gets the lock when the other process has just written its last checkpoint."""
        checkpoint.save(path.parent, 9, {}, {"val_loss": None})
        yield

    with monkeypatch.context() as context:
        context.setattr(folder, "locked", late)
        context.setattr(checkpoint, "damage", lambda *_: None)
        status, _, err = train(head="cosine", init_from="resume", max_iters=9)
    assert status == 2 and "another process has written a checkpoint in run" in err
    assert checkpoint.last(tmp_path / "run") == "iter_000009"
    assert train(head="manhattan", overwrite=True)[0] == 0
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["head"] == "manhattan"


def test_resuming_another_model_is_refused(train, tmp_path):
    train(head="cosine")
    status, _, err = train(init_from="resume", n_layer=2, head="manhattan")
    assert (
        status == 2
        and "n_layer=2: the run has n_layer=1" in err
        and "head=manhattan: the run has head=cosine" in err
    )


def test_what_a_resumed_run_changes_is_said_and_recorded(train, tmp_path):
    """... and another order of the data needs a flag; more micro-batches of fewer windows are the
    same order."""
    train(head="cosine", batch_size=4, seed=1)
    for changed in ({"seed": 5}, {"batch_size": 8}):
        status, _, err = train(init_from="resume", max_iters=4, **{"seed": 1, **changed})
        assert status == 2 and "--new_data_order=true accepts that" in err
    again = dict(
        init_from="resume",
        max_iters=4,
        seed=1,
        batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=5e-4,
    )
    status, _, err = train(**again)
    assert status == 0, err
    assert (
        "note: resumed with batch_size=2 (was 4), gradient_accumulation_steps=2 (was 1),"
        " max_iters=4 (was 2)" in err
    )
    status, _, err = train(**again, source="gpt2")
    assert status == 2 and "source=gpt2 does nothing here, because run is resumed" in err
    status, _, err = train(**{**again, "max_iters": 6, "seed": 5}, new_data_order=True)
    assert status == 0 and "note: resumed with max_iters=6 (was 4), seed=5 (was 1)" in err
    stored = json.loads((tmp_path / "run/environment.json").read_text())
    assert stored["iter"] == 4 and stored["changed"] == {"max_iters": [4, 6], "seed": [1, 5]}
    assert [start["iter"] for start in stored["earlier"]] == [0, 2] and "learning_rate" in stored[
        "earlier"
    ][1]["changed"]
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["new_data_order"] is False


def test_losses_of_other_windows_do_not_count_for_the_best(train, tmp_path):
    """The first windows have a low loss that no later evaluation reaches."""
    flags = dict(head="cosine", eval_interval=1, eval_iters=4)
    assert train(**flags)[0] == 0
    first = checkpoint.folders(tmp_path / "run")[-1]
    manifest = unseal((first / "manifest.json").read_text())
    assert manifest["val_loss"] is not None
    (first / "manifest.json").write_text(seal({**manifest, "val_loss": 0.1, "best_val_loss": 0.1}))
    again = dict(flags, init_from="resume", max_iters=4)
    status, out, err = train(**{**again, "eval_iters": 3})
    assert status == 0 and "the validation loss is of other windows from here on" in err, err
    found = read_metrics(tmp_path / "run")
    later = {m["iter"]: m["val_loss"] for m in found if "val_loss" in m and m["iter"] > 2}
    assert checkpoint.best(tmp_path / "run").name == f"iter_{min(later, key=later.get):06d}"
    assert f"best val loss {min(later.values()):.4f}" in out, out
    status, out, _ = train(**{**again, "eval_iters": 3, "max_iters": 5})
    assert "best val loss 0.1000" not in out


def test_a_start_that_evaluated_nothing_changes_no_windows(train, tmp_path, monkeypatch):
    """It was killed as soon as it had written its settings. The next start has the first ones."""
    flags = dict(head="cosine", eval_interval=1, eval_iters=4, max_iters=2)
    assert train(**flags)[0] == 0
    first = checkpoint.folders(tmp_path / "run")[0]
    manifest = unseal((first / "manifest.json").read_text())
    (first / "manifest.json").write_text(seal({**manifest, "val_loss": 0.1, "best_val_loss": 0.1}))
    again = dict(flags, init_from="resume", max_iters=4)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("train.train", killed)
        assert train(**{**again, "eval_iters": 3})[0] == 130
    status, _, err = train(**again)
    assert status == 0 and "other windows" not in err and "eval_iters" not in err, err
    assert checkpoint.best(tmp_path / "run") == first and first.is_dir()
    changes = [start["changed"] for start in kept_starts(tmp_path / "run")]
    assert changes == [{}, {"max_iters": [2, 4]}]


def test_a_refused_logger_leaves_the_run(train, tmp_path, monkeypatch):
    """W&B without a key, at a first start and at a resume."""

    class Error(Exception):
        pass

    def init(**_):
        raise Error("no API key")

    monkeypatch.setattr("training.start.check_loggers", lambda *_: [])
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Error=Error))
    status, _, err = train(head="cosine", wandb=True)
    assert status == 2 and "wandb does not start (no API key)" in err
    assert train(head="cosine")[0] == 0
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    status, _, err = train(head="cosine", wandb=True, init_from="resume", max_iters=9)
    assert status == 2 and "wandb does not start" in err
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before


def test_a_run_that_ends_with_nan_does_not_say_done(train, tmp_path):
    """Its last step destroys the weights, which no training loss shows."""
    for flags in (dict(), dict(on_nan="skip")):
        huge = dict(head="cross_entropy", max_iters=1, warmup_iters=0, learning_rate=1e38)
        status, out, err = train(**huge, **flags, overwrite=True)
        assert status == 3 and "stopped: validation loss nan at iteration 1" in err, err
        assert "done" not in out and "last good checkpoint: none" in err


def test_the_best_loss_is_that_of_a_checkpoint(train, tmp_path):
    """The loss before training is lower, and no checkpoint has it."""
    status, out, _ = train(head="cross_entropy", learning_rate=0.5, warmup_iters=0, max_iters=2)
    saved = [m["val_loss"] for m in checkpoint.manifests(tmp_path / "run").values()]
    assert status == 0 and f"best val loss {min(saved):.4f}" in out
    first = next(m["val_loss"] for m in read_metrics(tmp_path / "run") if "val_loss" in m)
    assert first < min(saved)


def test_no_iteration_leaves_a_checkpoint(train, tmp_path):
    assert train(head="cosine", max_iters=0)[0] == 0
    assert [f.name for f in checkpoint.folders(tmp_path / "run")] == ["iter_000000"]
    status, out, _ = train(head="cosine", init_from="resume", max_iters=2)
    assert status == 0 and "done" in out


def test_what_a_folder_with_a_run_is_not_for(train, tmp_path):
    """To evaluate a new model, or to test resuming."""
    assert train(head="cosine", max_iters=2)[0] == 0
    status, _, err = train(head="cosine", eval_only=True)
    assert status == 2 and "run holds a run: --init_from=resume evaluates it" in err
    status, _, err = train(init_from="resume", verify_resume=True)
    assert status == 2 and "python train.py run/config.yaml --verify_resume" in err


def test_checkpoints_of_other_windows_do_not_count_for_the_best(train, tmp_path):
    """A start evaluated the checkpoint that it began with over other windows, and was killed."""
    flags = dict(head="cosine", eval_interval=1, eval_iters=4, max_iters=2)
    assert train(**flags)[0] == 0
    last = checkpoint.folders(tmp_path / "run")[-1]
    manifest = unseal((last / "manifest.json").read_text())
    assert manifest["windows"] == 4 * TINY["batch_size"]
    low = {"val_loss": 0.1, "best_val_loss": 0.1, "windows": 1}
    (last / "manifest.json").write_text(seal({**manifest, **low}))
    status, out, _ = train(**dict(flags, init_from="resume", max_iters=4))
    assert status == 0 and "best val loss 0.1000" not in out
    assert checkpoint.best(tmp_path / "run") != last


def test_a_text_counts_as_changed_only_if_the_checkpoint_has_another():
    """The second start had another text and left nothing. The third has the first text again."""
    changes = telemetry._together({"val_text": ["a", "b"], "seed": [1, 2]}, {"seed": [2, 3]})
    assert changes == {"seed": [1, 3]}


def test_a_config_of_another_version_is_read(train, tmp_path):
    """A key that is no more is named and ignored, one that was not yet known has its default; a
    wrong value is an error."""
    train(head="cosine")
    path = tmp_path / "run/config.yaml"
    stored = yaml.safe_load(path.read_text())
    del stored["beta2"], stored["new_data_order"]
    path.write_text(yaml.safe_dump({**stored, "warp_speed": 9}))
    status, _, err = train(init_from="resume", max_iters=4)
    assert (
        status == 0
        and "run/config.yaml has settings of another version, which are ignored: warp_speed" in err
    )
    path.write_text(yaml.safe_dump({**stored, "head": "hyperbolic"}))
    status, _, err = train(init_from="resume", max_iters=6)
    assert status == 2 and "config.yaml: head=hyperbolic: unknown head" in err


@pytest.mark.parametrize(
    "settings",
    [
        {"link": "softmax"},
        {"link": "softmax", "learn_scale": True},
        {"head": "mahalanobis", "learn_exponent": True},
    ],
)
def test_a_run_starts_from_another_with_any_strength(train, tmp_path, settings):
    """Given, learnt or left to its default; with and without naming the head again."""
    settings = {"head": "cosine", **settings}
    assert train(**settings, out_dir="first")[0] == 0
    expected = read_metrics(tmp_path / "first")[-1]["val_loss"]
    for again in ({}, settings):
        status, out, err = train(init_from="first", eval_only=True, **again)
        assert status == 0 and f"val_loss {expected:.4f}" in out, err


SLOW = [
    (dict(dtype="bfloat16"), {}, {}, "no bfloat16 instructions"),
    (dict(dtype="float16"), {}, {}, "float16 is slower than float32 on a CPU"),
    ({}, {}, dict(compile=True), "compiling takes"),
    (dict(flops=1e14), {}, {}, "configs/demo.yaml is a model for CPUs"),
    ({}, dict(head="euclidean", head_impl="dense"), {}, "head_impl=dense is slower"),
    ({}, dict(head="manhattan", head_impl="chunked"), {}, "head_impl=chunked is slower"),
    ({}, dict(head="canberra", head_skip=0.0), {}, "head_skip=0 computes"),
    (dict(device="xpu"), dict(head="canberra"), {}, "canberra has no compiled kernel here"),
    (
        {},
        dict(head="cosine", head_precision="split"),
        {},
        "without CUDA, head_precision=split is emulated",
    ),
    (
        dict(device="cuda"),
        dict(head="cosine", head_precision="float32"),
        {},
        "with head_precision=float32 the head does not use tensor cores",
    ),
]


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(head="cosine"), "multiplies in float32"),
        (dict(head="cosine", head_precision="split"), "(split): nearly as exact as float32"),
        (
            dict(head="euclidean", head_precision="autocast"),
            "bfloat16: at n = 768 the loss of a token is off by up to 0.1 nats",
        ),
        (
            dict(head="cosine", link="softmax", head_precision="autocast"),
            "bfloat16: distances have relative errors of up to 4e-04",
        ),
        (dict(head="cross_entropy", head_precision="autocast"), "multiplies in bfloat16"),
        (dict(head="manhattan"), None),
    ],
)
def test_a_run_says_how_its_head_multiplies(settings, words):
    config = ModelConfig(n_embd=192, **settings)
    head = HarmonicHead(192, 5, config.head, **config.head_arguments())
    with torch.autocast("cpu", torch.bfloat16):
        found = advice.about_products(head)
    assert found is None if words is None else words in found


def test_idle_cores_are_those_of_the_process(monkeypatch):
    used = [100.0, 30.0, 0.0, 50.0]
    monkeypatch.setattr(psutil, "cpu_percent", lambda seconds, percpu: used)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {1, 2}, raising=False)
    assert machine.idle_cores() == pytest.approx(1.7)


@pytest.mark.parametrize(("call", "model", "config", "words"), SLOW)
def test_slow_settings_are_named(monkeypatch, call, model, config, words):
    """On a CPU without bfloat16; the defaults are silent, and so is a long compiled run."""
    monkeypatch.setattr(
        torch.cpu, "get_capabilities", lambda: {"architecture": "x86_64", "avx2": True}
    )
    monkeypatch.setattr(advice, "cores", lambda: torch.get_num_threads())
    monkeypatch.setattr(advice, "idle_cores", lambda: 8)
    usual = dict(device="cpu", dtype="float32", flops=1e10, iterations=1)
    assert advice.slow_settings(ModelConfig(), TrainConfig(compile=False), **usual) == []
    assert (
        advice.slow_settings(ModelConfig(), TrainConfig(), **{**usual, "iterations": 10**6}) == []
    )
    no_matter = ModelConfig(head="cross_entropy", head_impl="dense", head_skip=0.0)
    assert advice.slow_settings(no_matter, TrainConfig(compile=False), **usual) == []
    (found,) = advice.slow_settings(
        ModelConfig(**model), TrainConfig(**{"compile": False, **config}), **{**usual, **call}
    )
    assert words in found
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(advice, "cores", lambda: 8)

    def notes():
        return advice.slow_settings(ModelConfig(), TrainConfig(compile=False), **usual)

    assert "1 thread of 8 cores" in notes()[0]
    monkeypatch.setattr(advice, "idle_cores", lambda: 1.2)
    assert notes() == []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert "other programs use" in notes()[0] and "OMP_NUM_THREADS=1" in notes()[0]


SENSELESS = [
    (
        dict(max_iters=60, warmup_iters=50),
        "warmup_iters=50 is half or more of max_iters=60: use about 6",
    ),
    (dict(max_iters=40, warmup_iters=50), "warmup_iters=50 is all of max_iters=40"),
    (dict(lr_decay_iters=5000), "lr_decay_iters=5000 is far beyond max_iters=1000"),
    (dict(eval_interval=2000), "eval_interval=2000 is beyond max_iters=1000"),
    (dict(log_interval=2000), "log_interval=2000 is beyond max_iters=1000"),
    (dict(min_lr=1.0), "min_lr=1 is above learning_rate=0.0006"),
    (dict(eval_iters=10**6), "more windows than val has"),
]


@pytest.mark.parametrize(("config", "words"), SENSELESS)
def test_senseless_settings_are_named(tiny_data, config, words):
    data, model = load_data(tiny_data), ModelConfig(block_size=16)
    usual = {"max_iters": 1000, "lr_decay_iters": None, "eval_iters": 1, "batch_size": 4}
    assert advice.senseless_settings(model, TrainConfig(**usual), data) == []
    given = {**usual, **config}
    found = [
        note
        for note in advice.senseless_settings(model, TrainConfig(**given), data)
        if not note.startswith("eval_interval=200 ")
    ]
    assert len(found) == 1 and words in found[0]
    assert (
        "so its loss is mostly noise"
        in advice.senseless_settings(ModelConfig(block_size=512), TrainConfig(**usual), data)[0]
    )


def test_a_text_that_is_read_often_and_a_rate_that_rises_are_named(train, tiny_data):
    tokens = load_data(tiny_data).splits["train"].tokens
    iterations = 9 * tokens // (TINY["batch_size"] * TINY["block_size"])
    words = "reads the training text 9 times"
    for times, named in ((1, True), (2, False)):
        config = TrainConfig(batch_size=TINY["batch_size"], max_iters=iterations // times)
        model = ModelConfig(block_size=TINY["block_size"])
        notes = advice.senseless_settings(model, config, load_data(tiny_data))
        assert any(words in note for note in notes) == named
    train(head="cosine", max_iters=4, warmup_iters=1)
    rises = "because its decay now ends at iteration"
    assert rises not in train(init_from="resume", max_iters=4, learning_rate=None)[2]
    assert f"{rises} 40" in train(init_from="resume", max_iters=40, eval_interval=40)[2]
    # At the end of a short warm-up the rate rises by itself.
    train(head="cosine", max_iters=2, warmup_iters=2, out_dir="early", lr_decay_iters=90)
    resume = dict(init_from="resume", out_dir="early", max_iters=3, lr_decay_iters=90)
    assert "the learning rate rises" not in train(**resume, warmup_iters=2)[2]
    faster = train(**resume | {"max_iters": 4}, warmup_iters=2, learning_rate=0.9)[2]
    assert "the learning rate rises from" in faster


def test_a_small_start_of_cross_entropy_is_named():
    def notes(optimizer="adamw", **settings):
        model = ModelConfig(**{"head": "cross_entropy", "n_embd": 192, **settings})
        return advice.small_start(model, TrainConfig(optimizer=optimizer))

    assert "head_init_std=0.02 may be small" in notes()[0]
    others = (dict(head="cosine"), dict(n_embd=768), dict(head_init_std=0.05), dict(arch="bert"))
    assert not any([*(notes(**other) for other in others), notes(optimizer="muon")])


def test_a_damaged_checkpoint_is_refused(train, tmp_path):
    train(head="cosine")
    (folder,) = checkpoint.manifests(tmp_path / "run")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    status, _, err = train(init_from="resume", max_iters=4)
    assert (
        status == 2
        and "model.safetensors does not match its sha256" in err
        and "no checkpoint can be used" in err
    )
    (folder / "manifest.json").write_text("{")
    for init_from in ("resume", "auto"):  # auto does not take a damaged run for none
        status, _, err = train(init_from=init_from, max_iters=4)
        assert status == 2 and "manifest.json" in err and weights.exists()


def test_a_pickle_in_a_checkpoint_is_not_executed(train, tmp_path):
    train(head="cosine")
    (folder,) = checkpoint.manifests(tmp_path / "run")

    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "executed"),))

    stored = (folder / "manifest.json").read_text()
    for file in (checkpoint.WEIGHTS, checkpoint.STATE):
        sound = (folder / file).read_bytes()
        (folder / file).write_bytes(pickle.dumps(Trap()))
        manifest = unseal(stored)
        manifest["sha256"][file] = sha256(folder / file)  # by someone who knows the format
        (folder / "manifest.json").write_text(seal(manifest))
        status, _, err = train(init_from="resume", max_iters=4)
        assert (
            status == 2
            and f"{file} is not a safetensors file" in err
            and not (tmp_path / "executed").exists()
        )
        (folder / file).write_bytes(sound)


def test_no_compiler(tiny_data, tmp_path):
    flags = [
        f"--{k}={v}"
        for k, v in {
            **TINY,
            "dataset": tiny_data,
            "compile": True,
            "out_dir": tmp_path / "run",
        }.items()
    ]
    empty = tmp_path / "bin"
    empty.mkdir()
    done = script("train.py", *flags, env={"PATH": str(empty)})
    assert (
        done.returncode == 2
        and "needs a C++ compiler" in done.stderr
        and "--compile=false" in done.stderr
    )
    assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()


def test_a_damaged_data_folder(train, tiny_data, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(tiny_data, folder)
    (folder / "train.bin").write_bytes(b"\0\0")
    status, _, err = train(dataset=str(folder))
    assert status == 2 and "truncated" in err and not (tmp_path / "run").exists()


def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_used(train, tmp_path):
    """... and the run ends as if nothing had happened."""
    common = dict(head="cosine", eval_interval=2, lr_decay_iters=6)
    for out in ("whole", "run"):
        assert train(max_iters=6, out_dir=out, **common)[0] == 0
    folder = tmp_path / "run/ckpt/iter_000006"
    damage = {
        checkpoint.STATE: lambda path: path.unlink(),
        checkpoint.WEIGHTS: lambda path: path.write_bytes(path.read_bytes()[:-8] + b"\1" * 8),
        checkpoint.MANIFEST: lambda path: path.write_text(
            path.read_text().replace('"iter": 6', '"iter": 7')
        ),
    }
    for file, spoil in damage.items():
        spoil(folder / file)
        status, _, err = train(
            init_from="resume", max_iters=6, **{k: v for k, v in common.items() if k != "head"}
        )
        assert (
            status == 0
            and f"checkpoint run/ckpt/iter_000006 is corrupt, {file}" in err
            and "using iter_000004" in err
        )
        assert history(tmp_path / "run") == history(tmp_path / "whole")
        # So that nothing takes it for a good one.
        assert folder.with_name("damaged_iter_000006").is_dir()
        assert sha256(folder / checkpoint.WEIGHTS) == sha256(
            tmp_path / "whole/ckpt/iter_000006" / checkpoint.WEIGHTS
        )


def test_resuming_on_other_data_is_refused(train, tiny_data, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(tiny_data, data)
    assert train(dataset=str(data))[0] == 0
    ids = np.fromfile(data / "train.bin", np.uint16)[::-1]
    ids.tofile(data / "train.bin")
    status, _, err = train(init_from="resume", max_iters=4, dataset=str(data))
    assert status == 2 and "train.bin is corrupt: it does not match its sha256" in err
    meta = unseal((data / "meta.json").read_text())
    meta["splits"]["train"]["sha256"] = sha256(data / "train.bin")
    (data / "meta.json").write_text(seal(meta))
    status, _, err = train(init_from="resume", max_iters=4, dataset=str(data))
    assert status == 2 and "is not the file it was trained on" in err
    # With other validation text the best loss starts anew.
    shutil.copyfile(tiny_data / "train.bin", data / "train.bin")
    ids = np.fromfile(data / "val.bin", np.uint16)[::-1]
    ids.tofile(data / "val.bin")
    meta["splits"]["train"]["sha256"] = sha256(data / "train.bin")
    meta["splits"]["val"]["sha256"] = sha256(data / "val.bin")
    (data / "meta.json").write_text(seal(meta))
    status, out, err = train(init_from="resume", max_iters=4, dataset=str(data))
    assert status == 0 and "another validation text" in err and "is of other windows" in err
    (last,) = (m["val_loss"] for m in read_metrics(tmp_path / "run")[-1:])
    assert f"best val loss {last:.4f}" in out
    # A tokenizer of the same name: its ids stand for other tokens.
    other = tmp_path / "other"
    (tmp_path / "other.txt").write_text((ROOT / "docs/training.md").read_text())
    done = script_here(
        "prepare_openwebtext.py", f"--source={tmp_path}/other.txt", "--tokenizer=bpe:300",
        f"--out_dir={other}", "--val_fraction=0.3",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for way in ("new_data_order", "eval_only"):
        flags = dict(init_from="resume", max_iters=4, dataset=str(other), **{way: True})
        status, out, err = train(**flags)
        assert status == 2 and "has another bpe:300 than run" in err, (out, err)


def start(tmp_path, tiny_data, processes=1, torchrun=(), saved=True, **flags):
    """A real training process in a process group of its own, once it has a checkpoint (or, not
    `saved`, metrics) -> Popen."""
    settings = {
        **TINY,
        "dataset": tiny_data,
        "max_iters": 100_000,
        "eval_interval": 20,
        "out_dir": tmp_path / "run",
        **flags,
    }
    process = subprocess.Popen(
        [
            sys.executable,
            *launcher(processes, *torchrun),
            "train.py",
            *(f"--{k}={v}" for k, v in settings.items()),
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not (
        checkpoint.manifests(tmp_path / "run")
        if saved
        else (tmp_path / "run/metrics.jsonl").exists()
    ):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    return process


@pytest.mark.parametrize(
    ("number", "processes"),
    [
        (signal.SIGTERM, 2),
        pytest.param(signal.SIGINT, 1, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 1, marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, 1, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, 1, marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, 2, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 2, marks=pytest.mark.slow),
    ],
)
def test_a_signal_stops_with_a_checkpoint(tmp_path, tiny_data, number, processes):
    """The iteration in hand is finished and stored, whichever process the signal reaches."""
    process = start(tmp_path, tiny_data, processes)
    if processes == 1 or number == signal.SIGTERM:
        process.send_signal(number)  # torchrun passes SIGTERM on to its processes
    else:
        workers(process)[1].send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number if processes == 1 else process.returncode != 0
    assert f"{number.name}: stopped at iteration" in err and "--init_from=resume" in err
    folder, manifest = list(checkpoint.manifests(tmp_path / "run").items())[-1]
    steps = [r["iter"] for r in read_metrics(tmp_path / "run") if "train_loss" in r]
    # Nothing is lost.
    assert (
        steps == list(range(manifest["iter"])) and f"stopped at iteration {manifest['iter']}" in err
    )
    assert checkpoint.damage(folder) is None and (manifest["val_loss"] is None) == (
        manifest["iter"] % 20 != 0
    )


def test_a_second_ctrl_c_stops_at_once(tmp_path, tiny_data):
    process = start(
        tmp_path,
        tiny_data,
        saved=False,
        n_layer=4,
        n_embd=256,
        batch_size=64,
        gradient_accumulation_steps=200,
    )
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    time.sleep(1.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)  # an iteration takes longer
    assert (
        process.returncode == 130
        and "Ctrl-C again stops at once" in err
        and "no checkpoint was written yet" in err
    )


@pytest.mark.parametrize("words", [["train.py"], ["-m", "analysis.gradients", "out/run"]])
def test_ctrl_c_before_training_leaves_no_traceback(capsys, words):
    """While PyTorch is imported, and in a script that does not handle it."""
    process = subprocess.Popen(
        [sys.executable, *words], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    assert "loading PyTorch" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1] == "" and process.returncode == -signal.SIGINT
    with pytest.raises(SystemExit) as stop:
        cli(lambda: signal.raise_signal(signal.SIGINT))
    assert stop.value.code == 130 and "interrupted" in capsys.readouterr().err


def test_a_damaged_cache_of_the_compiler_is_named(capsys, monkeypatch):
    """As a process leaves it that is killed while it compiles."""
    monkeypatch.delenv("RANK", raising=False)

    def main():
        raise RuntimeError("InductorError: ImportError: /cache/ab/main.so: file too short\n")

    with pytest.raises(SystemExit) as stop:
        distributed.run(main)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in err
    assert "/cache/ab/main.so, in the cache of torch.compile, is damaged" in err


def test_too_little_memory_is_one_message(capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)

    def on_a_gpu():
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has 79 GiB. Of the allocated"
            " memory 70 GiB is allocated by PyTorch"
        )

    for main, words in (
        (lambda: torch.empty(10**15), "memory: no room for a tensor of 3,725,290.3 GiB. Make --ba"),
        (on_a_gpu, "Tried to allocate 20.00 GiB. GPU 0 has 79 GiB. Make --batch_size smaller"),
    ):
        with pytest.raises(SystemExit) as stop:
            distributed.run(main)
        assert stop.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("GRID A100-10C", None),
        ("NVIDIA A40-8Q", None),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("Tesla V100-PCIE-16GB", 112e12),
        ("Tesla V100S-PCIE-32GB", None),
    ],
)
def test_the_peak_of_a_gpu_is_its_own(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert telemetry.peak_flops("cuda:0") == peak


def test_a_gpu_that_pytorch_cannot_use_is_named(monkeypatch, tmp_path):
    """With an old driver. No error if the GPU is hidden, or if this PyTorch is for CPUs."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(distributed, "DEVICE_FILE", tmp_path)

    def init():
        raise RuntimeError("The NVIDIA driver on your system is too old. Please update it.")

    monkeypatch.setattr(torch.cuda, "init", init)
    for device in ("auto", "cuda"):
        with pytest.raises(UserError, match=r"GPU \(The NVIDIA .* is too old\).* --device=cpu"):
            distributed.check_device(device)
    assert distributed.check_device("cpu") == "cpu"
    for hidden in ("", "-1", "NoDevFiles"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert distributed.check_device("auto") in ("cpu", "mps")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert distributed.check_device("auto") in ("cpu", "mps")


def test_windows_that_do_not_divide_among_processes_are_named():
    assert advice.uneven_shares(480, 8) is None
    assert "divide evenly among 8 processes" in advice.uneven_shares(60, 8)
    assert "64 windows would take as long" in advice.uneven_shares(60, 8)


def test_an_overwrite_that_fails_leaves_the_old_run(train, tmp_path, monkeypatch):
    """Whatever fails after the old files were set aside, they come back."""
    train(head="cosine")
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}

    def fail(*_):
        raise UserError("wandb does not start")

    rename, count = Path.rename, itertools.count()

    def fail_at_the_second(path, to):
        return fail() if next(count) == 1 else rename(path, to)

    for part, broken in (
        ("training.folder.Metrics", fail),
        ("training.folder.write_yaml", fail),
        ("pathlib.Path.rename", fail_at_the_second),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(part, broken)
            status, _, err = train(head="manhattan", overwrite=True)
        assert status == 2 and "wandb does not start" in err
        assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    # A start that was killed in the middle.
    (tmp_path / "run/.replaced").mkdir()
    (tmp_path / "run/ckpt").rename(tmp_path / "run/.replaced/ckpt")
    assert "run/.replaced: move them back" in train(init_from="resume")[2]
    with monkeypatch.context() as patch:
        patch.setattr("training.folder.Metrics", fail)
        train(head="manhattan", overwrite=True)
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    status, _, err = train(head="manhattan", overwrite=True)
    assert status == 0 and not list((tmp_path / "run").glob(".[rd]e*")), err


def test_a_run_that_ended_while_this_start_waited_is_not_replaced(train, tmp_path, monkeypatch):
    train(out_dir="other")

    def another_start_ends(*_):
        shutil.copytree(tmp_path / "other", tmp_path / "run")

    monkeypatch.setattr("train.compile_kernels", another_start_ends)
    status, _, err = train()
    assert status == 2 and "run already holds a run" in err
    assert checkpoint.manifests(tmp_path / "run") and not (tmp_path / "run/.lock").exists()


def test_processes_with_different_settings_or_data_do_not_train(train, tmp_path, monkeypatch):
    """As on two machines with different commands."""

    def two(processes, value):
        resume, settings, torchrun = value
        other = {**settings, "learning_rate": 7.0, "the data's val": "x", "of_a_newer_version": 1}
        return [value, (resume, other, torchrun)]

    monkeypatch.setattr("training.distributed.Processes.gather", two)
    status, _, err = train()
    assert status == 2 and "learning_rate (" in err and "and 7.0)" in err
    assert "the data's val (" in err and "of_a_newer_version (None and 1)" in err
    assert "n_layer" not in err and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_processes_stop_with_a_checkpoint_when_their_torchrun_is_killed(tmp_path, tiny_data):
    process = start(tmp_path, tiny_data, 2)
    ranks = list(workers(process).values())
    process.kill()
    assert not psutil.wait_procs(ranks, timeout=60)[1]
    last = checkpoint.newest(tmp_path / "run")
    rows = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert checkpoint.iteration(last) >= rows[-1]["iter"]


def test_what_counts_as_a_restart(tmp_path, monkeypatch):
    """Only a run that the same torchrun has begun: not one that it was refused, nor one that it was
    to replace."""
    from training.distributed import torchrun_process
    from training.start import begun_by_this_torchrun

    path = tmp_path / "environment.json"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "abc")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert not begun_by_this_torchrun(tmp_path)
    for stored, expected in (("abc", True), ("another", False), (None, False)):
        path.write_text(json.dumps({"torchrun": stored}))
        assert begun_by_this_torchrun(tmp_path) == expected
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # torchrun without --rdzv_id
    path.write_text(json.dumps({"torchrun": "none", "torchruns": ["elsewhere 7"]}))
    assert not begun_by_this_torchrun(tmp_path)
    mine = {"torchrun": "none", "torchruns": ["elsewhere 7", torchrun_process()]}
    path.write_text(json.dumps(mine))
    assert begun_by_this_torchrun(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert not begun_by_this_torchrun(tmp_path)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    path.write_text(json.dumps({"torchrun": None}))
    assert not begun_by_this_torchrun(tmp_path)


def test_a_run_that_torchrun_goes_on_with_is_named(train, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "abc")
    assert train(head="cosine")[0] == 0
    _, out, err = train(head="cosine", overwrite=True)
    assert "a torchrun with the id abc began the run in run, so it goes on" in err
    assert "run is already trained" in out


def test_retention_leaves_what_is_not_its_own(train, tmp_path):
    train(head="cosine")
    shutil.copytree(tmp_path / "run/ckpt/iter_000002", tmp_path / "run/ckpt/iter_000002_keep")
    status, _, err = train(init_from="resume", max_iters=8, eval_interval=2)
    assert status == 0, err
    assert "iter_000002_keep" in {p.name for p in (tmp_path / "run/ckpt").iterdir()}


@pytest.mark.slow
def test_torchrun_starts_a_failed_process_again_and_the_run_goes_on(tmp_path, tiny_data):
    flags = dict(max_iters=400, head="cosine", dropout=0.1)
    process = start(tmp_path, tiny_data, 2, ["--max-restarts=2"], **flags)
    workers(process)[1].kill()
    began = time.monotonic()
    while (tmp_path / "run/environment.json").stat().st_mtime < time.time() - (
        time.monotonic() - began
    ):
        assert process.poll() is None and time.monotonic() - began < 60
        time.sleep(0.1)
    assert process.wait(timeout=200) == 0
    whole = start(tmp_path / "whole", tiny_data, 2, **flags)
    assert whole.wait(timeout=100) == 0
    assert history(tmp_path / "run") == history(tmp_path / "whole" / "run")


SHARED = {
    **TINY,
    "eval_interval": 10,
    "head": "mahalanobis",
    "learn_exponent": True,
    "lr_decay_iters": 20,
    "n_layer": 2,
}
# 2 windows of validation, 6 of training.
SHARED |= {"eval_iters": 1, "batch_size": 2, "gradient_accumulation_steps": 3}


def run_shared(data, out, processes=1, **more):
    words = [f"--{k}={v}" for k, v in {**SHARED, "dataset": data, "out_dir": out, **more}.items()]
    run = script if processes > 1 else script_here
    done = run(*launcher(processes), "train.py", *words)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def one_process(tiny_data, tmp_path_factory):
    """-> the folders of a run of one process, and of another that stopped at 5 of its 20
    iterations."""
    folder = tmp_path_factory.mktemp("one")
    run_shared(tiny_data, folder / "whole", max_iters=20)
    run_shared(tiny_data, folder / "begun", max_iters=5, eval_interval=5)
    return folder / "whole", folder / "begun"


@pytest.mark.parametrize(
    "flags",
    [
        {"parallel": "fsdp"},
        pytest.param(
            {"parallel": "fsdp", "activation_checkpointing": True, "compile": True},
            marks=pytest.mark.slow,
        ),
        pytest.param({"parallel": "ddp", "activation_checkpointing": True}, marks=pytest.mark.slow),
    ],
)
def test_every_way_to_share_a_model_equals_one_process(tiny_data, tmp_path, one_process, flags):
    """... and what it stores serves any number of processes: one goes on from the checkpoint of
    two."""
    whole, begun = one_process
    shutil.copytree(begun, tmp_path / "run")
    run_shared(tiny_data, tmp_path / "run", 2, max_iters=10, init_from="resume", **flags)
    run_shared(tiny_data, tmp_path / "run", max_iters=20, init_from="resume", parallel="ddp")
    shared = [r for r in history(tmp_path / "run") if r["iter"] != 5 or "val_loss" not in r]
    for a, b in zip(history(whole), shared, strict=True):
        for key in a:
            assert a[key] == pytest.approx(b[key], abs=1e-4, rel=1e-4), (a["iter"], key)


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "head"), [("gpt", "manhattan"), ("bert", "cross_entropy")])
def test_a_sharded_head_equals_one_process(tiny_data, tmp_path, arch, head):
    """One whose table compiled kernels read, and one with a bias: FSDP2 frees what it shards."""
    settings = dict(
        arch=arch,
        head=head,
        learn_exponent=False,
        max_iters=10,
        eval_iters=3,
        batch_size=1,
        gradient_accumulation_steps=4,
    )
    run_shared(tiny_data, tmp_path / "one", **settings)
    run_shared(tiny_data, tmp_path / "two", 2, parallel="fsdp", **settings)
    for a, b in zip(history(tmp_path / "one"), history(tmp_path / "two"), strict=True):
        for key in a:
            # The gradient of |h - w| jumps where h and w cross, so rounding may change its norm.
            rel = 5e-3 if head == "manhattan" and "grad_norm" in key else 1e-4
            assert a[key] == pytest.approx(b[key], abs=1e-4, rel=rel), (a["iter"], key)


@pytest.mark.slow
def test_verify_resume(tiny_data, tmp_path):
    flags = [
        f"--{k}={v}"
        for k, v in {
            **TINY,
            "dataset": tiny_data,
            "head": "hamming_gumbel",
            "dropout": 0.1,
            "batch_size": 16,
        }.items()
    ]
    done = script("train.py", *flags, "--verify_resume", f"--out_dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout.count("bitwise equal") == 3
        and "killed after iteration" in done.stdout
        and not (tmp_path / "run").exists()
    )


@pytest.mark.slow
def test_verify_resume_leaves_no_training_behind(tiny_data, tmp_path):
    flags = [f"--{k}={v}" for k, v in {**TINY, "dataset": tiny_data}.items()]
    flags += ["--verify_resume", f"--out_dir={tmp_path / 'run'}", "--head=cosine"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    process = subprocess.Popen([sys.executable, "train.py", *flags], cwd=ROOT, env=environment)
    while not list(tmp_path.rglob("metrics.jsonl")):
        assert process.poll() is None
        time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    assert children
    process.terminate()
    assert process.wait(timeout=20) == 128 + signal.SIGTERM
    assert not any(c.is_running() and c.status() != psutil.STATUS_ZOMBIE for c in children)
    assert not list(tmp_path.glob("tmp*"))  # The folder of its runs.


@pytest.mark.slow
def test_verify_resume_notices_a_difference(tmp_path, monkeypatch, capsys):
    """A run whose state is not all in its checkpoint: momentum that is lost, say."""
    from training import verify

    script = tmp_path / "forgetful.py"
    script.write_text(FORGETFUL)
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(sys, "argv", [str(script)])
    with pytest.raises(SystemExit) as stop:
        verify.verify_resume([], TrainConfig(lr_decay_iters=100), new=True)
    out = capsys.readouterr().out
    assert (
        stop.value.code == 1
        and "DIFFERENT" in out
        and "first difference: iteration 10, train_loss 21 and 11" in out
        and "resumed from iteration 10" in out
    )


FORGETFUL = """
import json, sys, time
from pathlib import Path
import torch
from training import checkpoint
flags = dict(w[2:].split("=", 1) for w in sys.argv[1:])
out = Path(flags["out_dir"])
out.mkdir(exist_ok=True)
path = out / "metrics.jsonl"
first = max((m["iter"] for m in checkpoint.manifests(out).values()), default=0)
lines = path.read_text().splitlines()[:first] if path.exists() else []
momentum = 0
for i in range(first, int(flags["max_iters"])):
    momentum += 1
    lines.append(json.dumps({"iter": i, "train_loss": momentum + i}))
    path.write_text("".join(line + chr(10) for line in lines))
    if i % 10 == 9:
        tensors = {"a": torch.tensor(float(i))}
        checkpoint.save(out, i + 1, {checkpoint.WEIGHTS: tensors, checkpoint.STATE: tensors}, {"val_loss": 1.0})
    time.sleep(0.1)
"""  # noqa: E501


@pytest.fixture
def overflow(monkeypatch):
    """An overflow in one layer at iteration 3. Clear the list to have it in another run."""
    forward, calls = Model.forward, []

    def spoilt(self, *arguments, **keywords):
        logits, loss, *distance = forward(self, *arguments, **keywords)
        if self.training:
            calls.append(1)
            if len(calls) == 4:
                loss = loss + (self.blocks[0].mlp.up.weight * math.inf).sum()
        return logits, loss, *distance

    monkeypatch.setattr(Model, "forward", spoilt)
    return calls


def test_a_step_that_is_not_finite_names_the_tensors_or_is_skipped(train, tmp_path, overflow):
    status, _, err = train(head="cosine", max_iters=6, eval_interval=2)
    assert (
        status == 3
        and "stopped: loss" in err
        and "on rank 0 at iteration 3" in err
        and "last good checkpoint: iter_000002" in err
    )
    assert "gradients that are not finite: blocks.0.mlp.up.weight\n" in err
    overflow.clear()
    status, _, err = train(
        head="cosine", max_iters=6, eval_interval=2, on_nan="skip", out_dir="skip"
    )
    assert status == 0, err
    records = [r for r in read_metrics(tmp_path / "skip") if "train_loss" in r]
    assert [r["skipped"] for r in records] == [0, 0, 0, 1, 1, 1] and not math.isfinite(
        records[3]["train_loss"]
    )
    assert all(math.isfinite(r["train_loss"]) for i, r in enumerate(records) if i != 3)
    # NaN is no difference between two runs.
    assert history(tmp_path / "skip") == history(tmp_path / "skip")
    (*_, manifest) = checkpoint.manifests(tmp_path / "skip").values()
    assert manifest["skipped"] == 1


def test_float16_skips_a_step_and_lowers_the_scale(train, tmp_path, overflow):
    """The scaler halves its scale and the optimiser takes no step. A resumed run has both."""
    flags = dict(head="cross_entropy", dtype="float16", on_nan="skip")
    for start, end in (("scratch", 6), ("resume", 8)):
        status, out, err = train(max_iters=end, init_from=start, **flags)
        assert status == 0, err
        assert "  1 skipped" in out
        folder, manifest = list(checkpoint.manifests(tmp_path / "run").items())[-1]
        assert (manifest["iter"], manifest["skipped"]) == (end, 1)
        assert manifest["scaler"]["scale"] == 2.0**15  # It began at 2^16.
        state = load_file(folder / checkpoint.STATE)
        assert {v.item() for k, v in state.items() if k.startswith("step/")} == {end - 1}
    records = [r for r in read_metrics(tmp_path / "run") if "train_loss" in r]
    assert [r["skipped"] for r in records] == [0, 0, 0, 1, 1, 1, 1, 1]
    finite = [math.isfinite(r["grad_norm"]) for r in records]
    assert finite == [True] * 3 + [False] + [True] * 4


def test_float16_goes_on_when_its_scale_is_too_large(train, tmp_path):
    """The first scale is too large for cosine's gradients, which is no reason to stop."""
    status, _, err = train(head="cosine", dtype="float16", max_iters=8)
    assert status == 0, err
    norms = [r["grad_norm"] for r in read_metrics(tmp_path / "run") if "grad_norm" in r]
    assert not math.isfinite(norms[0]) and math.isfinite(norms[-1])


@pytest.mark.parametrize("on_nan", ["skip", "stop"])
def test_float16_skips_a_norm_that_overflows(train, tmp_path, monkeypatch, on_nan):
    """Gradients of 1e20 are finite, their squares are not: AdamW would keep an infinite average."""
    measure = Gradients.measure

    def large(self, step):
        if step.lr == TINY["learning_rate"]:  # Not in the first iteration, which warms up.
            self.model.blocks[0].mlp.up.weight.grad[0, 0] = 1e20
        measure(self, step)

    monkeypatch.setattr(Gradients, "measure", large)
    status, _, err = train(
        head="cross_entropy", dtype="float16", on_nan=on_nan, lr_schedule="constant"
    )
    assert status == 0, err
    folder, manifest = list(checkpoint.manifests(tmp_path / "run").items())[-1]
    assert manifest["skipped"] == 1
    state = load_file(folder / checkpoint.STATE)
    assert all(v.isfinite().all() for v in state.values())


@pytest.mark.parametrize("when", ["before", "during", "after"])
def test_a_signal_around_the_first_evaluation(train, tmp_path, monkeypatch, when):
    """Before it: there is nothing to store, and the run starts again. During it: the run stops
    after one iteration. After it: in every iteration, the last included. All end
    with the losses of a run that nobody stopped."""
    flags = dict(head="cosine", dropout=0.1, max_iters=4, eval_interval=3)
    assert train(**flags, out_dir="whole")[0] == 0

    def killing(function):
        def call(*arguments):
            result = function(*arguments)
            signal.raise_signal(signal.SIGTERM)
            return result

        return call

    with monkeypatch.context() as context:
        if when == "after":
            context.setattr(train_script, "iterate", killing(train_script.iterate))
        elif when == "before":
            context.setattr(StopSignals, "__init__", killing(StopSignals.__init__))
        else:
            context.setattr(Evaluation, "__call__", killing(Evaluation.__call__))
        status, _, err = train(**flags)
    assert status == 128 + signal.SIGTERM
    names = [f.name for f in checkpoint.folders(tmp_path / "run")]
    if when == "before":
        assert "SIGTERM: stopped at iteration 0; no checkpoint was written yet" in err
        assert names == [] and (tmp_path / "run/metrics.jsonl").read_text() == ""
        status, _, err = train(**flags, init_from="resume")
        assert status == 2 and "run holds no checkpoint" in err
        status, out, err = train(**flags, init_from="auto")
        assert "run holds no checkpoint yet: starting again" in out
    elif when == "after":
        for last in (2, 3, 4):
            assert f"SIGTERM: stopped at iteration {last - 1}; resume" in err
            with monkeypatch.context() as context:
                context.setattr(train_script, "iterate", killing(train_script.iterate))
                status, _, err = train(**flags, init_from="resume")
        status, out, err = train(**flags, init_from="resume")
        assert "iter 4: val loss" in out
        assert "already trained to iteration 4" in train(**flags, init_from="resume")[1]
    else:
        assert "SIGTERM: stopped at iteration 1; resume from iter_000001" in err
        assert names == ["iter_000001"]
        status, _, err = train(**flags, init_from="resume")
    assert status == 0, err
    assert history(tmp_path / "run") == history(tmp_path / "whole")


def test_a_signal_while_the_last_checkpoint_is_written(train, tmp_path, monkeypatch):
    save, handlers = checkpoint.save, []

    def slow(out_dir, iteration, *rest):
        time.sleep(0.3)  # The loop has ended meanwhile.
        handlers.append(signal.getsignal(signal.SIGTERM))
        if handlers[-1] != signal.SIG_DFL:  # That would kill the tests.
            os.kill(os.getpid(), signal.SIGTERM)
        return save(out_dir, iteration, *rest)

    monkeypatch.setattr(checkpoint, "save", slow)
    status, out, err = train(head="cosine", max_iters=4, eval_interval=4)
    assert status == 0 and "done: run" in out, err
    assert signal.SIG_DFL not in handlers and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert checkpoint.last(tmp_path / "run") == "iter_000004"


def test_which_signals_stop_and_how():
    hangup = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # As nohup does.
    signals = StopSignals(distributed.Processes(0, 0, 1, "cpu"), timeout=1)
    try:
        signal.raise_signal(signal.SIGHUP)
        assert signals.agreed() == 0
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGUSR1)
        assert signals.agreed() == signal.SIGTERM
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        signals.restore()
        signal.signal(signal.SIGHUP, hangup)


def test_skipping_ends_when_nothing_else_happens(train):
    flags = dict(head="euclidean", learning_rate=1e30, grad_clip=0, warmup_iters=0, on_nan="skip")
    flags |= dict(eval_interval=30)
    assert train(max_iters=60, **flags)[0] == 3  # Its last validation loss is NaN.
    flags |= dict(init_from="resume", sample_interval=70)
    status, out, err = train(max_iters=300, **flags)
    assert status == 3 and "100 iterations in a row skipped at iteration 10" in err
    assert "last good checkpoint: none" in err and "no sample: logits are not finite" in out


def test_a_full_disk_stops_neither_training_nor_spoils_a_checkpoint(train, tmp_path, monkeypatch):
    """The checkpoint of iteration 4 cannot be written, the last one can; were it the last, the exit
    status would say so."""
    real = checkpoint.save_file

    def full(tensors, path):
        real(tensors, path)
        if "iter_000004" in str(path) or "iter_000006" in str(path) and "last" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "save_file", full)
    status, _, err = train(head="cosine", max_iters=6, eval_interval=2)
    assert (
        status == 0
        and "iteration 4 could not be written (No space left on device);"
        " the last good one: iter_000002"
        in err
    )
    assert [f.name for f in checkpoint.folders(tmp_path / "run")] == ["iter_000002", "iter_000006"]
    status, _, err = train(head="cosine", max_iters=6, eval_interval=2, out_dir="last")
    assert status == 4 and "iteration 6 could not be written" in err
    assert [p.name for p in (tmp_path / "last/ckpt").iterdir()] == ["iter_000002"]


def test_metrics_wait_for_room(tmp_path, capsys):
    def full(*_, error=errno.ENOSPC):
        raise OSError(error, os.strerror(error))

    say("lost", file=SimpleNamespace(write=full))  # It raises nothing.
    say("lost", file=SimpleNamespace(write=partial(full, error=errno.EPIPE)))
    metrics = Metrics(tmp_path, 0)
    metrics.board = SimpleNamespace(add_scalar=full)
    metrics.write({"iter": 0, "loss": 1.0})
    assert "TensorBoard's file cannot be written (No space" in capsys.readouterr().err
    file, metrics.file = metrics.file, Torn(metrics.file)
    metrics.write({"iter": 1})
    metrics.write({"iter": 2})
    metrics.file = file
    metrics.write({"iter": 3})
    assert [r["iter"] for r in read_metrics(tmp_path)] == [0, 1, 2, 3]
    assert capsys.readouterr().err.count("its lines wait in memory") == 1


class Torn:
    """A file on a disk with room for three more bytes."""

    def __init__(self, file):
        self.fileno, self.truncate, self._write = file.fileno, file.truncate, file.write

    def write(self, data):
        return self._write(data[:3])


def test_a_checkpoint_is_a_copy(tmp_path):
    """What is written in the background does not follow the training that goes on."""
    model = Model(ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=16, vocab_size=64))
    optimizer = make_optimizer(model, TrainConfig(learning_rate=0.1), "cpu")
    x = torch.randint(0, 64, (2, 16))
    for _ in range(2):
        model(x, x)[1].backward()
        optimizer.step()
        files = checkpoint.snapshot(model, optimizer)
    before = {name: {k: v.clone() for k, v in tensors.items()} for name, tensors in files.items()}
    optimizer.step()
    assert all(torch.equal(before[f][k], files[f][k]) for f in files for k in files[f])
    assert not torch.equal(files[checkpoint.WEIGHTS]["head.weight"], model.head.weight)
    assert set(files[checkpoint.STATE]) == {
        f"{s}/{n}" for n, _ in model.named_parameters() for s in ("step", "exp_avg", "exp_avg_sq")
    }


@pytest.mark.parametrize("arch", ["gpt", "bert", "qwen"])
def test_doc_mask_trains(train, arch):
    status, _, err = train(arch=arch, doc_mask=True, head="cosine")
    assert status == 0, err


def test_norms_are_exact():
    tensors = [torch.randn(2003, 770), torch.randn(3), torch.zeros(0, 7)]
    expected = torch.stack([t.double().norm() for t in tensors])
    torch.testing.assert_close(norms(tensors).double(), expected, rtol=1e-6, atol=0)


@pytest.mark.slow
def test_more_processes_than_windows(tiny_data, tmp_path):
    settings = {**TINY, "dataset": tiny_data, "batch_size": 1, "out_dir": tmp_path / "run"}
    flags = [f"--{k}={v}" for k, v in settings.items()]
    done = script(*launcher(2), "train.py", *flags)
    assert (
        done.returncode != 0
        and "2 processes cannot share 1 windows" in done.stderr
        and not (tmp_path / "run").exists()
    )
