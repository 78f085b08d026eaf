"""Confidence intervals and tests over seeds."""

import math

import numpy as np
from scipy.stats import t as student
from scipy.stats import ttest_1samp


def mean_and_half(values: list[float]) -> tuple[float, float]:
    """The mean, and half the width of its 95 % interval (Student's t; NaN for one value)."""
    n = len(values)
    half = student.ppf(0.975, n - 1) * np.std(values, ddof=1) / math.sqrt(n) if n > 1 else math.nan
    return float(np.mean(values)), float(half)


def p_value(differences: list[float]) -> float:
    """The p-value of a t-test that the mean is 0.

    NaN for one value, or for values that are not finite. Equal values show no variance: 0, or 1 if
    all are 0.
    """
    if len(differences) < 2 or not np.isfinite(differences).all():
        return math.nan
    if len(set(differences)) == 1:
        return 0.0 if differences[0] else 1.0
    return float(ttest_1samp(differences, 0).pvalue)


def shown_p(p: float) -> str:
    """A p-value with three digits, such as `0.012` or `< 0.001`."""
    return "< 0.001" if p < 0.0005 else f"{p:.3f}"


def holm(p: dict) -> dict:
    """Corrects p-values for the number of tests (Holm 1979). p: name -> p-value.

    The smallest is multiplied by the number of tests n, the next by n - 1, and so on. No corrected
    value is above 1, or below that of a smaller p-value. NaN, such as that of a run that diverged,
    stays NaN and counts as a test.
    """
    found, largest = {}, 0.0
    for i, key in enumerate(sorted(p, key=lambda key: (math.isnan(p[key]), p[key]))):
        largest = max(largest, min(1.0, p[key] * (len(p) - i)))
        found[key] = math.nan if math.isnan(p[key]) else largest
    return found
