"""Compares runs on the same windows of text: the mean difference of their losses, its interval and
its p-value.

Losses of two windows differ far more than losses of two heads on one window. So the differences on
each window are compared. The interval is a bootstrap over windows, and the p-value is that of a
sign-flip permutation test. Both hold for this text and these two trained models. They do not cover
training again with another seed.
"""

import math
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
    """How many nats a token one run is worse than another.

    mean: over windows. low, high: its 95 % interval. p: the p-value of no difference.
    """

    mean: float
    low: float
    high: float
    p: float

    @property
    def noise(self) -> bool:
        """Whether chance may explain it. With few windows the interval is too short to say so."""
        return self.low <= 0 <= self.high or not self.p <= 0.05


@torch.inference_mode()
def window_losses(model: Model, data: Data, split: str = "val") -> np.ndarray:
    """The mean loss of each window, in nats a token: (windows,).

    There are at most WINDOWS windows, spread evenly over the split.
    """
    c, found = model.config, []
    tokens = WINDOWS * objective_of(c.arch).predicted(c.block_size)
    for h, y, kept in predictions(model, data, split, tokens):
        losses = torch.zeros(kept.shape, dtype=torch.float64)
        losses[kept] = model.head.loss(h, y, reduction="none").cpu().double()
        # A window without a target has loss 0.
        found.append(losses.sum(1) / kept.sum(1).clamp_min(1))
    return torch.cat(found).numpy()


def difference(a: np.ndarray, b: np.ndarray, seed: int = 0) -> Difference:
    """The difference a - b of the losses of the same N windows, (N,) each.

    seed: of the bootstrap and the permutations.
    """
    d, rng = a - b, np.random.default_rng(seed)
    mean = d.mean()
    if not math.isfinite(mean):
        return Difference(*[math.nan] * 4)
    means = d[rng.integers(0, len(d), (DRAWS, len(d)))].mean(1)
    flipped = (rng.integers(0, 2, (DRAWS, len(d)), dtype=np.int8) * 2 - 1) @ d / len(d)
    p = (1 + (np.abs(flipped) >= abs(mean) - 1e-15).sum()) / (1 + DRAWS)
    return Difference(
        float(mean), float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975)), float(p)
    )


def compare(losses: list[np.ndarray]) -> tuple[int, list[Difference]]:
    """Compares each run with the best one. losses: the window losses of each run, (N,) each.

    Returns: the index of the run with the lowest mean, and the difference of each run to it.
    """
    best = int(np.argmin([x.mean() if np.isfinite(x).all() else np.inf for x in losses]))
    return best, [difference(x, losses[best]) for x in losses]
