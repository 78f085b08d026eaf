"""What a long program prints."""

import sys
from typing import TextIO


def say(*words: object, file: TextIO | None = None) -> None:
    """Prints at once, on stdout by default.

    A full disk, or a terminal that is gone, must not end a training. So then the words are lost. If
    the reader of a pipe has closed it, this raises BrokenPipeError, as print does.
    """
    try:
        print(*words, file=file or sys.stdout, flush=True)
    except BrokenPipeError:
        raise
    except OSError:
        return  # There is no other place to say it.
