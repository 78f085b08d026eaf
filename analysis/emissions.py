"""What a run cost: time, energy by part, emissions, work, and how much of each it took to reach a
loss.

    python -m analysis.emissions out/a out/b --target=5.0

Energy and emissions are CodeCarbon's (estimates where a machine has no counters), added up over
nodes and starts. Steps, evaluations and the rest (start-up, and what follows the last step) are
given as shares of the run's time; energy is taken to be spent evenly over it. Joules per token, and
time and energy to the target, are those of steps alone. FLOPs per token are calculated (6 per
weight that multiplies, and attention) and counted by torch, forward and backward; both take the
head as one product whatever its distance. The target is a validation loss in nats a token, in bits
per byte where the runs' tokenizers differ; null takes the highest of the runs' best ones, which all
of them reached. Where it lies between evaluations it is interpolated.
"""

import math
import sys
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from analysis.runs import (
    AnalysisConfig,
    Run,
    about,
    caution,
    default_out,
    find_runs,
    publish,
    shown,
)
from base.command_line import cli, parse
from base.errors import UserError
from model import Model, ModelConfig
from training.objective import objective_of
from training.telemetry import clock, energy, read_metrics, timed

UNITS = {"val_loss": "nats a token", "bits_per_byte": "bits a byte"}


@dataclass
class EmissionsConfig(AnalysisConfig):
    """Energy and emissions"""

    target: float | None = None
    """a validation loss in nats a token (bits a byte where tokenizers differ); null = the highest
    of the runs' best ones"""


def evaluations(run: Run, metrics: list[dict], key: str) -> list[tuple[float, float]]:
    """(seconds in steps before it, loss) of each evaluation; none where the run does not say how
    long its steps took."""
    if not timed(metrics):
        return []
    return [
        (steps, m[key])
        for m, (_, steps) in zip(metrics, clock(metrics, run.tokens_per_iteration()), strict=True)
        if key in m
    ]


def time_to(target: float, points: list[tuple[float, float]]) -> float | None:
    """Seconds until the loss first reaches the target, linear between evaluations; None where it
    never does."""
    for (t0, a), (t1, b) in zip([*points[:1], *points], points, strict=False):
        if b <= target:
            return t1 if a <= target or a == b else t0 + (t1 - t0) * (a - target) / (a - b)
    return None


def counted_flops(c: ModelConfig) -> float:
    """FLOPs of a token, forward and backward, by torch's counter: the trunk, and one product of the
    head's states and prototypes."""
    predicted = objective_of(c.arch).predicted(c.block_size)
    with (
        torch.device("meta"),
        FlopCounterMode(display=False) as counter,
        sdpa_kernel(SDPBackend.MATH),
    ):  # it knows no CPU's fused attention
        model = Model(c)
        states = model.hidden(torch.zeros(1, c.block_size, dtype=torch.long))[:, :predicted]
        torch.nn.functional.linear(states, model.head.weight).sum().backward()
    return counter.get_total_flops() / c.block_size


def times(
    run: Run, metrics: list[dict], used: dict | None
) -> tuple[float | None, float | None, float | None]:
    """Seconds of the whole run, of its steps with evaluations, and of its steps alone; None for
    what was not recorded."""
    elapsed, steps = (
        clock(metrics, run.tokens_per_iteration())[-1] if timed(metrics) else (None, None)
    )
    measured = used is not None and math.isfinite(used["duration"])
    return (used["duration"] if measured else elapsed), elapsed, steps


def share(part: float | None, whole: float | None) -> float | None:
    """part / whole, None where one is not known."""
    return part / whole if part is not None and whole else None


def measure(run: Run, metrics: list[dict], key: str | None, target: float | None) -> dict:
    used, c = energy(run.path), run.model_config
    tokens = run.tokens_per_iteration() * sum("train_loss" in m for m in metrics)
    whole, elapsed, steps = times(run, metrics, used)
    kwh = used and used["energy_consumed"]
    rate = share(kwh, whole)  # kWh a second
    with torch.device("meta"):
        predicted = run.objective.predicted(c.block_size) / c.block_size
        calculated = Model(c).flops_per_token(predicted)
    reached = time_to(target, evaluations(run, metrics, key)) if key else None
    between = elapsed - steps if steps is not None else None
    outside = whole - elapsed if used and elapsed is not None else None
    return {
        **about(run),
        "minutes": None if whole is None else whole / 60,
        "steps": share(steps, whole),
        "evaluation": share(between, whole),
        "start_end": share(outside, whole),
        "kwh": kwh,
        "kwh_cpu": used and used["cpu_energy"],
        "kwh_gpu": used and used["gpu_energy"],
        "kwh_ram": used and used["ram_energy"],
        "kg_co2e": used and used["emissions"],
        "joules_per_token": rate * steps * 3.6e6 / tokens
        if rate is not None and steps is not None and tokens
        else None,
        "mflop_per_token": calculated / 1e6,
        "mflop_counted": counted_flops(c) / 1e6,
        "target": target,
        "minutes_to_target": None if reached is None else reached / 60,
        "kwh_to_target": rate * reached if rate is not None and reached is not None else None,
    }


def draw(runs, metrics, rows, key, figure):
    """Validation loss over the time in steps, and energy by part."""
    figure.set_size_inches(10, 3.6)
    left, right = figure.subplots(1, 2)
    for run, ms in zip(runs, metrics, strict=True):
        points = evaluations(run, ms, key)
        left.plot([t / 60 for t, _ in points], [v for _, v in points], marker=".", label=run.name)
    if rows[0]["target"] is not None:
        left.axhline(rows[0]["target"], color="0.6", linewidth=0.8, linestyle="--")
    left.set_xlabel("minutes in steps")
    left.set_title(f"validation loss, {UNITS[key]}; dashed: the target", loc="left", fontsize=10)
    left.legend(fontsize=8, frameon=False)
    base = [0.0] * len(rows)
    for part, color in (("kwh_cpu", "#0072b2"), ("kwh_gpu", "#009e73"), ("kwh_ram", "#e69f00")):
        values = [1000 * (r[part] or 0) for r in rows]
        right.barh(
            [r["run"] for r in rows],
            values,
            left=base,
            color=color,
            label=part.removeprefix("kwh_").upper(),
            height=0.6,
        )
        base = [a + b for a, b in zip(base, values, strict=True)]
    right.set_title("energy, Wh", loc="left", fontsize=10)
    right.invert_yaxis()
    right.legend(fontsize=8, frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)


FORMATS = dict.fromkeys(
    ("kwh", "kwh_cpu", "kwh_gpu", "kwh_ram", "kg_co2e", "kwh_to_target", "joules_per_token"), ".3g"
)
FORMATS |= dict(
    minutes=".1f",
    minutes_to_target=".2f",
    steps=".1%",
    evaluation=".1%",
    start_end=".1%",
    mflop_per_token=".1f",
    mflop_counted=".1f",
)


def target_of(runs: list[Run], metrics: list[list[dict]], key: str) -> float:
    """The highest of the runs' lowest losses, of those that fell below where they began; UserError
    where none did."""
    losses = [[m[key] for m in ms if key in m] for ms in metrics]
    lowest = [min((v for v in values if math.isfinite(v)), default=math.inf) for values in losses]
    learnt = [low for low, values in zip(lowest, losses, strict=True) if values and low < values[0]]
    for run, low, values in zip(runs, lowest, losses, strict=True):
        if not values or not low < values[0]:
            print(
                f"note: {run.name}"
                f" {'never fell below its first loss' if values else 'has no evaluation'}: no"
                " target",
                file=sys.stderr,
            )
    if not learnt:
        raise UserError(
            "no run's validation loss ever fell: there is no loss to reach, name one: --target=5.0"
        )
    return max(learnt)


def main():
    (c,) = parse(sys.argv[1:], EmissionsConfig, words="runs")
    runs = find_runs(c.runs, weights=False, dataset=c.dataset)
    out = default_out(c, runs, "emissions")
    metrics, key = [read_metrics(run.path) for run in runs], "val_loss"
    try:
        warning = caution(runs, [run.data() for run in runs]) if len(runs) > 1 else None
    except UserError as error:
        warning = f"{error}; nobody checked that the losses may be compared"
    if warning:
        print(f"note: {warning}", file=sys.stderr)
        key = (
            "bits_per_byte"
            if all(any("bits_per_byte" in m for m in ms) for ms in metrics)
            else None
        )
    target = (
        None if key is None else c.target if c.target is not None else target_of(runs, metrics, key)
    )
    rows = [measure(run, ms, key, target) for run, ms in zip(runs, metrics, strict=True)]
    print(shown(rows, FORMATS, left_out=("target",)))
    print(
        f"target: {target:.4f} {UNITS[key]}" if key else "no target: the losses may not be compared"
    )
    publish(rows, out, lambda figure: draw(runs, metrics, rows, key or "val_loss", figure))


if __name__ == "__main__":
    cli(main)
