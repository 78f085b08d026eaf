"""Measures the errors of the head in each precision of matrix products, against float64.

    # after `make demo`; about 10 minutes on 2 cores
    python -m benchmarks.precision out/demo/cross_entropy out/demo/cosine

No GPU is needed. The kernels for GPUs run in Triton's interpreter. Products of half-precision
numbers are exact in float32, as on tensor cores. Only sums differ: they are rounded to nearest
here, and tensor cores truncate them. The prototypes are

    fresh      as in a new model: 8,192 x 768, standard deviation 0.02, with layer-normalised random
               states
    trained    those of the runs that you name, with their states on validation text: the first run
               for cross_entropy, and the last run for distances
    matched    made by `harmonic.match` from the dot product of the first run, as --init_from does
               for a distance

Each is measured with the head's own exponent n and with n = 4 C. Errors are the largest over STATES
states. Those of losses are in nats. Those of gradients, with respect to states and prototypes, are
relative to the largest entry. Writes results/precision.csv.
"""

import contextlib
import os
import sys
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it at import.

import torch
import torch.nn.functional as F
from tqdm import tqdm

import harmonic.loss
import harmonic.precision
from analysis import tables
from analysis.runs import find_runs
from base.command_line import cli, parse
from base.errors import check
from base.files import result_file
from harmonic import HEADS as TABLE
from harmonic import HarmonicHead, harmonic_loss, match
from harmonic.precision import FLOAT32, SPLIT, Products
from interop.pretrained import states as training_states
from model import Model
from text.token_files import Data

HEADS = ("cross_entropy", "euclidean", "cosine", "mahalanobis")
STATES = 64
V, C = 8192, 768


@dataclass
class PrecisionConfig:
    """What to compare"""

    runs: list[str] = field(default_factory=list)
    """two run folders, the first with cross_entropy; none = only fresh prototypes"""
    out: str = "results/precision.csv"
    """the CSV file"""


class AsTensorCores(Products):
    """Rounded operands, multiplied exactly and summed in float32."""

    def multiply(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a.float() @ b.float()


class Tf32(AsTensorCores):
    """Operands rounded to nearest with the 11 significant bits of TF32."""

    def split(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        bits = x.contiguous().view(torch.int32)
        return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)[None]


class OneSlope(Products):
    """SPLIT, except that both operands of products with slopes are rounded to bfloat16."""

    def split(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return x.to(dtype)[None] if dtype == self.slopes else super().split(x, dtype)


PRECISIONS = {
    "float32": FLOAT32,
    "tf32": Tf32("tf32", torch.float32, torch.float32),
    "split": SPLIT,
    "split but for slopes": OneSlope("one", torch.float16, torch.bfloat16, 2),
    "bfloat16": AsTensorCores("bfloat16", torch.bfloat16, torch.bfloat16),
}


@dataclass
class Case:
    """A head, with states (STATES, C) and targets (STATES,) to measure it."""

    prototypes: str
    head: HarmonicHead
    states: torch.Tensor
    targets: torch.Tensor


def fresh(name: str) -> Case:
    """A case with fresh prototypes."""
    g = torch.Generator().manual_seed(0)
    head = HarmonicHead(C, V, name)
    with torch.no_grad():
        head.weight.normal_(std=0.02, generator=g)
    states = F.layer_norm(torch.randn(STATES, C, generator=g), (C,))
    return Case("fresh", head, states, torch.randint(V, (STATES,), generator=g))


@torch.no_grad()
def validation_states(model: Model, data: Data) -> tuple[torch.Tensor, torch.Tensor]:
    """STATES states (STATES, C), spread over four windows, and their targets."""
    T = model.config.block_size
    text = torch.from_numpy(data.splits["val"].read(0, 4 * T + 1).astype("int64"))
    h = model.hidden(text[:-1].view(4, T)).reshape(4 * T, -1)
    chosen = torch.arange(STATES) * (4 * T // STATES)
    return h[chosen], text[1:][chosen]


def trained_and_matched(folders: list[str], name: str) -> list[Case]:
    """The cases with trained and, for a distance, with matched prototypes."""
    runs = find_runs(folders)
    first, last = runs[0], runs[-1]
    check(
        [f"name two runs, not {len(runs)}"] * (len(runs) != 2)
        + [f"{first.path}: the first run must be of cross_entropy"]
        * (first.model_config.head != "cross_entropy")
    )
    run = first if TABLE[name].is_control else last
    model, _ = run.load()
    head = HarmonicHead(
        model.config.n_embd,
        len(model.head.weight),
        name,
        real_vocab_size=model.head.real_vocab_size,
    )
    head.weight = model.head.weight
    cases = [Case("trained", head, *validation_states(model, run.data()))]
    if TABLE[name].is_control:
        return cases
    model, _ = first.load()
    table = model.head.prototypes().detach()
    head = HarmonicHead(table.shape[1], len(table), name)
    with torch.no_grad():
        match(head, training_states(model, first.data(), seed=0, batch_size=8), table)
    return cases + [Case("matched", head, *validation_states(model, first.data()))]


def gradients(
    case: Case, n: float | None, dtype: torch.dtype, products: Products | None = None
) -> tuple[torch.Tensor, ...]:
    """The losses, dL/dh and dL/dw in float64.

    products: how the GPU's kernels multiply matrices. None: plain PyTorch.
    """
    h = case.states.detach().to(dtype, copy=True).requires_grad_()
    w = case.head.prototypes().detach().to(dtype, copy=True).requires_grad_()
    settings: dict[str, Any] = {
        k: v.detach().to(dtype) if isinstance(v, torch.Tensor) else v
        for k, v in case.head.geometry().items()
    }
    if n is not None:
        settings["exponent"] = n
    settings |= {"reduction": "none", "impl": "triton" if products else "dense"}
    with contextlib.ExitStack() as chosen:
        if products:
            chosen.enter_context(
                mock.patch.object(harmonic.loss, "choose_products", lambda *_: products)
            )
            chosen.enter_context(
                mock.patch.dict(harmonic.precision.BY_NAME, {products.name: products})
            )
        losses = harmonic_loss(h, w, case.targets, case.head.name, **settings)
        losses.sum().backward()
    assert h.grad is not None and w.grad is not None
    return losses.detach().double(), h.grad.double(), w.grad.double()


def compare(case: Case, n: float | None) -> list[dict]:
    """A row for each precision."""
    truth = gradients(case, n, torch.float64)
    rows, of_float32 = [], 0.0
    for precision, products in PRECISIONS.items():
        errors = [
            (a - b).abs().max().item()
            for a, b in zip(gradients(case, n, torch.float32, products), truth, strict=True)
        ]
        errors[1:] = [e / t.abs().max().item() for e, t in zip(errors[1:], truth[1:], strict=True)]
        row = {
            "head": case.head.name,
            "prototypes": case.prototypes,
            "V": case.head.real_vocab_size,
            "C": case.states.shape[1],
        }
        row |= {"n": "" if n is None else f"{n:.4g}", "precision": precision}
        row |= dict(
            zip(("loss_error", "dh_error", "dw_error"), (f"{e:.1e}" for e in errors), strict=True)
        )
        of_float32 = of_float32 or errors[0]  # The first row is float32.
        rows.append(row | {"loss_error_over_float32s": f"{errors[0] / of_float32:.2g}"})
    return rows


def markdown(rows: list[dict]) -> str:
    """The table in docs/performance.md: errors of losses in nats."""
    found: dict[tuple[str, str, str], dict] = {}
    for r in rows:
        row = found.setdefault((r["head"], r["prototypes"], r["n"]), dict(r))
        row[r["precision"]] = r["loss_error"]
    return tables.markdown(list(found.values()), ["head", "prototypes", "n", *PRECISIONS])


def main() -> None:
    (c,) = parse(sys.argv[1:], PrecisionConfig, words="runs")
    rows, cases, out = [], [], result_file(c.out)
    for name in HEADS:
        cases += [fresh(name)] + (trained_and_matched(c.runs, name) if c.runs else [])
    for case in tqdm(cases, disable=None, leave=False):
        exponents: list[float | None] = [None]
        if not case.head.is_control:
            exponents = [*sorted({float(case.head.strength), 4.0 * case.states.shape[1]})]
        for n in exponents:
            rows += compare(case, n)
            tables.write_csv(out, rows)
    print(markdown(rows))
    print(f"wrote {out}")


if __name__ == "__main__":
    cli(main)
