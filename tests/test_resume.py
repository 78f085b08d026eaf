"""Checkpoints: resuming, what a resumed run may change, corrupt checkpoints, --verify_resume."""

import contextlib
import itertools
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import yaml
from conftest import ROOT, TINY, script, script_here
from safetensors.torch import load_file

from base.errors import UserError
from base.files import locked, seal, sha256, unseal
from model import Model, ModelConfig
from training import checkpoint, environment, folder
from training.config import TrainConfig
from training.environment import kept_starts
from training.metrics import read_metrics
from training.optimizers import make_optimizer
from training.verify import history


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
            "head": "cross_entropy",
            "dropout": 0.1,
        }.items()
    ]
    # Not in the process of the tests: one that has compiled a kernel of Numba differs in last bits.
    whole = script("train.py", *flags, f"--out_dir={tmp_path / 'whole'}")
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
    changes = environment._together({"val_text": ["a", "b"], "seed": [1, 2]}, {"seed": [2, 3]})
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


def test_a_start_that_would_lose_or_ignore_a_model_is_refused(train, tmp_path):
    assert train(out_dir="first")[0] == 0
    status, _, err = train(init_from="first", out_dir="first", overwrite=True)
    assert status == 2 and "overwrite=true would delete first, from which the run starts" in err
    status, _, err = train(init_from="first", source="second", out_dir="third")
    assert status == 2 and "init_from=first and source=second name two models" in err
    assert checkpoint.folders(tmp_path / "first") and not (tmp_path / "third").exists()
    (tmp_path / "third").mkdir()
    (tmp_path / "third/ckpt.pt").touch()
    with pytest.raises(UserError, match="ckpt.pt is nanoGPT's. Import it with train.py --init_"):
        checkpoint.newest(tmp_path / "third")
    # Another project's folder stays, that of the run that is replaced does not.
    (tmp_path / "fourth/wandb").mkdir(parents=True)
    assert train(out_dir="fourth")[0] == 0 and (tmp_path / "fourth/wandb").exists()
    assert train(out_dir="fourth", overwrite=True)[0] == 0
    assert not (tmp_path / "fourth/wandb").exists()


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


def test_retention_leaves_what_is_not_its_own(train, tmp_path):
    train(head="cosine")
    shutil.copytree(tmp_path / "run/ckpt/iter_000002", tmp_path / "run/ckpt/iter_000002_keep")
    status, _, err = train(init_from="resume", max_iters=8, eval_interval=2)
    assert status == 0, err
    assert "iter_000002_keep" in {p.name for p in (tmp_path / "run/ckpt").iterdir()}


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
