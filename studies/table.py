"""A study's table, a CSV file that says what has run, and the loop that runs what it lacks."""

import csv
import math
import subprocess
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

from tqdm import tqdm


class Table:
    """Rows of texts on the disk; a subclass names the `columns`, and the `key` of them that tells what was asked for."""

    columns: list[str]
    key: tuple[str, ...]

    def __init__(self, path: Path):
        self.path = path
        self.rows = list(csv.DictReader(path.open(newline=""))) if path.is_file() else []
        self.index = {tuple(r[k] for k in self.key): r for r in self.rows}

    def find(self, setting: dict) -> dict | None:
        """The last row with this key, or None."""
        return self.index.get(tuple(str(setting[k]) for k in self.key))

    def add(self, *rows: dict):
        """Appends rows in one write."""
        new, rows = not self.rows, [{k: str(row.get(k, "")) for k in self.columns} for row in rows]
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            if new:
                writer.writeheader()
            writer.writerows(rows)
        self.rows += rows
        self.index |= {tuple(r[k] for k in self.key): r for r in rows}


def commit() -> str:
    """The short name of the commit that is checked out; empty outside git."""
    return subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()


def number(text: str) -> float:
    """A loss of a table; one that is not finite, or missing, is worse than any."""
    value = float(text or "nan")
    return value if math.isfinite(value) else math.inf


def complete(table: Table, waves: list[list[dict]], call: Callable, tell: Callable, workers: int):
    """Runs the jobs that the table lacks, each in a process, wave after wave: what a wave has found may decide about the next.

    Args:
        waves: jobs, dicts that have the table's key. call: (job) -> a function and its arguments; it returns the job's rows.
        tell: (rows) -> what is printed of them.
    """
    waves, sha = [[job for job in wave if not table.find(job)] for wave in waves], commit()
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool, tqdm(total=sum(map(len, waves)), desc="batches", disable=None) as bar:
        for wave in waves:
            for future in as_completed([pool.submit(*call(job)) for job in wave]):
                rows = [{**row, "commit": sha} for row in future.result()]
                table.add(*rows)
                tqdm.write(f"{' '.join(str(rows[0][k]) for k in table.key)}: {tell(rows)}")
                bar.update()
