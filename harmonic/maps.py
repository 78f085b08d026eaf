"""The maps of the table: what happens to states and prototypes alike before a kernel compares them.

A map takes vectors (..., C), a generator of noise or None, and its settings, and gives vectors
(..., C).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from .compiled import unit_vectors, untraced
from .precision import FLOAT32, Products, inner_products


@dataclass(frozen=True)
class Map:
    """A map and what is trained in it.

    function: (x, noise, **settings) -> mapped x, (..., C) -> (..., C). noise: a torch.Generator
        while training, else None. settings: the distance's options that its kernel does not take,
        and what `prepare` makes of the trained parameters.
    parameters: (C) -> {name: initial tensor}.
    prepare: (**parameters) -> the settings that the function takes in their place, computed once.
    noisy: it draws noise while training.
    cheap: a few operations a coordinate, so that it may be computed again to save memory.
    multiplies: its function takes `products`, too: how to multiply matrices, see `precision.py`.
    straight_through: its gradient is a surrogate's, not its derivative.
    """

    function: Callable[..., Tensor]
    parameters: Callable[[int], dict[str, Tensor]] = lambda dim: {}
    prepare: Callable[..., dict[str, Any]] = lambda **parameters: parameters
    noisy: bool = False
    cheap: bool = True
    multiplies: bool = False
    straight_through: bool = False


def unit(x: Tensor, order: int) -> Tensor:
    """x over its norm of that order, at any scale of x without over- or underflow; a row of zeros
    stays one."""
    size = x.detach().abs().amax(-1, keepdim=True)
    zero = size == 0
    # The result does not depend on the scale, so neither does its gradient.
    x = x / torch.where(zero, 1.0, size)
    return x / torch.where(zero, 1.0, torch.linalg.vector_norm(x, ord=order, dim=-1, keepdim=True))


def _normalize(x: Tensor, noise: Generator | None = None) -> Tensor:
    return unit(x, 2) if torch.compiler.is_exporting() else _fast_unit(x)


@untraced
def _fast_unit(x: Tensor) -> Tensor:
    compiled = unit_vectors(x)
    return unit(x, 2) if compiled is None else compiled


def _normalize_l1(x: Tensor, noise: Generator | None = None) -> Tensor:
    return unit(x.abs(), 1)


def _soft(x: Tensor, noise: Generator | None = None, t: float = 1.0) -> Tensor:
    return torch.sigmoid(x / t)


def _gumbel(x: Tensor, noise: Generator | None = None, t: float = 1.0) -> Tensor:
    """Binary Gumbel-softmax: the difference of two Gumbel variables is logistic noise, added while
    training only."""
    if noise is not None:
        u = torch.rand(x.shape, generator=noise, dtype=x.dtype, device=x.device)
        x = x + torch.logit(u.clamp(torch.finfo(x.dtype).eps, 1 - torch.finfo(x.dtype).eps))
    return torch.sigmoid(x / t)


def _hard(x: Tensor, noise: Generator | None = None, t: float = 1.0) -> Tensor:
    """1[x > 0] forward, the derivative of sigmoid(x / t) backward (straight-through)."""
    soft = torch.sigmoid(x / t)
    return (x > 0).to(x.dtype) + (soft - soft.detach())


EPSILON_FULL = 1e-6  # in P = A A^T + eps I, keeps P positive definite whatever A becomes


def _positive(factor: Tensor | None = None) -> dict[str, Tensor]:
    """Full Mahalanobis: -> L with P = L L' = A A' + eps I, from A. NaN where there is none, as for
    an A that is not finite."""
    if factor is None:
        return {}
    identity = torch.eye(len(factor), dtype=torch.float64, device=factor.device)
    if torch.compiler.is_exporting():
        # [A, sqrt(eps) I] is such an L, too, twice as wide; ONNX has no factorisation.
        beside = math.sqrt(EPSILON_FULL) * identity.to(factor.dtype)
        return {"factor": torch.cat((factor, beside), 1)}
    wide = factor.double()  # the factorisation needs the digits, not the distance
    triangle, failed = torch.linalg.cholesky_ex(wide @ wide.T + EPSILON_FULL * identity)
    return {"factor": torch.where(failed > 0, math.nan, triangle).to(factor.dtype)}


def _triangle(factor: Tensor | None = None) -> dict[str, Tensor]:
    return {} if factor is None else {"factor": factor.tril()}


def _linear(
    x: Tensor,
    noise: Generator | None = None,
    factor: Tensor | None = None,
    products: Products = FLOAT32,
) -> Tensor:
    if factor is None:
        return x
    if products is FLOAT32 or x.dtype != torch.float32:
        return x @ factor.to(x.dtype)
    return inner_products(x, factor.to(x.dtype).T, products)


def _diagonal(x: Tensor, noise: Generator | None = None, theta: Tensor | None = None) -> Tensor:
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
