"""Measures the perplexity of a trained model after a swap of its head, without further training.

    python -m benchmarks.swap out/demo/cross_entropy

Each head is matched to the model's softmax on training text (`harmonic.match`), and scored on the
complete validation split. The exponent is fitted. Some heads also get one that depends on the
width. Writes results/head_swap.csv and prints the table of docs/interop.md.
"""

import math
import sys
import time
from dataclasses import dataclass, field, replace

from tqdm import tqdm

from analysis import tables
from analysis.perplexity import likelihood
from analysis.runs import find_runs
from analysis.tables import Column
from base.command_line import cli, parse
from base.errors import UserError
from base.files import result_file
from benchmarks.head import exponent
from harmonic import HEADS
from interop import pretrained
from model import Model

SETTINGS: list[tuple[str, dict]] = [(name, {}) for name in HEADS if name != "cross_entropy"]
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


def main() -> None:
    (c,) = parse(sys.argv[1:], SwapConfig, words="run")
    out = result_file(c.out)
    (run, *others) = find_runs(c.run)
    if others or run.model_config.head != "cross_entropy":
        raise UserError("name one run, trained with --head=cross_entropy")
    data = run.data()
    source, _ = run.load()
    states = pretrained.states(source, data, run.config.seed, run.config.batch_size)

    def perplexity(model: Model) -> float:
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
            {
                "head": name,
                "settings": about,
                "strength": strength,
                "kl": kl,
                "perplexity": perplexity(model.eval()),
                "source_perplexity": own,
                "seconds": took,
            }
        )
    tables.write_csv(out, rows, COLUMNS)
    print(markdown(rows))
    print(f"wrote {out}")


def markdown(rows: list[dict]) -> str:
    """The table in docs/interop.md."""
    named = []
    for r in rows:
        name = f"{r['head']}, {r['settings']}" if r["settings"] else r["head"]
        named.append({**r, "head": name})
    columns: tables.Columns = [
        "head",
        Column("strength", "n (softmax: s)", ".4g"),
        Column("kl", "KL", ".1e", "nats a token"),
        Column("perplexity", form=".2f"),
        Column("source_perplexity", "perplexity of the source", ".2f"),
    ]
    return tables.markdown(named, columns)


if __name__ == "__main__":
    cli(main)
