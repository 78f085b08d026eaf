"""emissions.csv: measuring the energy of a run with CodeCarbon, and reading it."""

import csv
import logging
import math
import re
from pathlib import Path

from base.errors import UserError

# CodeCarbon's columns, and the unit that some versions add to the name.
ENERGY = {
    "energy_consumed": "kwh",
    "emissions": "kg",
    "cpu_energy": "kwh",
    "gpu_energy": "kwh",
    "ram_energy": "kwh",
    "duration": "s",
}
MEASURED = ("energy_consumed", "emissions")  # Every file of CodeCarbon has these.


def country_problem(code: str) -> str | None:
    """A problem if CodeCarbon has no numbers for the electricity of a country."""
    try:
        from codecarbon.input import DataSource

        known = DataSource().get_global_energy_mix_data()
    except (ImportError, AttributeError):  # CodeCarbon does not promise to keep these.
        return None
    if code in known:
        return None
    return (
        f"emissions_country={code}: CodeCarbon knows no such country; use an ISO 3166 alpha-3 code,"
        " such as USA, DEU or IND"
    )


class Emissions:
    """Measures the energy of one machine with CodeCarbon, offline, into emissions.csv.

    CodeCarbon estimates RAM, and CPUs without power counters. Each `flush` updates the row of this
    start, so a killed run loses little. CodeCarbon then rewrites the whole file, and renames a file
    with other columns. So the file of an earlier start is renamed first, and its rows never change.
    """

    def __init__(self, out_dir: Path, country: str, node: int = 0):
        from codecarbon import OfflineEmissionsTracker

        out_dir.mkdir(parents=True, exist_ok=True)  # On another machine's disk it may be missing.
        logging.getLogger("codecarbon").setLevel(logging.ERROR)
        file = out_dir / ("emissions.csv" if node == 0 else f"emissions_node{node}.csv")
        keep_earlier(file)
        self.tracker = OfflineEmissionsTracker(
            country_iso_code=country,
            project_name=out_dir.name,
            output_dir=str(out_dir),
            output_file=file.name,
            on_csv_write="update",  # One row, for any number of flushes.
            log_level="error",
            allow_multiple_runs=True,
        )
        self.tracker.start()

    def flush(self) -> None:
        """Updates the row in the file."""
        self.tracker.flush()

    def stop(self) -> tuple[float, float] | None:
        """Stops measuring. Returns (kWh, kg CO2e) of this start, or None if CodeCarbon failed."""
        self.tracker.stop()
        data = getattr(self.tracker, "final_emissions_data", None)
        return (data.energy_consumed, data.emissions) if data else None


def total(each: list[tuple[float, float] | None]) -> tuple[float, float] | None:
    """The sum of (kWh, kg CO2e) of all machines; None if none was measured."""
    measured = [used for used in each if used]
    return (sum(kwh for kwh, _ in measured), sum(kg for _, kg in measured)) if measured else None


def keep_earlier(file: Path) -> None:
    """Renames `emissions.csv` to `emissions_start1.csv`, or to the next free number."""
    if not file.is_file() or file.stat().st_size == 0:
        return
    number = 1
    while (kept := file.with_stem(f"{file.stem}_start{number}")).exists():
        number += 1
    file.rename(kept)


def _used(row: dict[str, str | None]) -> dict[str, float]:
    """The quantities of ENERGY in a row of any version of CodeCarbon.

    A missing duration is NaN. Other missing parts are 0.
    Raises: ValueError that tells what is wrong with the row.
    """
    if None in row:
        raise ValueError("more cells than the header")
    found = {}
    for key, unit in ENERGY.items():
        text = row.get(key) or row.get(f"{key}_{unit}")
        if not text and key in MEASURED:
            raise ValueError(f"no {key}")
        found[key] = float(text or (math.nan if key == "duration" else 0.0))
    return found


def _rows_of(path: Path) -> list[dict[str, float]]:
    """The rows of a file of CodeCarbon. UserError if it is corrupt."""
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        reader, rows = csv.DictReader(file), []
        for row in reader:
            try:
                rows.append(_used(row))
            except ValueError as error:
                where = f"line {reader.line_num}: {error}"
                raise UserError(
                    f"{path} is not a CodeCarbon table ({where}): repair the line or move the file"
                    " away"
                ) from None
    return rows


def energy(run: Path) -> dict[str, float] | None:
    """The energy and emissions of a run, by the keys of ENERGY, or None if nothing was measured.

    They are sums over all machines and starts. The duration is that of the machine that ran
    longest, and NaN if a row has none. The starts of a machine are in `emissions.csv`,
    `emissions_start1.csv` and so on, and in `emissions.csv.bak`, CodeCarbon's copy of a file with
    other columns.

    Raises: UserError if a file is corrupt.
    """
    nodes: dict[str, list[dict[str, float]]] = {}
    for path in sorted(run.glob("emissions*.csv*")):
        if re.search(r"\.csv(_\d+\.bak|\.bak)?$", path.name):
            node = re.sub(r"_start\d+$", "", path.name.partition(".csv")[0])
            nodes.setdefault(node, []).extend(_rows_of(path))
    totals = [
        {key: sum(row[key] for row in rows) for key in ENERGY} for rows in nodes.values() if rows
    ]
    if not totals:
        return None
    used = {key: sum(total[key] for total in totals) for key in ENERGY}
    durations = [total["duration"] for total in totals]
    used["duration"] = math.nan if any(map(math.isnan, durations)) else max(durations)
    return used
