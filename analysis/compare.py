"""Which head has the lower loss, and is the difference more than chance?

    python -m analysis.compare out/a1 out/a2 out/b1 out/b2

Runs that differ only in their seed are taken together. Two such groups are compared seed by seed:
`difference` is the mean of the differences of the seeds that both have, in nats a token, with its
95 % interval (Student's t) and the p-value of a t-test. If both have only one seed in common, its
two runs are compared window by window (paired by text): the interval is a bootstrap over windows,
and p is that of a sign-flip permutation test. Such an interval holds for these two trained models.
It does not cover training again with another seed, so it proves nothing about heads.

p is corrected for the number of comparisons (Holm 1979). Losses are those of at most 256 windows,
spread evenly over the split. Windows of one document are alike, so over few documents an interval
over windows is too narrow.
"""

import itertools
import math
import sys
from dataclasses import dataclass

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
)
from analysis.tables import Column
from base.command_line import cli, parse
from base.errors import UserError
from model import Model, ModelConfig
from text.token_files import Data
from training.distributed import check_device
from training.objective import objective_of
from training.telemetry import listed

WINDOWS, DRAWS = 256, 10_000


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
# Settings that say nothing about what was trained.
NOT_COMPARED = {*ModelConfig.free_settings(), "seed"}


@dataclass
class CompareConfig(ModelAnalysisConfig):
    """The comparison"""


@dataclass
class Difference:
    """How many nats a token one run is worse than another.

    mean: over windows. low, high: its 95 % interval. p: the p-value of no difference.
    """

    mean: float
    low: float
    high: float
    p: float

    @property
    def noise(self) -> bool:
        """Whether chance may explain it. With few windows the interval is too short to say so."""
        return self.low <= 0 <= self.high or not self.p <= 0.05


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


def difference(a: np.ndarray, b: np.ndarray, seed: int = 0) -> Difference:
    """The difference a - b of the losses of the same N windows, (N,) each.

    seed: of the bootstrap and the permutations.
    """
    d, rng = a - b, np.random.default_rng(seed)
    mean = d.mean()
    if not math.isfinite(mean):
        return Difference(*[math.nan] * 4)
    means = d[rng.integers(0, len(d), (DRAWS, len(d)))].mean(1)
    flipped = (rng.integers(0, 2, (DRAWS, len(d)), dtype=np.int8) * 2 - 1) @ d / len(d)
    p = (1 + (np.abs(flipped) >= abs(mean) - 1e-15).sum()) / (1 + DRAWS)
    return Difference(
        float(mean), float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975)), float(p)
    )


def compare(losses: list[np.ndarray]) -> tuple[int, list[Difference]]:
    """Compares each run with the best one. losses: the window losses of each run, (N,) each.

    Returns: the index of the run with the lowest mean, and the difference of each run to it.
    """
    best = int(np.argmin([x.mean() if np.isfinite(x).all() else np.inf for x in losses]))
    return best, [difference(x, losses[best]) for x in losses]


# ---- runs of several seeds ---------------------------------------------------------------------


@dataclass
class Pair:
    """How many nats a token the runs of one group are worse than those of another.

    seeds: how many seeds both have. mean, low, high: of the differences, with their 95 % interval.
    p: not corrected. These are NaN if a run diverged.
    """

    group: str
    minus: str
    seeds: int
    mean: float
    low: float
    high: float
    p: float


def settings(run: Run) -> dict[str, object]:
    """All settings of a run that change what it learns, but for its seed."""
    found = {k: v for k, v in vars(run.model_config).items() if k not in NOT_COMPARED}
    found |= {k: v for k, v in vars(run.config).items() if k in LEARNS and k not in NOT_COMPARED}
    found |= {"dropout": run.model_config.dropout, "dataset": run.trained_on}
    return found | about(run) | {"run": None, "tokens": run.tokens_per_iteration()}


def groups(runs: list[Run]) -> dict[str, dict[int, int]]:
    """Takes runs together that differ only in their seed.

    Returns: for each group its name, which has the head, the link of a twin, and the settings in
        which groups of the same head differ; and seed -> index of the run. The last run of a seed
        counts.
    """
    each = [settings(run) for run in runs]
    found: dict[str, dict[int, int]] = {}
    for i, mine in enumerate(each):
        alike = [other for other in each if all(other[k] == mine[k] for k in ("head", "link"))]
        name = str(mine["head"]) + (" softmax" if mine["link"] == "softmax" else "")
        more = [f"{k}={v}" for k, v in mine.items() if any(other[k] != v for other in alike)]
        found.setdefault(", ".join([name, *more]), {})[runs[i].config.seed] = i
    return found


def means(
    found: dict[str, dict[int, int]], losses: list[np.ndarray]
) -> tuple[list[dict], tables.Columns]:
    """The mean loss of each group with its interval over seeds: rows and columns of a table."""
    rows = []
    for name, mine in found.items():
        mean, half = mean_and_half([float(losses[i].mean()) for i in mine.values()])
        loss = tables.interval(mean, half, ".4f")
        rows.append({"head": name, "seeds": " ".join(map(str, sorted(mine))), "loss": loss})
    return rows, ("head", "seeds", Column("loss", "nats/token"))


def pairs(found: dict[str, dict[int, int]], losses: list[np.ndarray]) -> list[Pair]:
    """Compares all groups that have a seed in common, the worse minus the better.

    losses: of the windows of each run.
    """

    def mean(name: str) -> float:
        loss = float(np.mean([losses[i].mean() for i in found[name].values()]))
        return math.inf if math.isnan(loss) else loss

    result = []
    for better, worse in itertools.combinations(sorted(found, key=mean), 2):
        both = [
            (losses[found[worse][s]], losses[found[better][s]])
            for s in found[worse]
            if s in found[better]
        ]
        if len(both) == 1:
            d = difference(*both[0])
            result.append(Pair(worse, better, 1, d.mean, d.low, d.high, d.p))
        elif both:
            each = [float(a.mean() - b.mean()) for a, b in both]
            middle, half = mean_and_half(each)
            low, high = middle - half, middle + half
            result.append(Pair(worse, better, len(both), middle, low, high, p_value(each)))
    return result


def corrected(found: list[Pair]) -> list[float]:
    """The p-value of each pair, corrected for the number of pairs."""
    p = holm({i: pair.p for i, pair in enumerate(found)})
    return [p[i] for i in range(len(found))]


def verdict(pair: Pair, p: float) -> str:
    """What a difference says. p: corrected."""
    if math.isnan(p):
        return "not finite"
    if p > 0.05 or pair.low <= 0 <= pair.high:
        return "not told apart"
    return "behind" if pair.seeds > 1 else "behind on this text"


def in_words(found: list[Pair]) -> str | None:
    """The result in a sentence, if any two groups have two seeds in common, else None."""
    if not any(pair.seeds > 1 for pair in found):
        return None
    best = found[0].minus
    level = [
        pair.group
        for pair, p in zip(found, corrected(found), strict=True)
        if pair.minus == best and not verdict(pair, p).startswith("behind")
    ]
    text = f"Over its seeds {best} has the lowest mean loss"
    all_pairs = "`python -m analysis.compare` lists all differences with their intervals."
    if level:
        return f"{text}, but it is not told apart from {listed(level, 3)}. {all_pairs}"
    return f"{text}, and every other head with the same seeds is behind it. {all_pairs}"


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
        color = figures.head_color(runs[next(iter(found[name].values()))].model_config.head)
        axes.scatter(values, [y] * len(values), color=color, s=22, zorder=2)
    axes.set_yticks(range(len(names)), [figures.literal(name) for name in names])
    axes.invert_yaxis()
    axes.margins(y=0.3 / max(1, len(names)))
    axes.set_xlabel("nats a token (grey lines join runs of one seed)")
    return figure


def main() -> None:
    (c,) = parse(sys.argv[1:], CompareConfig, words="runs")
    runs = find_runs(c.runs, dataset=c.dataset)
    device, out = check_device(c.device), default_out(c, runs, "compare")
    data = [run.data() for run in runs]
    if problem := caution(runs, data, c.split):
        raise UserError(problem)
    if len({run.model_config.block_size for run in runs}) > 1:
        raise UserError("the runs have different block_size, so they have no windows in common")
    losses, iterations = [], []
    for run, d in zip(numbered(runs), data, strict=True):
        model, manifest = run.load(device, c.checkpoint)
        iterations.append(manifest["iter"])
        losses.append(window_losses(model, d, c.split))
    note(unequal_training(runs, iterations))
    note(unequal_settings(runs))
    found = groups(runs)
    print(tables.text(*means(found, losses)))
    compared = pairs(found, losses)
    rows: list[dict] = [
        {**vars(pair), "p_holm": p, "verdict": verdict(pair, p)}
        for pair, p in zip(compared, corrected(compared), strict=True)
    ]
    if rows:
        print(tables.text([{**row, "p_holm": shown_p(row["p_holm"])} for row in rows], COLUMNS))
    if any(pair.seeds == 1 for pair in compared):
        note(
            "an interval of one seed holds for these two models on this text: train more seeds of"
            " both to learn about the heads"
        )
    if len(compared) < math.comb(len(found), 2):
        note("groups without a seed in common are not compared: train both with the same seeds")
    publish(rows, out, lambda: draw(runs, found, losses))


if __name__ == "__main__":
    cli(main)
