"""The loss and its gradients on a CUDA device: Triton kernels for every distance.

Rows are processed in chunks. A chunk holds the raw values of its pairs, R rows x V prototypes, and
turns them in place into slopes dL/draw:

    torch.mm    For l2 and dot: inner products.
    _tile       A block of pairs: raw values, logits, and the block's part of each row's
                log-sum-exp.
    _slopes     Raw values to dL/draw, and their sums over rows and over prototypes. The gradients
                of strength, bias and denominator are made of those sums.
    torch.mm    For l2 and dot: dL/draw to dx and dy.
    _gradient   For all other kernels: dL/draw to dx. The same template gives dy, with x and y
                exchanged, because every term is symmetric.

A kernel is a *term* t(x, y, p), summed over coordinates, and a *slope*, which adds a * dt/dx to a
total. Both are put into the templates at compile time. So a new kernel is two functions and a row
of `_find`. p is the only number of a kernel: a power, a sharpness, a floor or a sign.

Precision:

- Everything is float32, except the operands of matrix products, which precision.py rounds or
  splits. Their sums are float32 too.
- Logits are relative to the nearest prototype of the row. With exponents of hundreds, log d itself
  would lose digits that the logarithm of a ratio keeps.
- Sums over coordinates, rows and prototypes are added up in slices, for the same reason.
- For l2, a large offset that all vectors share is subtracted first. It would cost the products
  their last digits.
- If the difference of a pair cancels, l2 computes its block from the differences, and the gradients
  too (see kernels.py).
- A NaN stays a NaN. There are no atomics, so every run gives the same result.

The kernels were compared with float64 on an H200 and in Triton's interpreter. Block sizes, warps
and unrolling were chosen by timing on the H200 (LOG.md). lse, square and unnamed powers are
unrolled less since then. `benchmarks.gpu_compile` lists the registers and spills of every variant.
"""

import math
import os
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from ..double_backward import plain_gradients, wants_graph
from ..kernels import KERNELS, NEAR, sizes
from ..links import log_ratio
from ..maps import unit
from ..precision import FLOAT32
from . import Backend, Problem, Result
from .mapped import Sides

# Pairs of a chunk: 512 MiB of raw values. linf and lse need twice that, and so do l2 and dot with
# split slopes. A chunk has at most 2^16 rows, so that it stays small for few prototypes.
CHUNK = 2**27
CHUNK_ROWS = 2**16
# The block of a program is BLOCK rows x BLOCK prototypes (in `_gradient`, BLOCK coordinates), 8 to
# 32 numbers for each thread. Sums are added up in slices of BLOCK. Some of their steps are
# unrolled, so that loads are issued early.
BLOCK = 64
MOST_BLOCKS = 65_535  # CUDA's limit for a launch, along prototypes.
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


def _log1p_remainder(f):
    """(log(1 + f) - f) / f^2."""
    return np.where(abs(f) < 1e-4, -0.5 + f / 3, (np.log1p(f) - f) / np.where(f == 0, 1, f) ** 2)


# The polynomial through the values at the Chebyshev nodes of [-1/4, 1/2], constant first.
L0, L1, L2, L3, L4, L5, L6, L7, L8 = (
    tl.constexpr(float(c))
    for c in np.polynomial.Chebyshev.interpolate(_log1p_remainder, 8, [-0.25, 0.5])
    .convert(kind=np.polynomial.Polynomial)
    .coef
)
LOG_2 = tl.constexpr(math.log(2) / 2**23)  # `_log1p` has k times 2^23.


# Terms and slopes
#
# A term is t(x, y, p). A slope adds a * dt/dx to a total. They use only additions and multiply-adds
# where possible. In a cycle a GPU does twice as many of these as comparisons, selections and
# maxima, and eight times as many as roots, exponentials and reciprocals.
#
# kept: a second number of the pair, which some slopes need. c: the coordinate, as a float.


@triton.jit
def _step(d):
    """0, 1/2 or 1 where d is negative, 0 or positive.

    This is one multiply-add, because clamping to [0, 1] is free. For a NaN it is 0; the slope `a`
    is NaN then.
    """
    return tl.clamp(tl.fma(d, 2.0**127, 0.5), 0.0, 1.0)


@triton.jit
def _sign(d):
    return tl.fma(_step(d), 2.0, -1.0)


@triton.jit
def _l1_term(x, y, p):
    return tl.abs(x - y)


@triton.jit
def _l1_slope(total, x, y, a, kept, c, p):
    """Adds 2 a step. The slope is a sign = 2 a step - a; the host subtracts the sum of all a."""
    return tl.fma(2.0 * a, _step(x - y), total)


@triton.jit
def _square_term(x, y, p):
    return (x - y) * (x - y)


@triton.jit
def _square_slope(total, x, y, a, kept, c, p):
    return tl.fma(2.0 * a, x - y, total)


@triton.jit
def _inverse_root(d):
    """1 / sqrt(|d|), bounded at 0."""
    return tl.rsqrt(tl.maximum(tl.abs(d), 1e-30))


@triton.jit
def _half_term(x, y, p):
    return tl.sqrt(tl.abs(x - y))


@triton.jit
def _half_slope(total, x, y, a, kept, c, p):
    d = x - y
    r = _inverse_root(d)
    return tl.fma(0.5 * a, d * r * r * r, total)  # 0 at d = 0, not infinite.


@triton.jit
def _three_halves_term(x, y, p):
    d = tl.abs(x - y)
    return d * tl.sqrt(d)


@triton.jit
def _three_halves_slope(total, x, y, a, kept, c, p):
    d = x - y
    return tl.fma(1.5 * a, d * _inverse_root(d), total)


@triton.jit
def _cube_term(x, y, p):
    d = tl.abs(x - y)
    return d * d * d


@triton.jit
def _cube_slope(total, x, y, a, kept, c, p):
    d = x - y
    return tl.fma(3.0 * a, d * tl.abs(d), total)


@triton.jit
def _power(d, p):
    return tl.exp2(p * tl.log2(d))


@triton.jit
def _power_term(x, y, p):
    return _power(tl.abs(x - y), p)


@triton.jit
def _power_slope(total, x, y, a, kept, c, p):
    d = x - y
    return total + tl.where(d == 0.0, 0.0, p * a * _sign(d) * _power(tl.abs(d), p - 1))


@triton.jit
def _maximum_slope(total, x, y, a, kept, c, p):
    """The gradient of a maximum goes to the first coordinate that has it, `kept`.

    a has the sign of the difference there. p is 1, or -1 if x and y are exchanged.
    """
    return tl.fma(p * a, tl.clamp(1.0 - tl.abs(kept - c), 0.0, 1.0), total)


@triton.jit
def _smooth_slope(total, x, y, a, kept, c, p):
    """The softmax weight of a coordinate. `kept` is the value log sum exp(p |x - y|) / p."""
    d = x - y
    return tl.fma(a * _sign(d), tl.exp(p * (tl.abs(d) - kept)), total)


@triton.jit
def _inverse(x):
    """1 / x, for positive x, as the square of 1 / sqrt(x).

    The division operator, which is right for every exponent, takes ten instructions.
    """
    r = tl.rsqrt(x)
    return r * r


@triton.jit
def _canberra_term(x, y, p):
    return tl.abs(x - y) * _inverse(tl.maximum(tl.abs(x) + tl.abs(y), p))


@triton.jit
def _canberra_slope(total, x, y, a, kept, c, p):
    d = x - y
    size = tl.abs(x) + tl.abs(y)
    inverse = _inverse(tl.maximum(size, p))
    # Below the floor p the denominator is constant.
    ratio = tl.where(size >= p, tl.abs(d) * inverse, 0.0)
    return tl.fma(a * inverse, tl.fma(-ratio, _sign(x), _sign(d)), total)


class Recipe(NamedTuple):
    """How the templates make a kernel of kernels.py.

    mode: how a block of raw values is computed: "dot", "l2", "sum", "linf" or "lse".
    term, slope, p: see the top of this file.
    exchanged: p is multiplied by this if x and y are exchanged.
    remainder: whether the host has to subtract the sum of all a from the slopes.
    unroll: how many steps are unrolled. It is limited by registers.
    """

    mode: str
    term: triton.JITFunction | None = None
    slope: triton.JITFunction | None = None
    p: float = 0.0
    exchanged: float = 1.0
    remainder: bool = False
    unroll: int = 8


class Epilogue(NamedTuple):
    """The settings that turn raw values into logits.

    d = (factor raw)^root / max(|u + v|, floor); without terms u, v there is no denominator.
    logit = -n log d for the link "harmonic", -s d for "softmax" and raw + bias for "control".
    options: of the kernel.
    """

    kernel: str
    options: dict
    link: str
    factor: float
    root: float
    floor: float


def _find(epilogue) -> Recipe | None:
    """The recipe of a kernel, or None if there is none for all of its options."""
    kernel, options = epilogue.kernel, dict(epilogue.options)
    if kernel == "lp":
        p = float(options.pop("p", 1.0))
        named = {
            0.5: Recipe("sum", _half_term, _half_slope),
            1.0: Recipe("sum", _l1_term, _l1_slope, remainder=True),
            1.5: Recipe("sum", _three_halves_term, _three_halves_slope),
            2.0: Recipe("sum", _square_term, _square_slope, unroll=4),
            3.0: Recipe("sum", _cube_term, _cube_slope),
        }
        found = named.get(p, Recipe("sum", _power_term, _power_slope, p, unroll=1))
    elif kernel == "lse":
        found = Recipe("lse", _l1_term, _smooth_slope, float(options.pop("a", 10.0)), unroll=1)
    elif kernel == "canberra":
        # With this floor 0/0 is 0, as in SciPy.
        found = Recipe(
            "sum", _canberra_term, _canberra_slope, max(options.pop("floor", 0.0), 1e-30)
        )
    else:
        found = {
            "dot": Recipe("dot"),
            "l2": Recipe("l2", _square_term, _square_slope, unroll=4),
            "linf": Recipe("linf", _l1_term, _maximum_slope, 1.0, exchanged=-1.0),
        }.get(kernel)
    return None if options else found


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Kernels then run in Python, on a CPU.


def _epilogue(problem: Problem) -> Epilogue:
    distance, options = problem.distance, problem.kernel_options
    floor = distance.denominator.floor if distance.denominator else torch.finfo(torch.float32).tiny
    return Epilogue(
        distance.kernel,
        options,
        problem.spec.link,
        distance.factor,
        distance.root(**options),
        floor,
    )


def supports(problem: Problem) -> str | None:
    """None, or the reason why there is no kernel for the problem.

    An option that no kernel here knows, such as canberra's q, is a reason.
    """
    x = problem.states
    if x.dtype != torch.float32 or (x.device.type != "cuda" and not INTERPRETED):
        return f"needs CUDA and float32 (h is {x.dtype} on {x.device})"
    if problem.distance.is_control and problem.spec.name != "cross_entropy":
        return f"there is no compiled kernel for {problem.spec.name}"
    if _find(_epilogue(problem)) is None:
        return f"there is no compiled kernel for {problem.spec.name} with these options"
    if problem.spec.rows > MOST_BLOCKS * BLOCK:
        return (
            f"{problem.spec.rows:,} prototypes are more than the {MOST_BLOCKS * BLOCK:,} of one"
            " launch"
        )
    return None


def loss(problem: Problem, needs_grad: bool) -> Result:
    """See `Backend`."""
    sides = Sides(problem)
    x, y = sides.states.whole(), sides.prototypes.whole()
    given = (problem.strength, problem.bias, problem.targets, problem.weights)
    losses, gradients = run(
        x,
        y,
        sides.u,
        sides.v,
        *given,
        _epilogue(problem),
        needs_grad,
        problem.spec.products,
        problem.frozen,
    )
    return sides.result(losses, *gradients) if needs_grad else Result(losses, None)


# Blocks of raw values
#
# x and y are (blocks, C, BLOCK): R rows or V prototypes, filled up with zeros to full blocks. So
# neighbouring threads read neighbouring numbers, and the step to the next coordinate is a constant.
# For any N and V, loads are aligned and need no mask. Tensors of pairs have full blocks too.


@triton.jit
def _zeros(x, rows, columns):
    """Zeros for a block of sums, in the thread layout of a loaded block.

    A thread then has 8 rows x 4 neighbouring columns, and reads 12 numbers for each coordinate. The
    compiler's own choice is 32 x 1, which reads 33. Nothing is really loaded from x.
    """
    return tl.load(
        x + 4 * rows[:, None] + columns[None, :], (rows < 0)[:, None] & (columns < 0)[None, :], 0.0
    )


@triton.jit
def _sum(x, y, rows, columns, C, p, TERM: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr):
    inner, first = tl.arange(0, BLOCK), x
    total = _zeros(first, rows, columns)
    for start in range(0, C, BLOCK):
        part = _zeros(first, rows, columns)
        for _ in tl.range(start, min(start + BLOCK, C), loop_unroll_factor=UNROLL):
            part += TERM(tl.load(x + inner)[:, None], tl.load(y + inner)[None, :], p)
            x += BLOCK
            y += BLOCK
        total += part
    return total


@triton.jit
def _maximum(x, y, rows, columns, C, BLOCK: tl.constexpr, UNROLL: tl.constexpr):
    """Returns (the largest difference with its sign, the first coordinate that has it).

    A NaN is skipped.
    """
    inner = tl.arange(0, BLOCK)
    best = _zeros(x, rows, columns)
    at = tl.zeros_like(best)
    for c in tl.range(0, C, loop_unroll_factor=UNROLL):
        d = tl.load(x + inner)[:, None] - tl.load(y + inner)[None, :]
        better = tl.abs(d) > tl.abs(best)
        best = tl.where(better, d, best)
        at = tl.where(better, c * 1.0, at)
        x += BLOCK
        y += BLOCK
    return best, at


@triton.jit
def _smooth(x, y, rows, columns, C, p, BLOCK: tl.constexpr, UNROLL: tl.constexpr):
    """log sum exp(p |x - y|) / p, in two passes: the maximum, then the sum.

    That is cheaper than one pass with a running maximum, which needs one exponential more.
    """
    inner = tl.arange(0, BLOCK)
    top, at = _maximum(x, y, rows, columns, C, BLOCK, UNROLL)
    top = tl.abs(top)
    first = x
    total = tl.zeros_like(top)
    for start in range(0, C, BLOCK):
        part = _zeros(first, rows, columns)
        for _ in tl.range(start, min(start + BLOCK, C), loop_unroll_factor=UNROLL):
            d = tl.load(x + inner)[:, None] - tl.load(y + inner)[None, :]
            part += tl.exp(p * (tl.abs(d) - top))
            x += BLOCK
            y += BLOCK
        total += part
    return top + tl.log(total) / p


# From raw values to logits


@triton.jit
def _sizes(rows, columns, size_x, size_y, R, V):
    """value(x, 0) + value(y, 0) for a block of pairs, which floors are relative to."""
    return (
        tl.load(size_x + rows, rows < R, 0.0)[:, None]
        + tl.load(size_y + columns, columns < V, 0.0)[None, :]
    )


@triton.jit
def _above(raw, rows, columns, size_x, size_y, R, V, epsilon):
    """`kernels.above` for a block: raw values, raised to the floor."""
    low = tl.maximum(epsilon * _sizes(rows, columns, size_x, size_y, R, V), TINY)
    return tl.where(raw < low, low, raw)


@triton.jit
def _rank_one(rows, columns, u, v, R, V):
    """u_i + v_j for a block of pairs. For a control u is None, and v is the bias."""
    terms = tl.load(v + columns, columns < V, 0.0)[None, :]
    return terms if u is None else tl.load(u + rows, rows < R, 0.0)[:, None] + terms


@triton.jit
def _level(raw, terms, factor, floor, LINK: tl.constexpr, ROOT: tl.constexpr):
    """A number for each pair that is small where the logit is large.

    control: minus the logit. softmax: d. harmonic: d^(1/root) / factor, because constants cancel in
    a ratio and roots lose digits. `_fall` turns two levels into a difference of logits.
    """
    if LINK == "control":
        level = -raw if terms is None else -(raw + terms)
    elif LINK == "softmax":
        d = factor * raw
        if ROOT == 0.5:
            d = tl.sqrt_rn(d)
        elif ROOT != 1.0:
            d = tl.exp(ROOT * tl.log(d))
        level = d if terms is None else tl.div_rn(d, _denominator(terms, floor))
    elif terms is None:
        level = raw
    elif ROOT == 1.0:
        level = tl.div_rn(raw, _denominator(terms, floor))
    else:
        level = raw * tl.exp(tl.log(_denominator(terms, floor)) / -ROOT)
    return level


@triton.jit
def _denominator(terms, floor):
    size = tl.abs(terms)
    return tl.where(size < floor, floor, size)  # In this order a NaN stays a NaN.


@triton.jit
def _log1p(t):
    """log(1 + t) for t > -0.2, with a relative error of about 1e-7.

    1 + t = 2^k (1 + f) with f in [-1/4, 1/2), and log(1 + f) = f + f^2 P(f). This form is exact for
    small f. It takes 20 instructions and no branch. A division and a logarithm take 35.
    """
    # k times 2^23. 0x3F400000 is 3/4.
    k = ((1.0 + t).to(tl.int32, bitcast=True) - 0x3F400000) & ~0x7FFFFF
    scale = (0x3F800000 - k).to(tl.float32, bitcast=True)  # 2^-k
    f = tl.fma(t, scale, scale - 1.0)
    p = tl.fma(f, tl.fma(f, tl.fma(f, tl.fma(f, L8, L7), L6), L5), L4)
    p = tl.fma(f, tl.fma(f, tl.fma(f, tl.fma(f, p, L3), L2), L1), L0)
    return tl.fma(k.to(tl.float32), LOG_2, tl.fma(f * f, p, f))


@triton.jit
def _fall(level, best, LINK: tl.constexpr, ROOT: tl.constexpr):
    """The logit at `level` minus the logit at `best`, for a strength of 1.

    It has to be exact, because n multiplies its error by hundreds.
    """
    if LINK == "harmonic":
        # The ratio is limited to 1e38, where the probability is 0 and `_log1p` still works. A NaN
        # stays a NaN.
        ratio = tl.minimum((level - best) * (1.0 / best), 1e38, propagate_nan=tl.PropagateNan.ALL)
        fall = -ROOT * _log1p(ratio)
    else:
        # A logit of -inf has probability 0, also beside others of -inf.
        fall = tl.where(level == float("inf"), float("-inf"), best - level)
    return fall


@triton.jit
def _inner(place, rows, columns, unit_x, unit_y, R, V):
    """A block of inner products, multiplied by the units of both operands if they have units."""
    product = tl.load(place)
    if unit_x is not None:
        product *= (
            tl.load(unit_x + rows, rows < R, 0.0)[:, None]
            * tl.load(unit_y + columns, columns < V, 0.0)[None, :]
        )
    return product


@triton.jit
def _tile(
    x, y, size_x, size_y, unit_x, unit_y, u, v, targets, strength, raw, kept, near, best, total,
    target_level, R, V, C, p, epsilon, factor,
    floor, cancelled, MODE: tl.constexpr, TERM: tl.constexpr, LINK: tl.constexpr,
    ROOT: tl.constexpr, BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
):  # fmt: skip
    """Computes a block of pairs: its raw values, and its part of each row's log-sum-exp.

    best, total: for each row of the block, the smallest level, and the sum of exp(logit - logit at
        that level). target_level: the level of the target, if it is in this block.
    raw: gets the raw values. For linf these are differences with their sign. For dot and l2 it
        already holds the inner products, and they stay. None if no gradient is wanted.
    kept: gets a second number of each pair, which some slopes need, or None.
    near: l2 marks the blocks here that have a pair whose difference cancels. A second launch, in
        mode "near", computes these blocks from the differences and writes their raw values. One
        kernel for both would need twice the registers, so half as many threads would run.
    """
    if MODE == "near":
        if tl.load(near + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) == 0:
            return
    block = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    inside = (rows < R)[:, None] & (columns < V)[None, :]
    place = rows.to(tl.int64)[:, None] * tl.num_programs(1) * BLOCK + columns[None, :]
    if MODE != "dot" and MODE != "l2":
        x += tl.program_id(0).to(tl.int64) * C * BLOCK
        y += block.to(tl.int64) * C * BLOCK
    if MODE == "dot":
        value = _inner(raw + place, rows, columns, unit_x, unit_y, R, V)
    elif MODE == "l2":
        size = _sizes(rows, columns, size_x, size_y, R, V)
        value = size - 2.0 * _inner(raw + place, rows, columns, unit_x, unit_y, R, V)
        cancels = tl.max(tl.max((value < cancelled * size).to(tl.int32), 1), 0)
        tl.store(near + tl.program_id(0) * tl.num_programs(1) + block, cancels)
    elif MODE == "sum" or MODE == "near":
        value = _sum(x, y, rows, columns, C, p, TERM, BLOCK, UNROLL)
    elif MODE == "linf":
        value, at = _maximum(x, y, rows, columns, C, BLOCK, UNROLL)
        size = _sizes(rows, columns, size_x, size_y, R, V)
        value = tl.where(size == size, value, size)  # Puts back a NaN, which the maximum skipped.
    else:
        value = _smooth(x, y, rows, columns, C, p, BLOCK, UNROLL)
    if raw is not None and MODE != "dot" and MODE != "l2":
        tl.store(raw + place, value)
    if kept is not None:
        tl.store(kept + place, at if MODE == "linf" else value)
    if MODE == "linf":
        value = tl.abs(value)
    if size_x is not None:
        value = _above(value, rows, columns, size_x, size_y, R, V, epsilon)
    terms = None if v is None else _rank_one(rows, columns, u, v, R, V)
    level = tl.where(inside, _level(value, terms, factor, floor, LINK, ROOT), float("inf"))
    lowest = tl.min(level, 1)
    share = tl.sum(
        tl.where(
            inside, tl.exp(tl.load(strength) * _fall(level, lowest[:, None], LINK, ROOT)), 0.0
        ),
        1,
    )
    tl.store(best + block * R + rows, lowest, rows < R)
    tl.store(total + block * R + rows, share, rows < R)
    target = tl.load(targets + rows, rows < R, -1)
    own = tl.sum(tl.where(columns[None, :] == target[:, None], level, 0.0), 1)
    tl.store(
        target_level + rows,
        own,
        (rows < R) & (target >= block * BLOCK) & (target < min(block * BLOCK + BLOCK, V)),
    )


@triton.jit
def _slopes(
    raw, high, low, near, size_x, size_y, unit_x, unit_y, u, v, targets, weight, strength, best,
    inverse_total, over_columns, over_rows,
    R, V, epsilon, factor, floor, MODE: tl.constexpr, LINK: tl.constexpr, ROOT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Turns a block of raw values into slopes A = dL/draw, and computes sums of gradients.

    over_columns: gets the sums over columns of A, dL/d(u + v) and dL/dstrength. over_rows: gets the
        sums over rows of the first two. Sums that nobody needs are not written. For a control, v
        is the bias, and u is None.
    high, low: get A for a matrix product, in one part (low is None) or two. If high is None, A
        overwrites raw.
    near: for l2, the marks of `_tile`; else None. Blocks without a mark hold inner products. In a
        marked block A overwrites raw, for `_gradient`. Its high, low and sums of A get zeros.
    """
    i, j = tl.program_id(0), tl.program_id(1)
    rows = i * BLOCK + tl.arange(0, BLOCK)
    columns = j * BLOCK + tl.arange(0, BLOCK)
    inside = (rows < R)[:, None] & (columns < V)[None, :]
    place = rows.to(tl.int64)[:, None] * tl.num_programs(1) * BLOCK + columns[None, :]
    if MODE == "dot":
        found = _inner(raw + place, rows, columns, unit_x, unit_y, R, V)
    else:
        found = tl.load(raw + place)
    signs = found
    if MODE == "linf":
        found = tl.abs(found)
    if near is not None:
        is_near = tl.load(near + i * tl.num_programs(1) + j) > 0
        if not is_near:
            found = _sizes(rows, columns, size_x, size_y, R, V) - 2.0 * _inner(
                raw + place, rows, columns, unit_x, unit_y, R, V
            )
    value = found if size_x is None else _above(found, rows, columns, size_x, size_y, R, V, epsilon)
    terms = None if v is None else _rank_one(rows, columns, u, v, R, V)
    level = _level(value, terms, factor, floor, LINK, ROOT)
    fall = _fall(level, tl.load(best + rows, rows < R, 1.0)[:, None], LINK, ROOT)
    n = tl.load(strength)
    share = tl.exp(n * fall) * tl.load(inverse_total + rows, rows < R, 1.0)[:, None]
    hit = columns[None, :] == tl.load(targets + rows, rows < R, -1)[:, None]
    # dL/dlogit
    g = tl.load(weight + rows, rows < R, 0.0)[:, None] * (share - tl.where(hit, 1.0, 0.0))
    if LINK == "control":
        a, e = g, g
    else:
        by_log = -n * g if LINK == "harmonic" else -n * g * level  # dL/dlog d
        # Below the floor there is no gradient.
        a = tl.where(found < value, 0.0, ROOT * by_log * _inverse(value))
        e = tl.zeros_like(a)
        if u is not None:
            e = tl.where(tl.abs(terms) <= floor, 0.0, -by_log / terms)
    a, e, s = tl.where(inside, a, 0.0), tl.where(inside, e, 0.0), tl.where(inside, g * fall, 0.0)
    if MODE == "linf":
        a = tl.where(signs < 0.0, -a, a)
    if high is None:
        tl.store(raw + place, a)
    else:
        if near is not None:
            if is_near:
                tl.store(raw + place, a)
            a = tl.where(is_near, 0.0, a)
        most = a.to(high.dtype.element_ty)
        tl.store(high + place, most)
        if low is not None:
            tl.store(low + place, (a - most.to(tl.float32)).to(low.dtype.element_ty))
    across, down = over_columns + j * R + rows, over_rows + i * V + columns
    size = tl.num_programs(1) * R
    if MODE == "l2" or MODE == "sum":
        tl.store(across, tl.sum(a, 1), rows < R)
        tl.store(down, tl.sum(a, 0), columns < V)
    if v is not None:
        tl.store(across + size, tl.sum(e, 1), rows < R)
        tl.store(down + tl.num_programs(0) * V, tl.sum(e, 0), columns < V)
    if LINK != "control":
        tl.store(across + 2 * size, tl.sum(s, 1), rows < R)


@triton.jit
def _gradient(
    x, y, slopes, kept, near, out, M, K, C, near_own, near_other, p, OWN: tl.constexpr,
    OTHER: tl.constexpr, SLOPE: tl.constexpr,
    BLOCK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Adds to `out` the sum of slope(x, y) over the K rows of y.

    A program does BLOCK of the M rows of x, and BLOCK coordinates.
    y: (blocks of coordinates, K, BLOCK).
    OWN, OTHER: the strides of `slopes` and `kept` along the rows of x and of y.
    near: if given, only the blocks that it marks count. near_own, near_other: its strides.
    """
    own = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (own < M)[:, None] & (c < C)[None, :]
    place = own.to(tl.int64)[:, None] * C + c[None, :]
    xs = tl.load(x + place, inside, 0.0)
    total = tl.load(out + place, inside, 0.0)
    y += tl.program_id(1).to(tl.int64) * K * BLOCK
    near = near if near is None else near + tl.program_id(0) * near_own
    some = tl.program_id(0) * 0
    for start in range(0, K, BLOCK):
        if near is None:
            wanted = True
        else:
            if start % (BLOCK * BLOCK) == 0:  # Reads BLOCK marks at once. Mostly none is set.
                blocks = start // BLOCK + tl.arange(0, BLOCK)
                some = tl.max(tl.load(near + blocks * near_other, blocks * BLOCK < K, 0), 0)
            wanted = some > 0
            if wanted:
                wanted = tl.load(near + start // BLOCK * near_other) > 0
        if wanted:
            part = _zeros(out, own, c)
            pairs = own.to(tl.int64) * OWN + start * OTHER  # A chunk has fewer than 2^31 pairs.
            a_at, y_at = slopes + pairs, y + start * BLOCK + tl.arange(0, BLOCK)
            if kept is not None:
                k_at = kept + pairs
            for _ in tl.range(start, min(start + BLOCK, K), loop_unroll_factor=UNROLL):
                a = tl.load(a_at)
                k = a
                if kept is not None:
                    k = tl.load(k_at)
                    k_at += OTHER
                part = SLOPE(
                    part,
                    xs,
                    tl.load(y_at)[None, :],
                    a[:, None],
                    k[:, None],
                    c.to(tl.float32)[None, :],
                    p,
                )
                a_at += OTHER
                y_at += BLOCK
            total += part
    tl.store(out + place, total, inside)


# Unit vectors. Each program has one row, of WIDTH >= C numbers.


@triton.jit
def _unit(x, out, inverse, C, WIDTH: tl.constexpr):
    """Divides a row by its Euclidean norm, without overflow or underflow. Zeros stay zeros.

    inverse: gets 1 / norm, or 1 for a row of zeros.
    """
    row = tl.program_id(0)
    c = tl.arange(0, WIDTH)
    place = row.to(tl.int64) * C + c
    values = tl.load(x + place, c < C, 0.0)
    scale = 1.0 / tl.maximum(tl.max(tl.abs(values), 0), 1e-37)
    values *= scale
    total = tl.sum(values * values, 0)
    over = 1.0 / tl.where(total == 0.0, 1.0, tl.sqrt_rn(total))
    tl.store(out + place, values * over, c < C)
    tl.store(inverse + row, tl.where(total == 0.0, 1.0, scale * over))


@triton.jit
def _pull_unit(out, inverse, slope, dx, C, WIDTH: tl.constexpr):
    """dL/dx of a row from dL/d(x / |x|): the part at right angles to x, divided by |x|."""
    row = tl.program_id(0)
    c = tl.arange(0, WIDTH)
    place = row.to(tl.int64) * C + c
    direction, s = tl.load(out + place, c < C, 0.0), tl.load(slope + place, c < C, 0.0)
    along = tl.sum(direction * s, 0)
    tl.store(dx + place, tl.load(inverse + row) * (s - along * direction), c < C)


# On the host


def launch(kernel, grid: tuple, warps: int, registers: int | None = None, **arguments):
    """Starts a kernel. All starts are here, so that a tool can list the kernels.

    registers: the most that a thread may use. Without a limit ptxas aims for certain occupancies,
        and spills a few registers to reach one. AMD's compiler has no such limit.
    """
    limit = {} if registers is None or torch.version.hip else {"maxnreg": registers}
    with torch.cuda.device_of(next(t for t in arguments.values() if isinstance(t, torch.Tensor))):
        kernel[grid](num_warps=warps, **limit, **arguments)


@torch.no_grad()
def run(
    x,
    y,
    u,
    v,
    strength,
    bias,
    targets,
    weight,
    epilogue,
    needs_grad,
    products=FLOAT32,
    frozen=False,
):
    """Computes the loss of each row, and the gradients of sum(weight * loss).

    Args:
        x: (N, C), y: (V, C), mapped operands, float32 and contiguous.
        u: (N,), v: (V,), their terms of the denominator, or None. Also float32 and contiguous.
        strength: a positive 0-dim tensor; a control ignores it.
        bias: (V,) or None; for controls only.
        targets: (N,) int64 in [0, V).
        weight: (N,), 0 for ignored rows.
        epilogue: turns raw values into logits. `_find` must have a recipe for it.
        products: how l2 and dot multiply matrices.
        frozen: whether the gradient of y is not wanted.
    Returns: losses (N,) without weights, and the gradients of (x, y, u, v, strength, bias). A
        gradient is None if its tensor is None, or without needs_grad; that of y also if frozen.
    """
    recipe = _find(epilogue)
    mode, control = recipe.mode, epilogue.link == "control"
    N, C, V = *x.shape, len(y)
    losses = x.new_empty(N)
    wanted = (x, None if frozen else y, u, v, strength, bias) if needs_grad else [None] * 6
    gradients = [t if t is None else torch.zeros_like(t) for t in wanted]
    dx, dy, du, dv, dstrength, dbias = gradients
    dterms = dbias if control else dv
    strength = torch.ones_like(strength) if control else strength
    if mode == "l2":
        x, y = _without_offset(x, y)
    level = dict(
        u=u,
        v=bias if control else v,
        strength=strength,
        factor=epilogue.factor,
        floor=epilogue.floor,
        LINK=epilogue.link,
    )
    level |= dict(
        MODE=mode,
        ROOT=epilogue.root,
        V=V,
        BLOCK=BLOCK,
        size_x=None,
        size_y=None,
        epsilon=0.0,
        unit_x=None,
        unit_y=None,
    )
    if mode != "dot":
        power = KERNELS[epilogue.kernel].power(**epilogue.options)
        level |= dict(
            size_y=sizes(epilogue.kernel, y, **epilogue.options),
            epsilon=torch.finfo(x.dtype).eps ** power,
        )
    blocks = triton.cdiv(V, BLOCK)
    chunks = max(1, triton.cdiv(N, max(BLOCK, min(CHUNK // V, CHUNK_ROWS))))
    chunk = BLOCK * max(1, triton.cdiv(N, BLOCK * chunks))  # Chunks are about equal.
    matmul = mode in ("l2", "dot")
    raw = x.new_empty(chunk, blocks * BLOCK) if needs_grad and not matmul else None
    kept = torch.empty_like(raw) if needs_grad and mode in ("linf", "lse") else None
    y_t = None if mode == "dot" else _across(y)
    y_c = _by_coordinates(y) if needs_grad and recipe.slope else None
    if matmul:
        right = products.operand(_whole(y), left=False, needs_grad=needs_grad)
        level["unit_y"] = right.unit
    for start in range(0, N, chunk):
        s = slice(start, start + chunk)
        xs = x[s]
        R = len(xs)
        grid = (triton.cdiv(R, BLOCK), blocks)
        level |= dict(targets=targets[s], R=R, u=None if u is None else u[s])
        if mode != "dot":
            level["size_x"] = sizes(epilogue.kernel, xs, **epilogue.options)
        near = x.new_empty(grid, dtype=torch.int32) if mode == "l2" else None
        # `own` stays NaN for a target that is not a prototype.
        best, total, own = (
            x.new_empty(blocks, R),
            x.new_empty(blocks, R),
            x.new_full((R,), torch.nan),
        )
        if matmul:
            # Frees the raw values of the last chunk before there are new ones.
            raw = slopes = operands = sums = None
            left = products.operand(_whole(xs), left=True, needs_grad=needs_grad)
            level["unit_x"] = left.unit
            raw = products.inner_products(left, right)
        operands = dict(
            x=None if mode == "dot" else _across(xs),
            y=y_t,
            C=C,
            p=recipe.p,
            TERM=recipe.term,
            UNROLL=recipe.unroll,
            cancelled=NEAR,
        )
        operands |= dict(raw=raw, kept=kept, near=near, best=best, total=total, target_level=own)
        launch(_tile, grid, *((16, None) if matmul else (4, 168)), **operands, **level)
        if mode == "l2":
            launch(
                _tile,
                grid,
                4,
                168,
                **operands,
                **level | {"MODE": "near", "unit_x": None, "unit_y": None},
            )
        lowest = best.amin(0)
        total = (total * (strength * _difference(best, lowest, epilogue)).exp()).sum(0)
        losses[s] = total.log() - strength * _difference(own, lowest, epilogue)
        if not needs_grad:
            continue
        slopes = _empty_slopes(raw, right.parts, in_place=mode == "dot") if matmul else None
        across, down = x.new_empty(3, blocks, R), x.new_empty(2, grid[0], V)
        sums = dict(over_columns=across, over_rows=down, high=None if slopes is None else slopes[0])
        sums |= dict(low=slopes[1] if matmul and len(slopes) > 1 else None)
        launch(
            _slopes,
            grid,
            16,
            raw=raw,
            near=near,
            weight=weight[s],
            best=lowest,
            inverse_total=1 / total,
            **sums,
            **level,
        )
        across, down = across.sum(1), down.sum(1)
        if du is not None:
            du[s] = across[1]
        if dterms is not None:
            dterms += down[1]
        if not control:
            dstrength += across[2].sum()
        if recipe.slope:
            _add_elementwise(xs, y, y_c, raw, kept, near, dx[s], dy, recipe)
        if recipe.remainder:
            dx[s].sub_(across[0][:, None])
            if dy is not None:
                dy.sub_(down[0][:, None])
        if matmul:
            # For l2, d/dx of sum A (x - y)^2 is 2 (rowsum(A) x - A y).
            factor = 1 if mode == "dot" else -2
            dx[s].add_(products.pull_left(slopes, right.parts)[:R], alpha=factor)
            if dy is not None:
                dy.add_(products.pull_right(slopes, left.parts)[:V], alpha=factor)
        if mode == "l2":
            dx[s].addcmul_(across[0][:, None], xs, value=2)
            if dy is not None:
                dy.addcmul_(down[0][:, None], y, value=2)
    return losses, tuple(gradients)


def _without_offset(x, y):
    """Subtracts the mean of y from x and y if it is most of their length. This does not change l2.

    The decision is made on the device, so nothing waits for it.
    """
    middle = y.mean(0)
    large = middle.square().sum() > y.square().sum(1).mean() / 2
    middle = torch.where(large, middle, 0.0)
    return x - middle, y - middle


def _empty_slopes(raw, parts, in_place):
    """Memory (P, R, V) for the slopes of raw values (R, V), which multiply `parts` (P, V, C).

    in_place: use the memory of `raw`, if the types are the same.
    """
    if in_place and parts.dtype == raw.dtype:
        return raw[None]
    return raw.new_empty(len(parts), *raw.shape, dtype=parts.dtype)


class Unit(torch.autograd.Function):
    """Float32 vectors divided by their Euclidean norms: (..., C) -> (..., C).

    Forward and backward are one pass over memory each.
    """

    WIDEST = 2**14  # The longest row that a program can hold.

    @staticmethod
    def forward(ctx, x):
        rows = x.detach().reshape(-1, x.shape[-1]).contiguous()
        out, inverse = torch.empty_like(rows), rows.new_empty(len(rows))
        ctx.save_for_backward(x, out, inverse)
        width = triton.next_power_of_2(rows.shape[1])
        if len(rows):
            launch(
                _unit,
                (len(rows),),
                4,
                x=rows,
                out=out,
                inverse=inverse,
                C=rows.shape[1],
                WIDTH=width,
            )
        return out.view(x.shape)

    @staticmethod
    def backward(ctx, slope):
        x, out, inverse = ctx.saved_tensors
        if wants_graph():
            return plain_gradients(lambda x: unit(x, 2), [x], slope)[0]
        rows, dx = slope.reshape(out.shape).contiguous(), torch.empty_like(out)
        width = triton.next_power_of_2(out.shape[1])
        if len(rows):
            launch(
                _pull_unit,
                (len(rows),),
                4,
                out=out,
                inverse=inverse,
                slope=rows,
                dx=dx,
                C=out.shape[1],
                WIDTH=width,
            )
        return dx.view(slope.shape)


def _whole(x):
    """Appends rows of zeros up to full blocks: (M, C) -> (a multiple of BLOCK, C)."""
    return F.pad(x, (0, 0, 0, -len(x) % BLOCK)) if len(x) % BLOCK else x


def _across(x):
    """Blocks of rows, with zeros beyond M: (M, C) -> (blocks, C, BLOCK)."""
    return _whole(x).view(-1, BLOCK, x.shape[1]).transpose(1, 2).contiguous()


def _by_coordinates(x):
    """Blocks of coordinates, with zeros beyond C: (M, C) -> (blocks, M, BLOCK)."""
    return (
        (F.pad(x, (0, -x.shape[1] % BLOCK)) if x.shape[1] % BLOCK else x)
        .view(len(x), -1, BLOCK)
        .transpose(0, 1)
        .contiguous()
    )


def _difference(level, best, epilogue):
    """`_fall` in PyTorch."""
    return -epilogue.root * log_ratio(level, best) if epilogue.link == "harmonic" else best - level


def _add_elementwise(x, y, y_c, slopes, kept, near, dx, dy, recipe):
    """Adds the gradients of all pairs to dx and dy, which may be None. If `near` is given, of
    marked blocks only.

    y_c: the result of `_by_coordinates(y)`.
    """
    (R, C), V, W = x.shape, len(y), slopes.shape[1]
    rows, columns, coordinates = (triton.cdiv(n, BLOCK) for n in (R, V, C))
    shared = dict(
        slopes=slopes,
        kept=kept,
        near=near,
        C=C,
        SLOPE=recipe.slope,
        BLOCK=BLOCK,
        UNROLL=recipe.unroll,
    )
    strides = dict(OWN=W, OTHER=1, near_own=columns, near_other=1)
    launch(
        _gradient,
        (rows, coordinates),
        8,
        128,
        x=x,
        y=y_c,
        out=dx,
        M=R,
        K=V,
        p=recipe.p,
        **strides,
        **shared,
    )
    if dy is None:
        return
    strides = dict(OWN=1, OTHER=W, near_own=1, near_other=columns)
    p, x_c = recipe.exchanged * recipe.p, _by_coordinates(x)
    launch(
        _gradient,
        (columns, coordinates),
        8,
        128,
        x=y,
        y=x_c,
        out=dy,
        M=V,
        K=R,
        p=p,
        **strides,
        **shared,
    )


BACKEND = Backend("triton", supports, loss)
