"""The search for the best setting of a head: a grid, then beyond its edge for as long as the best
setting lies on it."""

import math
from collections.abc import Callable, Sequence

# Numbers, such as an exponent and a learning rate.
Setting = tuple[float, ...]


def number(text: str) -> float:
    """A loss of a table. One that is not finite, or missing, is worse than any."""
    value = float(text or "nan")
    return value if math.isfinite(value) else math.inf


def beyond(best: Setting, tried: Sequence[Setting], steps: Setting) -> Setting | None:
    """The setting next to the best one, outside of those tried, along the first axis on which the
    best lies on the edge. None where it lies inside.

    Args: steps: the factor to the next value of each axis.
    """
    for axis, step in enumerate(steps):
        line = [setting[axis] for setting in tried if _on_line(setting, best, axis)]
        if best[axis] == max(line):
            return (*best[:axis], best[axis] * step, *best[axis + 1 :])
        if best[axis] == min(line):
            return (*best[:axis], best[axis] * (1 / step), *best[axis + 1 :])
    return None


def on_edge(sweeps: list[dict], steps: Setting) -> str:
    """How many winners still lie on the edge of what was tried; sweeps: dicts of settings -> their
    costs."""
    count = 0
    for found in sweeps:
        winner = min(found, key=found.__getitem__)
        count += beyond(winner, list(found), steps) is not None
    return f"{count} of {len(sweeps)} winners of the sweep lie on the edge of what was tried."


def search(
    grid: list[Setting],
    steps: Setting,
    most: int,
    costs: Callable[[list[Setting]], list],
) -> None:
    """Tries all settings of a grid, then goes beyond it for as long as the best lies on the edge:
    `most` further settings at most. costs: (settings) -> the cost of each."""
    found = dict(zip(grid, costs(grid), strict=True))
    for _ in range(most):
        further = beyond(min(found, key=found.__getitem__), list(found), steps)
        if further is None:
            break
        found[further] = costs([further])[0]


def _on_line(setting: Setting, best: Setting, axis: int) -> bool:
    """Whether a setting differs from the best on this axis alone."""
    return all(
        i == axis or math.isclose(setting[i], best[i], rel_tol=1e-3) for i in range(len(best))
    )
