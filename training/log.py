"""What a run reports while it trains: lines in the terminal, and rows in metrics.jsonl."""

import math
import signal
import sys
import time

import torch

from base.machine import peak_flops
from base.output import duration, listed
from training import checkpoint
from training.advice import (
    about_products,
    other_gpus,
    rising_rate,
    senseless_settings,
    slow_settings,
    small_start,
    uneven_shares,
)
from training.distributed import torchrun_command
from training.environment import other_windows
from training.folder import RunFolder
from training.run import Run
from training.step import NAMES, Step

# How a note calls what has changed beside settings.
OTHER = {"text": "another training text", "val_text": "another validation text"}


class NotFinite(Exception):
    """A loss or gradient is not finite. All processes raise this at the same iteration."""


class Log:
    """Collects steps and writes them in groups, because each read from a GPU waits for it."""

    def __init__(self, run: Run, folder: RunFolder):
        self.c, self.processes, self.gradients = run.c, run.processes, run.gradients
        self.work, self.folder, self.say = run.work, folder, run.say
        self.first = run.progress.iteration
        self.scaled = run.scaler.is_enabled()  # With float16, a gradient may overflow.
        self.peak = peak_flops(self.processes.device)
        self.pending: list[Step] = []
        self.began = self.clock = time.perf_counter()

    def restart_clock(self) -> None:
        """Restarts the clock of tokens_per_s. Call it after work that is not training."""
        self.clock = time.perf_counter()

    def leave_out(self, seconds: float) -> None:
        """Leaves a time out of tokens_per_s that was not training, while steps are pending."""
        self.clock += seconds

    def flush(self, iteration: int) -> None:
        """Reads the pending steps from the device, sums them over processes and writes them.

        Raises: NotFinite if a loss or gradient is not finite, with --on_nan=stop.
        """
        if not self.pending:
            return
        rows = torch.stack([step.numbers() for step in self.pending])
        rows = rows.cpu().double() if rows.device.type == "mps" else rows.double()
        table = dict(zip(NAMES, rows.T.contiguous(), strict=True))
        own = table["loss"].tolist()  # This waits for the device.
        now = time.perf_counter()
        p = self.processes
        for name, how in (("loss", "sum"), ("distance", "sum"), ("nearest", "min")):
            p.reduce(table[name], how)
        lists = dict(zip(NAMES, torch.stack([*table.values()]).tolist(), strict=True))
        speed = len(self.pending) * self.work.tokens / (now - self.clock)
        mfu = speed * self.work.flops_per_token / (self.peak * p.world) if self.peak else None
        for j, step in enumerate(self.pending):
            numbers = {name: values[j] for name, values in lists.items()}
            record = self._record(iteration - len(self.pending) + j, step, numbers)
            record |= {"tokens_per_s": speed, "elapsed_s": now - self.began}
            if mfu is not None:
                record["mfu"] = mfu
            self.folder.write(record)
            if self.c.on_nan == "stop":
                self._check(record, step, numbers["loss"], own[j])
        self._print(iteration, record, speed, mfu, now)
        self.pending, self.clock = [], time.perf_counter()

    def _record(self, iteration: int, step: Step, numbers: dict[str, float]) -> dict[str, float]:
        """The row of a step in metrics.jsonl. numbers: of all processes, with the keys NAMES."""
        record = {
            "iter": iteration,
            "train_loss": numbers["loss"] / self.work.targets,
            "lr": step.lr,
            "grad_norm": numbers["norm"],
            "grad_norm_head": numbers["norm_head"],
            "grad_norm_trunk": numbers["norm_trunk"],
            "prototype_radius": numbers["radius"],
        }
        if not self.gradients.model.head.is_control:
            record["target_distance_min"] = numbers["nearest"]
            record["target_distance_mean"] = numbers["distance"] / self.work.targets
        if self.c.on_nan == "skip":
            record["skipped"] = step.skipped
        return record

    def _check(self, record: dict, step: Step, loss: float, own: float) -> None:
        """Raises NotFinite if the step is not finite. own: this process's part of the loss."""
        norm = record["grad_norm"]
        if math.isfinite(loss) and (math.isfinite(norm) or self.scaled):
            return
        parts = self.processes.gather(own)
        ranks = [r for r, x in enumerate(parts) if not math.isfinite(x)]
        what = f"gradient norm {norm}"
        if not math.isfinite(loss):
            what = f"loss {loss / self.work.targets}"
        if ranks:
            what += f" on rank {listed(ranks)}"
        raise not_finite(record["iter"], what, self.gradients.not_finite(step.squares))

    def _print(
        self, iteration: int, record: dict, speed: float, mfu: float | None, now: float
    ) -> None:
        c, skipped = self.c, self.pending[-1].skipped
        left = (now - self.began) / (iteration - self.first) * (c.max_iters - iteration)
        line = (
            f"iter {iteration:>{len(str(c.max_iters))}}/{c.max_iters}"
            f"  loss {record['train_loss']:.4f}  lr {record['lr']:.2e}"
            f"  grad norm {record['grad_norm']:.3f}  {speed:,.0f} tokens/s"
        )
        if mfu is not None:
            line += f"  mfu {mfu:.1%}"
        line += f"  ETA {duration(left)}"
        if skipped:
            line += f"  {skipped} skipped"
        self.say(line)


def not_finite(iteration: int, what: str, gradients: list[str]) -> NotFinite:
    """The error for a loss or gradient that is not finite."""
    where = f"; gradients that are not finite: {listed(gradients)}" if gradients else ""
    return NotFinite(f"stopped: {what} at iteration {iteration}{where}")


def introduce(run: Run, dtype: str, changed: dict) -> None:
    """Prints what is trained, and notes about its settings.

    dtype: of the trunk. changed: settings that a resumed run changes, key -> [before, now].
    """
    m, c, p, model, data = run.m, run.c, run.processes, run.model, run.data
    windows = f"{c.windows} window{'s' * (c.windows > 1)} of {m.block_size}"
    processes = f"{p.world} process{'es' if p.world > 1 else ''} on {p.device}"
    if p.world > 1:
        processes += f" ({c.parallel})"
    run.say(
        f"{m.arch}, {m.n_layer} layer{'s' * (m.n_layer > 1)}, {m.n_embd} wide,"
        f" {model.parameter_count() / 1e6:.2f} M parameters, head {model.head.extra_repr()}\n"
        f"data {data.folder}: {data.splits['train'].tokens:,} training tokens, {data.tokenizer}; "
        f"an iteration is {run.work.tokens:,} tokens ({windows})\n"
        f"{processes}, {dtype}{', compiled' if c.compile else ''}"
    )
    with run.autocast:
        products = about_products(model.head)
    if products is not None:
        run.say(products)
    if run.progress.iteration:
        of = "" if c.eval_only else f" of {c.max_iters}"
        run.say(f"resuming at iteration {run.progress.iteration}{of}")
    notes = []
    if changed:
        what = [OTHER.get(k, f"{k}={now} (was {old})") for k, (old, now) in changed.items()]
        notes.append(f"resumed with {', '.join(what)}")
        if other_windows(changed) and not c.eval_only:
            notes.append(
                "the validation loss is of other windows from here on: earlier losses do not count"
                " for the best checkpoint"
            )
        if not c.eval_only and (rises := rising_rate(c, run.progress.iteration, changed)):
            notes.append(rises)
    if not c.eval_only:
        left = c.max_iters - run.progress.iteration
        flops = run.work.flops_per_token * run.work.tokens
        notes += filter(None, [uneven_shares(c.windows, p.world), other_gpus(c, p.device)])
        notes += slow_settings(m, c, p.kind, dtype, flops, left)
        notes += senseless_settings(m, c, data)
    if run.progress.iteration == 0 and c.init_from in ("scratch", "auto"):
        notes += small_start(m, c)
    for note in notes:
        run.say(f"note: {note}", file=sys.stderr)


def conclude(
    run: Run,
    folder: RunFolder,
    log: Log,
    used: tuple[float, float] | None,
    stopped: int,
    diverged: NotFinite | None,
) -> None:
    """Prints how the run ended. Exits if its status is not 0.

    Args:
        log: knows when and where this start began.
        used: (kWh, kg CO2e) of this start, or None if not measured. Of all machines, but after a
            second Ctrl-C only of this one.
        stopped: the signal that stopped it, or 0.
        diverged: the error, if a loss or gradient was not finite.
    """
    out_dir = folder.path
    energy = f", {used[0] * 1000:.2f} Wh, {used[1] * 1000:.2f} g CO2e" if used else ""
    if diverged:
        run.say(diverged, file=sys.stderr)
        run.say(f"last good checkpoint: {checkpoint.last_good(out_dir)}", file=sys.stderr)
        run.say(
            "a lower --learning_rate, more --warmup_iters or a --grad_clip may prevent it",
            file=sys.stderr,
        )
        sys.exit(3)
    if stopped:
        how = "no checkpoint was written yet: --overwrite=true starts it again"
        if checkpoint.manifests(out_dir):
            how = (
                f"resume from {checkpoint.last(out_dir)} with:"
                f" {torchrun_command(run.processes.world)} train.py --init_from=resume"
                f" --out_dir={out_dir}"
            )
        name, at = signal.Signals(stopped).name, run.progress.iteration
        run.say(f"\n{name}: stopped at iteration {at}{energy}; {how}", file=sys.stderr)
        sys.exit(128 + stopped)
    best = run.progress.best_loss
    took = f"{duration(time.perf_counter() - log.began)}{energy}"
    since = f" since iteration {log.first}" if log.first else ""
    run.say(f"done: {out_dir}, best val loss {best:.4f}, {took}{since}")
    if folder.writer and folder.writer.error:
        sys.exit(4)
