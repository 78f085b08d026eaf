"""Prints messages, and puts lists and durations into words."""

import os
import sys
from typing import TextIO


def say(*words: object, file: TextIO | None = None) -> None:
    """Prints at once, on stdout by default.

    A full disk, a terminal that is gone, or a `tee` that has ended must not end a training. So then
    the words are lost.
    """
    try:
        print(*words, file=file or sys.stdout, flush=True)
    except OSError:
        return  # There is no other place to say it.


def tell(sentence: str) -> None:
    """Prints a sentence on stderr, in one process on each machine."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        say(sentence, file=sys.stderr)


def listed(items: list, most: int = 5) -> str:
    """The items as `a, b, c and 4 more`, the first `most` of them by name."""
    return ", ".join(map(str, items[:most])) + (
        f" and {len(items) - most} more" if len(items) > most else ""
    )


def duration(seconds: float) -> str:
    """Seconds in words: `3 s`, `4 min 10 s` or `2 h 5 min`."""
    s = round(seconds)
    if s < 60:
        return f"{s} s"
    return f"{s // 60} min {s % 60} s" if s < 3600 else f"{s // 3600} h {s % 3600 // 60} min"
