"""Measures a training iteration of GPT-2 124M on one GPU, by this project and by a loop like
nanoGPT's.

`python -m benchmarks.gpu` calls `measure` with one of the two loops, and writes the result to
results/gpu.csv.

Ours      model.py with one head, and what train.py does in an iteration: forward, backward, the
          norms that it logs, clipping, AdamW
Nanogpt   a straightforward GPT: no biases, tied embeddings, fused attention, F.cross_entropy of all
          logits, compiled as one graph, clip_grad_norm_, fused AdamW, TF32 for float32 products

Both use the same random tokens, which are on the GPU already, and bfloat16 autocast. Only PyTorch
is needed.
"""

import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn as nn
import torch.nn.functional as F

from base.machine import peak_flops
from model import Model, ModelConfig
from training.config import TrainConfig
from training.optimizers import make_optimizer

Precision = Literal["auto", "float32", "split", "autocast"]
RATE, BETAS, DECAY, CLIP = 6e-4, (0.9, 0.95), 0.1, 1.0  # As in nanoGPT.


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model and a batch.

    vocabulary: the number of tokens. rows: of the embedding, padding included.
    compiler: a backend of torch.compile.
    """

    device: str = "cuda"
    layers: int = 12
    heads: int = 12
    width: int = 768
    length: int = 1024
    vocabulary: int = 50257
    rows: int = 50304
    windows: int = 12
    compiler: str = "inductor"
    warm_up: int = 5
    group: int = 10
    """iterations between two readings of the clock"""
    seconds: float = 3.0
    """the shortest time to measure"""

    def tokens(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Random inputs and targets, (windows, length) each."""
        generator = torch.Generator().manual_seed(0)
        both = torch.randint(self.vocabulary, (2, self.windows, self.length), generator=generator)
        inputs, targets = both.to(self.device)
        return inputs, targets

    def flops_per_token(self, parameters: int) -> float:
        """Operations of forward and backward for a token (PaLM, arXiv 2204.02311, appendix B).

        They are 6 for each weight that multiplies, and those of attention.
        parameters: all except the embedding of positions. A tied embedding counts once, as the
            matrix of the head.
        """
        return 6 * parameters + 12 * self.layers * self.width * self.length


class Loop(Protocol):
    """A training loop for `measure`."""

    flops_per_token: float

    def step(self) -> torch.Tensor:
        """Runs one iteration. Returns its loss in nats per token, on the device."""


class Ours:
    """An iteration of train.py with one micro-batch."""

    def __init__(self, s: Sizes, head: str, precision: Precision = "auto"):
        torch.manual_seed(0)
        config = ModelConfig(
            n_layer=s.layers,
            n_head=s.heads,
            n_embd=s.width,
            block_size=s.length,
            vocab_size=s.rows,
            real_vocab_size=s.vocabulary,
            head=head,
            head_precision=precision,
        )
        self.model = Model(config).to(s.device)
        self.model.compile_blocks(backend=s.compiler)
        self.optimizer = make_optimizer(self.model, TrainConfig(), s.device)
        self.autocast = torch.autocast(s.device, torch.bfloat16)
        self.x, self.y = s.tokens()
        names, self.parameters = zip(*self.model.named_parameters(), strict=True)
        self.of_head = torch.tensor([name.startswith("head.") for name in names], device=s.device)
        self.flops_per_token = self.model.flops_per_token()

    def step(self) -> torch.Tensor:
        model, targets = self.model, self.y.numel()
        with self.autocast:
            _, loss, distance = model(self.x, self.y, "sum", with_distance=True)
        (loss / targets).backward()
        row = [loss.detach()]
        if distance is not None:
            row += [distance.sum(), distance.min()]
        with torch.no_grad():
            gradients = [p.grad for p in self.parameters]
            squares = torch.stack(torch._foreach_norm(gradients)).square()
            norm = squares.sum().sqrt()
            row += [
                norm,
                torch.where(self.of_head, squares, 0.0).sum().sqrt(),
                torch.where(self.of_head, 0.0, squares).sum().sqrt(),
            ]
            row += [model.head.prototypes().norm(dim=-1).mean()]
            torch._foreach_mul_(gradients, (CLIP / (norm + 1e-6)).clamp(max=1.0))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return torch.stack(row)[0] / targets


class PlainGPT(nn.Module):
    """A GPT-2 without biases: tokens (B, T) and targets (B, T) -> the mean loss."""

    def __init__(self, s: Sizes):
        super().__init__()
        self.heads = s.heads
        self.words, self.places = nn.Embedding(s.rows, s.width), nn.Embedding(s.length, s.width)
        self.blocks, self.last = nn.ModuleList(), nn.LayerNorm(s.width, bias=False)
        for _ in range(s.layers):
            block = nn.ModuleDict(
                {
                    key: nn.LayerNorm(s.width, bias=False)
                    for key in ("before_attention", "before_mlp")
                }
            )
            for key, inputs, outputs in (
                ("qkv", 1, 3),
                ("out", 1, 1),
                ("up", 1, 4),
                ("down", 4, 1),
            ):
                block[key] = nn.Linear(inputs * s.width, outputs * s.width, bias=False)
            self.blocks.append(block)
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.02)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        h = self.words(x) + self.places(torch.arange(x.shape[1], device=x.device))
        for block in self.blocks:
            assert isinstance(block, nn.ModuleDict)
            products = block["qkv"](block["before_attention"](h)).chunk(3, -1)
            q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in products)
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            h = h + block["out"](mixed.transpose(1, 2).flatten(2))
            h = h + block["down"](F.gelu(block["up"](block["before_mlp"](h))))
        logits = F.linear(self.last(h), self.words.weight)
        return F.cross_entropy(logits.flatten(0, 1), y.flatten())


class Nanogpt:
    """A training loop like nanoGPT's."""

    def __init__(self, s: Sizes):
        torch.manual_seed(0)
        model = PlainGPT(s).to(s.device)
        self.parameters = list(model.parameters())
        matrices, others = (
            [p for p in self.parameters if (p.dim() > 1) == wanted] for wanted in (True, False)
        )
        groups = [
            {"params": matrices, "weight_decay": DECAY},
            {"params": others, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=RATE, betas=BETAS, fused=True)
        self.model = torch.compile(model, backend=s.compiler)
        self.autocast = torch.autocast(s.device, torch.bfloat16)
        self.x, self.y = s.tokens()
        self.flops_per_token = s.flops_per_token(
            sum(p.numel() for p in self.parameters) - model.places.weight.numel()
        )

    def step(self) -> torch.Tensor:
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True
        with self.autocast:
            loss = self.model(self.x, self.y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        torch.backends.cuda.matmul.allow_tf32 = before
        return loss.detach()


def joules() -> float | None:
    """The energy counter of the GPU in joules.

    None if the package pynvml is missing, or if the driver has no counter.
    """
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        board = pynvml.nvmlDeviceGetHandleByUUID(
            f"GPU-{torch.cuda.get_device_properties().uuid}".encode()
        )
        return pynvml.nvmlDeviceGetTotalEnergyConsumption(board) / 1000
    except pynvml.NVMLError:
        return None


def measure(s: Sizes, loop: Loop) -> dict[str, str]:
    """Runs a loop for s.seconds or more. Returns cells of the table.

    Raises: FloatingPointError for a loss that is not finite.
    """
    gc.collect()  # Frees the last model, which is in a reference cycle.
    gpu = s.device == "cuda"
    wait: Callable[[], None] = torch.cuda.synchronize if gpu else lambda: None
    for _ in range(s.warm_up):
        loop.step()
    wait()
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    energy = joules() if gpu else None
    times: list[float] = []
    began = time.perf_counter()
    while time.perf_counter() - began < s.seconds or not times:
        start = time.perf_counter()
        for _ in range(s.group):
            loss = loop.step()
        wait()
        times.append((time.perf_counter() - start) / s.group)
    after = joules() if gpu else None
    used = after - energy if after is not None and energy is not None else None
    if not math.isfinite(loss.item()):
        raise FloatingPointError(f"the loss is {loss.item()}")

    tokens = s.windows * s.length
    speed = tokens / statistics.median(times)
    row = {"step_ms": f"{1000 * statistics.median(times):.2f}", "tokens_per_s": f"{speed:.0f}"}
    if peak := peak_flops(s.device):
        row["mfu"] = f"{speed * loop.flops_per_token / peak:.3f}"
    if gpu:
        row["peak_mib"] = f"{torch.cuda.max_memory_allocated() / 2**20:.0f}"
    if used is not None:
        row["joules_per_token"] = f"{used / (len(times) * s.group * tokens):.3g}"
    return row
