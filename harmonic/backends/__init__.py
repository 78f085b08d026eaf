"""Backends compute losses and gradients. `harmonic_loss` makes a `Problem`, and `choose` finds a
backend for it.

    chunked   plain PyTorch, for any device and type; holds only a few chunks of rows
    numba     compiled kernels for a CPU, in float32
    triton    compiled kernels for CUDA, in float32

A backend is imported when it is first needed. So importing `harmonic` starts neither Numba nor
Triton.
"""

import ast
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..compiled import load
from ..distances import Distance, resolve
from ..precision import Products

IMPLS = ("auto", "dense", "chunked", "numba", "triton")


@dataclass(frozen=True)
class Spec:
    """The settings of a loss. Its tensors are in `Problem`.

    name, options: of the distance, as in `resolve`.
    link: "harmonic", "softmax" or "control".
    parameters: the names of the trained settings of the map.
    rows: the first `rows` rows of the table are prototypes, and the others are padding.
    products: how matrices are multiplied.
    ignore_index, reduction, impl, skip, check_finite: see `harmonic_loss`.
    """

    name: str
    options: dict[str, float]
    link: str
    parameters: list[str]
    rows: int
    ignore_index: int
    reduction: str
    impl: str
    skip: float
    products: Products
    check_finite: bool

    def encode(self) -> tuple[str, int, int, float]:
        """The spec as arguments of an operator of PyTorch, which takes text and numbers only.

        torch.compile may make these numbers symbolic, so they are not in the text.
        """
        # torch.compile cannot trace repr(value) of a symbolic number, but the f-string.
        fields = {
            "name": _plain(self.name),
            "options": {key: f"{value!r}" for key, value in self.options.items()},
            "link": _plain(self.link),
            "parameters": self.parameters,
            "reduction": _plain(self.reduction),
            "impl": _plain(self.impl),
            "products": self.products.encode(),
            "check_finite": bool(self.check_finite),
        }
        return repr(fields), self.rows, self.ignore_index, self.skip

    @staticmethod
    def decode(text: str, rows: int, ignore_index: int, skip: float) -> "Spec":
        """The spec that `encode` wrote."""
        fields = dict(_fields(text), rows=rows, ignore_index=ignore_index, skip=skip)
        fields["options"] = {key: float(value) for key, value in fields["options"].items()}
        fields["parameters"] = list(fields["parameters"])
        fields["products"] = Products.decode(fields["products"])
        return Spec(**fields)


def _plain(text: str) -> str:
    """The same text as a plain str: it may be a member of an enumeration, or of NumPy."""
    return "".join([text])


@functools.lru_cache(maxsize=256)
def _fields(text: str) -> dict[str, Any]:
    found: dict[str, Any] = ast.literal_eval(text)
    return found


@dataclass(frozen=True)
class Problem:
    """The losses to compute, in the same form for every backend.

    states: (N, C), prototypes: (V + padding, C), both float32 or both float64, on one device.
    targets: (N,) int64. When a backend gets the problem, all are in [0, V).
    strength: (), n or s; a control does not use it.
    bias: (V,) or None; for controls only.
    parameters: the trained settings of the map, in the order of `spec.parameters`.
    seed: (), for the noise of the map, or None.
    frozen: whether the gradient of the prototypes is not wanted, nor that of the parameters.
    weights: (N,). The gradients are those of sum(weights * losses). `autograd.py` sets them.
    finite: False if states or prototypes are known not to be finite.
    """

    states: Tensor
    prototypes: Tensor
    targets: Tensor
    strength: Tensor
    bias: Tensor | None
    parameters: list[Tensor]
    seed: Tensor | None
    spec: Spec
    frozen: bool = False
    weights: Tensor = None  # type: ignore[assignment]  # `autograd._weighed` sets it
    finite: bool = True

    @functools.cached_property
    def distance(self) -> Distance:
        """The row of the table."""
        return resolve(self.spec.name, **self.spec.options)[0]

    @functools.cached_property
    def kernel_options(self) -> dict[str, Any]:
        """The options of the distance's kernel."""
        distance, options = resolve(self.spec.name, **self.spec.options)
        return distance.kernel_options(options)

    def map_settings(self, parameters: list[Tensor]) -> dict[str, Any]:
        """The settings of the distance's map, with these trained parameters."""
        distance, options = resolve(self.spec.name, **self.spec.options)
        settings = distance.map_options(options)
        settings |= dict(zip(self.spec.parameters, parameters, strict=True))
        if self.spec.products.name == "split" and distance.map and distance.map.multiplies:
            settings["products"] = self.spec.products
        return settings

    @property
    def padding(self) -> int:
        """The number of rows after the prototypes."""
        return len(self.prototypes) - self.spec.rows


@dataclass(frozen=True)
class Gradients:
    """The gradients of sum(weights * losses) with respect to the tensors of a problem.

    Each has the shape of its tensor. `bias` is None if the problem has none, and `prototypes` if
    they are frozen.
    """

    states: Tensor
    prototypes: Tensor | None
    strength: Tensor
    bias: Tensor | None
    parameters: list[Tensor]


@dataclass(frozen=True)
class Result:
    """losses: (N,), without weights. gradients: None if they were not asked for."""

    losses: Tensor
    gradients: Gradients | None


@dataclass(frozen=True)
class Backend:
    """A way to compute losses.

    supports: (problem) -> None, or the reason why the backend cannot compute it.
    loss: (problem, needs_grad) -> Result.
    """

    name: str
    supports: Callable[[Problem], str | None]
    loss: Callable[[Problem, bool], Result]


def choose(problem: Problem) -> Backend:
    """The backend that `spec.impl` names, or for "auto" the fastest one that supports the problem.

    Raises: ValueError if the named backend does not support it.
    """
    from .chunked import BACKEND as chunked

    impl = problem.spec.impl
    if impl == "chunked":
        return chunked
    suited = "triton" if problem.states.device.type == "cuda" else "numba"
    name = suited if impl == "auto" else impl
    module = load(name)
    reason = f"the package {name} cannot be imported"
    if module is not None:
        backend: Backend = module.BACKEND
        found = backend.supports(problem)
        if found is None:
            return backend
        reason = found
    if impl != "auto" and problem.finite:
        raise ValueError(f"impl={impl!r}: {reason}. impl='chunked' computes any loss")
    return chunked
