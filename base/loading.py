"""A word before the imports of PyTorch, which take seconds. This file imports nothing heavy."""

import os
import sys


def say_loading() -> None:
    """Says on stderr that a script loads PyTorch: once for all processes, and not for --help."""
    if os.environ.get("RANK", "0") == "0" and not {"--help", "-h"} & set(sys.argv):
        print("loading PyTorch and the model's code", file=sys.stderr, flush=True)
