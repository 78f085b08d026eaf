"""Damages real training runs in many ways, and checks how they recover.

    # everything, about 40 minutes on 2 cores; adds missing rows to results/faults.csv
    python -m tests.faults.storm
    python -m tests.faults.storm --only=kills --trials=10

kills     SIGKILL at random moments, half of them while a checkpoint is being written, with one
          process and with two under torchrun
damage    a flipped bit, a truncated file or a missing file, in the newest checkpoint, train.bin,
          val.bin and meta.json
disk      a disk that is full during the run (and has room again later), a folder that becomes
          read-only, and one that is read-only from the start
clock     a clock that jumps by a day forward and back during the run, and files from the future
hang      a process that stops responding, under torchrun --max-restarts

In the end every run is compared with an undisturbed one. Metrics must be equal line by line, and
weights and optimiser state byte by byte. A row tells what was tried, what happened, how many
iterations were repeated, and whether the result is right.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
from tqdm import tqdm

from analysis import tables
from analysis.tables import Column
from base.command_line import cli, parse
from base.errors import UserError, check
from training import checkpoint
from training.distributed import launcher
from training.verify import compare, history, kill_all, written

INTERVAL = 5  # Iterations between checkpoints.
BATCH = 10  # Kills of a run before it is finished and compared.
COLUMNS = [
    "fault",
    "processes",
    "trial",
    "tried",
    "happened",
    "done_again",
    "seconds",
    "as_it_should",
]
TINY = dict(
    n_layer=2, n_head=2, n_embd=64, block_size=64, batch_size=8, head="cosine", dropout=0.1,
    eval_iters=1, eval_interval=INTERVAL, log_interval=1, warmup_iters=10, lr_decay_iters=3000,
    compile=False, emissions=False,
)  # fmt: skip


@dataclass
class StormConfig:
    """What to break"""

    only: Literal["kills", "damage", "disk", "clock", "hang"] | None = None
    """only this kind of fault; null = all"""
    trials: int | None = None
    """number of trials; null = 50 kills for each number of processes, and 100 damaged files"""
    dataset: str = "data/wiki"
    """a prepared folder"""
    out: str = "results/faults.csv"
    """the table; its trials are not repeated"""

    def problems(self) -> list[str]:
        found = []
        if self.trials is not None and self.trials < 1:
            found.append(f"trials={self.trials} must be at least 1")
        if not (Path(self.dataset) / "meta.json").is_file():
            found.append(f"no prepared data in {self.dataset}: make demo prepares it")
        return found


@dataclass
class Trial:
    """A row of the table: what was tried and what happened.

    done_again: the number of repeated iterations; None if it does not matter.
    as_it_should: whether the result is right.
    """

    fault: str
    processes: int
    trial: int
    tried: str
    happened: str
    seconds: float
    as_it_should: bool
    done_again: int | None = 0

    def row(self) -> dict[str, str]:
        values = asdict(self) | {"seconds": f"{self.seconds:.1f}"}
        return {name: "" if values[name] is None else str(values[name]) for name in COLUMNS}


class Table:
    """results/faults.csv. It gets a row as soon as a trial ends."""

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.rows = tables.read_csv(path, COLUMNS) if path.exists() else []

    def has(self, fault: str, processes: int, trial: int) -> bool:
        return any(
            (r["fault"], r["processes"], r["trial"]) == (fault, str(processes), str(trial))
            for r in self.rows
        )

    def drop(self, fault: str, processes: int, trials: range):
        """Removes the rows of a batch that was not finished."""
        gone = {(fault, str(processes), str(t)) for t in trials}
        self.rows = [r for r in self.rows if (r["fault"], r["processes"], r["trial"]) not in gone]
        tables.write_csv(self.path, self.rows, COLUMNS)

    def add(self, trial: Trial) -> None:
        self.rows.append(trial.row())
        tables.append_csv(self.path, self.rows[-1:], COLUMNS)


def command(
    out: Path,
    dataset: str | Path,
    max_iters: int,
    processes: int = 1,
    torchrun: Sequence[str] = (),
    **flags: Any,
) -> list[str]:
    """The command that trains or resumes a run. torchrun: flags of torchrun."""
    run = dict(dataset=dataset, max_iters=max_iters, init_from="auto", out_dir=out)
    given = [f"--{key}={value}" for key, value in {**TINY, **run, **flags}.items()]
    return [sys.executable, *launcher(processes, *torchrun), "train.py", *given]


def begin(words: list[str], log: Path, env: dict[str, str] | None = None) -> subprocess.Popen:
    """Starts a command. Its output is appended to a log."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    with log.open("a") as file:
        return subprocess.Popen(
            words, env=environment, stdout=file, stderr=file, start_new_session=True
        )


def finish(words: list[str], log: Path, env: dict[str, str] | None = None) -> int:
    """Runs a command to its end. Returns its exit status."""
    process = begin(words, log, env)
    try:
        return process.wait(900)
    finally:
        kill_all(process)


def workers(process: subprocess.Popen) -> dict[int, psutil.Process]:
    """The training processes under a torchrun, by rank."""
    found = {}
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if rank := child.environ().get("RANK"):
                found[int(rank)] = child
        except psutil.NoSuchProcess:
            continue  # It has ended in the meantime.
    return found


def wait_until(
    condition: Callable[[], bool], process: subprocess.Popen | None = None, seconds: float = 300
) -> bool:
    """Waits for a condition. Returns whether it became true before the process ended."""
    end = time.monotonic() + seconds
    while not condition():
        if process and process.poll() is not None:
            return bool(condition())
        if time.monotonic() > end:
            raise TimeoutError(f"{condition} did not happen within {seconds} seconds")
        time.sleep(0.002)
    return True


def newest_iteration(run: Path) -> int:
    """The iteration of the newest checkpoint that is not corrupt, or 0."""
    sound = [
        m["iter"] for f, m in checkpoint.manifests(run).items() if checkpoint.damage(f) is None
    ]
    return max(sound, default=0)


def differences(a: Path, b: Path) -> str:
    """The parts of two runs that differ, in words; empty if none do."""
    return "; ".join(f"{part} differ" for part, same in compare(a, b).items() if not same)


def kills(c: StormConfig, table: Table, home: Path) -> None:
    """Runs batches of kills. A batch kills one run several times, finishes it and compares it.

    A batch that was interrupted before the comparison starts again.
    """
    total = c.trials or 50
    for processes in (1, 2):
        for batch, first in enumerate(range(0, total, BATCH)):
            if not table.has("after kills", processes, batch):
                trials = range(first, min(first + BATCH, total))
                table.drop("kill", processes, trials)
                kill_and_compare(c, table, home / f"{processes} {batch}", processes, batch, trials)


def kill_and_compare(
    c: StormConfig, table: Table, home: Path, processes: int, batch: int, trials: range
) -> None:
    """Kills a run once for each trial, finishes it, and compares it with an undisturbed run."""
    home.mkdir()
    run, whole, log = home / "killed", home / "whole", home / "log"
    rng = random.Random(f"{processes} {batch}")
    for trial in tqdm(trials, f"kills, processes: {processes}", disable=None):
        process = begin(command(run, c.dataset, 100_000, processes), log)
        goal = newest_iteration(run) + INTERVAL * rng.randrange(1, 8)
        wait_until(lambda: newest_iteration(run) >= goal, process)  # noqa: B023  called before the next round
        if writing := rng.random() < 0.5:
            wait_until(lambda: any((run / "ckpt").glob(".iter_*")), process)
        else:
            time.sleep(rng.random() * 0.3)
        took = 0.0
        if processes == 1 or rng.random() < 0.5:
            who = "all processes"
            kill_all(process)
        else:  # Only one of them is killed. torchrun must end the other.
            rank, victim = rng.choice(list(workers(process).items()))
            who = f"rank {rank}"
            victim.kill()
            began = time.monotonic()
            process.wait(120)
            took = time.monotonic() - began
        left = any((run / "ckpt").glob(".iter_*"))
        lines, kept = written(run), newest_iteration(run)
        when = "while a checkpoint was written" if writing else "at a random moment"
        what = f"goes on from {kept} of {lines}"
        if left:
            what += ", an unfinished checkpoint was left"
        again = lines - kept
        good = 0 <= again <= 2 * INTERVAL and took < 10
        tried = f"SIGKILL to {who} {when}"
        table.add(Trial("kill", processes, trial, tried, what, took, good, again))
    end, began = newest_iteration(run) + 20, time.monotonic()
    statuses = [finish(command(r, c.dataset, end, processes), log) for r in (run, whole)]
    wrong = differences(run, whole) or (f"exit status {statuses}" if any(statuses) else "")
    tried = f"the run of kills {trials[0]} to {trials[-1]}, ended, against one never killed"
    happened = wrong or f"bitwise equal over {end} iterations"
    took = time.monotonic() - began
    table.add(Trial("after kills", processes, batch, tried, happened, took, not wrong, None))


def spoil(path: Path, how: str, rng: random.Random) -> str:
    """Damages a file. Returns what was done, in words."""
    content = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
        return f"{path.name} missing"
    at = rng.randrange(len(content))
    if how == "cut":
        path.write_bytes(content[:at])
        return f"{path.name} cut to {at} of {len(content)} bytes"
    bit = rng.randrange(8)
    content[at] ^= 1 << bit
    path.write_bytes(content)
    return f"{path.name}: bit {bit} of byte {at} flipped"


def damage(c: StormConfig, table: Table, home: Path) -> None:
    """Damages one file in each trial, and resumes the run."""
    trials = [t for t in range(c.trials or 100) if not table.has("damage", 1, t)]
    if not trials:
        return
    data, base, whole, log = home / "data", home / "base", home / "base whole", home / "log"
    shutil.copytree(c.dataset, data)
    finish(command(base, data, 3 * INTERVAL), log)
    finish(command(whole, data, 4 * INTERVAL), log)
    in_checkpoint = [checkpoint.WEIGHTS, checkpoint.STATE, checkpoint.MANIFEST]
    for trial in tqdm(trials, "damage", disable=None):
        rng = random.Random(trial)
        run, spoilt = home / "damaged", home / "spoilt data"
        for new, old in ((run, base), (spoilt, data)):
            shutil.rmtree(new, ignore_errors=True)
            shutil.copytree(old, new)
        name = rng.choice([*in_checkpoint, "train.bin", "val.bin", "meta.json"])
        path = (checkpoint.newest(run) if name in in_checkpoint else spoilt) / name
        tried = spoil(path, rng.choice(["bit", "bit", "cut", "missing"]), rng)
        out = home / f"log {trial}"
        began = time.monotonic()
        status = finish(command(run, spoilt, 4 * INTERVAL), out)
        text = out.read_text()
        again = 0
        if status == 0:
            wrong = differences(run, whole)
            happened = wrong or "of no consequence, bitwise equal"
            if not wrong and "is corrupt" in text:
                happened, again = "reported, the checkpoint before used, bitwise equal", INTERVAL
            good = not wrong
        else:
            (message,) = [line for line in text.splitlines() if line.startswith("train.py: ")] or [
                text[-200:]
            ]
            happened = f"refused: {message.removeprefix('train.py: ').replace(f'{home}/', '')}"
            good = status == 2 and "Traceback" not in text and name in message
        took = time.monotonic() - began
        table.add(Trial("damage", 1, trial, tried, happened, took, good, again))


class Disk:
    """A small file system in memory. UserError if this user is not allowed to mount one."""

    def __init__(self, path: Path, megabytes: float):
        self.path = path
        path.mkdir()
        self._mount(
            "mount", "-t", "tmpfs", "-o", f"size={int(megabytes * 1024)}k", "tmpfs", str(path)
        )

    def _mount(self, *words):
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"{' '.join(words)}: {done.stderr.strip()} (the disk faults need root)")

    def remount(self, options: str) -> None:
        self._mount("mount", "-o", f"remount,{options}", str(self.path))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        subprocess.run(["umount", "-l", str(self.path)], check=False)


def steps(run: Path) -> list[dict]:
    """The metrics of a run's iterations, without evaluations."""
    return [r for r in history(run) if "train_loss" in r]


def stop_and_compare(
    c: StormConfig, process: subprocess.Popen, run: Path, whole: Path, log: Path
) -> str:
    """Stops a run with SIGTERM. Returns how it differs from an undisturbed run, in words."""
    process.send_signal(signal.SIGTERM)
    status, end = process.wait(60), newest_iteration(run)
    finish(command(whole, c.dataset, end), log)
    same = compare(run, whole)
    # Only iterations are compared, because the undisturbed run also evaluates at its end.
    same["metrics"] = steps(run) == steps(whole)
    found = [f"{part} differ" for part, equal in same.items() if not equal]
    return "; ".join(found if status == 143 else [f"exit status {status}", *found])


def disk(c: StormConfig, table: Table, home: Path) -> None:
    """Runs the three trials of disk faults."""
    if not table.has("full disk", 1, 0):
        table.add(full_disk(c, home))
    if not table.has("read-only out_dir", 1, 0):
        table.add(read_only_disk(c, home))
    if not table.has("read-only out_dir", 1, 1):
        table.add(read_only_folder(c, home))


def full_disk(c: StormConfig, home: Path) -> Trial:
    """Fills the disk during a run, and enlarges it later."""
    began, log = time.monotonic(), home / "full.log"
    # Room for three checkpoints (the newest two and the best one) and a part of a fourth.
    with Disk(home / "small", 11) as small:
        run, ballast = small.path / "run", small.path / "ballast"
        process = begin(command(run, c.dataset, 100_000), log)
        wait_until(lambda: "could not be written" in log.read_text(), process)
        during = newest_iteration(run)
        fill(ballast)
        before = written(run)
        time.sleep(2)
        stuck = written(run)
        small.remount("size=60m")
        ballast.unlink()
        wait_until(lambda: newest_iteration(run) > during + INTERVAL, process)
        wrong = stop_and_compare(c, process, run, home / "full whole", log)
    tried = "tmpfs full in mid-run, then enlarged"
    happened = wrong or (
        f"reported; iter {during} stayed; metrics waited at {before} to {stuck} lines; with"
        " room again all written, bitwise equal"
    )
    return Trial("full disk", 1, 0, tried, happened, time.monotonic() - began, not wrong)


def read_only_disk(c: StormConfig, home: Path) -> Trial:
    """Starts a run on a read-only disk."""
    began, log = time.monotonic(), home / "ro.log"
    with Disk(home / "ro", 50) as small:
        small.remount("ro")
        status = finish(command(small.path / "run", c.dataset, 20), log)
    message = log.read_text().strip().splitlines()[-1].replace(f"{home}/", "")
    good = status == 2 and "cannot be written: Read-only file system" in message
    tried, took = "out_dir on a read-only file system", time.monotonic() - began
    return Trial("read-only out_dir", 1, 0, tried, message, took, good)


def read_only_folder(c: StormConfig, home: Path) -> Trial:
    """Makes the folder of checkpoints read-only during a run, and writable again later."""
    began, log, run = time.monotonic(), home / "immutable.log", home / "immutable"
    folder = str(run / "ckpt")
    process = begin(command(run, c.dataset, 100_000), log)
    wait_until(lambda: newest_iteration(run) > 0, process)
    if subprocess.run(["chattr", "+i", folder], capture_output=True).returncode:
        kill_all(process)
        raise UserError(
            "chattr +i does not work on this file system: no folder can be made read-only for root"
        )
    wait_until(lambda: "could not be written" in log.read_text(), process)
    kept = newest_iteration(run)
    subprocess.run(["chattr", "-i", folder], check=True)
    wait_until(lambda: newest_iteration(run) > kept, process)
    wrong = stop_and_compare(c, process, run, home / "immutable whole", log)
    tried, took = "ckpt turns read-only in mid-run, and back", time.monotonic() - began
    happened = (
        wrong or f"reported; iter {kept} stayed; written again once it could be; bitwise equal"
    )
    return Trial("read-only out_dir", 1, 1, tried, happened, took, not wrong)


def fill(path: Path) -> None:
    """Writes a file until the disk is full."""
    with path.open("wb", buffering=0) as file:
        try:
            while file.write(b"\0" * 4096):
                pass
        except OSError:
            return  # The disk is full.


JUMPS = """
import time
real, start = time.time, time.monotonic()
def jumping():
    return real() + (0, 86400, -86400, 3e9)[int((time.monotonic() - start) / 0.5) % 4]
time.time = jumping
"""


def clock(c: StormConfig, table: Table, home: Path) -> None:
    """Trains with a clock that jumps, and resumes with files of wrong dates."""
    if table.has("clock", 1, 0):
        return
    began, log, run, whole = time.monotonic(), home / "log", home / "clock", home / "clock whole"
    (home / "site").mkdir()
    (home / "site/sitecustomize.py").write_text(JUMPS)
    jumping = {"PYTHONPATH": str(home / "site")}
    statuses = [finish(command(run, c.dataset, 20, emissions=True), log, jumping)]
    for i, path in enumerate(sorted(run.rglob("*"))):
        os.utime(path, (4e9, 4e9) if i % 2 else (0, 0))
    statuses.append(finish(command(run, c.dataset, 40, emissions=True), log, jumping))
    statuses.append(finish(command(whole, c.dataset, 40), log))
    wrong = differences(run, whole) or (f"exit status {statuses}" if any(statuses) else "")
    tried = "time.time() jumps by a day and by 95 years; files of 1970 and 2096"
    took = time.monotonic() - began
    table.add(Trial("clock", 1, 0, tried, wrong or "bitwise equal", took, not wrong))


def hang(c: StormConfig, table: Table, home: Path) -> None:
    """Suspends each of two processes once."""
    for rank in range(2):
        if not table.has("hang", 2, rank):
            table.add(suspend(c, home, rank))


def suspend(c: StormConfig, home: Path, rank: int) -> Trial:
    """Suspends one of two processes with SIGSTOP, so that torchrun has to restart them."""
    log, run, whole = (home / f"hang{rank}{part}" for part in (".log", "", " whole"))
    process = begin(command(run, c.dataset, 200, 2, ["--max-restarts=1"], timeout=10), log)
    wait_until(lambda: newest_iteration(run) >= 2 * INTERVAL, process)
    workers(process)[rank].suspend()
    began, lines = time.monotonic(), written(run)
    wait_until(
        lambda: written(run) < lines or newest_iteration(run) > lines + INTERVAL,
        process,
    )
    took = time.monotonic() - began
    status = process.wait(300)
    finish(command(whole, c.dataset, 200, 2), log)
    wrong = differences(run, whole) or (f"exit status {status}" if status else "")
    tried = f"SIGSTOP to rank {rank}, timeout=10, --max-restarts=1"
    happened = wrong or f"given up, started again and going on after {took:.0f} s; bitwise equal"
    return Trial("hang", 2, rank, tried, happened, took, not wrong, None)


def markdown(rows: list[dict]) -> str:
    """The table in docs/reliability.md, with a line for each kind of fault."""
    kinds = {}
    for row in rows:
        kinds.setdefault((row["fault"], row["processes"]), []).append(row)
    lines = [
        {
            "fault": fault,
            "processes": processes,
            "trials": len(group),
            "good": sum(r["as_it_should"] == "True" for r in group),
            "again": max((int(r["done_again"]) for r in group if r["done_again"]), default=0),
            "seconds": max(float(r["seconds"]) for r in group),
        }
        for (fault, processes), group in kinds.items()
    ]
    columns = [
        "fault",
        "processes",
        "trials",
        Column("good", "passed"),
        Column("again", "iterations repeated, at most"),
        Column("seconds", "seconds, at most", ".0f"),
    ]
    return tables.markdown(lines, columns)


def main() -> None:
    (c,) = parse(sys.argv[1:], StormConfig)
    table = Table(Path(c.out))
    kinds = {"kills": kills, "damage": damage, "disk": disk, "clock": clock, "hang": hang}
    problems = []
    for name, try_it in kinds.items():
        if c.only in (None, name):
            with tempfile.TemporaryDirectory(prefix="faults-") as home:
                try:
                    try_it(c, table, Path(home))
                except UserError as error:
                    problems.append(f"{name}: {error}")
    print(markdown(table.rows))
    check(problems)
    if wrong := [r for r in table.rows if r["as_it_should"] != "True"]:
        print(
            f"{len(wrong)} trials failed:",
            *(f"{r['fault']}: {r['tried']}: {r['happened']}" for r in wrong),
            sep="\n  ",
        )
        sys.exit(1)


if __name__ == "__main__":
    cli(main)
