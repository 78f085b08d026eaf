"""The folder of a run, and what is written into it: metrics, checkpoints and energy."""

import contextlib
import os
import shutil
from dataclasses import replace
from pathlib import Path

from base.command_line import write_yaml
from base.errors import UserError
from base.files import locked
from text.tokenizers import copy_tokenizer
from training import checkpoint
from training.config import TrainConfig
from training.run import Run
from training.telemetry import Emissions, Metrics, environment, write_environment


class RunFolder:
    """Creates the folder of a run, or continues in it.

    Only the main process writes metrics and checkpoints. One process on each machine measures
    energy. All processes may call all methods.
    """

    def __init__(self, run: Run, resumed: Path | None, changed: dict):
        """
        Args:
            resumed: the checkpoint that the run resumes from, or None.
            changed: settings that differ from the last start, for environment.json.
        Raises: UserError if the folder cannot be written.
        """
        c, p = run.c, run.processes
        self.path = Path(c.out_dir)
        self.metrics: Metrics | None = None  # None outside of the main process.
        self.writer: checkpoint.Writer | None = None  # The same.
        self.emissions: Emissions | None = None
        self.lock = contextlib.ExitStack()  # Held by the main process.
        if p.main:
            try:
                self._open(run, resumed, changed)
            except BlockingIOError:
                raise UserError(
                    f"another process trains in {self.path}: stop it, or name another --out_dir."
                    f" If it ran on a machine that is dead, delete {self.path / '.lock'}"
                ) from None
            except OSError as error:
                message = f"out_dir={self.path} cannot be written: {error.strerror}"
                raise UserError(message) from None
        if c.emissions and p.local_rank == 0:  # One tracker for each machine.
            node = int(os.environ.get("GROUP_RANK", 0))
            self.emissions = Emissions(self.path, c.emissions_country, node)

    def _open(self, run: Run, resumed: Path | None, changed: dict) -> None:
        m, c, p, iteration = run.m, run.c, run.processes, run.progress.iteration
        self.path.mkdir(parents=True, exist_ok=True)
        self.lock.enter_context(locked(self.path / ".lock"))
        if c.init_from != "scratch" and _newer(self.path, resumed):
            raise UserError(
                f"another process has written a checkpoint in {self.path} meanwhile: start again"
            )
        if resumed:
            checkpoint.set_aside(self.path, resumed)
        else:
            _clear(self.path, c)
        copy_tokenizer(run.data.tokenizer, run.data.folder, self.path)
        stored = replace(
            c,
            init_from="scratch",
            overwrite=False,
            eval_only=False,
            new_data_order=False,
            profile=0,
        )
        write_yaml(self.path / "config.yaml", m, stored)
        write_environment(self.path, environment(p.device, p.world), iteration, changed)
        settings = {**vars(m), **vars(c)}
        self.metrics = Metrics(self.path, iteration, c.tensorboard, c.wandb, settings)
        self.writer = checkpoint.Writer(self.path)

    def write(self, record: dict) -> None:
        """Adds a row to metrics.jsonl."""
        if self.metrics:
            self.metrics.write(record)

    def save(self, run: Run, loss: float | None) -> None:
        """Copies weights and optimiser state, and starts writing them as a checkpoint.

        Training continues meanwhile. All processes call it.
        loss: the validation loss; None if there was no evaluation.
        """
        at = run.progress
        if self.writer:
            self.writer.wait()  # So that memory holds only one copy.
        files = checkpoint.snapshot(run.model, run.optimizer, keep=run.processes.main)
        if self.metrics is None or self.writer is None:
            return
        self.metrics.sync()
        counters = {
            "val_loss": loss,
            "best_val_loss": at.best_loss,
            "skipped": at.skipped,
            "skipped_in_a_row": at.skipped_in_a_row,
            "scaler": run.scaler.state_dict(),
            "data": run.data.splits["train"].identity(),
            "val_data": run.data.splits["val"].identity(),
        }
        self.writer.save(at.iteration, files, counters)
        if self.emissions:
            self.emissions.flush()

    def close(self, wait: bool) -> tuple[float, float] | None:
        """Closes all files. Returns (kWh, kg CO2e), or None if energy was not measured.

        wait: whether to wait for a checkpoint that is being written.
        """
        if self.writer and wait:
            self.writer.wait()
        with self.lock:
            if self.metrics:
                self.metrics.close()
            return self.emissions.stop() if self.emissions else None


def _newer(out_dir: Path, resumed: Path | None) -> bool:
    """Whether there is a good checkpoint after the one that was chosen, or any if none was."""
    since = checkpoint.iteration(resumed) if resumed else -1
    late = [f for f in checkpoint.folders(out_dir) if checkpoint.iteration(f) > since]
    return any(checkpoint.damage(folder) is None for folder in late)


def _clear(out_dir: Path, c: TrainConfig) -> None:
    """Removes the files of an earlier run."""
    if c.init_from == "auto" and (out_dir / "config.yaml").exists():
        print(f"{out_dir} holds no checkpoint yet: starting again")
    for name in ("ckpt", "tensorboard"):
        shutil.rmtree(out_dir / name, ignore_errors=True)
    for name in ("config.yaml", "metrics.jsonl"):
        (out_dir / name).unlink(missing_ok=True)
    if c.init_from == "scratch":  # With auto, these belong to an earlier start of the same run.
        for path in (out_dir / "environment.json", *out_dir.glob("emissions*.csv*")):
            path.unlink(missing_ok=True)
