"""What a script does before it imports PyTorch, which takes seconds. This imports nothing heavy."""

import os
import signal
import sys

from base.output import say


def end_at_ctrl_c() -> None:
    """Lets Ctrl-C end the process without a traceback, until `cli` runs the script."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def say_loading() -> None:
    """Says on stderr that a script loads PyTorch: once for all processes, and not for --help.

    Ctrl-C then ends the process without a traceback.
    """
    end_at_ctrl_c()
    if os.environ.get("RANK", "0") == "0" and not {"--help", "-h"} & set(sys.argv):
        say("loading PyTorch and the model's code", file=sys.stderr)
