"""The head on a CPU, compiled by Numba: raw values, loss and slopes, gradients.

Three templates do it, and every kernel is them with its own *term* (what a coordinate adds to the
raw value) and *slope* (the derivatives of the term with respect to x and y) put in:

    forward    a tile of 4 states x 4 prototypes keeps 16 accumulators in registers while it walks
               the coordinates
    epilogue   a row of raw values becomes its loss, then dL/draw, in a core's cache (the same for
               all kernels)
    backward   the same tile adds slope * dL/draw to 4 rows of dx and 4 rows of dy, in one pass over
               memory

l2 and dot take matrix products for the first and the last. The maximum (linf) has a backward
template of its own: only one coordinate of a pair has a gradient. In the backward pass a thread
owns a range of prototypes, hence its rows of dy; of dx each has its own share, added up at the end.
Nothing of size (N, V, C) exists, and of size (N, V) only a chunk of rows. Sums are reassociated, as
any SIMD sum is, so the compiler may not assume that values are finite: a NaN comes out as one.
Compiled code is cached on disk, beside this file or in Numba's own cache folder.

Floor, per (pair, coordinate), in vector operations: |x - y| takes 3 (subtract, absolute, add), its
gradient 5 (subtract, sign, compare with 0, two additions); sqrt and division take as long as 10.
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

from ..kernels import KERNELS, NEAR, sizes
from ..links import CONTROL as CONTROL_NAME
from ..precision import FLOAT32, Multiply
from . import Backend, Problem, Result
from .mapped import Sides

# Fastmath, less the flags that allow to assume away NaN and infinity
FAST = {"reassoc", "contract", "nsz", "arcp"}
# 1/0 is infinity, not an exception that keeps a loop from being vectorised
OPTIONS = {"fastmath": FAST, "error_model": "numpy"}
f32 = np.float32


def _inlined(function):
    return njit(forceinline=True, **OPTIONS)(function)


def _parallel(function):
    """Compiled when it is first called, and kept on the disk where there is a folder that can be
    written."""
    try:
        return njit(parallel=True, cache=True, **OPTIONS)(function)
    except RuntimeError:  # Numba finds no such folder: neither this one nor the user's own
        return njit(parallel=True, **OPTIONS)(function)


_INT, _FLOAT = ir.IntType(32), ir.FloatType()


def _operation(build):
    """A float32 function for Numba, of one or two numbers, that is the LLVM code `build(builder,
    x[, y])` makes."""

    def code(context, b, signature, arguments):
        return build(b, *arguments)

    if build.__code__.co_argcount == 2:
        return intrinsic(lambda context, x: (nb.float32(nb.float32), code))
    return intrinsic(lambda context, x, y: (nb.float32(nb.float32, nb.float32), code))


@_operation
def _greater(b, x, y):
    """The greater of two numbers that are not NaN; Python's max is not vectorised."""
    function = b.module.declare_intrinsic(
        "llvm.maxnum", [_FLOAT], ir.FunctionType(_FLOAT, [_FLOAT, _FLOAT])
    )
    return b.call(function, (x, y), fastmath=("nnan", "nsz"))


# exp and log, for Numba's own are calls that keep a loop from being vectorised


@_operation
def _times_power_of_two(b, m, k):
    """m 2^k for m in [0.5, 2) and an integral float k in -126..126."""
    return b.bitcast(b.add(b.bitcast(m, _INT), b.shl(b.fptosi(k, _INT), _INT(23))), _FLOAT)


@_operation
def _exponent(b, x):
    """floor(log2 x) of a normal positive x, as a float."""
    return b.sitofp(b.sub(b.lshr(b.bitcast(x, _INT), _INT(23)), _INT(127)), _FLOAT)


@_operation
def _mantissa(b, x):
    """x / 2^_exponent(x), in [1, 2)."""
    return b.bitcast(b.or_(b.and_(b.bitcast(x, _INT), _INT(0x7FFFFF)), _INT(0x3F800000)), _FLOAT)


@_operation
def _turned(b, s, d):
    """s with its sign changed where d is negative: one operation in a vectorised loop."""
    sign = b.and_(b.bitcast(d, _INT), _INT(0x80000000))
    return b.bitcast(b.xor(b.bitcast(s, _INT), sign), _FLOAT)


@_operation
def _over(b, x, y):
    """x / y for finite numbers, to 3 units in the last place: an estimate of 1 / y and a step of
    Newton's method where vectors have it."""
    return b.fdiv(x, y, flags=("ninf", "arcp", "nsz", "contract", "reassoc"))


@_inlined
def _signed(s, d):
    """s sign(d), 0 where d is 0."""
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


_E0, _E1, _E2, _E3, _E4, _E5, _E6 = _fit(np.exp2, -0.5, 0.5, 6)  # to 3e-9; degree 5: 1e-7
# log(1 + f) = f + f^2 P(f) on [sqrt(1/2) - 1, sqrt(2) - 1], which keeps small f exact
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
    """exp(x) for x <= 88, to 2 units in the last place and 1e-38; exp of less than -87 is 1e-38. A
    NaN is lost."""
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
    """log(x) of a normal positive x, to 1e-7 absolutely and a few units in the last place far from
    1."""
    k, m = _exponent(x), _mantissa(x)
    high = m > f32(1.4142135)
    k, m = (k + f32(1) if high else k), (m * f32(0.5) if high else m)
    return _log_with(k, m - f32(1))


# the templates
#
# Their names `add`, `put` and `pull` are open: `_compile` below puts `_add`, `_put` and `_pull` in
# for them, and in those a kernel's own `term`, `slope`, `join` and `end`.


def _forward(x, y, raw, first, p):
    """raw[:, first:] of states x (R, C) and prototypes y (B, C); at least 4 of each. A last tile
    that is not whole starts earlier."""
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
    """Adds to dx (threads, R, C) and dy (B, C) what the slopes s[:, first:] = dL/draw give."""
    threads, R, C, B = dx.shape[0], x.shape[0], x.shape[1], y.shape[0]
    for t in prange(threads):
        stop = (t + 1) * (B // 4) // threads * 4 if t < threads - 1 else B
        for low in range(t * (B // 4) // threads * 4, stop, 4):
            j = min(low, B - 4)
            y0, y1, y2, y3 = y[j], y[j + 1], y[j + 2], y[j + 3]
            g0, g1, g2, g3 = dy[j], dy[j + 1], dy[j + 2], dy[j + 3]
            done = low - j  # columns of this tile that the one before has served
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
    """The gradient of a maximum goes to one coordinate that attains it: the tile looks for it
    again, then each pair adds there."""
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
                a = (f32(0), f32(0), f32(0), f32(0))  # the place, counted from 1
                for c in range(C):
                    a = _later(a, x0[c], (y0[c], y1[c], y2[c], y3[c]), f32(c + 1), r0)
                for k in range(4):
                    if s0[k] != 0 and a[k] > 0:
                        c = int(a[k]) - 1
                        g = _signed(s0[k], x0[c] - y[j + k, c])
                        dx[t, i, c] += g
                        dy[j + k, c] -= g


@_parallel
def _recompute_near(raw, first, x, y, xx, yy, near):
    """Inner products become squared distances, in place: |x|^2 + |y|^2 - 2 x.y, and sum (x - y)^2
    where that cancels."""
    for i in prange(x.shape[0]):
        row, own, count = raw[i, first : first + y.shape[0]], xx[i], 0
        for j in range(row.size):
            both = own + yy[j]
            r = both - f32(2) * row[j]
            row[j] = r
            count += r < near * both
        if count > 0:
            for j in range(row.size):
                if row[j] < near * (own + yy[j]):
                    total = f32(0)
                    for c in range(x.shape[1]):
                        d = x[i, c] - y[j, c]
                        total += d * d
                    row[j] = total


HARMONIC, SOFTMAX, CONTROL = 0, 1, 2


@njit(**OPTIONS)
def _energies(raw, e, own, low, u, v, bias, link, terms, floor, root, factor):
    """A row of raw values -> e with logit = -n root log e (harmonic; up to a constant) or -s e
    (softmax, control); -> (min e, any NaN)."""
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
    nearest, strange = f32(np.inf), 0
    for j in range(e.size):
        nearest = e[j] if e[j] < nearest else nearest
        strange += raw[j] != raw[j]
    return nearest, strange > 0


@njit(**OPTIONS)
def _probabilities(e, p, nearest, strength, link, root):
    """-> (sum exp(logit - max logit), sum of that times (max logit - logit) / strength); the terms
    of the first in p."""
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
    """dL/draw of a row; those below `skip` of the target's are 0."""
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
    """Adds a row of slopes to the sums of the columns -> the sum of the row."""
    total = f32(0)
    for j in range(slope.size):
        total += slope[j]
        sums[j] += slope[j]
    return total


@njit(**OPTIONS)
def _sum_terms(e, p, y, weight, total, u, v, sums, strength, link, floor):
    """The same for the derivative with respect to u + v, the denominator of e."""
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
    link,
    terms,
    numbers,
    needs_grad,
):
    """Chunk of raw values (R, >= V) -> losses (R,) and, into `slope`, the derivatives of sum(weight
    losses) with respect to them.

    numbers: strength, root, factor, floor of the denominator, skip. Sums of slopes (or of the
        derivatives of u + v): row_sums (R,), and sums (threads, V) to which each thread adds.
        strengths (R,): the derivative with respect to n or s.
    """
    strength, root, factor, floor, skip = numbers[0], numbers[1], numbers[2], numbers[3], numbers[4]
    threads, R, V = sums.shape[0], targets.size, low.size
    for t in prange(threads):
        e, p = scratch[t, 0], scratch[t, 1]
        for i in range(t * R // threads, (t + 1) * R // threads):
            row, y = raw[i, :V], targets[i]
            nearest, strange = _energies(
                row, e, own[i], low, u[i], v, bias, link, terms, floor, root, factor
            )
            total, moment = _probabilities(e, p, nearest, strength, link, root)
            far = root * _log1p((e[y] - nearest) / nearest) if link == HARMONIC else e[y] - nearest
            losses[i] = np.nan if strange else math.log(total) + strength * far
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
                if strange:
                    into[:] = np.nan
                if not terms:
                    row_sums[i] = _sum_slopes(into, sums[t])


# terms and slopes: term(x, y, p, r) -> float; slope(x, y, s, p, r) -> s dterm/dx, s dterm/dy. p is
# the kernel's number (power, a, floor), r the raw value.


def _l1_term(x, y, p, r):
    return abs(x - y)


def _l1_slope(x, y, s, p, r):
    g = _signed(s, x - y)
    return g, -g


def _half_term(x, y, p, r):
    return math.sqrt(abs(x - y))


def _half_slope(x, y, s, p, r):
    d = x - y
    # Unbounded at 0, where the sign is 0
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
    return _exp(p * _log(_greater(d, f32(1e-37)))) if d > f32(1e-37) else f32(0)


def _power_slope(x, y, s, p, r):
    d = x - y
    size = _greater(abs(d), f32(1e-37))
    g = _turned(s * p * _exp((p - f32(1)) * _log(size)), d) if abs(d) > f32(1e-37) else f32(0)
    return g, -g


def _lse_term(x, y, p, r):
    return _exp(p * (abs(x - y) - r))  # r is the maximum, computed before


def _lse_slope(x, y, s, p, r):
    d = x - y
    g = _signed(s * _exp(p * (abs(d) - r)), d)
    return g, -g


def _canberra_term(x, y, p, r):
    return _over(abs(x - y), _greater(abs(x) + abs(y), p))


def _canberra_slope(x, y, s, p, r):
    """d/dx |x-y| / (|x|+|y|) is 2 |y| / (|x|+|y|)^2 sign(x-y) where x and y have one sign, else 0;
    half of it where one is 0."""
    inverse = _over(f32(1), _greater(abs(x) + abs(y), p))
    g = _signed(s * inverse * (f32(1) + _sign(x) * _sign(y)), x - y)
    return g * (abs(y) * inverse), -g * (abs(x) * inverse)


def _canberra_floored_slope(x, y, s, p, r):
    """The same, but +-1/p where the denominator is the floor p."""
    size = abs(x) + abs(y)
    inverse = _over(f32(1), _greater(size, p))
    g, k = _signed(s * inverse, x - y), (f32(1) + _sign(x) * _sign(y)) * inverse
    within = size > p
    return g * (k * abs(y) if within else f32(1)), -g * (k * abs(x) if within else f32(1))


# putting them in


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
    """Four slopes, 0 for the first `done` columns, and for a row that the tile before has
    served."""
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
    """a, or c where the difference attains r."""
    return (
        _greater(a[0], c if abs(x - z[0]) >= r[0] else f32(0)),
        _greater(a[1], c if abs(x - z[1]) >= r[1] else f32(0)),
        _greater(a[2], c if abs(x - z[2]) >= r[2] else f32(0)),
        _greater(a[3], c if abs(x - z[3]) >= r[3] else f32(0)),
    )


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
    """The template with these functions in place of the names it leaves open; named, so that each
    has its place in Numba's cache."""
    made = types.FunctionType(
        template.__code__, {**globals(), **functions}, f"{template.__name__}_{name}"
    )
    made.__qualname__, made.__module__ = made.__name__, __name__
    return made


def _compile(name, term, slope, join=_sum, end=_same, backward=_backward):
    """-> (forward, backward) of a kernel."""
    functions = {
        "term": _inlined(term),
        "slope": _inlined(slope),
        "join": _inlined(join),
        "end": _inlined(end),
    }
    for k, template in (("add", _add), ("put", _put), ("pull", _pull)):
        functions[k] = _inlined(_with(template, name, **functions))
    return tuple(_parallel(_with(f, name, **functions)) for f in (_forward, backward))


# (kernel, its power p, or None) -> forward and backward
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
    """Whether Numba's threads have been started, and whether they were lost because this process is
    a fork of the one that has them."""

    started = lost = False


def _after_fork():
    if Threads.started:
        Threads.started, Threads.lost = False, True
        # Its threads are lost too, and it would wait for them; DataLoader's workers do the same
        torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):  # everywhere but on Windows, which does not fork
    os.register_at_fork(after_in_child=_after_fork)


def usable() -> bool:
    """Whether this process may run compiled kernels: OpenMP ends a fork of a process in which it
    has run."""
    if Threads.lost:
        warnings.warn(
            "this process was forked after Numba's kernels had run: it computes without them, on"
            " one thread."
            " Start processes with the method 'spawn' for the full speed",
            stacklevel=1,
        )
    return not Threads.lost


def find(kernel: str, options: dict):
    """-> (forward, backward, number) of a kernel with these options, or None where none is compiled
    or may be run."""
    if options.get("weighted") or not usable():
        return None
    if kernel == "canberra":
        floor = options.get("floor", 0.0)
        # 0 / 1e-37 = 0, as in scipy
        return *COMPILED["canberra", "floor" if floor else None], max(floor, 1e-37)
    if kernel == "lp":
        p = float(options.get("p", 1.0))
        return *(COMPILED.get(("lp", p)) or COMPILED["lp", None]), p
    found = COMPILED.get((kernel, None))
    return found and (*found, options.get("a", 0.0))


def pairs(x: np.ndarray, y: np.ndarray, raw: np.ndarray, first: int, kernel: str, found):
    """Raw values of all pairs into raw[:, first:]."""
    if kernel == "lse":  # shifted by the maximum, as any log-sum-exp
        COMPILED["linf", None][0](x, y, raw, first, f32(0))
    found[0](x, y, raw, first, f32(found[2]))


class Pairs(torch.autograd.Function):
    """Raw values of all pairs: float32 CPU tensors (N, C), (V, C), and what `find` gave -> (N,
    V)."""

    @staticmethod
    def forward(ctx, h, w, kernel, found):
        ctx.found, ctx.sizes = found, (len(h), len(w))
        h, w = at_least_four(h.detach()), at_least_four(w.detach())
        raw = h.new_empty(len(h), len(w))
        follow_torch(h.numel() * len(w))
        pairs(_array(h), _array(w), _array(raw), 0, kernel, found)
        ctx.save_for_backward(h, w, raw)
        return raw[: ctx.sizes[0], : ctx.sizes[1]]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, slope):
        h, w, raw = ctx.saved_tensors
        # Padded pairs have no gradient
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
        return shares.sum(0)[: ctx.sizes[0]], dw[: ctx.sizes[1]], None, None


@_inlined
def _inverse_norm(row):
    """-> (1 over the Euclidean norm of row * scale, scale): scale is 1 unless squares would over-
    or underflow. A row of zeros: 1."""
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
    """Rows over their Euclidean norms; `inverse` of the norms. A row of zeros stays one."""
    for i in prange(x.shape[0]):
        over, scale = _inverse_norm(x[i])
        inverse[i] = over * scale
        for c in range(x.shape[1]):
            out[i, c] = x[i, c] * scale * over


@_parallel
def _pull_unit(out, inverse, slope, dx):
    for i in prange(out.shape[0]):
        along = f32(0)
        for c in range(out.shape[1]):
            along += out[i, c] * slope[i, c]
        for c in range(out.shape[1]):
            dx[i, c] = inverse[i] * (slope[i, c] - along * out[i, c])


class Unit(torch.autograd.Function):
    """Float32 vectors over their Euclidean norms, one pass over memory each way: (..., C) -> (...,
    C)."""

    @staticmethod
    def forward(ctx, x):
        rows = x.detach().reshape(-1, x.shape[-1]).contiguous()
        out, inverse = torch.empty_like(rows), rows.new_empty(len(rows))
        follow_torch(rows.numel())
        _unit(_array(rows), _array(out), _array(inverse))
        ctx.save_for_backward(out, inverse)
        return out.view(x.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, slope):
        out, inverse = ctx.saved_tensors
        rows, dx = slope.reshape(out.shape).contiguous(), torch.empty_like(out)
        follow_torch(rows.numel())
        _pull_unit(_array(out), _array(inverse), _array(rows), _array(dx))
        return dx.view(slope.shape)


def at_least_four(x: torch.Tensor) -> torch.Tensor:
    """x contiguous, with rows of zeros added to make a tile; x itself where nothing is to do."""
    return F.pad(x, (0, 0, 0, 4 - len(x))) if len(x) < 4 else x.contiguous()


# Additions below which one thread is faster: Numba's OpenMP and torch's are two, whose waiting
# threads hold up each other.
ALONE = 2**20


def follow_torch(work: int) -> int:
    """Numba takes torch's number of threads, or one for little work; torch keeps it, though
    starting Numba's threads sets OpenMP's number, which is torch's."""
    if Threads.lost:
        raise RuntimeError(
            "what was computed before this process was forked cannot be differentiated in it:"
            " compute it again here"
        )
    Threads.started = True
    threads = torch.get_num_threads()
    ours = 1 if work < ALONE else min(threads, numba.config.NUMBA_NUM_THREADS)
    numba.set_num_threads(ours)
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    return ours


def _array(x: torch.Tensor) -> np.ndarray:
    """The same memory as an array. `x.numpy()` would mark it as not resizable, and FSDP2 has to
    free tables of prototypes."""
    return np.from_dlpack(x.detach())


# A chunk of rows has at most CHUNK raw values: 80 MiB, or two of half of it where raw values are
# needed beside their slopes.
CHUNK = 20 * 2**20


LINKS = {"harmonic": HARMONIC, "softmax": SOFTMAX, CONTROL_NAME: CONTROL}


def supports(problem: Problem) -> str | None:
    """None, or why there is no kernel for it."""
    distance = problem.distance
    if problem.states.dtype != torch.float32 or problem.states.device.type != "cpu":
        return f"needs a CPU and float32 (h is {problem.states.dtype} on {problem.states.device})"
    if not problem.finite:
        return "compiled maxima lose a NaN"
    if distance.is_control and problem.spec.name != "cross_entropy":
        return f"there is no compiled kernel for {problem.spec.name}"
    if not usable():
        return "this process is a fork of one that ran Numba's kernels"
    if (
        distance.kernel not in ("l2", "dot")
        and find(distance.kernel, problem.kernel_options) is None
    ):
        return f"there is no compiled kernel for {problem.spec.name} with these options"
    return None


class _Work:
    """The two sides of a problem, and what all its chunks share.

    raw, slope: room for the raw values of a chunk and for their slopes, one memory where the raw
        values are not needed again.
    xx, yy: the sizes of states (N,) and prototypes (V,) that floors are relative to; own_low, low:
        their shares in the floor.
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
        self.rows = min(N, max(4, CHUNK // (1 + apart) // V // 4 * 4))
        self.wide = max(V, 4)
        self.raw = torch.empty(max(self.rows, 4), self.wide)
        self.slope = torch.empty_like(self.raw) if apart and needs_grad else self.raw
        self.scratch, self.sums = torch.empty(self.threads, 2, V), torch.zeros(self.threads, V)
        self.losses, self.row_sums, self.strengths = torch.empty(N), torch.empty(N), torch.empty(N)
        self.zeros = torch.zeros(max(N, V))
        self._measure()
        self.dx = torch.zeros(N, C) if needs_grad else None
        self.dy = self.y.new_gradient() if needs_grad else None
        self.shares = None  # of each thread in dx
        if needs_grad and not self.matmul:
            self.dy.zero_()
            self.shares = torch.empty(self.threads, max(self.rows, 4), C)

    def _measure(self):
        self.xx, self.yy, middle = (
            self._sizes(self.x),
            torch.empty(len(self.y)),
            torch.zeros(self.x.shape[1]),
        )
        for first, block in self.y.blocks():
            self.yy[first : first + len(block)] = self._sizes(block)
            if self.kernel == "l2":
                middle += block.sum(0) / len(self.y)
            block = None  # The next one is made in its memory.
        # Vectors with a large common part would lose their differences in the products; l2 does not
        # change when it is taken off.
        if self.kernel == "l2" and middle.square().sum() > self.yy.mean() / 2:
            self.y.shift, self.x = middle, self.x - middle
            self.xx, self.yy = (
                self._sizes(self.x),
                torch.cat([self._sizes(block) for _, block in self.y.blocks()]),
            )
        self.own_low, self.low = self._low(self.xx), self._low(self.yy)

    def _sizes(self, x):
        """`value(x, 0)`: (M, C) -> (M,)."""
        if self.problem.distance.is_control:
            return x.new_zeros(len(x))
        return sizes(self.kernel, x, **self.problem.kernel_options)

    def _low(self, of_rows):
        """One operand's share in the floor of the raw values, never 0: (M,) -> (M,)."""
        info = torch.finfo(of_rows.dtype)
        power = KERNELS[self.kernel].power(**self.problem.kernel_options)
        return (of_rows * info.eps**power).clamp_min(info.tiny)


def loss(problem: Problem, needs_grad: bool) -> Result:
    """See `Backend`. Each chunk of rows goes forward and backward while it is in cache."""
    work = _Work(problem, needs_grad)
    for i in range(0, len(work.x), work.rows):
        part = slice(i, min(i + work.rows, len(work.x)))
        _measure_pairs(work, part)
        _turn_into_slopes(work, part)
        if needs_grad:
            work.slope[part.stop - i : 4] = 0  # rows that only fill a tile
            if work.matmul:
                _pull_products(work, part)
            else:
                _pull_elementwise(work, part)
    if not needs_grad:
        return Result(work.losses, None)
    sums = work.sums.sum(0)
    if work.kernel == "l2":  # of |x|^2 + |y|^2 - 2 x.y, the product is in dx and dy
        torch.addcmul(-2 * work.dx, work.x, work.row_sums[:, None], value=2, out=work.dx)
        for first, block in work.y.blocks():
            into = work.dy[first : first + len(block)]
            into.mul_(-2).addcmul_(block, sums[first : first + len(block), None], value=2)
    work.raw = work.slope = work.shares = None  # What follows needs memory of its own.
    terms = work.sides.u is not None
    du, dv = (work.row_sums, sums) if terms else (None, None)
    dbias = None if problem.bias is None else sums
    return work.sides.result(work.losses, work.dx, work.dy, du, dv, work.strengths.sum(), dbias)


def _measure_pairs(work: _Work, part: slice):
    """Raw values of a chunk of rows and all prototypes, into `work.raw`."""
    own, n = work.x[part], part.stop - part.start
    padded = at_least_four(own)
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
            _recompute_near(
                _array(work.raw), first, _array(own), _array(block), *sizes_of_both, f32(NEAR)
            )
        block = None


def _turn_into_slopes(work: _Work, part: slice):
    """Raw values of a chunk -> its losses, and what is left of it in the backward pass."""
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
        LINKS[problem.spec.link],
        sides.u is not None,
        np.array([problem.strength, root, distance.factor, floor, problem.spec.skip / V], f32),
        work.needs_grad,
    )


def _pull_products(work: _Work, part: slice):
    """Slopes of a chunk -> their products with prototypes and states, added to dx and dy."""
    own, n = work.x[part], part.stop - part.start
    for first, block in work.y.blocks():
        here = slice(first, first + len(block))
        slope, into = work.slope[:n, here], work.dy[here]
        if work.products is FLOAT32:
            work.dx[part].addmm_(slope, block)
            into.addmm_(slope.T, own, beta=float(part.start > 0))
        else:
            more_dx, more_dy = work.products.gradients(slope, own, block)
            work.dx[part] += more_dx
            into.add_(more_dy) if part.start else into.copy_(more_dy)
        block = None


def _pull_elementwise(work: _Work, part: slice):
    """Slopes of a chunk -> dx of its rows, and their share of dy."""
    V, padded = len(work.y), at_least_four(work.x[part])
    work.shares.zero_()
    for first, block in work.y.blocks():
        here = slice(first, first + len(block))
        tile = at_least_four(block)
        into = work.dy[here] if len(tile) == len(block) else torch.zeros_like(tile)
        work.slope[:, V : work.wide] = 0
        backward = work.found[1]
        arrays = [_array(t) for t in (padded, tile, work.raw, work.slope)]
        backward(*arrays, first, _array(work.shares), _array(into), f32(work.found[2]))
        if into.data_ptr() != work.dy[here].data_ptr():
            work.dy[here] += into[: len(block)]
        block = tile = None
    work.dx[part] = work.shares.sum(0)[: part.stop - part.start]


BACKEND = Backend("numba", supports, loss)
