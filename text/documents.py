"""Which documents are kept, and in which split each one is.

Empty documents and exact copies are dropped, except in a corpus with official splits. Without
those, the split of a document depends on a hash of its text alone. So adding documents, or changing
their order, moves none from split to split.
"""

import hashlib
import itertools
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from base.errors import UserError
from text.readers import Broken
from text.tokenizers import well_formed

PIECES = 10  # A single document is cut into at most so many.
VAL_PIECE = 4096  # Characters of validation text in a piece of a single document.
NAMED = 3  # The summary of what was skipped names so many problems.


@dataclass
class Tally:
    """Counts of what happened to the documents of a source.

    Attributes:
        read: documents read.
        duplicates, empty: documents dropped as copies, or because they were empty.
        files: files that cannot be read. records: lines, rows or items that cannot be read.
        problems: how many problems these have. named: the first few of them.
        how_split: how documents were divided into splits, in words.
    """

    read: int = 0
    duplicates: int = 0
    empty: int = 0
    files: int = 0
    records: int = 0
    problems: int = 0
    named: list[str] = field(default_factory=list)
    how_split: str = ""

    def skip(self, broken: Broken) -> None:
        """Counts a file or record that cannot be read."""
        self.problems += 1
        self.files += broken.file
        self.records += 0 if broken.file else broken.lines
        if self.problems <= NAMED:
            self.named.append(broken.problem)

    def skipped_line(self) -> str:
        """`skipped 1 file and 2 lines or items that cannot be read: ...`, or nothing."""
        parts = []
        if self.files:
            parts.append(f"{self.files:,} file{'s' if self.files > 1 else ''}")
        if self.records:
            noun = "lines or items" if self.records > 1 else "line or item"
            parts.append(f"{self.records:,} {noun}")
        if not parts:
            return ""
        more = "; ..." if self.problems > NAMED else ""
        return f"skipped {' and '.join(parts)} that cannot be read: {'; '.join(self.named)}{more}"


def check_splits(splits: Container[str], tally: Tally) -> None:
    """Raises a UserError if no document is left for train or val."""
    lost = [name for name in ("train", "val") if name not in splits]
    if lost:
        skipped = f"; {line}" if (line := tally.skipped_line()) else ""
        raise UserError(
            f"no documents left for {' and '.join(lost)}: {tally.read} read, {tally.empty} of them"
            f" empty{skipped}"
        )


def split_documents(
    parts: Mapping[str | None, Iterable[str | None]],
    fraction: float | None,
    limit: int,
    tally: Tally,
) -> Iterator[tuple[str, str]]:
    """Yields (split, text) of every document that is kept.

    Args:
        parts: the documents of each official split, or all of them under the key None.
        fraction: part of the documents for validation. None: the official splits, from which no
            copies are dropped.
        limit: the most documents to read from each of `parts`; 0 for all.
        tally: counts what is read and dropped, and gets `how_split`.
    """
    parts = {split: itertools.islice(texts, limit or None) for split, texts in parts.items()}
    if fraction is not None:
        yield from _split_by_hash(unique_documents(parts[None], tally), fraction, tally)
        return
    tally.how_split = "the official one of this corpus"
    for split, texts in parts.items():
        assert split is not None, "a corpus without official splits has a fraction"
        for text in texts:
            tally.read += 1
            yield split, text or ""


def _split_by_hash(
    documents: Iterable[tuple[bytes, str]], fraction: float, tally: Tally
) -> Iterator[tuple[str, str]]:
    """Yields (split, text) of (hash, text) pairs.

    A document goes to validation if its hash, divided by the largest possible one, is below
    `fraction`. If no document does, the one with the smallest hash is moved there. If all do, the
    one with the largest hash is moved to training. Documents wait in memory until both splits have
    one. On average 1 / fraction of them wait.
    """
    tally.how_split = (
        f"by a hash of each document's text, about {fraction:g} of the documents to val"
        " (--val_fraction)"
    )
    waiting, met = [], set()
    for digest, text in documents:
        split = "val" if int.from_bytes(digest, "big") < fraction * 2**128 else "train"
        met.add(split)
        waiting.append((digest, split, text))
        if len(met) == 2:
            yield from ((split, text) for _, split, text in waiting)
            waiting.clear()
    if len(waiting) == 1:
        text = waiting[0][2]
        count = pieces(text, fraction)
        how = f"into {count} pieces; the last {fraction:g} of each"
        if count == 1:
            how = f"in two; the last {fraction:g} of it"
        tally.how_split = f"the only document is cut {how} is val (--val_fraction)"
        yield from cut(text, fraction, count)
    elif waiting:
        empty = "val" if "train" in met else "train"
        moved, *_ = min(waiting) if empty == "val" else max(waiting)
        tally.how_split += f"; one was moved to {empty}, which would have been empty"
        for digest, split, text in waiting:
            yield (empty if digest == moved else split), text


def unique_documents(texts: Iterable[str | None], tally: Tally) -> Iterator[tuple[bytes, str]]:
    """Yields (hash of 16 bytes, text) of all documents that are neither blank nor copies."""
    seen = set()
    for text in texts:
        tally.read += 1
        text = well_formed(text or "")
        if not text.strip():
            tally.empty += 1
            continue
        digest = hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()
        if digest in seen:
            tally.duplicates += 1
            continue
        seen.add(digest)
        yield digest, text


def pieces(text: str, fraction: float) -> int:
    """How many pieces of a text have an end of at least VAL_PIECE characters, at most PIECES."""
    return min(PIECES, max(1, int(len(text) * fraction / VAL_PIECE)))


def cut(text: str, fraction: float, count: int) -> list[tuple[str, str]]:
    """Cuts a text into `count` pieces of about equal length. Of each, the last `fraction` is val.

    So the validation text comes from the whole document, and not only from its end. It cuts after a
    line end, or else after a space, if there is one shortly before that point.

    Returns: (split, text) of all parts in order, without blank ones.
    Raises: UserError if a split is blank.
    """
    parts, start = [], 0
    for number in range(1, count + 1):
        last = number == count
        end = len(text) if last else _border(text, start, len(text) * number // count)
        middle = _border(text, start, end - round((end - start) * fraction))
        parts += [("train", text[start:middle]), ("val", text[middle:end])]
        start = end
    parts = [(split, part) for split, part in parts if part.strip()]
    if len({split for split, _ in parts}) < 2:
        raise UserError(
            f"the only document has {len(text):,} characters: too short to be cut into train and"
            " val"
        )
    return parts


def _border(text: str, start: int, at: int) -> int:
    """A place to cut a text, at `at` or shortly before it, and after `start`."""
    at = max(start + 1, min(len(text) - 1, at))
    for mark in ("\n", " "):
        if (end := text.rfind(mark, at - (at - start) // 10, at)) >= 0:
            return end + 1
    return at
