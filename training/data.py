"""The order in which training and validation read a split.

A window is block_size tokens of a split, and one more for the last target. A slot is the place of a
window in an iteration. The window of a slot is a pure function of (seed, step, slot). It does not
depend on the number of processes, on accumulation, evaluation or resuming. There is no shuffled
array.
"""

import hashlib

from text.token_files import FEW_WINDOWS, LONGER, Data, other_kind

ENOUGH_IDS = 10_000  # So many ids of a text include some from the upper part of its vocabulary.


def split_problems(data: Data, block_size: int) -> list[str]:
    """An error for each split that is shorter than a window and the last target."""
    problems = []
    for name in ("train", "val"):
        split = data.splits[name]
        if split.tokens <= block_size:
            problems.append(
                f"block_size={block_size} is too long: {split.path} has {split.tokens:,} tokens,"
                f" and a window with its last target has {block_size + 1:,}. "
                f"Use a smaller --block_size, or prepare {LONGER[name]}"
            )
    return problems


def split_warnings(data: Data, block_size: int) -> list[str]:
    """A warning for each split with so few windows that its loss is mostly noise, or for a
    validation split that is unlike the training split."""
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
    unlike = other_kind(*(data.splits[name].bytes_per_token for name in ("train", "val")))
    if unlike and not warnings:
        warnings.append(f"{data.folder}: {unlike}")
    return warnings


def other_tokenizer(data: Data) -> list[str]:
    """A warning if token files without meta.json seem to have another tokenizer than was named."""
    split = data.splits["train"]
    if split.sha256 is not None or split.tokens < ENOUGH_IDS:
        return []
    ids = split.read(0, 2**20)
    if ids.max() >= data.vocab_size / 4:
        return []
    return [
        f"the first {len(ids):,} ids of {split.path} are all below {ids.max() + 1:,}, but"
        f" {data.tokenizer} has {data.vocab_size:,} tokens: check --tokenizer"
    ]


def hashed(*key: object) -> int:
    """A 64-bit hash of a key."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")


def permute(i: int, n: int, key: int) -> int:
    """The place of i in a pseudo-random permutation of range(n), without a table.

    It is a Feistel network of four rounds on an even number of bits, at least that of n - 1. The
    network is applied until the result is below n (cycle walking, Black and Rogaway 2002).
    """
    # With halves of fewer than 4 bits a chi-squared test shows that orders are not uniform.
    half = max(4, ((n - 1).bit_length() + 1) // 2)
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
    """The first token of the window that `slot` reads at `step`.

    slots: the number of windows in an iteration; slot is below it. tokens: of the split.

    Windows are drawn without replacement. Each epoch has its own order of windows, and its own
    offset, so that the borders of windows move. The last tokens of the split, at most
    block_size, are never targets.
    """
    windows = max(1, (tokens - 1) // block_size - 1)
    epoch, i = divmod(step * slots + slot, windows)
    shift = hashed("shift", seed, epoch) % min(block_size, tokens - windows * block_size)
    return shift + block_size * permute(i, windows, hashed("order", seed, epoch))


def validation_windows(tokens: int, block_size: int, count: int) -> list[int]:
    """The first tokens of at most `count` windows, spread evenly over a split."""
    windows = (tokens - 1) // block_size
    count = min(count, windows)
    return [i * windows // count * block_size for i in range(count)]
