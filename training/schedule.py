"""The learning rate of each iteration."""

import math

from training.config import TrainConfig


def learning_rate(iteration: int, c: TrainConfig) -> float:
    """The learning rate of an iteration: a linear warm-up, then the schedule.

    cosine: half a cosine down to min_lr, as in nanoGPT.
    wsd: constant, then linear down to min_lr over the last decay_iters iterations.
    constant: constant to the end.
    """
    end, low = c.decay_end, c.learning_rate / 10 if c.min_lr is None else c.min_lr
    if iteration < c.warmup_iters:
        return c.learning_rate * (iteration + 1) / (c.warmup_iters + 1)
    if c.lr_schedule == "constant":
        return c.learning_rate
    if iteration >= end:
        return low
    if c.lr_schedule == "wsd":
        left = (end - iteration) / decay_iterations(c)
        return low + min(left, 1.0) * (c.learning_rate - low)
    turn = math.pi * (iteration - c.warmup_iters) / (end - c.warmup_iters)
    return low + 0.5 * (1 + math.cos(turn)) * (c.learning_rate - low)


def decay_iterations(c: TrainConfig) -> int:
    """The number of iterations in which wsd decays.

    The default is a fifth of the run, and never begins before the end of the warm-up.
    """
    if c.decay_iters is not None:
        return c.decay_iters
    return max(1, min(c.decay_end // 5, c.decay_end - c.warmup_iters))
