"""The style of all figures. They can be read at the width of a README, and colour-blind readers can
tell their colours apart.

A head has the same colour in every figure. Heads of one family have shades of one colour. The style
of a line shows the link.
"""

import math
from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
from cycler import cycler
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure, SubFigure
from PIL import Image

from base.files import write_result
from harmonic import HEADS

# A README shows a picture about 800 px wide. With 8 inches this is 100 px an inch, so text of 9
# points is 12 px high.
WIDTH = 8.0
DPI = 200

# The colours of Okabe and Ito without black. Yellow is darker, so that a line shows on white.
BLUE = "#0072b2"
VERMILLION = "#d55e00"
GREEN = "#009e73"
PURPLE = "#cc79a7"
ORANGE = "#e69f00"
SKY = "#56b4e9"
OLIVE = "#a89f1c"
PALETTE = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, OLIVE)
GREY = "#8c8c8c"

# The first word of a head's name is its family. A family that is not here is grey.
FAMILIES = {
    "cross": "#000000",
    "euclidean": BLUE,
    "mahalanobis": SKY,
    "cosine": GREEN,
    "manhattan": ORANGE,
    "minkowski": ORANGE,
    "chebyshev": ORANGE,
    "hamming": PURPLE,
    "canberra": VERMILLION,
    "bray": OLIVE,
}
# How far the shades of a family go towards white, or towards black if negative.
SHADES = (0.0, 0.45, -0.4, 0.7)
# A control has no link.
LINES = {"harmonic": "-", "softmax": "--", None: "-"}

matplotlib.rcParams.update(
    {
        "font.size": 9,
        "axes.titlesize": 9,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.prop_cycle": cycler(color=PALETTE),
        # Numbers such as 0.6 rather than 6 x 10^-1 on logarithmic axes.
        "axes.formatter.min_exponent": 4,
        "legend.frameon": False,
        "legend.fontsize": 9,
        "lines.linewidth": 1.5,
        "lines.markersize": 5,
    }
)


def figure(height: float, width: float = WIDTH) -> Figure:
    """An empty figure. height and width are in inches; text has the right size at WIDTH."""
    return Figure(figsize=(width, height), layout="constrained")


def head_color(name: str) -> str:
    """The colour of a head, a shade of its family's colour."""
    family = _family(name)
    relatives = [other for other in HEADS if _family(other) == family]
    return _shaded(family, relatives.index(name) if name in relatives else 0)


def head_styles(heads: Sequence[tuple[str, str | None]]) -> list[dict[str, str]]:
    """The `color` and `linestyle` of each line of a figure.

    heads: the head's name and link of each line; the link of a control is None. If several lines
    have the same head and link, such as two runs, each has another shade, which no other line has.
    There are three or four shades; further runs repeat them.
    """
    taken = {(head_color(name), LINES[link]) for name, link in heads}
    styles: list[dict[str, str]] = []
    seen: list[tuple[str, str | None]] = []
    for name, link in heads:
        repeats = seen.count((name, link))
        seen.append((name, link))
        shades = list(dict.fromkeys(_shaded(head_color(name), i) for i in range(len(SHADES))))
        free = [color for color in shades if (color, LINES[link]) not in taken]
        color = free[0] if repeats and free else shades[repeats % len(shades)]
        taken.add((color, LINES[link]))
        styles.append({"color": color, "linestyle": LINES[link]})
    return styles


def dots(name: str, link: str | None) -> dict[str, Any]:
    """`color` and `markerfacecolor` of a head's points: open for the softmax link, else filled."""
    color = head_color(name)
    return {"color": color, "markerfacecolor": "white" if link == "softmax" else color}


def literal(name: str) -> str:
    """A label that shows `name` as it is. matplotlib takes `$` for a formula, and leaves labels
    that begin with `_` out of legends."""
    shown = name.replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def legend_below(figure: Figure | SubFigure, panels: Iterable[Axes], ncols: int = 4) -> None:
    """One legend for all panels, under them, so that it covers no data.

    ncols: the most columns. Long names get fewer.
    """
    entries: dict[Any, Artist] = {}
    for axes in panels:
        for line, name in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(name, line)
    if entries:
        # A character of 9 points is about 0.08 inches wide, and a line with its margins 0.6.
        entry = 0.6 + 0.08 * max(map(len, entries))
        room = max(1, int(figure.bbox.width / figure.dpi / entry))
        columns = min(ncols, len(entries), room)
        rows = math.ceil(len(entries) / columns)
        if rows > 1 and isinstance(figure, Figure):  # The legend takes no room from the panels.
            figure.set_figheight(figure.get_figheight() + 0.19 * (rows - 1))
        place: dict[str, Any] = {"loc": "outside lower center", "ncols": columns}
        figure.legend(list(entries.values()), list(entries), **place)


def save(figure: Figure, path: Path | str, dpi: int = DPI) -> None:
    """Writes a PNG completely or not at all. Its palette of 256 colours saves four fifths."""
    drawn = BytesIO()
    figure.savefig(drawn, format="png", dpi=dpi)
    picture = Image.open(drawn).convert("RGB").quantize(256, Image.Quantize.FASTOCTREE)
    write_result(Path(path), lambda aside: picture.save(aside, format="png", optimize=True))


def _family(name: str) -> str:
    """The colour of a head's family."""
    return FAMILIES.get(name.split("_")[0], GREY)


def _shaded(color: str, index: int) -> str:
    """A colour, lighter or darker by SHADES[index]."""
    share = SHADES[index % len(SHADES)]
    end = 1.0 if share > 0 else 0.0
    red, green, blue = (part + abs(share) * (end - part) for part in to_rgb(color))
    return to_hex((red, green, blue))
