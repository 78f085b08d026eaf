"""What a run tells: metrics.jsonl, the console, TensorBoard and W&B, energy, MFU, environment.json."""

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

from training.config import UserError
from training.files import write_whole

# Peak dense bf16 FLOP/s by the name torch.cuda.get_device_name gives (vendors' data sheets, without sparsity)
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
    """Peak FLOP/s of a CUDA device, None where the name is not known: no MFU rather than a wrong one."""
    if not device.startswith("cuda"):
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for key, flops in PEAK_FLOPS.items() if re.search(rf"\b{key}\b", name) and "Laptop" not in name), None)


def norms(tensors: list[torch.Tensor]) -> torch.Tensor:
    """The Euclidean norm of each tensor, float32 (n,). On a CPU PyTorch adds a whole tensor up in so few parts that 50,304 x 768 numbers
    come out 0.3 % short; row by row the error is that of rounding."""
    if tensors[0].device.type == "cpu":
        return torch.stack([t.norm(dim=-1).norm() for t in tensors])
    return torch.stack(torch._foreach_norm(tensors))


class Metrics:
    """Appends one JSON object a line to metrics.jsonl, and mirrors it to TensorBoard and W&B where wanted.

    Opening at `iteration` drops the lines that a run from there writes again: later evaluations, and the steps from it on.
    """

    def __init__(self, out_dir: Path, iteration: int, tensorboard: bool = False, wandb: bool = False, config: dict | None = None):
        path = out_dir / "metrics.jsonl"
        if path.is_file():
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            records = ((line, _record(line)) for line in lines)
            kept = [line for line, r in records if r and (r["iter"] < iteration or (r["iter"] == iteration and "val_loss" in r))]
            write_whole(path, "".join(f"{line}\n" for line in kept))
        self.file = open(path, "ab", buffering=0)
        self.backlog = b""  # lines that a full disk did not take yet
        self.board = self.wandb = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(out_dir / "tensorboard", purge_step=iteration)
        if wandb:
            import wandb as module

            self.wandb = module.init(dir=out_dir, name=out_dir.name, config=config)

    def write(self, record: dict):
        """A record with `iter`; a number that is not finite is written as its name, for JSON has none."""
        clean = {k: repr(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self._append(json.dumps(clean).encode() + b"\n")
        numbers = {k: v for k, v in record.items() if isinstance(v, int | float) and k != "iter"}
        if self.board:
            for key, value in numbers.items():
                self.board.add_scalar(key, value, record["iter"])
        if self.wandb:
            self.wandb.log(numbers, step=record["iter"])

    def _append(self, line: bytes):
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
        except OSError as error:  # of the truncation too, where the file system has turned read-only
            if not warned:
                print(f"metrics.jsonl cannot be written ({error.strerror}): its lines wait in memory", file=sys.stderr, flush=True)

    def sync(self):
        """Flushes the lines to the disk: a checkpoint's lines are there before the checkpoint is."""
        self._append(b"")
        try:
            os.fsync(self.file.fileno())
        except OSError as error:
            print(f"metrics.jsonl cannot be flushed to the disk ({error.strerror})", file=sys.stderr, flush=True)

    def close(self):
        self._append(b"")
        if self.backlog:
            print(f"the last {self.backlog.count(10)} lines of metrics.jsonl could not be written", file=sys.stderr, flush=True)
        self.file.close()
        if self.board:
            self.board.close()
        if self.wandb:
            self.wandb.finish()


def _record(line: str) -> dict | None:
    """A line of metrics.jsonl, all of it numbers; None for what is not one, such as the torn last line of a killed run."""
    try:
        record = json.loads(line)
        whole = isinstance(record, dict) and isinstance(record.get("iter"), int)
        return {k: v if isinstance(v, int) else float(v) for k, v in record.items()} if whole else None  # "nan" and "inf" are texts
    except (ValueError, TypeError):
        return None


def read_metrics(run) -> list[dict]:
    """The lines of a run's metrics.jsonl, numbers all; a broken last line is skipped and said so. UserError when there are none or others
    are broken."""
    path = Path(run) / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{run} has no metrics.jsonl: is it a run's folder?")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    records = []
    for number, line in enumerate(lines, 1):
        if (record := _record(line)) is not None:
            records.append(record)
        elif number < len(lines):
            raise UserError(f"{path}: line {number} is not a metrics record: {line[:60]!r}")
        else:
            print(f"{path}: the last line is incomplete and skipped", file=sys.stderr)
    if not records:
        raise UserError(f"{path} is empty")
    return records


def clock(metrics: list[dict], tokens: int) -> list[tuple[float, float]]:
    """For each line of metrics.jsonl: seconds since the run's first step, evaluations included, and seconds in steps alone. `elapsed_s`
    begins anew when a run is resumed; a step's seconds are its share of its log interval.

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


def check_loggers(tensorboard: bool, wandb: bool) -> list[str]:
    """Problems: a logger is wanted whose package is missing."""
    wanted = {"tensorboard": tensorboard, "wandb": wandb}
    return [f"{name}=true needs the package: pip install {name}" for name, on in wanted.items() if on and not _installed(name)]


def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


class Emissions:
    """CodeCarbon's offline tracker on one node: energy in emissions.csv. CPUs without power counters are estimated by it, and RAM too.

    The row of this process is brought up to date at every `flush`, so that a killed run loses little.
    """

    def __init__(self, out_dir: Path, country: str, node: int = 0):
        from codecarbon import OfflineEmissionsTracker

        out_dir.mkdir(parents=True, exist_ok=True)  # another node's disk may not have it yet
        logging.getLogger("codecarbon").setLevel(logging.ERROR)
        self.tracker = OfflineEmissionsTracker(
            country_iso_code=country,
            project_name=out_dir.name,
            output_dir=str(out_dir),
            output_file="emissions.csv" if node == 0 else f"emissions_node{node}.csv",
            on_csv_write="update",  # one row for each start of the run
            log_level="error",
            allow_multiple_runs=True,
        )
        self.tracker.start()

    def flush(self):
        self.tracker.flush()

    def stop(self) -> tuple[float, float] | None:
        """-> (kWh, kg CO2e) of this process's start; None where CodeCarbon could not write them."""
        self.tracker.stop()
        data = getattr(self.tracker, "final_emissions_data", None)
        return (data.energy_consumed, data.emissions) if data else None


def _git(*words) -> str | None:
    try:
        done = subprocess.run(["git", *words], capture_output=True, text=True, cwd=Path(__file__).parent, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def environment(device: str, world: int) -> dict:
    """Versions, git commit, device and command line."""
    versions = {
        p: importlib.metadata.version(p) for p in ("torch", "numpy", "tokenizers", "tiktoken", "safetensors", "codecarbon") if _installed(p)
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


def listed(items: list, most: int = 5) -> str:
    """`a, b, c and 4 more`."""
    return ", ".join(map(str, items[:most])) + (f" and {len(items) - most} more" if len(items) > most else "")


def duration(seconds: float) -> str:
    """`3 s`, `4 min 10 s`, `2 h 5 min`."""
    s = round(seconds)
    if s < 60:
        return f"{s} s"
    return f"{s // 60} min {s % 60} s" if s < 3600 else f"{s // 3600} h {s % 3600 // 60} min"


ENERGY = ("energy_consumed", "emissions", "cpu_energy", "gpu_energy", "ram_energy", "duration")  # CodeCarbon's kWh, kg CO2e, seconds


def energy(run: Path) -> dict[str, float] | None:
    """The columns of ENERGY added up over all nodes and starts of a run, 0 for those that its files do not have; the duration is that of
    the node that ran longest. None where nothing was measured. UserError for a damaged file."""
    nodes = []
    for path in sorted(run.glob("emissions*.csv")):
        try:
            with open(path, newline="", encoding="utf-8") as file:
                rows = [{key: float(row[key]) for key in ENERGY if key in ENERGY[:2] or key in row} for row in csv.DictReader(file)]
        except (KeyError, ValueError, TypeError):
            raise UserError(f"{path} is not a CodeCarbon table") from None
        if rows:
            nodes.append({key: sum(row.get(key, 0.0) for row in rows) for key in ENERGY})
    return {key: (max if key == "duration" else sum)(node[key] for node in nodes) for key in ENERGY} if nodes else None
