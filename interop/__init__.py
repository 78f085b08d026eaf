"""Models in and out: other projects' checkpoints, Hugging Face folders, lm-evaluation-harness."""

import sys

from base.loading import say_loading

# Python is looking for the module of `python -m interop.NAME`. (`python -m interop` needs no
# PyTorch.)
if sys.argv[0] == "-m" and ("-m", "interop") not in zip(sys.orig_argv, sys.orig_argv[1:]):
    say_loading()
