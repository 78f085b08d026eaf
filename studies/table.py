"""A study's table, a CSV file that says what has run, the loop that runs what it lacks, and the
search for a head's best setting."""

import csv
import math
import subprocess
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

from tqdm import tqdm

from base.errors import UserError


class Table:
    """Rows of texts on the disk; a subclass names the `columns`, and the `key` of them that tells
    what was asked for."""

    columns: list[str]
    key: tuple[str, ...]

    def __init__(self, path: Path):
        self.path = path
        self.header, self.rows = self._read() if path.is_file() else (None, [])
        self.index = {tuple(r[k] for k in self.key): r for r in self.rows}

    def _read(self) -> tuple[list[str] | None, list[dict]]:
        """The header, None of an empty file, and the rows. UserError for other columns, or for a
        line that is cut off."""
        with self.path.open(newline="") as file:
            reader = csv.DictReader(file)
            if reader.fieldnames not in (None, self.columns):
                columns = ", ".join(reader.fieldnames)
                raise UserError(
                    f"{self.path} has other columns ({columns}): it is of another version; move it"
                    " away"
                )
            rows = []
            for row in reader:
                if None in row or None in row.values():
                    raise UserError(
                        f"{self.path}: line {reader.line_num} has not as many cells as the header:"
                        " repair or delete it"
                    )
                rows.append(row)
            return reader.fieldnames, rows

    def find(self, setting: dict) -> dict | None:
        """The last row with this key, or None."""
        return self.index.get(tuple(str(setting[k]) for k in self.key))

    def add(self, *rows: dict):
        """Appends rows in one write."""
        rows = [{k: str(row.get(k, "")) for k in self.columns} for row in rows]
        whole = not self.path.is_file() or self.path.read_bytes()[-1:] in (b"", b"\n")
        with self.path.open("a", newline="") as file:
            file.write("" if whole else "\r\n")  # an editor left out the end of the last line
            writer = csv.DictWriter(file, self.columns)
            if not self.header:
                writer.writeheader()
            writer.writerows(rows)
        self.header = self.columns
        self.rows += rows
        self.index |= {tuple(r[k] for k in self.key): r for r in rows}


def commit() -> str:
    """The short name of the commit that is checked out; empty outside git."""
    return subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()


def number(text: str) -> float:
    """A loss of a table; one that is not finite, or missing, is worse than any."""
    value = float(text or "nan")
    return value if math.isfinite(value) else math.inf


def beyond(best: tuple, tried: list[tuple], steps: tuple) -> tuple | None:
    """The setting next to the best one on the outside of those tried, by the first axis on which it
    lies on the edge; None inside.

    Args: best and tried: settings, numbers each. steps: the factor to the next value of each.
    """
    for axis, step in enumerate(steps):
        others = lambda setting, axis=axis: (*setting[:axis], *setting[axis + 1 :])
        line = [
            t[axis]
            for t in tried
            if all(
                math.isclose(a, b, rel_tol=1e-3)
                for a, b in zip(others(t), others(best), strict=True)
            )
        ]
        factor = step if best[axis] == max(line) else 1 / step if best[axis] == min(line) else None
        if factor:
            return (*best[:axis], best[axis] * factor, *best[axis + 1 :])
    return None


def on_edge(sweeps: list[dict], steps: tuple) -> str:
    """How many winners still lie on the edge of what was tried; sweeps: dicts of settings -> their
    costs."""
    count = sum(
        beyond(min(found, key=found.get), list(found), steps) is not None for found in sweeps
    )
    return f"{count} of {len(sweeps)} winners of the sweep lie on the edge of what was tried."


def search(grid: list[tuple], steps: tuple, most: int, costs: Callable[[list[tuple]], list[float]]):
    """Tries all settings of a grid, then goes beyond it for as long as the best lies on the edge:
    `most` further settings at most."""
    found = dict(zip(grid, costs(grid), strict=True))
    for _ in range(most):
        if (further := beyond(min(found, key=found.get), list(found), steps)) is None:
            break
        found[further] = costs([further])[0]


def complete(table: Table, waves: list[list[dict]], call: Callable, tell: Callable, workers: int):
    """Runs the jobs that the table lacks, each in a process, wave after wave: what a wave has found
    may decide about the next.

    Args:
        waves: jobs, dicts that have the table's key. call: (job) -> a function and its arguments;
            it returns the job's rows.
        tell: (rows) -> what is printed of them.
    """
    waves, sha = [[job for job in wave if not table.find(job)] for wave in waves], commit()
    pool = ProcessPoolExecutor(workers, get_context("spawn"))
    try:
        with tqdm(total=sum(map(len, waves)), desc="batches", disable=None) as bar:
            for wave in waves:
                for future in as_completed([pool.submit(*call(job)) for job in wave]):
                    rows = [{**row, "commit": sha} for row in future.result()]
                    table.add(*rows)
                    tqdm.write(f"{' '.join(str(rows[0][k]) for k in table.key)}: {tell(rows)}")
                    bar.update()
    finally:
        pool.shutdown(cancel_futures=True)  # after a fault, what has not begun does not
