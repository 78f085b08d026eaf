"""The loss of a whole split under each run, in nats per token, perplexity and bits per byte.

    python -m analysis.perplexity out/a out/b --split=test

A window of block_size tokens slides over the split by `stride` tokens. Each window scores the
tokens that the window before it did not reach. So every token but the first is scored once. It has
at least block_size - stride tokens of context, unless it is nearer to the start of the split. A
smaller stride gives more context, a lower loss and a longer computation. bert predicts masked
tokens instead, in windows side by side; the same tokens are masked each time.

With --documents each document is scored alone, behind an end-of-text token, as
lm-evaluation-harness does. Words and bytes are counted as there, so word_perplexity,
byte_perplexity and bits_per_byte can be compared with its results (`interop.lm_eval` makes the
task).

With --detail the table has the calibration error (ECE) too. A second CSV file and picture have the
loss by position, frequency, confidence and distance to the nearest prototype
(`analysis.calibration`).

With --corpus the text of another prepared folder is scored too, encoded with the run's own
tokenizer, and the run's own text in the same way: each document alone, in bits per byte. These are
the columns other_documents (out of distribution) and own_documents (in distribution).
"""

import itertools
import math
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from analysis import calibration, figures, tables
from analysis.geometry import frequency
from analysis.runs import (
    ModelAnalysisConfig,
    Run,
    about,
    caution,
    default_out,
    find_runs,
    note,
    note_unknown,
    numbered,
    publish,
    unequal_settings,
    unequal_training,
)
from analysis.tables import Column
from base.command_line import cli, parse
from base.errors import UserError, check, too_small
from harmonic import IGNORE_INDEX
from model import Model, ModelConfig
from text.token_files import Data, data_folder, documents_of, load_data
from training.data import validation_windows
from training.distributed import check_device
from training.objective import NEXT_TOKEN, Batches, batches_of, objective_of

# Inputs and targets: int64, (B, T) each.
Batch = tuple[torch.Tensor, torch.Tensor]


@dataclass
class PerplexityConfig(ModelAnalysisConfig):
    """Perplexity"""

    stride: int = 0
    """tokens from one window to the next, at most block_size; 0 = block_size // 2 (with documents:
    block_size). bert does not use it"""
    documents: bool = False
    """score each document alone, in windows side by side, as lm-evaluation-harness does"""
    detail: bool = False
    """also measure calibration, and the loss by position, frequency, confidence and distance. They
    are written to ..._detail.csv and ..._detail.png"""
    corpus: str | None = None
    """other text to score, in bits per byte: a folder under data/, or a path"""
    corpus_bytes: int = 1_000_000
    """about how many bytes of the corpus, and of the run's own split, to score: documents spread
    evenly"""
    batch_size: int = 16
    """windows computed at once"""

    def problems(self) -> list[str]:
        return too_small(self, stride=0, batch_size=1, corpus_bytes=1) + super().problems()


def default_stride(config: ModelConfig, documents: bool = False) -> int:
    """The stride that --stride=0 stands for, in tokens."""
    return config.block_size if documents else max(1, config.block_size // 2)


def problems(
    config: ModelConfig, data: Data, split: str, stride: int, documents: bool = False
) -> list[str]:
    """Why a split cannot be scored, one sentence each. Empty if it can."""
    if split not in data.splits:
        return [f"{data.folder} has no split {split}: it has {', '.join(data.splits)}"]
    masked = objective_of(config.arch).masked
    found, needed = [], config.block_size + 1 if masked else 2
    if data.splits[split].tokens < needed:
        found.append(
            f"{data.splits[split].path} has {data.splits[split].tokens} tokens: {needed} are needed"
        )
    if not masked and stride > config.block_size:
        found.append(
            f"stride={stride} is longer than block_size={config.block_size}, which would leave"
            " tokens out"
        )
    if masked and documents:
        found.append(
            "documents=true: bert predicts masked tokens, which gives no loss of a whole document"
        )
    return found


def sliding_windows(tokens: int, block_size: int, stride: int) -> Iterator[tuple[int, int]]:
    """Yields (start, skip) of each window over a split of `tokens` tokens.

    A window reads min(block_size, tokens - 1) inputs from `start` on, and its targets one token
    later. Its first `skip` targets were scored by earlier windows. The last window ends with the
    split.
    """
    length = min(block_size, tokens - 1)
    last, reached = tokens - 1 - length, 0
    for start in itertools.chain(range(0, last, stride), [last]):
        yield start, reached - start
        reached = start + length


def sliding_batches(
    data: Data, split: str, block_size: int, stride: int, batch_size: int
) -> Iterator[Batch]:
    """Yields the sliding windows of a split in batches (inputs, targets), int64 (B, T) each.

    Targets that earlier windows scored are IGNORE_INDEX.
    """
    tokens = data.splits[split].tokens
    windows = sliding_windows(tokens, block_size, stride)
    while part := list(itertools.islice(windows, batch_size)):
        batches = Batches(data, NEXT_TOKEN, min(block_size, tokens - 1))
        x, y = batches.read(data.splits[split], [start for start, _ in part])
        for row, (_, skip) in zip(y, part, strict=True):
            row[:skip] = IGNORE_INDEX
        yield x, y


def document_batches(
    documents: Iterable[np.ndarray], eot_id: int, block_size: int, stride: int, batch_size: int
) -> Iterator[Batch]:
    """Yields the sliding windows of each document in batches (inputs, targets), int64 (B, T) each.

    Short windows are padded at the end. documents: as from `documents_of`.
    """
    # A single token predicts nothing.
    windows = (
        (ids[start : start + block_size + 1], skip)
        for ids in documents
        if len(ids) > 1
        for start, skip in sliding_windows(len(ids), block_size, stride)
    )
    while part := list(itertools.islice(windows, batch_size)):
        longest = max(len(ids) for ids, _ in part) - 1
        x = torch.full((len(part), longest), eot_id)
        y = torch.full((len(part), longest), IGNORE_INDEX)
        for i, (ids, skip) in enumerate(part):
            row = torch.from_numpy(ids)
            x[i, : len(row) - 1] = row[:-1]
            y[i, skip : len(row) - 1] = row[1 + skip :]
        yield x, y


@torch.inference_mode()
def likelihood(
    model: Model,
    data: Data,
    split: str,
    stride: int = 0,
    batch_size: int = 16,
    progress: str | None = None,
    documents: bool = False,
) -> tuple[float, int]:
    """The negative log likelihood of a split, summed in float64.

    Args:
        stride: tokens from one window to the next, 1 to block_size; 0 = `default_stride`. bert does
            not use it.
        batch_size: windows computed at once.
        progress: name of the progress bar, which only a terminal shows; None = no bar.
        documents: score each document alone.
    Returns: the sum in nats, and the number of tokens scored.
    Raises: UserError for a stride beyond block_size, an unknown split, or one too short to score.
    """
    c = model.config
    check(problems(c, data, split, stride, documents))
    stride = stride or default_stride(c, documents)
    tokens = data.splits[split].tokens
    if objective_of(c.arch).masked:
        starts = validation_windows(tokens, c.block_size, tokens)
        batches = batches_of(data, c).validation(starts, batch_size, split)
        count = len(starts)
    elif documents:
        batches = document_batches(
            documents_of(data, split), data.eot_id, c.block_size, stride, batch_size
        )
        count = None
    else:
        batches = sliding_batches(data, split, c.block_size, stride, batch_size)
        count = 1 + max(0, math.ceil((tokens - 1 - c.block_size) / stride))

    nats, scored = torch.zeros((), dtype=torch.float64), 0
    device = model.tokens.weight.device
    with tqdm(
        total=count, desc=progress, unit=" windows", leave=False, disable=None if progress else True
    ) as bar:
        for x, y in batches:
            x, y = x.to(device), y.to(device)
            kept = y != IGNORE_INDEX
            # (tokens scored,). The logits are never held in memory.
            losses = model.head.loss(model.hidden(x)[kept], y[kept], reduction="none")
            nats += losses.cpu().double().sum()
            scored += len(losses)
            bar.update(len(x))
    if not scored:
        raise UserError(
            f"{data.splits[split].path} has no {'document' if documents else 'token'} to score:"
            " prepare a longer split"
        )
    return nats.item(), scored


def measure(run: Run, data: Data, other: Data | None, c: PerplexityConfig, device: str) -> dict:
    """The row of a run. other: the data of --corpus, or None."""
    model, manifest = run.load(device, c.checkpoint)
    row = _scores(run, model, manifest, data, c)
    if other:
        row |= {
            f"{name}_documents": _by_document(model, data, d, s, c)
            for name, d, s in (("own", data, c.split), ("other", other, "val"))
        }
    return row


@torch.inference_mode()
def _by_document(model: Model, data: Data, source: Data, split: str, c: PerplexityConfig) -> float:
    """Bits per byte of documents of a split of `source`, each scored alone.

    They are encoded with the tokenizer of `data`, the run's own data.
    """
    own, words = data.load_tokenizer(), source.load_tokenizer()
    every = max(1, source.splits[split].bytes // c.corpus_bytes)
    texts = [
        words.decode(ids[1:])
        for ids in itertools.islice(documents_of(source, split), 0, None, every)
    ]
    size = sum(len(text.encode()) for text in texts)
    if not size:
        raise UserError(
            f"{source.splits[split].path} has no document with text: there is nothing to score"
        )
    found = own.encode_batch(texts)
    note_unknown(own, np.concatenate(found), str(source.folder))
    documents = (np.concatenate(([data.eot_id], ids)).astype(np.int64) for ids in found if ids)
    block, device, nats = model.config.block_size, model.tokens.weight.device, 0.0
    for x, y in document_batches(documents, data.eot_id, block, block, c.batch_size):
        x, y = x.to(device), y.to(device)
        nats += model.head.loss(
            model.hidden(x)[y != IGNORE_INDEX], y[y != IGNORE_INDEX], reduction="sum"
        ).item()
    return nats / math.log(2) / size


def _scores(run: Run, model: Model, manifest: dict, data: Data, c: PerplexityConfig) -> dict:
    nats, scored = likelihood(model, data, c.split, c.stride, c.batch_size, run.name, c.documents)
    masked, split = objective_of(model.config.arch).masked, data.splits[c.split]
    row = {
        **about(run),
        "iter": manifest["iter"],
        "split": c.split,
        "stride": None if masked else c.stride or default_stride(model.config, c.documents),
        "tokens": scored,
        "nats_per_token": nats / scored,
        "perplexity": torch.tensor(nats / scored, dtype=torch.float64).exp().item(),
        # Nothing predicts the first token, so it counts with the mean, as in training.
        "bits_per_byte": None
        if masked
        else nats / scored / math.log(2) * split.tokens / split.bytes,
    }
    if c.documents:
        # Words and bytes are counted as in lm-evaluation-harness.
        words = data.load_tokenizer()
        length = count = 0
        for ids in documents_of(data, c.split):
            text = words.decode(ids[1:])
            length, count = length + len(text.encode()), count + len(re.split(r"\s+", text))
        row["bits_per_byte"] = nats / math.log(2) / length
        row["byte_perplexity"] = math.exp(nats / length)
        row["word_perplexity"] = math.exp(min(nats / count, 700))
    return row


COLUMNS = (
    Column("run"),
    Column("head"),
    Column("link"),
    Column("iter"),
    Column("tokens", form=","),
    Column("nats_per_token", "nats/token", ".4f"),
    Column("perplexity", form=",.2f"),
    Column("bits_per_byte", "bits/byte", ".4f"),
    # Only --documents, --corpus and --detail give these.
    Column("byte_perplexity", form=".4f"),
    Column("word_perplexity", form=",.2f"),
    Column("own_documents", form=".4f"),
    Column("other_documents", form=".4f"),
    Column("calibration_error", "ECE", ".3f"),
)


def details(
    runs: list[Run], data: list[Data], c: PerplexityConfig, device: str, out: Path
) -> list[float]:
    """Writes the tables of --detail beside `out`. Returns the calibration error of each run."""
    rows, errors = [], []
    for run, d in zip(runs, data, strict=True):
        model, _ = run.load(device, c.checkpoint)
        tokens = calibration.examine(model, d, c.split)
        errors.append(calibration.calibration_error(tokens["confidence"], tokens["correct"]))
        rows += [
            {**about(run), **row}
            for row in calibration.detail(tokens, frequency(d).numpy(), run.model_config.block_size)
        ]
    publish(rows, out.with_name(f"{out.stem}_detail.csv"), lambda: calibration.draw(rows))
    return errors


def draw(rows: list[dict]) -> Figure:
    """A bar for each run: bits per byte, or nats per token if a run has no bits per byte."""
    if all(row["bits_per_byte"] is not None for row in rows):
        key, label = "bits_per_byte", "bits per byte"
    else:
        key, label = "nats_per_token", "nats per token"
    figure = figures.figure(0.8 + 0.35 * len(rows))
    axes = figure.subplots()
    values = [row[key] for row in rows]
    colors = [figures.head_color(row["head"]) for row in rows]
    bars = axes.barh(range(len(rows)), values, color=colors, height=0.6)
    axes.set_yticks(range(len(rows)), [figures.literal(row["run"]) for row in rows])
    axes.bar_label(bars, [f"{value:.4f}" for value in values], padding=4)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlabel(f"{label} on {rows[0]['split']}, lower is better")
    return figure


def main() -> None:
    (c,) = parse(sys.argv[1:], PerplexityConfig, words="runs")
    runs = find_runs(c.runs, dataset=c.dataset)
    device = check_device(c.device)
    out = default_out(c, runs, "perplexity")
    data = [run.data() for run in runs]
    found: list[str] = []
    for run, d in zip(runs, data, strict=True):
        found += problems(run.model_config, d, c.split, c.stride, c.documents)
    check(list(dict.fromkeys(found)))  # Runs on the same data have the same problems.
    other = load_data(data_folder(c.corpus)) if c.corpus else None
    if c.corpus and (masked := [run.name for run in runs if run.objective.masked]):
        raise UserError(
            f"corpus={c.corpus}: {', '.join(masked)} predicts masked tokens, which gives no"
            " likelihood of a text"
        )
    note(caution(runs, data, c.split))

    rows = [measure(run, d, other, c, device) for run, d in zip(numbered(runs), data, strict=True)]
    if c.detail:
        rows = [
            {**row, "calibration_error": error}
            for row, error in zip(rows, details(runs, data, c, device, out), strict=True)
        ]
    note(unequal_training(runs, [row["iter"] for row in rows]))
    note(unequal_settings(runs))
    print(tables.text(rows, [column for column in COLUMNS if column.key in rows[0]]))
    publish(rows, out, lambda: draw(rows))


if __name__ == "__main__":
    cli(main)
