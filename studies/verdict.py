"""Compares heads by paired runs: differences of losses, and conclusions in plain sentences.

Runs with the same seed see the same tokens in the same order, so losses are compared seed by seed.
Every difference has a 95 % interval. It counts as clear if the p-value of a paired t-test is below
LEVEL. Holm's method corrects p-values for the number of comparisons.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

from analysis.intervals import holm, mean_and_half, p_value
from analysis.tables import interval

BASELINE = "cross_entropy"
LEVEL = 0.05
# The most seeds that a sentence proposes. If more are needed, the difference hardly matters.
MOST_SEEDS = 30
# A difference between twins is small if its whole interval is within this share of the gain.
SMALL = 0.5

# Head -> seed -> loss in nats per token, infinite if the run was not finite.
Losses = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Difference:
    """The loss of one head minus that of another, seed by seed, in nats per token."""

    head: str
    other: str
    values: list[float]
    """one for each seed"""
    p: float
    """corrected for the number of comparisons"""

    @property
    def mean(self) -> float:
        return mean_and_half(self.values)[0]

    @property
    def half(self) -> float:
        """Half the width of the 95 % interval."""
        return mean_and_half(self.values)[1]

    @property
    def better(self) -> bool:
        return self.p < LEVEL and self.mean < 0

    @property
    def worse(self) -> bool:
        return self.p < LEVEL and self.mean > 0

    def size(self) -> str:
        """The size without a sign, such as "0.120 ± 0.030 nats a token"."""
        return f"{interval(abs(self.mean), self.half, '.3f')} nats a token"


def differences(losses: Losses, twins: dict[str, str]) -> dict[tuple[str, str], Difference]:
    """Every head minus cross_entropy, and every harmonic head minus its softmax twin.

    Heads with a run that is not finite are left out. twins: harmonic head -> softmax twin.
    """
    sound = [name for name in losses if all(map(math.isfinite, losses[name].values()))]
    pairs = [(name, BASELINE) for name in sound if name != BASELINE]
    pairs += twins.items()
    values = {}
    for head, other in pairs:
        if head in sound and other in sound:
            values[head, other] = [losses[head][s] - losses[other][s] for s in losses[head]]
    corrected = holm({pair: p_value(found) for pair, found in values.items()})
    return {pair: Difference(*pair, values[pair], corrected[pair]) for pair in values}


def seeds_needed(values: list[float], comparisons: int) -> int | None:
    """How many seeds would make a difference clear, with the same mean and spread.

    None if it takes more than MOST_SEEDS.
    """
    mean, spread = abs(np.mean(values)), np.std(values, ddof=1)
    for n in range(len(values) + 1, MOST_SEEDS + 1):
        least = student.ppf(1 - LEVEL / 2 / comparisons, n - 1) * spread / math.sqrt(n)
        if mean > least:
            return n
    return None


def conclude(
    losses: Losses, twins: dict[str, str], where: str, minutes: Callable[[int], float]
) -> list[str]:
    """The conclusion, then a sentence for each pair of twins and for each head that failed.

    Args:
        where: describes the runs, such as "after 1.0 M tokens of wiki (3 seeds)".
        minutes: a function from a number of seeds to the minutes of such a study.
    """
    found = differences(losses, twins)
    sentences = [_best(found, where, minutes)]
    for head, twin in twins.items():
        if (head, twin) in found and (head, BASELINE) in found:
            sentences.append(_about_twins(found, head, twin))
    for name, runs in losses.items():
        failed = sum(not math.isfinite(loss) for loss in runs.values())
        if failed:
            sentences.append(
                f"{name} is not compared: {failed} of its {len(runs)} runs ended at a loss that is"
                " not finite."
            )
    return sentences


def _best(found: dict, where: str, minutes: Callable[[int], float]) -> str:
    """The main conclusion, in one or two sentences."""
    to_baseline = [d for (_, other), d in found.items() if other == BASELINE]
    if not to_baseline:
        return f"cannot tell: no head can be compared with {BASELINE} {where}."
    to_baseline.sort(key=_mean)
    better = [d for d in to_baseline if d.better]
    if better:
        best = better[0]
        sentence = f"{best.head} is better than {BASELINE} by {best.size()} {where}."
        others = ", ".join(d.head for d in better[1:])
        if others:
            sentence += f" Also better: {others}. The order among these is not tested."
        return sentence
    unclear = [d for d in to_baseline if not d.worse]
    if not unclear:
        nearest = to_baseline[0]
        return (
            f"{BASELINE} is better than every other head: the nearest, {nearest.head}, is worse by"
            f" {nearest.size()} {where}."
        )
    nearest = unclear[0]
    worse = ", ".join(d.head for d in to_baseline if d.worse)
    decided = f" {BASELINE} is better than {worse}." if worse else ""
    return (
        f"cannot tell {where}: {nearest.head} minus {BASELINE} is"
        f" {interval(nearest.mean, nearest.half)} nats a token."
        f" {_more(nearest, len(found), minutes)}{decided}"
    )


def _mean(difference: Difference) -> float:
    return difference.mean


def _more(difference: Difference, comparisons: int, minutes: Callable[[int], float]) -> str:
    """What could make an unclear difference clear."""
    seeds = seeds_needed(difference.values, comparisons)
    if seeds is None:
        return f"More than {MOST_SEEDS} seeds would be needed: train longer instead (--minutes)."
    return (
        f"With {seeds} seeds ({math.ceil(minutes(seeds))} minutes) a true difference of this size"
        " would be clear about half of the time."
    )


def _about_twins(found: dict, head: str, twin: str) -> str:
    """Whether a harmonic head differs from its twin, and whether a gain comes from HarMax."""
    between = found[head, twin]
    gain, twins_gain = found[head, BASELINE], found[twin, BASELINE]
    if between.worse:
        sentence = f"{twin} is better than {head} by {between.size()}"
        if twins_gain.better:
            return f"The gain comes from the geometry, not from HarMax: {sentence}."
        return f"{sentence}."
    if between.better:
        sentence = f"{head} is better than {twin} by {between.size()}"
        if gain.better and twins_gain.better:
            return f"HarMax adds to the gain of the geometry: {sentence}."
        if gain.better:
            return f"The gain comes from HarMax: {sentence}."
        return f"{sentence}."
    sentence = f"{head} minus {twin} is {interval(between.mean, between.half)} nats a token"
    small = abs(between.mean) + between.half < SMALL * abs(twins_gain.mean)
    if twins_gain.better and small:
        return (
            "The gain comes from the geometry, not from HarMax:"
            f" {twin} is better than {BASELINE} by {twins_gain.size()}, and {sentence}."
        )
    if gain.better or twins_gain.better:
        return f"Cannot tell whether the gain comes from the geometry or from HarMax: {sentence}."
    return f"Cannot tell {head} from {twin}: {sentence}."
