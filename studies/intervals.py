"""Confidence intervals and tests for the tables of studies."""

import math

import numpy as np
from scipy.stats import t as student


def mean_and_half(values: list[float]) -> tuple[float, float]:
    """The mean, and half the width of its 95 % interval (Student's t; NaN for one value)."""
    n = len(values)
    half = student.ppf(0.975, n - 1) * np.std(values, ddof=1) / math.sqrt(n) if n > 1 else math.nan
    return float(np.mean(values)), float(half)


def wilson(k: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval of the share k / n; 95 % for the default z."""
    middle = k / n + z * z / (2 * n)
    half = z * math.sqrt(k / n * (1 - k / n) / n + z * z / (4 * n * n))
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


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
