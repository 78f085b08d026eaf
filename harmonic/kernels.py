"""The kernels in plain PyTorch. A kernel gives the raw value of every pair of state and prototype.

    l2        sum (x - y)^2                     a matmul; the difference for pairs that cancel
    l2_plus   1 + sum (x - y)^2                 the same
    lp        sum |x - y|^p
    linf      max |x - y|
    lse       log sum exp(a |x - y|) / a
    canberra  sum |x - y| s^(q-1) [/ sum s^q],  s = max(|x| + |y|, floor)
    dot       x . y                             for controls: the dot product
    along     (x . y) / |x|                     for controls: the component of y along x

A kernel is one function `value(x, y, **options)` that reduces the last dimension of two
broadcastable tensors. Everything else follows from it. `pairs` evaluates it block by block, so the
(N, V, C) tensor of a broadcast never exists. The backward pass computes each block again. All of
this is exact, and works on any device.

The floor. The logarithm of a raw value follows, so a raw value of zero has to be replaced. The
floor is the smallest value that the number format can distinguish from zero at the scale of x and
y: `eps^k (value(x, 0) + value(y, 0))`. Here k is the power of the raw value: 2 for l2, p for lp,
else 1. The floor is relative, so homogeneous distances stay homogeneous. Below it the gradient is
zero.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .compiled import transformed
from .double_backward import plain_gradients, wants_graph
from .maps import unit
from .precision import FLOAT32, Products, inner_products

# Numbers in a block of (rows, prototypes, coordinates). 2^18 floats, 1 MiB, fit in a core's cache.
BLOCK = 2**18
GPU_BLOCK = 2**26
EXPORTED = 2**22  # Numbers for each state in a block of an exported program: 16 MiB.
# The matmul form of l2 loses log2((|h|^2 + |w|^2) / d^2) bits. Pairs that lose more than 4 bits are
# computed again from the difference.
NEAR = 2.0**-4


@dataclass(frozen=True)
class Kernel:
    """One kernel.

    value: the function (x, y, **options), (..., C), (..., C) -> (...).
    terms: what each coordinate contributes, from the same arguments -> (..., C). The terms add up
        to the raw value if that is a sum, and to 1 if it is a maximum.
    power: k in value(x, x + t d) ~ t^k for small t, a function of the options: 2 for a square.
    matmul: computes the raw values of all pairs with a matrix product; None if that is impossible.
    options: the names of its options.
    signed: raw values may be negative. Such a kernel is for controls only, and has no floor.
    """

    value: Callable[..., Tensor]
    terms: Callable[..., Tensor]
    power: Callable[..., float] = field(default=lambda **options: 1.0)
    matmul: Callable[[Tensor, Tensor, Products], Tensor] | None = None
    options: tuple[str, ...] = ()
    signed: bool = False


def _power(x: Tensor, p: float) -> Tensor:
    """x^p for x >= 0. At x = 0 the gradient is 0, even for p < 1 (its derivative is infinite)."""
    if p == 1:
        return x
    if p >= 1:
        return x.pow(p)
    zero = x == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, x).pow(p))


def _lp_terms(x: Tensor, y: Tensor, p: float = 1.0) -> Tensor:
    return _power((x - y).abs(), p)


def _canberra_terms(
    x: Tensor, y: Tensor, floor: float = 0.0, q: float = 0.0, weighted: bool = False
) -> Tensor:
    difference, s = (x - y).abs(), x.abs() + y.abs()
    if weighted and q > 4:
        # The ratio below does not depend on the scale of s, so neither does its gradient. At scale
        # 1 no power overflows.
        largest = s.detach().amax(-1, keepdim=True)
        scale = torch.where(largest == 0, 1.0, largest)
        difference, s = difference / scale, s / scale
    zero = s == 0
    s = s.clamp_min(floor) if floor else torch.where(zero, 1.0, s)  # So 0/0 is 0, as in SciPy.
    factor = s.pow(q - 1)
    if not weighted:
        return difference * factor
    total = torch.where(zero, 0.0, s * factor).sum(-1, keepdim=True)
    return difference * factor / total.clamp_min(torch.finfo(s.dtype).tiny)


def _canberra(x: Tensor, y: Tensor, **options: Any) -> Tensor:
    return _canberra_terms(x, y, **options).sum(-1)


def _linf_terms(x: Tensor, y: Tensor) -> Tensor:
    """1 at the first coordinate that has the maximum, and 0 elsewhere."""
    difference = (x - y).abs()
    return torch.zeros_like(difference).scatter_(-1, difference.argmax(-1, keepdim=True), 1.0)


def _dot_matmul(h: Tensor, w: Tensor, how: Products) -> Tensor:
    return h @ w.T if how is FLOAT32 else inner_products(h, w, how)


def l2_pairs(h: Tensor, w: Tensor, how: Products, squares: Tensor | None = None) -> Tensor:
    """Squared Euclidean distances of all pairs, raised to the floor: (N, C), (V, C) -> (N, V).

    how: the way to multiply matrices. squares: |w|^2 (V,), if it is known already.
    """
    hh = h.square().sum(-1, keepdim=True)
    ww = w.square().sum(-1) if squares is None else squares
    if how is FLOAT32:
        raw = torch.addmm(hh + ww, h, w.T, alpha=-2)
    else:
        raw = (hh + ww).sub(inner_products(h, w, how), alpha=2)
    if raw.is_meta:
        return raw
    if raw.numel() and (raw.detach().amin(-1, keepdim=True) > NEAR * (hh + ww.amax())).all():
        # No pair cancels and none is near the floor. This is so for almost every batch.
        return raw
    near = (raw < NEAR * (hh + ww)).nonzero(as_tuple=True)
    if near[0].numel() * h.shape[-1] > 16 * BLOCK:
        # Too many pairs cancel to gather them. All pairs are computed from their differences.
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
    """The raw values of x and the zero vector, without gradient: (..., C) -> (...)."""
    zero = torch.zeros((), dtype=x.dtype, device=x.device)
    rows = x.detach().reshape(-1, x.shape[-1])
    # On a GPU many small kernels take longer than few large ones.
    block = BLOCK if x.device.type == "cpu" else GPU_BLOCK
    parts = torch.split(rows, max(1, block // max(1, x.shape[-1])))
    found = [KERNELS[kernel].value(part, zero, **options) for part in parts]
    return torch.cat(found).view(x.shape[:-1])


def floor(kernel: str, x: Tensor, **options: Any) -> Tensor:
    """The part of the floor that one operand gives: eps^k value(x, 0). (N, C) -> (N,)."""
    share: float = torch.finfo(x.dtype).eps ** KERNELS[kernel].power(**options)
    return sizes(kernel, x, **options) * share


def above(raw: Tensor, low: Tensor) -> Tensor:
    """Raw values, and the floor `low` in place of those below it. There the gradient is 0."""
    low = low.clamp_min(torch.finfo(raw.dtype).tiny)
    return torch.where(raw < low, low, raw)  # In this order a NaN stays a NaN.


def pairs(
    x: Tensor, y: Tensor, kernel: str, options: dict[str, Any], products: Products = FLOAT32
) -> Tensor:
    """Raw values of all pairs, raised to the floor: (N, C), (V, C) -> (N, V).

    Needs memory for a few tensors (N, V), and for (N, V, C) if its gradient is differentiated.
    options: of the kernel. products: the way to multiply float32 matrices.
    """
    if torch.compiler.is_exporting():
        return _exported(x, y, kernel, options)
    how = products if x.dtype == torch.float32 else FLOAT32
    if torch.compiler.is_dynamo_compiling():
        from .graph_breaks import pairs as untraced

        return untraced(x, y, kernel, options, how)
    return _pairs(x, y, kernel, options, how)


def _exported(h: Tensor, w: Tensor, kernel: str, options: dict[str, Any]) -> Tensor:
    """`pairs` for torch.export, where no step may depend on the number of states or their values.

    Needs memory for (N, EXPORTED) numbers.
    """
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


# torch.compile cannot trace this well: the blocks are a Python loop, and which pairs of l2 cancel
# depends on the data.
def _pairs(
    x: Tensor, y: Tensor, kernel: str, options: dict[str, Any], products: Products
) -> Tensor:
    k = KERNELS[kernel]
    if k.matmul:
        return k.matmul(x, y, products)
    return floored(_blocks(x, y, k.value, **options), x, y, kernel, options)


def floored(raw: Tensor, x: Tensor, y: Tensor, kernel: str, options: dict[str, Any]) -> Tensor:
    """Raises the raw values (N, V) of all pairs x, y to their floor."""
    return above(raw, floor(kernel, x, **options)[:, None] + floor(kernel, y, **options))


def paired(h: Tensor, w: Tensor, kernel: str, options: dict[str, Any]) -> Tensor:
    """Raw values of rows paired by broadcasting: (..., C), (..., C) -> (...), with the floor."""
    raw = KERNELS[kernel].value(h, w, **options)
    if KERNELS[kernel].signed:
        return raw
    return above(raw, floor(kernel, h, **options) + floor(kernel, w, **options))


def _blocks(h: Tensor, w: Tensor, value: Callable[..., Tensor], **options: Any) -> Tensor:
    if transformed():  # torch.func has no rule for `_Blocks`.
        return value(h[:, None], w, **options)
    raw: Tensor = _Blocks.apply(h, w, value, options)  # type: ignore[no-untyped-call]  # torch
    return raw


class _Blocks(torch.autograd.Function):
    """`value` of all pairs, one cache-sized block at a time.

    The backward pass computes each block again and differentiates it.
    """

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
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        h, w = ctx.saved_tensors
        if wants_graph():
            dh, dw = plain_gradients(
                lambda h, w: ctx.value(h[:, None], w, **ctx.options), (h, w), slope
            )
            return dh, dw, None, None
        dh, dw = torch.zeros_like(h), torch.zeros_like(w)
        for rows, columns in _grid(h, w, 8):  # PyTorch keeps several numbers of each.
            with torch.enable_grad():
                x, y = h[rows].detach().requires_grad_(), w[columns].detach().requires_grad_()
                raw = ctx.value(x[:, None], y, **ctx.options)
            dx, dy = torch.autograd.grad(raw, (x, y), slope[rows, columns])
            dh[rows] += dx
            dw[columns] += dy
        return dh, dw, None, None


def _grid(h: Tensor, w: Tensor, parts: int = 1) -> Iterator[tuple[slice, slice]]:
    """Slices of rows and of prototypes. A block of pairs has about BLOCK numbers, or on a GPU
    GPU_BLOCK / parts."""
    block = BLOCK if h.device.type == "cpu" else GPU_BLOCK // parts
    least = max(1, min(8, len(h)))  # rows of a block
    width = max(1, min(len(w), block // (least * h.shape[-1])))
    height = max(1, block // (width * h.shape[-1]))
    for j in range(0, len(w), width):
        for i in range(0, len(h), height):
            yield slice(i, i + height), slice(j, j + width)
