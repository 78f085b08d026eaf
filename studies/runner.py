"""Runs the jobs of a study that are not in its table yet, in parallel, most important first.

A row is written as soon as its job ends, so you can resume a study that was stopped or killed.

A job (`Job`) is a function that returns rows. A study lists its jobs and calls `complete`. If every
job is a run of train.py, it lists the runs (`Training`) and calls `complete_trainings`, with a
function that measures a finished run.
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
from base.errors import UserError, too_small

Row = dict[str, str]
# The exit status of train.py if a loss is not finite.
NOT_FINITE = 3


class Table:
    """A table in a CSV file, which may not exist yet. All values are texts."""

    def __init__(self, path: Path | str, columns: Sequence[str], key: Sequence[str]):
        """key: the columns that identify a job. UserError for a file with other columns."""
        self.path = Path(path)
        self.columns, self.key = list(columns), tuple(key)
        self.rows = read_csv(self.path, self.columns) if self.path.is_file() else []
        self.index = {self._values(row): row for row in self.rows}

    def find(self, key: dict) -> Row | None:
        """The last row with this key, or None. key: may have other columns too."""
        return self.index.get(self._values(key))

    def row(self, key: dict) -> Row:
        """The last row with this key. KeyError if there is none."""
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
    """A function call that makes rows of a table. It must be picklable for another process."""

    key: dict
    """columns that identify the job; all its rows get them"""
    function: Callable[..., list[dict]]
    """returns the rows"""
    arguments: tuple = ()
    alone: bool = False
    """whether nothing may run at the same time, because the job measures speed"""


@dataclass(frozen=True)
class Training:
    """A run of train.py that makes a row of a table."""

    key: dict
    """columns that identify the run"""
    flags: dict
    """flags of train.py, besides --out_dir and --overwrite=True. A long run should have
    init_from="auto", so that it resumes from its checkpoint after a kill"""
    alone: bool = False
    """whether nothing may run at the same time; then the run gets all threads"""


@dataclass
class TrainingConfig:
    """The settings of a study whose jobs are runs of train.py."""

    config: str = "configs/study.yaml"
    """model, data and budget of every run, which the flags of a run override"""
    out: str = "results/study.csv"
    """the table; its runs are not repeated"""
    runs: str = "out/study"
    """folder of the runs"""
    workers: int = 2
    """runs at the same time, each with one CPU thread"""
    nproc_per_node: int = 1
    """processes of each run, for GPUs"""

    def problems(self) -> list[str]:
        return too_small(self, workers=1, nproc_per_node=1)


def commit() -> str:
    """The short hash of the current git commit; empty outside of git."""
    words = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(words, capture_output=True, text=True).stdout.strip()


def run_name(key: dict) -> str:
    """The name of a job's folder or file, from the values of its key.

    Of a path it has all parts, because two data folders may have the same last part.
    """
    parts = [str(value).strip("/").replace("/", "_") for value in key.values()]
    return "-".join(part for part in parts if part).replace(" ", "_")


def complete(
    table: Table,
    wanted: Callable[[], list[Job]],
    workers: int,
    tell: Callable[[list[dict]], str],
) -> None:
    """Runs the jobs that are not in the table, `workers` at a time.

    If a job fails, no other job starts. Running jobs are finished, and their rows are written.

    Args:
        wanted: returns all jobs known so far, done or not, most important first. It is called again
            after each job, because results may decide which jobs come next.
        tell: turns the rows of a job into the text that is printed.
    Raises: the exception of the first job that failed. Ctrl-C exits with status 130.
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
    """Does the runs of train.py that are not in the table.

    Args:
        wanted: as for `complete`.
        measure: a function of a run's folder and key. It returns the result columns, such as
            `val_loss`; `seconds` and `commit` are added. It is called in another process, so it
            must be a function of a module, or a partial of one.
    """

    def jobs() -> list[Job]:
        return [Job(t.key, train, (c, t, measure), t.alone) for t in wanted()]

    def tell(rows: list[dict]) -> str:
        return f"{rows[0].get('val_loss', 'not finite')}, {rows[0]['seconds']} s"

    complete(table, jobs, c.workers, tell)


def train(
    c: TrainingConfig, training: Training, measure: Callable[[Path, dict], dict]
) -> list[dict]:
    """Trains and measures a run. Returns one row. The output of the run is in FOLDER.log.
    The time of a resumed run includes its earlier starts.

    If the run stopped because a loss was not finite, the row has only its time.
    Raises: UserError, with the end of the log, if the run failed.
    """
    # Imported here, because torch takes seconds to import.
    from training.distributed import launcher
    from training.metrics import clock, read_metrics

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
        earlier = clock(folder, read_metrics(folder), tokens=0)[-1][0]
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
    """A progress bar on a terminal, and a line for each job with the remaining time."""

    def __init__(self) -> None:
        self.bar = tqdm(desc="runs", unit=" runs", disable=None)
        self.began = time.monotonic()
        self.done = self.total = self.finished = 0

    def update(self, done: int, total: int) -> None:
        self.done, self.total = done, total
        self.bar.n, self.bar.total = done, total
        # The speed counts only jobs of this call.
        self.bar.initial = done - self.finished
        self.bar.refresh()

    def tell(self, job: Job, text: str) -> None:
        self.done += 1
        self.finished += 1
        seconds = (time.monotonic() - self.began) / self.finished * (self.total - self.done)
        name = " ".join(str(value) for value in job.key.values() if str(value))
        left = tqdm.format_interval(seconds)
        tqdm.write(f"{name}: {text} ({self.done} of {self.total} known so far, {left} left)")


def _startable(todo: list[Job], running: list[Job], workers: int) -> list[Job]:
    """The next jobs that may start now, in the order of `todo`."""
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
    """Worker processes. If this process is interrupted or killed, they end.

    The runs of train.py that they have started end with them.
    """
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, spawn, initializer=_begin_worker)
    try:
        yield pool
    except BaseException:
        for worker in multiprocessing.active_children():
            assert worker.pid is not None
            # A worker that has just started has no process group yet.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(worker.pid, signal.SIGTERM)
            worker.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_worker() -> None:
    """Puts a worker and all that it starts into one process group, to end them together."""
    os.setpgrp()
    threading.Thread(target=_end_with_the_runner, daemon=True).start()


def _end_with_the_runner() -> None:
    """Waits until the parent process ends, and then ends the process group."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.killpg(0, signal.SIGTERM)
