"""The summary that a preparation prints: sizes, how the text was split, and what was dropped."""

import collections
from pathlib import Path

import numpy as np

from text.documents import Tally
from text.sources import left_out_line
from text.token_files import FEW_TOKENS, other_kind
from text.tokenizers import Tokenizer

PART = 2**24  # Tokens that are compared at a time.


def print_splits(
    splits: dict[str, dict], tally: Tally, fraction: float | None, left_out: collections.Counter
) -> None:
    """Prints the size of each split, how the text was split, and what was dropped and skipped.

    Args:
        splits: as in meta.json.
        fraction: the part of the documents for validation; None for official splits.
        left_out: as in `Found`.
    """
    for name, s in splits.items():
        print(
            f"{name:5} {s['documents']:>10,} documents {s['tokens']:>14,} tokens {s['bytes']:>15,}"
            f" bytes {s['bytes'] / s['tokens']:6.2f} bytes a token"
        )
    how_split = tally.how_split
    share = splits["val"]["tokens"] / sum(s["tokens"] for s in splits.values())
    if fraction is not None and not 0.5 < share / fraction < 2:
        how_split += f"; val has {share:.1%} of the tokens"
    print(f"split: {how_split}")
    print(
        f"read: {tally.read:,} {'document' if tally.read == 1 else 'documents'}. Dropped:"
        f" {tally.duplicates:,} copies and {tally.empty:,} empty ones"
    )
    if skipped := tally.skipped_line():
        print(skipped)
    if left_out:
        print(left_out_line(left_out))


def print_warnings(
    splits: dict[str, dict], tokenizer: Tokenizer, fraction: float | None, out: Path
) -> None:
    """Prints the number of unknown tokens, a note if a trained BPE has fewer tokens than were asked
    for, and a warning if val is too short or unlike train."""
    wanted = tokenizer.name.partition(":")[2]
    if wanted and tokenizer.vocab_size < int(wanted):
        print(
            f"note: {tokenizer.name} has {tokenizer.vocab_size} tokens, because the training text"
            " has no more pairs to merge"
        )
    if tokenizer.unk_id is not None:
        for name, split in splits.items():
            ids = np.memmap(out / split["file"], tokenizer.dtype, "r")
            # In parts, because a comparison takes a byte for each token.
            parts = (ids[i : i + PART] for i in range(0, len(ids), PART))
            if unknown := sum(int((part == tokenizer.unk_id).sum()) for part in parts):
                print(
                    f"{name}: {unknown:,} unknown tokens, because the vocabulary does not have all"
                    " of its characters"
                )
    tokens = splits["val"]["tokens"]
    if tokens < FEW_TOKENS:
        how = "add documents"
        if fraction is not None:
            how += f" or raise --val_fraction (now {fraction:g})"
        print(
            f"warning: val has only {tokens:,} tokens, too short to validate on: below"
            f" {FEW_TOKENS:,} the loss is mostly noise. To make it longer, {how}."
        )
    sizes = (splits[name]["bytes"] / splits[name]["tokens"] for name in ("train", "val"))
    if tokens >= FEW_TOKENS and (sentence := other_kind(*sizes)):
        print(f"warning: {sentence}.")
