"""The learning rate of each iteration."""

import math

from training.config import TrainConfig


def learning_rate(iteration: int, c: TrainConfig) -> float:
    """Linear warm-up, then a cosine from learning_rate to min_lr (nanoGPT's schedule)."""
    end = c.max_iters if c.lr_decay_iters is None else c.lr_decay_iters
    low = c.learning_rate / 10 if c.min_lr is None else c.min_lr
    if iteration < c.warmup_iters:
        return c.learning_rate * (iteration + 1) / (c.warmup_iters + 1)
    if iteration >= end:
        return low
    turn = math.pi * (iteration - c.warmup_iters) / (end - c.warmup_iters)
    return low + 0.5 * (1 + math.cos(turn)) * (c.learning_rate - low)
