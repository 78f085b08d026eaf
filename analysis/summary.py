"""The report's table of runs: the values of each, what may be compared between them, and the best
of each column."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from analysis import tables
from analysis.compare import compare
from analysis.geometry import spectrum
from analysis.runs import Run, caution, texts_differ
from analysis.tables import Column
from base.errors import UserError
from model import Model
from text.token_files import Data
from training.telemetry import clock, energy, listed, timed


@dataclass(frozen=True)
class Score(Column):
    """A column that may have a best value."""

    best: Callable | None = None
    """min or max"""
    needs: str = ""
    """the field of Agreement that must hold for the best to be marked"""


COLUMNS = (
    Column("head"),
    Column("strength", "exponent n / scale s"),
    Column("iterations", form=","),
    Score("best_val_loss", "best val loss", ".4f", best=min, needs="losses"),
    Score("perplexity", form=",.1f", best=min, needs="losses"),
    Score("bits_per_byte", "bits/byte", ".4f", best=min, needs="bits"),
    Column("difference", "above the best (95 %)"),
    Column("components", "PCs for 90 %"),
    Score("kwh", "kWh", ".3g", best=min, needs="energy"),
    Score("co2", "g CO₂e", ".3g", best=min, needs="energy"),
    Score("tokens_per_s", "tokens/s", ",.0f", best=max, needs="work"),
    Score("minutes", form=".1f", best=min, needs="work"),
)
# The papers' three axes and their measures; less is better.
AXES = {"performance": "bits_per_byte", "interpretability": "components", "sustainability": "kwh"}

# Energy is ranked between runs of at least so many minutes. In a shorter run start-up, compilation
# and evaluation weigh too much.
RANKED_MINUTES = 5.0


@dataclass(frozen=True)
class Agreement:
    """Which values of the runs may be compared."""

    losses: bool
    bits: bool
    """bits per byte"""
    work: bool
    """time and speed, and the energy of runs that are long enough"""
    energy: bool
    """work, and every run is long enough"""
    windows: bool
    """losses of the same windows, one by one"""
    notes: list[str] = field(default_factory=list)
    """why not, in sentences"""


def short(value: float, digits: int = 5) -> float | str:
    """A number as the page's JSON holds it: rounded to some significant digits, or the name of one
    that is not finite."""
    return float(f"{value:.{digits}g}") if math.isfinite(value) else repr(value)


def summarize(run: Run, model: Model, metrics: list[dict]) -> dict:
    """The values of a run: the keys of COLUMNS, `energy` and `last_val_loss`. None where there is
    none."""
    evaluations = [m for m in metrics if "val_loss" in m]
    if not evaluations:
        raise UserError(f"{run.path}/metrics.jsonl has no validation loss yet")
    best = min(evaluations, key=lambda m: (math.isnan(m["val_loss"]), m["val_loss"]))
    trained = [m["iter"] + 1 for m in metrics if "train_loss" in m]
    speeds = sorted(m["tokens_per_s"] for m in metrics if "tokens_per_s" in m)
    used, head = energy(run.path), model.head
    strength = minutes = None
    if not head.is_control:
        strength = f"{'n' if head.is_harmonic else 's'} = {float(head.strength):.4g}"
    if timed(metrics):
        minutes = clock(metrics, run.tokens_per_iteration())[-1][0] / 60
    return {
        "head": head.name + (", softmax link" if head.strength_name == "scale" else ""),
        "strength": strength,
        "iterations": max([m["iter"] for m in evaluations] + trained),
        "best_val_loss": best["val_loss"],
        "perplexity": best.get("perplexity"),
        "bits_per_byte": best.get("bits_per_byte"),
        "difference": None,
        "components": spectrum(head.prototypes())["components_90"],
        "kwh": used and used["energy_consumed"],
        "energy": used,
        "co2": used and 1000 * used["emissions"],
        "tokens_per_s": speeds[len(speeds) // 2] if speeds else None,
        "minutes": minutes,
        "last_val_loss": evaluations[-1]["val_loss"],
    }


def agreement(
    runs: list[Run],
    data: list[Data] | None,
    summaries: list[dict],
    environments: list[dict],
    losses: list[np.ndarray],
) -> Agreement:
    """What may be compared. data: None where it was not found; losses: of each run's windows, those
    of some runs where the others have none."""
    warning = None
    if data:
        warning = caution(runs, data)
    elif len(runs) > 1:
        warning = "The runs' data was not found: nobody checked that losses may be compared"
    blocks = {r.model_config.block_size for r in runs}
    windows = {(r.model_config.block_size, r.config.eval_iters * r.config.batch_size) for r in runs}
    objectives = {r.objective.masked for r in runs}
    machines = {(e.get("device"), e.get("world_size")) for e in environments}
    work = {
        s["iterations"] * run.tokens_per_iteration() for s, run in zip(summaries, runs, strict=True)
    }

    notes = []
    for run, s in zip(runs, summaries, strict=True):
        if not math.isfinite(s["last_val_loss"]):
            notes.append(f"Beware: the last validation loss of {run.name} is {s['last_val_loss']}.")
    if warning:
        notes.append(warning[0].upper() + warning[1:] + ".")
    if len(work) > 1:
        notes.append(
            "The runs have not seen the same number of tokens: more training lowers a loss, and"
            " energy and time are not ranked."
        )
    if len(machines) > 1:
        notes.append("The runs ran on different machines: energy and time are not ranked.")
    if len(windows) > 1:
        notes.append(
            "The runs have different validation windows (block_size, eval_iters or batch_size):"
            " small differences in loss mean nothing."
        )
    same_size = len(blocks) == 1 and len({len(x) for x in losses}) == 1
    same_work = len(work) == len(machines) == 1
    return Agreement(
        losses=warning is None and len(windows) == 1,
        bits=len(objectives) == 1 and (not data or not texts_differ(data)),
        work=same_work,
        energy=same_work and all((s["minutes"] or 0) >= RANKED_MINUTES for s in summaries),
        windows=warning is None and len(losses) == len(runs) and same_size,
        notes=notes,
    )


def summary_table(summaries: list[dict], agree: Agreement) -> dict:
    """The summary as texts, the best of each column marked where its values may be compared."""
    rows = [
        [{"text": "–" if text == "-" else text, "best": False} for text in line]
        for line in tables.cells(summaries, COLUMNS)
    ]
    for i, column in enumerate(COLUMNS):
        if not isinstance(column, Score) or column.best is None:
            continue
        if not getattr(agree, column.needs):
            continue
        values = [s[column.key] for s in summaries]
        finite = [v for v in values if v is not None and math.isfinite(v)]
        if len(values) > 1 and finite:
            best = column.best(finite)
            for row, value in zip(rows, values, strict=True):
                row[i]["best"] = value == best
    return {"columns": [column.title or column.key for column in COLUMNS], "rows": rows}


def paired(summaries: list[dict], losses: list[np.ndarray]) -> dict | None:
    """Puts differences to the best run, on the same windows, into the summaries -> what a picture
    of them needs. None of a single run."""
    if len(losses) < 2:
        return None
    best, found = compare(losses)
    for i, (s, d) in enumerate(zip(summaries, found, strict=True)):
        if i == best:
            s["difference"] = "the best"
            continue
        p = f"p = {d.p:.3f}" if d.p >= 0.001 else "p < 0.001"
        noise = "within noise: " if d.low <= 0 <= d.high else ""
        s["difference"] = f"{noise}{d.mean:.3f} ({d.low:.3f} to {d.high:.3f}), {p}"
    return {
        "best": best,
        "windows": len(losses[0]),
        "rows": [[short(v) for v in (d.mean, d.low, d.high)] for d in found],
    }


def energy_parts(used: dict) -> dict:
    """Wh of the processor, GPUs, memory, and what CodeCarbon's file does not assign."""
    parts = {k: used[f"{k}_energy"] for k in ("cpu", "gpu", "ram")}
    parts["rest"] = max(0.0, used["energy_consumed"] - sum(parts.values()))
    return {k: short(1000 * kwh) for k, kwh in parts.items()}


def radar(summaries: list[dict], agree: Agreement) -> list[dict] | None:
    """The papers' three axes, 0 to 10, 10 the best of this page: best / value. None where they may
    not be compared."""
    if len(summaries) < 2 or not (agree.losses and agree.bits and agree.work):
        return None
    values = [[s[key] for key in AXES.values()] for s in summaries]
    if any(not v or not math.isfinite(v) for line in values for v in line):
        return None
    best = [min(axis) for axis in zip(*values, strict=True)]
    return [
        {
            "axes": list(AXES),
            "values": [short(10 * b / v, 3) for b, v in zip(best, line, strict=True)],
        }
        for line in values
    ]


def one_seed(runs: list[Run]) -> bool:
    """Whether no head, with its link, has runs of two seeds."""
    heads = {(r.model_config.head, r.model_config.link) for r in runs}
    seeds = {(r.model_config.head, r.model_config.link, r.config.seed) for r in runs}
    return len(seeds) == len(heads)


def lead(runs: list[Run], summaries: list[dict], differences: dict | None) -> str:
    """The result in a sentence; none where runs may not be compared. differences: of `paired`."""
    if not any(math.isfinite(s["best_val_loss"]) for s in summaries):
        return "No run has a finite validation loss."
    if len(runs) == 1:
        return (
            f"{runs[0].name} reaches a validation loss of {summaries[0]['best_val_loss']:.3f}"
            " nats/token."
        )
    if differences is None:
        return ""
    best, rows = differences["best"], differences["rows"]
    others = sorted(
        (mean, low, runs[i].name)
        for i, (mean, low, _) in enumerate(rows)
        if i != best and not isinstance(mean, str)
    )
    text = (
        f"{runs[best].name} has the lowest validation loss, {summaries[best]['best_val_loss']:.3f}"
        " nats/token"
    )
    if alike := [name for _, low, name in others if low <= 0]:
        text = f"{text}, but these windows do not tell it apart from {listed(alike, 3)}."
    elif not others:
        text = f"{text}."
    else:
        mean, _, name = others[0]
        text = f"{text}, {mean:.3f} below {name}."
    if one_seed(runs):
        text += " This is one seed of each head; another seed may change the order."
    return text
