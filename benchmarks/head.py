"""Measures the time and memory of each head, relative to `F.linear` + `F.cross_entropy`.

    python -m benchmarks.head  # every head and peer at three sizes: about 40 minutes on 2 cores
    python -m benchmarks.head manhattan --sizes=1024x50304x768     # one head at GPT-2's size
    python -m benchmarks.head --sizes=1024x50304x768 --peers=false # only the heads
    python -m benchmarks.head --growth=true  # how time and memory grow with N, V, C and threads
    # on a GPU, also with matrix products in bfloat16 autocast
    python -m benchmarks.head --device=cuda
    # inside autocast, with each precision of the head's products
    python -m benchmarks.head --dtypes=[bfloat16] --precisions=[float32,split,autocast]

Inputs     Layer-normalised states, and prototypes of standard deviation 0.02.
Time       Of the mean loss: forward, and forward and backward. The head and the yardstick run
           alternately. A ratio is the median over rounds of time(head) / time(yardstick). With
           dtype bfloat16 both run inside autocast, and heads have precision="autocast".
Memory     The peak besides inputs and gradients: of the process (Linux), or on a GPU of PyTorch's
           allocator.
Errors     Against float64, for 4 states and all prototypes. Losses: in nats. Gradients: relative
           to their largest entry.
Peers      What a user would write without this package. Those that take minutes run at N=64 (on a
           GPU 512), and so does their yardstick.

It writes a CSV file and a bar chart beside it. benchmarks/gpu.py uses the same functions, so `main`
imports what only the command line needs.
"""

import ctypes
import gc
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from analysis import tables
from analysis.tables import Column
from harmonic import HEADS, HarmonicHead, harmonic_loss
from harmonic.distances import OTHER_NAMES

MIB = 2**20
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # A function of (h, w, y).
Run = Callable[[bool], None]  # Computes forward, and backward if its argument is True.
SIZES = {
    "cpu": "1024x50304x768,4096x4096x256,256x151936x896",
    "cuda": "8192x50304x768,16384x4096x256",
}


@dataclass
class BenchmarkConfig:
    """Benchmark"""

    heads: list[str] = field(default_factory=list)
    """the heads to measure; none = all"""
    device: Literal["cpu", "cuda"] = "cpu"
    """the device to measure on"""
    sizes: str | None = None
    """states x prototypes x coordinates, separated by commas; null = SIZES of the device"""
    dtypes: list[Literal["float32", "bfloat16"]] = field(default_factory=list)
    """float32, or bfloat16 autocast (only for heads that it changes, unless you name heads); none =
    float32, and on a GPU both"""
    precisions: list[Literal["float32", "split", "autocast"]] = field(default_factory=list)
    """precisions of matrix products (only for heads that they change, unless you name heads); none
    = autocast, whose type is the dtype"""
    rounds: int = 3
    """how often each is measured"""
    peers: bool = True
    """also measure the peers"""
    growth: bool = False
    """instead, measure how time and memory grow around the first size"""
    out: str | None = None
    """the CSV file; null = results/head_cpu.csv or head_cuda.csv"""

    def __post_init__(self) -> None:
        if not self.dtypes:
            self.dtypes = ["float32", "bfloat16"] if self.device == "cuda" else ["float32"]

    def each_size(self) -> list[str]:
        return (self.sizes or SIZES[self.device]).split(",")

    def table(self) -> Path:
        return Path(self.out or f"results/head_{self.device}.csv")

    def problems(self) -> list[str]:
        from base.errors import nearest, too_small

        found = too_small(self, rounds=1)
        if self.device == "cuda" and not torch.cuda.is_available():
            found.append("device=cuda: PyTorch sees no GPU here")
        if self.device == "cuda" and self.growth:
            found.append("growth=true measures a CPU: leave device=cuda out")
        for size in self.each_size():
            if len(numbers := size.split("x")) != 3 or not all(
                n.isdecimal() and int(n) for n in numbers
            ):
                found.append(f"size {size!r} is not of the form 1024x50304x768")
        return found + [
            f"unknown head {h}{nearest(h, HEADS, OTHER_NAMES)}"
            for h in self.heads
            if h not in HEADS
        ]


# What a user would write: (head, how) -> loss of (h, w, y). SLOW ones take minutes at full size.


def _broadcast(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(-h.shape[1] * (h[:, None] - w).abs().sum(-1).log(), y)


def _cdist(p: float) -> Loss:
    return lambda h, w, y: F.cross_entropy(-h.shape[1] * torch.cdist(h, w, p=p).log(), y)


PEERS: dict[tuple[str, str], Loss] = {}
if hasattr(F, "linear_cross_entropy"):  # PyTorch 2.13
    PEERS["cross_entropy", "F.linear_cross_entropy"] = F.linear_cross_entropy
PEERS |= {
    ("euclidean", "torch.cdist"): _cdist(2.0),
    ("euclidean", "dense"): lambda h, w, y: harmonic_loss(
        h, w, y, "euclidean", exponent="dim", impl="dense"
    ),
    ("cosine", "normalised F.linear"): lambda h, w, y: F.cross_entropy(
        -(h.shape[1] ** 0.5) * (1 - F.linear(F.normalize(h), F.normalize(w))).log(), y
    ),
    ("cosine", "dense"): lambda h, w, y: harmonic_loss(
        h, w, y, "cosine", exponent="sqrt_dim", impl="dense"
    ),
    ("manhattan", "torch.cdist"): _cdist(1.0),
    ("manhattan", "torch.compile of the broadcast"): torch.compile(_broadcast),
    ("minkowski", "torch.cdist"): _cdist(1.5),
    ("chebyshev", "torch.cdist"): _cdist(float("inf")),
}
SLOW = {key for key in PEERS if key[0] in ("manhattan", "minkowski", "chebyshev")}
SLOW_N = {"cpu": 64, "cuda": 512}


# Fused linear cross-entropies that only run on a GPU: name -> function that imports it. Operands
# are bfloat16, as in their own benchmarks.


def _chunked() -> Loss:
    options = torch.nn.LinearCrossEntropyOptions()  # PyTorch 2.13
    return lambda h, w, y: F.linear_cross_entropy(h, w, y, options=options)


def _liger() -> Loss:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    fused = LigerFusedLinearCrossEntropyLoss()
    return lambda h, w, y: fused(w, h, y)


def _apple() -> Loss:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy


def _quack() -> Loss:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy


GPU_PEERS = {
    "F.linear_cross_entropy, chunked": _chunked,
    "Liger": _liger,
    "cut_cross_entropy": _apple,
    "quack": _quack,
}


def add_gpu_peer(name: str) -> None:
    """Adds one of GPU_PEERS to PEERS.

    Raises: ImportError if its package is missing, AttributeError if PyTorch is too old.
    """
    loss = GPU_PEERS[name]()
    PEERS["cross_entropy", name] = lambda h, w, y: loss(h.bfloat16(), w.bfloat16(), y)


def seconds(function: Callable[[], object], device: str = "cpu") -> float:
    """The time of one call."""
    wait(device)
    began = time.perf_counter()
    function()
    wait(device)
    return time.perf_counter() - began


def wait(device: str) -> None:
    """Waits until a GPU has done its work."""
    if device == "cuda":
        torch.cuda.synchronize()


def resident(key: str) -> float:
    """The memory of this process in MiB; NaN if the system does not tell.

    key: VmRSS for now, or VmHWM for the peak since the last reset.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return float("nan")
    return next(
        int(line.split()[1]) / 1024
        for line in status.read_text().splitlines()
        if line.startswith(key)
    )


def peak_memory(function: Callable[[], object], device: str = "cpu") -> float:
    """The peak memory of a function in MiB, besides the memory that is in use before."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        allocated = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - allocated) / MIB
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # Resets the peak.
    except OSError:
        return float("nan")
    before = resident("VmRSS")
    function()
    return resident("VmHWM") - before


def exponent(name: str) -> dict:
    """The exponent of all measurements, as an argument.

    It is fixed, because the number of negligible pairs depends on it.
    """
    return {} if HEADS[name].is_control else {"exponent": "sqrt_dim" if name == "cosine" else "dim"}


class Case:
    """Inputs of one size, and measurements with them."""

    def __init__(
        self,
        size: tuple[int, int, int],
        device: str = "cpu",
        dtype: str = "float32",
        precision: str = "autocast",
    ):
        g = torch.Generator().manual_seed(0)
        self.size, self.device, self.dtype, self.precision = size, device, dtype, precision
        N, V, C = size
        self.autocast = torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16")
        self.h = F.layer_norm(torch.randn(N, C, generator=g), (C,)).to(device).requires_grad_()
        self.y = torch.randint(V, (N,), generator=g).to(device)
        self.head = HarmonicHead(C, V, "cross_entropy")
        self.head.weight = torch.nn.Parameter((0.02 * torch.randn(V, C, generator=g)).to(device))

    def function(self, name: str, peer: str | None = None, n: int | None = None) -> Run:
        """A function that computes the loss of the first n states. See `Run`."""
        head = HarmonicHead(self.size[2], 1, name, precision=self.precision, **exponent(name)).to(
            self.device
        )
        head.weight, head.real_vocab_size = self.head.weight, self.size[1]
        h, y = self.h[:n], self.y[:n]

        def run(backward: bool) -> None:
            with torch.set_grad_enabled(backward), self.autocast:
                loss = PEERS[name, peer](h, head.weight, y) if peer else head.loss(h, y)
            if backward:
                loss.backward()
            if self.device == "cpu" and not loss.isfinite():  # Not on a GPU, where this would wait.
                raise FloatingPointError(f"{name} {peer or ''}: the loss is {loss.item()}")

        return run

    def yardstick(self, n: int | None = None) -> Run:
        """The same function for F.linear + F.cross_entropy."""

        def run(backward: bool) -> None:
            with torch.set_grad_enabled(backward), self.autocast:
                loss = F.cross_entropy(F.linear(self.h[:n], self.head.weight), self.y[:n])
            if backward:
                loss.backward()

        return run

    def clear(self) -> None:
        """Frees the gradients."""
        self.h.grad = self.head.weight.grad = None

    def memory(self, function: Run) -> float:
        """The peak memory in MiB of forward and backward, besides inputs and gradients.

        It is the smaller of two measurements, because allocators may hold memory that is free.
        """
        N, V, C = self.size
        peaks = []
        for _ in range(2):
            self.clear()
            peaks.append(
                peak_memory(lambda: function(True), self.device) - (N * C + V * C) * 4 / MIB
            )
        self.clear()
        return min(peaks)

    def errors(self, name: str, peer: str | None = None) -> tuple[float, ...]:
        """The largest errors against float64, of losses, dL/dh and dL/dw.

        Losses are in nats. Gradients are relative to their largest entry.
        """
        h, w, y = self.h.detach()[:4], self.head.weight.detach(), self.y[:4]

        def run(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
            a, b = h.to(dtype, copy=True).requires_grad_(), w.to(dtype, copy=True).requires_grad_()
            with self.autocast:
                # Eight copies of each state, because some peers need a multiple of eight.
                if peer and dtype == torch.float32:
                    rows = [
                        (a[i : i + 1].repeat(8, 1), b, y[i : i + 1].repeat(8))
                        for i in range(len(a))
                    ]
                    losses = torch.stack([PEERS[name, peer](*row) for row in rows])
                else:
                    impl = "auto" if dtype == torch.float32 else "chunked"
                    how = {"impl": impl, "precision": self.precision, **exponent(name)}
                    losses = harmonic_loss(a, b, y, name, reduction="none", **how)
            losses.sum().backward()
            assert a.grad is not None and b.grad is not None
            return losses.detach().double(), a.grad.double(), b.grad.double()

        found, truth = run(torch.float32), run(torch.float64)
        largest = [(a - b).abs().max().item() for a, b in zip(found, truth, strict=True)]
        return largest[0], *(
            e / t.abs().max().item() for e, t in zip(largest[1:], truth[1:], strict=True)
        )


def measure(
    case: Case, name: str, peer: str | None, rounds: int, label_precision: bool = False
) -> dict:
    """Measures one row. label_precision: whether to add a column for the precision."""
    n = min(SLOW_N[case.device], case.size[0]) if (name, peer) in SLOW else case.size[0]
    head, yardstick = case.function(name, peer, n), case.yardstick(n)
    row = {"head": name, "impl": peer or "ours", "N": n, "V": case.size[1], "C": case.size[2]}
    row |= (
        {"threads": torch.get_num_threads()}
        if case.device == "cpu"
        else {"device": torch.cuda.get_device_name()}
    )
    if case.device == "cuda" or case.dtype != "float32":
        row["dtype"] = case.dtype
    if label_precision:
        row["precision"] = case.precision
    for part, backward in (("forward", False), ("forward_backward", True)):
        head(backward), yardstick(backward)  # Compiles and allocates.
        pairs = []
        for _ in range(rounds):
            case.clear()
            mine = seconds(lambda: head(backward), case.device)  # noqa: B023
            case.clear()
            pairs.append((mine, seconds(lambda: yardstick(backward), case.device)))  # noqa: B023
        row[f"{part}_seconds"] = f"{statistics.median(a for a, _ in pairs):.4g}"
        row[f"{part}_ratio"] = f"{statistics.median(a / b for a, b in pairs):.2f}"
    mine, other = case.memory(head), case.memory(yardstick)
    row |= {"peak_mib": f"{mine:.0f}", "peak_ratio": f"{mine / other:.2f}"}
    # For larger heads float64 takes minutes on a CPU.
    if not peer and (case.device == "cuda" or case.size[1] * case.size[2] < 5e7):
        keys = ("loss_error", "dh_error", "dw_error")
        row |= {k: f"{e:.0e}" for k, e in zip(keys, case.errors(name), strict=True)}
    return row


def chart(rows: list[dict], path: Path) -> None:
    """Draws the time of forward and backward at the first size as bars from 1, the baseline. Peers
    are grey."""
    from matplotlib.ticker import LogLocator

    from analysis import figures

    first = [r for r in rows if place(r) == place({**rows[0], "N": r["N"]})]
    first.sort(key=lambda r: float(r["forward_backward_ratio"]))
    labels = [r["head"] if r["impl"] == "ours" else f"{r['head']}: {r['impl']}" for r in first]
    colors = [figures.head_color(r["head"]) if r["impl"] == "ours" else figures.GREY for r in first]
    figure = figures.figure(1.0 + 0.2 * len(first))
    axes = figure.subplots()
    ratios = [float(r["forward_backward_ratio"]) for r in first]
    axes.barh(labels, [ratio - 1 for ratio in ratios], left=1, color=colors, height=0.7)
    for at, ratio in enumerate(ratios):
        side = 1 if ratio >= 1 else -1
        axes.annotate(
            f"{ratio:.2f}",
            (ratio, at),
            xytext=(4 * side, 0),
            textcoords="offset points",
            ha="left" if side > 0 else "right",
            va="center",
        )
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlim(0.6 * min(1, *ratios), 2 * max(1, *ratios))
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("time of forward + backward, times that of F.linear + F.cross_entropy")
    n, v, c = (int(first[0][k]) for k in "NVC")
    types = ", ".join([*(first[0][k] for k in ("dtype",) if k in first[0]), where(first[0])])
    axes.set_title(
        f"{n:,} states, {v:,} prototypes, {c:,} coordinates; {types}\n"
        "coloured: this repository; grey: what a user would write"
    )
    axes.margins(y=0.01)
    axes.grid(axis="x", alpha=0.2)
    axes.set_axisbelow(True)
    figures.save(figure, path)


def growth(c: BenchmarkConfig, path: Path) -> list[dict]:
    """Measures a few heads while one dimension is doubled, and with one thread."""
    from tqdm import tqdm

    N, V, C = (int(n) for n in c.each_size()[0].split("x"))
    sizes = [(N * k // 4, V, C) for k in (1, 2, 4, 8)]
    sizes += [(N, V // 2, C), (N, V * 2, C), (N, V, C // 2), (N, V, C * 2)]
    threads, rows = torch.get_num_threads(), []
    cases = [(size, threads) for size in sizes]
    if threads > 1:
        cases.append(((N, V, C), 1))
    for size, count in tqdm(cases, disable=None, leave=False):
        torch.set_num_threads(count)
        case = Case(size)
        for name in c.heads or ["cross_entropy", "cosine", "manhattan"]:
            rows.append(measure(case, name, None, c.rounds))
            tables.write_csv(path, rows)
    torch.set_num_threads(threads)
    return rows


def place(row: dict) -> str:
    """The size and types of a row, in words."""
    size = "{:,} x {:,} x {:,}".format(*(int(row[k]) for k in "NVC"))
    return ", ".join([size, *(row[k] for k in ("dtype", "precision") if k in row)])


def where(row: dict) -> str:
    """The device of a row, in words."""
    return row.get("device") or f"{row['threads']} threads"


def markdown(rows: list[dict]) -> str:
    """The tables of docs/performance.md: ratios to the yardstick, of heads and of peers."""
    ours = [r for r in rows if r["impl"] == "ours"]
    places = list(dict.fromkeys(map(place, ours)))
    by_head: dict[str, dict] = {}
    for r in ours:
        # Other columns are those of the first size.
        row = by_head.setdefault(r["head"], dict(r))
        row[place(r)] = r["forward_backward_ratio"]
    columns: tables.Columns = [
        "head",
        *places,
        Column("forward_ratio", "forward"),
        Column("peak_ratio", "peak memory"),
        Column("loss_error", "error", unit="nats"),
    ]
    peers = [{**r, "name": peer_name(r, ours[0]["N"])} for r in rows if r["impl"] != "ours"]
    size = "{:,} x {:,}".format(*(int(ours[0][k]) for k in "VC"))
    peer_columns = [
        Column("name", f"what a user would write, {size}"),
        Column("forward_backward_ratio", "forward + backward"),
        Column("forward_ratio", "forward"),
        Column("peak_ratio", "peak memory"),
    ]
    heads = tables.markdown(list(by_head.values()), columns)
    return f"{heads}\n\n{tables.markdown(peers, peer_columns)}"


def peer_name(row: dict, usual: str) -> str:
    """The name of a peer, with its number of states if that is not the `usual` one."""
    how = [f"N={row['N']}"] if row["N"] != usual else []
    if "dtype" in row:
        how.append(row["dtype"])
    name = f"{row['head']}: {row['impl']}"
    return f"{name} ({', '.join(how)})" if how else name


def text(rows: list[dict]) -> str:
    """The rows for a terminal, a table for each place."""
    columns: tables.Columns = [
        "head",
        Column("impl", "implementation"),
        Column("forward", unit="ms"),
        Column("forward_ratio", "ratio"),
        Column("both", "+ backward", unit="ms"),
        Column("forward_backward_ratio", "ratio"),
        Column("peak_mib", "peak", unit="MiB"),
        Column("peak_ratio", "ratio"),
        Column("loss_error", "error"),
    ]
    groups: dict[str, list[dict]] = {}
    for r in rows:
        times = {
            "forward": f"{1000 * float(r['forward_seconds']):.1f}",
            "both": f"{1000 * float(r['forward_backward_seconds']):.1f}",
        }
        groups.setdefault(f"{place(r)}, {where(r)}", []).append({**r, **times})
    return "\n".join(f"{at}\n{tables.text(group, columns)}" for at, group in groups.items())


def main() -> None:
    from tqdm import tqdm

    from base.command_line import parse
    from base.files import result_file

    (c,) = parse(sys.argv[1:], BenchmarkConfig, words="heads")
    out = result_file(c.table())
    rows = []
    if c.growth:
        rows = growth(c, out)
    else:
        work: list[tuple[tuple[str, str, str], str, str | None]] = []
        for at in itertools.product(c.each_size(), c.dtypes, c.precisions or ["autocast"]):
            # Autocast and precisions change only these heads.
            products = [name for name in HEADS if HEADS[name].multiplies]
            changed = at[2] != "float32" if c.precisions else at[1] == "bfloat16"
            names = c.heads or (products if changed else list(HEADS))
            work += [(at, name, None) for name in names]
            if c.peers and at == work[0][0]:
                work += [(at, *key) for key in PEERS if key[0] in names]
        case, place_now = None, None
        for at, name, peer in tqdm(work, disable=None, leave=False):
            if case is None or place_now != at:
                size, dtype, precision = at
                N, V, C = (int(n) for n in size.split("x"))
                case, place_now = Case((N, V, C), c.device, dtype, precision), at
            rows.append(measure(case, name, peer, c.rounds, bool(c.precisions)))
            tables.write_csv(out, rows)
    print(text(rows))
    print(f"wrote {out}", end="\n" if c.growth else "")
    if not c.growth:
        picture = out.with_suffix(".png")
        chart(rows, picture)
        print(f" and {picture}")


if __name__ == "__main__":
    from base.command_line import cli

    cli(main)
