"""Lists the scripts of a folder: `python -m analysis`, `studies`, `benchmarks` or `interop`."""

import ast
import re
import sys
import textwrap
from pathlib import Path

from base.errors import UserError


def list_scripts(folder: Path) -> None:
    """Prints the command of each script in a folder, with the first sentence of its docstring.

    Raises: UserError for a word on the command line, such as the name of a script.
    """
    for word in sys.argv[1:]:
        if word not in ("-h", "--help"):
            fix = f"python -m {folder.name} lists the commands"
            if (folder / f"{word}.py").is_file():
                fix = f"write python -m {folder.name}.{word}"
            raise UserError(f"{word}: {fix}")
    for path in sorted(folder.glob("*.py")):
        text = path.read_text(encoding="utf-8")
        if '\nif __name__ == "__main__":' not in text:
            continue
        words = " ".join((ast.get_docstring(ast.parse(text)) or "").split())
        sentence = re.split(r"(?<=[.?]) ", words)[0]
        print(f"python -m {folder.name}.{path.stem}")
        print(textwrap.indent(textwrap.fill(sentence, 92), "    "))
    print("\nAdd --help for the settings of a command.")
