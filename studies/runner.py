"""Runs a study: the jobs that its table lacks, side by side, most important first. A row appears as
soon as its job ends, so a study that was stopped or killed goes on where it was.

A study says which jobs it wants (`Job`), and calls `complete`. A job is a function that returns
rows. Where every job is a run of train.py, a study says which runs it wants (`Training`), what it
measures in a run's folder, and calls `complete_trainings`.
"""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from analysis.tables import append_csv, read_csv
from base.errors import UserError

Row = dict[str, str]
# train.py's exit status where a loss is not finite.
NOT_FINITE = 3


class Table:
    """Rows of texts in a CSV file, which need not exist yet."""

    def __init__(self, path: Path | str, columns: Sequence[str], key: Sequence[str]):
        """key: the columns that say what was asked for. UserError for a file with other columns."""
        self.path = Path(path)
        self.columns, self.key = list(columns), tuple(key)
        self.rows = read_csv(self.path, self.columns) if self.path.is_file() else []
        self.index = {self._values(row): row for row in self.rows}

    def find(self, key: dict) -> Row | None:
        """The last row with the values of this key, or None."""
        return self.index.get(self._values(key))

    def row(self, key: dict) -> Row:
        """The row with the values of this key, which is there. KeyError."""
        return self.index[self._values(key)]

    def add(self, *rows: dict) -> None:
        """Appends rows in one write."""
        texts = [{name: str(row.get(name, "")) for name in self.columns} for row in rows]
        append_csv(self.path, texts, self.columns)
        self.rows += texts
        self.index |= {self._values(row): row for row in texts}

    def _values(self, row: dict) -> tuple[str, ...]:
        return tuple(str(row[name]) for name in self.key)


@dataclass(frozen=True)
class Job:
    """A call whose rows a table lacks. It runs in another process, so it must be picklable."""

    key: dict
    """columns that tell it apart; all its rows have them"""
    function: Callable[..., list[dict]]
    """returns the rows"""
    arguments: tuple = ()
    alone: bool = False
    """nothing runs beside it, as for one that measures speed"""


@dataclass(frozen=True)
class Training:
    """A run of train.py whose row a table lacks."""

    key: dict
    """columns that tell it apart"""
    flags: dict
    """of train.py, besides --out_dir and --overwrite=True. A long run should have init_from="auto":
    after a kill it goes on from its checkpoint"""
    alone: bool = False
    """nothing runs beside it, and it gets all threads"""


@dataclass
class TrainingConfig:
    """What a study of runs of train.py takes on its command line."""

    config: str = "configs/study.yaml"
    """model, data and budget of every run; what a run changes are its flags"""
    out: str = "results/study.csv"
    """the table; runs that it has are not repeated"""
    runs: str = "out/study"
    """where the runs' folders go"""
    workers: int = 2
    """runs side by side, each on one CPU thread"""
    nproc_per_node: int = 1
    """processes of each run, for GPUs"""

    def problems(self) -> list[str]:
        return [
            f"{name}={getattr(self, name)} must be at least 1"
            for name in ("workers", "nproc_per_node")
            if getattr(self, name) < 1
        ]


def commit() -> str:
    """The short name of the commit that is checked out; empty outside git."""
    words = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(words, capture_output=True, text=True).stdout.strip()


def run_name(key: dict) -> str:
    """The name of a job's folder or file: the values of its key. All of a path is in it, so that
    two data folders of one name are apart."""
    parts = [str(value).strip("/").replace("/", "_") for value in key.values()]
    return "-".join(part for part in parts if part).replace(" ", "_")


def complete(
    table: Table,
    wanted: Callable[[], list[Job]],
    workers: int,
    tell: Callable[[list[dict]], str],
) -> None:
    """Runs the jobs that the table lacks, `workers` at a time.

    When one fails, no other starts. Those that run are waited for, and their rows kept.

    Args:
        wanted: -> every job that is known by now, done or not, most important first. It is asked
            again after each job, for what was found may decide about the next.
        tell: (a job's rows) -> what is printed of them.
    Raises: what the first job that failed has raised. Ctrl-C exits with status 130.
    """
    sha, progress = commit(), _Progress()
    running: dict[Future, Job] = {}
    faults: list[BaseException] = []
    with _resumable(table.path), _pool(workers) as pool:
        while True:
            known = wanted()
            todo = [job for job in known if not table.find(job.key)]
            progress.update(len(known) - len(todo), len(known))
            if not faults:
                for job in _startable(todo, list(running.values()), workers):
                    running[pool.submit(job.function, *job.arguments)] = job
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job = running.pop(future)
                if fault := future.exception():
                    faults.append(fault)
                    continue
                rows = [{**job.key, **row, "commit": sha} for row in future.result()]
                table.add(*rows)
                progress.tell(job, tell(rows))
    progress.bar.close()
    if faults and isinstance(faults[0], BrokenProcessPool):
        raise UserError("a worker was killed, perhaps for lack of memory: try fewer --workers")
    if faults:
        raise faults[0]


def complete_trainings(
    c: TrainingConfig,
    table: Table,
    wanted: Callable[[], list[Training]],
    measure: Callable[[Path, dict], dict],
) -> None:
    """Runs the runs of train.py that the table lacks.

    Args:
        wanted: as for `complete`.
        measure: (a run's folder, its key) -> the other columns of its row, such as `val_loss`, but
            for `seconds` and `commit`. It is called in another process, so it must be a function of
            a module, or a partial of one.
    """

    def jobs() -> list[Job]:
        return [Job(t.key, train, (c, t, measure), t.alone) for t in wanted()]

    def tell(rows: list[dict]) -> str:
        return f"{rows[0].get('val_loss', 'not finite')}, {rows[0]['seconds']} s"

    complete(table, jobs, c.workers, tell)


def train(
    c: TrainingConfig, training: Training, measure: Callable[[Path, dict], dict]
) -> list[dict]:
    """Trains and measures: -> one row. A run that stopped at a loss that is not finite has only
    its time. The time of a resumed run includes its earlier starts. What the run prints is in
    FOLDER.log.

    Raises: UserError with the end of the log, for a run that failed.
    """
    # torch takes seconds to import, and the process that starts the workers need not have it.
    from training.distributed import launcher
    from training.telemetry import clock, read_metrics

    folder = Path(c.runs) / run_name(training.key)
    folder.mkdir(parents=True, exist_ok=True)
    log = Path(f"{folder}.log")
    flags = {"out_dir": folder, "overwrite": True} | training.flags
    command = [sys.executable, *launcher(c.nproc_per_node), "train.py", c.config]
    command += [f"--{name}={value}" for name, value in flags.items()]
    environment = dict(os.environ)
    if c.workers > 1 and not training.alone:
        environment |= {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    earlier, metrics = 0.0, folder / "metrics.jsonl"
    if flags.get("init_from") == "auto" and metrics.is_file() and metrics.stat().st_size:
        earlier = clock(read_metrics(folder), tokens=0)[-1][0]
    began = time.monotonic()
    with open(log, "w") as file:
        status = subprocess.run(command, stdout=file, stderr=file, env=environment).returncode
    row = {"seconds": f"{earlier + time.monotonic() - began:.1f}"}
    if status == NOT_FINITE:
        return [row]
    if status:
        raise UserError(f"{folder} ended with status {status}:\n{log.read_text()[-2000:]}")
    return [row | measure(folder, training.key)]


class _Progress:
    """A bar on a terminal, and a line for each job with the remaining time."""

    def __init__(self) -> None:
        self.bar = tqdm(desc="runs", unit=" runs", disable=None)
        self.began = time.monotonic()
        self.done = self.total = self.finished = 0

    def update(self, done: int, total: int) -> None:
        self.done, self.total = done, total
        self.bar.n, self.bar.total = done, total
        # The speed is that of the jobs of this call alone.
        self.bar.initial = done - self.finished
        self.bar.refresh()

    def tell(self, job: Job, text: str) -> None:
        self.done += 1
        self.finished += 1
        seconds = (time.monotonic() - self.began) / self.finished * (self.total - self.done)
        name = " ".join(str(value) for value in job.key.values() if str(value))
        left = tqdm.format_interval(seconds)
        tqdm.write(f"{name}: {text} ({self.done} of {self.total}, {left} left)")


def _startable(todo: list[Job], running: list[Job], workers: int) -> list[Job]:
    """The next jobs that may start beside the running ones. None overtakes another."""
    found: list[Job] = []
    keys = [job.key for job in running]
    for job in todo:
        if job.key in keys:
            continue
        beside = [*running, *found]
        most = 1 if job.alone or any(other.alone for other in beside) else workers
        if len(beside) >= most:
            break
        found.append(job)
    return found


@contextlib.contextmanager
def _resumable(path: Path) -> Iterator[None]:
    """Ctrl-C ends a study with a word on how to resume it, rather than with a traceback."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"\nstopped: {path} has the rows so far; call it again to resume", file=sys.stderr)
        sys.exit(130)


@contextlib.contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Worker processes. They end, with the runs of train.py that they have started, when this
    process is interrupted or killed."""
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, spawn, initializer=_begin_worker)
    try:
        yield pool
    except BaseException:
        for worker in multiprocessing.active_children():
            assert worker.pid is not None
            # A worker that has just been started has no group yet.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(worker.pid, signal.SIGTERM)
            worker.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_worker() -> None:
    """Puts a worker and all that it starts into a process group, so that they can be ended
    together."""
    os.setpgrp()
    threading.Thread(target=_end_with_the_runner, daemon=True).start()


def _end_with_the_runner() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.killpg(0, signal.SIGTERM)
