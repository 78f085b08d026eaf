"""Scripts that measure and compare finished runs: `python -m analysis.NAME out/a out/b ...`."""

import sys

from base.loading import say_loading

# Python is looking for the module of `python -m analysis.NAME`. (`python -m analysis` needs no
# PyTorch.)
if sys.argv[0] == "-m" and ("-m", "analysis") not in zip(sys.orig_argv, sys.orig_argv[1:]):
    say_loading()
