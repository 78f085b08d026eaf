"""Records of a run: metrics.jsonl, TensorBoard, W&B, energy, MFU and environment.json."""

import bisect
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
from base.output import say

# Peak bf16 FLOP/s without sparsity, from the vendors' data sheets. Keys are parts of the name that
# torch.cuda.get_device_name returns.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200 NVL": 835e12,
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
    "V100-PCIE": 112e12,  # fp16
    "V100": 125e12,  # fp16
    "T4": 65e12,  # fp16
}
# Cards of another speed, and parts of a card, whose names contain a key of PEAK_FLOPS.
OTHER_CARDS = re.compile(r"Laptop|4090 D|3090 Ti|\bMIG\b|GRID|-\d+[ABCQ]\b")


TEXTS = ("text", "val_text")  # What a resume can change besides settings.


def peak_flops(device: str) -> float | None:
    """The peak bf16 FLOP/s of a CUDA device. None if it is unknown, so that no MFU is wrong."""
    if not device.startswith("cuda"):
        return None
    name = torch.cuda.get_device_name(device)
    if OTHER_CARDS.search(name):
        return None
    known = (flops for key, flops in PEAK_FLOPS.items() if re.search(rf"\b{key}\b", name))
    return next(known, None)


def norms(tensors: list[torch.Tensor]) -> torch.Tensor:
    """The Euclidean norm of each tensor: (n,), float32.

    On a CPU, PyTorch's norm of 50,304 x 768 numbers is 0.3 % too small. Row by row it is exact, up
    to rounding.
    """
    if tensors[0].device.type == "cpu":
        return torch.stack([t.norm(dim=-1).norm() for t in tensors])
    return torch.stack(torch._foreach_norm(tensors))


class Metrics:
    """Appends JSON lines to metrics.jsonl, and sends them to TensorBoard and W&B if wanted.

    iteration: where the run starts. Lines that it will write again are removed: steps from there
    on, and later evaluations. A resumed run continues its W&B run, whose id is in wandb/id. W&B
    keeps the first numbers of an iteration that it gets twice.
    """

    def __init__(
        self,
        out_dir: Path,
        iteration: int,
        tensorboard: bool = False,
        wandb: bool = False,
        config: dict | None = None,
    ):
        self.board = self.wandb = None
        if wandb:  # First, because it may refuse to start. Then nothing else was changed.
            import wandb as module

            kept = out_dir / "wandb/id"
            known = kept.read_text(encoding="utf-8") if iteration and kept.is_file() else None
            try:
                self.wandb = module.init(
                    dir=out_dir,
                    name=out_dir.name,
                    config=config,
                    id=known,
                    resume="allow" if known else None,
                    allow_val_change=True,
                )
            except module.Error as error:
                raise UserError(
                    f"wandb does not start ({error}): leave --wandb out, or set"
                    " WANDB_MODE=offline to send the numbers later"
                ) from None
            kept.parent.mkdir(exist_ok=True)
            kept.write_text(self.wandb.id, encoding="utf-8")
        path = out_dir / "metrics.jsonl"
        if path.is_file():
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            write_whole(path, "".join(f"{line}\n" for line in lines if _stays(line, iteration)))
        self.file = open(path, "ab", buffering=0)
        self.backlog = b""  # Lines that wait, because the disk was full.
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(out_dir / "tensorboard", purge_step=iteration)

    def write(self, record: dict) -> None:
        """Writes a record, which has `iter`. JSON has no NaN and infinity, so they become texts."""
        clean = {
            k: repr(v) if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in record.items()
        }
        self._append(json.dumps(clean).encode() + b"\n")
        numbers = {k: v for k, v in record.items() if isinstance(v, int | float) and k != "iter"}
        self._to_board(numbers, record["iter"])
        if self.wandb:
            self.wandb.log(numbers, step=record["iter"])

    def _to_board(self, numbers: dict, iteration: int) -> None:
        """Gives numbers to TensorBoard. If the disk is full, it gets no more of them."""
        if self.board is None:
            return
        try:
            for key, value in numbers.items():
                self.board.add_scalar(key, value, iteration)
        except OSError as error:
            say(f"TensorBoard's file cannot be written ({error.strerror})", file=sys.stderr)
            self.board = None

    def _append(self, line: bytes) -> None:
        """Appends a line. If the disk is full, it waits in memory, and no line is cut in two."""
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
                say(
                    f"metrics.jsonl cannot be written ({error.strerror}): its lines wait in memory",
                    file=sys.stderr,
                )

    def sync(self) -> None:
        """Flushes the lines to the disk, so that a checkpoint is never newer than its lines."""
        self._append(b"")
        try:
            os.fsync(self.file.fileno())
        except OSError as error:
            say(
                f"metrics.jsonl cannot be flushed to the disk ({error.strerror})",
                file=sys.stderr,
            )

    def close(self) -> None:
        """Tries once more to write waiting lines, and closes everything."""
        self._append(b"")
        if self.backlog:
            say(
                f"the last {self.backlog.count(10)} lines of metrics.jsonl could not be written",
                file=sys.stderr,
            )
        self.file.close()
        try:
            if self.board:
                self.board.close()
        except OSError as error:
            say(f"the end of TensorBoard's file is missing ({error.strerror})", file=sys.stderr)
        if self.wandb:
            self.wandb.finish()


def _parsed(line: str) -> dict | None:
    """The JSON object in a line. None if it is not one, such as a killed run's last line."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _stays(line: str, iteration: int) -> bool:
    """Whether a line of metrics.jsonl stays when the run resumes at an iteration.

    Lines without `iter`, of another version, stay.
    """
    if (found := _parsed(line)) is None:
        return False
    at = found.get("iter")
    if not isinstance(at, int) or at < iteration:
        return True
    return at == iteration and "val_loss" in found


def _number(value: object) -> float | int | None:
    """A number in metrics.jsonl, where NaN and infinity are texts. None for anything else."""
    if isinstance(value, int | float):
        return value
    if value in ("nan", "inf", "-inf"):
        return float(value)
    return None


def read_metrics(run: str | Path) -> list[dict]:
    """The lines of a run's metrics.jsonl that have `iter`, with all keys that have numbers.

    Another version may have written other keys, so only `iter` is sure to be there. If the last
    line is incomplete it is skipped, with a note on stderr.

    Raises: UserError if there are no lines, or if another line is corrupt.
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
        raise UserError(f"{path} has no complete record: train the run first")
    return records


def clock(run: Path, metrics: list[dict], tokens: int) -> list[tuple[float, float]]:
    """The time of each line of metrics.jsonl, as (seconds of the run, seconds in steps).

    The first includes evaluations, and all starts of a resumed run. In each start `elapsed_s`
    begins at 0 again. The second is the sum of the steps, each as long as the average of its log
    interval. Ask `timed` first whether the lines have these keys.

    Args:
        run: the run's folder. Its environment.json tells where each start begins.
        metrics: from `read_metrics`.
        tokens: the number of tokens in an iteration.
    """
    begin = [start["iter"] for start in kept_starts(run)]
    found, elapsed, before, steps, start = [], 0.0, 0.0, 0.0, 0
    for m in metrics:
        if "elapsed_s" in m:
            now, earlier = m["elapsed_s"], start
            start = bisect.bisect_right(begin, m["iter"])
            resumed = start > earlier or now < before
            elapsed, before = elapsed + (now if resumed else now - before), now
            steps += tokens / m["tokens_per_s"] if m.get("tokens_per_s") else 0.0
        found.append((elapsed, steps))
    return found


def timed(metrics: list[dict]) -> bool:
    """Whether each step has the keys that `clock` needs: its time and its speed."""
    steps = [m for m in metrics if "train_loss" in m]
    return bool(steps) and all("elapsed_s" in m and "tokens_per_s" in m for m in steps)


def check_loggers(tensorboard: bool, wandb: bool) -> list[str]:
    """A problem for each logger that is wanted but whose package is missing."""
    wanted = {"tensorboard": tensorboard, "wandb": wandb}
    return [
        f"{name}=true needs the package: pip install {name}"
        for name, on in wanted.items()
        if on and not _installed(name)
    ]


def country_problem(code: str) -> str | None:
    """A problem if CodeCarbon has no numbers for the electricity of a country."""
    try:
        from codecarbon.input import DataSource

        known = DataSource().get_global_energy_mix_data()
    except (ImportError, AttributeError):  # CodeCarbon does not promise to keep these.
        return None
    if code in known:
        return None
    return (
        f"emissions_country={code}: CodeCarbon knows no such country; use an ISO 3166 alpha-3 code,"
        " such as USA, DEU or IND"
    )


def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


class Emissions:
    """Measures the energy of one machine with CodeCarbon, offline, into emissions.csv.

    CodeCarbon estimates RAM, and CPUs without power counters. Each `flush` updates the row of this
    start, so a killed run loses little. CodeCarbon then rewrites the whole file, and renames a file
    with other columns. So the file of an earlier start is renamed first, and its rows never change.
    """

    def __init__(self, out_dir: Path, country: str, node: int = 0):
        from codecarbon import OfflineEmissionsTracker

        out_dir.mkdir(parents=True, exist_ok=True)  # On another machine's disk it may be missing.
        logging.getLogger("codecarbon").setLevel(logging.ERROR)
        file = out_dir / ("emissions.csv" if node == 0 else f"emissions_node{node}.csv")
        keep_earlier(file)
        self.tracker = OfflineEmissionsTracker(
            country_iso_code=country,
            project_name=out_dir.name,
            output_dir=str(out_dir),
            output_file=file.name,
            on_csv_write="update",  # One row, for any number of flushes.
            log_level="error",
            allow_multiple_runs=True,
        )
        self.tracker.start()

    def flush(self) -> None:
        """Updates the row in the file."""
        self.tracker.flush()

    def stop(self) -> tuple[float, float] | None:
        """Stops measuring. Returns (kWh, kg CO2e) of this start, or None if CodeCarbon failed."""
        self.tracker.stop()
        data = getattr(self.tracker, "final_emissions_data", None)
        return (data.energy_consumed, data.emissions) if data else None


def keep_earlier(file: Path) -> None:
    """Renames `emissions.csv` to `emissions_start1.csv`, or to the next free number."""
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


def processor() -> str:
    """The name of the processor, and its widest vector instructions that PyTorch uses."""
    found, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if info.is_file():
        names = [s for s in info.read_text().splitlines() if s.startswith("model name")]
        found = names[0].split(":")[1].strip() if names else found
    return f"{found}, {torch.backends.cpu.get_cpu_capability()}"


def environment(device: str, world: int, torchruns: list[str]) -> dict:
    """Versions, git commit, device and command line, as environment.json stores them."""
    versions = {
        p: importlib.metadata.version(p)
        for p in ("torch", "numpy", "tokenizers", "tiktoken", "safetensors", "codecarbon")
        if _installed(p)
    }
    status = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "python": platform.python_version(),
        "versions": versions,
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": None if status is None else bool(status),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device)
        if device.startswith("cuda")
        else f"{device} ({processor()})",
        "threads": torch.get_num_threads(),
        "world_size": world,
        "torchrun": os.environ.get("TORCHELASTIC_RUN_ID"),
        "torchruns": torchruns,
        "command": " ".join(sys.argv),
    }


def write_environment(out_dir: Path, now: dict, iteration: int, changed: dict) -> None:
    """Writes environment.json: the environments of this start and of earlier ones, oldest first.

    Args:
        now: the `environment` of this start.
        iteration: where this start begins.
        changed: settings that it changes, key -> [before, now].
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


def starts(out_dir: Path) -> list[dict]:
    """The environments of all starts of a run, oldest first; see `write_environment`."""
    path = out_dir / "environment.json"
    now = _parsed(path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else None
    earlier = now.get("earlier", []) if now else []
    found = [*earlier, now] if now and isinstance(earlier, list) else []
    known = [s for s in found if isinstance(s, dict) and isinstance(s.get("iter"), int)]
    return [{**s, "changed": s.get("changed") or {}} for s in known]


def kept_starts(out_dir: Path, now: dict | None = None) -> list[dict]:
    """The starts of a run of which something is left. A start that went back to where an earlier
    one began has replaced it. Then `changed` says how it differs from the one before both.

    now: the `iter` and `changed` of a start that environment.json does not have yet.
    """
    kept: list[dict] = []
    for start in [*starts(out_dir), *([now] if now else [])]:
        changed = start["changed"]
        while kept and kept[-1]["iter"] >= start["iter"]:
            changed = _together(kept.pop()["changed"], changed)
        kept.append({**start, "changed": changed})
    return kept


def _together(first: dict, then: dict) -> dict:
    """The changes of two starts in a row, key -> [before, now], as those of one.

    Texts are compared with the checkpoint, so only the second start's count.
    """
    found = {key: both for key, both in first.items() if key not in TEXTS}
    for key, (before, now) in then.items():
        found[key] = [found[key][0] if key in found else before, now]
    return {key: both for key, both in found.items() if both[0] != both[1]}


def evaluated_alike_since(kept: list[dict]) -> int:
    """The iteration of the newest start of a run with other validation windows than before; -1 if
    there is none. Losses up to it cannot be compared with later ones. kept: `kept_starts`."""
    return max((s["iter"] for s in kept if other_windows(s["changed"])), default=-1)


def other_windows(changed: dict) -> bool:
    """Whether changed settings, key -> [before, now], change the windows of the validation loss."""
    return any(key in changed for key in TEXTS) or _resized(changed, "eval_iters", "batch_size")


def other_iterations(out_dir: Path) -> bool:
    """Whether a start of a run has changed the number of windows in an iteration."""
    keys = "batch_size", "gradient_accumulation_steps"
    return any(_resized(s["changed"], *keys) for s in starts(out_dir) if s["iter"])


def _resized(changed: dict, *keys: str) -> bool:
    before, now = (math.prod(changed.get(key, (1, 1))[i] for key in keys) for i in (0, 1))
    return before != now


def listed(items: list, most: int = 5) -> str:
    """The items as `a, b, c and 4 more`, the first `most` of them by name."""
    return ", ".join(map(str, items[:most])) + (
        f" and {len(items) - most} more" if len(items) > most else ""
    )


def duration(seconds: float) -> str:
    """Seconds in words: `3 s`, `4 min 10 s` or `2 h 5 min`."""
    s = round(seconds)
    if s < 60:
        return f"{s} s"
    return f"{s // 60} min {s % 60} s" if s < 3600 else f"{s // 3600} h {s % 3600 // 60} min"


# CodeCarbon's columns, and the unit that some versions add to the name.
ENERGY = {
    "energy_consumed": "kwh",
    "emissions": "kg",
    "cpu_energy": "kwh",
    "gpu_energy": "kwh",
    "ram_energy": "kwh",
    "duration": "s",
}
MEASURED = ("energy_consumed", "emissions")  # Every file of CodeCarbon has these.


def _used(row: dict[str, str | None]) -> dict[str, float]:
    """The quantities of ENERGY in a row of any version of CodeCarbon.

    A missing duration is NaN. Other missing parts are 0.
    Raises: ValueError that tells what is wrong with the row.
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
    """The rows of a file of CodeCarbon. UserError if it is corrupt."""
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
    """The energy and emissions of a run, by the keys of ENERGY, or None if nothing was measured.

    They are sums over all machines and starts. The duration is that of the machine that ran
    longest, and NaN if a row has none. The starts of a machine are in `emissions.csv`,
    `emissions_start1.csv` and so on, and in `emissions.csv.bak`, CodeCarbon's copy of a file with
    other columns.

    Raises: UserError if a file is corrupt.
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
