"""The one writer of tables: aligned text for a terminal, Markdown, and CSV files.

Rows are dicts. A value that is missing, None or an empty text shows as "-". NaN shows as "nan",
because a loss that diverged must not look like one that was not measured.
"""

import csv
import io
import math
import numbers
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from base.errors import UserError
from base.files import write_result

NUMBER = re.compile(r"[+-]?\d[\d,]*(\.\d+)?(e[+-]?\d+)?%?( ± \d+(\.\d+)?)?|[+-]?(inf|nan)|-")


@dataclass(frozen=True)
class Column:
    """One column of a table, and how its numbers look."""

    key: str
    """the key in the dict of a row"""
    title: str = ""
    """the title that the reader sees; empty = the key"""
    form: str = ""
    """the format of numbers, such as ".4f". It also applies to texts that are numbers, as a CSV
    file has them"""
    unit: str = ""
    """a unit that is added to the title, as "title, unit" """


Columns = Sequence[Column | str]


def cells(rows: Sequence[dict], columns: Columns) -> list[list[str]]:
    """The cells of each row as texts, without titles."""
    columns = _columns(columns)
    return [[_cell(row.get(column.key), column.form) for column in columns] for row in rows]


def text(rows: Sequence[dict], columns: Columns) -> str:
    """The table as aligned text for a terminal. Columns of numbers are aligned right."""
    body = cells(rows, columns)
    lines = [_titles(columns), *body]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    right = _are_numbers(body, len(widths))
    shown = []
    for line in lines:
        padded = [
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(line, widths, right, strict=True)
        ]
        shown.append("  ".join(padded).rstrip())
    return "\n".join(shown)


def markdown(rows: Sequence[dict], columns: Columns) -> str:
    """The table in GitHub's Markdown. Columns of numbers are aligned right."""
    body = cells(rows, columns)
    titles = _titles(columns)
    rules = ["---:" if number else "---" for number in _are_numbers(body, len(titles))]
    lines = []
    for line in (titles, rules, *body):
        # A bar inside a cell would begin the next one.
        escaped = [cell.replace("|", r"\|") for cell in line]
        lines.append(f"| {' | '.join(escaped)} |")
    return "\n".join(lines)


def interval(mean: float, half: float, form: str = "+.3f") -> str:
    """A mean and the half width of its interval, such as "+0.012 ± 0.003".

    If half is NaN, as for a single value, only the mean is given.
    """
    if math.isnan(half):
        return format(mean, form)
    return f"{mean:{form}} ± {half:{form.removeprefix('+')}}"


def write_csv(path: Path | str, rows: Sequence[dict], columns: Columns | None = None) -> None:
    """Writes a CSV file completely or not at all. A value that a row lacks gives an empty cell.

    columns: which columns to write, in this order. None = every key, in order of appearance.
    """
    if columns is None:
        columns = list(dict.fromkeys(key for row in rows for key in row))
    write_result(Path(path), _csv(rows, columns, header=True))


def append_csv(path: Path | str, rows: Sequence[dict], columns: Columns) -> None:
    """Appends rows to a CSV file in one write, and flushes it to the disk.

    A new or empty file gets a header first. Raises: UserError if it cannot be written.
    """
    path = Path(path)
    old = path.read_bytes() if path.is_file() else b""
    added = _csv(rows, columns, header=not old)
    if old and not old.endswith(b"\n"):
        # An editor has removed the line break at the end of the file.
        added = "\r\n" + added
    try:
        with path.open("a", newline="", encoding="utf-8") as file:
            file.write(added)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from None


def read_csv(path: Path | str, columns: Columns | None = None) -> list[dict[str, str]]:
    """The rows of a CSV file, with texts as values.

    columns: those that the file must have. None = any.
    Raises: UserError for other columns, or for a line with too few or too many cells.
    """
    with Path(path).open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        header, rows = reader.fieldnames, []
        if columns is not None and header not in (None, [c.key for c in _columns(columns)]):
            raise UserError(
                f"{path} has other columns ({', '.join(header)}): another version wrote it; move"
                " it away"
            )
        for row in reader:
            if None in row or None in row.values():
                raise UserError(
                    f"{path}: line {reader.line_num} has not as many cells as the header: repair or"
                    " delete it"
                )
            rows.append(row)
        return rows


def _columns(columns: Columns) -> list[Column]:
    return [Column(column) if isinstance(column, str) else column for column in columns]


def _titles(columns: Columns) -> list[str]:
    return [
        (column.title or column.key) + (f", {column.unit}" if column.unit else "")
        for column in _columns(columns)
    ]


def _cell(value: object, form: str) -> str:
    if value is None or value == "":
        return "-"
    if isinstance(value, str) and form:
        value = _parsed(value)
    return format(value, form) if isinstance(value, numbers.Number) else str(value)


def _parsed(value: str) -> int | float | str:
    """The number that a text stands for, or the text."""
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value


def _are_numbers(body: list[list[str]], count: int) -> list[bool]:
    """Which of the `count` columns hold only numbers."""
    return [all(NUMBER.fullmatch(line[i]) for line in body) for i in range(count)]


def _csv(rows: Sequence[dict], columns: Columns, header: bool) -> str:
    file = io.StringIO()
    names = [column.key for column in _columns(columns)]
    writer = csv.DictWriter(file, names, restval="", extrasaction="ignore")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()
