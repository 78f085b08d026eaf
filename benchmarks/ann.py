"""The speed and the errors of decoding from the nearest prototypes, compared with all logits.

    python -m benchmarks.ann out/demo/cosine out/demo/cross_entropy    # about 15 minutes
    # one head, exact search
    python -m benchmarks.ann --heads=manhattan --graphs=[] --out=out/ann.csv

Each head that faiss can search is measured at GPT-2's size, with random prototypes, N(0, 0.02^2),
and random layer-normalised states. Random prototypes have no clusters, which is the worst case for
a graph. Runs that you name are measured with their own prototypes and states of validation text.

recall_50   the share of the 50 most likely tokens that are candidates
left_out    the probability of all tokens that are not candidates; its bound is from
            `NearestHead.mass_bound`
kl          KL(candidates || exact) in nats. The other direction is infinite, because other tokens
            have probability 0.

Tokens per second are those of the head alone, at batch sizes 1 and 8. They are medians of rounds
that alternate between exact logits and the index. A prepared head gives the exact logits, as in
sample.py. Rows appear in the CSV file as they are measured.
"""

import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from analysis import tables
from analysis.runs import Run, find_runs
from analysis.tables import Column
from base.command_line import cli, parse
from base.errors import check, too_small
from base.files import result_file
from benchmarks.head import seconds
from benchmarks.skip import states
from harmonic import HarmonicHead
from harmonic.integrations.faiss import NearestHead, supported

TOP = 50
COLUMNS: list[Column | str] = [
    "input",
    "head",
    "index",
    Column("build_s", "build, s"),
    Column("recall_50", "recall of the top 50"),
    Column("kl", "KL, nats"),
    Column("left_out", "probability left out"),
    Column("bound", "bound on it"),
    Column("exact_tokens_s_1", "exact, 1 text, tokens/s"),
    Column("ann_tokens_s_1", "index, 1 text, tokens/s"),
    Column("exact_tokens_s_8", "exact, 8 texts, tokens/s"),
    Column("ann_tokens_s_8", "index, 8 texts, tokens/s"),
]


@dataclass
class AnnConfig:
    """Nearest prototypes"""

    runs: list[str] = field(default_factory=list)
    """run folders"""
    heads: list[str] = field(default_factory=list)
    """heads to measure with random prototypes; none = all that faiss can search"""
    graphs: list[str] = field(default_factory=lambda: ["cosine", "manhattan", "cross_entropy"])
    """heads that also get a graph (hnsw); faiss needs an estimated 15 minutes to build one, unless
    the metric is L2, L1 or the inner product"""
    candidates: int = 512
    """prototypes that get a logit"""
    vocab_size: int = 50304
    """number of random prototypes"""
    n_embd: int = 768
    """width of random prototypes"""
    N: int = 16
    """number of states to search"""
    rounds: int = 3
    """how often each time is measured"""
    out: str = "results/ann.csv"
    """the CSV file"""

    def problems(self) -> list[str]:
        unknown = [name for name in self.heads + self.graphs if name not in supported()]
        found = [f"faiss cannot search {name}" for name in unknown]
        if self.vocab_size < TOP or self.candidates < TOP:
            found.append(f"vocab_size and candidates must be at least {TOP}, for recall_{TOP}")
        return found + too_small(self, N=8, rounds=1)


@torch.inference_mode()
def measure(source: str, head: HarmonicHead, h: torch.Tensor, index: str, c: AnnConfig) -> dict:
    """Measures a head and its states (N, C) with one index. Returns a row."""
    began = time.perf_counter()
    nearest = NearestHead(head, c.candidates, index)
    row = {
        "input": source,
        "head": head.name,
        "V": nearest.vocab_size,
        "C": h.shape[1],
        "index": index,
        "metric": nearest.metric.removeprefix("METRIC_"),
        "candidates": nearest.count,
        "build_s": f"{time.perf_counter() - began:.1f}",
    }
    prepared = head.prepared()
    exact = prepared(h).double()
    ids, found = nearest.candidates(h)
    # A graph may find too few candidates. The id -1 then stands for no token.
    chosen = torch.zeros(len(h), nearest.vocab_size + 1).scatter_(1, ids % (exact.shape[1] + 1), 1)
    chosen = chosen[:, :-1].bool()
    log_p = exact.log_softmax(1)
    kept = log_p.masked_fill(~chosen, -torch.inf).logsumexp(1)
    left_out = log_p.masked_fill(chosen, -torch.inf).logsumexp(1).exp()
    bound = nearest.mass_bound(found)
    row |= {
        "recall_50": f"{chosen.gather(1, exact.topk(TOP).indices).double().mean():.3f}",
        "kl": f"{-kept.mean():.2g}",
        "left_out": f"{left_out.mean():.2g}",
        "bound": f"{bound.mean():.2g}",
        "bound_max": f"{bound.max():.2g}",
    }
    for batch in (1, 8):
        some, times = h[:batch], []
        for _ in range(c.rounds):
            # Bound to this round by the call: each lambda runs at once.
            times.append((seconds(lambda: prepared(some)), seconds(lambda: nearest(some))))  # noqa: B023
        for name, took in zip(("exact", "ann"), zip(*times, strict=True), strict=True):
            row[f"{name}_tokens_s_{batch}"] = f"{batch / statistics.median(took):.1f}"
    return row


def cases(c: AnnConfig, runs: list[Run]) -> Iterator[tuple[str, HarmonicHead, torch.Tensor, str]]:
    """Yields (source of the prototypes, head, states, index), the fast cases first."""
    torch.manual_seed(0)
    for run in runs:
        head, h, _ = states(run, c.N)
        for index in ("flat", "hnsw"):
            yield run.name, head, h, index
    random = F.layer_norm(torch.randn(c.N, c.n_embd), (c.n_embd,))
    names = c.heads or supported()
    for index, chosen in (("flat", names), ("hnsw", [n for n in names if n in c.graphs])):
        for name in chosen:
            yield "random", HarmonicHead(c.n_embd, c.vocab_size, name).eval(), random, index


def main() -> None:
    (c,) = parse(sys.argv[1:], AnnConfig, words="runs")
    runs = find_runs(c.runs) if c.runs else []
    check(
        [
            f"{run.path}: faiss cannot search {run.model_config.head}"
            for run in runs
            if run.model_config.head not in supported()
        ]
    )
    rows, out = [], result_file(c.out)
    for name, head, h, index in cases(c, runs):
        rows.append(measure(name, head, h, index, c))
        tables.write_csv(out, rows)
        print(tables.text(rows[-1:], [Column(key) for key in rows[0]]), flush=True)
    print(tables.markdown(rows, COLUMNS))
    print(f"wrote {out}")


if __name__ == "__main__":
    cli(main)
