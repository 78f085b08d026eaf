"""Lists the commands of this folder: `python -m benchmarks`."""

from functools import partial
from pathlib import Path

from base.command_line import cli
from base.listing import list_scripts

cli(partial(list_scripts, Path(__file__).parent))
