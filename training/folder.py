"""The folder of a run, and what is written into it: metrics, checkpoints and energy."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from base.command_line import write_yaml
from base.errors import UserError
from base.files import locked
from text.tokenizers import TRAINED_FILES, copy_tokenizer
from training import checkpoint
from training.checkpoint import SET_ASIDE
from training.config import TrainConfig
from training.emissions import Emissions
from training.environment import environment, write_environment
from training.metrics import Metrics
from training.run import Run
from training.start import Restored, check_out_dir


class RunFolder:
    """Creates the folder of a run, or continues in it.

    Only the main process writes metrics and checkpoints. One process on each machine measures
    energy. All processes may call all methods.
    """

    def __init__(self, run: Run, resumed: Restored | None):
        """
        Args:
            resumed: what the run resumes from, or None.
        Raises: UserError if the folder cannot be written.
        """
        c, p = run.c, run.processes
        self.path = Path(c.out_dir)
        self.metrics: Metrics | None = None  # None outside of the main process.
        self.writer: checkpoint.Writer | None = None  # The same.
        self.emissions: Emissions | None = None
        self.lock = contextlib.ExitStack()  # Held by the main process.
        p.from_main(lambda: self._open(run, resumed))
        if c.emissions and p.local_rank == 0:  # One tracker for each machine.
            node = int(os.environ.get("GROUP_RANK", 0))
            self.emissions = Emissions(self.path, c.emissions_country, node)

    def _open(self, run: Run, resumed: Restored | None) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock.enter_context(locked(self.path / ".lock"))
            try:
                self._fill(run, resumed)
            except BaseException:
                self.lock.close()
                raise
        except BlockingIOError:
            raise UserError(
                f"another process trains in {self.path}: stop it, or name another --out_dir."
                f" If it ran on a machine that is dead, delete {self.path / '.lock'}"
            ) from None
        except OSError as error:
            named = f" ({error.filename})" if error.filename else ""
            message = f"out_dir={self.path} cannot be written: {error.strerror}{named}"
            raise UserError(message) from None

    def _fill(self, run: Run, resumed: Restored | None) -> None:
        """Writes the first files. If that fails, the files of an earlier run stay."""
        c = run.c
        check_out_dir(c)  # Another start may have trained here meanwhile.
        if c.init_from != "scratch" and _newer(self.path, resumed.folder if resumed else None):
            raise UserError(
                f"another process has written a checkpoint in {self.path} meanwhile: start again"
            )
        with contextlib.nullcontext() if resumed else _replaced(self.path, c):
            self._write_first(run, resumed.changed if resumed else {})
        if resumed:
            checkpoint.set_aside(self.path, resumed.folder)
        self.writer = checkpoint.Writer(self.path)

    def _write_first(self, run: Run, changed: dict) -> None:
        """Opens metrics.jsonl, and writes settings, tokenizer and environment."""
        m, c, p, data, iteration = run.m, run.c, run.processes, run.data, run.progress.iteration
        settings = {**vars(m), **vars(c)}
        self.metrics = Metrics(self.path, iteration, c.tensorboard, c.wandb, settings)
        copy_tokenizer(data.tokenizer, data.folder, self.path)
        # Settings of one start are not stored, except for these two.
        once: dict[str, Any] = {f.name: f.default for f in fields(c) if "of_a_start" in f.metadata}
        stored = replace(c, **(once | {"source": c.source, "out_dir": c.out_dir}))
        write_yaml(self.path / "config.yaml", m, stored)
        write_environment(
            self.path, environment(p.device, p.world, p.torchruns), iteration, changed
        )

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
        if self.emissions:  # of each machine
            self.emissions.flush()
        if self.metrics is None or self.writer is None:
            return
        self.metrics.sync()
        counters = {
            "val_loss": loss,
            "windows": run.c.validation_windows,  # of the validation loss
            "best_val_loss": at.best_loss,
            "skipped": at.skipped,
            "skipped_in_a_row": at.skipped_in_a_row,
            "scaler": run.scaler.state_dict(),
            "data": run.data.splits["train"].identity(),
            "val_data": run.data.splits["val"].identity(),
        }
        self.writer.save(at.iteration, files, counters)

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


@contextlib.contextmanager
def _replaced(out_dir: Path, c: TrainConfig) -> Iterator[None]:
    """Sets the files of an earlier run aside, and removes them at the end.

    They come back if there is an error inside. If the process is killed, they come back at the
    next start.
    """
    aside, rest = out_dir / SET_ASIDE, out_dir / ".deleted"
    _put_back(aside)
    if c.init_from == "auto" and (out_dir / "config.yaml").exists():
        print(f"{out_dir} holds no checkpoint yet: starting again")
    names = ["ckpt", "tensorboard", "config.yaml", "metrics.jsonl", *TRAINED_FILES]
    if c.init_from == "scratch":  # With auto, these belong to an earlier start of the same run.
        names += ["environment.json", *(path.name for path in out_dir.glob("emissions*.csv*"))]
        if c.overwrite:
            names += ["profile", "wandb"]
    try:
        aside.mkdir(exist_ok=True)
        for name in names:
            if (out_dir / name).exists():
                (out_dir / name).rename(aside / name)
        yield
    except BaseException:
        _put_back(aside)
        raise
    # On NFS, files that are open stay for a while. They must not come back later.
    shutil.rmtree(rest, ignore_errors=True)
    aside.rename(rest)
    shutil.rmtree(rest, ignore_errors=True)


def _put_back(aside: Path) -> None:
    """Moves files that were set aside back, in place of newer ones of the same names."""
    if not aside.is_dir():
        return
    for path in aside.iterdir():
        newer = aside.parent / path.name
        if newer.is_dir():
            shutil.rmtree(newer, ignore_errors=True)
        path.replace(newer)
    shutil.rmtree(aside, ignore_errors=True)
