"""Measures how long it takes to write and to open a report page of many long runs.

    python -m benchmarks.report_page out/demo/cosine --runs=50 --steps=100000

The runs are copies of one run, with made-up metrics of so many logged steps. The opening time is
that of a screenshot by headless Chromium, minus that of an empty page. It is the smallest of ROUNDS
measurements. Writes results/report_page.csv.
"""

import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from analysis import tables
from analysis.runs import find_runs
from base.command_line import cli, parse
from base.errors import UserError, too_small
from base.files import result_file
from training.metrics import read_metrics

ROUNDS = 5


@dataclass
class PageConfig:
    """A page of many runs"""

    run: list[str] = field(default_factory=list)
    """the run to copy"""
    runs: int = 50
    """number of copies"""
    steps: int = 100_000
    """logged steps of each copy"""
    out: str = "results/report_page.csv"
    """the CSV file"""

    def problems(self) -> list[str]:
        return too_small(self, runs=1, steps=1)


def opening(page: Path, width: int) -> float:
    """Seconds from the start of Chromium to a screenshot of a page."""
    command = [
        "chromium",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--window-size={width},2000",
        f"--screenshot={page}.png",
    ]
    times = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        subprocess.run([*command, page.as_uri()], check=True, capture_output=True)
        times.append(time.perf_counter() - began)
    return min(times)


def write_metrics(path: Path, pattern: list[dict], steps: int) -> None:
    """Writes made-up metrics of a long run, by repeating the logged steps of a short one."""
    with open(path, "w") as file:
        for i in range(steps):
            fallen = 4 + 5 * math.exp(-i / 9999)
            line = {**pattern[i % len(pattern)], "iter": i, "elapsed_s": 0.1 * i}
            line["train_loss"] = fallen + line["train_loss"] % 0.3
            file.write(json.dumps(line) + "\n")
            if i % (steps // 100 or 1) == 0:
                evaluation = {"iter": i, "val_loss": fallen, "perplexity": 99.0}
                file.write(json.dumps(evaluation) + "\n")


def copies(run: Path, metrics: Path, count: int, home: Path) -> list[Path]:
    """Copies the folder of a run `count` times. All copies share other metrics."""
    found = [home / f"run{i:02}" for i in range(count)]
    for copy in found:
        shutil.copytree(run, copy, ignore=shutil.ignore_patterns("metrics.jsonl"))
        (copy / "metrics.jsonl").symlink_to(metrics)
    return found


def main() -> None:
    (c,) = parse(sys.argv[1:], PageConfig, words="run")
    out = result_file(c.out)
    (run, *others) = find_runs(c.run)
    if others:
        raise UserError("name one run")
    if not shutil.which("chromium"):
        raise UserError("no chromium: apt-get install chromium")
    logged = [m for m in read_metrics(run.path) if "train_loss" in m]
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        metrics, page, empty = (home / n for n in ("metrics.jsonl", "report.html", "empty.html"))
        write_metrics(metrics, logged, c.steps)
        runs = copies(run.path, metrics, c.runs, home)
        empty.write_text("<!doctype html><title>empty</title>")
        report = [sys.executable, "-m", "analysis.report", *map(str, runs)]
        began = time.perf_counter()
        subprocess.run([*report, f"--out={page}", "--samples=0", "--device=cpu"], check=True)
        row = {
            "runs": c.runs,
            "steps": c.steps,
            "write_s": f"{time.perf_counter() - began:.1f}",
            "mb": f"{page.stat().st_size / 1e6:.1f}",
        }
        for width in (1400, 400):
            row[f"open_{width}_s"] = f"{opening(page, width) - opening(empty, width):.2f}"
    tables.write_csv(out, [row])
    print(tables.text([row], list(row)))
    print(f"wrote {out}")


if __name__ == "__main__":
    cli(main)
