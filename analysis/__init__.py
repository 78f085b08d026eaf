"""Scripts that measure and compare finished runs: `python -m analysis.NAME out/a out/b ...`."""

import sys

from base.loading import say_loading

if sys.argv[0] == "-m":  # Python is looking for the module of `python -m analysis.NAME`.
    say_loading()
