"""Lists the scripts of a folder, for `python -m analysis` and its like."""

import ast
import re
import textwrap
from pathlib import Path


def list_scripts(folder: Path) -> None:
    """Prints the command of each script in a folder, with the first sentence of its docstring."""
    for path in sorted(folder.glob("*.py")):
        text = path.read_text(encoding="utf-8")
        if 'if __name__ == "__main__":' not in text:
            continue
        words = " ".join((ast.get_docstring(ast.parse(text)) or "").split())
        sentence = re.split(r"(?<=[.?]) ", words)[0]
        print(f"python -m {folder.name}.{path.stem}")
        print(textwrap.indent(textwrap.fill(sentence, 92), "    "))
    print("\nAdd --help for the settings of a command.")
