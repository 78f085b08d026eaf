"""Searches for the best setting of a head: a grid, then beyond its edge while the best is there."""

import math
from collections.abc import Callable, Sequence

# The numbers of a setting, such as an exponent and a learning rate.
Setting = tuple[float, ...]


def number(text: str) -> float:
    """A loss in a table as a number. It is infinite if it is missing or not finite."""
    value = float(text or "nan")
    return value if math.isfinite(value) else math.inf


def beyond(
    best: Setting, tried: Sequence[Setting], steps: Setting, fewest: int = 1
) -> Setting | None:
    """The next setting beyond the edge, if the best one is on an edge of the tried settings.

    It steps along the first axis on which the best one is on the edge. None if it is on no edge.

    Args:
        steps: for each axis, the factor from one value to the next.
        fewest: a line of fewer settings along an axis has no edge.
    """
    for axis, step in enumerate(steps):
        line = [setting[axis] for setting in tried if _on_line(setting, best, axis)]
        if len(line) < fewest:
            continue
        if best[axis] == max(line):
            return (*best[:axis], best[axis] * step, *best[axis + 1 :])
        if best[axis] == min(line):
            return (*best[:axis], best[axis] * (1 / step), *best[axis + 1 :])
    return None


def next_setting(best: Setting, tried: Sequence[Setting]) -> Setting | None:
    """What lies beyond the edge that the best (strength, learning rate) is on; None if on none.

    The strengths tried at the best rate decide, and then the rates tried at any strength.
    """
    strengths = [setting for setting in tried if setting[1] == best[1]]
    rates = [(best[0], rate) for _, rate in tried]
    return beyond(best, list({*strengths, *rates}), (2, 2), fewest=2)


def on_edge(sweeps: list[dict]) -> str:
    """A sentence that tells how many winners are still on the edge of the tried settings.

    sweeps: a dict of setting -> cost for each sweep.
    """
    count = 0
    for found in sweeps:
        winner = min(found, key=found.__getitem__)
        count += any(_at_end(winner, list(found), axis) for axis in range(len(winner)))
    return f"{count} of {len(sweeps)} winners of the sweep lie on the edge of what was tried."


def search(
    grid: list[Setting],
    steps: Setting,
    most: int,
    costs: Callable[[list[Setting]], list],
) -> None:
    """Tries all settings of a grid, and then settings beyond it while the best is on the edge.

    most: the largest number of settings beyond the grid. costs: returns the cost of each setting.
    """
    found = dict(zip(grid, costs(grid), strict=True))
    for _ in range(most):
        further = beyond(min(found, key=found.__getitem__), list(found), steps)
        if further is None:
            break
        found[further] = costs([further])[0]


def _at_end(best: Setting, tried: list[Setting], axis: int) -> bool:
    """Whether the best setting has the lowest or the highest value that was tried on an axis.

    If it is alone on its line, such as a refinement, it is compared with all settings.
    """
    line = {setting[axis] for setting in tried if _on_line(setting, best, axis)}
    if len(line) < 2:
        line = {setting[axis] for setting in tried}
    return len(line) > 1 and best[axis] in (min(line), max(line))


def _on_line(setting: Setting, best: Setting, axis: int) -> bool:
    """Whether a setting differs from the best one only on this axis."""
    return all(
        i == axis or math.isclose(setting[i], best[i], rel_tol=1e-3) for i in range(len(best))
    )
