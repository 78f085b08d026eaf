"""How much of the logits' gradient reaches the hidden state.

    python -m analysis.bottleneck out/a out/b

The gradient of a token's loss with respect to its V logits is g = p - y. But a hidden state has
only C < V coordinates, so it can move the logits only along the C columns of the head's Jacobian J.
The share is |P g| / |g|, where P projects onto these columns. It is 1 if the state can follow the
gradient completely, and 0 if nothing of it arrives. Paper 2603.10145 finds 0.01 to 0.05 for the dot
product of large models. For a dot product J is the table of prototypes. For a distance J depends on
the state.
"""

import math
import sys
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.figure import Figure

from analysis import figures, tables
from analysis.runs import (
    ModelAnalysisConfig,
    about,
    check_finite,
    default_out,
    find_runs,
    head_styles,
    numbered,
    predictions,
    publish,
    windows,
    with_float64,
)
from analysis.tables import Column
from base.command_line import cli, parse
from base.errors import too_small
from harmonic import HarmonicHead, paired_distance
from model import Model
from text.token_files import Data
from training.distributed import check_device
from training.objective import objective_of

RANK = 1e-12  # Directions whose singular value is this much less than the largest do not count.


@dataclass
class BottleneckConfig(ModelAnalysisConfig):
    """The gradient that reaches the hidden state"""

    tokens: int = 64
    """how many tokens of the split to measure, spread evenly over it"""

    def problems(self) -> list[str]:
        return super().problems() + too_small(self, tokens=1)


def jacobian(head: HarmonicHead, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits of one state h (C,), and their derivatives: (V,) and (V, C), in float64."""
    w = head.prototypes().detach().double()
    settings = {k: v.double() if torch.is_tensor(v) else v for k, v in head.geometry().items()}
    # With a copy of the state for each prototype, one backward pass of the sum gives all rows.
    copies = h.double().expand(len(w), -1).clone().requires_grad_()
    with torch.enable_grad():
        value = paired_distance(copies, w, head.name, **settings)
        if head.is_control:
            logits = value
        else:
            logits = -float(head.strength) * (value.log() if head.is_harmonic else value)
        (rows,) = torch.autograd.grad(logits.sum(), copies)
    return logits.detach(), rows


@torch.no_grad()
def gradient_shares(head: HarmonicHead, h: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """|P g| / |g| of each token: states h (N, C), targets (N,) -> (N,), from 0 to 1."""
    shares = []
    for state, target in zip(h, targets, strict=True):
        logits, rows = jacobian(head, state)
        if head.bias is not None:
            logits = logits + head.bias[: len(logits)].double()
        # g = (1 - p_y) (q - e_y), where q is the softmax of the other logits. The factor 1 - p_y
        # does not change the share. It is left out, because it rounds to 0 for a confident token.
        logits[target] = -math.inf
        g = logits.softmax(-1)
        g[target] = -1
        # In J = Q R the columns of Q are orthonormal. With g as the last column, R ends with Q' g.
        r = torch.linalg.qr(torch.cat((rows, g[:, None]), 1), mode="r").R
        # The rank may be less than C: cosine does not depend on the length of the state. J'J would
        # be cheaper, but it squares the ratio of singular values, which is large near a prototype.
        directions, sizes, _ = torch.linalg.svd(r[:, :-1], full_matrices=False)
        arriving = directions[:, sizes > RANK * sizes[0]].T @ r[:, -1]
        shares.append(arriving.norm() / g.norm())
    return torch.stack(shares)


def spread(model: Model, data: Data, split: str, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states (N, C) and targets (N,) of at most `tokens` tokens, spread over a split.

    They are from as many windows, if the split has so many.
    """
    length = model.config.block_size
    each = math.ceil(tokens / len(windows(data, split, length, tokens)))
    found = []
    for h, y, kept in predictions(
        model, data, split, tokens * objective_of(model.config.arch).predicted(length)
    ):
        every = torch.linspace(0, len(h) - 1, min(len(h), each * len(kept))).long()
        found.append((h[every], y[every]))
    states, targets = (torch.cat(parts) for parts in zip(*found, strict=True))
    chosen = torch.linspace(0, len(states) - 1, min(tokens, len(states))).long()
    return states[chosen], targets[chosen]


def draw(runs: list, shares: list[np.ndarray]) -> Figure:
    """The share of each token, smallest first."""
    figure = figures.figure(3.2)
    axes = figure.subplots()
    for run, values, style in zip(runs, shares, head_styles(runs), strict=True):
        axes.plot(
            np.linspace(0, 1, len(values)),
            np.sort(values),
            label=figures.literal(run.name),
            color=style["color"],
            ls=style["linestyle"],
        )
    axes.set_xlabel("share of the tokens, smallest value first")
    axes.set_ylabel("share of the gradient")
    figures.legend_below(figure, [axes])
    return figure


def main() -> None:
    (c,) = parse(sys.argv[1:], BottleneckConfig, words="runs")
    runs = find_runs(c.runs, dataset=c.dataset)
    device, out = with_float64(check_device(c.device)), default_out(c, runs, "bottleneck")
    rows, shares = [], []
    for run in numbered(runs):
        model, _ = run.load(device, c.checkpoint)
        h, y = spread(model, run.data(), c.split, c.tokens)
        check_finite(run, "prototypes", model.head.prototypes())
        check_finite(run, "hidden states", h)
        values = gradient_shares(model.head, h, y).cpu().numpy()
        shares.append(values)
        low, middle, high = np.quantile(values, (0.1, 0.5, 0.9))
        rows.append(
            {**about(run), "tokens": len(values), "mean": values.mean()}
            | {"p10": low, "median": middle, "p90": high}
        )
    numbers = [Column(key, form=".3f") for key in ("mean", "p10", "median", "p90")]
    print(tables.text(rows, ["run", "head", "link", "tokens", *numbers]))
    publish(rows, out, lambda: draw(runs, shares))


if __name__ == "__main__":
    cli(main)
