"""Paired comparison of runs: the same windows of text under each, their differences, an interval
and a p-value.

Windows of one text differ far more from one another than two heads do on one window, so the
differences are what is compared. The interval is a bootstrap of the windows, the p-value a
sign-flip permutation test. Both speak of this text and these two trained models: that another seed
might turn the result they cannot know.
"""

from dataclasses import dataclass

import numpy as np
import torch

from analysis.runs import predictions
from model import Model
from text.token_files import Data
from training.objective import objective_of

WINDOWS, DRAWS = 256, 10_000


@dataclass
class Difference:
    """`mean` nats a token by which a run is worse than the best one, its 95 % interval and
    p-value."""

    mean: float
    low: float
    high: float
    p: float


@torch.inference_mode()
def window_losses(model: Model, data: Data, split: str = "val") -> np.ndarray:
    """The mean negative log likelihood of each of at most WINDOWS windows, spread over a split, in
    nats a token."""
    c, found = model.config, []
    tokens = WINDOWS * objective_of(c.arch).predicted(c.block_size)
    for h, y, kept in predictions(model, data, split, tokens):
        losses = torch.zeros(kept.shape, dtype=torch.float64)
        losses[kept] = model.head.loss(h, y, reduction="none").cpu().double()
        # A window without a target has loss 0.
        found.append(losses.sum(1) / kept.sum(1).clamp_min(1))
    return torch.cat(found).numpy()


def difference(a: np.ndarray, b: np.ndarray, seed: int = 0) -> Difference:
    """Of paired losses (N,): a - b."""
    d, rng = a - b, np.random.default_rng(seed)
    mean = d.mean()
    means = d[rng.integers(0, len(d), (DRAWS, len(d)))].mean(1)
    flipped = (rng.integers(0, 2, (DRAWS, len(d)), dtype=np.int8) * 2 - 1) @ d / len(d)
    p = (1 + (np.abs(flipped) >= abs(mean) - 1e-15).sum()) / (1 + DRAWS)
    return Difference(
        float(mean), float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975)), float(p)
    )


def compare(losses: list[np.ndarray]) -> tuple[int, list[Difference]]:
    """Window losses of each run -> (the index of the best, the difference of each to it)."""
    best = int(np.argmin([x.mean() if np.isfinite(x).all() else np.inf for x in losses]))
    return best, [difference(x, losses[best]) for x in losses]
