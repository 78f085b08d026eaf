"""What computes a loss, and the choice between those that can: `harmonic_loss` makes a `Problem`,
`choose` finds a backend for it.

    chunked   plain PyTorch, any device and type: never holds more than a few chunks of rows
    numba     compiled kernels for a CPU in float32
    triton    compiled kernels for CUDA in float32

A backend is imported when it is first looked at, so that importing `harmonic` starts neither Numba
nor Triton.
"""

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
    """What a loss is, beside its tensors.

    name, options: of the distance, as in `resolve`. link: "harmonic", "softmax" or "control".
    parameters: the names of the map's trained settings. rows: how many rows of the table are
    prototypes; the rest is padding. products: how matrices are multiplied. ignore_index, reduction,
    impl, skip, check_finite: see `harmonic_loss`.
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

    def encode(self) -> str:
        """One line that `decode` reads: an operator of PyTorch takes text, but no objects."""
        options = " ".join(f"{key}={value!r}" for key, value in self.options.items())
        plain = [
            self.name,
            options,
            self.link,
            " ".join(self.parameters),
            self.rows,
            self.ignore_index,
            self.reduction,
            self.impl,
        ]
        return "|".join(
            str(part)
            for part in [*plain, repr(self.skip), self.products.encode(), int(self.check_finite)]
        )

    @staticmethod
    def decode(text: str) -> "Spec":
        """The spec that `encode` wrote."""
        (
            name,
            options,
            link,
            parameters,
            rows,
            ignore_index,
            reduction,
            impl,
            skip,
            products,
            check_finite,
        ) = text.split("|")
        pairs = (pair.split("=") for pair in options.split())
        return Spec(
            name,
            {key: float(value) for key, value in pairs},
            link,
            parameters.split(),
            int(rows),
            int(ignore_index),
            reduction,
            impl,
            float(skip),
            Products.decode(products),
            bool(int(check_finite)),
        )


@dataclass(frozen=True)
class Problem:
    """Losses to compute: the same for every backend.

    states: (N, C), prototypes: (V + padding, C), both float32 or both float64, on one device.
    targets: (N,) int64, for a backend in [0, V).
    strength: (), n or s; unused by a control. bias: (V,) or None, a control's. parameters: the
    trained settings of the distance's map, in the order of `spec.parameters`. seed: (), of the
    map's noise, or None. weights: (N,), of each loss in the sum that is differentiated; set before
    a backend sees the problem.
    finite: False where states or prototypes are known not to be finite.
    """

    states: Tensor
    prototypes: Tensor
    targets: Tensor
    strength: Tensor
    bias: Tensor | None
    parameters: list[Tensor]
    seed: Tensor | None
    spec: Spec
    weights: Tensor = None  # type: ignore[assignment]  # `autograd._weighed` sets it
    finite: bool = True

    @functools.cached_property
    def distance(self) -> Distance:
        """The row of the table."""
        return resolve(self.spec.name, **self.spec.options)[0]

    @functools.cached_property
    def kernel_options(self) -> dict[str, Any]:
        """What the distance's kernel takes."""
        distance, options = resolve(self.spec.name, **self.spec.options)
        return distance.kernel_options(options)

    def map_settings(self, parameters: list[Tensor]) -> dict[str, Any]:
        """What the distance's map takes, with these tensors as the trained ones."""
        distance, options = resolve(self.spec.name, **self.spec.options)
        settings = distance.map_options(options)
        settings |= dict(zip(self.spec.parameters, parameters, strict=True))
        if self.spec.products.name == "split" and distance.map and distance.map.multiplies:
            settings["products"] = self.spec.products
        return settings

    @property
    def padding(self) -> int:
        """Rows behind the prototypes."""
        return len(self.prototypes) - self.spec.rows


@dataclass(frozen=True)
class Gradients:
    """Of sum(weights * losses), with respect to the tensors of a problem; `bias` is None where it
    has none."""

    states: Tensor
    prototypes: Tensor
    strength: Tensor
    bias: Tensor | None
    parameters: list[Tensor]


@dataclass(frozen=True)
class Result:
    """losses: (N,), unweighted. gradients: None where they were not asked for."""

    losses: Tensor
    gradients: Gradients | None


@dataclass(frozen=True)
class Backend:
    """supports: (problem) -> None, or why it cannot compute it. loss: (problem, needs_grad) ->
    Result."""

    name: str
    supports: Callable[[Problem], str | None]
    loss: Callable[[Problem, bool], Result]


def choose(problem: Problem) -> Backend:
    """The backend that `spec.impl` names, or with "auto" the fastest one that can. ValueError for
    one that cannot."""
    from .chunked import BACKEND as chunked

    impl = problem.spec.impl
    if impl == "chunked":
        return chunked
    suited = "triton" if problem.states.device.type == "cuda" else "numba"
    name = suited if impl == "auto" else impl
    module = load(name)
    reason = f"the package {name} is not installed"
    if module is not None:
        backend: Backend = module.BACKEND
        found = backend.supports(problem)
        if found is None:
            return backend
        reason = found
    if impl != "auto" and problem.finite:
        raise ValueError(f"impl={impl!r}: {reason}. impl='chunked' computes any loss")
    return chunked
