"""Compiled kernels for values outside of a loss, and the modules that hold them.

It stands below distances and backends, which both use it.
"""

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

Arguments = ParamSpec("Arguments")
Found = TypeVar("Found")


def untraced(function: Callable[Arguments, Found]) -> Callable[Arguments, Found]:
    """A function that torch.compile calls and does not trace. torch.compiler.disable does the same,
    but imports the compiler at once, which takes longer than all else that `import harmonic`
    does."""

    @functools.wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Found:
        if torch.compiler.is_compiling():
            disable: Any = torch.compiler.disable  # Untyped in torch.
            found: Found = disable(function)(*args, **kwargs)
            return found
        return function(*args, **kwargs)

    return call


@functools.cache
def load(name: str) -> ModuleType | None:
    """The module of a compiled backend, or None where its package is not installed."""
    try:
        return importlib.import_module(f"{__package__}.backends.{name}")
    except ImportError:
        return None


def _numba_for(x: Tensor) -> ModuleType | None:
    """The module of Numba kernels where this process may run them on tensors like x, else None."""
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return None
    module = load("numba")
    return module if module and module.usable() else None


# It looks at values.
@untraced
def raw_values(
    x: Tensor, y: Tensor, kernel: str, options: dict[str, Any], y_is_finite: bool = False
) -> Tensor | None:
    """Raw values of all pairs by a compiled kernel, differentiable: (N, C), (V, C) -> (N, V), not
    floored. None where there is none.

    y_is_finite: the caller has looked at y, a pass over the table.
    """
    module = None if kernel in ("l2", "dot") else _numba_for(x)
    if module is None:
        return None
    found = module.find(kernel, options)
    # Compiled maxima lose a NaN.
    total = x.detach().sum()
    if not y_is_finite:
        total = total + y.detach().sum()
    if not found or not total.isfinite():
        return None
    raw: Tensor = module.Pairs.apply(x, y, kernel, found)
    return raw


def unit_vectors(x: Tensor) -> Tensor | None:
    """x over its Euclidean norms by a compiled kernel, differentiable: (..., C) -> (..., C). None
    where there is none or x is small."""
    if x.device.type == "cuda" and x.dtype == torch.float32:
        module = load("triton")
        return module.Unit.apply(x) if module and x.shape[-1] <= module.Unit.WIDEST else None
    module = _numba_for(x)
    return module.Unit.apply(x) if module and x.numel() >= module.ALONE else None
