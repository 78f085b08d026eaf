"""What a run cost: time, energy by part, emissions, work, and how much of each it took to reach a loss.

    python -m analysis.emissions out/a out/b --target=5.0

Energy and emissions are CodeCarbon's (estimates where a machine has no counters), added up over nodes and starts. FLOPs per token are
calculated (6 per weight that multiplies, and attention; the head as a product whatever its distance) and counted by torch in one forward
and backward pass of the dense head, which counts products only. The target is a validation loss in nats; null takes the highest of the
runs' best ones, which all of them reached. Time and energy to it are interpolated between evaluations.
"""

import sys
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from analysis.runs import AnalysisConfig, Run, about, caution, default_out, find_runs, publish, shown
from model import Model
from training.config import UserError, cli, parse
from training.data import predicted_count
from training.telemetry import energy, read_metrics


@dataclass
class EmissionsConfig(AnalysisConfig):
    """Energy and emissions"""

    target: float | None = None
    """a validation loss in nats a token; null = the highest of the runs' best ones"""


def steps_time(metrics: list[dict]) -> tuple[float, float]:
    """-> (seconds in steps, seconds in all between first step and last, evaluations included). `elapsed_s` begins anew when a run is
    resumed; a step's seconds are its share of its log interval, from tokens_per_s."""
    elapsed, before, steps, last = 0.0, 0.0, 0.0, None
    for m in metrics:
        if "elapsed_s" not in m:
            continue
        now = float(m["elapsed_s"])
        elapsed += now - before if now >= before else now
        before = now
        steps += 1 / float(m["tokens_per_s"])
        last = m
    return (steps, elapsed) if last else (0.0, 0.0)


def evaluations(metrics: list[dict]) -> list[tuple[float, float]]:
    """(seconds since the first step, validation loss) of each evaluation."""
    found, elapsed, before = [], 0.0, 0.0
    for m in metrics:
        if "elapsed_s" in m:
            now = float(m["elapsed_s"])
            elapsed += now - before if now >= before else now
            before = now
        if "val_loss" in m:
            found.append((elapsed, float(m["val_loss"])))
    return found


def time_to(target: float, points: list[tuple[float, float]]) -> float | None:
    """Seconds until the loss first reaches the target, linear between evaluations; None where it never does."""
    for (t0, a), (t1, b) in zip([points[0], *points], points, strict=False):
        if b <= target:
            return t1 if a <= target or a == b else t0 + (t1 - t0) * (a - target) / (a - b)
    return None


def counted_flops(run: Run) -> float:
    """FLOPs of a token, forward and backward, by torch's counter on a small batch with the dense head."""
    c = run.model_config
    model = Model(c)
    model.head.impl = "dense"
    x = torch.randint(min(c.real_vocab_size, 1000), (1, c.block_size))
    y = x.clone()
    y[:, predicted_count(c.arch, c.block_size) :] = -1
    with FlopCounterMode(display=False) as counter:
        model(x, y)[1].backward()
    return counter.get_total_flops() / x.numel()


def measure(run: Run, target: float) -> dict:
    metrics, used = read_metrics(run.path), energy(run.path)
    tokens = run.tokens_per_iteration() * sum("train_loss" in m for m in metrics)
    steps, elapsed = steps_time(metrics)
    steps *= run.tokens_per_iteration()
    c, kwh = run.model_config, used and used["energy_consumed"]
    with torch.device("meta"):
        calculated = Model(c).flops_per_token(predicted_count(c.arch, c.block_size) / c.block_size)
    reached = time_to(target, evaluations(metrics))
    return {
        **about(run),
        "minutes": elapsed / 60,
        "evaluation": 1 - steps / elapsed if elapsed else None,
        "start_up": 1 - elapsed / used["duration"] if used and used["duration"] else None,
        "kwh": kwh,
        "kwh_cpu": used and used["cpu_energy"],
        "kwh_gpu": used and used["gpu_energy"],
        "kwh_ram": used and used["ram_energy"],
        "kg_co2e": used and used["emissions"],
        "joules_per_token": kwh * 3.6e6 / tokens if used and tokens else None,
        "mflop_per_token": calculated / 1e6,
        "mflop_counted": counted_flops(run) / 1e6,
        "target": target,
        "minutes_to_target": None if reached is None else reached / 60,
        "kwh_to_target": kwh * reached / elapsed if used and reached is not None and elapsed else None,
    }


def draw(runs, rows, figure):
    """Validation loss over time, and energy by part."""
    figure.set_size_inches(10, 3.6)
    left, right = figure.subplots(1, 2)
    for run in runs:
        points = evaluations(read_metrics(run.path))
        left.plot([t / 60 for t, _ in points], [v for _, v in points], marker=".", label=run.name)
    left.axhline(rows[0]["target"], color="0.6", linewidth=0.8, linestyle="--")
    left.set_xlabel("minutes")
    left.set_title("validation loss, nats a token; dashed: the target", loc="left", fontsize=10)
    left.legend(fontsize=8, frameon=False)
    base = [0.0] * len(rows)
    for part, color in (("kwh_cpu", "#0072b2"), ("kwh_gpu", "#009e73"), ("kwh_ram", "#e69f00")):
        values = [1000 * (r[part] or 0) for r in rows]
        right.barh([r["run"] for r in rows], values, left=base, color=color, label=part.removeprefix("kwh_").upper(), height=0.6)
        base = [a + b for a, b in zip(base, values, strict=True)]
    right.set_title("energy, Wh", loc="left", fontsize=10)
    right.invert_yaxis()
    right.legend(fontsize=8, frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)


FORMATS = dict.fromkeys(("kwh", "kwh_cpu", "kwh_gpu", "kwh_ram", "kg_co2e", "kwh_to_target", "joules_per_token"), ".3g")
FORMATS |= dict(minutes=".1f", minutes_to_target=".1f", evaluation=".1%", start_up=".1%", mflop_per_token=".1f", mflop_counted=".1f")


def main():
    (c,) = parse(sys.argv[1:], EmissionsConfig, words="runs")
    runs = find_runs(c.runs)
    out = default_out(c, runs, "emissions")
    if warning := caution(runs, [run.data() for run in runs]):
        print(f"note: {warning}", file=sys.stderr)
    losses = [[v for _, v in evaluations(read_metrics(run.path))] for run in runs]
    if lost := [run.name for run, found in zip(runs, losses, strict=True) if not found]:
        raise UserError(f"no evaluation in the metrics of {', '.join(lost)}")
    target = max(min(found) for found in losses) if c.target is None else c.target
    rows = [measure(run, target) for run in runs]
    print(shown(rows, FORMATS, left_out=("target",)))
    print(f"target: {target:.4f} nats a token")
    publish(rows, out, lambda figure: draw(runs, rows, figure))


if __name__ == "__main__":
    cli(main)
