"""What a training prints."""

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
