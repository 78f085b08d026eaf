"""Runs a notebook without Jupyter and stores what its cells print and draw.

    python docs/notebook.py docs/quickstart.ipynb

The code cells run one after another in one namespace, as in a fresh kernel. The test of the
notebook and the site (docs/site.py) use the functions below.
"""

import base64
import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

DOTS = 80  # an inch


def load(path: Path) -> dict[str, Any]:
    """A notebook's JSON."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def run_cells(notebook: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """Runs the code cells -> the outputs of each, in the notebook's own format."""
    import matplotlib

    matplotlib.use("agg")
    names: dict[str, Any] = {"__name__": "__main__"}
    outputs = []
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("".join(cell["source"]), "<cell>", "exec"), names)
        lines = printed.getvalue().splitlines(keepends=True)
        text = [{"output_type": "stream", "name": "stdout", "text": lines}] if lines else []
        outputs.append(text + [drawn(figure) for figure in take_figures()])
    return outputs


def take_figures() -> list[Any]:
    """The figures that pyplot holds, which it then forgets."""
    from matplotlib import pyplot

    figures = [pyplot.figure(number) for number in pyplot.get_fignums()]
    pyplot.close("all")
    return figures


def drawn(figure: Any) -> dict[str, Any]:
    """A figure as an output of a cell: a PNG of 256 colours, which needs a third of the bytes."""
    from PIL import Image

    drawing, picture = io.BytesIO(), io.BytesIO()
    figure.savefig(drawing, format="png", dpi=DOTS)
    Image.open(drawing).convert("RGB").quantize(256).save(picture, format="png", optimize=True)
    return {
        "output_type": "display_data",
        "metadata": {},
        "data": {"image/png": base64.b64encode(picture.getvalue()).decode()},
    }


def to_markdown(notebook: dict[str, Any]) -> str:
    """The notebook as a page: its text, its code, and what the cells print and draw."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", []):
            if "text" in output:
                parts.append(f"```\n{''.join(output['text']).rstrip()}\n```")
            else:
                parts.append(f"![](data:image/png;base64,{output['data']['image/png']})")
    return "\n\n".join(parts) + "\n"


def main() -> None:
    path = Path(sys.argv[1])
    notebook = load(path)
    outputs = iter(run_cells(notebook))
    number = 0
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            number += 1
            cell["outputs"], cell["execution_count"] = next(outputs), number
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"wrote {path}, {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
