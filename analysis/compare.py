"""Which head has the lower loss, and is the difference more than chance?

    python -m analysis.compare out/a1 out/a2 out/b1 out/b2

Runs that differ only in their seed are taken together. Two such groups are compared seed by seed:
`difference` is the mean of the differences of the seeds that both have, in nats a token, with its
95 % interval and the p-value of Student's t-test. If both have only one seed in common, its two
runs are compared in the same way window by window. Such an interval holds for these two trained
models. It does not cover training again with another seed, so it proves nothing about heads.

p is corrected for the number of comparisons (Holm 1979); those over seeds and those over windows
are corrected apart. Intervals are not corrected. Losses are those of at most 256 windows, spread
evenly over the split. Windows of one document are alike, so over few documents an interval over
windows is too narrow.
"""

import itertools
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from analysis import figures, tables
from analysis.intervals import holm, mean_and_half, p_value, shown_p
from analysis.runs import (
    LEARNS,
    ModelAnalysisConfig,
    Run,
    about,
    caution,
    default_out,
    find_runs,
    note,
    numbered,
    predictions,
    publish,
    unequal_settings,
    unequal_training,
    windows,
)
from analysis.tables import Column
from base.command_line import cli, parse
from base.errors import UserError
from base.output import listed
from harmonic.links import resolve_strength
from model import Model, ModelConfig
from text.token_files import Data, documents_of
from training import checkpoint
from training.distributed import check_device
from training.objective import objective_of

WINDOWS = 256
MANY = 30  # With fewer documents a note says that intervals over windows are too narrow.
COLUMNS: tables.Columns = (
    Column("group", "head"),
    "minus",
    Column("seeds", "seeds in common"),
    Column("mean", "difference", "+.4f"),
    Column("low", form="+.4f"),
    Column("high", form="+.4f"),
    Column("p_holm", "p, Holm"),
    "verdict",
)
# Settings that may change when a run is resumed, and that change what it learns.
COUNTED = {"dropout", "head_precision", "head_skip"}


@dataclass
class CompareConfig(ModelAnalysisConfig):
    """The comparison"""


@dataclass
class Difference:
    """How many nats a token one run is worse than another, or the runs of one group than another's.

    mean: over windows or seeds. low, high: its 95 % interval. p: the p-value of no difference. All
    are NaN if a run diverged; p, low and high also if there is only one window.
    """

    mean: float
    low: float
    high: float
    p: float


def few_documents(data: Data, split: str) -> str | None:
    """A sentence if a split has so few documents that intervals over windows are too narrow."""
    count = len(list(itertools.islice(documents_of(data, split), MANY)))
    if count >= MANY:
        return None
    return (
        f"the split {split} of {data.folder} has few documents ({count}). Windows of one document"
        " are alike, so intervals and p-values over windows are too small"
    )


@torch.inference_mode()
def window_losses(model: Model, data: Data, split: str = "val") -> np.ndarray:
    """The mean loss of each window, in nats a token: (windows,).

    There are at most WINDOWS windows, spread evenly over the split.
    """
    c, found = model.config, []
    tokens = WINDOWS * objective_of(c.arch).predicted(c.block_size)
    for h, y, kept in predictions(model, data, split, tokens):
        losses = torch.zeros(kept.shape, dtype=torch.float64)
        losses[kept] = model.head.loss(h, y, reduction="none").cpu().double()
        # A window without a target has loss 0.
        found.append(losses.sum(1) / kept.sum(1).clamp_min(1))
    return torch.cat(found).numpy()


def difference(a: np.ndarray, b: np.ndarray) -> Difference:
    """The difference a - b of losses that are paired, (N,) each: of windows, or of seeds."""
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return Difference(*[math.nan] * 4)
    each = (a - b).tolist()
    mean, half = mean_and_half(each)
    return Difference(mean, mean - half, mean + half, p_value(each))


def compare(losses: list[np.ndarray]) -> tuple[int, list[Difference]]:
    """Compares each run with the best one. losses: the window losses of each run, (N,) each.

    Returns: the index of the run with the lowest mean, and the difference of each run to it. p is
        corrected for the comparisons of all pairs, because the best is known only after a look.
    """
    finite = [i for i, x in enumerate(losses) if np.isfinite(x).all()]
    best = min(finite, key=lambda i: losses[i].mean(), default=0)
    pairs = itertools.combinations(finite, 2)
    p = holm({(i, j): difference(losses[i], losses[j]).p for i, j in pairs})
    found = [difference(x, losses[best]) for x in losses]
    return best, [
        replace(d, p=p.get((min(i, best), max(i, best)), d.p)) for i, d in enumerate(found)
    ]


# ---- runs of several seeds ---------------------------------------------------------------------


@dataclass
class Pair:
    """How much worse the runs of one group are than those of another, on the seeds that both have.

    seeds: their number. With one, its windows are compared. p is not corrected.
    """

    group: str
    minus: str
    seeds: int
    mean: float
    low: float
    high: float
    p: float


def settings(run: Run) -> dict[str, object]:
    """All settings that change what a run learns, but for its seed, and how far it was trained."""
    m = run.model_config
    left_out = {"exponent", "scale", *(ModelConfig.free_settings() - COUNTED)}
    found = {name: value for name, value in vars(m).items() if name not in left_out}
    found |= {name: getattr(run.config, name) for name in LEARNS if hasattr(run.config, name)}
    del found["seed"]
    link, strength = resolve_strength(
        m.head, m.n_embd, m.link, m.exponent, m.scale, **m.head_options()
    )
    return found | {
        "link": link,
        "n" if link == "harmonic" else "s": float(strength),
        "source": bool(run.config.source),  # Each seed may go on from a run of its own.
        "dataset": Path(run.trained_on).name,
        "tokens an iteration": run.tokens_per_iteration(),
        "iteration": newest(run),
    }


def newest(run: Run) -> int:
    """The iteration of a run's newest checkpoint; 0 if it has none."""
    return max((m["iter"] for m in checkpoint.manifests(run.path).values()), default=0)


def groups(runs: list[Run]) -> dict[str, dict[int, int]]:
    """Takes runs together that differ only in their seed.

    Returns: for each group its name, which has the head, the link of a twin, and the settings in
        which groups of the same head differ; and seed -> index of the run. Of several runs of a
        seed the last counts, with a note.
    """
    each = [settings(run) for run in runs]
    found: dict[str, dict[int, int]] = {}
    for i, mine in enumerate(each):
        alike = [other for other in each if all(other[k] == mine[k] for k in ("head", "link"))]
        name = str(mine["head"]) + (" softmax" if mine["link"] == "softmax" else "")
        more = [f"{k}={v}" for k, v in mine.items() if any(other[k] != v for other in alike)]
        group, seed = found.setdefault(", ".join([name, *more]), {}), runs[i].config.seed
        if seed in group:
            note(f"{runs[group[seed]].name} is left out: {runs[i].name} has the same seed")
        group[seed] = i
    return found


def mean_loss(group: dict[int, int], losses: list[np.ndarray]) -> float:
    """The mean loss of a group's runs; infinite if one diverged."""
    loss = float(np.mean([losses[i].mean() for i in group.values()]))
    return loss if math.isfinite(loss) else math.inf


def means(
    found: dict[str, dict[int, int]], losses: list[np.ndarray]
) -> tuple[list[dict], tables.Columns]:
    """The mean loss of each group with its interval over seeds: rows and columns of a table."""
    rows = []
    for name, mine in found.items():
        mean, half = mean_and_half([float(losses[i].mean()) for i in mine.values()])
        loss = tables.interval(mean, half, ".4f")
        rows.append({"head": name, "seeds": " ".join(map(str, sorted(mine))), "loss": loss})
    return rows, ("head", "seeds", Column("loss", "nats/token, all seeds"))


def pairs(found: dict[str, dict[int, int]], losses: list[np.ndarray]) -> list[Pair]:
    """Compares all groups that have a seed in common. losses: of the windows of each run."""
    result = []
    order = sorted(found, key=lambda name: mean_loss(found[name], losses))
    for better, worse in itertools.combinations(order, 2):
        shared = [seed for seed in found[worse] if seed in found[better]]
        both = [(losses[found[worse][seed]], losses[found[better][seed]]) for seed in shared]
        if not both:
            continue
        if sum(a.mean() - b.mean() for a, b in both) < 0:  # Other seeds have decided the order.
            worse, better, both = better, worse, [(b, a) for a, b in both]
        if len(both) == 1:
            d = difference(*both[0])
        else:
            d = difference(*np.array([[x.mean() for x in pair] for pair in both]).T)
        result.append(Pair(worse, better, len(both), **vars(d)))
    return result


def corrected(found: list[Pair]) -> list[float]:
    """The p-value of each pair, corrected for the number of pairs that are compared like it."""
    p: dict[int, float] = {}
    for over_seeds in (True, False):
        p |= holm({i: x.p for i, x in enumerate(found) if (x.seeds > 1) is over_seeds})
    return [p[i] for i in range(len(found))]


def verdict(pair: Pair, p: float, alike: bool = True) -> str:
    """What a difference says. p: corrected. alike: whether all runs trained on as many tokens."""
    if math.isnan(p):
        return "not finite"
    if not alike:
        return "unequal training"
    if p > 0.05:
        return "not told apart"
    return "behind" if pair.seeds > 1 else "behind on this text"


def in_words(found: dict[str, dict[int, int]], losses: list[np.ndarray]) -> str | None:
    """The result over seeds in sentences; None if no two groups have two seeds in common."""
    all_pairs = pairs(found, losses)
    several = [
        (pair, verdict(pair, p))
        for pair, p in zip(all_pairs, corrected(all_pairs), strict=True)
        if pair.seeds > 1 and math.isfinite(pair.mean)
    ]
    names = [name for pair, _ in several for name in (pair.group, pair.minus)]
    if not names:
        return None
    best = min(dict.fromkeys(names), key=lambda name: mean_loss(found[name], losses))
    behind, level = [], []
    for pair, said in several:
        if pair.minus == best and said == "behind":
            half = (pair.high - pair.low) / 2
            behind.append(f"{pair.group} ({tables.interval(pair.mean, half, '.3f')} nats)")
        elif best in (pair.group, pair.minus):
            level.append(pair.minus if pair.group == best else pair.group)
    text = f"Of the heads with several seeds, {best} has the lowest mean loss."
    if level:
        text += f" It is not told apart from {listed(level, 3)}."
    if behind:
        text += f" On the seeds that both have, it leads {listed(behind, 3)}."
    return f"{text} python -m analysis.compare --checkpoint=best lists all differences."


def draw(runs: list[Run], found: dict[str, dict[int, int]], losses: list[np.ndarray]) -> Figure:
    """The loss of each run, a row for each group. Lines join runs of one seed."""
    names = list(found)
    figure = figures.figure(1.2 + 0.35 * len(names))
    axes = figure.subplots()
    for seed in sorted({seed for group in found.values() for seed in group}):
        rows = [y for y, name in enumerate(names) if seed in found[name]]
        values = [losses[found[names[y]][seed]].mean() for y in rows]
        axes.plot(values, rows, color=figures.GREY, linewidth=0.6, zorder=1)
    for y, name in enumerate(names):
        values = [losses[i].mean() for i in found[name].values()]
        one = about(runs[next(iter(found[name].values()))])
        style = figures.dots(one["head"], one["link"])
        axes.plot(values, [y] * len(values), "o", zorder=2, **style)
    axes.set_yticks(range(len(names)), [figures.literal(name) for name in names])
    axes.invert_yaxis()
    axes.margins(y=0.3 / max(1, len(names)))
    axes.set_xlabel("nats a token (grey lines join runs of one seed)")
    return figure


def check_comparable(runs: list[Run], data: list[Data], split: str, count: int) -> None:
    """Raises UserError if the losses of runs cannot be compared. count: of their groups."""
    if problem := caution(runs, data, split):
        raise UserError(problem)
    lengths = {run.model_config.block_size for run in runs}
    if len(lengths) > 1:
        raise UserError("the runs have different block_size, so they have no windows in common")
    if count < 2:
        raise UserError("these runs differ in nothing but their seed: name runs of two heads")
    for d in data:
        if len(windows(d, split, max(lengths), 2)) < 2:
            raise UserError(f"{d.folder}: its split {split} has one window, which has no interval")


def main() -> None:
    (c,) = parse(sys.argv[1:], CompareConfig, words="runs")
    runs = find_runs(c.runs, dataset=c.dataset)
    device, out = check_device(c.device), default_out(c, runs, "compare")
    data, found = [run.data() for run in runs], groups(runs)
    check_comparable(runs, data, c.split, len(found))
    losses = [
        window_losses(run.load(device, c.checkpoint)[0], d, c.split)
        for run, d in zip(numbered(runs), data, strict=True)
    ]
    note(unequal_training(runs, [newest(run) for run in runs]))
    note(unequal_settings(runs))
    print(tables.text(*means(found, losses)))
    compared = pairs(found, losses)
    rows: list[dict] = []
    for pair, p in zip(compared, corrected(compared), strict=True):
        members = [runs[i] for name in (pair.group, pair.minus) for i in found[name].values()]
        alike = unequal_training(members, [newest(run) for run in members]) is None
        rows.append({**vars(pair), "p_holm": p, "verdict": verdict(pair, p, alike)})
    if rows:
        print(tables.text([{**row, "p_holm": shown_p(row["p_holm"])} for row in rows], COLUMNS))
    if any(pair.seeds == 1 for pair in compared):
        note(
            "an interval of one seed holds for these two models on this text: train more seeds of"
            " both to learn about the heads"
        )
        note(few_documents(data[0], c.split))
    if len(compared) < math.comb(len(found), 2):
        note("groups without a seed in common are not compared: train both with the same seeds")
    publish(rows, out, lambda: draw(runs, found, losses))


if __name__ == "__main__":
    cli(main)
