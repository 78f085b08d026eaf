"""Fills in the tables of results/README.md from the studies' rows, as far as they have got. The
page's words are written by hand.

    python -m studies.page
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from base.command_line import cli, parse
from base.errors import UserError
from base.files import write_whole
from studies import algorithmic, algorithmic_report, heads, heads_report, vision, vision_report
from studies.runner import Table

# The name in the page's marks: the study, its file beside the page, the table of its rows.
TABLES = {
    "stage 1": (heads, "heads.csv", heads_report.stage_one),
    "stage 2": (heads, "heads.csv", heads_report.stage_two),
    "stage 2 training": (heads, "heads.csv", heads_report.stage_two_training),
    "stage 3": (heads, "heads.csv", heads_report.stage_three),
    "stage 4": (heads, "heads.csv", heads_report.stage_four),
    "tasks": (algorithmic, "algorithmic.csv", algorithmic_report.main_table),
    "grokking": (algorithmic, "algorithmic.csv", algorithmic_report.gap_table),
    "fractions": (algorithmic, "algorithmic.csv", algorithmic_report.fraction_table),
    "images": (vision, "vision.csv", vision_report.overview),
    "features": (vision, "vision.csv", vision_report.structure),
}
PLACE = re.compile(r"(<!-- table: (?P<name>[\w ]+) -->\n).*?(<!-- end -->)", re.DOTALL)


@dataclass
class PageConfig:
    """The page of results"""

    page: str = "results/README.md"
    """its tables are rewritten, from the CSV files beside it"""


def filled(text: str, folder: Path) -> str:
    """The text with every table between its marks."""

    def table(found: re.Match) -> str:
        if found["name"] not in TABLES:
            raise UserError(
                f"the page asks for a table {found['name']!r}; there are {', '.join(TABLES)}"
            )
        study, name, draw = TABLES[found["name"]]
        rows = Table(folder / name, study.COLUMNS, study.KEY).rows
        return f"{found[1]}{draw(rows)}\n{found[3]}"

    return PLACE.sub(table, text)


def main() -> None:
    (c,) = parse(sys.argv[1:], PageConfig)
    page = Path(c.page)
    if not page.is_file():
        raise UserError(f"no page {page}")
    text = filled(page.read_text(), page.parent)
    write_whole(page, text)
    print(f"wrote {page}, {len(PLACE.findall(text))} tables")


if __name__ == "__main__":
    cli(main)
