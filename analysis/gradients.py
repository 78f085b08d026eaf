"""How steady training was: gradient norms of head and trunk, loss spikes, and the growth of the
prototypes.

    python -m analysis.gradients out/a out/b

The papers on these heads (arXiv 2502.01628, 2603.10225) do not define "gradient stability". These
are the measures here, over all steps but the first tenth. Norms are those before clipping.

steps         steps whose norm is finite, the first tenth included
not_finite    the other steps, such as skipped ones. The printed table has it if there are any
mean          mean of the gradient norms
cv            coefficient of variation: standard deviation divided by mean
spike_rate    share of steps whose norm is above 3 times the median of the 50 steps before
clip_rate     share of steps whose norm is above grad_clip
loss_spikes   share of steps whose loss is 3 robust standard deviations above the median of the 50
              steps before
radius_start  mean norm of the prototypes at the first step
radius_end    mean norm of the prototypes at the last step
growth        the exponent a in `mean |w| ~ iterations^a`, fitted to the second half of the run. It
              is 0 if the prototypes have stopped growing
"""

import math
import sys
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from analysis import figures, tables
from analysis.runs import AnalysisConfig, Run, about, default_out, find_runs, head_styles, publish
from analysis.tables import Column
from base.command_line import cli, parse
from base.errors import UserError
from training.metrics import read_metrics

# A spike is above SPIKE times the median of the WINDOW steps before. SKIP is the share of steps at
# the start that are left out.
SPIKE, WINDOW, SKIP = 3.0, 50, 0.1
PARTS = {"all": "grad_norm", "head": "grad_norm_head", "trunk": "grad_norm_trunk"}


@dataclass
class GradientsConfig(AnalysisConfig):
    """Gradient norms"""


def series(metrics: list[dict], key: str) -> np.ndarray:
    """The finite values of a key over the steps that have it. `not_finite` counts the others."""
    return np.array([m[key] for m in metrics if key in m and math.isfinite(m[key])], dtype=float)


def not_finite(metrics: list[dict], key: str) -> int:
    """How many steps have a value of a key that is not finite, such as skipped ones."""
    return sum(key in m and not math.isfinite(m[key]) for m in metrics)


def medians_before(values: np.ndarray) -> np.ndarray:
    """The median of the WINDOW values before each value: (N,) -> (N,). The first is infinite."""
    first = [np.median(values[:i]) if i else math.inf for i in range(min(WINDOW, len(values)))]
    rest = (
        np.median(np.lib.stride_tricks.sliding_window_view(values, WINDOW)[:-1], axis=1)
        if len(values) > WINDOW
        else []
    )
    return np.array([*first, *rest])


def stability(metrics: list[dict], clip: float = 1.0, key: str = "grad_norm") -> dict:
    """The mean, cv, spike_rate and clip_rate of a run's finite gradient norms. NaN if it has none,
    and cv is NaN if it has one.

    Args:
        metrics: from `read_metrics`.
        clip: the run's grad_clip; 0 = no clipping.
        key: grad_norm, grad_norm_head or grad_norm_trunk.
    """
    norms = series(metrics, key)
    start = int(len(norms) * SKIP)
    medians, norms = medians_before(norms)[start:], norms[start:]
    if not len(norms):
        return dict.fromkeys(("mean", "cv", "spike_rate", "clip_rate"), math.nan)
    mean = float(norms.mean())
    return {
        "mean": mean,
        "cv": float(norms.std() / mean) if mean and len(norms) > 1 else math.nan,
        "spike_rate": float((norms > SPIKE * medians).mean()),
        "clip_rate": float((norms > clip).mean()) if clip else 0.0,
    }


def loss_spikes(metrics: list[dict]) -> float:
    """The share of steps whose training loss is far above the median of the steps before."""
    losses = series(metrics, "train_loss")
    above = losses - medians_before(losses)
    start = max(1, int(len(losses) * SKIP))  # No step comes before the first one.
    rest = above[start:]
    if not len(rest):
        return math.nan
    # 1.4826 times the median deviation estimates a standard deviation, whatever the outliers.
    deviation = 1.4826 * np.median(np.abs(rest - np.median(rest)))
    return float((rest > SPIKE * deviation).mean())


def growth(metrics: list[dict]) -> dict:
    """radius_start, radius_end and growth of a run; None if it did not record the radius."""
    radius = series(metrics, "prototype_radius")
    if not len(radius):
        return dict.fromkeys(("radius_start", "radius_end", "growth"))
    half = np.arange(len(radius)) >= max(1, len(radius) // 2)
    exponent = math.nan
    if half.sum() > 2 and (radius[half] > 0).all():
        exponent = float(
            np.polyfit(np.log(np.arange(len(radius))[half]), np.log(radius[half]), 1)[0]
        )
    return {"radius_start": float(radius[0]), "radius_end": float(radius[-1]), "growth": exponent}


def measure(run: Run) -> list[dict]:
    """The rows of a run: all parameters, those of the head, and those of the trunk.

    A value is None if metrics.jsonl does not have it. Raises: UserError for a run without steps.
    """
    metrics = read_metrics(run.path)
    if not any("train_loss" in m or "grad_norm" in m for m in metrics):
        raise UserError(f"{run.path}/metrics.jsonl has no steps: train the run first")
    rows = []
    for part, key in PARTS.items():
        count = len(series(metrics, key))
        found = stability(metrics, run.config.grad_clip, key)
        row = {
            **about(run),
            "part": part,
            "steps": count,
            "not_finite": not_finite(metrics, key),
            **found,
        }
        if part != "all":  # Clipping looks at the norm of all gradients.
            row["clip_rate"] = None
        row |= dict.fromkeys(("loss_spikes", "radius_start", "radius_end", "growth"))
        if part == "all":
            row |= {"loss_spikes": loss_spikes(metrics), **growth(metrics)}
        # Values are of finite steps, so NaN is no sign of one that diverged: there are too few.
        few = [key for key, value in row.items() if isinstance(value, float) and math.isnan(value)]
        rows.append(row | dict.fromkeys(few))
    return rows


def smooth(steps: np.ndarray, values: np.ndarray) -> dict[str, np.ndarray]:
    """Cuts a curve, with (N,) steps and values, into at most 200 pieces.

    Returns: arrays with a number for each piece: its mean `step`, its `median`, and the 10 % and
        90 % quantiles `low` and `high`.
    """
    pieces = np.array_split(np.arange(len(values)), min(200, len(values)))
    low, median, high = np.array([np.quantile(values[p], (0.1, 0.5, 0.9)) for p in pieces]).T
    return {
        "step": np.array([steps[p].mean() for p in pieces]),
        "low": low,
        "median": median,
        "high": high,
    }


def draw(runs: list[Run]) -> Figure:
    """Panels of the gradient norms of head and trunk, and of the mean norm of prototypes."""
    figure = figures.figure(3.1)
    titles = {
        "grad_norm_head": "gradient norm of the head",
        "grad_norm_trunk": "gradient norm of the trunk",
        "prototype_radius": "mean norm of the prototypes",
    }
    metrics = [read_metrics(run.path) for run in runs]
    panels = figure.subplots(1, 3)
    for axes, (key, title) in zip(panels, titles.items(), strict=True):
        for run, lines, style in zip(runs, metrics, head_styles(runs), strict=True):
            values = series(lines, key)
            if not len(values):
                continue
            finite = [m["iter"] for m in lines if key in m and math.isfinite(m[key])]
            curve = smooth(np.array(finite), values)
            name, alone = figures.literal(run.name), "." if len(values) == 1 else ""
            axes.plot(curve["step"], curve["median"], label=name, marker=alone, **style)
            axes.fill_between(
                curve["step"], curve["low"], curve["high"], color=style["color"], alpha=0.2, lw=0
            )
        axes.set_yscale("log")
        axes.set_xlabel("iteration")
        axes.set_ylabel(title)
    figures.legend_below(figure, panels)
    return figure


COLUMNS = (
    "run",
    "head",
    "link",
    "part",
    "steps",
    "not_finite",
    Column("mean", form=".3g"),
    Column("cv", form=".3f"),
    Column("spike_rate", form=".2%"),
    Column("clip_rate", form=".1%"),
    Column("loss_spikes", form=".2%"),
    Column("radius_start", form=".3g"),
    Column("radius_end", form=".3g"),
    Column("growth", form=".3f"),
)


def main() -> None:
    (c,) = parse(sys.argv[1:], GradientsConfig, words="runs")
    runs = find_runs(c.runs, weights=False, dataset=c.dataset)
    out = default_out(c, runs, "gradients")
    rows = [row for run in runs for row in measure(run)]
    whole = not any(row["not_finite"] for row in rows)
    print(tables.text(rows, [c for c in COLUMNS if not (whole and c == "not_finite")]))
    publish(rows, out, lambda: draw(runs))


if __name__ == "__main__":
    cli(main)
