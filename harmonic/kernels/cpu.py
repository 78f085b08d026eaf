"""The elementwise kernels on a CPU, compiled by Numba: raw values and gradients of all pairs.

A kernel is a *term* `t(x, y, p)` that is added up over coordinates, and its *slope*, the derivatives of the term with respect to x and
y. One pair of templates makes both passes from them:

    forward    a tile of 2 states x 4 prototypes keeps 8 accumulators in registers while it walks the coordinates
    backward   the same tile adds slope * dL/draw to 2 rows of dh and 4 rows of dw, in one pass over memory

The maximum (linf) has templates of its own: only one coordinate of a pair has a gradient.

A thread owns a block of prototypes, hence its rows of dw; of dh each thread has its own share, added up at the end. Nothing of size
(N, V, C) exists. Sums are reassociated, as any SIMD sum is (fastmath), so operands must be finite: `dense.pairs` sees to it. Compiled code
is cached on disk, beside this file or in Numba's own cache folder.
"""

import types

import numba
import numpy as np
import torch
import torch.nn.functional as F
from numba import njit, prange


def _forward(h, w, raw, p):
    N, C = h.shape
    for b in prange(w.shape[0] // 4):
        j = 4 * b
        w0, w1, w2, w3 = w[j], w[j + 1], w[j + 2], w[j + 3]
        for i in range(0, N, 2):
            h0, h1 = h[i], h[i + 1]
            a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = np.float32(0)
            for c in range(C):
                x, z, y0, y1, y2, y3 = h0[c], h1[c], w0[c], w1[c], w2[c], w3[c]
                a0 = add(a0, term(x, y0, p))
                a1 = add(a1, term(x, y1, p))
                a2 = add(a2, term(x, y2, p))
                a3 = add(a3, term(x, y3, p))
                b0 = add(b0, term(z, y0, p))
                b1 = add(b1, term(z, y1, p))
                b2 = add(b2, term(z, y2, p))
                b3 = add(b3, term(z, y3, p))
            raw[i, j], raw[i, j + 1], raw[i, j + 2], raw[i, j + 3] = a0, a1, a2, a3
            raw[i + 1, j], raw[i + 1, j + 1], raw[i + 1, j + 2], raw[i + 1, j + 3] = b0, b1, b2, b3


def _backward(h, w, raw, s, dh, dw, p):
    threads, N, C, tiles = dh.shape[0], h.shape[0], h.shape[1], w.shape[0] // 4
    for t in prange(threads):
        for j in range(t * tiles // threads * 4, (t + 1) * tiles // threads * 4, 4):
            w0, w1, w2, w3 = w[j], w[j + 1], w[j + 2], w[j + 3]
            o0, o1, o2, o3 = dw[j], dw[j + 1], dw[j + 2], dw[j + 3]
            for i in range(0, N, 2):
                h0, h1, e0, e1 = h[i], h[i + 1], dh[t, i], dh[t, i + 1]
                s0, s1, s2, s3 = s[i, j], s[i, j + 1], s[i, j + 2], s[i, j + 3]
                r0, r1, r2, r3 = s[i + 1, j], s[i + 1, j + 1], s[i + 1, j + 2], s[i + 1, j + 3]
                for c in range(C):
                    x, z, y0, y1, y2, y3 = h0[c], h1[c], w0[c], w1[c], w2[c], w3[c]
                    f0, g0 = slope(x, y0, s0, p)
                    f1, g1 = slope(x, y1, s1, p)
                    f2, g2 = slope(x, y2, s2, p)
                    f3, g3 = slope(x, y3, s3, p)
                    u0, v0 = slope(z, y0, r0, p)
                    u1, v1 = slope(z, y1, r1, p)
                    u2, v2 = slope(z, y2, r2, p)
                    u3, v3 = slope(z, y3, r3, p)
                    e0[c] += (f0 + f1) + (f2 + f3)
                    e1[c] += (u0 + u1) + (u2 + u3)
                    o0[c] += g0 + v0
                    o1[c] += g1 + v1
                    o2[c] += g2 + v2
                    o3[c] += g3 + v3


def _backward_maximum(h, w, raw, s, dh, dw, p):
    """The gradient of a maximum goes to the coordinate that attains it (the last, if several do)."""
    threads, N, C, V = dh.shape[0], h.shape[0], h.shape[1], w.shape[0]
    for t in prange(threads):
        for j in range(t * V // threads, (t + 1) * V // threads):
            y = w[j]
            for i in range(N):
                if s[i, j] != 0:
                    x, r, at = h[i], raw[i, j], np.int32(-1)
                    for c in range(C):
                        at = max(at, np.int32(c) if term(x[c], y[c], p) >= r else np.int32(-1))
                    if at >= 0:
                        f, g = slope(x[at], y[at], s[i, j], p)
                        dh[t, i, at] += f
                        dw[j, at] += g


@njit(inline="always")
def _sum(a, b):
    return a + b


@njit(inline="always")
def _maximum(a, b):
    return max(a, b)


@njit(inline="always")
def _sign(x, y):
    """-1, 0 or 1: of x - y, without a branch, so that the loop around it is vectorised."""
    return np.float32(x > y) - np.float32(x < y)


@njit(inline="always")
def _l1_term(x, y, p):
    return abs(x - y)


@njit(inline="always")
def _l1_slope(x, y, s, p):
    g = s * _sign(x, y)
    return g, -g


@njit(inline="always")
def _half_term(x, y, p):
    return np.sqrt(abs(x - y))


@njit(inline="always")
def _half_slope(x, y, s, p):
    g = s * _sign(x, y) * np.float32(0.5) / np.sqrt(max(abs(x - y), np.float32(1e-30)))  # unbounded at 0, where the sign is 0
    return g, -g


@njit(inline="always")
def _three_halves_term(x, y, p):
    d = abs(x - y)
    return d * np.sqrt(d)


@njit(inline="always")
def _three_halves_slope(x, y, s, p):
    g = s * _sign(x, y) * np.float32(1.5) * np.sqrt(abs(x - y))
    return g, -g


@njit(inline="always")
def _cube_term(x, y, p):
    d = abs(x - y)
    return d * d * d


@njit(inline="always")
def _cube_slope(x, y, s, p):
    d = x - y
    g = s * np.float32(3) * d * abs(d)
    return g, -g


@njit(inline="always")
def _canberra_term(x, y, p):
    return abs(x - y) / max(abs(x) + abs(y), p)


@njit(inline="always")
def _canberra_slope(x, y, s, p):
    size = abs(x) + abs(y)
    inverse = np.float32(1) / max(size, p)
    direction, ratio = _sign(x, y), np.float32(size > p) * abs(x - y) * inverse  # below the floor p the denominator is constant
    zero = np.float32(0)
    return s * inverse * (direction - ratio * _sign(x, zero)), s * inverse * (-direction - ratio * _sign(y, zero))


def _compile(name, term, slope, add=_sum, backward=_backward):
    """The two templates with a kernel's functions put in; named, so that each has its place in Numba's cache on disk."""
    made = []
    for template in (_forward, backward):
        names = {**globals(), "term": term, "slope": slope, "add": add}
        function = types.FunctionType(template.__code__, names, f"{template.__name__}_{name}")
        function.__qualname__, function.__module__ = function.__name__, __name__
        made.append(njit(parallel=True, fastmath=True, cache=True)(function))
    return tuple(made)


# (kernel, its power p, or None) -> forward and backward. Other powers, and lse, are served by the blocks of dense.py.
COMPILED = {
    ("lp", 1.0): _compile("l1", _l1_term, _l1_slope),
    ("lp", 0.5): _compile("half", _half_term, _half_slope),
    ("lp", 1.5): _compile("three_halves", _three_halves_term, _three_halves_slope),
    ("lp", 3.0): _compile("cube", _cube_term, _cube_slope),
    ("linf", None): _compile("linf", _l1_term, _l1_slope, _maximum, _backward_maximum),
    ("canberra", None): _compile("canberra", _canberra_term, _canberra_slope),
}


def find(kernel: str, options: dict):
    """-> (forward, backward, parameter) of a kernel with these options, or None where none is compiled."""
    if options.get("weighted"):
        return None
    if kernel == "canberra":
        return *COMPILED["canberra", None], max(options.get("floor", 0.0), 1e-37)  # 0 / 1e-37 = 0, as in scipy
    found = COMPILED.get((kernel, float(options.get("p", 1.0)) if kernel == "lp" else None))
    return found and (*found, 0.0)


class Pairs(torch.autograd.Function):
    """Raw values of all pairs: finite float32 CPU tensors (N, C), (V, C), and what `find` gave -> (N, V)."""

    @staticmethod
    def forward(ctx, h, w, found):
        forward, ctx.kernel, ctx.p = found
        ctx.sizes = len(h), len(w)
        h, w = _whole(h, 2), _whole(w, 4)
        raw = h.new_empty(len(h), len(w))
        _threads()
        forward(h.numpy(), w.numpy(), raw.numpy(), np.float32(ctx.p))
        ctx.save_for_backward(h, w, raw)
        return raw[: ctx.sizes[0], : ctx.sizes[1]]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, slope):
        h, w, raw = ctx.saved_tensors
        slope = F.pad(slope, (0, len(w) - ctx.sizes[1], 0, len(h) - ctx.sizes[0])).contiguous()  # padded pairs have no gradient
        shares, dw = h.new_zeros(_threads(), *h.shape), torch.zeros_like(w)
        ctx.kernel(h.numpy(), w.numpy(), raw.numpy(), slope.numpy(), shares.numpy(), dw.numpy(), np.float32(ctx.p))
        return shares.sum(0)[: ctx.sizes[0]], dw[: ctx.sizes[1]], None


def _whole(x: torch.Tensor, tile: int) -> torch.Tensor:
    """x with rows of zeros added to whole tiles, contiguous; x itself where nothing is to do."""
    missing = -len(x) % tile
    return (F.pad(x, (0, 0, 0, missing)) if missing else x).detach().contiguous()


def _threads() -> int:
    """Numba follows torch's number of threads."""
    threads = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)
    numba.set_num_threads(threads)
    return threads
