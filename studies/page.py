"""Fills in the tables on the pages of results/ from the studies' rows so far. The pages' words are
written by hand.

    python -m studies.page
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from analysis.tables import read_csv
from base.command_line import cli, parse
from base.errors import UserError
from base.files import write_whole
from studies import (
    algorithmic,
    algorithmic_report,
    bottleneck,
    budget,
    budget_report,
    ends,
    heads,
    heads_report,
    optimizers,
    toy,
    vision,
    vision_report,
)

# The name in a page's marks: the study, its file beside the page, the table of its rows.
TABLES = {
    "stage 1": (heads, "heads.csv", heads_report.stage_one),
    "stage 2": (heads, "heads.csv", heads_report.stage_two),
    "stage 2 training": (heads, "heads.csv", heads_report.stage_two_training),
    "stage 2 pairs": (heads, "heads.csv", heads_report.pairs),
    "stage 2 tests": (heads, "heads.csv", heads_report.p_values),
    "stage 3": (heads, "heads.csv", heads_report.stage_three),
    "stage 4": (heads, "heads.csv", heads_report.stage_four),
    "budget runs": (budget, "budget.csv", budget_report.progress),
    "budget settings": (budget, "budget.csv", budget_report.settings),
    "budget checks": (budget, "budget.csv", budget_report.checks),
    "budget": (budget, "budget.csv", budget.summary),
    "budget leads": (budget, "budget.csv", budget_report.leads),
    "budget controls": (budget, "budget.csv", budget_report.controls),
    "budget links": (budget, "budget.csv", budget_report.links),
    "budget ranks": (budget, "budget.csv", budget_report.ranks),
    "budget middle": (budget, "budget.csv", budget_report.halfway),
    "budget turns": (budget, "budget.csv", budget_report.turns),
    "budget measures": (budget, "budget.csv", budget_report.measures),
    "budget energy": (budget, "budget.csv", budget_report.energy),
    "budget ends": (ends, "ends.csv", ends.tables),
    "budget rate": (ends, "ends.csv", ends.rate_table),
    "optimizers": (optimizers, "optimizers.csv", optimizers.tuned_rates),
    "optimizers tuned": (optimizers, "optimizers.csv", optimizers.tuned),
    "bottleneck": (bottleneck, "bottleneck.csv", bottleneck.summary),
    "tasks": (algorithmic, "algorithmic.csv", algorithmic_report.main_table),
    "task twins": (algorithmic, "algorithmic.csv", algorithmic_report.task_twins),
    "task steps": (algorithmic, "algorithmic.csv", algorithmic_report.step_twins),
    "tuned": (algorithmic, "algorithmic.csv", algorithmic_report.tuned_table),
    "tuned twins": (algorithmic, "algorithmic.csv", algorithmic_report.tuned_twins),
    "grokking": (algorithmic, "algorithmic.csv", algorithmic_report.gap_table),
    "fractions": (algorithmic, "algorithmic.csv", algorithmic_report.fraction_table),
    "fraction twins": (algorithmic, "algorithmic.csv", algorithmic_report.fraction_twins),
    "images": (vision, "vision.csv", vision_report.overview),
    "image twins": (vision, "vision.csv", vision_report.twins),
    "features": (vision, "vision.csv", vision_report.structure),
    "toys": (toy, "toy.csv", toy.table),
}
PLACE = re.compile(r"(<!-- table: (?P<name>[\w ]+) -->\n).*?(<!-- end -->)", re.DOTALL)


@dataclass
class PageConfig:
    """The pages of results"""

    page: str = "results"
    """a page, or a folder of pages; their tables are rewritten, from the CSV files beside them"""


def filled(text: str, folder: Path) -> str:
    """The text with every table between its marks. A file that is missing has no rows yet."""

    def table(found: re.Match) -> str:
        if found["name"] not in TABLES:
            raise UserError(
                f"the page asks for a table {found['name']!r}; there are {', '.join(TABLES)}"
            )
        study, name, draw = TABLES[found["name"]]
        path = folder / name
        rows = read_csv(path, study.COLUMNS) if path.is_file() else []
        return f"{found[1]}{draw(rows)}\n{found[3]}"

    return PLACE.sub(table, text)


def main() -> None:
    (c,) = parse(sys.argv[1:], PageConfig)
    place = Path(c.page)
    pages = sorted(place.glob("*.md")) if place.is_dir() else [place]
    if not pages or not pages[0].is_file():
        raise UserError(f"no page {place}")
    for page in pages:
        text = page.read_text()
        if count := len(PLACE.findall(text)):
            write_whole(page, filled(text, page.parent))
            print(f"wrote {page}, {count} tables")


if __name__ == "__main__":
    cli(main)
