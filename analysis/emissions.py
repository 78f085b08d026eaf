"""What a run cost: its time, its energy by part, its emissions, its operations, and the time and
energy until it reached a loss.

    python -m analysis.emissions out/a out/b --target=5.0

Energy and emissions come from CodeCarbon, summed over machines and starts. Without power counters
they are estimates. steps, evaluation and start_end (start-up, and what follows the last step) are
shares of the run's time. Energy is taken to be spent evenly over that time. Joules per token, and
time and energy to the target, count steps only.

FLOPs per token, forward and backward, are calculated (6 for each weight that multiplies, plus
attention) and counted by torch. Both count the head as one matrix product for every distance.

The target is a validation loss in nats a token, or in bits per byte if the runs have different
tokenizers. By default it is the highest of the runs' best losses, which all runs reached. If a run
reached it between two evaluations, the time is interpolated.
"""

import math
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from analysis import figures, tables
from analysis.runs import (
    AnalysisConfig,
    Run,
    about,
    caution,
    default_out,
    energy_of,
    find_runs,
    head_styles,
    lossy,
    note,
    publish,
    unequal_windows,
)
from analysis.tables import Column
from base.command_line import cli, parse
from base.errors import UserError
from model import Model, ModelConfig
from training.environment import evaluated_alike_since, kept_starts
from training.metrics import clock, read_metrics, timed
from training.objective import objective_of

UNITS = {"val_loss": "nats a token", "bits_per_byte": "bits a byte"}


@dataclass
class EmissionsConfig(AnalysisConfig):
    """Energy and emissions"""

    target: float | None = None
    """the validation loss to reach, in nats a token (bits per byte if tokenizers differ); null =
    the highest of the runs' best losses"""


def evaluations(run: Run, metrics: list[dict], key: str) -> list[tuple[float, float]]:
    """(seconds in steps before it, loss) of each evaluation.

    It is empty if the run did not record the times of its steps. key: val_loss or bits_per_byte.
    """
    if not timed(metrics):
        return []
    times = clock(run.path, metrics, run.tokens_per_iteration())
    alike = comparable(run, metrics)
    return [
        (steps, m[key])
        for m, (_, steps) in zip(metrics, times, strict=True)
        if key in m and m in alike
    ]


def comparable(run: Run, metrics: list[dict]) -> list[dict]:
    """The evaluations on the windows of the last one. A resume may have changed the windows."""
    since = evaluated_alike_since(kept_starts(run.path))
    found = [m for m in metrics if "val_loss" in m]
    return [m for m in found if m["iter"] > since] or found


def changed_windows(run: Run, metrics: list[dict]) -> str | None:
    """A sentence if only a part of a run's evaluations are `comparable`, else None."""
    if len(comparable(run, metrics)) == sum("val_loss" in m for m in metrics):
        return None
    return (
        f"a resume of {run.name} changed its validation windows: its earlier losses do not count,"
        " so it may reach the target too late here"
    )


def time_to(target: float, points: list[tuple[float, float]]) -> float | None:
    """Seconds until the loss first reaches the target. None if it never does.

    points: from `evaluations`. Between two of them the loss is interpolated linearly.
    """
    for (t0, a), (t1, b) in zip([*points[:1], *points], points, strict=False):
        if b <= target:
            if a <= target or not math.isfinite(a):
                return t1
            return t0 + (t1 - t0) * (a - target) / (a - b)
    return None


def counted_flops(c: ModelConfig) -> float:
    """FLOPs per token, forward and backward, as torch counts them.

    They are those of the trunk, and of one matrix product of the head's states and prototypes.
    """
    predicted = objective_of(c.arch).predicted(c.block_size)
    # The counter does not know the fused attention kernel of a CPU.
    attention = sdpa_kernel(SDPBackend.MATH)
    with torch.device("meta"), FlopCounterMode(display=False) as counter, attention:
        model = Model(c)
        states = model.hidden(torch.zeros(1, c.block_size, dtype=torch.long))[:, :predicted]
        torch.nn.functional.linear(states, model.head.weight).sum().backward()
    return counter.get_total_flops() / c.block_size


def times(
    run: Run, metrics: list[dict], used: dict | None
) -> tuple[float | None, float | None, float | None]:
    """Seconds of the whole run, of its steps and evaluations, and of its steps only.

    used: from `training.emissions.energy`, or None. Returns: None for what was not recorded.
    """
    elapsed = steps = None
    if timed(metrics):
        elapsed, steps = clock(run.path, metrics, run.tokens_per_iteration())[-1]
    whole = elapsed
    if used is not None and math.isfinite(used["duration"]):
        whole = used["duration"]
    return whole, elapsed, steps


def share(part: float | None, whole: float | None) -> float | None:
    """part / whole. None if one of them is not known, or the whole is 0."""
    return part / whole if part is not None and whole else None


def measure(run: Run, metrics: list[dict], key: str | None, target: float | None) -> dict:
    """The row of a run, with the keys of COLUMNS.

    key: the loss that is to reach the target, val_loss or bits_per_byte; None if losses cannot be
        compared.
    """
    used, c = energy_of(run, metrics), run.model_config
    tokens = run.tokens_per_iteration() * sum("train_loss" in m for m in metrics)
    whole, elapsed, steps = times(run, metrics, used)
    spent: dict[str, float] = used or {}
    kwh = spent.get("energy_consumed")
    rate = share(kwh, whole)  # in kWh per second
    with torch.device("meta"):
        predicted = run.objective.predicted(c.block_size) / c.block_size
        calculated = Model(c).flops_per_token(predicted)
    reached = between = outside = joules = None
    if key is not None and target is not None:
        reached = time_to(target, evaluations(run, metrics, key))
    if rate is not None and steps is not None and tokens:
        joules = rate * steps * 3.6e6 / tokens
    if elapsed is not None and steps is not None:
        between = elapsed - steps
    if used and whole is not None and elapsed is not None:
        outside = whole - elapsed
    return {
        **about(run),
        "minutes": None if whole is None else whole / 60,
        "steps": share(steps, whole),
        "evaluation": share(between, whole),
        "start_end": share(outside, whole),
        "kwh": kwh,
        "kwh_cpu": spent.get("cpu_energy"),
        "kwh_gpu": spent.get("gpu_energy"),
        "kwh_ram": spent.get("ram_energy"),
        "kg_co2e": spent.get("emissions"),
        "joules_per_token": joules,
        "mflop_per_token": calculated / 1e6,
        "mflop_counted": counted_flops(c) / 1e6,
        "target": target,
        "minutes_to_target": None if reached is None else reached / 60,
        "kwh_to_target": rate * reached if rate is not None and reached is not None else None,
    }


def draw(runs: list[Run], metrics: list[list[dict]], rows: list[dict], key: str) -> Figure:
    """Two panels: the validation loss over the time in steps, and the energy by part."""
    figure = figures.figure(3.0)
    left, right = figure.subplots(1, 2)
    for run, lines, style in zip(runs, metrics, head_styles(runs), strict=True):
        points = evaluations(run, lines, key)
        minutes, losses = [t / 60 for t, _ in points], [loss for _, loss in points]
        left.plot(minutes, losses, marker=".", label=figures.literal(run.name), **style)
    if rows[0]["target"] is not None:
        line: dict[str, Any] = dict(color=figures.GREY, linewidth=1, linestyle=":")
        left.axhline(rows[0]["target"], label="target", **line)
    left.set_xlabel("time in training steps, minutes")
    left.set_ylabel(f"validation loss, {UNITS[key]}")
    names, base = [figures.literal(r["run"]) for r in rows], np.zeros(len(rows))
    # Colours are for heads, so parts are greys.
    for part, color in (("cpu", "0.3"), ("gpu", "0.55"), ("ram", "0.8")):
        watt_hours = np.array([1000 * (r[f"kwh_{part}"] or 0) for r in rows])
        right.barh(names, watt_hours, left=base, color=color, label=part.upper(), height=0.6)
        base += watt_hours
    # CodeCarbon assigns some of the energy to no part.
    rest = np.maximum(0, np.array([1000 * (r["kwh"] or 0) for r in rows]) - base)
    if (rest > 0.01 * base).any():
        right.barh(names, rest, left=base, color="0.92", label="rest", height=0.6)
    for i, row in enumerate(rows):
        if row["kwh"] is None:
            right.text(0, i, " not measured", va="center")
    right.set_xlabel("energy, Wh")
    right.locator_params(axis="x", nbins=4)
    right.invert_yaxis()
    figures.legend_below(figure, [left, right])
    return figure


COLUMNS = (
    "run",
    "head",
    "link",
    Column("minutes", form=".1f"),
    Column("steps", form=".1%"),
    Column("evaluation", form=".1%"),
    Column("start_end", form=".1%"),
    Column("kwh", form=".3g"),
    Column("kwh_cpu", form=".3g"),
    Column("kwh_gpu", form=".3g"),
    Column("kwh_ram", form=".3g"),
    Column("kg_co2e", form=".3g"),
    Column("joules_per_token", form=".3g"),
    Column("mflop_per_token", form=".1f"),
    Column("mflop_counted", form=".1f"),
    Column("minutes_to_target", form=".2f"),
    Column("kwh_to_target", form=".3g"),
)


def target_of(runs: list[Run], metrics: list[list[dict]], key: str) -> float:
    """The highest of the runs' lowest losses.

    Runs whose loss never fell are left out, with a note on stderr. UserError if none is left.
    """
    losses = [[m[key] for m in ms if key in m] for ms in metrics]
    lowest = [
        min(
            (m[key] for m in comparable(run, ms) if math.isfinite(m.get(key, math.nan))),
            default=math.inf,
        )
        for run, ms in zip(runs, metrics, strict=True)
    ]
    learnt = [low for low, values in zip(lowest, losses, strict=True) if values and low < values[0]]
    for run, low, values in zip(runs, lowest, losses, strict=True):
        if not values or not low < values[0]:
            print(
                f"note: {run.name}"
                f" {'never fell below its first loss' if values else 'has no evaluation'}, so it"
                " does not count for the target",
                file=sys.stderr,
            )
    if not learnt:
        raise UserError(
            "no run's validation loss ever fell, so there is no default target: name one, such as"
            " --target=5.0"
        )
    return max(learnt)


def main() -> None:
    (c,) = parse(sys.argv[1:], EmissionsConfig, words="runs")
    runs = find_runs(c.runs, weights=False, dataset=c.dataset)
    out = default_out(c, runs, "emissions")
    metrics = [read_metrics(run.path) for run in runs]
    key: str | None = "val_loss"
    lost: list[str] = []
    try:
        # The losses of a single run need no comparison, so its data may be missing.
        data = [run.data() for run in runs] if len(runs) > 1 else []
        warning, lost = (caution(runs, data), lossy(data)) if data else (None, [])
    except UserError as error:
        data = []
        warning = f"{error}; so it was not checked whether the losses can be compared"
    note(warning)
    note(unequal_windows(runs))
    for run, ms in zip(runs, metrics, strict=True):
        note(changed_windows(run, ms))
    if warning:
        everywhere = all(any("bits_per_byte" in m for m in ms) for ms in metrics)
        # Without the data it is unknown whether bits per byte are of the same text.
        key = "bits_per_byte" if everywhere and data and not lost else None
    target = c.target if key is not None else None
    if key is not None and target is None:
        target = target_of(runs, metrics, key)
    rows = [measure(run, ms, key, target) for run, ms in zip(runs, metrics, strict=True)]
    print(tables.text(rows, COLUMNS))
    if key:
        print(f"target: {target:.4f} {UNITS[key]}")
    else:
        print("no target: the losses of these runs cannot be compared")
    publish(rows, out, lambda: draw(runs, metrics, rows, key or "val_loss"))


if __name__ == "__main__":
    cli(main)
