"""The report's table of runs: the values of each run, which of them can be compared, and the best
of each column."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from analysis import tables
from analysis.compare import Difference, compare, groups, in_words
from analysis.geometry import spectrum
from analysis.intervals import shown_p
from analysis.runs import (
    Run,
    caution,
    changed,
    energy_of,
    seeds,
    unequal_settings,
    unequal_training,
    unequal_windows,
    uneven,
)
from analysis.tables import Column
from base.errors import UserError
from base.output import listed
from harmonic import HEADS
from model import Model
from text.token_files import Data, other_kind
from training.environment import evaluated_alike_since, kept_starts
from training.metrics import clock, timed


@dataclass(frozen=True)
class Score(Column):
    """A column whose best value is marked."""

    best: Callable | None = None
    """min or max: which value is the best"""
    needs: str = ""
    """the field of Agreement that must be true; else no value is marked"""


COLUMNS = (
    Column("head"),
    Column("strength", "exponent n / scale s"),
    Column("iterations", form=","),
    Score("best_val_loss", "best val loss", ".4f", best=min, needs="losses"),
    Score("perplexity", form=",.1f", best=min, needs="losses"),
    Score("bits_per_byte", "bits/byte", ".4f", best=min, needs="losses"),
    Column("difference", "above the best on this text (95 %)"),
    Column("components", "PCs for 90 %"),
    Score("kwh", "kWh", ".3g", best=min, needs="energy"),
    Score("co2", "g CO₂e", ".3g", best=min, needs="energy"),
    Score("tokens_per_s", "tokens/s", ",.0f", best=max, needs="work"),
    Score("minutes", form=".1f", best=min, needs="work"),
)
# The three axes of the papers and the measure of each. Less is better.
AXES = {"performance": "bits_per_byte", "interpretability": "components", "sustainability": "kwh"}

# Energy is ranked only if all runs took at least so many minutes. In a shorter run much of it goes
# to start-up, compilation and evaluation. The same holds for time, but for far shorter runs.
RANKED_MINUTES, TIMED_MINUTES = 5.0, 0.2
# In runs on a quiet machine, the speed at the 90th percentile is 1.05 to 1.2 times that at the
# 10th, and beside other programs 1.3 to 5 times.
STEADY = 1.25


@dataclass(frozen=True)
class Agreement:
    """Which values of the runs can be compared."""

    losses: bool
    """losses, in nats per token and bits per byte"""
    work: bool
    """time and speed: the runs did the same work on the same machine"""
    energy: bool
    """energy: as `work`, and every run is long enough"""
    windows: bool
    """losses of the same windows, one by one"""
    unequal: str | None = None
    """why the runs cannot be ranked: a sentence if they trained on different numbers of tokens"""
    notes: list[str] = field(default_factory=list)
    """sentences on what the runs do not show, and why"""


def short(value: float, digits: int = 5) -> float | str:
    """A number for the page's JSON, rounded to `digits` significant digits.

    JSON has no NaN and infinity, so these become texts such as "nan".
    """
    return float(f"{value:.{digits}g}") if math.isfinite(value) else repr(value)


def summarize(run: Run, model: Model, metrics: list[dict]) -> dict:
    """The values of a run: the keys of COLUMNS, `energy`, `diverged`, and `speed_spread`, the 90th
    percentile of its speed divided by the 10th. `diverged` names a last loss that is not finite.

    A value is None if the run does not have it. metrics: from `read_metrics`.
    Raises: UserError if the run has no evaluation.
    """
    evaluations = [m for m in metrics if "val_loss" in m]
    if not evaluations:
        raise UserError(f"{run.path}/metrics.jsonl has no validation loss yet")
    since = evaluated_alike_since(kept_starts(run.path))
    evaluations = [m for m in evaluations if m["iter"] > since] or evaluations
    best = min(evaluations, key=lambda m: (math.isnan(m["val_loss"]), m["val_loss"]))
    trained = [m["iter"] + 1 for m in metrics if "train_loss" in m]
    speeds = sorted(m["tokens_per_s"] for m in metrics if "tokens_per_s" in m)
    used, head = energy_of(run, metrics), model.head
    strength = minutes = None
    link = ""
    if not head.is_control:
        strength = f"{'n' if head.is_harmonic else 's'} = {float(head.strength):.4g}"
        link = f", {head.link} link"
    if timed(metrics):
        minutes = clock(run.path, metrics, run.tokens_per_iteration())[-1][0] / 60
    return {
        "head": head.name + link,
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
        "diverged": diverged(run, metrics),
        "speed_spread": speeds[-1 - len(speeds) // 10] / speeds[len(speeds) // 10] if speeds else 1,
    }


def diverged(run: Run, metrics: list[dict]) -> str | None:
    """The first number that is not finite among a run's last losses and gradient norm, in words."""
    names = {"val_loss": "validation loss", "train_loss": "training loss"}
    if run.config.dtype != "float16":  # There a gradient may overflow now and then.
        names["grad_norm"] = "gradient norm"
    for key, words in names.items():
        last = next((m[key] for m in reversed(metrics) if key in m), 0.0)
        if not math.isfinite(last):
            return f"its last {words} is {last}"
    return None


def unlike_splits(data: list[Data]) -> list[str]:
    """A note for each folder whose validation split is another kind of text than its training
    split."""
    notes = []
    for folder, d in {d.folder: d for d in data}.items():
        train, val = (d.splits[name].bytes_per_token for name in ("train", "val"))
        if unlike := other_kind(train, val):
            notes.append(f"Beware, in {folder} {unlike}.")
    return notes


def agreement(
    runs: list[Run],
    data: list[Data] | None,
    summaries: list[dict],
    environments: list[dict],
    losses: list[np.ndarray | None],
) -> Agreement:
    """Decides what can be compared between runs.

    Args:
        data: of each run; None if it was not found.
        summaries: of each run, from `summarize`.
        environments: the environment.json of each run.
        losses: the window losses of each run; None if it has none.
    """
    warning = None
    if data:
        warning = caution(runs, data)
    elif len(runs) > 1:
        warning = "The runs' data was not found, so it is unknown whether losses can be compared"
    blocks = {r.model_config.block_size for r in runs}
    windows = unequal_windows(runs)
    tokenizers = {r.config.tokenizer for r in runs}
    # A run that diverged may have stopped early. It is no rival, and a note names it.
    ended = [(r, s) for r, s in zip(runs, summaries, strict=True) if not s["diverged"]]
    unequal = unequal_training([r for r, _ in ended], [s["iterations"] for _, s in ended])
    same_length = unequal_training(runs, [s["iterations"] for s in summaries]) is None

    notes = []
    for run, s in zip(runs, summaries, strict=True):
        if s["diverged"]:
            notes.append(f"Beware: {run.name} diverged ({s['diverged']}). It is not ranked.")
    notes += unlike_splits(data or [])
    sizes = [sentence for run in runs if (sentence := uneven(run))]
    resumed = [sentence for run in runs if (sentence := changed(run))]
    notes += [f"{sentence}." for sentence in (*sizes, *resumed)]
    unlike = unlike_conditions(runs, summaries, environments)
    other = "tokens of different tokenizers are not the same work" if len(tokenizers) > 1 else None
    for sentence, consequence in (
        (warning, ""),
        (unequal, ". More training lowers a loss: losses, energy and time are not ranked"),
        (unlike, ": energy and time are not ranked"),
        (other, ": energy and time are not ranked"),
        (windows, ""),
    ):
        if sentence:
            notes.append(f"{sentence[0].upper()}{sentence[1:]}{consequence}.")
    notes += filter(None, [unequal_settings(runs), without_twin(runs)])
    same_size = len(blocks) == 1 and len({len(x) for x in losses if x is not None}) == 1
    same_work = same_length and unlike is None and not sizes and len(tokenizers) == 1
    return Agreement(
        losses=warning is None and windows is None and unequal is None,
        work=same_work and all((s["minutes"] or 0) >= TIMED_MINUTES for s in summaries),
        energy=same_work and all((s["minutes"] or 0) >= RANKED_MINUTES for s in summaries),
        windows=warning is None and same_size,
        unequal=unequal,
        notes=notes,
    )


def unlike_conditions(
    runs: list[Run], summaries: list[dict], environments: list[dict]
) -> str | None:
    """Why times of the runs cannot be compared although their work is the same, or None."""
    machines = {
        (start.get("device"), start.get("world_size"), start.get("threads"))
        for run, environment in zip(runs, environments, strict=True)
        for start in (environment, *kept_starts(run.path))
    }
    disturbed = [
        run.name for run, s in zip(runs, summaries, strict=True) if s["speed_spread"] > STEADY
    ]
    if len(machines) > 1:
        return "the runs ran on different machines or threads"
    if disturbed and len(runs) > 1:
        return (
            f"the speed of {listed(disturbed, 3)} changed while it ran, as it does beside other"
            " programs"
        )
    return None


def summary_table(summaries: list[dict], agree: Agreement, differences: dict | None) -> dict:
    """The summary as texts. The best of a column is marked if its values can be compared.

    differences: from `paired`. A loss is marked only if it is that of the run which is the best
        there, and if all other runs are told apart from it.
    """
    decided = None
    if differences is not None and not any(differences["noise"]):
        decided = differences["best"]
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
            best, is_loss = column.best(finite), column.needs == "losses"
            for j, (row, value) in enumerate(zip(rows, values, strict=True)):
                row[i]["best"] = value == best and (not is_loss or j == decided)
    return {"columns": [column.title or column.key for column in COLUMNS], "rows": rows}


def paired(summaries: list[dict], losses: list[np.ndarray | None]) -> dict | None:
    """Compares all runs that have window losses with the best of them, on the same windows.

    Sets `difference` in each summary. Returns: the best run's index, the number of windows, for a
        picture the mean, low and high difference of each run (NaN without losses), and for each
        whether it may be as good as the best. None if no two runs can be compared.
    """
    scored = {i: x for i, x in enumerate(losses) if x is not None and not summaries[i]["diverged"]}
    if len(scored) < 2:
        return None
    place, found = compare([*scored.values()])
    best, each = [*scored][place], dict(zip(scored, found, strict=True))
    if math.isnan(each[best].mean) or len(scored[best]) < 2:  # One window has no interval.
        return None
    rows, noise = [], []
    for i, s in enumerate(summaries):
        d = each.get(i, Difference(*[math.nan] * 4))
        rows.append([short(v) for v in (d.mean, d.low, d.high)])
        # A run that diverged is no rival. One that could not be scored may be.
        rival = not s["diverged"] and (i not in each or math.isfinite(d.mean))
        noise.append(i != best and rival and not d.p <= 0.05)
        if i == best:
            s["difference"] = "the best"
        elif i in each and not math.isfinite(d.mean):
            s["difference"] = "not finite"
        elif i in each:
            s["difference"] = (
                f"{'within noise: ' if noise[i] else ''}{d.mean:.3f} ({d.low:.3f} to {d.high:.3f}),"
                f" p {shown_p(d.p)}"
            )
    return {"best": best, "windows": len(scored[best]), "rows": rows, "noise": noise}


def energy_parts(used: dict) -> dict:
    """The energy in Wh of CPU, GPUs and memory, and the rest that CodeCarbon does not assign."""
    parts = {k: used[f"{k}_energy"] for k in ("cpu", "gpu", "ram")}
    parts["rest"] = max(0.0, used["energy_consumed"] - sum(parts.values()))
    return {k: short(1000 * kwh) for k, kwh in parts.items()}


def radar(summaries: list[dict], agree: Agreement) -> list[dict] | None:
    """The scores of each run on the three axes of the papers, from 0 to 10.

    A score is 10 * best / value, so the best run has 10. None if runs cannot be compared.
    """
    if (
        len(summaries) < 2
        or not (agree.losses and agree.energy)
        or any(s["diverged"] for s in summaries)
    ):
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


def single_seeds(runs: list[Run]) -> str | None:
    """A sentence if a pair of head and link has only one seed, else None."""
    single = [len(found) == 1 for found in seeds(runs).values()]
    if not any(single):
        return None
    few = "This is one seed of each head." if all(single) else "Some heads have only one seed."
    return f"{few} Other seeds, learning rates or strengths may change the result."


def lead(
    runs: list[Run],
    summaries: list[dict],
    agree: Agreement,
    losses: list[np.ndarray | None],
    differences: dict | None,
) -> str:
    """The result in a sentence or two. Empty if the runs cannot be compared.

    losses: the window losses of each run; None if it has none. differences: from `paired`.
    """
    if not any(math.isfinite(s["best_val_loss"]) for s in summaries):
        return "No run has a finite validation loss."
    if len(runs) == 1:
        return (
            f"{runs[0].name} reaches a validation loss of {summaries[0]['best_val_loss']:.3f}"
            " nats/token."
        )
    if agree.unequal:
        return f"These runs cannot be ranked: {agree.unequal}."
    if differences is None:
        return ""
    each = [
        (run, x) for run, s, x in zip(runs, summaries, losses, strict=True) if not s["diverged"]
    ]
    missing = [run.name for run, x in each if x is None]
    rest = f" {listed(missing, 3)} could not be compared." if missing else ""
    scored = [(run, x) for run, x in each if x is not None]
    if over_seeds := in_words(groups([run for run, _ in scored]), [x for _, x in scored]):
        return over_seeds + rest
    best, rows = differences["best"], differences["rows"]
    others = sorted(
        (mean, differences["noise"][i], runs[i].name)
        for i, (mean, _, _) in enumerate(rows)
        if i != best and not isinstance(mean, str)
    )
    text = f"{runs[best].name} has the lowest loss on the windows of this report"
    if alike := [name for _, noise, name in others if noise]:
        text = f"{text}, but its difference to {listed(alike, 3)} is within noise."
    elif not others:
        text = f"{text}."
    else:
        mean, _, name = others[0]
        text = f"{text}, {mean:.3f} nats/token below {name}."
    return " ".join([text + rest, *filter(None, [single_seeds(runs)])])


def without_twin(runs: list[Run]) -> str | None:
    """A sentence if softmax twins of harmonic heads are not among the runs, else None."""
    links: dict[str, set[str]] = {}
    for run in runs:
        if not HEADS[run.model_config.head].is_control:
            links.setdefault(run.model_config.head, set()).add(run.model_config.link)
    alone = [head for head, found in links.items() if found == {"harmonic"}]
    if len(runs) < 2 or not alone:
        return None
    flags = [f"--head={head} --link=softmax" for head in alone]
    return (
        f"No softmax twin of {listed(alone, 3)} is among the runs. So if a harmonic head leads,"
        " this may come from its distance and not from the link. To tell them apart, also train"
        f" {listed(flags, 3)}."
    )
