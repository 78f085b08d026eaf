"""Compares linear exports with the heads that they replace: their text and their probabilities.

    python -m benchmarks.linear_export out/linear/*

Each run is exported with `--linear`, and loaded by the plain class of transformers. Both write
greedy text from the same prompts, and rank the tokens at the same positions of the validation
split, in float32. Writes results/linear_export.csv and prints the table of docs/interop.md.

In float32 some tokens have nearly equal logits, so two programs may order them differently. `gap`
is the largest difference of two such logits, computed in float64 with the run's own head. A text in
which this happens still counts as different.
"""

import math
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from analysis import tables
from analysis.perplexity import likelihood
from analysis.runs import Run, about, find_runs, windows
from analysis.tables import Column
from base.command_line import cli, parse
from base.files import result_file
from interop import pretrained
from interop.export import ExportConfig, export
from interop.linear import STATES
from model import Model, ModelConfig
from text.token_files import Data

PROMPTS, PROMPT, NEW = 20, 16, 64  # Prompts, tokens of each, and new tokens.
POSITIONS, TOP = 1000, 50

COLUMNS = [
    Column("run"),
    Column("head"),
    Column("link"),
    Column("arch"),
    Column("strength", "n (softmax: s)", ".4g"),
    Column("texts", "greedy texts"),
    Column("same_texts", "same greedy texts"),
    Column("positions", "positions"),
    Column("same_top", f"positions with the same top {TOP}"),
    Column("gap", "largest gap", ".1e", "nats"),
    Column("kl", "KL", ".1e", "nats a token"),
    Column("perplexity", "perplexity of the head", ".2f"),
    Column("linear_perplexity", "perplexity of the linear export", ".2f"),
]


@dataclass
class LinearConfig:
    """Linear exports"""

    runs: list[str] = field(default_factory=list)
    """run folders"""
    out: str = "results/linear_export.csv"
    """the CSV file"""


@dataclass
class Pair:
    """The model of a run, and its linear export in transformers. They get the same ids."""

    ours: Model
    theirs: Any

    def logits(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The logits (B T, V) of the head, the export, and the head in float64, for ids (B, T)."""
        h = self.ours.hidden(ids).flatten(0, 1)
        own = self.ours.head(h)
        head = self.ours.head.double()
        exact = head(h.double())
        head.float()
        return own, self.theirs(input_ids=ids).logits.flatten(0, 1), exact


def spread(first: torch.Tensor, second: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest difference of exact logits between tokens that are in only one of two sets.

    first, second: sets of tokens (N, k). exact: logits (N, V). Returns nats; 0 if all sets are
    equal.
    """
    worst = 0.0
    for a, b, logits in zip(first.tolist(), second.tolist(), exact, strict=True):
        for i, j in zip(set(a) - set(b), set(b) - set(a), strict=True):
            worst = max(worst, abs(logits[i] - logits[j]).item())
    return worst


def compare_tops(pair: Pair, ids: torch.Tensor) -> dict:
    """Compares the sets of most likely tokens after every id (B, T), and the probabilities."""
    own, linear, exact = pair.logits(ids)
    a, b = own.topk(TOP).indices, linear.topk(TOP).indices
    same = (a.sort(-1).values == b.sort(-1).values).all(-1)
    p, q = own.log_softmax(-1)[:STATES], linear.log_softmax(-1)[:STATES]
    return {
        "positions": POSITIONS,
        "same_top": same[:POSITIONS].sum().item(),
        "gap": spread(a[:POSITIONS], b[:POSITIONS], exact[:POSITIONS]),
        "kl": F.kl_div(q, p, log_target=True, reduction="batchmean").item(),
    }


def compare_texts(pair: Pair, prompts: torch.Tensor, new: int = NEW) -> dict:
    """Compares greedy texts from prompts (B, T), with `new` tokens each."""
    steps = list(pair.ours.generate(prompts.tolist(), new, temperature=0))
    own = torch.cat((prompts, torch.tensor(steps).T), 1)
    # So that text continues after the end of a document.
    pair.theirs.generation_config.eos_token_id = None
    linear = pair.theirs.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
    )
    gap = 0.0
    for a, b in zip(own, linear, strict=True):
        if (a == b).all():
            continue
        first = (a != b).nonzero()[0].item()
        exact = pair.logits(a[None, :first])[2][-1]
        gap = max(gap, (exact[a[first]] - exact[b[first]]).abs().item())
    same = (own == linear).all(-1).sum().item()
    return {"texts": len(prompts), "same_texts": same, "gap": gap}


def read_ids(data: Data, block_size: int, count: int) -> torch.Tensor:
    """The ids (count, block_size) of `count` windows, spread over the validation split."""
    starts = windows(data, "val", block_size, count)
    found = [torch.from_numpy(data.splits["val"].read(s, block_size)) for s in starts]
    return torch.stack(found)


@torch.no_grad()
def measure(run: Run, folder: Path) -> dict:
    """Exports a run to a folder. Returns its row of the table."""
    import transformers

    export(ExportConfig(run=[str(run.path)], to=str(folder), linear=True))
    ours, _ = run.load()
    config = transformers.AutoConfig.from_pretrained(folder)
    kind = getattr(transformers, config.architectures[0])
    pair = Pair(ours, kind.from_pretrained(folder).eval())
    source, data, size = pretrained.find(str(folder)), run.data(), ours.config.block_size
    linear = source.load(ModelConfig(**{**source.settings, "block_size": size})).eval()

    tops = compare_tops(pair, read_ids(data, size, -(-STATES // size)))
    texts = compare_texts(pair, read_ids(data, PROMPT, PROMPTS))
    row = about(run) | {"arch": ours.config.arch, "strength": None} | tops | texts
    row["gap"] = max(tops["gap"], texts["gap"])
    if not ours.head.is_control:
        row["strength"] = torch.as_tensor(ours.head.strength).item()
    for key, model in (("perplexity", ours), ("linear_perplexity", linear)):
        nats, tokens = likelihood(model, data, "val")
        row[key] = math.exp(nats / tokens)
    return row


def main() -> None:
    (c,) = parse(sys.argv[1:], LinearConfig, words="runs")
    out, runs = result_file(c.out), find_runs(c.runs)
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure(run, Path(folder) / str(i)) for i, run in enumerate(runs)]
    tables.write_csv(out, rows, [column.key for column in COLUMNS])
    print(tables.markdown(rows, COLUMNS))
    print(f"wrote {out}")


if __name__ == "__main__":
    cli(main)
