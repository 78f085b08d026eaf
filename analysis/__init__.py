"""Scripts that measure and compare finished runs: `python -m analysis.NAME out/a out/b ...`."""

import sys

from base.loading import say_loading

# Python is looking for the module of `python -m analysis.NAME`. (`python -m analysis` is quick.)
if sys.argv[0] == "-m" and "analysis" not in sys.orig_argv:
    say_loading()
