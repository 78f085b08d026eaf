"""Measures how fast `Model.generate` samples 512 tokens, compared with nanoGPT's method.

    python -m benchmarks.sampling                 # ten minutes or so on one core
    python -m benchmarks.sampling --model=demo    # less than a minute

For each token, nanoGPT's `generate` computes the complete context again. With a harmonic head it
also computes everything that depends only on prototypes. Weights are random and float32, because
their values do not change the time.

generate       8 steps at each of 8 lengths of the prompt, evenly spread over the text. For the demo
               it is the complete text, because its context slides.
nanoGPT's way  one step at each of 16 lengths. The trunk's time is measured once for all heads.
"""

import functools
import math
import statistics
import sys
from dataclasses import dataclass
from typing import Any, Literal

import torch

from analysis import tables
from analysis.tables import Column
from base.command_line import cli, parse
from base.files import result_file
from base.machine import processor
from benchmarks.head import seconds
from harmonic import HarmonicHead
from model import Model, ModelConfig

TOKENS = 512
HEADS = ("cross_entropy", "cosine", "euclidean", "manhattan")
BATCHES = (1, 4, 8)
COLUMNS = (
    "model",
    "head",
    "batch",
    Column("ours", "generate", ".3g", "tokens/s"),
    Column("nanogpt", "nanoGPT's way", ".3g", "tokens/s"),
    Column("ratio", "times as fast", ".1f"),
    "machine",
)


@dataclass(frozen=True)
class Size:
    """A model, the number of places in its text to measure, and the steps at each."""

    settings: dict[str, Any]
    places: int
    steps: int


SIZES = {
    "demo": Size(dict(n_layer=3, n_head=6, n_embd=192, block_size=128, vocab_size=4096), 1, TOKENS),
    "gpt2_124m": Size(
        dict(
            n_layer=12,
            n_head=12,
            n_embd=768,
            block_size=1024,
            vocab_size=50304,
            real_vocab_size=50257,
        ),
        8,
        8,
    ),
}


@dataclass
class SamplingConfig:
    """What to measure"""

    model: Literal["demo", "gpt2_124m"] | None = None
    """the model to measure; null = both"""
    out: str = "results/sampling.csv"
    """the table; it is written only if both models are measured"""


def lengths(places: int) -> list[int]:
    """The middles of `places` equal parts of the text; for one place, its beginning."""
    if places == 1:
        return [1]
    return [(2 * i + 1) * TOKENS // (2 * places) for i in range(places)]


def ours(model: Model, size: Size, batch: int) -> float:
    """Seconds for a step of `generate`."""
    times = []
    for length in lengths(size.places):
        prompts = [[1] * length] * batch
        steps = model.generate(prompts, size.steps + 1, temperature=0.8, top_k=200)
        # This computes the prompt and prepares the head.
        next(steps)
        times.append(seconds(functools.partial(list, steps)) / size.steps)
    return statistics.mean(times)


@torch.inference_mode()
def plain_trunk(model: Model, batch: int) -> float:
    """Seconds for the trunk to compute a complete context."""
    times = []
    for length in lengths(16):
        ids = torch.ones(batch, min(length, model.config.block_size), dtype=torch.long)
        times.append(seconds(functools.partial(model.trunk, ids)))
    return statistics.mean(times)


@torch.inference_mode()
def plain_head(head: HarmonicHead, batch: int) -> float:
    """Seconds for the head and for nanoGPT's choice of a token."""
    h = torch.randn(batch, head.padded_prototypes().shape[1])

    def step() -> torch.Tensor:
        logits = head(h) / 0.8
        smallest = logits.topk(200).values[:, [-1]]
        logits[logits < smallest] = -math.inf
        return torch.multinomial(logits.softmax(-1), 1)

    return statistics.median(seconds(step) for _ in range(8))


def measure(name: str) -> list[dict[str, Any]]:
    """The rows of a model."""
    rows, size, trunks = [], SIZES[name], {}
    machine = f"{processor()}, threads: {torch.get_num_threads()}"
    for head in HEADS:
        torch.manual_seed(0)
        model = Model(ModelConfig(head=head, **size.settings)).eval()
        # This compiles kernels and allocates memory.
        list(model.generate([[1, 2]], 4))
        for batch in BATCHES:
            if batch not in trunks:
                trunks[batch] = plain_trunk(model, batch)
            fast = batch / ours(model, size, batch)
            slow = batch / (trunks[batch] + plain_head(model.head, batch))
            rows.append(
                {
                    "model": name,
                    "head": head,
                    "batch": batch,
                    "ours": f"{fast:.1f}",
                    "nanogpt": f"{slow:.2f}",
                    "ratio": f"{fast / slow:.1f}",
                    "machine": machine,
                }
            )
            print(tables.text(rows[-1:], COLUMNS).splitlines()[-1], flush=True)
    return rows


def main() -> None:
    (c,) = parse(sys.argv[1:], SamplingConfig)
    rows, out = [], result_file(c.out) if c.model is None else None
    for name in SIZES:
        if c.model in (None, name):
            rows += measure(name)
    print(tables.text(rows, COLUMNS))
    if out:
        tables.write_csv(out, rows, COLUMNS)
        print(f"wrote {out}")


if __name__ == "__main__":
    cli(main)
