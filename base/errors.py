"""Errors that the user can fix, and the nearest valid name for a wrong one."""

import difflib
from collections.abc import Iterable, Mapping
from types import MappingProxyType


class UserError(ValueError):
    """An error that the user can fix.

    `cli` prints its message without a traceback, and exits with status 2.

    shared: whether all processes of a run raise it, so that one of them is enough to print it.
    """

    shared = False


def check(problems: list[str]) -> None:
    """Raises one UserError that lists all `problems`, if there are any."""
    if len(problems) == 1:
        raise UserError(problems[0])
    if problems:
        raise UserError(f"{len(problems)} problems:\n" + "\n".join(f"  - {p}" for p in problems))


def too_small(settings: object, **least: float) -> list[str]:
    """A problem for each setting, by name, that is below its least value. None is allowed."""
    values = {name: getattr(settings, name) for name in least}
    return [
        f"{name}={value} must be at least {least[name]}"
        for name, value in values.items()
        if value is not None and not value >= least[name]  # NaN is too small as well.
    ]


def nearest(
    name: object, names: Iterable[object], other_names: Mapping[str, str] = MappingProxyType({})
) -> str:
    """`; did you mean X?` with the most similar valid name, or a list of all names if none is.

    other_names: what others call some of the valid names.
    """
    name, valid = str(name), [str(n) for n in names]
    if name.lower() in other_names:
        return f"; did you mean {other_names[name.lower()]}?"
    near = difflib.get_close_matches(name, valid, n=1)
    return f"; did you mean {near[0]}?" if near else f"; choose from {', '.join(valid)}"
