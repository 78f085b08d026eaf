"""What each head costs, as a ratio to `F.linear` + `F.cross_entropy` measured alternately in the same run.

    python -m benchmarks.head                                # every head at (N, V, C) = (1024, 4096, 256)
    python -m benchmarks.head manhattan --V=50304 --C=768    # one head at GPT-2's size

Ratios are medians over rounds of time(head) / time(yardstick next to it); float32, forward and backward of the mean loss. Writes a CSV.
"""

import csv
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from harmonic import HEADS, harmonic_loss
from training.config import UserError, check, cli, nearest, parse


@dataclass
class BenchmarkConfig:
    """Sizes"""

    heads: list[str] = field(default_factory=list)
    """which heads; none = all"""
    N: int = 1024
    """states"""
    V: int = 4096
    """prototypes"""
    C: int = 256
    """coordinates"""
    rounds: int = 5
    """measurements of each"""
    out: str = "results/head_cpu.csv"
    """the CSV file"""

    def problems(self) -> list[str]:
        found = [f"{k}={getattr(self, k)} must be at least 1" for k in ("N", "V", "C", "rounds") if getattr(self, k) < 1]
        return found + [f"unknown head {h}{nearest(h, HEADS)}" for h in self.heads if h not in HEADS]


def seconds(function) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def main():
    (c,) = parse(sys.argv[1:], BenchmarkConfig, words="heads")
    check([] if Path(c.out).parent.is_dir() else [f"--out={c.out}: the folder {Path(c.out).parent} does not exist"])
    g = torch.Generator().manual_seed(0)
    h = F.layer_norm(torch.randn(c.N, c.C, generator=g), (c.C,)).requires_grad_()
    w = (0.02 * torch.randn(c.V, c.C, generator=g)).requires_grad_()
    y = torch.randint(c.V, (c.N,), generator=g)

    def yardstick(backward):
        loss = F.cross_entropy(F.linear(h, w), y)
        if backward:
            loss.backward()

    def head(name, backward):
        with torch.set_grad_enabled(backward):
            loss = harmonic_loss(h, w, y, name)
        if backward:
            loss.backward()
        if not loss.isfinite():
            raise UserError(f"{name}: the loss is {loss.item()}")

    rows = []
    for name in tqdm(c.heads or HEADS, disable=None, leave=False):
        row = {"head": name, "N": c.N, "V": c.V, "C": c.C, "threads": torch.get_num_threads()}
        for part, backward in (("forward", False), ("forward_backward", True)):
            head(name, backward), yardstick(backward)  # compile, allocate
            pairs = [(seconds(lambda: head(name, backward)), seconds(lambda: yardstick(backward))) for _ in range(c.rounds)]  # noqa: B023
            row[f"{part}_seconds"] = f"{statistics.median(a for a, _ in pairs):.4f}"
            row[f"{part}_ratio"] = f"{statistics.median(a / b for a, b in pairs):.2f}"
        rows.append(row)
        h.grad = w.grad = None

    print(
        f"{'head':24}{'forward':>12}{'ratio':>8}{'+ backward':>14}{'ratio':>8}   N={c.N} V={c.V} C={c.C}, {torch.get_num_threads()} threads"
    )
    for r in rows:
        forward, both = f"{r['forward_seconds']} s", f"{r['forward_backward_seconds']} s"
        print(f"{r['head']:24}{forward:>12}{r['forward_ratio']:>8}{both:>14}{r['forward_backward_ratio']:>8}")
    with open(c.out, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {c.out}")


if __name__ == "__main__":
    cli(main)
