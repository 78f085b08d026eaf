"""`--verify_resume`: does a run that is killed and resumed equal one that never was, bit for bit?"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from tqdm import tqdm

from training import checkpoint
from training.config import UserError
from training.files import sha256
from training.telemetry import read_metrics

STEPS, SAVED, KILLED = 20, 10, 13  # iterations in all; at which the checkpoint is; after which the process is killed
MEASURED = ("tokens_per_s", "elapsed_s", "mfu")  # of the clock, not of the training


def history(run: Path) -> list[dict]:
    """A run's metrics without what the clock says."""
    return [{k: v for k, v in r.items() if k not in MEASURED} for r in read_metrics(run)]


def verify_resume(argv: list[str]):
    """Trains STEPS iterations with the given settings in one process; in another run kills it (SIGKILL, after the checkpoint at SAVED) and
    resumes; compares every line of metrics and the bytes of weights and optimiser. Exits with status 1 when anything differs.

    Under torchrun on one machine the same number of processes is used.
    """
    processes, here = (int(os.environ.get(k, 1)) for k in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if processes != here:
        raise UserError("verify_resume compares on one machine: start it with torchrun --standalone")
    if int(os.environ.get("RANK", 0)) > 0:
        return  # the first process starts its own
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith(("TORCHELASTIC_", "MASTER_", "RANK", "LOCAL_RANK", "WORLD_SIZE"))
    }
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    fixed = dict(max_iters=STEPS, eval_interval=SAVED, log_interval=1, eval_iters=2, emissions=False, tensorboard=False, wandb=False)
    flags = [f"--{k}={v}" for k, v in {**fixed, "verify_resume": False, "init_from": "auto"}.items()]
    command = [sys.executable, *launcher, sys.argv[0], *argv, *flags]

    with tempfile.TemporaryDirectory() as folder, tqdm(total=3 * STEPS, unit="iteration", leave=False, disable=None) as bar:
        whole, killed = Path(folder) / "whole", Path(folder) / "killed"

        def run(out: Path, until: int | None = None):
            """Trains in `out` to the end, or kills it once iteration `until` is written and a checkpoint there."""
            log = open(Path(folder) / "log", "w+")
            before = bar.n
            with subprocess.Popen([*command, f"--out_dir={out}"], env=environment, stdout=log, stderr=log) as process:
                try:
                    while process.poll() is None:
                        done = written(out)
                        bar.update(max(0, before + done - bar.n))
                        if until and done > until and checkpoint.manifests(out):
                            break
                        time.sleep(0.02)
                finally:
                    kill_all(process)
            if until is None and process.returncode:
                log.seek(0)
                raise UserError(f"training failed with status {process.returncode}:\n{log.read()[-2000:]}")

        run(whole)
        run(killed, KILLED)
        lost = written(killed) - SAVED
        kept = [f.name for f in checkpoint.manifests(killed)]
        if kept != [f"iter_{SAVED:06d}"]:
            raise UserError(
                f"the run was not killed between iterations {SAVED} and {STEPS} (checkpoints: {kept}): nothing was verified; try again"
            )
        run(killed)
        a, b = history(whole), history(killed)
        ends = [checkpoint.newest(run) for run in (whole, killed)]
        equal = {
            f"losses and norms of {STEPS} iterations": a == b,
            **{name: sha256(ends[0] / name) == sha256(ends[1] / name) for name in (checkpoint.WEIGHTS, checkpoint.STATE)},
        }
    for name, same in equal.items():
        print(f"{name}: {'bitwise equal' if same else 'DIFFERENT'}")
    if a != b:
        where = next((x["iter"], k, x.get(k), y.get(k)) for x, y in zip(a, b, strict=False) for k in x if x.get(k) != y.get(k))
        print("first difference: iteration {}, {} {} and {}".format(*where))
    print(
        f"killed after iteration {SAVED + lost - 1}, resumed from iteration {SAVED}, on {processes} process{'es' if processes > 1 else ''}"
    )
    if not all(equal.values()):
        sys.exit(1)


def kill_all(process: subprocess.Popen):
    """SIGKILL to a process and everything it started: torchrun's processes have sessions of their own."""
    try:
        family = [process.pid, *(p.pid for p in psutil.Process(process.pid).children(recursive=True))]
    except psutil.NoSuchProcess:
        family = []  # it has ended, and torchrun's processes with it
    for pid in family:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue  # it was quicker
    process.wait()


def written(run: Path) -> int:
    """Iterations that a run's metrics have lines of."""
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"train_loss") if path.is_file() else 0
