"""Measures the effect of skipping negligible pairs: time, and errors of gradients.

    python -m benchmarks.skip out/manhattan out/canberra      # trained runs, elementwise heads
    python -m benchmarks.skip --out=out/skip.csv  # only random input, at the demo's size

In each row, pairs whose slope |dL/draw| is below skip / V of the target's are skipped (see
`harmonic_loss`). The kernels save time when all pairs of a 4 x 4 tile are skipped. For several
values of `skip` the table has the share of skipped pairs and tiles. It also has the time of forward
and backward, divided by that with skip=0 (measured alternately), and the errors of gradients,
|difference| / |gradient| in Frobenius norms. Inputs are validation tokens of a run's newest
checkpoint, and random numbers. Writes a CSV file.
"""

import statistics
import sys
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from analysis import tables
from analysis.runs import Run, find_runs
from base.command_line import cli, parse
from base.errors import check, too_small
from base.files import result_file
from benchmarks.head import seconds
from harmonic import HEADS, IGNORE_INDEX, HarmonicHead
from harmonic.kernels import pairs
from harmonic.pairwise import full_float32, log_distance, operands
from training.data import validation_windows
from training.objective import batches_of


@dataclass
class SkipConfig:
    """Skipping"""

    runs: list[str] = field(default_factory=list)
    """run folders"""
    skips: list[float] = field(default_factory=lambda: [1e-6, 1e-4, 1e-2])
    """values of `skip` to measure"""
    N: int = 1024
    """number of states"""
    rounds: int = 7
    """how often each is measured"""
    out: str = "results/skip.csv"
    """the CSV file"""

    def problems(self) -> list[str]:
        return too_small(self, N=1, rounds=1)


@torch.no_grad()
def states(run: Run, n: int) -> tuple[HarmonicHead, torch.Tensor, torch.Tensor]:
    """The head of a run, and hidden states (n, C) and targets of its first validation windows."""
    (model, _), data, c = run.load(), run.data(), run.model_config
    windows = validation_windows(data.splits["val"].tokens, c.block_size, -(-n // c.block_size))
    x, y = next(batches_of(data, c).validation(windows, len(windows)))
    h, y = model.hidden(x)[y != IGNORE_INDEX], y[y != IGNORE_INDEX]
    return model.head, h[:n], y[:n]


def shares(
    head: HarmonicHead, h: torch.Tensor, y: torch.Tensor, skip: float
) -> tuple[float, float]:
    """The share of pairs, and of 4 x 4 tiles, that are skipped."""
    with full_float32(h.device):
        both = operands(h.detach(), head.prototypes().detach(), head.name, **head.geometry())
        raw = pairs(both.x, both.y, both.distance.kernel, both.options).detach().requires_grad_()
        log_d = log_distance(
            both.distance, raw, None if both.u is None else both.u[:, None], both.v, both.options
        )
        logits = -head.strength * (log_d if head.is_harmonic else log_d.exp())
        slope = torch.autograd.grad(F.cross_entropy(logits, y, reduction="sum"), raw)[0].abs()
    out = slope < skip / slope.shape[1] * slope.gather(1, y[:, None])
    tiles = (
        F.pad(out, (0, -out.shape[1] % 4, 0, -out.shape[0] % 4), value=True)
        .unflatten(1, (-1, 4))
        .unflatten(0, (-1, 4))
    )
    return out.float().mean().item(), tiles.all(3).all(1).float().mean().item()


def measure(
    name: str,
    head: HarmonicHead,
    h: torch.Tensor,
    y: torch.Tensor,
    skips: list[float],
    rounds: int,
) -> list[dict]:
    def run(skip: float) -> tuple[float, torch.Tensor, torch.Tensor]:
        head.skip = skip
        x = h.clone().requires_grad_()
        head.zero_grad()
        took = seconds(lambda: head.loss(x, y).backward())
        assert x.grad is not None and head.weight.grad is not None
        return took, x.grad, head.weight.grad.clone()

    run(0.0)
    rows = []
    for skip in skips:
        times = [(run(skip)[0], run(0.0)[0]) for _ in range(rounds)]
        (_, dx, dw), (_, dx0, dw0) = run(skip), run(0.0)
        pairs, tiles = shares(head, h, y, skip)
        rows.append(
            {
                "input": name,
                "head": head.name,
                "skip": skip,
                "pairs_left_out": f"{pairs:.4f}",
                "tiles_left_out": f"{tiles:.4f}",
                "time_ratio": f"{statistics.median(a / b for a, b in times):.2f}",
                "dh_error": f"{(dx - dx0).norm() / dx0.norm():.1e}",
                "dw_error": f"{(dw - dw0).norm() / dw0.norm():.1e}",
            }
        )
    return rows


def main() -> None:
    (c,) = parse(sys.argv[1:], SkipConfig, words="runs")
    runs = find_runs(c.runs) if c.runs else []
    matmul = [r for r in runs if HEADS[r.model_config.head].multiplies]
    check(
        [
            f"{r.path}: {r.model_config.head} skips no pairs, only elementwise distances do"
            for r in matmul
        ]
    )
    skips, rows, out = c.skips, [], result_file(c.out)
    g = torch.Generator().manual_seed(0)
    head = HarmonicHead(192, 4096, "manhattan", exponent="dim")
    h = F.layer_norm(torch.randn(c.N, 192, generator=g), (192,))
    y = torch.randint(4096, (c.N,), generator=g)
    rows += measure("random", head, h, y, skips, c.rounds)
    for run in runs:
        head, h, y = states(run, c.N)
        rows += measure(run.name, head, h, y, skips, c.rounds)
    print(tables.text(rows, list(rows[0])))
    tables.write_csv(out, rows)
    print(f"wrote {out}")


if __name__ == "__main__":
    cli(main)
