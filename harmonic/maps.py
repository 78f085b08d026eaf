"""The maps of the table. A map changes states and prototypes before a kernel compares them.

A map is a function of vectors (..., C) and its settings. It returns vectors (..., C).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from .compiled import unit_vectors
from .precision import FLOAT32, Products, inner_products


@dataclass(frozen=True)
class Map:
    """A map and its trained parameters.

    function: (x, **settings) -> mapped x, (..., C) -> (..., C). settings: the options of the
        distance that its kernel does not take, and the result of `prepare`.
    parameters: a function from C to {name: initial tensor}.
    prepare: turns trained parameters into settings of the function, once for both operands.
    exported: `prepare` for torch.export of distances and logits, with operators that ONNX knows.
        Mapped vectors may have more coordinates then. None: `prepare`.
    noisy: whether the function also takes `noise`, a torch.Generator, while training.
    cheap: whether it takes only a few operations per coordinate. A cheap map is computed again
        where that saves memory.
    multiplies: whether the function also takes `products`, the way to multiply matrices; see
        `precision.py`.
    straight_through: whether the backward pass uses the gradient of a smooth function instead of
        its own.
    """

    function: Callable[..., Tensor]
    parameters: Callable[[int], dict[str, Tensor]] = lambda dim: {}
    prepare: Callable[..., dict[str, Any]] = lambda **parameters: parameters
    exported: Callable[..., dict[str, Any]] | None = None
    noisy: bool = False
    cheap: bool = True
    multiplies: bool = False
    straight_through: bool = False


def unit(x: Tensor, order: int) -> Tensor:
    """x divided by its norm of this order: (..., C) -> (..., C). A row of zeros stays zero.

    Nothing overflows or underflows, however large or small x is.
    """
    size = x.detach().abs().amax(-1, keepdim=True)
    zero = size == 0
    # The result does not depend on the scale, so neither does its gradient.
    x = x / torch.where(zero, 1.0, size)
    return x / torch.where(zero, 1.0, torch.linalg.vector_norm(x, ord=order, dim=-1, keepdim=True))


def _normalize(x: Tensor) -> Tensor:
    if torch.compiler.is_exporting():
        return unit(x, 2)
    if torch.compiler.is_dynamo_compiling():
        from .graph_breaks import fast_unit

        return fast_unit(x)
    return _fast_unit(x)


def _fast_unit(x: Tensor) -> Tensor:
    compiled = unit_vectors(x)
    return unit(x, 2) if compiled is None else compiled


def _normalize_l1(x: Tensor) -> Tensor:
    return unit(x.abs(), 1)


def _soft(x: Tensor, t: float = 1.0) -> Tensor:
    return torch.sigmoid(x / t)


def _gumbel(x: Tensor, t: float = 1.0, noise: Generator | None = None) -> Tensor:
    """Binary Gumbel-softmax. Its noise, the difference of two Gumbel variables, is logistic."""
    if noise is not None:
        u = torch.rand(x.shape, generator=noise, dtype=x.dtype, device=x.device)
        x = x + torch.logit(u.clamp(torch.finfo(x.dtype).eps, 1 - torch.finfo(x.dtype).eps))
    return torch.sigmoid(x / t)


def _hard(x: Tensor, t: float = 1.0) -> Tensor:
    """1[x > 0] in the forward pass, and the gradient of sigmoid(x / t) in the backward pass."""
    soft = torch.sigmoid(x / t)
    return (x > 0).to(x.dtype) + (soft - soft.detach())


# In P = A A' + eps I: keeps P positive definite, unless the norm of A is above some 10^4.
EPSILON_FULL = 1e-6


def _positive(factor: Tensor | None = None) -> dict[str, Tensor]:
    """Full Mahalanobis: from A (C, C), the L of P = A A' + eps I = L L'. NaN if A is not finite."""
    if factor is None:
        return {}
    place = "cpu" if factor.device.type == "mps" else factor.device  # MPS has no float64.
    identity = torch.eye(len(factor), dtype=torch.float64, device=place)
    wide = factor.to(place).double()  # Only the factorisation needs float64.
    triangle, failed = torch.linalg.cholesky_ex(wide @ wide.T + EPSILON_FULL * identity)
    return {"factor": torch.where(failed > 0, math.nan, triangle).to(factor)}


def _positive_exported(factor: Tensor | None = None) -> dict[str, Tensor]:
    """`_positive` for ONNX, which has no factorisation: L = [A, sqrt(eps) I], twice as wide."""
    if factor is None:
        return {}
    beside = math.sqrt(EPSILON_FULL) * torch.eye(len(factor)).to(factor)
    return {"factor": torch.cat((factor, beside), 1)}


def _triangle(factor: Tensor | None = None) -> dict[str, Tensor]:
    return {} if factor is None else {"factor": factor.tril()}


def _linear(x: Tensor, factor: Tensor | None = None, products: Products = FLOAT32) -> Tensor:
    if factor is None:
        return x
    if products is FLOAT32 or x.dtype != torch.float32:
        return x @ factor.to(x.dtype)
    return inner_products(x, factor.to(x.dtype).T, products)


def _diagonal(x: Tensor, theta: Tensor | None = None) -> Tensor:
    return x if theta is None else x * (theta.to(x.dtype) / 2).exp()


UNIT = Map(_normalize)
UNIT_L1 = Map(_normalize_l1)
SIGMOID = Map(_soft)
NOISY_SIGMOID = Map(_gumbel, noisy=True)
SIGN = Map(_hard, straight_through=True)
FULL = Map(
    _linear,
    parameters=lambda dim: {"factor": torch.eye(dim) * math.sqrt(1 - EPSILON_FULL)},
    prepare=_positive,
    exported=_positive_exported,
    cheap=False,
    multiplies=True,
)
TRIANGULAR = Map(
    _linear,
    parameters=lambda dim: {"factor": torch.eye(dim)},
    prepare=_triangle,
    cheap=False,
    multiplies=True,
)
DIAGONAL = Map(_diagonal, parameters=lambda dim: {"theta": torch.zeros(dim)})
