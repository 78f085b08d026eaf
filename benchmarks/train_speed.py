"""Measures the speed of train.py and sample.py, compared with simple programs on the same machine.

    python -m benchmarks.train_speed                # about 15 minutes on 2 cores
    python -m benchmarks.train_speed --only=steps

steps        tokens/s of train.py (from its metrics), divided by those of a plain loop like
             nanoGPT's. Each compiles its model; the loop is also measured without. The model is a
             GPT with 6 layers, width 384, 256 tokens of context, 8 windows, a vocabulary of 4,096
             and cross_entropy. Processes alternate, and the result is a median over rounds.
shares       the parts of an iteration's time: data, trunk, head, norms and clipping, optimiser
sample       tokens/s of sample.py for 512 new tokens with the cache of keys and values, divided by
             those without it
checkpoint   how much longer an iteration takes while a checkpoint is written in the background
memory       resident memory of train.py over 10,000 iterations of a tiny model
"""

import contextlib
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from analysis import tables
from analysis.tables import Column
from base.command_line import cli, parse
from base.errors import UserError, too_small
from base.files import result_file
from model import Model, ModelConfig
from text.token_files import load_data
from training.checkpoint import snapshot
from training.config import TrainConfig
from training.metrics import read_metrics
from training.objective import batches_of
from training.optimizers import make_optimizer
from training.step import norms

SIZE: dict[str, Any] = dict(n_layer=6, n_head=6, n_embd=384, block_size=256)
BATCH, VOCABULARY = 8, 4096
COLUMNS = (
    Column("what", "measured"),
    Column("dtype", "precision"),
    "value",
    "unit",
    Column("ratio"),
    Column("to", "compared with"),
)


@dataclass
class SpeedConfig:
    """What to measure"""

    only: Literal["steps", "shares", "sample", "checkpoint", "memory", "plain"] | None = None
    """what to measure; null = all but plain; plain = only the plain loop, with the given dtype"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """autocast type of only=plain"""
    compile: bool = False
    """compile the loop of only=plain"""
    iters: int = 24
    """iterations of a process; the first 8 do not count"""
    rounds: int = 3
    """processes of each kind"""
    dataset: str = "data/wiki"
    """a folder prepared with bpe:4096"""
    out: str = "results/train_speed.csv"
    """the table; it is written only without --only"""

    def problems(self) -> list[str]:
        return too_small(self, rounds=1, iters=9)


PLAIN, COMPILED, OURS = "plain loop", "plain loop, compiled", "train.py"


class Plain(nn.Module):
    """A straightforward GPT: tied embeddings, fused attention, all logits, F.cross_entropy."""

    def __init__(self, layers: int, heads: int, width: int, length: int):
        super().__init__()
        self.heads = heads
        self.words, self.places = nn.Embedding(VOCABULARY, width), nn.Embedding(length, width)
        self.blocks, self.last = nn.ModuleList(), nn.LayerNorm(width)
        for _ in range(layers):
            parts: dict[str, nn.Module] = dict(a=nn.LayerNorm(width), b=nn.LayerNorm(width))
            parts |= dict(qkv=nn.Linear(width, 3 * width), out=nn.Linear(width, width))
            parts |= dict(up=nn.Linear(width, 4 * width), down=nn.Linear(4 * width, width))
            self.blocks.append(nn.ModuleDict(parts))
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.02)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        h = self.words(x) + self.places(torch.arange(x.shape[1]))
        for b in self.blocks:
            assert isinstance(b, nn.ModuleDict)
            q, k, v = (
                t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
                for t in b["qkv"](b["a"](h)).chunk(3, -1)
            )
            h = h + b["out"](
                F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
            )
            h = h + b["down"](F.gelu(b["up"](b["b"](h))))
        logits = F.linear(self.last(h), self.words.weight)
        return F.cross_entropy(logits.view(-1, VOCABULARY), y.view(-1))


def plain(c: SpeedConfig) -> float:
    """The tokens/s of the plain loop.

    An iteration reads random windows of a memory map, and does forward, backward, clipping and
    AdamW.
    """
    torch.manual_seed(0)
    model = Plain(SIZE["n_layer"], SIZE["n_head"], SIZE["n_embd"], SIZE["block_size"])
    if c.compile:
        model.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=c.dtype == "bfloat16")
    T, times = SIZE["block_size"], []
    for _ in range(c.iters):
        began = time.perf_counter()
        data = np.memmap(Path(c.dataset) / "train.bin", np.uint16, "r")
        starts = torch.randint(len(data) - T, (BATCH,))
        x = torch.stack([torch.from_numpy(data[i : i + T].astype(np.int64)) for i in starts])
        y = torch.stack(
            [torch.from_numpy(data[i + 1 : i + 1 + T].astype(np.int64)) for i in starts]
        )
        with autocast:
            loss = model(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        times.append(time.perf_counter() - began)
    return BATCH * T / statistics.median(times[8:])


def train(c: SpeedConfig, out: Path, **flags: object) -> list[dict]:
    """Runs train.py with the benchmark's model. Returns its metrics."""
    settings = SIZE | dict(
        dataset=c.dataset,
        batch_size=BATCH,
        head="cross_entropy",
        head_precision="autocast",
        eval_interval=10**6,
        eval_iters=1,
        log_interval=1,
        emissions=False,
        overwrite=True,
        out_dir=out,
        warmup_iters=1,
        max_iters=c.iters,
    )
    settings |= flags
    finished([sys.executable, "train.py", *(f"--{k}={v}" for k, v in settings.items())])
    return read_metrics(out)


def finished(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Runs a command, and keeps what it prints. UserError, with the end of its messages, if it
    fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        words = " ".join(command[1:])
        raise UserError(f"{words} ended with status {done.returncode}:\n{done.stderr[-2000:]}")
    return done


def cells(what: str, value: str, ratio: str, to: str, dtype: str = "float32") -> dict[str, str]:
    """A row. value: a number and its unit. ratio: the value divided by that of `to`."""
    number, unit = value.split()
    return {
        "what": what,
        "dtype": dtype,
        "value": number,
        "unit": unit,
        "ratio": ratio,
        "to": to,
    }


def steps(c: SpeedConfig, home: Path) -> list[dict]:
    """The speed of train.py and of the plain loop, as it is and compiled."""
    kinds = [(who, dtype) for dtype in ("float32", "bfloat16") for who in (PLAIN, COMPILED, OURS)]
    found: dict[tuple[str, str], list[float]] = {kind: [] for kind in kinds}
    for _ in tqdm(range(c.rounds), "steps", disable=None):
        for who, dtype in kinds:
            if who == OURS:
                lines = train(c, home / "steps", dtype=dtype)
                speeds = [r["tokens_per_s"] for r in lines if "tokens_per_s" in r]
                speed = statistics.median(speeds[8:])
            else:
                words = [
                    "--only=plain",
                    f"--dtype={dtype}",
                    f"--compile={json.dumps(who == COMPILED)}",
                    f"--iters={c.iters}",
                    f"--dataset={c.dataset}",
                ]
                plain_loop = [sys.executable, "-m", "benchmarks.train_speed", *words]
                speed = float(finished(plain_loop).stdout)
            found[who, dtype].append(speed)
    rows = []
    for who, dtype in kinds:
        base = (COMPILED, dtype) if who == OURS else (PLAIN, "float32")
        ratio = statistics.median(
            a / b for a, b in zip(found[who, dtype], found[base], strict=True)
        )
        value = f"{statistics.median(found[who, dtype]):.0f} tokens/s"
        rows.append(cells(who, value, f"{ratio:.2f}", ", ".join(base), dtype))
    return rows


PARTS = ("trunk, forward", "head, both ways", "trunk, backward", "norms, clipping", "optimiser")


def iteration(
    model: Model,
    optimizer: torch.optim.Optimizer,
    x: torch.Tensor,
    y: torch.Tensor,
    autocast: contextlib.AbstractContextManager,
    mark: Callable[[], object] = lambda: None,
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
) -> None:
    """Runs an iteration as train.py does, on x, y (B, T).

    mark: is called before the first of PARTS, and after each.
    loss: a function of (hidden states, targets). None: the summed loss of the model's own head.
    """
    loss = loss or (lambda h, y: model.head.loss(h, y, reduction="sum"))
    mark()
    with autocast:
        h = model.hidden(x)
        mark()
        inner = h.detach().requires_grad_()
        value = loss(inner, y)
    value.backward()
    mark()
    h.backward(inner.grad)
    mark()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    torch._foreach_mul_(gradients, (1 / (norms(gradients).norm() + 1e-6)).clamp(max=1))
    mark()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    mark()


def shares(c: SpeedConfig, _: Path) -> list[dict]:
    """The time of each part of an iteration."""
    rows, data = [], load_data(c.dataset)
    for dtype in ("float32", "bfloat16"):
        torch.manual_seed(0)
        model = Model(
            ModelConfig(
                **SIZE, vocab_size=VOCABULARY, head="cross_entropy", head_precision="autocast"
            )
        )
        model.compile_blocks()
        optimizer = make_optimizer(model, TrainConfig(), "cpu")
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")
        parts: dict[str, list[float]] = {part: [] for part in ("data", *PARTS)}
        for step in range(c.iters):
            marks = [time.perf_counter()]
            ((x, y),) = batches_of(data, model.config).training(0, step, range(BATCH), BATCH, BATCH)
            iteration(model, optimizer, x, y, autocast, lambda: marks.append(time.perf_counter()))  # noqa: B023
            for part, a, b in zip(parts, marks[:-1], marks[1:], strict=True):
                parts[part].append(b - a)
        took = {part: statistics.median(times[8:]) for part, times in parts.items()}
        for part, t in took.items():
            value, share = f"{1000 * t:.1f} ms", f"{t / sum(took.values()):.3f}"
            rows.append(cells(f"share: {part}", value, share, "an iteration", dtype))
    return rows


def sample(c: SpeedConfig, home: Path) -> list[dict]:
    """The speed of sample.py with and without its cache."""
    train(c, home / "sample", max_iters=1, block_size=1024, batch_size=1, compile=False)
    found = {}
    for cache in ("false", "true"):
        words = [
            f"--out_dir={home / 'sample'}",
            "--max_new_tokens=512",
            "--start=The city of",
            f"--cache={cache}",
        ]
        speeds = []
        for _ in range(c.rounds):
            done = finished([sys.executable, "sample.py", *words])
            said = re.findall(r"([\d,]+) tokens/s", done.stderr)[0]
            speeds.append(float(said.replace(",", "")))
        found[cache] = statistics.median(speeds)
    slow, fast, base = found["false"], found["true"], "sample.py, without cache"
    return [
        cells(base, f"{slow:.0f} tokens/s", "1.00", base),
        cells("sample.py", f"{fast:.0f} tokens/s", f"{fast / slow:.1f}", base),
    ]


def checkpoint(c: SpeedConfig, home: Path) -> list[dict]:
    """The cost of a checkpoint of 147 MB every 8 iterations.

    It is the copy, which training waits for, and slower iterations while the checkpoint is written.
    """
    model = Model(ModelConfig(**SIZE, vocab_size=VOCABULARY))
    optimizer = make_optimizer(model, TrainConfig(), "cpu")
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    copies = []
    for _ in range(7):
        began = time.perf_counter()
        snapshot(model, optimizer)
        copies.append(time.perf_counter() - began)
    interval = 8
    records = train(c, home / "checkpoint", max_iters=10 * interval, eval_interval=interval)
    times = {
        r["iter"]: BATCH * SIZE["block_size"] / r["tokens_per_s"]
        for r in records
        if "tokens_per_s" in r and r["iter"] >= interval
    }
    after = [
        statistics.median(t for i, t in times.items() if i % interval == k) for k in range(interval)
    ]
    quiet = statistics.median(after[interval // 2 :])
    copy = statistics.median(copies)
    took = {"copying a checkpoint's 147 MB": copy}
    took |= {f"iteration {k + 1} after a checkpoint": after[k] for k in range(3)}
    return [
        cells(what, f"{1000 * t:.0f} ms", f"{t / quiet:.2f}", "a quiet iteration")
        for what, t in took.items()
    ]


def memory(c: SpeedConfig, home: Path) -> list[dict]:
    """The resident memory of train.py at two iterations of a long run."""
    run, marks = home / "memory", (1000, 10_000)
    settings = dict(
        dataset=c.dataset,
        n_layer=1,
        n_head=1,
        n_embd=16,
        block_size=32,
        batch_size=4,
        max_iters=10_001,
        eval_interval=500,
    )
    settings |= dict(
        eval_iters=1, log_interval=10, compile=False, emissions=False, out_dir=run, head="cosine"
    )
    process = subprocess.Popen(
        [sys.executable, "train.py", *(f"--{k}={v}" for k, v in settings.items())],
        stdout=subprocess.DEVNULL,
    )
    seen: dict[int, float] = {}
    about = psutil.Process(process.pid)
    while process.poll() is None and len(seen) < len(marks):
        path = run / "metrics.jsonl"
        done = path.read_bytes().count(b"train_loss") if path.is_file() else 0
        for mark in marks:
            if done >= mark and mark not in seen:
                seen[mark] = about.memory_info().rss / 2**20
        time.sleep(0.02)
    if process.wait() or len(seen) < len(marks):
        raise UserError(f"train.py ended with status {process.returncode}")
    first, last = (seen[mark] for mark in marks)
    what, base = "resident memory at iteration 10,000", "at iteration 1,000"
    return [cells(what, f"{last:.0f} MiB", f"{last / first:.3f}", base)]


def markdown(rows: list[dict]) -> str:
    """The table in docs/."""
    return tables.markdown(rows, COLUMNS)


def main() -> None:
    (c,) = parse(sys.argv[1:], SpeedConfig)
    if c.only == "plain":
        print(plain(c))
        return
    rows, out = [], result_file(c.out) if c.only is None else None
    with tempfile.TemporaryDirectory(prefix="speed-") as home:
        for measure in (steps, shares, sample, checkpoint, memory):
            if c.only in (None, measure.__name__):
                new = measure(c, Path(home))
                rows += new
                print(tables.text(new, COLUMNS))
    if out:
        tables.write_csv(out, rows, COLUMNS)
        print(f"wrote {out}")


if __name__ == "__main__":
    cli(main)
