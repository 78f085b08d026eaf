"""Lists the commands of this folder: `python -m benchmarks`."""

from pathlib import Path

from base.listing import list_scripts

list_scripts(Path(__file__).parent)
