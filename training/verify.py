"""`--verify_resume` tests that a killed and resumed run equals an uninterrupted one bit for bit."""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import psutil
from tqdm import tqdm

from base.errors import UserError
from base.files import sha256
from training import checkpoint
from training.config import TrainConfig
from training.distributed import launcher
from training.metrics import read_metrics

INTERVAL = 10  # Iterations between checkpoints.
BEYOND = 3  # The process is killed so many iterations after a checkpoint.
LONG = 10_000  # Iterations of the run that is killed. It ends if nobody is left to kill it.
MEASURED = ("tokens_per_s", "elapsed_s", "mfu")  # These depend on the clock.


def history(run: Path) -> list[dict]:
    """The metrics of a run without times and speeds. NaN is a text, so that it equals itself."""
    return [
        {k: "nan" if v != v else v for k, v in r.items() if k not in MEASURED}
        for r in read_metrics(run)
    ]


def verify_resume(argv: list[str], c: TrainConfig, new: bool) -> None:
    """Compares a killed and resumed run with an uninterrupted one, and prints the result.

    The first run is killed (SIGKILL) after a checkpoint and resumed for INTERVAL iterations. The
    second trains as many iterations without a stop. All lines of metrics, and the bytes of weights
    and optimiser state, must be equal. Under torchrun both use the same number of processes.

    Args:
        argv: the command line of train.py, and c: its configuration.
        new: whether it starts a new run, rather than resuming one.
    Raises: SystemExit with status 1 if anything differs, UserError if a run fails or is not new.
    """
    if not new:
        raise UserError(
            "--verify_resume works with new runs, not with --init_from=resume. For the settings of"
            f" this run: python train.py {shlex.quote(c.out_dir)}/config.yaml --verify_resume"
        )
    processes, here = (int(os.environ.get(k, 1)) for k in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if processes != here:
        raise UserError(
            "verify_resume compares on one machine: start it with torchrun --standalone"
        )
    if int(os.environ.get("RANK", 0)) > 0:
        return  # The first process starts the others itself.
    fixed = dict(
        eval_interval=INTERVAL,
        log_interval=1,
        eval_iters=2,
        emissions=False,
        tensorboard=False,
        wandb=False,
        verify_resume=False,
        init_from="auto",
        overwrite=False,
    )
    flags = [f"--{k}={v}" for k, v in fixed.items()]
    if c.lr_schedule != "constant":  # The rate falls as in the full run.
        flags.append(f"--lr_decay_iters={max(c.lr_decay_iters or c.max_iters, c.warmup_iters)}")
    if c.source:
        flags.append(f"--source={c.source}")
    command = [sys.executable, *launcher(processes), sys.argv[0], *argv, *flags]
    with (
        stopped_by_signals(),
        tempfile.TemporaryDirectory() as folder,
        tqdm(unit="iteration", leave=False, disable=None) as bar,
    ):
        whole, killed = Path(folder) / "whole", Path(folder) / "killed"
        train(command, killed, None, bar)
        saved, lines = checkpoint.read(checkpoint.newest(killed))[1]["iter"], written(killed)
        steps = saved + INTERVAL
        train(command, killed, steps, bar)
        train(command, whole, steps, bar)
        equal, a, b = compare(whole, killed), history(whole), history(killed)
    report(equal, a, b, steps)
    print(
        f"killed after iteration {lines - 1}, resumed from iteration {saved}, on {processes}"
        f" process{'es' if processes > 1 else ''}"
    )
    if not all(equal.values()):
        sys.exit(1)


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP raise SystemExit, so that no training and no folder is left behind."""

    def stop(number: int, _: FrameType | None) -> None:
        sys.exit(128 + number)

    before = {s: signal.signal(s, stop) for s in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(command: list[str], out: Path, iterations: int | None, bar: tqdm) -> None:
    """Trains in the folder `out` up to an iteration.

    iterations: None kills training BEYOND iterations after a checkpoint.
    Raises: UserError, with the end of the output, if training ends in another way.
    """
    log = out.with_suffix(".log")
    words = [*command, f"--out_dir={out}", f"--max_iters={iterations or LONG}"]
    torchrun = ("TORCHELASTIC_", "MASTER_", "RANK", "LOCAL_RANK", "WORLD_SIZE")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(torchrun)}
    before, process = bar.n, None
    try:
        with log.open("w") as file:
            process = subprocess.Popen(words, env=environment, stdout=file, stderr=file)
        while process.poll() is None:
            done = written(out)
            bar.update(max(0, before + done - bar.n))
            saved = max((m["iter"] for m in checkpoint.manifests(out).values()), default=None)
            if iterations is None and saved and done >= saved + BEYOND:
                break
            time.sleep(0.02)
    finally:
        if process:
            kill_all(process)
    if process.returncode != (0 if iterations else -signal.SIGKILL):
        raise UserError(
            f"training ended with status {process.returncode}:\n{log.read_text()[-2000:]}"
        )


def report(equal: dict[str, bool], a: list[dict], b: list[dict], steps: int) -> None:
    """Prints which parts are equal, and the first difference of the metrics `a` and `b`."""
    for name, same in equal.items():
        what = f"{name} of {steps} iterations" if name == "metrics" else name
        print(f"{what}: {'bitwise equal' if same else 'DIFFERENT'}")
    if equal["metrics"]:
        return
    for x, y in zip(a, b, strict=False):
        for key in x:
            if x[key] != y.get(key):
                print(f"first difference: iteration {x['iter']}, {key} {x[key]} and {y.get(key)}")
                return


def compare(a: Path, b: Path) -> dict[str, bool]:
    """Whether the metrics of two runs, and the files of their newest checkpoints, are equal."""
    ends = checkpoint.newest(a), checkpoint.newest(b)
    same = {
        name: sha256(ends[0] / name) == sha256(ends[1] / name)
        for name in (checkpoint.WEIGHTS, checkpoint.STATE)
    }
    return {"metrics": history(a) == history(b), **same}


def kill_all(process: subprocess.Popen) -> None:
    """Sends SIGKILL to a process and to all processes that it started.

    Killing the process group is not enough, because torchrun starts new sessions.
    """
    with contextlib.suppress(psutil.NoSuchProcess):  # It has ended, with all that it started.
        root = psutil.Process(process.pid)
        for each in [root, *root.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
    process.wait()


def written(run: Path) -> int:
    """The number of iterations in a run's metrics.jsonl."""
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"train_loss") if path.is_file() else 0
