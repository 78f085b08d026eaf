"""The order in which training and validation read a split, and its batches.

A window is block_size tokens of a split (and one more, the last target). Which window a slot of a
step reads is a pure function of (seed, step, slot): it does not depend on the number of processes,
on accumulation, evaluation or resuming, and no shuffled array exists.
"""

import hashlib

import numpy as np
import torch

from base.errors import UserError
from harmonic import IGNORE_INDEX
from text.token_files import FEW_WINDOWS, LONGER, Data, Split

MASKED = (
    0.15  # share of a window's tokens that masked-language training predicts (BERT, section 3.1)
)


def split_problems(data: Data, block_size: int) -> list[str]:
    """An error for each split that does not hold one window."""
    problems = []
    for name in ("train", "val"):
        split = data.splits[name]
        if split.tokens <= block_size:
            problems.append(
                f"block_size={block_size} is longer than the data: {split.path} has"
                f" {split.tokens:,} tokens. "
                f"Use a smaller --block_size, or prepare {LONGER[name]}"
            )
    return problems


def split_warnings(data: Data, block_size: int) -> list[str]:
    """A warning for each split of so few windows that its loss says little."""
    warnings = []
    for name in ("train", "val"):
        split = data.splits[name]
        windows = (split.tokens - 1) // block_size
        if 0 < windows < FEW_WINDOWS:
            warnings.append(
                f"{split.path} holds {windows} window{'s' if windows > 1 else ''} of"
                f" block_size={block_size}, so its loss is mostly noise. "
                f"Use a smaller --block_size, or prepare {LONGER[name]}"
            )
    return warnings


def _hash(*key) -> int:
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")


def permute(i: int, n: int, key: int) -> int:
    """A keyed bijection of range(n), without a table: a four-round Feistel network on the next even
    number of bits, walked until it lands inside (Black and Rogaway 2002, cycle walking)."""
    half = max(
        4, ((n - 1).bit_length() + 1) // 2
    )  # halves of fewer bits mix badly: far from uniform in a chi-squared test
    mask = (1 << half) - 1
    while True:
        left, right = i >> half, i & mask
        for r in range(4):
            mixed = (right + key + r * 0x9E3779B97F4A7C15) & (2**64 - 1)
            mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
            mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
            left, right = right, left ^ ((mixed ^ (mixed >> 31)) & mask)
        i = (left << half) | right
        if i < n:
            return i


def index(seed: int, step: int, slot: int, slots: int, tokens: int, block_size: int) -> int:
    """First token of the window that `slot` (0..slots-1) of `step` reads, in a split of `tokens`
    tokens.

    Windows are drawn without replacement: an epoch visits each once, in an order of its own,
        shifted by an offset of its own so that
    window borders move from epoch to epoch.
    """
    windows = max(1, (tokens - 1) // block_size - 1)
    epoch, i = divmod(step * slots + slot, windows)
    shift = _hash("shift", seed, epoch) % min(block_size, tokens - windows * block_size)
    return shift + block_size * permute(i, windows, _hash("order", seed, epoch))


def validation_windows(tokens: int, block_size: int, count: int) -> list[int]:
    """First tokens of at most `count` windows spread evenly over a split: always the same ones."""
    windows = (tokens - 1) // block_size
    count = min(count, windows)
    return [i * windows // count * block_size for i in range(count)]


def masked_count(block_size: int) -> int:
    """Tokens predicted in a window of masked-language training: the same number in each, so that
    every window weighs the same."""
    return max(1, round(MASKED * block_size))


def predicted_count(arch: str, block_size: int) -> int:
    """Tokens predicted in a window: all, or bert's masked ones."""
    return masked_count(block_size) if arch == "bert" else block_size


def mask_tokens(window: np.ndarray, data: Data, key: tuple) -> tuple[np.ndarray, np.ndarray]:
    """BERT's noise on one window (T,) -> (input (T,), targets (T,)): of the chosen tokens 80 %
    become the mask, 10 % a random token and
    10 % stay. The end-of-text token is not chosen while others are left. `key` determines the
    draw."""
    rng = np.random.default_rng(_hash("mask", *key))
    order = rng.permutation(len(window))
    order = order[np.argsort(window[order] == data.eot_id, kind="stable")]
    chosen = order[: masked_count(len(window))]
    x, y = window.copy(), np.full_like(window, IGNORE_INDEX)
    y[chosen] = window[chosen]
    action = rng.random(len(chosen))
    x[chosen[action < 0.8]] = data.mask_id
    other = chosen[action >= 0.9]
    x[other] = rng.integers(0, data.vocab_size, len(other))
    return x, y


def batch(
    split: Split, data: Data, starts: list[int], block_size: int, masked: list[tuple] | None = None
):
    """Windows at `starts` -> (inputs, targets), int64 (B, T) each: the next token, or with `masked`
    (a key each) BERT's noise."""
    windows = [split.read(start, block_size + (masked is None)) for start in starts]
    highest = max(w.max() for w in windows)
    if highest >= data.vocab_size:
        raise UserError(
            f"{split.path} holds the id {highest}, but its vocabulary {data.tokenizer} has"
            f" {data.vocab_size}: prepare it again"
        )
    if masked is None:
        both = np.stack(windows)
        return torch.from_numpy(both[:, :-1].copy()), torch.from_numpy(both[:, 1:].copy())
    x, y = zip(
        *(mask_tokens(w, data, key) for w, key in zip(windows, masked, strict=True)), strict=True
    )
    return torch.from_numpy(np.stack(x)), torch.from_numpy(np.stack(y))


def training_batches(
    data: Data,
    arch: str,
    block_size: int,
    seed: int,
    step: int,
    slots: range,
    total: int,
    batch_size: int,
):
    """The micro-batches of this process's `slots` (of `total`) at a step: yields (inputs, targets)
    of at most batch_size windows."""
    split = data.splits["train"]
    for i in range(0, len(slots), batch_size):
        part = slots[i : i + batch_size]
        starts = [index(seed, step, s, total, split.tokens, block_size) for s in part]
        yield batch(
            split,
            data,
            starts,
            block_size,
            [(seed, step, s) for s in part] if arch == "bert" else None,
        )


def validation_batches(
    data: Data, arch: str, block_size: int, starts: list[int], batch_size: int, split: str = "val"
):
    """The given validation windows in batches, with noise that depends on the window alone."""
    for i in range(0, len(starts), batch_size):
        part = starts[i : i + batch_size]
        yield batch(
            data.splits[split],
            data,
            part,
            block_size,
            [("val", s) for s in part] if arch == "bert" else None,
        )
