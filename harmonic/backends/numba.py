"""The loss on a CPU, compiled by Numba. It has three templates:

    forward    A tile of 4 states x 4 prototypes keeps 16 sums in registers, while it loops over the
               coordinates. The results are raw values.
    epilogue   A row of raw values becomes its loss, then dL/draw, within a core's cache. This step
               is the same for all kernels.
    backward   The same tile adds slope * dL/draw to 4 rows of dx and 4 rows of dy, in one pass over
               memory.

A kernel puts two functions into the templates, in place of names that are not defined there. Its
*term* is what one coordinate adds to the raw value. Its *slope* is the derivative of the term with
respect to x and to y. Two kernels, l2 and dot, use matrix products instead of forward and backward.
The maximum (linf) has its own backward template, because only one coordinate of a pair has a
gradient.

In the backward pass each thread owns a range of prototypes, and so their rows of dy. Each thread
has its own copy of dx. The copies are added up at the end. Nothing of size (N, V, C) exists, and
only a chunk of rows of (N, V).

The compiler may reorder sums, as SIMD needs, but may not assume that values are finite. So a NaN
stays a NaN. Compiled code is cached on disk, beside this file or in Numba's own cache folder.

Least cost of each pair and coordinate, in vector operations: |x - y| takes 3 (subtract, absolute
value, add). Its gradient takes 5 (subtract, sign, compare with 0, two additions). A square root or
a division takes as long as 10.
"""

import math
import os
import types
import warnings

import numba
import numpy as np
import torch
import torch.nn.functional as F
from llvmlite import ir
from numba import njit, prange
from numba.core import types as nb
from numba.extending import intrinsic

from ..double_backward import plain_gradients, wants_graph
from ..kernels import KERNELS, NEAR, sizes
from ..links import CONTROL as CONTROL_NAME
from ..maps import unit
from ..precision import FLOAT32, Multiply
from . import Backend, Problem, Result
from .mapped import Sides

# Numba's fastmath without the flags that assume that there is no NaN and no infinity.
FAST = {"reassoc", "contract", "nsz", "arcp"}
# With NumPy's error model 1/0 is infinity. An exception would prevent vectorised loops.
OPTIONS = {"fastmath": FAST, "error_model": "numpy"}
f32 = np.float32


def _inlined(function):
    return njit(forceinline=True, **OPTIONS)(function)


def _parallel(function):
    """Compiles a parallel function at its first call, and caches it on disk if that is possible."""
    try:
        compiled = njit(parallel=True, cache=True, **OPTIONS)(function)
    except RuntimeError:  # Numba can write neither beside this file nor in its own cache folder.
        return njit(parallel=True, **OPTIONS)(function)
    CACHED.append(compiled)
    return compiled


CACHED: list = []  # The functions whose code is on disk.


def compiled_here() -> bool:
    """Whether this process has compiled a function that later processes load from the cache.

    They round in another way. The likely reason: Numba optimises the loops of a parallel function
    once more when it writes them to the cache, and the process that compiles runs the loops from
    before that.
    """
    return any(function.stats.cache_misses for function in CACHED)


_INT, _FLOAT = ir.IntType(32), ir.FloatType()


def _operation(build):
    """A float32 function for Numba, of one or two numbers, from LLVM code.

    build: (builder, x) or (builder, x, y) -> the LLVM value.
    """

    def code(context, b, signature, arguments):
        return build(b, *arguments)

    if build.__code__.co_argcount == 2:
        return intrinsic(lambda context, x: (nb.float32(nb.float32), code))
    return intrinsic(lambda context, x, y: (nb.float32(nb.float32, nb.float32), code))


@_operation
def _greater(b, x, y):
    """The larger of two numbers that are not NaN. Python's max would not be vectorised."""
    function = b.module.declare_intrinsic(
        "llvm.maxnum", [_FLOAT], ir.FunctionType(_FLOAT, [_FLOAT, _FLOAT])
    )
    return b.call(function, (x, y), fastmath=("nnan", "nsz"))


@_inlined
def _lesser(x, y):
    """The smaller of two numbers that are not NaN."""
    return -_greater(-x, -y)


# exp and log. Numba's own are function calls, which prevent vectorised loops.


@_operation
def _times_power_of_two(b, m, k):
    """m 2^k, for m in [0.5, 2) and a float k that is a whole number in -126..126."""
    return b.bitcast(b.add(b.bitcast(m, _INT), b.shl(b.fptosi(k, _INT), _INT(23))), _FLOAT)


@_operation
def _exponent(b, x):
    """floor(log2 x) as a float, for a positive x that is not subnormal."""
    return b.sitofp(b.sub(b.lshr(b.bitcast(x, _INT), _INT(23)), _INT(127)), _FLOAT)


@_operation
def _mantissa(b, x):
    """x / 2^_exponent(x), in [1, 2)."""
    return b.bitcast(b.or_(b.and_(b.bitcast(x, _INT), _INT(0x7FFFFF)), _INT(0x3F800000)), _FLOAT)


@_operation
def _turned(b, s, d):
    """s, or -s if d is negative. It is one operation in a vectorised loop."""
    sign = b.and_(b.bitcast(d, _INT), _INT(0x80000000))
    return b.bitcast(b.xor(b.bitcast(s, _INT), sign), _FLOAT)


@_operation
def _over(b, x, y):
    """x / y for finite numbers, to 3 units in the last place.

    Where the CPU can, it is an estimate of 1 / y and one step of Newton's method.
    """
    return b.fdiv(x, y, flags=("ninf", "arcp", "nsz", "contract", "reassoc"))


@_inlined
def _signed(s, d):
    """s * sign(d), which is 0 for d = 0."""
    return _turned(s, d) if d != f32(0) else f32(0)


@_inlined
def _sign(x):
    """-1, 0 or 1."""
    return _signed(f32(1), x)


def _fit(function, low, high, degree):
    """Coefficients, constant first, of the polynomial through the function's values at the
    Chebyshev nodes of [low, high]."""
    return tuple(
        f32(c)
        for c in np.polynomial.Chebyshev.interpolate(function, degree, [low, high])
        .convert(kind=np.polynomial.Polynomial)
        .coef
    )


_E0, _E1, _E2, _E3, _E4, _E5, _E6 = _fit(np.exp2, -0.5, 0.5, 6)  # Error 3e-9; degree 5: 1e-7.
# log(1 + f) = f + f^2 P(f) on [sqrt(1/2) - 1, sqrt(2) - 1]. This form is exact for small f.
_L0, _L1, _L2, _L3, _L4, _L5, _L6, _L7, _L8 = _fit(
    lambda f: np.where(
        abs(f) < 1e-4, -0.5 + f / 3, (np.log1p(f) - f) / np.where(f == 0, 1, f) ** 2
    ),
    math.sqrt(0.5) - 1,
    math.sqrt(2) - 1,
    8,
)
_LOG2_E, _LN2_HIGH, _LN2_LOW = (
    f32(math.log2(math.e)),
    f32(0.693145751953125),
    f32(math.log(2) - 0.693145751953125),
)


@_inlined
def _exp(x):
    """exp(x) for x <= 88, to 2 units in the last place. Below x = -87 it is 1e-38.

    A NaN does not stay a NaN.
    """
    t = _greater(x * _LOG2_E, f32(-126))
    k = np.rint(t)
    f = t - k
    return _times_power_of_two(
        _E0 + f * (_E1 + f * (_E2 + f * (_E3 + f * (_E4 + f * (_E5 + f * _E6))))), k
    )


@_inlined
def _log_with(k, f):
    """k log 2 + log(1 + f)."""
    p = _L0 + f * (
        _L1 + f * (_L2 + f * (_L3 + f * (_L4 + f * (_L5 + f * (_L6 + f * (_L7 + f * _L8))))))
    )
    return k * _LN2_HIGH + (f + (f * f * p + k * _LN2_LOW))


@_inlined
def _log1p(x):
    """log(1 + x) for x >= 0, to a few units in the last place of the result."""
    y = f32(1) + x
    k, m = _exponent(y), _mantissa(y)
    high = m > f32(1.4142135)
    k, m = (k + f32(1) if high else k), (m * f32(0.5) if high else m)
    return _log_with(k, x if x < f32(0.41421) else m - f32(1))


@_inlined
def _log(x):
    """log(x), for a positive x that is not subnormal.

    The error is 1e-7 near x = 1, and a few units in the last place elsewhere.
    """
    k, m = _exponent(x), _mantissa(x)
    high = m > f32(1.4142135)
    k, m = (k + f32(1) if high else k), (m * f32(0.5) if high else m)
    return _log_with(k, m - f32(1))


# The templates
#
# They call `add`, `put` and `pull`, which are not defined here. `_compile` below fills in `_add`,
# `_put` and `_pull`. Those in turn call the `term`, `slope`, `join` and `end` of a kernel.


def _forward(x, y, raw, first, p):
    """Computes raw[:, first:] from states x (R, C) and prototypes y (B, C), R and B at least 4.

    The last tile starts earlier if fewer than 4 are left. p: the number of the kernel.
    """
    R, C, B = x.shape[0], x.shape[1], y.shape[0]
    for tile in prange((B + 3) // 4):
        j = min(4 * tile, B - 4)
        y0, y1, y2, y3 = y[j], y[j + 1], y[j + 2], y[j + 3]
        j += first
        for tall in range(0, R, 4):
            i = min(tall, R - 4)
            x0, x1, x2, x3 = x[i], x[i + 1], x[i + 2], x[i + 3]
            r0, r1, r2, r3 = (
                _four(raw[i], j),
                _four(raw[i + 1], j),
                _four(raw[i + 2], j),
                _four(raw[i + 3], j),
            )
            a0 = a1 = a2 = a3 = (f32(0), f32(0), f32(0), f32(0))
            for c in range(C):
                z = (y0[c], y1[c], y2[c], y3[c])
                a0 = add(a0, x0[c], z, p, r0)
                a1 = add(a1, x1[c], z, p, r1)
                a2 = add(a2, x2[c], z, p, r2)
                a3 = add(a3, x3[c], z, p, r3)
            put(raw[i], j, a0, p, r0)
            put(raw[i + 1], j, a1, p, r1)
            put(raw[i + 2], j, a2, p, r2)
            put(raw[i + 3], j, a3, p, r3)


def _backward(x, y, raw, s, first, dx, dy, p):
    """Adds the gradients from slopes s[:, first:] = dL/draw to dx (threads, R, C) and dy (B, C)."""
    threads, R, C, B = dx.shape[0], x.shape[0], x.shape[1], y.shape[0]
    for t in prange(threads):
        stop = (t + 1) * (B // 4) // threads * 4 if t < threads - 1 else B
        for low in range(t * (B // 4) // threads * 4, stop, 4):
            j = min(low, B - 4)
            y0, y1, y2, y3 = y[j], y[j + 1], y[j + 2], y[j + 3]
            g0, g1, g2, g3 = dy[j], dy[j + 1], dy[j + 2], dy[j + 3]
            done = low - j  # The tile before has served this many columns of this tile.
            j += first
            for tall in range(0, R, 4):
                i = min(tall, R - 4)
                s0 = _four_slopes(s[i], j, done, tall <= i)
                s1 = _four_slopes(s[i + 1], j, done, tall <= i + 1)
                s2 = _four_slopes(s[i + 2], j, done, tall <= i + 2)
                s3 = _four_slopes(s[i + 3], j, done, True)
                if _largest_of(s0, s1, s2, s3) == 0:
                    continue
                x0, x1, x2, x3 = x[i], x[i + 1], x[i + 2], x[i + 3]
                e0, e1, e2, e3 = dx[t, i], dx[t, i + 1], dx[t, i + 2], dx[t, i + 3]
                r0, r1, r2, r3 = (
                    _four(raw[i], j),
                    _four(raw[i + 1], j),
                    _four(raw[i + 2], j),
                    _four(raw[i + 3], j),
                )
                for c in range(C):
                    z = (y0[c], y1[c], y2[c], y3[c])
                    f0, a = pull(x0[c], z, s0, p, r0)
                    f1, b = pull(x1[c], z, s1, p, r1)
                    f2, d = pull(x2[c], z, s2, p, r2)
                    f3, e = pull(x3[c], z, s3, p, r3)
                    e0[c] += f0
                    e1[c] += f1
                    e2[c] += f2
                    e3[c] += f3
                    g0[c] += (a[0] + b[0]) + (d[0] + e[0])
                    g1[c] += (a[1] + b[1]) + (d[1] + e[1])
                    g2[c] += (a[2] + b[2]) + (d[2] + e[2])
                    g3[c] += (a[3] + b[3]) + (d[3] + e[3])


def _backward_maximum(x, y, raw, s, first, dx, dy, p):
    """`_backward` for a maximum, whose gradient goes to one coordinate that has the maximum.

    The tile finds that coordinate again. Then each pair adds its gradient there.
    """
    threads, R, C, B = dx.shape[0], x.shape[0], x.shape[1], y.shape[0]
    for t in prange(threads):
        stop = (t + 1) * (B // 4) // threads * 4 if t < threads - 1 else B
        for low in range(t * (B // 4) // threads * 4, stop, 4):
            j = min(low, B - 4)
            y0, y1, y2, y3 = y[j], y[j + 1], y[j + 2], y[j + 3]
            for i in range(R):
                s0 = _four_slopes(s[i], j + first, low - j, True)
                if _largest(s0) == 0:
                    continue
                x0, r0 = x[i], _four(raw[i], j + first)
                a = (f32(0), f32(0), f32(0), f32(0))  # The coordinate, counted from 1.
                for c in range(C):
                    a = _later(a, x0[c], (y0[c], y1[c], y2[c], y3[c]), f32(c + 1), r0)
                for k in range(4):
                    if s0[k] != 0 and a[k] > 0:
                        c = int(a[k]) - 1
                        g = _signed(s0[k], x0[c] - y[j + k, c])
                        dx[t, i, c] += g
                        dy[j + k, c] -= g


@_parallel
def _recompute_near(raw, first, x, y, xx, yy, near, has_near, is_near):
    """Turns inner products into squared distances, in place.

    They are |x|^2 + |y|^2 - 2 x.y, or sum (x - y)^2 if that is less than `near` times its first two
    terms. Such pairs are marked: has_near (R,) gets a mark for each row that has one, and only
    then the row of is_near (R, V) gets a mark for each pair.
    """
    for i in prange(x.shape[0]):
        row, own, count = raw[i, first : first + y.shape[0]], xx[i], 0
        for j in range(row.size):
            both = own + yy[j]
            r = both - f32(2) * row[j]
            row[j] = r
            count += r < near * both
        if count > 0:
            if not has_near[i]:
                has_near[i] = True
                is_near[i] = False
            for j in range(row.size):
                if row[j] < near * (own + yy[j]):
                    is_near[i, first + j] = True
                    total = f32(0)
                    for c in range(x.shape[1]):
                        d = x[i, c] - y[j, c]
                        total += d * d
                    row[j] = total


HARMONIC, SOFTMAX, CONTROL = 0, 1, 2


@njit(**OPTIONS)
def _energies(raw, e, own, low, u, v, bias, link, terms, floor, root, factor):
    """Turns a row of raw values into e. Returns (the smallest e, whether there is a NaN).

    The logit is -n root log e plus a constant (harmonic), -s e (softmax) or -e (control).
    """
    if link == CONTROL:
        for j in range(e.size):
            e[j] = -(raw[j] + bias[j])
    elif terms:
        for j in range(e.size):
            e[j] = _greater(raw[j], own + low[j]) / _greater(abs(u + v[j]), floor)
    else:
        for j in range(e.size):
            least = own + low[j]
            e[j] = least if raw[j] < least else raw[j]
    if link == SOFTMAX:
        for j in range(e.size):
            e[j] *= factor
        if root == f32(0.5):
            for j in range(e.size):
                e[j] = math.sqrt(e[j])
        elif root != 1:
            for j in range(e.size):
                e[j] = _exp(root * _log(e[j]))
    nearest, nans = f32(np.inf), 0
    for j in range(e.size):
        nearest = e[j] if e[j] < nearest else nearest
        nans += raw[j] != raw[j]
    if link == CONTROL:  # The bias may be NaN too.
        for j in range(e.size):
            nans += e[j] != e[j]
    # The softmax is NaN too if the nearest is infinitely far (an overflow), or its logit infinite.
    return nearest, nans > 0 or abs(nearest) == f32(np.inf)


@njit(**OPTIONS)
def _log_ratio(e, nearest):
    """log(e / nearest), exact if both are close, for 0 < nearest <= e."""
    ratio = (e - nearest) / nearest
    return _log1p(ratio) if ratio < f32(1e37) else math.log(e) - math.log(nearest)


@njit(**OPTIONS)
def _probabilities(e, p, nearest, strength, link, root):
    """Fills p with exp(logit - largest logit). Returns (sum of p, sum of p * far).

    far is (largest logit - logit) / strength.
    """
    total, moment = f32(0), f32(0)
    if link == HARMONIC:
        inverse = f32(1) / nearest
        for j in range(e.size):
            far = root * _log1p((e[j] - nearest) * inverse)
            p[j] = _exp(-strength * far)
            total += p[j]
            moment += p[j] * far
    else:
        for j in range(e.size):
            far = e[j] - nearest
            p[j] = _exp(-strength * far)
            total += p[j]
            moment += p[j] * far
    return total, moment


@njit(**OPTIONS)
def _slopes(raw, e, p, slope, y, weight, total, own, low, strength, link, root, skip):
    """Computes dL/draw of a row. Those below `skip` times the target's are set to 0."""
    share = weight / total
    if link == CONTROL:
        for j in range(e.size):
            slope[j] = share * p[j]
        slope[y] -= weight
        return
    k = -strength * root
    r = max(raw[y], own + low[y])
    at_target = (
        (share * p[y] - weight)
        * k
        / r
        * (e[y] if link == SOFTMAX else f32(1))
        * (f32(0) if raw[y] < own + low[y] else f32(1))
    )
    least = skip * abs(at_target)
    if link == HARMONIC:
        for j in range(e.size):
            g = share * p[j] * k / raw[j]
            slope[j] = f32(0) if (raw[j] < own + low[j]) | (abs(g) < least) else g
    else:
        for j in range(e.size):
            g = share * p[j] * k * e[j] / raw[j]
            slope[j] = f32(0) if (raw[j] < own + low[j]) | (abs(g) < least) else g
    slope[y] = at_target


@njit(**OPTIONS)
def _sum_slopes(slope, sums):
    """Adds a row of slopes to the column sums. Returns the sum of the row."""
    total = f32(0)
    for j in range(slope.size):
        total += slope[j]
        sums[j] += slope[j]
    return total


@njit(**OPTIONS)
def _sum_far_slopes(slope, sums, is_near):
    """`_sum_slopes` without the pairs that are near."""
    total = f32(0)
    for j in range(slope.size):
        far = f32(0) if is_near[j] else slope[j]
        total += far
        sums[j] += far
    return total


@njit(**OPTIONS)
def _sum_terms(e, p, y, weight, total, u, v, sums, strength, link, floor):
    """`_sum_slopes` for the derivative with respect to u + v, whose size divides e."""
    whole, share = f32(0), weight / total
    for j in range(e.size):
        both = u + v[j]
        g = share * p[j] - (weight if j == y else f32(0))
        g = (
            strength * g * (e[j] if link == SOFTMAX else f32(1)) / both
            if abs(both) > floor
            else f32(0)
        )
        whole += g
        sums[j] += g
    return whole


@_parallel
def _epilogue(
    raw,
    slope,
    own,
    low,
    u,
    v,
    bias,
    targets,
    weight,
    losses,
    row_sums,
    sums,
    strengths,
    scratch,
    has_near,
    is_near,
    link,
    terms,
    numbers,
    needs_grad,
):
    """Turns a chunk of raw values (R, V or more) into losses (R,) and slopes.

    slope: gets the derivatives of sum(weight * losses) with respect to raw values.
    row_sums (R,), sums (threads, V): get the sums of slopes over columns and rows, without those of
        pairs that `_recompute_near` has marked in has_near (R,) and is_near (R, V). For a distance
        with a denominator they are sums of derivatives with respect to u + v. Each thread adds to
        its own row of `sums`.
    strengths (R,): gets the derivative with respect to n or s.
    numbers: strength, root, factor, floor of the denominator, skip / V.
    """
    strength, root, factor, floor, skip = numbers[0], numbers[1], numbers[2], numbers[3], numbers[4]
    threads, R, V = sums.shape[0], targets.size, low.size
    for t in prange(threads):
        e, p = scratch[t, 0], scratch[t, 1]
        for i in range(t * R // threads, (t + 1) * R // threads):
            row, y = raw[i, :V], targets[i]
            nearest, invalid = _energies(
                row, e, own[i], low, u[i], v, bias, link, terms, floor, root, factor
            )
            total, moment = _probabilities(e, p, nearest, strength, link, root)
            far = root * _log_ratio(e[y], nearest) if link == HARMONIC else e[y] - nearest
            losses[i] = np.nan if invalid else math.log(total) + strength * far
            if needs_grad:
                into = slope[i, :V]
                strengths[i] = weight[i] * (far - moment / total)
                if terms:
                    row_sums[i] = _sum_terms(
                        e, p, y, weight[i], total, u[i], v, sums[t], strength, link, floor
                    )
                _slopes(
                    row, e, p, into, y, weight[i], total, own[i], low, strength, link, root, skip
                )
                if invalid:
                    into[:] = np.nan
                if terms:
                    continue
                if has_near[i]:
                    row_sums[i] = _sum_far_slopes(into, sums[t], is_near[i])
                else:
                    row_sums[i] = _sum_slopes(into, sums[t])


# Terms and slopes: term(x, y, p, r) -> float; slope(x, y, s, p, r) -> s dterm/dx, s dterm/dy. p is
# the number of the kernel (power, a or floor), and r the raw value.


def _l1_term(x, y, p, r):
    return abs(x - y)


def _l1_slope(x, y, s, p, r):
    g = _signed(s, x - y)
    return g, -g


def _half_term(x, y, p, r):
    return math.sqrt(abs(x - y))


def _half_slope(x, y, s, p, r):
    d = x - y
    # The derivative is infinite at d = 0. There the sign, and so the slope, is 0.
    g = _signed(s * f32(0.5) / math.sqrt(_greater(abs(d), f32(1e-30))), d)
    return g, -g


def _three_halves_term(x, y, p, r):
    d = abs(x - y)
    return d * math.sqrt(d)


def _three_halves_slope(x, y, s, p, r):
    d = x - y
    g = _turned(s * f32(1.5) * math.sqrt(abs(d)), d)
    return g, -g


def _cube_term(x, y, p, r):
    d = abs(x - y)
    return d * d * d


def _cube_slope(x, y, s, p, r):
    d = x - y
    g = s * f32(3) * d * abs(d)
    return g, -g


def _power_term(x, y, p, r):
    d = abs(x - y)
    power = p * _log(_greater(d, f32(1e-37)))
    value = f32(np.inf) if power > f32(88.7) else _exp(power)
    return f32(0) if (d <= f32(1e-37)) | (power < f32(-87)) else value


def _power_slope(x, y, s, p, r):
    d = x - y
    power = (p - f32(1)) * _log(_greater(abs(d), f32(1e-37)))
    g = _turned(s * p * _exp(_lesser(power, f32(88))), d) if abs(d) > f32(1e-37) else f32(0)
    return g, -g


def _lse_term(x, y, p, r):
    return _exp(p * (abs(x - y) - r))  # r is the maximum, which was computed before.


def _lse_slope(x, y, s, p, r):
    d = x - y
    g = _signed(s * _exp(p * (abs(d) - r)), d)
    return g, -g


def _canberra_term(x, y, p, r):
    return _over(abs(x - y), _greater(abs(x) + abs(y), p))


def _canberra_slope(x, y, s, p, r):
    """The derivative of |x-y| / (|x|+|y|) in x is sign(x-y) |y| / (|x|+|y|)^2 times a factor.

    The factor 1 + sign(x) sign(y) is 2 for equal signs, 0 for opposite ones, and 1 if x or y is 0.
    """
    inverse = _over(f32(1), _greater(abs(x) + abs(y), p))
    g = _signed(s * inverse * (f32(1) + _sign(x) * _sign(y)), x - y)
    return g * (abs(y) * inverse), -g * (abs(x) * inverse)


def _canberra_floored_slope(x, y, s, p, r):
    """`_canberra_slope`, but 1/p or -1/p where the denominator is the floor p."""
    size = abs(x) + abs(y)
    inverse = _over(f32(1), _greater(size, p))
    g, k = _signed(s * inverse, x - y), (f32(1) + _sign(x) * _sign(y)) * inverse
    within = size > p
    return g * (k * abs(y) if within else f32(1)), -g * (k * abs(x) if within else f32(1))


# Filling in the templates


def _sum(a, b):
    return a + b


def _maximum(a, b):
    return _greater(a, b)


def _same(a, p, r):
    return a


def _lse_end(a, p, r):
    return r + _log(a) / p


@_inlined
def _four(row, j):
    return row[j], row[j + 1], row[j + 2], row[j + 3]


@_inlined
def _four_slopes(row, j, done, whole):
    """Four slopes: 0 in the first `done` columns, and all 0 unless `whole`.

    These rows and columns were served by the tile before.
    """
    zero = f32(0)
    return (
        row[j] if whole and done < 1 else zero,
        row[j + 1] if whole and done < 2 else zero,
        row[j + 2] if whole and done < 3 else zero,
        row[j + 3] if whole else zero,
    )


@_inlined
def _largest_of(a, b, c, d):
    return max(max(_largest(a), _largest(b)), max(_largest(c), _largest(d)))


@_inlined
def _largest(a):
    return max(max(abs(a[0]), abs(a[1])), max(abs(a[2]), abs(a[3])))


@_inlined
def _later(a, x, z, c, r):
    """c where the difference has reached the maximum r, else a."""
    return (
        _greater(a[0], c if abs(x - z[0]) >= r[0] else f32(0)),
        _greater(a[1], c if abs(x - z[1]) >= r[1] else f32(0)),
        _greater(a[2], c if abs(x - z[2]) >= r[2] else f32(0)),
        _greater(a[3], c if abs(x - z[3]) >= r[3] else f32(0)),
    )


# `term`, `slope`, `join` and `end` below are those of a kernel: `_compile` fills them in.


def _add(a, x, z, p, r):
    return (
        join(a[0], term(x, z[0], p, r[0])),
        join(a[1], term(x, z[1], p, r[1])),
        join(a[2], term(x, z[2], p, r[2])),
        join(a[3], term(x, z[3], p, r[3])),
    )


def _put(row, j, a, p, r):
    row[j], row[j + 1] = end(a[0], p, r[0]), end(a[1], p, r[1])
    row[j + 2], row[j + 3] = end(a[2], p, r[2]), end(a[3], p, r[3])


def _pull(x, z, s, p, r):
    f0, g0 = slope(x, z[0], s[0], p, r[0])
    f1, g1 = slope(x, z[1], s[1], p, r[1])
    f2, g2 = slope(x, z[2], s[2], p, r[2])
    f3, g3 = slope(x, z[3], s[3], p, r[3])
    return (f0 + f1) + (f2 + f3), (g0, g1, g2, g3)


def _with(template, name, **functions):
    """The template with these functions filled in, under a name of its own for Numba's cache."""
    made = types.FunctionType(
        template.__code__, {**globals(), **functions}, f"{template.__name__}_{name}"
    )
    made.__qualname__, made.__module__ = made.__name__, __name__
    return made


def _compile(name, term, slope, join=_sum, end=_same, backward=_backward):
    """Returns the compiled (forward, backward) of a kernel."""
    functions = {
        "term": _inlined(term),
        "slope": _inlined(slope),
        "join": _inlined(join),
        "end": _inlined(end),
    }
    for k, template in (("add", _add), ("put", _put), ("pull", _pull)):
        functions[k] = _inlined(_with(template, name, **functions))
    return tuple(_parallel(_with(f, name, **functions)) for f in (_forward, backward))


# (kernel, its power p, or None) -> (forward, backward).
COMPILED = {
    ("lp", 1.0): _compile("l1", _l1_term, _l1_slope),
    ("lp", 0.5): _compile("half", _half_term, _half_slope),
    ("lp", 1.5): _compile("three_halves", _three_halves_term, _three_halves_slope),
    ("lp", 3.0): _compile("cube", _cube_term, _cube_slope),
    ("lp", None): _compile("power", _power_term, _power_slope),
    ("linf", None): _compile("linf", _l1_term, _l1_slope, _maximum, backward=_backward_maximum),
    ("lse", None): _compile("lse", _lse_term, _lse_slope, end=_lse_end),
    ("canberra", None): _compile("canberra", _canberra_term, _canberra_slope),
    ("canberra", "floor"): _compile("canberra_floored", _canberra_term, _canberra_floored_slope),
}


class Threads:
    """The state of Numba's threads.

    started: they run in this process. lost: this process is a fork of one in which they run.
    """

    started = lost = False


def _after_fork():
    if Threads.started:
        Threads.started, Threads.lost = False, True
        # PyTorch's threads are lost too, and it would wait for them. DataLoader does the same.
        torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):  # Windows has no fork.
    os.register_at_fork(after_in_child=_after_fork)


def usable() -> bool:
    """Whether this process may run compiled kernels.

    It may not if it was forked after they ran, because OpenMP would then end the process.
    """
    if Threads.lost:
        warnings.warn(
            "this process was forked after Numba's kernels had run, so it computes without them,"
            " on one thread."
            " For full speed, start processes with the method 'spawn'",
            stacklevel=1,
        )
    return not Threads.lost


def find(kernel: str, options: dict):
    """Returns (forward, backward, number) of a kernel with these options.

    None if there is no compiled kernel, or if this process may not run it.
    """
    if options.get("weighted") or not usable():
        return None
    if kernel == "canberra":
        floor = options.get("floor", 0.0)
        # With this floor 0/0 is 0, as in SciPy.
        return *COMPILED["canberra", "floor" if floor else None], max(floor, 1e-37)
    if kernel == "lp":
        p = float(options.get("p", 1.0))
        return *(COMPILED.get(("lp", p)) or COMPILED["lp", None]), p
    found = COMPILED.get((kernel, None))
    return found and (*found, options.get("a", 0.0))


def pairs(x: np.ndarray, y: np.ndarray, raw: np.ndarray, first: int, kernel: str, found):
    """Writes the raw values of all pairs into raw[:, first:]."""
    if kernel == "lse":  # As in any log-sum-exp, the maximum is subtracted first.
        COMPILED["linf", None][0](x, y, raw, first, f32(0))
    found[0](x, y, raw, first, f32(found[2]))


class Pairs(torch.autograd.Function):
    """Raw values of all pairs, from float32 CPU tensors (N, C), (V, C) -> (N, V).

    found: what `find` returned.
    """

    @staticmethod
    def forward(ctx, h, w, kernel, found, options):
        ctx.found, ctx.sizes = found, (len(h), len(w))
        ctx.plain = lambda h, w: KERNELS[kernel].value(h[:, None], w, **options)
        given = h, w
        h, w = at_least_four(h.detach()), at_least_four(w.detach())
        raw = h.new_empty(len(h), len(w))
        follow_torch(h.numel() * len(w))
        pairs(_array(h), _array(w), _array(raw), 0, kernel, found)
        ctx.save_for_backward(*given, raw)
        return raw[: ctx.sizes[0], : ctx.sizes[1]]

    @staticmethod
    def backward(ctx, slope):
        h, w, raw = ctx.saved_tensors
        if wants_graph():
            return *plain_gradients(ctx.plain, (h, w), slope), None, None, None
        h, w = at_least_four(h), at_least_four(w)
        # Rows that were added to fill a tile have no gradient.
        slope = F.pad(slope, (0, len(w) - ctx.sizes[1], 0, len(h) - ctx.sizes[0])).contiguous()
        shares, dw = h.new_zeros(follow_torch(h.numel() * len(w)), *h.shape), torch.zeros_like(w)
        ctx.found[1](
            _array(h),
            _array(w),
            _array(raw),
            _array(slope),
            0,
            _array(shares),
            _array(dw),
            f32(ctx.found[2]),
        )
        return shares.sum(0)[: ctx.sizes[0]], dw[: ctx.sizes[1]], None, None, None


@_inlined
def _inverse_norm(row):
    """Returns (1 / the Euclidean norm of row * scale, scale).

    scale is 1 unless squares would overflow or underflow. For a row of zeros both are 1.
    """
    total = f32(0)
    for c in range(row.size):
        total += row[c] * row[c]
    if f32(1e-30) < total < f32(1e30):
        return f32(1) / math.sqrt(total), f32(1)
    largest, total = f32(0), f32(0)
    for c in range(row.size):
        largest = _greater(largest, abs(row[c]))
    scale = f32(1) / _greater(largest, f32(1e-37))
    for c in range(row.size):
        total += (row[c] * scale) * (row[c] * scale)
    if total == 0:
        return f32(1), f32(1)
    return f32(1) / math.sqrt(total), scale


@_parallel
def _unit(x, out, inverse):
    """Writes the rows divided by their Euclidean norms to `out`, and 1 / norm to `inverse`.

    A row of zeros stays zero.
    """
    for i in prange(x.shape[0]):
        over, scale = _inverse_norm(x[i])
        inverse[i] = over * scale
        for c in range(x.shape[1]):
            out[i, c] = x[i, c] * scale * over


@_parallel
def _pull_unit(out, inverse, slope, dx):
    """The backward pass of `_unit`: removes the part of each slope along its row."""
    for i in prange(out.shape[0]):
        along = f32(0)
        for c in range(out.shape[1]):
            along += out[i, c] * slope[i, c]
        for c in range(out.shape[1]):
            dx[i, c] = inverse[i] * (slope[i, c] - along * out[i, c])


class Unit(torch.autograd.Function):
    """Float32 vectors divided by their Euclidean norms: (..., C) -> (..., C).

    Forward and backward are one pass over memory each.
    """

    @staticmethod
    def forward(ctx, x):
        rows = x.detach().reshape(-1, x.shape[-1]).contiguous()
        out, inverse = torch.empty_like(rows), rows.new_empty(len(rows))
        follow_torch(rows.numel())
        _unit(_array(rows), _array(out), _array(inverse))
        ctx.save_for_backward(x, out, inverse)
        return out.view(x.shape)

    @staticmethod
    def backward(ctx, slope):
        x, out, inverse = ctx.saved_tensors
        if wants_graph():
            return plain_gradients(lambda x: unit(x, 2), [x], slope)[0]
        rows, dx = slope.reshape(out.shape).contiguous(), torch.empty_like(out)
        follow_torch(rows.numel())
        _pull_unit(_array(out), _array(inverse), _array(rows), _array(dx))
        return dx.view(slope.shape)


def at_least_four(x: torch.Tensor) -> torch.Tensor:
    """x, contiguous, with rows of zeros added if it has fewer than the 4 rows of a tile."""
    return F.pad(x, (0, 0, 0, 4 - len(x))) if len(x) < 4 else x.contiguous()


# Below this many additions, use one thread. Numba and torch have separate OpenMP pools, and idle
# threads of one slow down the other.
ALONE = 2**20


def follow_torch(work: int) -> int:
    """Sets Numba's number of threads to torch's, or to 1 for little work. Returns that number.

    Starting Numba's threads changes the number of OpenMP's, which is torch's. So torch's is set
    again. work: the number of additions.
    """
    if Threads.lost:
        raise RuntimeError(
            "a loss from before the fork has no backward pass in a forked process:"
            " compute the loss again here"
        )
    Threads.started = True
    threads = torch.get_num_threads()
    ours = 1 if work < ALONE else min(threads, numba.config.NUMBA_NUM_THREADS)
    numba.set_num_threads(ours)
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    return ours


def _array(x: torch.Tensor) -> np.ndarray:
    """The same memory as a NumPy array.

    `x.numpy()` would mark the memory as not resizable, and FSDP2 has to free tables of prototypes.
    """
    return np.from_dlpack(x.detach())


# A chunk of rows has at most CHUNK raw values, 80 MiB. If slopes need memory of their own beside
# raw values, each of the two has half of that.
CHUNK = 20 * 2**20


NEAR_PAIRS = 2**12  # Near pairs to pull at a time.
LINKS = {"harmonic": HARMONIC, "softmax": SOFTMAX, CONTROL_NAME: CONTROL}


def supports(problem: Problem) -> str | None:
    """None, or the reason why there is no kernel for the problem."""
    distance = problem.distance
    if problem.states.dtype != torch.float32 or problem.states.device.type != "cpu":
        return f"needs a CPU and float32 (h is {problem.states.dtype} on {problem.states.device})"
    if not problem.finite:
        return "compiled maxima lose a NaN"
    if distance.is_control and problem.spec.name != "cross_entropy":
        return f"there is no compiled kernel for {problem.spec.name}"
    if distance.denominator is not None and distance.root(**problem.kernel_options) != 1:
        return f"there is no compiled kernel for the root of {problem.spec.name}'s quotient"
    if not usable():
        return "this process is a fork of one that ran Numba's kernels"
    if (
        distance.kernel not in ("l2", "dot")
        and find(distance.kernel, problem.kernel_options) is None
    ):
        return f"there is no compiled kernel for {problem.spec.name} with these options"
    return None


class _Work:
    """The two sides of a problem, and the memory that all its chunks share.

    raw, slope: for the raw values of a chunk and for their slopes. Both are the same memory if the
        raw values are not needed again.
    xx, yy: `value(x, 0)` of states (N,) and prototypes (V,), which floors are relative to.
    own_low, low: what states (N,) and prototypes (V,) add to the floor.
    shares: the part of each thread in dx.
    """

    def __init__(self, problem: Problem, needs_grad: bool):
        self.problem, self.needs_grad, self.sides = problem, needs_grad, Sides(problem)
        self.x, self.y = self.sides.states.whole(), self.sides.prototypes
        self.products = problem.spec.products
        N, V, C = len(self.x), len(self.y), self.x.shape[1]
        self.threads = follow_torch(N * V * C)
        self.kernel = problem.distance.kernel
        self.matmul = self.kernel in ("l2", "dot")
        self.found = None if self.matmul else find(self.kernel, problem.kernel_options)
        apart = self.kernel in ("linf", "lse")  # Their gradients need the raw values again.
        most = CHUNK // (1 + apart) // V
        if needs_grad and not self.matmul:
            most = min(most, CHUNK // (self.threads * C))  # numbers of `shares`
        self.rows = min(N, max(4, most // 4 * 4))
        self.wide = max(V, 4)
        self.raw = self.x.new_empty(max(self.rows, 4), self.wide)
        self.slope = torch.empty_like(self.raw) if apart and needs_grad else self.raw
        self.scratch = self.x.new_empty(self.threads, 2, V)
        self.sums = self.x.new_zeros(self.threads, V)
        self.losses, self.row_sums, self.strengths = self.x.new_empty(3, N)
        self.zeros = self.x.new_zeros(max(N, V))
        self.has_near = torch.zeros(self.rows, dtype=torch.bool)
        self.is_near = torch.empty(self.rows, V, dtype=torch.bool)  # Used where has_near is set.
        self._measure()
        self.dx = self.x.new_zeros(N, C) if needs_grad else None
        self.dy = self.y.new_gradient() if needs_grad and not problem.frozen else None
        self.shares = None
        if needs_grad and not self.matmul:
            if self.dy is not None:
                self.dy.zero_()
            self.shares = self.x.new_empty(self.threads, max(self.rows, 4), C)

    def _measure(self):
        self.xx, self.yy, middle = (
            self._sizes(self.x),
            self.x.new_empty(len(self.y)),
            self.x.new_zeros(self.x.shape[1]),
        )
        for first, block in self.y.blocks():
            self.yy[first : first + len(block)] = self._sizes(block)
            if self.kernel == "l2":
                middle += block.sum(0) / len(self.y)
            block = None  # Its memory serves the next block.
        # If all vectors have a large common part, products would lose their differences.
        # Subtracting it does not change l2.
        if self.kernel == "l2" and middle.square().sum() > self.yy.mean() / 2:
            self.y.shift, self.x = middle, self.x - middle
            self.xx, self.yy = (
                self._sizes(self.x),
                torch.cat([self._sizes(block) for _, block in self.y.blocks()]),
            )
        # The floor of a pair is their sum, and never 0.
        self.own_low = self._low(self.xx).clamp_min(torch.finfo(self.x.dtype).tiny)
        self.low = self._low(self.yy)

    def _sizes(self, x):
        """`value(x, 0)`: (M, C) -> (M,)."""
        if self.problem.distance.is_control:
            return x.new_zeros(len(x))
        return sizes(self.kernel, x, **self.problem.kernel_options)

    def _low(self, of_rows):
        """What one operand adds to the floor of the raw values: (M,) -> (M,)."""
        power = KERNELS[self.kernel].power(**self.problem.kernel_options)
        return of_rows * torch.finfo(of_rows.dtype).eps ** power


def loss(problem: Problem, needs_grad: bool) -> Result:
    """See `Backend`. Each chunk of rows does forward and backward while it is in cache."""
    work = _Work(problem, needs_grad)
    for i in range(0, len(work.x), work.rows):
        part = slice(i, min(i + work.rows, len(work.x)))
        _measure_pairs(work, part)
        _turn_into_slopes(work, part)
        if needs_grad:
            work.slope[part.stop - i : 4] = 0  # These rows only fill a tile.
            if work.matmul:
                _pull_products(work, part)
            else:
                _pull_elementwise(work, part)
    if not needs_grad:
        return Result(work.losses, None)
    sums = work.sums.sum(0)
    if work.kernel == "l2":  # So far dx and dy have only the gradient of x.y.
        torch.addcmul(-2 * work.dx, work.x, work.row_sums[:, None], value=2, out=work.dx)
        for first, block in work.y.blocks() if work.dy is not None else ():
            into = work.dy[first : first + len(block)]
            into.mul_(-2).addcmul_(block, sums[first : first + len(block), None], value=2)
    work.raw = work.slope = work.shares = None  # Frees their memory for what follows.
    terms = work.sides.u is not None
    du, dv = (work.row_sums, sums) if terms else (None, None)
    dbias = None if problem.bias is None else sums
    return work.sides.result(work.losses, work.dx, work.dy, du, dv, work.strengths.sum(), dbias)


def _measure_pairs(work: _Work, part: slice):
    """Writes the raw values of a chunk of rows and all prototypes to `work.raw`."""
    own, n = work.x[part], part.stop - part.start
    padded = at_least_four(own)
    work.has_near.zero_()
    for first, block in work.y.blocks():
        here = slice(first, first + len(block))
        if work.matmul and work.products is FLOAT32:
            torch.mm(own, block.T, out=work.raw[:n, here])
        elif work.matmul:
            work.raw[:n, here] = Multiply.apply(own, block, work.products)
        else:
            pairs(
                _array(padded),
                _array(at_least_four(block)),
                _array(work.raw),
                first,
                work.kernel,
                work.found,
            )
        if work.kernel == "l2":
            sizes_of_both = _array(work.xx[part]), _array(work.yy[here])
            marks = _array(work.has_near), _array(work.is_near)
            pairs_here = _array(work.raw), first, _array(own), _array(block)
            _recompute_near(*pairs_here, *sizes_of_both, f32(NEAR), *marks)
        block = None


def _turn_into_slopes(work: _Work, part: slice):
    """Turns the raw values of a chunk into its losses, and into slopes for the backward pass."""
    problem, sides, V = work.problem, work.sides, len(work.y)
    distance = problem.distance
    floor = distance.denominator.floor if distance.denominator else np.finfo(f32).tiny
    root = distance.root(**problem.kernel_options)
    _epilogue(
        _array(work.raw),
        _array(work.slope),
        _array(work.own_low[part]),
        _array(work.low),
        _array((work.zeros if sides.u is None else sides.u)[part]),
        _array(work.zeros[:V] if sides.v is None else sides.v),
        _array(work.zeros[:V] if problem.bias is None else problem.bias),
        _array(problem.targets[part]),
        _array(problem.weights[part]),
        _array(work.losses[part]),
        _array(work.row_sums[part]),
        _array(work.sums),
        _array(work.strengths[part]),
        _array(work.scratch),
        _array(work.has_near),
        _array(work.is_near),
        LINKS[problem.spec.link],
        sides.u is not None,
        np.array([problem.strength, root, distance.factor, floor, problem.spec.skip / V], f32),
        work.needs_grad,
    )


def _pull_products(work: _Work, part: slice):
    """Adds the products of a chunk's slopes with prototypes and states to dx and dy."""
    own, n = work.x[part], part.stop - part.start
    for first, block in work.y.blocks():
        here = slice(first, first + len(block))
        slope, into = work.slope[:n, here], None if work.dy is None else work.dy[here]
        near = _take_near(work, slope, first) if work.has_near.any() else None
        if work.products is FLOAT32:
            work.dx[part].addmm_(slope, block)
            if into is not None:
                into.addmm_(slope.T, own, beta=float(part.start > 0))
        else:
            more_dx, more_dy = work.products.gradients(slope, own, block)
            work.dx[part] += more_dx
            if into is not None:
                into.add_(more_dy) if part.start else into.copy_(more_dy)
        if near is not None:
            _pull_near(near, own, block, work.dx[part], into)
        block = None


def _take_near(work: _Work, slope: torch.Tensor, first: int):
    """Sets the slopes of near pairs to 0 in a chunk (R, B), whose prototypes begin at `first`.

    Returns: the rows, columns and slopes of those P pairs, (P,) each.
    """
    rows = work.has_near[: len(slope)].nonzero()[:, 0]
    i, j = work.is_near[rows, first : first + slope.shape[1]].nonzero(as_tuple=True)
    i = rows[i]
    taken = slope[i, j]
    slope[i, j] = 0
    return i, j, taken


def _pull_near(near, x, y, dx, dy):
    """Adds -1/2 times the gradients of near pairs to dx (R, C) and dy (B, C), as `loss` expects.

    They come from the differences of x (R, C) and y (B, C). near: from `_take_near`. dy may be
    None.
    """
    for i, j, slopes in zip(*(torch.split(t, NEAR_PAIRS) for t in near), strict=True):
        pull = slopes[:, None] * (y[j] - x[i])
        dx.index_add_(0, i, pull)
        if dy is not None:
            dy.index_add_(0, j, -pull)


def _pull_elementwise(work: _Work, part: slice):
    """Turns the slopes of a chunk into dx of its rows, and adds their gradients to dy."""
    V, padded = len(work.y), at_least_four(work.x[part])
    work.shares.zero_()
    for first, block in work.y.blocks():
        here = slice(first, first + len(block))
        tile = at_least_four(block)
        own = None if work.dy is None else work.dy[here]
        direct = own is not None and len(tile) == len(block)
        into = own if direct else torch.zeros_like(tile)
        work.slope[:, V : work.wide] = 0
        backward = work.found[1]
        arrays = [_array(t) for t in (padded, tile, work.raw, work.slope)]
        backward(*arrays, first, _array(work.shares), _array(into), f32(work.found[2]))
        if own is not None and not direct:
            own += into[: len(block)]
        block = tile = None
    work.dx[part] = work.shares.sum(0)[: part.stop - part.start]


BACKEND = Backend("numba", supports, loss)
