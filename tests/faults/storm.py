"""Breaks real runs in every way that runs break, and looks at what is left.

    # all of it, about 40 minutes on 2 cores; adds to results/faults.csv what is missing
    python -m tests.faults.storm
    python -m tests.faults.storm --only=kills --trials=10

kills     SIGKILL at random moments, half of them while a checkpoint is being written; one process,
          and two under torchrun
damage    a bit flipped, a file cut short or missing, in the newest checkpoint and in train.bin,
          val.bin and meta.json
disk      a disk that fills up in mid-run (and is emptied again), a folder that turns read-only, one
          that was read-only before
clock     the time of day jumps by a day to and fro while training; files from the future
hang      a process that stops answering, under torchrun --max-restarts

Every run is compared in the end with one that nothing happened to: the same metrics, line by line,
    and the same bytes of weights and optimiser. A row says what was tried, what happened, how many
    iterations were done again, and whether all was as it should be.
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

INTERVAL = 5  # iterations between checkpoints
BATCH = 10  # kills of a run, before it is ended and compared
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
    """one kind of fault; null = all"""
    trials: int | None = None
    """how many of each; null = 50 kills for each number of processes, 100 damages"""
    dataset: str = "data/wiki"
    """a prepared folder"""
    out: str = "results/faults.csv"
    """the table; rows that it has are not tried again"""

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

    done_again: iterations, None where they do not count. as_it_should: whether all was.
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
    """results/faults.csv, one row a trial, written as each ends."""

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
        """Forgets the rows of a batch that was not ended."""
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
    """The words that train a run, or resume it. torchrun: its flags, for several processes."""
    run = dict(dataset=dataset, max_iters=max_iters, init_from="auto", out_dir=out)
    given = [f"--{key}={value}" for key, value in {**TINY, **run, **flags}.items()]
    return [sys.executable, *launcher(processes, *torchrun), "train.py", *given]


def begin(words: list[str], log: Path, env: dict[str, str] | None = None) -> subprocess.Popen:
    """Starts a command whose output goes to the end of a log."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    with log.open("a") as file:
        return subprocess.Popen(
            words, env=environment, stdout=file, stderr=file, start_new_session=True
        )


def finish(words: list[str], log: Path, env: dict[str, str] | None = None) -> int:
    """Runs a command to its end -> its exit status."""
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
            continue  # it has ended meanwhile
    return found


def wait_until(
    condition: Callable[[], bool], process: subprocess.Popen | None = None, seconds: float = 300
) -> bool:
    """Waits for a condition -> whether it came true before the process ended."""
    end = time.monotonic() + seconds
    while not condition():
        if process and process.poll() is not None:
            return bool(condition())
        if time.monotonic() > end:
            raise TimeoutError(f"{condition} did not happen within {seconds} seconds")
        time.sleep(0.002)
    return True


def newest_iteration(run: Path) -> int:
    """Of the checkpoints that are sound."""
    sound = [
        m["iter"] for f, m in checkpoint.manifests(run).items() if checkpoint.damage(f) is None
    ]
    return max(sound, default=0)


def differences(a: Path, b: Path) -> str:
    """What differs between two runs that should be one, in words; empty when nothing does."""
    return "; ".join(f"{part} differ" for part, same in compare(a, b).items() if not same)


def kills(c: StormConfig, table: Table, home: Path) -> None:
    """Batches of kills of one run, which is then ended and compared; a batch without its comparison
    is begun anew."""
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
    """Kills one run as often as there are trials, ends it, and compares it with one that was never
    killed."""
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
        else:  # one of them: torchrun must end the other
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
    """Damages a file -> what was done."""
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
    """A file system of a few megabytes in memory. UserError where this user may not mount one."""

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
    """The metrics of its iterations, without those of evaluations."""
    return [r for r in history(run) if "train_loss" in r]


def stop_and_compare(
    c: StormConfig, process: subprocess.Popen, run: Path, whole: Path, log: Path
) -> str:
    """SIGTERM to a run, and what differs then from one that nothing happened to."""
    process.send_signal(signal.SIGTERM)
    status, end = process.wait(60), newest_iteration(run)
    finish(command(whole, c.dataset, end), log)
    same = compare(run, whole)
    # Of the metrics only iterations are compared: the whole run evaluates at its end besides.
    same["metrics"] = steps(run) == steps(whole)
    found = [f"{part} differ" for part, equal in same.items() if not equal]
    return "; ".join(found if status == 143 else [f"exit status {status}", *found])


def disk(c: StormConfig, table: Table, home: Path) -> None:
    if not table.has("full disk", 1, 0):
        table.add(full_disk(c, home))
    if not table.has("read-only out_dir", 1, 0):
        table.add(read_only_disk(c, home))
    if not table.has("read-only out_dir", 1, 1):
        table.add(read_only_folder(c, home))


def full_disk(c: StormConfig, home: Path) -> Trial:
    began, log = time.monotonic(), home / "full.log"
    # Room for three checkpoints (the newest two and the best are kept) and some of a fourth.
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
    began, log = time.monotonic(), home / "ro.log"
    with Disk(home / "ro", 50) as small:
        small.remount("ro")
        status = finish(command(small.path / "run", c.dataset, 20), log)
    message = log.read_text().strip().splitlines()[-1].replace(f"{home}/", "")
    good = status == 2 and "cannot be written: Read-only file system" in message
    tried, took = "out_dir on a read-only file system", time.monotonic() - began
    return Trial("read-only out_dir", 1, 0, tried, message, took, good)


def read_only_folder(c: StormConfig, home: Path) -> Trial:
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
    """Takes what is left of a disk."""
    with path.open("wb", buffering=0) as file:
        try:
            while file.write(b"\0" * 4096):
                pass
        except OSError:
            return  # full: that was the aim


JUMPS = """
import time
real, start = time.time, time.monotonic()
def jumping():
    return real() + (0, 86400, -86400, 3e9)[int((time.monotonic() - start) / 0.5) % 4]
time.time = jumping
"""


def clock(c: StormConfig, table: Table, home: Path) -> None:
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
    for rank in range(2):
        if not table.has("hang", 2, rank):
            table.add(suspend(c, home, rank))


def suspend(c: StormConfig, home: Path, rank: int) -> Trial:
    """SIGSTOP to one of two processes."""
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
    """The table of docs/reliability.md: a line for each kind of fault."""
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
        Column("good", "as it should"),
        Column("again", "iterations done again, most"),
        Column("seconds", "seconds, most", ".0f"),
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
            f"{len(wrong)} not as it should be:",
            *(f"{r['fault']}: {r['tried']}: {r['happened']}" for r in wrong),
            sep="\n  ",
        )
        sys.exit(1)


if __name__ == "__main__":
    cli(main)
