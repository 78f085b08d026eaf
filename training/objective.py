"""What a model is trained to predict, the next token or masked tokens (masked language modelling),
and the batches for it.

An objective turns a window of tokens into inputs and targets. `objective_of` chooses it from the
architecture: causal models predict the next token, and others masked tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from base.errors import UserError
from harmonic import IGNORE_INDEX
from model import ARCHITECTURES, ModelConfig
from text.token_files import Data, Split
from training.data import hashed, index

# The part of a window's tokens that BERT predicts (1810.04805, section 3.1).
MASKED_SHARE = 0.15

Batch = tuple[torch.Tensor, torch.Tensor]


class Objective(Protocol):
    """What a model predicts.

    masked: whether it is masked language modelling. Its loss is not the likelihood of a text, so
        there are no bits per byte. Such a model does not generate text.
    lookahead: the number of tokens to read after the inputs of a window.
    """

    masked: bool
    lookahead: int

    def predicted(self, block_size: int) -> int:
        """The number of tokens that are predicted in a window."""

    def rows(self, data: Data) -> int:
        """The number of rows that the token table needs."""

    def pair(self, window: np.ndarray, data: Data, key: tuple) -> tuple[np.ndarray, np.ndarray]:
        """A window (T + lookahead,) -> inputs (T,) and targets (T,). key: determines the noise."""


class NextToken:
    """Predicts each token from the tokens before it."""

    masked = False
    lookahead = 1

    def predicted(self, block_size: int) -> int:
        return block_size

    def rows(self, data: Data) -> int:
        return data.vocab_size

    def pair(self, window: np.ndarray, data: Data, key: tuple) -> tuple[np.ndarray, np.ndarray]:
        return window[:-1], window[1:]


class MaskedLM:
    """Masked language modelling: predicts 15 % of the tokens from all others, as BERT does
    (1810.04805, section 3.1).

    Of these, 80 % become the mask token, 10 % a random token, and 10 % stay. Where the random token
    would be the data's end-of-text token, the token stays too. End-of-text tokens are chosen last.
    """

    masked = True
    lookahead = 0

    def predicted(self, block_size: int) -> int:
        """The same number in each window, so that all windows have the same weight."""
        return max(1, round(MASKED_SHARE * block_size))

    def rows(self, data: Data) -> int:
        """The mask token may lie beyond the vocabulary."""
        return max(data.vocab_size, data.mask_id + 1)

    def pair(self, window: np.ndarray, data: Data, key: tuple) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(hashed("mask", *key))
        order = rng.permutation(len(window))
        order = order[np.argsort(window[order] == data.eot_id, kind="stable")]
        chosen = order[: self.predicted(len(window))]
        x, y = window.copy(), np.full_like(window, IGNORE_INDEX)
        y[chosen] = window[chosen]
        action = rng.random(len(chosen))
        x[chosen[action < 0.8]] = data.mask_id
        other = chosen[action >= 0.9]
        random = rng.integers(0, data.vocab_size, len(other))
        # With doc_mask, the data's end-of-text token would begin a document where there is none.
        x[other] = np.where(random == data.eot_id, window[other], random)
        return x, y


NEXT_TOKEN, MASKED_LM = NextToken(), MaskedLM()


def objective_of(arch: str) -> Objective:
    """The objective of an architecture."""
    return NEXT_TOKEN if ARCHITECTURES[arch].causal else MASKED_LM


@dataclass(frozen=True)
class Batches:
    """The batches of a data folder: inputs (B, T) and targets (B, T), int64, with T = block_size.

    A target is IGNORE_INDEX if nothing is predicted there.
    """

    data: Data
    objective: Objective
    block_size: int

    def training(
        self, seed: int, step: int, slots: range, total: int, size: int
    ) -> Iterator[Batch]:
        """Yields the micro-batches of a step for this process.

        slots: the slots of this process, of `total` in all. size: the most windows in one of them.
        """
        split = self.data.splits["train"]
        for first in range(slots.start, slots.stop, size):
            part = range(first, min(first + size, slots.stop))
            starts = [index(seed, step, s, total, split.tokens, self.block_size) for s in part]
            yield self.read(split, starts, [(seed, step, s) for s in part])

    def validation(self, starts: list[int], size: int, split: str = "val") -> Iterator[Batch]:
        """Yields batches of at most `size` windows, which begin at `starts`.

        The noise of a masked window depends only on the window.
        """
        for first in range(0, len(starts), size):
            part = starts[first : first + size]
            yield self.read(self.data.splits[split], part, [("val", s) for s in part])

    def read(self, split: Split, starts: list[int], keys: list[tuple] | None = None) -> Batch:
        """Reads the windows that begin at `starts`. keys: determine the noise of each window.

        Raises: UserError for an id beyond the vocabulary.
        """
        data, pairs = self.data, []
        for start, key in zip(starts, keys or [()] * len(starts), strict=True):
            window = split.read(start, self.block_size + self.objective.lookahead)
            if (highest := window.max()) >= data.vocab_size:
                raise UserError(
                    f"{split.path} holds the id {highest}, but its vocabulary {data.tokenizer} has"
                    f" {data.vocab_size}: prepare it again"
                )
            pairs.append(self.objective.pair(window, data, key))
        inputs, targets = zip(*pairs, strict=True)
        return torch.from_numpy(np.stack(inputs)), torch.from_numpy(np.stack(targets))


def batches_of(data: Data, config: ModelConfig) -> Batches:
    """The batches to train and evaluate a model."""
    return Batches(data, objective_of(config.arch), config.block_size)
