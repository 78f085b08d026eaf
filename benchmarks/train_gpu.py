"""What each head makes of training GPT-2 124M on one GPU: tokens/s, model FLOP utilisation, energy, memory, and its share of an iteration.

    python -m benchmarks.train_gpu                       # cross-entropy and the families
    python -m benchmarks.train_gpu cosine manhattan
    python -m benchmarks.train_gpu cosine --device=cpu --config=configs/study.yaml --batch_size=2 --out=a.csv    # to see it work

The model and whether its blocks are compiled are those of configs/gpt2_124m.yaml, with GPT-2's vocabulary; the tokens are random. An
iteration is one forward and backward pass of `batch_size` windows, clipping and AdamW, as train.py does them, in bfloat16 autocast. Parts
are timed with the device waited for at each mark, the whole once an iteration. Energy is the board's, from NVML's counter, over at least
SECONDS. "F.linear + F.cross_entropy" is the same trunk with the loss that one would write, inside the same autocast: the yardstick.
"""

import gc
import statistics
import sys
import time
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from tqdm import tqdm

from benchmarks.head import write
from benchmarks.train_speed import PARTS, iteration
from harmonic import HEADS
from model import Model, ModelConfig, adamw
from training.config import cli, nearest, parse, read_yaml
from training.telemetry import peak_flops

PLAIN = "F.linear + F.cross_entropy"
FAMILIES = ["cross_entropy", "euclidean", "cosine", "mahalanobis", "manhattan", "minkowski", "chebyshev", "hamming_soft", "canberra"]
FAMILIES += ["bray_curtis"]
SECONDS = 2.0


@dataclass
class TrainConfig:
    """What to measure"""

    heads: list[str] = field(default_factory=list)
    """which heads; none = one of each family"""
    config: str = "configs/gpt2_124m.yaml"
    """model and optimiser"""
    batch_size: int = 16
    """windows of an iteration"""
    precision: str = "autocast"
    """head_precision"""
    device: Literal["cuda", "cpu"] = "cuda"
    """where"""
    out: str = "results/train_gpu.csv"
    """the CSV file"""

    def problems(self) -> list[str]:
        found = [f"unknown head {h}{nearest(h, HEADS)}" for h in self.heads if h not in HEADS]
        if not Path(self.out).parent.is_dir():
            found.append(f"--out={self.out}: the folder {Path(self.out).parent} does not exist")
        if self.device == "cuda" and not torch.cuda.is_available():
            found.append("device=cuda: PyTorch sees no GPU here")
        return found


def joules(device: str) -> float:
    """The board's energy counter; NaN on a CPU."""
    if device == "cpu":
        return float("nan")
    import pynvml

    pynvml.nvmlInit()
    board = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties().uuid}".encode())
    return pynvml.nvmlDeviceGetTotalEnergyConsumption(board) / 1000


def measure(c: TrainConfig, settings: dict, name: str) -> dict:
    """One row of the table."""
    gc.collect()  # the last model, for what is compiled is in cycles
    torch.manual_seed(0)
    wait = torch.cuda.synchronize if c.device == "cuda" else lambda: None
    head = "cross_entropy" if name == PLAIN else name
    known = {f.name for f in fields(ModelConfig)}
    given = {k: v for k, v in settings.items() if k in known} | {"head": head, "head_precision": c.precision}
    model = Model(ModelConfig(**given | {"vocab_size": 50304, "real_vocab_size": 50257})).to(c.device)
    for block in model.blocks if settings.get("compile", True) else ():
        block.compile(fullgraph=True)
    optimizer = adamw(model, float(settings["learning_rate"]), (0.9, settings["beta2"]), settings["weight_decay"], None, c.device)
    T = settings["block_size"]
    x, y = torch.randint(50257, (2, c.batch_size, T), device=c.device)
    plain = (lambda h, y: F.cross_entropy(F.linear(h, model.head.weight).flatten(0, 1), y.flatten())) if name == PLAIN else None
    step = partial(iteration, model, optimizer, x, y, torch.autocast(c.device, torch.bfloat16), loss=plain)

    for _ in range(3):
        step()
    parts = []
    for _ in range(5):
        marks = []
        step(lambda: (wait(), marks.append(time.perf_counter())))  # noqa: B023
        parts.append([b - a for a, b in zip(marks, marks[1:], strict=False)])
    if c.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    wait()
    began, energy, count = time.perf_counter(), joules(c.device), 0
    while time.perf_counter() - began < SECONDS:
        step()
        wait()
        count += 1
    took, used = time.perf_counter() - began, joules(c.device) - energy
    tokens = count * c.batch_size * T
    gpu = c.device == "cuda"
    row = {"head": name, "device": torch.cuda.get_device_name() if gpu else "cpu", "tokens_per_s": f"{tokens / took:.0f}"}
    peak = peak_flops(c.device)
    row["mfu"] = f"{tokens / took * model.flops_per_token() / peak:.3f}" if peak else ""
    row |= {"joules_per_token": f"{used / tokens:.3g}", "peak_gib": f"{torch.cuda.max_memory_allocated() / 2**30:.2f}" if gpu else ""}
    return row | {f"{part}, ms": f"{1000 * statistics.median(p):.2f}" for part, p in zip(PARTS, zip(*parts, strict=True), strict=True)}


def markdown(rows) -> str:
    """The table, beside the first row."""
    plain = float(rows[0]["tokens_per_s"])
    lines = ["| head | tokens/s | to the first row | MFU | mJ a token | peak GiB | head, ms | iteration, ms |", "|---" * 8 + "|"]
    for r in rows:
        parts = [float(r[f"{part}, ms"]) for part in PARTS]
        speed = float(r["tokens_per_s"])
        mfu = f"{float(r['mfu']):.0%}" if r["mfu"] else ""
        cells = [f"{speed:,.0f}", f"{speed / plain:.2f}", mfu, f"{1000 * float(r['joules_per_token']):.2f}", r["peak_gib"]]
        lines.append(f"| {r['head']} | {' | '.join(cells)} | {parts[1]:.1f} | {sum(parts):.1f} |")
    return "\n".join(lines)


def main():
    (c,) = parse(sys.argv[1:], TrainConfig, words="heads")
    settings, rows = read_yaml(c.config), []
    for name in tqdm([PLAIN, *(c.heads or FAMILIES)], disable=None, leave=False):
        rows.append(measure(c, settings, name))
        write(rows, c.out)
    print(markdown(rows))
    print(f"wrote {c.out}")


if __name__ == "__main__":
    cli(main)
