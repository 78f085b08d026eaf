"""The kernels in plain PyTorch: raw values for all (token, prototype) pairs, exact and
differentiable, on any device.

    l2        sum (x - y)^2                     one matmul, and the difference where that cancels
    l2_plus   1 + sum (x - y)^2                 the same
    lp        sum |x - y|^p
    linf      max |x - y|
    lse       log sum exp(a |x - y|) / a
    canberra  sum |x - y| s^(q-1) [/ sum s^q],  s = max(|x| + |y|, floor)
    dot       x . y                             no distance: the kernel of the dot-product controls
    along     (x . y) / |x|                     no distance: y along the direction of x

A kernel is one function `value(x, y, **options)` that reduces the last dimension of two
broadcastable tensors. Everything else follows from it: `pairs` evaluates it block by block, so that
the (N, V, C) tensor of a broadcast never exists, and differentiates it by recomputing each block.

The floor. A logarithm follows, so a raw value of exactly zero is replaced by the smallest one the
number format can tell from zero at the scale of its operands: `eps^k (value(h, 0) + value(w, 0))`,
k the power of the raw value (2 for l2, p for lp, else 1). Being relative it keeps homogeneous
distances homogeneous. Below the floor the gradient is zero.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .compiled import untraced
from .maps import unit
from .precision import FLOAT32, Products, inner_products

# A block of (rows, prototypes, coordinates) small enough to stay in a core's cache: 2^18 floats are
# 1 MiB.
BLOCK = 2**18
EXPORTED = 2**22  # numbers of an exported program's blocks for each state: 16 MiB
# The matmul form of l2 loses log2((|h|^2 + |w|^2) / d^2) bits. Pairs that lose more than 4 are
# computed again from the difference.
NEAR = 2.0**-4


@dataclass(frozen=True)
class Kernel:
    """`value(x, y, **options)`: (..., C), (..., C) -> (...). `terms`: the same arguments -> (...,
    C), what each coordinate contributes; they add up to the raw value for the sums and to 1 for the
    maxima. `power`: the raw value's degree in the scale of x and y. `options`: the names of the
    numbers it takes. `matmul`: the raw values of all pairs by a matrix product, where there is such
    a form. `signed`: raw values may be negative, so it is no distance's and has no floor."""

    value: Callable[..., Tensor]
    terms: Callable[..., Tensor]
    power: Callable[..., float] = field(default=lambda **options: 1.0)
    matmul: Callable[[Tensor, Tensor, Products], Tensor] | None = None
    options: tuple[str, ...] = ()
    signed: bool = False


def _power(x: Tensor, p: float) -> Tensor:
    """x^p for x >= 0, with gradient 0 where x = 0 (for p < 1 the derivative is unbounded there)."""
    if p == 1:
        return x
    if p >= 1:
        return x.pow(p)
    zero = x == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, x).pow(p))


def _lp_terms(x: Tensor, y: Tensor, p: float = 1.0) -> Tensor:
    return _power((x - y).abs(), p)


def _canberra_parts(x: Tensor, y: Tensor, floor: float, q: float) -> tuple[Tensor, Tensor, Tensor]:
    s = x.abs() + y.abs()
    s = s.clamp_min(floor) if floor else torch.where(s == 0, 1.0, s)  # 0/0 = 0, as in scipy
    return (x - y).abs(), s, s.pow(q - 1)


def _canberra_terms(
    x: Tensor, y: Tensor, floor: float = 0.0, q: float = 0.0, weighted: bool = False
) -> Tensor:
    difference, s, factor = _canberra_parts(x, y, floor, q)
    return difference * factor / ((s * factor).sum(-1, keepdim=True) if weighted else 1.0)


def _canberra(x: Tensor, y: Tensor, **options: Any) -> Tensor:
    return _canberra_terms(x, y, **options).sum(-1)


def _linf_terms(x: Tensor, y: Tensor) -> Tensor:
    """One at the coordinate that attains the maximum (the first, if several do), zero elsewhere."""
    difference = (x - y).abs()
    return torch.zeros_like(difference).scatter_(-1, difference.argmax(-1, keepdim=True), 1.0)


def _dot_matmul(h: Tensor, w: Tensor, how: Products) -> Tensor:
    return h @ w.T if how is FLOAT32 else inner_products(h, w, how)


def l2_pairs(h: Tensor, w: Tensor, how: Products, squares: Tensor | None = None) -> Tensor:
    """Squared Euclidean distances of all pairs, floored: (N, C), (V, C) -> (N, V).

    squares: |w|^2 (V,) where it is known.
    """
    hh = h.square().sum(-1, keepdim=True)
    ww = w.square().sum(-1) if squares is None else squares
    if how is FLOAT32:
        raw = torch.addmm(hh + ww, h, w.T, alpha=-2)
    else:
        raw = (hh + ww).sub(inner_products(h, w, how), alpha=2)
    if raw.numel() and (raw.detach().amin(-1, keepdim=True) > NEAR * (hh + ww.amax())).all():
        # No pair cancels, none is near the floor: one pass settles it for almost every batch.
        return raw
    near = (raw < NEAR * (hh + ww)).nonzero(as_tuple=True)
    if near[0].numel() * h.shape[-1] > 16 * BLOCK:
        # Nearly everything is near: no gather, all of it from the differences.
        raw = _blocks(h, w, KERNELS["l2"].value)
    elif near[0].numel():
        raw = raw.index_put(near, KERNELS["l2"].value(h[near[0]], w[near[1]]))
    if squares is None:
        low = floor("l2", w)
    else:
        low = squares * torch.finfo(w.dtype).eps ** 2
    return above(raw, floor("l2", h)[:, None] + low)


def _l2_plus_terms(x: Tensor, y: Tensor) -> Tensor:
    return (x - y).square() + 1 / x.shape[-1]


def _along_terms(x: Tensor, y: Tensor) -> Tensor:
    return unit(x, 2) * y


KERNELS = {
    "l2": Kernel(
        lambda x, y: (x - y).square().sum(-1),
        lambda x, y: (x - y).square(),
        lambda: 2.0,
        l2_pairs,
    ),
    "lp": Kernel(
        lambda x, y, p=1.0: _lp_terms(x, y, p).sum(-1), _lp_terms, lambda p=1.0: p, options=("p",)
    ),
    "linf": Kernel(lambda x, y: (x - y).abs().amax(-1), _linf_terms),
    "lse": Kernel(
        lambda x, y, a=10.0: (a * (x - y).abs()).logsumexp(-1) / a,
        lambda x, y, a=10.0: (a * (x - y).abs()).softmax(-1),
        options=("a",),
    ),
    "canberra": Kernel(_canberra, _canberra_terms, options=("floor", "q", "weighted")),
    "l2_plus": Kernel(
        lambda x, y: 1 + (x - y).square().sum(-1),
        _l2_plus_terms,
        lambda: 2.0,
        lambda h, w, how: 1 + l2_pairs(h, w, how),
    ),
    "dot": Kernel(
        lambda x, y: (x * y).sum(-1), lambda x, y: x * y, matmul=_dot_matmul, signed=True
    ),
    "along": Kernel(
        lambda x, y: _along_terms(x, y).sum(-1),
        _along_terms,
        matmul=lambda h, w, how: _dot_matmul(unit(h, 2), w, how),
        signed=True,
    ),
}


def sizes(kernel: str, x: Tensor, **options: Any) -> Tensor:
    """value(x, 0), a few rows at a time, without gradient: (..., C) -> (...)."""
    zero = torch.zeros((), dtype=x.dtype, device=x.device)
    rows = x.detach().reshape(-1, x.shape[-1])
    parts = torch.split(rows, max(1, BLOCK // max(1, x.shape[-1])))
    found = [KERNELS[kernel].value(part, zero, **options) for part in parts]
    return torch.cat(found).view(x.shape[:-1])


def floor(kernel: str, x: Tensor, **options: Any) -> Tensor:
    """The share of one operand in the floor: (N, C) -> (N,)."""
    share: float = torch.finfo(x.dtype).eps ** KERNELS[kernel].power(**options)
    return sizes(kernel, x, **options) * share


def above(raw: Tensor, low: Tensor) -> Tensor:
    """raw where it exceeds the floor `low`, else `low` (no gradient there)."""
    low = low.clamp_min(torch.finfo(raw.dtype).tiny)
    return torch.where(raw < low, low, raw)  # this order lets a NaN through: it is never hidden


def pairs(
    x: Tensor, y: Tensor, kernel: str, options: dict[str, Any], products: Products = FLOAT32
) -> Tensor:
    """Raw values of every pair, floored: (N, C), (V, C) -> (N, V). Differentiable once. Extra
    memory: a few (N, V).

    options: of the kernel. products: how float32 matrices are multiplied.
    """
    if torch.compiler.is_exporting():
        return _exported(x, y, kernel, options)
    how = products if x.dtype == torch.float32 else FLOAT32
    raw: Tensor = _pairs(x, y, kernel, options, how)
    return raw


def _exported(h: Tensor, w: Tensor, kernel: str, options: dict[str, Any]) -> Tensor:
    """`pairs` for torch.export: no step depends on the number of states or on their values. Holds
    (N, EXPORTED) numbers at a time."""
    k = KERNELS[kernel]
    if k.signed and k.matmul:
        return k.matmul(h, w, FLOAT32)
    hh, ww = k.value(h, h.new_zeros(()), **options)[:, None], k.value(w, w.new_zeros(()), **options)
    low = torch.finfo(h.dtype).eps ** k.power(**options) * (hh + ww)
    if kernel == "l2":
        raw = torch.addmm(hh + ww, h, w.T, alpha=-2)
        rows, columns = (raw < NEAR * (hh + ww)).nonzero(as_tuple=True)
        raw = raw.index_put((rows, columns), k.value(h[rows], w[columns]))
    else:
        parts = torch.split(w, max(1, EXPORTED // w.shape[1]))
        raw = torch.cat([k.value(h[:, None], part, **options) for part in parts], 1)
    return above(raw, low)


# Blocks are a Python loop and the near pairs of l2 depend on the data; neither is worth tracing.
@untraced
def _pairs(
    x: Tensor, y: Tensor, kernel: str, options: dict[str, Any], products: Products
) -> Tensor:
    k = KERNELS[kernel]
    if k.matmul:
        return k.matmul(x, y, products)
    return floored(_blocks(x, y, k.value, **options), x, y, kernel, options)


def floored(raw: Tensor, x: Tensor, y: Tensor, kernel: str, options: dict[str, Any]) -> Tensor:
    """Raw values (N, V) of all pairs, raised to their floor."""
    return above(raw, floor(kernel, x, **options)[:, None] + floor(kernel, y, **options))


def paired(h: Tensor, w: Tensor, kernel: str, options: dict[str, Any]) -> Tensor:
    """Raw values of rows paired by broadcasting, floored: (..., C), (..., C) -> (...)."""
    raw = KERNELS[kernel].value(h, w, **options)
    if KERNELS[kernel].signed:
        return raw
    return above(raw, floor(kernel, h, **options) + floor(kernel, w, **options))


def _blocks(h: Tensor, w: Tensor, value: Callable[..., Tensor], **options: Any) -> Tensor:
    raw: Tensor = _Blocks.apply(h, w, value, options)  # type: ignore[no-untyped-call]  # torch
    return raw


class _Blocks(torch.autograd.Function):
    """`value` of all pairs, one cache-sized block at a time; the backward pass recomputes each
    block and differentiates it."""

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, w: Tensor, value: Callable[..., Tensor], options: dict[str, Any]
    ) -> Tensor:
        ctx.save_for_backward(h, w)
        ctx.value, ctx.options = value, options
        raw = h.new_empty(len(h), len(w))
        for rows, columns in _grid(h, w):
            raw[rows, columns] = value(h[rows, None], w[columns], **options)
        return raw

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor, None, None]:
        h, w = ctx.saved_tensors
        dh, dw = torch.zeros_like(h), torch.zeros_like(w)
        for rows, columns in _grid(h, w):
            with torch.enable_grad():
                x, y = h[rows].detach().requires_grad_(), w[columns].detach().requires_grad_()
                raw = ctx.value(x[:, None], y, **ctx.options)
            dx, dy = torch.autograd.grad(raw, (x, y), slope[rows, columns])
            dh[rows] += dx
            dw[columns] += dy
        return dh, dw, None, None


def _grid(h: Tensor, w: Tensor) -> Iterator[tuple[slice, slice]]:
    """Slices of rows and of prototypes whose blocks hold about BLOCK elements."""
    width = max(1, min(len(w), BLOCK // (8 * h.shape[-1])))
    height = max(1, BLOCK // (width * h.shape[-1]))
    for j in range(0, len(w), width):
        for i in range(0, len(h), height):
            yield slice(i, i + height), slice(j, j + width)
