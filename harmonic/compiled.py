"""Compiled kernels for raw values and unit vectors outside of a loss.

Distances and backends both import this file, so it imports neither.
"""

import functools
import importlib
import warnings
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


@functools.cache
def load(name: str) -> ModuleType | None:
    """The module of a compiled backend, or None if its package cannot be imported."""
    try:
        return importlib.import_module(f"{__package__}.backends.{name}")
    except ImportError as error:
        if error.name != name:  # It is there, but does not work.
            warnings.warn(f"the kernels of {name} are not used: {error}", stacklevel=2)
        return None


def transformed() -> bool:
    """Whether torch.func or forward-mode differentiation follows the operations. Our own operators
    have no rule for them, and a tangent would silently become 0."""
    if torch.compiler.is_compiling():
        return False
    levels = torch._C._functorch.peek_interpreter_stack()
    return levels is not None or torch.autograd.forward_ad._current_level >= 0


def _numba_for(x: Tensor) -> ModuleType | None:
    """The module of Numba kernels, or None if this process cannot run them on tensors like x."""
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return None
    module = load("numba")
    return module if module and module.usable() else None


def raw_values(
    x: Tensor, y: Tensor, kernel: str, options: dict[str, Any], y_is_finite: bool = False
) -> Tensor | None:
    """Raw values of all pairs, by a compiled kernel: (N, C), (V, C) -> (N, V).

    They are differentiable, and not raised to the floor. None if no compiled kernel can be used.
    y_is_finite: the caller knows that y is finite. This saves a pass over the table.
    """
    if torch.compiler.is_dynamo_compiling():
        from .graph_breaks import raw_values as untraced

        return untraced(x, y, kernel, options, y_is_finite)
    return _raw_values(x, y, kernel, options, y_is_finite)


# torch.compile cannot trace this, because it looks at values.
def _raw_values(
    x: Tensor, y: Tensor, kernel: str, options: dict[str, Any], y_is_finite: bool
) -> Tensor | None:
    module = None if kernel in ("l2", "dot") or transformed() else _numba_for(x)
    if module is None:
        return None
    found = module.find(kernel, options)
    # A compiled maximum would lose a NaN.
    total = x.detach().sum()
    if not y_is_finite:
        total = total + y.detach().sum()
    if not found or not total.isfinite():
        return None
    raw: Tensor = module.Pairs.apply(x, y, kernel, found, options)
    return raw


def unit_vectors(x: Tensor) -> Tensor | None:
    """x divided by its Euclidean norms, by a compiled kernel, differentiable: (..., C) -> (..., C).

    None if there is no compiled kernel for x, or if x is too small to profit from one.
    """
    if transformed():
        return None
    if x.device.type == "cuda" and x.dtype == torch.float32:
        module = load("triton")
        return module.Unit.apply(x) if module and x.shape[-1] <= module.Unit.WIDEST else None
    module = _numba_for(x)
    return module.Unit.apply(x) if module and x.numel() >= module.ALONE else None
