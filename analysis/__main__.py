"""Lists the commands of this folder: `python -m analysis`."""

from functools import partial
from pathlib import Path

from base.command_line import cli
from base.listing import list_scripts

cli(partial(list_scripts, Path(__file__).parent))
