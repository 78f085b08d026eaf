"""How a training stops: signals, losses that are not finite, full disks, too little memory."""

import errno
import math
import os
import signal
import subprocess
import sys
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY, script, start_training
from safetensors.torch import load_file

import train as train_script
from base.command_line import cli
from base.output import say
from harmonic import HEADS
from model import Model
from tests.faults.storm import workers
from training import checkpoint, distributed
from training.distributed import StopSignals
from training.evaluation import Evaluation
from training.metrics import Metrics, read_metrics
from training.step import Gradients
from training.verify import history


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
    process = start_training(tmp_path, tiny_data, processes)
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
    process = start_training(
        tmp_path,
        tiny_data,
        saved=False,
        n_layer=4,
        n_embd=256,
        batch_size=64,
        gradient_accumulation_steps=2000,
    )
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    time.sleep(1.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)  # an iteration takes longer
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


def test_skipping_ends_when_nothing_else_happens(train, tmp_path):
    flags = dict(head="euclidean", learning_rate=1e30, grad_clip=0, warmup_iters=0, on_nan="skip")
    flags |= dict(eval_interval=30)
    assert train(max_iters=60, **flags)[0] == 3  # Its last validation loss is NaN.
    flags |= dict(overwrite=True, sample_interval=70)
    status, out, err = train(max_iters=300, **flags)
    assert status == 3 and "100 iterations in a row skipped at iteration 10" in err
    assert not checkpoint.folders(tmp_path / "run")  # A resume could not go on from one.
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


class Torn:
    """A file on a disk with room for three more bytes."""

    def __init__(self, file):
        self.fileno, self.truncate, self._write = file.fileno, file.truncate, file.write

    def write(self, data):
        return self._write(data[:3])


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
