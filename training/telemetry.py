"""What a run tells: metrics.jsonl, the console, TensorBoard and W&B, energy, MFU,
environment.json."""

import csv
import errno
import importlib.metadata
import json
import logging
import math
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import torch

from base.errors import UserError
from base.files import write_whole

# Peak dense bf16 FLOP/s by the name torch.cuda.get_device_name gives (vendors' data sheets, without
# sparsity)
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "A40": 149.7e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
    "V100": 125e12,  # fp16
    "T4": 65e12,  # fp16
}


def peak_flops(device: str) -> float | None:
    """Peak FLOP/s of a CUDA device, None where the name is not known: no MFU rather than a wrong
    one."""
    if not device.startswith("cuda"):
        return None
    name = torch.cuda.get_device_name(device)
    return next(
        (
            flops
            for key, flops in PEAK_FLOPS.items()
            if re.search(rf"\b{key}\b", name) and "Laptop" not in name
        ),
        None,
    )


def norms(tensors: list[torch.Tensor]) -> torch.Tensor:
    """The Euclidean norm of each tensor, float32 (n,). On a CPU, PyTorch's norm of 50,304 x 768
    numbers is 0.3 % too small; row by row it is exact to rounding."""
    if tensors[0].device.type == "cpu":
        return torch.stack([t.norm(dim=-1).norm() for t in tensors])
    return torch.stack(torch._foreach_norm(tensors))


class Metrics:
    """Appends one JSON object a line to metrics.jsonl, and mirrors it to TensorBoard and W&B where
    wanted.

    Opening at `iteration` drops the lines that a run from there writes again: later evaluations,
    and the steps from it on.
    """

    def __init__(
        self,
        out_dir: Path,
        iteration: int,
        tensorboard: bool = False,
        wandb: bool = False,
        config: dict | None = None,
    ):
        path = out_dir / "metrics.jsonl"
        if path.is_file():
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            write_whole(path, "".join(f"{line}\n" for line in lines if _stays(line, iteration)))
        self.file = open(path, "ab", buffering=0)
        self.backlog = b""  # lines that a full disk did not take yet
        self.board = self.wandb = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(out_dir / "tensorboard", purge_step=iteration)
        if wandb:
            import wandb as module

            self.wandb = module.init(dir=out_dir, name=out_dir.name, config=config)

    def write(self, record: dict) -> None:
        """A record with `iter`; a number that is not finite is written as its name, for JSON has
        none."""
        clean = {
            k: repr(v) if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in record.items()
        }
        self._append(json.dumps(clean).encode() + b"\n")
        numbers = {k: v for k, v in record.items() if isinstance(v, int | float) and k != "iter"}
        if self.board:
            for key, value in numbers.items():
                self.board.add_scalar(key, value, record["iter"])
        if self.wandb:
            self.wandb.log(numbers, step=record["iter"])

    def _append(self, line: bytes) -> None:
        """A full disk loses no line and tears none: what does not fit waits for the next one."""
        warned = bool(self.backlog)
        self.backlog += line
        end = os.fstat(self.file.fileno()).st_size
        try:
            try:
                if self.file.write(self.backlog) < len(self.backlog):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                self.backlog = b""
            except OSError:
                self.file.truncate(end)
                raise
        except OSError as error:
            # The truncation fails too if the file system has become read-only.
            if not warned:
                print(
                    f"metrics.jsonl cannot be written ({error.strerror}): its lines wait in memory",
                    file=sys.stderr,
                    flush=True,
                )

    def sync(self) -> None:
        """Flushes the lines to the disk: a checkpoint's lines are there before the checkpoint
        is."""
        self._append(b"")
        try:
            os.fsync(self.file.fileno())
        except OSError as error:
            print(
                f"metrics.jsonl cannot be flushed to the disk ({error.strerror})",
                file=sys.stderr,
                flush=True,
            )

    def close(self) -> None:
        self._append(b"")
        if self.backlog:
            print(
                f"the last {self.backlog.count(10)} lines of metrics.jsonl could not be written",
                file=sys.stderr,
                flush=True,
            )
        self.file.close()
        if self.board:
            self.board.close()
        if self.wandb:
            self.wandb.finish()


def _parsed(line: str) -> dict | None:
    """The JSON object in a line; None for what is not one, such as the torn last line of a killed
    run."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _stays(line: str, iteration: int) -> bool:
    """Whether a line of metrics.jsonl is kept when a run is resumed at an iteration. A line of
    another version, without `iter`, is kept."""
    if (found := _parsed(line)) is None:
        return False
    at = found.get("iter")
    if not isinstance(at, int) or at < iteration:
        return True
    return at == iteration and "val_loss" in found


def _number(value: object) -> float | int | None:
    """A number of metrics.jsonl, where `nan` and `inf` are texts; None for anything else."""
    if isinstance(value, int | float):
        return value
    if value in ("nan", "inf", "-inf"):
        return float(value)
    return None


def read_metrics(run: str | Path) -> list[dict]:
    """The lines of a run's metrics.jsonl that have `iter`, with all keys whose values are numbers.

    A version of this project may write keys that another one does not know, so no key but `iter`
    need be there. An incomplete last line is skipped with a note on stderr. Raises: UserError when
    there are no lines, or when another line is broken.
    """
    path = Path(run) / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{run} has no metrics.jsonl: is it a run's folder?")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    records = []
    for number, line in enumerate(lines, 1):
        found = _parsed(line)
        if found is None and number < len(lines):
            raise UserError(
                f"{path}: line {number} is not a metrics record: {line[:60]!r}; repair or delete"
                " that line"
            )
        if found is None:
            print(f"{path}: the last line is incomplete and skipped", file=sys.stderr)
        elif isinstance(found.get("iter"), int):
            values = {key: _number(value) for key, value in found.items()}
            records.append({key: value for key, value in values.items() if value is not None})
    if not records:
        raise UserError(f"{path} is empty")
    return records


def clock(metrics: list[dict], tokens: int) -> list[tuple[float, float]]:
    """For each line of metrics.jsonl: seconds since the run's first step, evaluations included, and
    seconds in steps alone. `elapsed_s` begins anew when a run is resumed; a step's seconds are its
    share of its log interval. Ask `timed` first whether the lines have both.

    Args: tokens: of an iteration.
    """
    found, elapsed, before, steps = [], 0.0, 0.0, 0.0
    for m in metrics:
        if "elapsed_s" in m:
            now = m["elapsed_s"]
            elapsed, before = elapsed + (now - before if now >= before else now), now
            steps += tokens / m["tokens_per_s"] if m.get("tokens_per_s") else 0.0
        found.append((elapsed, steps))
    return found


def timed(metrics: list[dict]) -> bool:
    """Whether each step says when it was and how fast, as `clock` needs it."""
    steps = [m for m in metrics if "train_loss" in m]
    return bool(steps) and all("elapsed_s" in m and "tokens_per_s" in m for m in steps)


def check_loggers(tensorboard: bool, wandb: bool) -> list[str]:
    """Problems: a logger is wanted whose package is missing."""
    wanted = {"tensorboard": tensorboard, "wandb": wandb}
    return [
        f"{name}=true needs the package: pip install {name}"
        for name, on in wanted.items()
        if on and not _installed(name)
    ]


def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


class Emissions:
    """CodeCarbon's offline tracker on one node: energy in emissions.csv. CPUs without power
    counters are estimated by it, and RAM too.

    The row of this process is brought up to date at every `flush`, so that a killed run loses
    little. CodeCarbon rewrites its whole file then, and moves a file with other columns out of
    sight. So the file of an earlier start is renamed first: no row of it changes.
    """

    def __init__(self, out_dir: Path, country: str, node: int = 0):
        from codecarbon import OfflineEmissionsTracker

        out_dir.mkdir(parents=True, exist_ok=True)  # another node's disk may not have it yet
        logging.getLogger("codecarbon").setLevel(logging.ERROR)
        file = out_dir / ("emissions.csv" if node == 0 else f"emissions_node{node}.csv")
        keep_earlier(file)
        self.tracker = OfflineEmissionsTracker(
            country_iso_code=country,
            project_name=out_dir.name,
            output_dir=str(out_dir),
            output_file=file.name,
            on_csv_write="update",  # one row, however often it is flushed
            log_level="error",
            allow_multiple_runs=True,
        )
        self.tracker.start()

    def flush(self) -> None:
        self.tracker.flush()

    def stop(self) -> tuple[float, float] | None:
        """-> (kWh, kg CO2e) of this process's start; None where CodeCarbon could not write them."""
        self.tracker.stop()
        data = getattr(self.tracker, "final_emissions_data", None)
        return (data.energy_consumed, data.emissions) if data else None


def keep_earlier(file: Path) -> None:
    """Renames `emissions.csv` of an earlier start to `emissions_start1.csv`, or to the next number
    that is free."""
    if not file.is_file() or file.stat().st_size == 0:
        return
    number = 1
    while (kept := file.with_stem(f"{file.stem}_start{number}")).exists():
        number += 1
    file.rename(kept)


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *words], capture_output=True, text=True, cwd=Path(__file__).parent, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def environment(device: str, world: int) -> dict:
    """Versions, git commit, device and command line."""
    versions = {
        p: importlib.metadata.version(p)
        for p in ("torch", "numpy", "tokenizers", "tiktoken", "safetensors", "codecarbon")
        if _installed(p)
    }
    status = _git("status", "--porcelain")
    return {
        "python": platform.python_version(),
        "versions": versions,
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": None if status is None else bool(status),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device)
        if device.startswith("cuda")
        else f"{device} ({platform.processor() or platform.machine()})",
        "threads": torch.get_num_threads(),
        "world_size": world,
        "torchrun": os.environ.get("TORCHELASTIC_RUN_ID"),
        "command": " ".join(sys.argv),
    }


def write_environment(out_dir: Path, now: dict, iteration: int, changed: dict) -> None:
    """Writes environment.json: what this start of the run has, and what its earlier starts had,
    oldest first.

    Args:
        now: an `environment`. iteration: where this start begins. changed: settings that it
            changes, key -> [before, now].
    """
    path, earlier = out_dir / "environment.json", []
    if path.is_file():
        before = _parsed(path.read_text(encoding="utf-8", errors="replace"))
        if before is None or not isinstance(before.get("earlier", []), list):
            path.rename(path.with_name("damaged_environment.json"))
        else:
            earlier = [*before.pop("earlier", []), before]
    write_whole(
        path,
        json.dumps({**now, "iter": iteration, "changed": changed, "earlier": earlier}, indent=2),
    )


def listed(items: list, most: int = 5) -> str:
    """`a, b, c and 4 more`."""
    return ", ".join(map(str, items[:most])) + (
        f" and {len(items) - most} more" if len(items) > most else ""
    )


def duration(seconds: float) -> str:
    """`3 s`, `4 min 10 s`, `2 h 5 min`."""
    s = round(seconds)
    if s < 60:
        return f"{s} s"
    return f"{s // 60} min {s % 60} s" if s < 3600 else f"{s // 3600} h {s % 3600 // 60} min"


# What a run used: CodeCarbon's columns, and the unit that another version may put behind the name
ENERGY = {
    "energy_consumed": "kwh",
    "emissions": "kg",
    "cpu_energy": "kwh",
    "gpu_energy": "kwh",
    "ram_energy": "kwh",
    "duration": "s",
}
MEASURED = ("energy_consumed", "emissions")  # a file without these is not CodeCarbon's


def _used(row: dict[str, str | None]) -> dict[str, float]:
    """The quantities of ENERGY in a row of any version of CodeCarbon: a part that it lacks is 0, a
    duration that it lacks is NaN.

    Raises: ValueError, saying what is wrong with the row.
    """
    if None in row:
        raise ValueError("more cells than the header")
    found = {}
    for key, unit in ENERGY.items():
        text = row.get(key) or row.get(f"{key}_{unit}")
        if not text and key in MEASURED:
            raise ValueError(f"no {key}")
        found[key] = float(text or (math.nan if key == "duration" else 0.0))
    return found


def _rows_of(path: Path) -> list[dict[str, float]]:
    """The rows of one file of CodeCarbon. UserError for a damaged one."""
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        reader, rows = csv.DictReader(file), []
        for row in reader:
            try:
                rows.append(_used(row))
            except ValueError as error:
                where = f"line {reader.line_num}: {error}"
                raise UserError(
                    f"{path} is not a CodeCarbon table ({where}): repair the line or move the file"
                    " away"
                ) from None
    return rows


def energy(run: Path) -> dict[str, float] | None:
    """What a run used, by the keys of ENERGY: added up over all nodes and starts, whatever version
    of CodeCarbon wrote them.

    The duration is that of the node that ran longest, and NaN where a row has none. None where
    nothing was measured. UserError for a damaged file. A node's starts lie in `emissions.csv`,
    `emissions_start1.csv` and `emissions.csv.bak`, CodeCarbon's own copy of a file that had other
    columns.
    """
    nodes: dict[str, list[dict[str, float]]] = {}
    for path in sorted(run.glob("emissions*.csv*")):
        if re.search(r"\.csv(_\d+\.bak|\.bak)?$", path.name):
            node = re.sub(r"_start\d+$", "", path.name.partition(".csv")[0])
            nodes.setdefault(node, []).extend(_rows_of(path))
    totals = [
        {key: sum(row[key] for row in rows) for key in ENERGY} for rows in nodes.values() if rows
    ]
    if not totals:
        return None
    used = {key: sum(total[key] for total in totals) for key in ENERGY}
    durations = [total["duration"] for total in totals]
    used["duration"] = math.nan if any(map(math.isnan, durations)) else max(durations)
    return used
