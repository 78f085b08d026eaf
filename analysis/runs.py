"""What the analysis scripts share: opening finished runs, saying what may be compared, and writing
results."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from matplotlib.figure import Figure

from analysis import figures
from analysis.tables import write_csv
from base.errors import UserError, check, nearest
from harmonic import HEADS, IGNORE_INDEX
from model import Model, ModelConfig
from text.token_files import Data, data_folder, load_data, tokenizer_folder
from text.tokenizers import is_trained, load_tokenizer, same_tokens
from training import checkpoint
from training.config import TrainConfig
from training.data import validation_windows
from training.objective import Objective, batches_of, objective_of


@dataclass
class Run:
    """A finished run. `name`: its folder's name, or its path where another run's folder has the
    same name."""

    path: Path
    name: str
    model_config: ModelConfig
    config: TrainConfig

    @property
    def objective(self) -> Objective:
        return objective_of(self.model_config.arch)

    def tokens_per_iteration(self) -> int:
        return (
            self.config.batch_size
            * self.config.gradient_accumulation_steps
            * self.model_config.block_size
        )

    def data(self) -> Data:
        """The data it was trained on. UserError when it is not there, as for a run's folder that
        was copied from another machine."""
        folder = data_folder(self.config.dataset)
        if not folder.is_dir():
            raise UserError(
                f"no data folder {folder}, on which {self.path} was trained: name its place on this"
                " machine with --dataset=FOLDER"
            )
        data = load_data(folder, self.config.tokenizer)
        if is_trained(data.tokenizer) and tokenizer_folder(self.path, "") == self.path:
            # Two folders may have trained a tokenizer of one name on different texts.
            own = load_tokenizer(data.tokenizer, self.path)
            if not same_tokens(own, data.load_tokenizer()):
                raise UserError(
                    f"{folder} has another {data.tokenizer} than {self.path}: its ids stand for"
                    " other tokens; name the data that the run was trained on, or prepare the text"
                    " with the run's tokenizer"
                )
        return data

    def load(self, device: str = "cpu", which: str = "newest") -> tuple[Model, dict]:
        """The newest or best checkpoint -> (model in eval mode, float32; its manifest). UserError
        for a damaged one."""
        model, _, manifest = checkpoint.load_run(self.path, device, which)
        return model, manifest


@dataclass
class AnalysisConfig:
    """What every analysis that writes a table takes."""

    runs: list[str] = field(default_factory=list)
    """run folders"""
    out: str | None = None
    """the CSV file, with the picture (.png) beside it; null = named after the analysis, in the
    first run's parent folder"""
    dataset: str | None = None
    """prepared data of all runs, a folder under data/ or a path; null = where each run was
    trained"""

    def problems(self) -> list[str]:
        return (
            [f"out={self.out} must end in .csv"]
            if self.out is not None and not self.out.endswith(".csv")
            else []
        )


def find_runs(folders: list[str], weights: bool = True, dataset: str | None = None) -> list[Run]:
    """Opens run folders, without loading anything.

    Args:
        weights: a run needs a checkpoint. dataset: where the prepared data of all runs lies, if not
            where they were trained.
    Raises: UserError listing every folder that is not such a run.
    """
    if not folders:
        raise UserError("name one run's folder or more, such as out/run")
    paths, problems = [Path(f) for f in folders], []
    for i, path in enumerate(paths):
        siblings = (
            [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
        )
        if not path.is_dir():
            problems.append(f"no run {path}{nearest(path.name, siblings) if siblings else ''}")
        elif not (path / "config.yaml").is_file():
            problems.append(f"{path} is not a run's folder: it has no config.yaml")
        elif weights and not checkpoint.manifests(path):
            problems.append(f"{path} holds no checkpoint")
        elif path.resolve() in [p.resolve() for p in paths[:i]]:
            problems.append(f"{path} is named twice")
    check(problems)

    names = [p.resolve().name for p in paths]
    runs = []
    for path, name in zip(paths, names, strict=True):
        model_config, config = checkpoint.read_config(path)
        if dataset is not None:
            config.dataset = dataset
        runs.append(Run(path, name if names.count(name) == 1 else str(path), model_config, config))
    return runs


def windows(data: Data, split: str, block_size: int, most: int) -> list[int]:
    """First tokens of at most `most` windows side by side, spread evenly over a split. UserError
    where there is none."""
    if split not in data.splits:
        raise UserError(f"{data.folder} has no split {split}: it has {', '.join(data.splits)}")
    tokens = data.splits[split].tokens
    if tokens <= block_size:
        raise UserError(
            f"{data.splits[split].path} has {tokens} tokens, and block_size={block_size} needs"
            f" {block_size + 1}: prepare a longer split"
        )
    return validation_windows(tokens, block_size, max(1, most))


def predictions(
    model: Model, data: Data, split: str, tokens: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """What a model predicts in windows side by side, spread evenly over a split, about `tokens`
    predicted tokens in all.

    Yields for each batch of windows: hidden states (N, C) and targets (N,) on the model's device,
    and which tokens of the windows they belong to: (B, T), bool, on the CPU.
    Raises: UserError for a split that is missing or shorter than a window.
    """
    c, device = model.config, model.tokens.weight.device
    batches = batches_of(data, c)
    most = tokens // batches.objective.predicted(c.block_size)
    starts = windows(data, split, c.block_size, most)
    for x, y in batches.validation(starts, 16, split):
        kept = y != IGNORE_INDEX
        yield model.hidden(x.to(device))[kept.to(device)], y[kept].to(device), kept


def texts_differ(data: list[Data], split: str = "val") -> bool:
    """Whether a split is of other text for some: texts of one length in bytes are taken to be the
    same."""
    return len({d.splits[split].bytes for d in data}) > 1


def caution(runs: list[Run], data: list[Data], split: str = "val") -> str | None:
    """What keeps the losses of runs from being compared, as a sentence; None when nothing does."""
    if len({run.objective.masked for run in runs}) > 1:
        return (
            "bert predicts masked tokens and the others predict the next one: their losses may"
            " not be compared"
        )
    if lacking := [d for d in data if split not in d.splits]:
        raise UserError(
            f"{lacking[0].folder} has no split {split}: it has {', '.join(lacking[0].splits)}"
        )
    tokens = {
        (d.tokenizer, d.vocab_size, d.splits[split].tokens, d.splits[split].bytes) for d in data
    }
    if texts_differ(data, split):
        return (
            "the runs have different data: only bits/byte may be compared, and it speaks of"
            " different texts"
        )
    if len(tokens) > 1:
        return "the runs have different tokenizers: only bits/byte may be compared"
    return None


def writable(path: Path) -> Path:
    """`path`, if a file can be written there. UserError otherwise."""
    if path.is_dir():
        raise UserError(f"--out={path} is a folder: name a file")
    if not path.parent.is_dir():
        raise UserError(f"--out={path}: the folder {path.parent} does not exist")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"--out={path}: the folder {path.parent} is not writable")
    return path


def head_styles(runs: list[Run]) -> list[dict[str, str]]:
    """`color` and `linestyle` of each run in a figure."""
    heads = [about(run) for run in runs]
    return figures.head_styles([(h["head"], h["link"]) for h in heads])


def publish(rows: list[dict], out: Path, draw: Callable[[], Figure]) -> None:
    """Writes the CSV file and beside it the picture that `draw` makes, and says so."""
    write_csv(out, rows)
    picture = out.with_suffix(".png")
    figures.save(draw(), picture)
    print(f"wrote {out} and {picture}")


def about(run: Run) -> dict:
    """What every table begins with."""
    c = run.model_config
    return {"run": run.name, "head": c.head, "link": None if HEADS[c.head].is_control else c.link}


def default_out(c: AnalysisConfig, runs: list[Run], name: str) -> Path:
    """Where an analysis writes: --out, or NAME.csv in the first run's parent folder."""
    return writable(Path(c.out) if c.out else runs[0].path.parent / f"{name}.csv")
