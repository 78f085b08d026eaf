"""What the theory of harmonic loss speaks of, measured: margins, terms of its bound, nearness to a
softmax, minimisers.

    python -m analysis.theory out/a out/b

Over validation tokens. The margin of a token is rho = d(h, w_y) / min over j != y of d(h, w_j):
below 1 where it is predicted, and `p_y >= 1 / (1 + (V - 1) rho^n)` (harmonic link). gamma = min
over j != y of d_j - d_y, of the tokens that are predicted; for a head without a distance it is the
difference of logits. The bound's term is R |W|_F / (gamma sqrt N), R the largest |h| and N the
tokens predicted in training, repeats included (2603.10225's PAC-Bayes bound): it changes under
scaling, though a loss of a homogeneous distance does not. The picture shows the margins, the KL to
the linearised softmax over training, and a toy: five separable points, for which a distance head
has a finite minimiser.
"""

import math
import sys
from dataclasses import dataclass
from typing import Literal

import torch
from matplotlib.figure import Figure

from analysis import figures, tables
from analysis.runs import (
    AnalysisConfig,
    Run,
    about,
    default_out,
    find_runs,
    head_styles,
    predictions,
    publish,
)
from analysis.tables import Column
from base.command_line import cli, parse
from harmonic import HEADS, HarmonicHead, distance
from model import Model
from text.token_files import Data
from training.distributed import check_device
from training.telemetry import read_metrics

# Validation tokens that are looked at, and how many of them at a time.
TOKENS, ROWS = 4096, 256
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
TOY = ("cross_entropy", "euclidean", "manhattan", "cosine")


@dataclass
class TheoryConfig(AnalysisConfig):
    """Margins and bounds"""

    checkpoint: Literal["newest", "best"] = "newest"
    """which checkpoint of each run"""
    split: Literal["val", "test"] = "val"
    """whose tokens"""
    device: str = "auto"
    """auto, cpu, cuda or mps"""


@torch.no_grad()
def states_of(model: Model, data: Data, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states and targets of about TOKENS tokens, evenly spread over a split: (N, C),
    (N,)."""
    states, targets, _ = zip(*predictions(model, data, split, TOKENS), strict=True)
    return torch.cat(states), torch.cat(targets)


@torch.no_grad()
def margins(
    head: HarmonicHead, h: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> (rho, NaN for a control; gamma; p_y), each (N,)."""
    rho, gamma, p = [], [], []
    for x, y in zip(h.split(ROWS), targets.split(ROWS), strict=True):
        logits = head(x)
        p.append(logits.softmax(-1).gather(1, y[:, None])[:, 0])
        values = (
            -logits
            if head.is_control
            else distance(x, head.prototypes(), head.name, **head.geometry())
        )
        own = values.gather(1, y[:, None])[:, 0]
        other = values.scatter(1, y[:, None], math.inf).amin(-1)
        rho.append(torch.full_like(own, math.nan) if head.is_control else own / other)
        gamma.append(other - own)
    return torch.cat(rho), torch.cat(gamma), torch.cat(p)


def measure(run: Run, model: Model, data: Data, split: str) -> tuple[dict, torch.Tensor]:
    """-> (the row of a run, its margins)."""
    h, targets = states_of(model, data, split)
    rho, gamma, p = margins(model.head, h, targets)
    predicted = gamma > 0
    c, steps = run.model_config, sum("train_loss" in m for m in read_metrics(run.path))
    targets_per_token = run.objective.predicted(c.block_size) / c.block_size
    trained = steps * run.tokens_per_iteration() * targets_per_token
    norm, size = model.head.prototypes().norm().item(), h.norm(dim=-1).max().item()
    row = {**about(run), "tokens": len(h), "predicted": predicted.double().mean().item()}
    row |= {
        f"rho_{round(100 * q)}": None if model.head.is_control else rho.quantile(q).item()
        for q in QUANTILES
    }
    row |= {"R": size, "W": norm}
    for q in (0.05, 0.5):
        value = gamma[predicted].quantile(q).item() if predicted.any() else None
        row[f"gamma_{round(100 * q)}"] = value
        row[f"bound_{round(100 * q)}"] = (
            size * norm / (value * math.sqrt(trained)) if value and trained else None
        )
    if model.head.is_harmonic:
        # The bound is a theorem, so a share below 1 is a fault of the code.
        least = 1 / (
            1 + (model.head.real_vocab_size - 1) * rho.double() ** float(model.head.strength)
        )
        row["margin_bound_holds"] = (p.double() >= least * (1 - 1e-4)).double().mean().item()
    else:
        row["margin_bound_holds"] = None
    return row, rho.cpu()


def toy(
    name: str,
    steps: int = 2000,
    points: torch.Tensor | None = None,
    targets: torch.Tensor | None = None,
    seed: int = 0,
) -> dict:
    """Prototypes of separable classes trained on the loss alone, from N(0, 0.1^2), n = 4, Adam.

    Args:
        points: (N, C) of classes `targets` (N,); by default five classes, one point each, on a
            sphere of radius 1 in 8 dimensions.
        seed: of the start.
    Returns: the norm |W|_F and the loss of each step; the points; the head; the path of the
        prototypes (steps + 1, classes, C).
    """
    torch.manual_seed(seed)
    if points is None or targets is None:
        points, targets = torch.nn.functional.normalize(torch.randn(5, 8), dim=-1), torch.arange(5)
    exponent = None if HEADS[name].is_control else 4.0
    classes = int(targets.max()) + 1
    head = HarmonicHead(
        points.shape[1], classes, name, exponent=exponent, init_std=0.1, impl="dense"
    )
    optimizer = torch.optim.Adam(head.parameters(), lr=0.02)
    losses, passed = [], [head.weight.detach().clone()]
    for _ in range(steps):
        loss = head.loss(points, targets)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        passed.append(head.weight.detach().clone())
    path = torch.stack(passed)
    return {
        "norms": path[:-1].norm(dim=(1, 2)).tolist(),
        "losses": losses,
        "points": points,
        "head": head,
        "path": path,
    }


def draw(runs: list[Run], found: list[torch.Tensor]) -> Figure:
    """Margins (`found`: those of each run), KL to the softmax over training, the toy."""
    figure = figures.figure(3.2)
    left, middle, right = figure.subplots(1, 3)
    for run, rho, style in zip(runs, found, head_styles(runs), strict=True):
        rho = rho[rho.isfinite()].sort().values
        if len(rho):  # A control has no distance.
            left.plot(rho, torch.linspace(0, 1, len(rho)), label=run.name, **style)
        lines = [m for m in read_metrics(run.path) if "kl_to_softmax" in m]
        if lines:
            iterations = [m["iter"] for m in lines]
            divergences = [m["kl_to_softmax"] for m in lines]
            middle.plot(iterations, divergences, marker=".", label=run.name, **style)
    left.axvline(1, color=figures.GREY, linewidth=0.8, linestyle=":")
    left.set_xlabel("rho: own distance / nearest other")
    left.set_ylabel("share of tokens with a lower rho")
    left.set_title("Margins (left of 1: predicted)")
    middle.set_yscale("log")
    middle.set_xlabel("iteration")
    middle.set_ylabel("KL divergence, nats a token")
    middle.set_title("Difference from a softmax")
    for axes in (left, middle):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="lower right")
        else:
            axes.text(0.5, 0.5, "no run has a distance", transform=axes.transAxes, ha="center")
    for name in TOY:
        right.plot(toy(name)["norms"], label=name, color=figures.head_color(name))
    right.set_xscale("log")
    right.set_xlabel("step of Adam")
    right.set_ylabel("norm of all prototypes")
    right.set_title("Toy: five separable points")
    right.legend(loc="upper left")
    return figure


COLUMNS: tables.Columns = (
    "run",
    "head",
    "link",
    "tokens",
    Column("predicted", form=".1%"),
    *(Column(f"rho_{round(100 * q)}", form=".4f") for q in QUANTILES),
    Column("R", form=".3g"),
    Column("W", "|W|", ".3g"),
    Column("gamma_5", form=".3g"),
    Column("bound_5", form=".3g"),
    Column("gamma_50", form=".3g"),
    Column("bound_50", form=".3g"),
    Column("margin_bound_holds", "bound holds", ".1%"),
)


def main() -> None:
    (c,) = parse(sys.argv[1:], TheoryConfig, words="runs")
    runs = find_runs(c.runs, dataset=c.dataset)
    device, out = check_device(c.device), default_out(c, runs, "theory")
    rows, found = [], []
    for run in runs:
        data = run.data()
        model, _ = run.load(device, c.checkpoint)
        row, rho = measure(run, model, data, c.split)
        rows.append(row)
        found.append(rho)
    print(tables.text(rows, COLUMNS))
    publish(rows, out, lambda: draw(runs, found))


if __name__ == "__main__":
    cli(main)
