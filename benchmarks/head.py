"""What each head costs, as a ratio to `F.linear` + `F.cross_entropy` measured alternately in the same run.

    python -m benchmarks.head                                      # every head and peer at three sizes: about 40 minutes on 2 cores
    python -m benchmarks.head manhattan --sizes=1024x50304x768     # one head at GPT-2's size
    python -m benchmarks.head --sizes=1024x50304x768 --peers=false # the heads alone
    python -m benchmarks.head --growth=true                        # how time and memory grow with N, V, C and threads

float32; forward, and forward and backward of the mean loss, at h layer-normalised and prototypes of standard deviation 0.02. Ratios are
medians over rounds of time(head) / time(yardstick next to it). Memory is the peak of the process beyond inputs and gradients (Linux).
Errors are against float64, for 4 of the states and all prototypes: of the losses in nats, of the gradients relative to their largest
entry. Peers are what a user would write without this package; those that take minutes run at N=64, and so does their yardstick.
Writes a CSV and a bar chart beside it.
"""

import csv
import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from harmonic import CONTROLS, HEADS, HarmonicHead, harmonic_loss
from training.config import UserError, check, cli, nearest, parse

MIB = 2**20


@dataclass
class BenchmarkConfig:
    """Benchmark"""

    heads: list[str] = field(default_factory=list)
    """which heads; none = all"""
    sizes: str = "1024x50304x768,4096x4096x256,256x151936x896"
    """states x prototypes x coordinates, one or more"""
    rounds: int = 3
    """measurements of each"""
    peers: bool = True
    """measure the peers too"""
    growth: bool = False
    """measure instead how time and memory grow around the first size"""
    out: str = "results/head_cpu.csv"
    """the CSV file"""

    def problems(self) -> list[str]:
        found = [] if self.rounds > 0 else [f"rounds={self.rounds} must be at least 1"]
        for size in self.sizes.split(","):
            if len(numbers := size.split("x")) != 3 or not all(n.isdecimal() and int(n) for n in numbers):
                found.append(f"size {size!r} is not of the form 1024x50304x768")
        return found + [f"unknown head {h}{nearest(h, HEADS)}" for h in self.heads if h not in HEADS]


# What a user would write: (head, how) -> loss of (h, w, y). The slow ones take minutes at full size.


def _broadcast(h, w, y):
    return F.cross_entropy(-h.shape[1] * (h[:, None] - w).abs().sum(-1).log(), y)


def _cdist(p):
    return lambda h, w, y: F.cross_entropy(-h.shape[1] * torch.cdist(h, w, p=p).log(), y)


PEERS: dict[tuple[str, str], Callable] = {
    ("cross_entropy", "F.linear_cross_entropy"): F.linear_cross_entropy,
    ("euclidean", "torch.cdist"): _cdist(2.0),
    ("euclidean", "dense"): lambda h, w, y: harmonic_loss(h, w, y, "euclidean", exponent="dim", impl="dense"),
    ("cosine", "normalised F.linear"): lambda h, w, y: F.cross_entropy(
        -(h.shape[1] ** 0.5) * (1 - F.linear(F.normalize(h), F.normalize(w))).log(), y
    ),
    ("cosine", "dense"): lambda h, w, y: harmonic_loss(h, w, y, "cosine", exponent="sqrt_dim", impl="dense"),
    ("manhattan", "torch.cdist"): _cdist(1.0),
    ("manhattan", "torch.compile of the broadcast"): torch.compile(_broadcast),
    ("minkowski", "torch.cdist"): _cdist(1.5),
    ("chebyshev", "torch.cdist"): _cdist(float("inf")),
}
SLOW = {key for key in PEERS if key[0] in ("manhattan", "minkowski", "chebyshev")}
SLOW_N = 64


def seconds(function) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def resident(key: str) -> float:
    """A number of MiB from this process's status: VmRSS now, VmHWM at most since it was reset. NaN where there is none."""
    status = Path("/proc/self/status")
    if not status.exists():
        return float("nan")
    return next(int(line.split()[1]) / 1024 for line in status.read_text().splitlines() if line.startswith(key))


def peak_memory(function) -> float:
    """MiB that `function` needs at most, beyond what is there before."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    except OSError:
        return float("nan")
    before = resident("VmRSS")
    function()
    return resident("VmHWM") - before


def exponent(name: str) -> dict:
    """The n of all measurements here, as an argument: how many pairs are negligible depends on it."""
    return {} if name in CONTROLS else {"exponent": "sqrt_dim" if name == "cosine" else "dim"}


class Case:
    """Inputs of one size, and what is measured at them."""

    def __init__(self, N, V, C):
        g = torch.Generator().manual_seed(0)
        self.size = N, V, C
        self.h = F.layer_norm(torch.randn(N, C, generator=g), (C,)).requires_grad_()
        self.y = torch.randint(V, (N,), generator=g)
        self.head = HarmonicHead(C, V, "cross_entropy")
        self.head.weight.data = 0.02 * torch.randn(V, C, generator=g)

    def function(self, name, peer=None, n=None):
        """-> a function of `backward` that computes the loss of the first n states."""
        head = HarmonicHead(self.size[2], 1, name, **exponent(name))
        head.weight, head.real_vocab_size = self.head.weight, self.size[1]
        h, y = self.h[:n], self.y[:n]

        def run(backward):
            with torch.set_grad_enabled(backward):
                loss = PEERS[name, peer](h, head.weight, y) if peer else head.loss(h, y)
            if backward:
                loss.backward()
            if not loss.isfinite():
                raise UserError(f"{name} {peer or ''}: the loss is {loss.item()}")

        return run

    def yardstick(self, n=None):
        def run(backward):
            with torch.set_grad_enabled(backward):
                loss = F.cross_entropy(F.linear(self.h[:n], self.head.weight), self.y[:n])
            if backward:
                loss.backward()

        return run

    def clear(self):
        self.h.grad = self.head.weight.grad = None

    def memory(self, function) -> float:
        """The peak of forward and backward beyond inputs and gradients, in MiB: the less of two, for an allocator keeps what it likes."""
        N, V, C = self.size
        peaks = []
        for _ in range(2):
            self.clear()
            peaks.append(peak_memory(lambda: function(True)) - (N * C + V * C) * 4 / MIB)
        self.clear()
        return min(peaks)

    def errors(self, name, peer=None):
        """-> the largest errors against float64: of a loss in nats, of dL/dh and dL/dw relative to the largest entry."""
        h, w, y = self.h.detach()[:4], self.head.weight.detach(), self.y[:4]

        def run(dtype):
            a, b = h.to(dtype, copy=True).requires_grad_(), w.to(dtype, copy=True).requires_grad_()
            if peer and dtype == torch.float32:
                losses = torch.stack([PEERS[name, peer](a[i : i + 1], b, y[i : i + 1]) for i in range(len(a))])
            else:
                impl = "auto" if dtype == torch.float32 else "chunked"
                losses = harmonic_loss(a, b, y, name, reduction="none", impl=impl, **exponent(name))
            losses.sum().backward()
            return losses.detach().double(), a.grad.double(), b.grad.double()

        found, truth = run(torch.float32), run(torch.float64)
        largest = [(a - b).abs().max().item() for a, b in zip(found, truth, strict=True)]
        return largest[0], *(e / t.abs().max().item() for e, t in zip(largest[1:], truth[1:], strict=True))


def measure(case, name, peer, rounds) -> dict:
    """One row of the table."""
    n = min(SLOW_N, case.size[0]) if (name, peer) in SLOW else case.size[0]
    head, yardstick = case.function(name, peer, n), case.yardstick(n)
    row = {"head": name, "impl": peer or "ours", "N": n, "V": case.size[1], "C": case.size[2], "threads": torch.get_num_threads()}
    for part, backward in (("forward", False), ("forward_backward", True)):
        head(backward), yardstick(backward)  # compile, allocate
        pairs = []
        for _ in range(rounds):
            case.clear()
            mine = seconds(lambda: head(backward))  # noqa: B023
            case.clear()
            pairs.append((mine, seconds(lambda: yardstick(backward))))  # noqa: B023
        row[f"{part}_seconds"] = f"{statistics.median(a for a, _ in pairs):.4f}"
        row[f"{part}_ratio"] = f"{statistics.median(a / b for a, b in pairs):.2f}"
    mine, other = case.memory(head), case.memory(yardstick)
    row |= {"peak_mib": f"{mine:.0f}", "peak_ratio": f"{mine / other:.2f}"}
    if not peer and case.size[1] * case.size[2] < 5e7:  # float64 takes minutes beyond
        row |= dict(zip(("loss_error", "dh_error", "dw_error"), (f"{e:.0e}" for e in case.errors(name)), strict=True))
    return row


def chart(rows, path):
    """Forward and backward time of the first size as bars, peers hatched."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    first = [r for r in rows if (r["V"], r["C"]) == (rows[0]["V"], rows[0]["C"])]
    first.sort(key=lambda r: float(r["forward_backward_ratio"]))
    labels = [r["head"] if r["impl"] == "ours" else f"{r['head']}: {r['impl']}" for r in first]
    figure, axes = plt.subplots(figsize=(8, 0.28 * len(first) + 1.2), layout="constrained")
    colours = ["tab:blue" if r["impl"] == "ours" else "lightgrey" for r in first]
    bars = axes.barh(labels, [float(r["forward_backward_ratio"]) for r in first], color=colours)
    axes.bar_label(bars, [f" {r['forward_backward_ratio']}" for r in first], fontsize=8)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(xscale="log", xlabel="time, forward + backward, over F.linear + F.cross_entropy")
    N, V, C = (int(first[0][k]) for k in "NVC")
    figure.suptitle(f"N={N:,} V={V:,} C={C:,}, {first[0]['threads']} threads; grey: what a user would write", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.15)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def growth(c, path):
    """Seconds and MiB of a few heads as one dimension at a time is doubled, and with one thread."""
    N, V, C = (int(n) for n in c.sizes.split(",")[0].split("x"))
    cases = [(N * k // 4, V, C) for k in (1, 2, 4, 8)] + [(N, V // 2, C), (N, V * 2, C), (N, V, C // 2), (N, V, C * 2)]
    threads, rows = torch.get_num_threads(), []
    for size, count in tqdm([(s, threads) for s in cases] + ([((N, V, C), 1)] if threads > 1 else []), disable=None, leave=False):
        torch.set_num_threads(count)
        case = Case(*size)
        for name in c.heads or ["cross_entropy", "cosine", "manhattan"]:
            rows.append(measure(case, name, None, c.rounds))
            write(rows, path)
    torch.set_num_threads(threads)
    return rows


def write(rows, path):
    """The table so far."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(k for r in rows for k in r)))
        writer.writeheader()
        writer.writerows(rows)


def markdown(rows) -> str:
    """The table that README shows: ratios to the yardstick; a row a head, then the peers."""
    ours = [r for r in rows if r["impl"] == "ours"]
    sizes = list(dict.fromkeys(tuple(int(r[k]) for k in "NVC") for r in ours))
    first = [r for r in ours if tuple(int(r[k]) for k in "NVC") == sizes[0]]
    columns = " | ".join("{:,} x {:,} x {:,}".format(*s) for s in sizes)
    lines = [f"| head | {columns} | forward | peak memory | error, nats |", "|---" * (len(sizes) + 4) + "|"]
    for head in dict.fromkeys(r["head"] for r in ours):
        times = {tuple(int(r[k]) for k in "NVC"): r["forward_backward_ratio"] for r in ours if r["head"] == head}
        r = next(r for r in first if r["head"] == head)
        lines.append(
            f"| {head} | {' | '.join(times.get(s, '') for s in sizes)} | {r['forward_ratio']} | {r['peak_ratio']} | {r['loss_error']} |"
        )
    lines += [
        "",
        f"| what a user would write, {sizes[0][1]:,} x {sizes[0][2]:,} | forward + backward | forward | peak memory |",
        "|---|---|---|---|",
    ]
    for r in rows:
        if r["impl"] != "ours":
            where = "" if int(r["N"]) == sizes[0][0] else f" (N={r['N']})"
            lines.append(f"| {r['head']}: {r['impl']}{where} | {r['forward_backward_ratio']} | {r['forward_ratio']} | {r['peak_ratio']} |")
    return "\n".join(lines)


def table(rows):
    print(f"{'head':24}{'implementation':32}{'forward':>10}{'ratio':>8}{'+ backward':>12}{'ratio':>8}{'peak':>10}{'ratio':>8}{'error':>8}")
    sizes = None
    for r in rows:
        if sizes != (sizes := (r["N"], r["V"], r["C"], r["threads"])):
            print("N={} V={} C={}, {} threads".format(*sizes))
        time_ = [f"{float(r['forward_seconds']):.2f} s", r["forward_ratio"], f"{float(r['forward_backward_seconds']):.2f} s"]
        print(
            f"{r['head']:24}{r['impl']:32}{time_[0]:>10}{time_[1]:>8}{time_[2]:>12}{r['forward_backward_ratio']:>8}"
            f"{r['peak_mib'] + ' MiB':>10}{r['peak_ratio']:>8}{r.get('loss_error', ''):>8}"
        )


def main():
    (c,) = parse(sys.argv[1:], BenchmarkConfig, words="heads")
    check([] if Path(c.out).parent.is_dir() else [f"--out={c.out}: the folder {Path(c.out).parent} does not exist"])
    rows = []
    if c.growth:
        rows = growth(c, c.out)
    else:
        names, sizes = c.heads or list(HEADS), c.sizes.split(",")
        work = [(size, name, None) for size in sizes for name in names]
        if c.peers:
            work += [(sizes[0], name, peer) for name, peer in PEERS if name in names]
        case, at = None, None
        for size, name, peer in tqdm(sorted(work, key=lambda w: sizes.index(w[0])), disable=None, leave=False):
            if size != at:
                case, at = Case(*(int(n) for n in size.split("x"))), size
            rows.append(measure(case, name, peer, c.rounds))
            write(rows, c.out)
    table(rows)
    print(f"wrote {c.out}", end="\n" if c.growth else "")
    if not c.growth:
        picture = Path(c.out).with_suffix(".png")
        chart(rows, picture)
        print(f" and {picture}")


if __name__ == "__main__":
    cli(main)
