"""The folder of a run, and everything that is written into it."""

import shutil
from dataclasses import replace
from pathlib import Path

from base.command_line import write_yaml
from base.errors import UserError
from model import ModelConfig
from text.token_files import Data
from text.tokenizers import copy_tokenizer
from training import checkpoint
from training.config import TrainConfig
from training.telemetry import Metrics, write_environment


def open_folder(
    m: ModelConfig, c: TrainConfig, data: Data, began: dict, resumed: Path | None, iteration: int
) -> tuple[Metrics, checkpoint.Writer]:
    """Makes the folder, or goes on in it. For the main process.

    Args: began: environment and changed settings of this start, for environment.json. resumed: the
        checkpoint that the run goes on from, or None.
    Raises: UserError where the folder cannot be written.
    """
    out_dir = Path(c.out_dir)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        if resumed:
            checkpoint.set_aside(out_dir, resumed)
        else:
            _clear(out_dir, c)
        copy_tokenizer(c.tokenizer, data.folder, out_dir)
        stored = dict(init_from="scratch", overwrite=False, eval_only=False, new_data_order=False)
        write_yaml(out_dir / "config.yaml", m, replace(c, **stored))
        write_environment(out_dir, began["environment"], iteration, began["changed"])
        metrics = Metrics(out_dir, iteration, c.tensorboard, c.wandb, {**vars(m), **vars(c)})
    except OSError as error:
        raise UserError(f"out_dir={out_dir} cannot be written: {error.strerror}") from None
    return metrics, checkpoint.Writer(out_dir)


def _clear(out_dir: Path, c: TrainConfig):
    """Removes what an earlier run has left."""
    if c.init_from == "auto" and (out_dir / "config.yaml").exists():
        print(f"{out_dir} holds no checkpoint yet: beginning again")
    for name in ("ckpt", "tensorboard"):
        shutil.rmtree(out_dir / name, ignore_errors=True)
    for name in ("config.yaml", "metrics.jsonl"):
        (out_dir / name).unlink(missing_ok=True)
    if c.init_from == "scratch":  # auto keeps what an earlier start of the same run has used
        for path in (out_dir / "environment.json", *out_dir.glob("emissions*.csv*")):
            path.unlink(missing_ok=True)
