"""Mutation testing: puts small faults into the code, one at a time, and checks that a test fails.

    # 60 faults, the same for the same seed; adds missing rows to results/mutants.csv
    python -m tests.faults.mutants
    python -m tests.faults.mutants --count=10 --seed=1 --out=mutants.csv

A fault changes an operator, a comparison, a constant or a condition in a function of harmonic/,
model.py or training/. The tests for that file run on a copy of the repository until one fails. If
none fails, either the fault does not matter or a test is missing: read the row. The table names the
test that failed, so you can compare two versions of the tests.
"""

import ast
import copy
import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from analysis import tables
from base.command_line import cli, parse
from base.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
# A file, or the files in a folder -> their tests. The tests most likely to fail come first.
ROOMS = {
    "harmonic/backends": ["tests/harmonic"],
    "harmonic": ["tests/harmonic", "tests/test_swap.py"],
    "model.py": [
        "tests/test_model.py", "tests/test_sample.py", "tests/test_sampling.py",
        "tests/test_train.py",
    ],
    "training": [
        "tests/test_data.py", "tests/test_optimizers.py", "tests/test_train.py",
        "tests/test_resume.py", "tests/test_stops.py", "tests/test_processes.py",
        "tests/test_settings.py", "tests/test_instruments.py", "tests/test_moved_runs.py",
    ],
}  # fmt: skip
# Code that only a GPU runs, or that makes text for a person.
LEFT_OUT = ("triton.py", "advice.py", "profiling.py", "modeling_harmonic.py")
COLUMNS = ["seed", "number", "file", "line", "fault", "noticed_by", "seconds"]
SWAPPED = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.And: ast.Or, ast.Or: ast.And, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip


@dataclass
class MutantsConfig:
    """How many faults"""

    count: int = 60
    """number of faults"""
    seed: int = 0
    """chooses the faults"""
    limit: float = 900.0
    """seconds for the tests of a fault; if they take longer, the fault counts as noticed"""
    out: str = "results/mutants.csv"
    """the table; its faults are not tried again"""

    def problems(self) -> list[str]:
        return [] if self.count > 0 else [f"count={self.count} must be at least 1"]


@dataclass
class Mutant:
    """A fault: an expression, at bytes start to end of a file, and the text that replaces it."""

    file: str
    line: int
    fault: str
    start: int
    end: int
    text: str

    @property
    def source(self) -> str:
        """The text of the file with the fault."""
        data = (ROOT / self.file).read_bytes()
        return (data[: self.start] + self.text.encode() + data[self.end :]).decode()


def changed(node: ast.AST) -> ast.AST | None:
    """A copy of an expression with one fault; None if it is not a kind that gets one."""
    new = copy.deepcopy(node)
    if isinstance(new, ast.Compare) and len(new.ops) == 1 and type(new.ops[0]) in SWAPPED:
        new.ops = [SWAPPED[type(new.ops[0])]()]
    elif isinstance(new, ast.BinOp) and type(new.op) in SWAPPED:
        new.op = SWAPPED[type(new.op)]()
    elif isinstance(new, ast.BoolOp):
        new.op = SWAPPED[type(new.op)]()
    elif isinstance(new, ast.UnaryOp) and isinstance(new.op, ast.Not | ast.USub):
        return new.operand
    elif isinstance(new, ast.Constant) and isinstance(new.value, bool):
        new.value = not new.value
    elif isinstance(new, ast.Constant) and isinstance(new.value, int | float):
        new.value = new.value + 1 if isinstance(new.value, int) else new.value * 2 or 1.0
    else:
        return None
    return new


def mutants_of(path: Path) -> list[Mutant]:
    """All possible faults of a file."""
    source = path.read_text()
    lines = source.splitlines(keepends=True)
    offsets = [0]
    for line in lines:
        offsets.append(offsets[-1] + len(line.encode()))
    data, found = source.encode(), []
    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, ast.FunctionDef):
            continue
        nodes = [inner for statement in function.body for inner in ast.walk(statement)]
        # Python 3.11 does not tell the positions of expressions in an f-string.
        texts = {id(i) for n in nodes if isinstance(n, ast.JoinedStr) for i in ast.walk(n)}
        for node in nodes:
            if not isinstance(node, ast.expr) or id(node) in texts:
                continue
            if (new := changed(node)) is None:
                continue
            start = offsets[node.lineno - 1] + node.col_offset
            end = offsets[node.end_lineno - 1] + node.end_col_offset
            before, after = " ".join(data[start:end].decode().split()), ast.unparse(new)
            place = str(path.relative_to(ROOT)), node.lineno
            found.append(Mutant(*place, f"{before} -> {after}", start, end, f"({after})"))
    return found


def chosen(count: int, seed: int) -> list[Mutant]:
    """Chooses faults, equally many from each of ROOMS."""
    rng, rooms = random.Random(seed), []
    taken: set[Path] = set()
    for room in ROOMS:
        place = ROOT / room
        files = [place] if place.is_file() else sorted(place.rglob("*.py"))
        files = [f for f in files if f.name not in LEFT_OUT and f not in taken]
        taken |= set(files)
        mutants = [mutant for file in files for mutant in mutants_of(file)]
        rng.shuffle(mutants)
        rooms.append(mutants)
    found = [mutant for group in zip(*rooms, strict=False) for mutant in group]
    return found[:count]


def noticed_by(mutant: Mutant, tree: Path, limit: float) -> str:
    """The first test that fails with this fault; empty if all pass."""
    path = tree / mutant.file
    original = path.read_text()
    path.write_text(mutant.source)
    room = next(room for room in ROOMS if mutant.file.startswith(room))
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider"]
    try:
        done = subprocess.run(
            [*command, "--tb=no", *ROOMS[room]],
            cwd=tree, capture_output=True, text=True, timeout=limit,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return "it does not end"
    finally:
        path.write_text(original)
    if done.returncode == 0:
        return ""
    for line in done.stdout.splitlines():
        if line.startswith(("FAILED", "ERROR")):
            return line.split(" - ")[0].split(" ", 1)[1]
    if done.returncode < 0:
        return f"the tests end with signal {-done.returncode}"
    raise UserError(f"pytest ended with status {done.returncode}:\n{done.stdout[-1500:]}")


def main() -> None:
    (c,) = parse(sys.argv[1:], MutantsConfig)
    out = Path(c.out)
    rows = tables.read_csv(out, COLUMNS) if out.is_file() else []
    known = {(row["seed"], row["number"]) for row in rows}
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".git", ".venv", "out", "data"))
        for number, mutant in enumerate(tqdm(chosen(c.count, c.seed), disable=None)):
            if (str(c.seed), str(number)) in known:
                continue
            began = time.monotonic()
            test = noticed_by(mutant, tree, c.limit)
            row = {"seed": c.seed, "number": number, "file": mutant.file, "line": mutant.line}
            row |= {"fault": mutant.fault, "noticed_by": test or "nothing"}
            row["seconds"] = f"{time.monotonic() - began:.0f}"
            tables.append_csv(out, [row], COLUMNS)
            rows.append({key: str(value) for key, value in row.items()})
            tqdm.write(f"{mutant.file}:{mutant.line}: {mutant.fault}: {row['noticed_by']}")
    survivors = [row for row in rows if row["noticed_by"] == "nothing"]
    print(f"{len(rows) - len(survivors)} of {len(rows)} faults were noticed")


if __name__ == "__main__":
    cli(main)
