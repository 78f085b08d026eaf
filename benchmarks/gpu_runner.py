"""Runs the steps of benchmarks/gpu.py in other processes, and stores their rows in a table.

A step is a function that returns the cells of one row. Steps run in order. If one crashes, hangs or
breaks its CUDA context, its process is replaced, and the other steps are not affected. Measurements
run alone. Checks run in parallel.
"""

import contextlib
import gc
import hashlib
import importlib.metadata
import importlib.util
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Protocol

import torch

from analysis import tables
from base.errors import UserError

ROOT = Path(__file__).parent.parent
LIMIT = 170.0  # A step is stopped after so many seconds. Each should take less than two minutes.
# Packages that the scripts import, besides PyTorch and NumPy: module -> name on PyPI.
PACKAGES = {
    "jsonargparse": "jsonargparse",
    "docstring_parser": "docstring-parser",
    "yaml": "pyyaml",
    "safetensors": "safetensors",
    "tqdm": "tqdm",
    "psutil": "psutil",
}


def version(package: str) -> str:
    """The installed version of a package; empty if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


class Absent(Exception):
    """A package or data that a step needs is missing."""


class Scale(Protocol):
    """The first argument of every step: its device and sizes."""

    @property
    def device(self) -> str: ...


@dataclass(frozen=True)
class Step:
    """A step, which makes one row.

    seconds: the estimated time on an H100.
    file: the file that measures it.
    needs: modules of PACKAGES.
    beside: whether it may run in parallel with other such steps.
    speed_over: the row whose tokens_per_s divides its own to give the ratio.
    """

    step: str
    what: str
    seconds: int
    measure: Callable[..., dict]
    arguments: tuple = ()
    file: str = "benchmarks/gpu.py"
    needs: tuple[str, ...] = ()
    precision: str = ""
    beside: bool = False
    speed_over: str = ""

    def key(self) -> dict[str, str]:
        """The columns that identify the row, without the card."""
        return {
            "code": code(self.file),
            "step": self.step,
            "what": self.what,
            "precision": self.precision,
        }


# The table


COLUMNS = [
    "card", "code", "step", "what", "precision", "status", "forward_ms", "step_ms", "ratio",
    "tokens_per_s", "mfu", "peak_mib",
    "joules_per_token", "loss_error", "gradient_error", "val_loss", "seconds", "torch", "triton",
    "note",
]  # fmt: skip
KEY = ("card", "code", "step", "what", "precision")


@cache
def code(file: str) -> str:
    """12 digits of a sha256 of the measured code and of the file that measures it."""
    paths = [
        *ROOT.glob("harmonic/**/*.py"),
        *ROOT.glob("training/*.py"),
        ROOT / "base/machine.py",
        ROOT / "model.py",
        ROOT / "train.py",
        ROOT / file,
    ]
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


class Table:
    """The rows on the disk. `index` has the newest row for each key."""

    def __init__(self, path: Path):
        self.path = path
        self.index: dict[tuple, dict] = {}
        if not path.is_file():
            return
        try:
            rows = tables.read_csv(path, COLUMNS)
        except UserError as error:
            sys.exit(str(error))
        for row in rows:
            self.index[tuple(row[k] for k in KEY)] = row

    def find(self, key: dict) -> dict | None:
        """The newest row of a key, or None."""
        return self.index.get(tuple(key[k] for k in KEY))

    def add(self, row: dict) -> None:
        """Appends a row. A step that is absent for the same reason as before gets no new row."""
        row = {column: str(row.get(column, "")) for column in COLUMNS}
        before = self.find(row)
        self.index[tuple(row[k] for k in KEY)] = row
        if (
            before
            and before["status"] == row["status"] == "absent"
            and before["note"] == row["note"]
        ):
            return
        tables.append_csv(self.path, [row], COLUMNS)

    def ratio(self, row: dict, to: str) -> str:
        """tokens_per_s divided by that of the newest row called `to` on the same card."""
        others = [
            r
            for r in self.index.values()
            if (r["card"], r["what"], r["status"]) == (row["card"], to, "ok")
        ]
        if row["what"] == to or not others:
            return ""
        return f"{float(row['tokens_per_s']) / float(others[-1]['tokens_per_s']):.2f}"


def shown(rows: list[dict]) -> str:
    """The rows as one table for each step, without empty columns."""
    blocks = []
    for name in dict.fromkeys(r["step"] for r in rows):
        mine = [r for r in rows if r["step"] == name]
        shown = [{**r, "note": r["note"][:150]} for r in mine]
        columns = [c for c in COLUMNS[3:] if c not in ("torch", "triton")]
        columns = [c for c in columns if any(r[c] for r in mine)]
        blocks.append(f"{name}\n{tables.text(shown, columns)}")
    return "\n\n".join(blocks)


# The processes


def answer(step: Step, scale: Scale) -> dict:
    """Runs a step and returns its cells."""
    began = time.perf_counter()
    try:
        if missing := [PACKAGES[p] for p in step.needs if importlib.util.find_spec(p) is None]:
            raise Absent(f"needs {', '.join(missing)}")
        gc.collect()
        if scale.device == "cuda":
            torch.cuda.empty_cache()
        row = {"status": "ok", **step.measure(scale, *step.arguments)}
    except Absent as reason:
        row = {"status": "absent", "note": str(reason)}
    except Exception as error:  # After any error the other steps still run.
        traceback.print_exc()
        row = {
            "status": "failed",
            "note": f"{type(error).__name__}: {' '.join(str(error).split())}"[-1000:],
        }
    return {**row, "seconds": f"{time.perf_counter() - began:.1f}"}


def serve(pipe: Connection, scale: Scale) -> None:
    """The loop of a lane's process: it receives steps and sends their cells."""
    os.setsid()  # So that all processes that it starts can be killed with it.
    # Makes garbage collection faster, which memory measurements use: it skips imported modules.
    gc.freeze()
    with contextlib.suppress(EOFError):  # There are no more steps, or the parent has ended.
        while True:
            pipe.send(answer(pipe.recv(), scale))
    gc.unfreeze()


class Lane:
    """A process that runs steps one after the other."""

    def __init__(self, scale: Scale):
        self.step: Step | None = None  # The running step; None while it waits for one.
        self.ends = 0.0
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=serve, args=(other, scale))
        self.process.start()
        other.close()

    def begin(self, step: Step, ends: float) -> None:
        """Starts a step, which may run until `ends`."""
        self.step, self.ends = step, ends
        self.pipe.send(step)

    def result(self) -> dict | None:
        """The cells of its step if that has ended, failed or run too long; else None."""
        if self.pipe.poll():
            try:
                return self.pipe.recv()
            except EOFError:
                self.process.join(10)
                return {
                    "status": "failed",
                    "note": f"the process ended with status {self.process.exitcode}",
                }
        if time.monotonic() > self.ends:
            return {"status": "failed", "note": "it took too long and was ended"}
        return None

    def stop(self) -> None:
        """Ends the process and all processes that it has started."""
        self.pipe.close()
        if self.step is None:  # It waits for a step, and ends because the pipe is closed.
            self.process.join(3)
        assert self.process.pid is not None
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join()


class Lanes:
    """All lanes. Measurements run alone. Up to `most` checks run in parallel."""

    def __init__(self, scale: Scale, most: int):
        self.scale, self.most = scale, most
        self.busy: list[Lane] = []
        self.idle: list[Lane] = []

    def room(self, step: Step) -> bool:
        """Whether a step may start now."""
        together = (
            step.beside
            and all(lane.step and lane.step.beside for lane in self.busy)
            and len(self.busy) < self.most
        )
        return not self.busy or together

    def begin(self, step: Step, ends: float) -> None:
        """Starts a step in a free process, or in a new one."""
        self.idle = [lane for lane in self.idle if lane.process.is_alive()]
        lane = self.idle.pop() if self.idle else Lane(self.scale)
        if not step.beside:
            stop(self.idle)  # They would use memory of the GPU.
            self.idle = []
        lane.begin(step, ends)
        self.busy.append(lane)

    def ended(self) -> list[tuple[Step, dict]]:
        """Waits half a second. Returns the steps that have ended, with their cells."""
        wait([lane.pipe for lane in self.busy], timeout=0.5)
        found = []
        for lane in list(self.busy):
            if (row := lane.result()) is None:
                continue
            assert lane.step is not None
            found.append((lane.step, row))
            self.busy.remove(lane)
            if row["status"] == "failed":  # Its CUDA context may be broken.
                lane.stop()
            else:
                lane.step = None
                self.idle.append(lane)
        return found

    def stop(self) -> None:
        """Ends all lanes."""
        stop([*self.busy, *self.idle])


def stop(lanes: list[Lane]) -> None:
    """Ends lanes. All idle ones are told to end before any is waited for."""
    for lane in lanes:
        lane.pipe.close()
    for lane in lanes:
        lane.stop()


def run(todo: deque[Step], lanes: Lanes, table: Table, about: dict, deadline: float) -> list[dict]:
    """Runs the steps in order and returns their rows.

    A step that cannot end before the deadline is skipped. Shorter steps after it may still run.
    """
    rows, left_out = [], []
    while todo or lanes.busy:
        while todo and (lanes.room(todo[0]) or time.monotonic() + todo[0].seconds > deadline):
            step = todo.popleft()
            now = time.monotonic()
            if now + step.seconds > deadline:
                left_out.append(step)
            else:
                lanes.begin(step, min(now + LIMIT, deadline + 10))
        if not lanes.busy:
            continue
        for step, cells in lanes.ended():
            row = {**about, **step.key(), **cells}
            if step.speed_over and cells["status"] == "ok":
                row["ratio"] = table.ratio(row, step.speed_over)
            table.add(row)
            rows.append({column: str(row.get(column, "")) for column in COLUMNS})
            said = " ".join(f"{k} {v}" for k, v in cells.items() if k != "status" and v)
            print(
                f"{step.step:9}{step.what}{', ' * bool(step.precision)}{step.precision}:"
                f" {cells['status']}, {said}",
                flush=True,
            )
    if left_out:
        print(
            f"{len(left_out)} steps had no time left:"
            f" {', '.join(dict.fromkeys(s.step for s in left_out))}; call again"
        )
    return rows
