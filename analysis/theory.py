"""Measures what the theory of harmonic loss is about: margins, the terms of its bound, how near a
head is to a softmax, and where prototypes go.

    python -m analysis.theory out/a out/b

All numbers are over validation tokens. y is the right token of a state h, and d_j = d(h, w_j).

predicted    share of tokens whose likeliest prediction is right
rho_5 ...    the margin d_y / (smallest d_j of the others), at five quantiles of the tokens. Below 1
             the prediction is right. With the harmonic link, p_y >= 1 / (1 + (V - 1) rho^n)
gamma_5 ...  (smallest d_j of the others) - d_y at the 5 % and 50 % quantiles of the tokens that are
             predicted right. For a head without a distance it is the difference of the logits
R, |W|       the largest |h|, and the Frobenius norm of the prototypes
bound_5 ...  R |W| / (gamma sqrt N), the term of the PAC-Bayes bound of 2603.10225. N is the number
             of tokens predicted in training, with repeats. Scaling h and w changes this term
             (except for squared distances and dot products), but not a harmonic loss of a
             homogeneous distance
bound holds  share of tokens for which the bound on p_y above holds; only for the harmonic link

The picture shows the margins, the KL to the linearised softmax over training, and a toy example:
with five separable points the loss of a distance head has a finite minimiser.
"""

import math
import sys
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure

from analysis import figures, tables
from analysis.runs import (
    ModelAnalysisConfig,
    Run,
    about,
    check_finite,
    default_out,
    find_runs,
    head_styles,
    numbered,
    predictions,
    publish,
)
from analysis.tables import Column
from base.command_line import cli, parse
from harmonic import HEADS, HarmonicHead, distance
from model import Model
from text.token_files import Data
from training.distributed import check_device
from training.metrics import read_metrics

# How many validation tokens are measured, and how many of them at a time.
TOKENS, ROWS = 4096, 256
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
TOY = ("cross_entropy", "euclidean", "manhattan", "cosine")


@dataclass
class TheoryConfig(ModelAnalysisConfig):
    """Margins and bounds"""


@torch.no_grad()
def states_of(model: Model, data: Data, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states (N, C) and targets (N,) of about TOKENS tokens, spread evenly over a split."""
    states, targets, _ = zip(*predictions(model, data, split, TOKENS), strict=True)
    return torch.cat(states), torch.cat(targets)


@torch.no_grad()
def margins(
    head: HarmonicHead, h: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """rho, gamma and p_y of each token, (N,) each. rho is NaN for a control.

    h: (N, C). targets: (N,).
    """
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
    return torch.cat(rho).cpu(), torch.cat(gamma).cpu(), torch.cat(p).cpu()


def measure(
    run: Run, model: Model, iteration: int, data: Data, split: str
) -> tuple[dict, torch.Tensor]:
    """The row of a run at an iteration, and the margin rho of each token (N,).

    Raises: UserError if a prototype is not finite.
    """
    check_finite(run, "prototypes", model.head.prototypes())
    h, targets = states_of(model, data, split)
    check_finite(run, "hidden states", h)
    rho, gamma, p = margins(model.head, h, targets)
    predicted = gamma > 0
    metrics = read_metrics(run.path)
    c, steps = run.model_config, sum("train_loss" in m and m["iter"] < iteration for m in metrics)
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
        # The bound is a theorem, so a share below 1 means that the code is wrong.
        least = 1 / (
            1 + (model.head.real_vocab_size - 1) * rho.double() ** float(model.head.strength)
        )
        row["margin_bound_holds"] = (p.double() >= least * (1 - 1e-4)).double().mean().item()
    else:
        row["margin_bound_holds"] = None
    return row, rho


def toy(
    name: str,
    steps: int = 2000,
    points: torch.Tensor | None = None,
    targets: torch.Tensor | None = None,
    seed: int = 0,
) -> dict:
    """Trains only the prototypes of a head on fixed points, with Adam, from N(0, 0.1^2), at n = 4.

    Args:
        name: the head.
        points: (N, C), of the classes `targets` (N,). The default is five classes with one point
            each, on the unit sphere in 8 dimensions.
        seed: of the start.
    Returns: norms and losses, with |W|_F and the loss of each step; points; head; path, the
        prototypes of each step (steps + 1, classes, C).
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
    """Panels of the margins, the KL to the softmax over training, and the toy.

    found: rho of each run.
    """
    figure = figures.figure(3.2)
    left, middle, right = figure.subplots(1, 3)
    for run, rho, style in zip(runs, found, head_styles(runs), strict=True):
        label = figures.literal(run.name)
        rho = rho[rho.isfinite()].sort().values
        if len(rho):  # A control has no distance.
            left.plot(rho, torch.linspace(0, 1, len(rho)), label=label, **style)
        lines = [m for m in read_metrics(run.path) if "kl_to_softmax" in m]
        if lines:
            iterations = [m["iter"] for m in lines]
            divergences = [m["kl_to_softmax"] for m in lines]
            middle.plot(iterations, divergences, marker=".", label=label, **style)
    left.axvline(1, color=figures.GREY, linewidth=0.8, linestyle=":")
    left.set_xlabel("rho: own distance / nearest other")
    left.set_ylabel("share of tokens with a lower rho")
    left.set_title("Margins (left of 1: predicted)")
    middle.set_yscale("log")
    middle.set_xlabel("iteration")
    middle.set_ylabel("KL divergence, nats a token")
    middle.set_title("Difference from a softmax")
    nothing = {
        left: "no run has a distance",
        middle: "no run recorded it:\nit needs the harmonic link\nand a distance of kernel l2",
    }
    for axes, sentence in nothing.items():
        if not axes.get_legend_handles_labels()[0]:
            axes.text(0.5, 0.5, sentence, transform=axes.transAxes, ha="center")
            axes.tick_params(which="both", length=0, labelbottom=False, labelleft=False)
    for name in TOY:
        right.plot(toy(name)["norms"], label=name, color=figures.head_color(name))
    right.set_xscale("log")
    right.set_xlabel("step of Adam")
    right.set_ylabel("norm of all prototypes")
    right.set_title("Toy: five separable points")
    right.legend(loc="upper left")
    figures.legend_below(figure, [left, middle])
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
    for run in numbered(runs):
        data = run.data()
        model, manifest = run.load(device, c.checkpoint)
        row, rho = measure(run, model, manifest["iter"], data, c.split)
        rows.append(row)
        found.append(rho)
    print(tables.text(rows, COLUMNS))
    publish(rows, out, lambda: draw(runs, found))


if __name__ == "__main__":
    cli(main)
