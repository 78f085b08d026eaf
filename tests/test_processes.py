"""Several processes: they train the same model as one, and start, stop and restart together."""

import json
import shutil
import time

import psutil
import pytest
from conftest import TINY, script, script_here, start_training

from tests.faults.storm import workers
from training import checkpoint
from training.distributed import launcher
from training.metrics import read_metrics
from training.verify import history


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
    process = start_training(tmp_path, tiny_data, 2)
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
    assert "a torchrun with the id abc began the run in run, so it is resumed" in err
    assert "run is already trained" in out


@pytest.mark.slow
def test_torchrun_starts_a_failed_process_again_and_the_run_goes_on(tmp_path, tiny_data):
    flags = dict(max_iters=400, head="cosine", dropout=0.1)
    process = start_training(tmp_path, tiny_data, 2, ["--max-restarts=2"], **flags)
    workers(process)[1].kill()
    began = time.monotonic()
    while (tmp_path / "run/environment.json").stat().st_mtime < time.time() - (
        time.monotonic() - began
    ):
        assert process.poll() is None and time.monotonic() - began < 60
        time.sleep(0.1)
    assert process.wait(timeout=200) == 0
    whole = start_training(tmp_path / "whole", tiny_data, 2, **flags)
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
