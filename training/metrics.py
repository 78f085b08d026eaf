"""Writes metrics.jsonl, sends it to TensorBoard and W&B, and reads it."""

import bisect
import errno
import json
import math
import os
import sys
from pathlib import Path

from base.errors import UserError
from base.files import json_object, write_whole
from base.machine import installed
from base.output import say
from training.environment import kept_starts


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
        path, kept_lines = out_dir / "metrics.jsonl", []
        if path.is_file():
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            kept_lines = [line for line in lines if _stays(line, iteration)]
            write_whole(path, "".join(f"{line}\n" for line in kept_lines))
        self.file = open(path, "ab", buffering=0)
        self.backlog = b""  # Lines that wait, because the disk was full.
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(out_dir / "tensorboard", purge_step=iteration)
            for record in map(json_object, kept_lines):  # The evaluation at `iteration` is purged.
                if record and record.get("iter") == iteration:
                    self._to_board(_numbers(record), iteration)

    def write(self, record: dict) -> None:
        """Writes a record, which has `iter`. JSON has no NaN and infinity, so they become texts."""
        clean = {
            k: repr(v) if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in record.items()
        }
        self._append(json.dumps(clean).encode() + b"\n")
        numbers = _numbers(record)
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


def _numbers(record: dict) -> dict:
    """The numbers of a record, without its iteration."""
    return {k: v for k, v in record.items() if isinstance(v, int | float) and k != "iter"}


def _stays(line: str, iteration: int) -> bool:
    """Whether a line of metrics.jsonl stays when the run resumes at an iteration.

    Lines without `iter`, of another version, stay.
    """
    if (found := json_object(line)) is None:
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
        found = json_object(line)
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
        if on and not installed(name)
    ]
