"""What the analysis scripts share: they open finished runs, check what can be compared, and write
results."""

import difflib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from matplotlib.figure import Figure

from analysis import figures
from analysis.tables import write_csv
from base.errors import UserError, check
from base.files import writable
from base.output import listed
from harmonic import HEADS, IGNORE_INDEX
from model import Model, ModelConfig
from text.token_files import Data, check_tokenizer, data_folder, load_data
from text.tokenizers import Tokenizer, well_formed
from training import checkpoint
from training.config import TrainConfig
from training.data import validation_windows
from training.emissions import energy
from training.environment import kept_starts, other_iterations
from training.metrics import clock, timed
from training.objective import Objective, batches_of, objective_of
from training.schedule import learning_rate

# Settings that a comparison of heads keeps the same. Left out are those whose defaults depend on
# others, and those that a sweep chooses for each head.
SAME = (
    "arch", "n_layer", "n_head", "n_embd", "block_size", "tie_weights", "qk_norm", "dropout",
    "label_smoothing", "doc_mask", "source", "optimizer", "lr_schedule", "warmup_iters",
    "weight_decay", "beta1", "beta2", "grad_clip", "dtype",
)  # fmt: skip


# Settings of the learning rate over time, and all settings with which a resumed run learns
# otherwise than before.
SCHEDULE = (
    "learning_rate", "min_lr", "lr_schedule", "warmup_iters", "max_iters", "lr_decay_iters",
    "decay_iters",
)  # fmt: skip
LEARNS = (*SAME, *SCHEDULE, "head_learning_rate", "prototype_decay", "seed")


@dataclass
class Run:
    """A finished run.

    name: the name of its folder. If two runs have folders of the same name, it is the path.
    trained_on: the dataset that it was trained on; config.dataset may be another one.
    """

    path: Path
    name: str
    model_config: ModelConfig
    config: TrainConfig
    trained_on: str

    @property
    def objective(self) -> Objective:
        """What its model is trained to predict."""
        return objective_of(self.model_config.arch)

    def tokens_per_iteration(self) -> int:
        """The number of tokens that an iteration trains on."""
        return self.config.windows * self.model_config.block_size

    def data(self) -> Data:
        """The data that it was trained on.

        Raises: UserError if the data is not on this machine, or has another tokenizer.
        """
        folder = data_folder(self.config.dataset)
        if not folder.is_dir():
            raise UserError(
                f"no data folder {folder}, on which {self.path} was trained: name its place on this"
                " machine with --dataset=FOLDER"
            )
        data = load_data(folder, self.config.tokenizer)
        check_tokenizer(self.path, data)
        return data

    def load(self, device: str = "cpu", which: str = "newest") -> tuple[Model, dict]:
        """Loads the "newest" or "best" checkpoint.

        Returns: the model in eval mode and float32, and the manifest of the checkpoint.
        Raises: UserError if the checkpoint is corrupt.
        """
        model, _, manifest = checkpoint.load_run(self.path, device, which)
        return model, manifest


@dataclass
class AnalysisConfig:
    """The flags of every analysis that writes a table."""

    runs: list[str] = field(default_factory=list)
    """run folders"""
    out: str | None = None
    """the CSV file to write; the picture (.png) is written beside it. null = a file named after the
    analysis, in the parent folder of the first run"""
    dataset: str | None = None
    """prepared data of all runs: a folder under data/, or a path; null = the data that each run was
    trained on"""

    def problems(self) -> list[str]:
        """Everything that is wrong with the flags, one sentence each."""
        if self.out is None or self.out.endswith(".csv"):
            return []
        return [f"out={self.out} must end in .csv"]


@dataclass
class ModelAnalysisConfig(AnalysisConfig):
    """The flags of every analysis that computes with the models."""

    checkpoint: Literal["newest", "best"] = "newest"
    """which checkpoint of each run"""
    split: Literal["val", "test"] = "val"
    """the split of the data to measure on"""
    device: str = "auto"
    """auto, cpu, cuda or mps"""


def find_runs(folders: list[str], weights: bool = True, dataset: str | None = None) -> list[Run]:
    """Opens the folders of runs. It reads their settings, and loads no weights.

    Args:
        weights: whether each run must have a checkpoint.
        dataset: the prepared data of all runs; None = the data that each run was trained on.
    Raises: UserError that lists every folder that is not such a run, or says what is wrong with
        `dataset`.
    """
    if not folders:
        raise UserError("name one run's folder or more, such as out/run")
    paths, problems = _without_results([Path(f) for f in folders]), []
    for i, path in enumerate(paths):
        if not path.is_dir():
            problems.append(f"no run {path}{_similar(path)}")
        elif not (path / "config.yaml").is_file():
            instead = checkpoint.runs_instead(path) or ": it has no config.yaml"
            problems.append(f"{path} is not a run's folder{instead}")
        elif weights and not checkpoint.manifests(path):
            problems.append(f"{path} holds no checkpoint")
        elif path.resolve() in [p.resolve() for p in paths[:i]]:
            problems.append(f"{path} is named twice")
    check(problems)

    names = [well_formed(p.resolve().name) for p in paths]
    runs = []
    for path, name in zip(paths, names, strict=True):
        model_config, config = checkpoint.read_config(path)
        trained_on = config.dataset
        if dataset is not None:
            # Checked here, so that an analysis that reads no data refuses a wrong folder too.
            load_data(data_folder(dataset), config.tokenizer)
            config.dataset = dataset
        short = name if names.count(name) == 1 else well_formed(str(path))
        runs.append(Run(path, short, model_config, config, trained_on))
        note(uneven(runs[-1]))
        note(changed(runs[-1]))
    return runs


def _without_results(paths: list[Path]) -> list[Path]:
    """Leaves out the tables, pictures and pages of earlier analyses, which `out/*` has too.

    Raises: UserError if nothing else is named.
    """
    results = [
        path for path in paths if path.suffix in (".csv", ".png", ".html") and path.is_file()
    ]
    rest = [path for path in paths if path not in results]
    if not rest:
        raise UserError(f"{results[0]} is not a run's folder")
    if results:
        note(f"{listed([str(path) for path in results], 3)}: not a run, skipped")
    return rest


def _similar(missing: Path) -> str:
    """`; did you mean X?` for a run's folder that is missing, or a few runs that are near it."""
    there = checkpoint.runs_in(missing.parent)
    names = {Path(run).name: run for run in there}
    near = difflib.get_close_matches(missing.name, names, n=1)
    if near:
        return f"; did you mean {names[near[0]]}?"
    return f"; there are {listed(there, 3)}" if there else ""


def windows(data: Data, split: str, block_size: int, most: int) -> list[int]:
    """The first tokens of at most `most` windows, spread evenly over a split without overlap.

    Raises: UserError if the split is missing or shorter than a window.
    """
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
    """Runs a model on windows that are spread evenly over a split without overlap.

    tokens: about how many tokens to predict in all.
    Yields for each batch of windows: the hidden states (N, C) and targets (N,) of the predicted
        tokens, on the model's device, and which tokens of the windows these are: (B, T), bool, on
        the CPU.
    Raises: UserError if the split is missing or shorter than a window.
    """
    c, device = model.config, model.tokens.weight.device
    batches = batches_of(data, c)
    most = tokens // batches.objective.predicted(c.block_size)
    starts = windows(data, split, c.block_size, most)
    for x, y in batches.validation(starts, 16, split):
        kept = y != IGNORE_INDEX
        yield model.hidden(x.to(device))[kept.to(device)], y[kept].to(device), kept


def lossy(data: list[Data]) -> list[str]:
    """The tokenizers that cannot write every text, if the data has different tokenizers. They lose
    characters, so their bits per byte are too low."""
    if len({d.tokenizer for d in data}) == 1:
        return []
    return sorted({d.tokenizer for d in data if d.load_tokenizer().unk_id is not None})


def note_unknown(words: Tokenizer, ids: np.ndarray, text: str) -> None:
    """Prints how many ids of a text stand for what a tokenizer cannot write, if there are any."""
    if words.unk_id is not None and len(ids) and (share := float((ids == words.unk_id).mean())):
        note(
            f"{share:.1%} of the tokens of {text} are unknown to {words.name}: they are easy to"
            " predict, so its numbers say little"
        )


def caution(runs: list[Run], data: list[Data], split: str = "val") -> str | None:
    """Why the losses of runs cannot be compared, as a sentence. None if they can.

    Raises: UserError if a run's data has no such split.
    """
    if len({run.objective.masked for run in runs}) > 1:
        return (
            "bert predicts masked tokens and the others predict the next token: their losses may"
            " not be compared"
        )
    if lacking := [d for d in data if split not in d.splits]:
        raise UserError(
            f"{lacking[0].folder} has no split {split}: it has {', '.join(lacking[0].splits)}"
        )
    # Texts with equal numbers of bytes count as the same.
    if len({d.splits[split].bytes for d in data}) > 1:
        return (
            "the runs have different data: only bits/byte may be compared, and a difference may"
            " come from the texts"
        )
    if lost := lossy(data):
        return (
            f"the runs have different tokenizers, and {' and '.join(lost)} cannot write every text:"
            " not even bits/byte may be compared"
        )
    if len({(d.tokenizer, d.vocab_size, d.splits[split].tokens) for d in data}) > 1:
        return "the runs have different tokenizers: only bits/byte may be compared"
    return None


def unequal_training(runs: list[Run], iterations: list[int]) -> str | None:
    """A sentence if the runs have trained on different numbers of tokens, else None."""
    tokens = {i * run.tokens_per_iteration() for i, run in zip(iterations, runs, strict=True)}
    return "the runs have not trained on the same number of tokens" if len(tokens) > 1 else None


def unequal_settings(runs: list[Run]) -> str | None:
    """A sentence if the runs differ in a setting of SAME, in the size of an iteration, in how often
    they were evaluated, in how far the learning rate decays or in the seeds of a head, else None.
    Heads and peak learning rates may differ: each head is compared at the rate that suits it."""
    settings = [vars(run.model_config) | vars(run.config) for run in runs]
    # The lowest of many evaluations is lower than that of a few.
    values = {name: [str(s[name]) for s in settings] for name in (*SAME, "eval_interval")}
    values["dataset"] = [Path(run.trained_on).name for run in runs]
    values["tokens an iteration"] = [f"{run.tokens_per_iteration():,}" for run in runs]
    values["learning rate at the end"] = [
        f"{learning_rate(run.config.max_iters, run.config) / run.config.learning_rate:.0%} of its"
        " peak"
        for run in runs
    ]
    values["seed"] = ["/".join(map(str, sorted(each))) for each in seeds(runs).values()]
    found = [
        f"{name} ({' and '.join(dict.fromkeys(each))})"
        for name, each in values.items()
        if len(set(each)) > 1
    ]
    return f"The heads are not the only difference: also {listed(found, 4)}." if found else None


def seeds(runs: list[Run]) -> dict[tuple[str, str | None], set[int]]:
    """The seeds of the runs of each pair of head and link."""
    found: dict[tuple[str, str | None], set[int]] = {}
    for run in runs:
        pair = run.model_config.head, about(run)["link"]
        found.setdefault(pair, set()).add(run.config.seed)
    return found


def uneven(run: Run) -> str | None:
    """A sentence if a resume has changed the size of a run's iterations, else None."""
    if not other_iterations(run.path):
        return None
    return (
        f"{run.name} was resumed with iterations of another size: its tokens, times and energies"
        " are computed as if all had the last size, so they are wrong"
    )


def changed(run: Run) -> str | None:
    """A sentence if a resume has changed settings with which a run learns, else None."""
    found, later = [], run.config
    for start in reversed(kept_starts(run.path)):
        at, changes = start["iter"], start["changed"]
        if not at:  # Nothing was trained before.
            continue
        before = replace(later, **{k: old for k, (old, _) in changes.items() if k in vars(later)})
        # A schedule that was the same until here is no change, such as the decay of a fork.
        same = not changes or np.allclose(
            [learning_rate(i, before) for i in range(at)],
            [learning_rate(i, later) for i in range(at)],
        )
        for key, (old, now) in changes.items():
            if key == "text":
                found.append(f"another training text from iteration {at} on")
            elif key in LEARNS and not (same and key in SCHEDULE):
                found.append(f"{key}={now} from iteration {at} on ({old} before)")
        later = before
    return f"{run.name} was resumed with other settings: {listed(found, 3)}" if found else None


def unequal_windows(runs: list[Run]) -> str | None:
    """A sentence if the runs' validation losses are of different windows, else None."""
    windows = {(r.model_config.block_size, r.config.validation_windows) for r in runs}
    if len(windows) < 2:
        return None
    return (
        "the runs have different validation windows (block_size, eval_iters or batch_size), so"
        " small differences in loss mean nothing"
    )


def energy_of(run: Run, metrics: list[dict]) -> dict[str, float] | None:
    """The energy of a run; None if it was not measured, or, with a note, only for a part of it."""
    used = energy(run.path)
    if used and timed(metrics):
        elapsed = clock(run.path, metrics, run.tokens_per_iteration())[-1][0]
        if used["duration"] < 0.95 * elapsed:
            note(f"the energy of {run.name} is not shown: only a part of the run was measured")
            return None
    return used


def numbered(runs: list[Run]) -> Iterator[Run]:
    """Yields the runs. Before each it prints on stderr which one it is, because each takes long."""
    for i, run in enumerate(runs, 1):
        print(f"run {i} of {len(runs)}: {run.name}", file=sys.stderr, flush=True)
        yield run


def with_float64(device: str) -> str:
    """The device, or cpu in place of mps, which has no float64 numbers."""
    return "cpu" if device == "mps" else device


def check_finite(run: Run, what: str, x: torch.Tensor) -> None:
    """Raises a UserError if `x`, `what` of a run, has a number that is not finite."""
    if not x.isfinite().all():
        raise UserError(
            f"{run.path} has {what} that are not finite: its training diverged. Leave it out"
        )


def note(sentence: str | None) -> None:
    """Prints a sentence on stderr, if there is one."""
    if sentence:
        print(f"note: {sentence}", file=sys.stderr)


def head_styles(runs: list[Run]) -> list[dict[str, str]]:
    """`color` and `linestyle` of each run in a figure."""
    heads = [about(run) for run in runs]
    return figures.head_styles([(h["head"], h["link"]) for h in heads])


def write_table(rows: list[dict], out: Path) -> None:
    """Writes a CSV file, and prints its name."""
    how = "replaced" if out.exists() else "wrote"
    write_csv(out, rows)
    print(f"{how} {out}")


def publish(rows: list[dict], out: Path, draw: Callable[[], Figure]) -> None:
    """Writes the CSV file `out`, and beside it the picture that `draw` makes. Prints both names."""
    how, picture = "replaced" if out.exists() else "wrote", out.with_suffix(".png")
    write_csv(out, rows)
    figures.save(draw(), picture)
    print(f"{how} {out} and {picture}")


def about(run: Run) -> dict:
    """The first columns of every table: run, head and link (None for a control)."""
    c = run.model_config
    return {"run": run.name, "head": c.head, "link": None if HEADS[c.head].is_control else c.link}


def default_out(c: AnalysisConfig, runs: list[Run], name: str) -> Path:
    """The CSV file of an analysis: --out, or NAME.csv in the parent folder of the first run.

    Raises: UserError if it cannot be written.
    """
    parent = Path(os.path.normpath(runs[0].path / ".."))
    out = Path(c.out) if c.out else parent / f"{name}.csv"
    writable(out.with_suffix(".png"))
    return writable(out)
