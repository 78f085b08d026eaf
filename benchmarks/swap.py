"""What swapping the head of a trained model costs, before any training: perplexity with its own
head and with every other one.

    python -m benchmarks.swap out/demo/cross_entropy

Each head is matched to the model's softmax on training text (`harmonic.match`) and scored on the
whole validation split, with the exponent that is found and with one that goes with the width.
Writes results/head_swap.csv and prints README's table.
"""

import csv
import math
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from tqdm import tqdm

from analysis.perplexity import likelihood
from analysis.runs import find_runs
from base.command_line import cli, parse
from base.errors import UserError
from benchmarks.head import exponent
from harmonic import HEADS
from interop import pretrained

SETTINGS = [(name, {}) for name in HEADS if name != "cross_entropy"]
SETTINGS += [("minkowski", {"head_p": 2.0})]
SETTINGS += [
    (name, exponent(name))
    for name in ("euclidean", "cosine", "mahalanobis", "manhattan", "canberra")
]
SETTINGS += [(name, {"link": "softmax"}) for name in ("euclidean", "cosine", "manhattan")]
COLUMNS = ["head", "settings", "strength", "kl", "perplexity", "source_perplexity", "seconds"]


@dataclass
class SwapConfig:
    """Swapped heads"""

    run: list[str] = field(default_factory=list)
    """a run trained with cross_entropy"""
    out: str = "results/head_swap.csv"
    """the CSV file"""


def main():
    (c,) = parse(sys.argv[1:], SwapConfig, words="run")
    (run, *others) = find_runs(c.run)
    if others or run.model_config.head != "cross_entropy":
        raise UserError("name one run, trained with --head=cross_entropy")
    data = run.data()
    source, _ = run.load()
    states = pretrained.states(source, data, run.config.seed, run.config.batch_size)

    def perplexity(model) -> float:
        nats, tokens = likelihood(model, data, "val")
        return math.exp(nats / tokens)

    own, rows = perplexity(source), []
    for name, settings in tqdm(SETTINGS, "heads", unit=" heads", disable=None):
        began = time.perf_counter()
        model, _ = run.load()
        kl = pretrained.swap(model, replace(run.model_config, head=name, **settings), states)
        took = time.perf_counter() - began
        strength = "" if model.head.is_control else float(model.head.strength)
        about = ", ".join(f"{k.removeprefix('head_')}={v}" for k, v in settings.items())
        rows.append(
            dict(
                zip(
                    COLUMNS,
                    (name, about, strength, kl, perplexity(model.eval()), own, took),
                    strict=True,
                )
            )
        )
    with open(Path(c.out), "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    print(markdown(rows))
    print(f"wrote {c.out}")


def markdown(rows: list[dict]) -> str:
    """README's table."""
    lines = [
        "| head | n (softmax: s) | KL, nats a token | perplexity | of the source |",
        "|---|---|---|---|---|",
    ]
    for r in rows:
        about = f", {r['settings']}" if r["settings"] else ""
        strength = f"{float(r['strength']):.4g}" if r["strength"] not in ("", None) else ""
        cells = (
            f"{float(r['kl']):.1e}",
            f"{float(r['perplexity']):.2f}",
            f"{float(r['source_perplexity']):.2f}",
        )
        lines.append(f"| {r['head']}{about} | {strength} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    cli(main)
