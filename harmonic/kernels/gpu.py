"""The loss and all its gradients on a CUDA device: Triton kernels for every distance, a chunk of rows at a time.

A chunk holds the raw values of its pairs once, R rows x V prototypes, and turns them in place into slopes:

    _tile       a block of pairs: raw values, logits, and the block's share of each row's log-sum-exp
    _slopes     raw -> dL/draw, with the sums over rows and over prototypes that the small gradients are made of
    _gradient   elementwise kernels: dL/draw -> dx; with the operands exchanged, for every term is symmetric -> dy
    torch.mm    the matmul family does the same by two matrix products

A kernel is a *term* `t(x, y, p)`, added up over coordinates, and its *slope*, the derivative by x; both are put into these templates when
they are compiled, so a new kernel is two functions and a row of `_find`. p is the kernel's only number: a power, a sharpness or a floor.

Precision. Everything is float32. Logits are taken relative to the row's nearest prototype: with exponents of hundreds, log d itself would
have lost the digits that the logarithm of a ratio keeps. For the same reason sums over coordinates, rows and prototypes are added up in
slices. A block of l2 that holds a pair whose difference cancels is computed from the differences, and so are its gradients (see dense.py).
A NaN passes through. No atomics: the result is the same in every run.

Checked: the values in Triton's interpreter, against float64, and the code generation by compiling every variant (`benchmarks.gpu_compile`
lists registers and spills). Nothing here has been run on a GPU, so block sizes are chosen for registers and not by timing.
"""

import contextlib

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from harmonic.kernels import dense

# Pairs of a chunk, 512 MiB of raw values (twice that for linf and lse). At most 2^16 rows, so that few prototypes do not mean a huge chunk.
CHUNK = 2**27
CHUNK_ROWS = 2**16
# A program's block is BLOCK rows x BLOCK prototypes (in `_gradient`: x BLOCK coordinates), 8 to 32 of them a thread. Sums are added up in
# slices of as many. A matrix product takes BLOCK_C coordinates at once, whose operands lie in registers.
BLOCK = 64
BLOCK_C = 8
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


# terms and slopes


@triton.jit
def _signed(a, x, y):
    """a sign(x - y). A NaN in x or y has made a one, and it stays."""
    return tl.where(x == y, 0.0, tl.where(x < y, -a, a))


@triton.jit
def _l1_term(x, y, p):
    return tl.abs(x - y)


@triton.jit
def _l1_slope(x, y, a, kept, c, p):
    return _signed(a, x, y)


@triton.jit
def _square_term(x, y, p):
    return (x - y) * (x - y)


@triton.jit
def _square_slope(x, y, a, kept, c, p):
    return 2.0 * a * (x - y)


@triton.jit
def _half_term(x, y, p):
    return tl.sqrt(tl.abs(x - y))


@triton.jit
def _half_slope(x, y, a, kept, c, p):
    return _signed(0.5 * a * tl.rsqrt(tl.maximum(tl.abs(x - y), 1e-30)), x, y)  # unbounded at 0, where the sign is 0


@triton.jit
def _three_halves_term(x, y, p):
    d = tl.abs(x - y)
    return d * tl.sqrt(d)


@triton.jit
def _three_halves_slope(x, y, a, kept, c, p):
    return _signed(1.5 * a * tl.sqrt(tl.abs(x - y)), x, y)


@triton.jit
def _cube_term(x, y, p):
    d = tl.abs(x - y)
    return d * d * d


@triton.jit
def _cube_slope(x, y, a, kept, c, p):
    d = x - y
    return 3.0 * a * d * tl.abs(d)


@triton.jit
def _power(d, p):
    return tl.exp2(p * tl.log2(d))


@triton.jit
def _power_term(x, y, p):
    return _power(tl.abs(x - y), p)


@triton.jit
def _power_slope(x, y, a, kept, c, p):
    return _signed(p * a * _power(tl.abs(x - y), p - 1), x, y)


@triton.jit
def _maximum_slope(x, y, a, kept, c, p):
    """The gradient of a maximum goes to the coordinate that attains it (the first, if several do): `kept`."""
    return tl.where(kept == c, _signed(a, x, y), 0.0)


@triton.jit
def _smooth_slope(x, y, a, kept, c, p):
    """A share of the softmax over coordinates, from the pair's value `kept` = log sum exp(p |x - y|) / p."""
    return _signed(a * tl.exp(p * (tl.abs(x - y) - kept)), x, y)


@triton.jit
def _inverse(x):
    """1 / x by the one instruction that hardware has for it; the division operator, right for every exponent, takes ten."""
    r = tl.rsqrt(x)
    return r * r


@triton.jit
def _canberra_term(x, y, p):
    return tl.abs(x - y) * _inverse(tl.maximum(tl.abs(x) + tl.abs(y), p))


@triton.jit
def _canberra_slope(x, y, a, kept, c, p):
    size = tl.abs(x) + tl.abs(y)
    inverse = _inverse(tl.maximum(size, p))
    ratio = tl.where(size >= p, tl.abs(x - y) * inverse, 0.0)  # below the floor p the denominator is constant
    a = a * inverse
    return _signed(a, x, y) - a * ratio * _signed(1.0, x, 0.0)


def _find(epilogue):
    """-> (how a block of raw values is made: "dot", "l2", "sum", "linf" or "lse"; its term; its slope; p), or None."""
    kernel, options = epilogue.kernel, dict(epilogue.options)
    if kernel == "lp":
        p = float(options.pop("p", 1.0))
        named = {0.5: (_half_term, _half_slope), 1.0: (_l1_term, _l1_slope), 1.5: (_three_halves_term, _three_halves_slope)}
        named |= {2.0: (_square_term, _square_slope), 3.0: (_cube_term, _cube_slope)}
        found = ("sum", *named.get(p, (_power_term, _power_slope)), p)
    elif kernel == "lse":
        found = ("lse", _l1_term, _smooth_slope, float(options.pop("a", 10.0)))
    elif kernel == "canberra":
        found = ("sum", _canberra_term, _canberra_slope, max(options.pop("floor", 0.0), 1e-37))  # 0 / 1e-37 = 0, as in scipy
    else:
        found = {
            "dot": ("dot", None, None, 0.0),
            "l2": ("l2", _square_term, _square_slope, 0.0),
            "linf": ("linf", _l1_term, _maximum_slope, 0.0),
        }.get(kernel)
    return None if options else found


def supports(epilogue) -> bool:
    """Whether `run` can do it; an option that no kernel here reads, such as canberra's q, says no."""
    return epilogue.link in ("harmonic", "softmax", "control") and _find(epilogue) is not None


# blocks of raw values
#
# x is (C, H) and y (C, W), so that neighbouring threads read neighbouring numbers: R rows and V prototypes, and zeros up to whole blocks,
# so that whatever N and V these loads need no mask and are aligned. What is kept of pairs is (H, W) too.


@triton.jit
def _zeros(x, rows, columns):
    """Zeros for a block of sums, spread over the threads as a block that is loaded would be: 8 rows x 4 neighbouring columns for each.

    The compiler's own choice is 32 x 1, of which a step over a coordinate reads 33 numbers instead of 12. Nothing is loaded from x.
    """
    return tl.load(x + 4 * rows[:, None] + columns[None, :], (rows < 0)[:, None] & (columns < 0)[None, :], 0.0)


@triton.jit
def _products(x, y, rows, columns, H, W, C, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr):
    inner = tl.arange(0, BLOCK_C)
    total = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    for start in range(0, C, BLOCK_C):
        inside = start + inner[:, None] < C
        xs = tl.load(x + inner[:, None] * H + rows[None, :], inside, 0.0)
        ys = tl.load(y + inner[:, None] * W + columns[None, :], inside, 0.0)
        total -= tl.dot(tl.trans(xs), ys, input_precision=PRECISION)  # minus: a sum would be fused into one long accumulation
        x += BLOCK_C * H
        y += BLOCK_C * W
    return -total


@triton.jit
def _sum(x, y, rows, columns, H, W, C, p, TERM: tl.constexpr, SLICE: tl.constexpr):
    first = x
    total = _zeros(first, rows, columns)
    for start in range(0, C, SLICE):
        part = _zeros(first, rows, columns)
        for _ in range(start, min(start + SLICE, C)):
            part += TERM(tl.load(x + rows)[:, None], tl.load(y + columns)[None, :], p)
            x += H
            y += W
        total += part
    return total


@triton.jit
def _maximum(x, y, rows, columns, H, W, C, p, TERM: tl.constexpr):
    """-> (the largest term, the first coordinate that has it)."""
    best = _zeros(x, rows, columns) - 1.0
    at = tl.zeros_like(best)
    for c in range(C):
        t = TERM(tl.load(x + rows)[:, None], tl.load(y + columns)[None, :], p)
        better = (t > best) | (t != t)  # the second: a NaN stays
        best = tl.where(better, t, best)
        at = tl.where(better, c * 1.0, at)
        x += H
        y += W
    return best, at


@triton.jit
def _smooth(x, y, rows, columns, H, W, C, p, TERM: tl.constexpr, SLICE: tl.constexpr):
    """log sum exp(p t) / p: the maximum first, then the sum, which is cheaper than an exponential more for a running maximum."""
    top, at = _maximum(x, y, rows, columns, H, W, C, p, TERM)
    first = x
    total = tl.zeros_like(top)
    for start in range(0, C, SLICE):
        part = _zeros(first, rows, columns)
        for _ in range(start, min(start + SLICE, C)):
            t = TERM(tl.load(x + rows)[:, None], tl.load(y + columns)[None, :], p)
            part += tl.exp(p * (t - top))
            x += H
            y += W
        total += part
    return top + tl.log(total) / p


# from raw values to logits


@triton.jit
def _above(raw, rows, columns, size_x, size_y, R, V, epsilon):
    """raw where it exceeds the floor, else the floor; `dense.above` for a block."""
    low = epsilon * (tl.load(size_x + rows, rows < R, 0.0)[:, None] + tl.load(size_y + columns, columns < V, 0.0)[None, :])
    low = tl.maximum(low, TINY)
    return tl.where(raw < low, low, raw)


@triton.jit
def _rank_one(rows, columns, u, v, R, V):
    """u_i + v_j; for a control v is its bias and u None."""
    terms = tl.load(v + columns, columns < V, 0.0)[None, :]
    return terms if u is None else tl.load(u + rows, rows < R, 0.0)[:, None] + terms


@triton.jit
def _level(raw, terms, factor, floor, LINK: tl.constexpr, ROOT: tl.constexpr):
    """A number per pair, small where the logit is large; `_fall` makes differences of logits of it.

    control: minus the logit. softmax: d. harmonic: d^(1/root) / factor, for constants cancel in a ratio and roots only lose digits.
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
    return tl.where(size < floor, floor, size)  # this order lets a NaN through


@triton.jit
def _fall(level, best, LINK: tl.constexpr, ROOT: tl.constexpr):
    """The logit at `level` minus the logit at `best`, for a strength of 1. Divided exactly: n multiplies an error here by hundreds."""
    return -ROOT * tl.log(tl.div_rn(level, best)) if LINK == "harmonic" else best - level


@triton.jit
def _tile(
    x, y, size_x, size_y, u, v, targets, strength, raw, kept, near, best, total, target_level, R, V, C, p, epsilon, factor, floor,
    cancelled, MODE: tl.constexpr, TERM: tl.constexpr, LINK: tl.constexpr, ROOT: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A block of pairs. Per row it leaves the smallest level and the sum of exp(logit - the logit there), and the target's level.

    raw, kept, near: None where no gradient is wanted; kept is what some slopes need of a pair, near marks the blocks of l2 that cancel.
    """
    block = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    inside = (rows < R)[:, None] & (columns < V)[None, :]
    H, W = tl.num_programs(0) * BLOCK, tl.num_programs(1) * BLOCK
    if MODE == "dot":
        value = _products(x, y, rows, columns, H, W, C, BLOCK_C, PRECISION)
    elif MODE == "l2":
        size = tl.load(size_x + rows, rows < R, 0.0)[:, None] + tl.load(size_y + columns, columns < V, 0.0)[None, :]
        value = size - 2.0 * _products(x, y, rows, columns, H, W, C, BLOCK_C, PRECISION)
        cancels = tl.max(tl.max((value < cancelled * size).to(tl.int32), 1), 0)
        if cancels > 0:
            value = _sum(x, y, rows, columns, H, W, C, p, TERM, BLOCK)
        if near is not None:
            tl.store(near + tl.program_id(0) * tl.num_programs(1) + block, cancels)
    elif MODE == "sum":
        value = _sum(x, y, rows, columns, H, W, C, p, TERM, BLOCK)
    elif MODE == "linf":
        value, at = _maximum(x, y, rows, columns, H, W, C, p, TERM)
    else:
        value = _smooth(x, y, rows, columns, H, W, C, p, TERM, BLOCK)
    if raw is not None:
        place = rows.to(tl.int64)[:, None] * W + columns[None, :]
        tl.store(raw + place, value)
        if kept is not None:
            tl.store(kept + place, at if MODE == "linf" else value)
    if size_x is not None:
        value = _above(value, rows, columns, size_x, size_y, R, V, epsilon)
    terms = None if v is None else _rank_one(rows, columns, u, v, R, V)
    level = tl.where(inside, _level(value, terms, factor, floor, LINK, ROOT), float("inf"))
    lowest = tl.min(level, 1)
    share = tl.sum(tl.where(inside, tl.exp(tl.load(strength) * _fall(level, lowest[:, None], LINK, ROOT)), 0.0), 1)
    tl.store(best + block * R + rows, lowest, rows < R)
    tl.store(total + block * R + rows, share, rows < R)
    target = tl.load(targets + rows, rows < R, -1)
    own = tl.sum(tl.where(columns[None, :] == target[:, None], level, 0.0), 1)
    tl.store(target_level + rows, own, (rows < R) & (target >= block * BLOCK) & (target < block * BLOCK + BLOCK))


@triton.jit
def _slopes(
    raw, near, size_x, size_y, u, v, targets, weight, strength, best, total, over_columns, over_rows, R, V, epsilon, factor, floor,
    LINK: tl.constexpr, ROOT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """raw -> A = dL/draw in place, and the block's sums over its columns of (A, dL/d(u + v), dL/dstrength), over its rows of the first two.

    For a control u + v is the bias. Blocks marked in `near` are left out of the sums of A, for `_gradient` does without them.
    """
    i, j = tl.program_id(0), tl.program_id(1)
    rows = i * BLOCK + tl.arange(0, BLOCK)
    columns = j * BLOCK + tl.arange(0, BLOCK)
    inside = (rows < R)[:, None] & (columns < V)[None, :]
    place = raw + rows.to(tl.int64)[:, None] * tl.num_programs(1) * BLOCK + columns[None, :]
    found = tl.load(place)
    value = found if size_x is None else _above(found, rows, columns, size_x, size_y, R, V, epsilon)
    terms = None if v is None else _rank_one(rows, columns, u, v, R, V)
    level = _level(value, terms, factor, floor, LINK, ROOT)
    fall = _fall(level, tl.load(best + rows, rows < R, 1.0)[:, None], LINK, ROOT)
    n = tl.load(strength)
    p = tl.exp(n * fall) / tl.load(total + rows, rows < R, 1.0)[:, None]
    hit = columns[None, :] == tl.load(targets + rows, rows < R, -1)[:, None]
    g = tl.load(weight + rows, rows < R, 0.0)[:, None] * (p - tl.where(hit, 1.0, 0.0))  # dL/dlogit
    if LINK == "control":
        a, e = g, g
    else:
        by_log = -n * g if LINK == "harmonic" else -n * g * level  # dL/dlog d
        a = tl.where(found < value, 0.0, ROOT * by_log / value)  # no gradient below the floor
        e = tl.zeros_like(a)
        if u is not None:
            e = tl.where(tl.abs(terms) <= floor, 0.0, -by_log / terms)
    a, e, s = tl.where(inside, a, 0.0), tl.where(inside, e, 0.0), tl.where(inside, g * fall, 0.0)
    tl.store(place, a)
    if near is not None:
        a = tl.where(tl.load(near + i * tl.num_programs(1) + j) > 0, 0.0, a)
    across, down = over_columns + j * R + rows, over_rows + i * V + columns
    size = tl.num_programs(1) * R
    tl.store(across, tl.sum(a, 1), rows < R)
    tl.store(across + size, tl.sum(e, 1), rows < R)
    tl.store(across + 2 * size, tl.sum(s, 1), rows < R)
    tl.store(down, tl.sum(a, 0), columns < V)
    tl.store(down + tl.num_programs(0) * V, tl.sum(e, 0), columns < V)


@triton.jit
def _gradient(
    x, y, slopes, kept, near, out, M, K, C, own_stride, other_stride, near_own, near_other, p, SLOPE: tl.constexpr, BLOCK: tl.constexpr
):
    """out += sum over y's K rows of slope(x, y): for BLOCK of x's M rows and BLOCK coordinates. Strides: of `slopes` and `kept`, of `near`.

    near: take only the blocks marked there.
    """
    own = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (own < M)[:, None] & (c < C)[None, :]
    place = own.to(tl.int64)[:, None] * C + c[None, :]
    xs = tl.load(x + place, inside, 0.0)
    column = own.to(tl.int64) * own_stride
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, K, BLOCK):
        if near is None:
            wanted = True
        else:
            wanted = tl.load(near + tl.program_id(0) * near_own + start // BLOCK * near_other) > 0
        if wanted:
            part = tl.zeros_like(total)
            for j in range(start, min(start + BLOCK, K)):
                a = tl.load(slopes + column + (j - start) * other_stride)
                k = a if kept is None else tl.load(kept + column + (j - start) * other_stride)
                ys = tl.load(y + (j - start) * C + c, c < C, 0.0)
                part += SLOPE(xs, ys[None, :], a[:, None], k[:, None], c.to(tl.float32)[None, :], p)
            total += part
        y += BLOCK * C
        column += BLOCK * other_stride
    tl.store(out + place, tl.load(out + place, inside, 0.0) + total, inside)


@triton.jit
def _clear(slopes, near, BLOCK: tl.constexpr):
    """Zero in the blocks that are marked: their gradients have been taken."""
    if tl.load(near + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) > 0:
        rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        place = slopes + rows.to(tl.int64)[:, None] * tl.num_programs(1) * BLOCK + columns[None, :]
        tl.store(place, tl.zeros((BLOCK, BLOCK), tl.float32))


# the host


def launch(kernel, grid: tuple, warps: int, registers: int | None = None, **arguments):
    """Every kernel is started here, so that a tool can list them.

    registers: the most that a thread may have. Without a limit ptxas aims for round occupancies and spills a few registers for one.
    """
    with torch.cuda.device_of(next(t for t in arguments.values() if isinstance(t, torch.Tensor))):
        kernel[grid](num_warps=warps, maxnreg=registers, **arguments)


@contextlib.contextmanager
def _matmuls(tf32: bool):
    """torch's products with TF32 or without, whatever the caller has set."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


@torch.no_grad()
def run(x, y, u, v, strength, bias, targets, weight, epilogue, needs_grad, tf32=False):
    """The loss of each row, and the gradients of sum(weight * loss).

    Args:
        x: (N, C), y: (V, C), mapped operands. u: (N,), v: (V,), their rank-one terms, or None. All float32 and contiguous.
        strength: a 0-dim tensor, positive; a control ignores it. bias: (V,) or None, a control's.
        targets: (N,) int64 in [0, V). weight: (N,), 0 for ignored rows.
        epilogue: what makes logits of raw values; `supports` must hold for it.
        tf32: lets the matrix products of l2 and dot use TF32.
    Returns: losses (N,), unweighted; gradients by (x, y, u, v, strength, bias), None for those that are None or with needs_grad=False.
    """
    mode, term, slope, p = _find(epilogue)
    control = epilogue.link == "control"
    N, C, V = *x.shape, len(y)
    losses = x.new_empty(N)
    gradients = [t if t is None else torch.zeros_like(t) for t in (x, y, u, v, strength, bias)] if needs_grad else [None] * 6
    dx, dy, du, dv, dstrength, dbias = gradients
    dterms = dbias if control else dv
    strength = torch.ones_like(strength) if control else strength
    level = dict(u=u, v=bias if control else v, strength=strength, factor=epilogue.factor, floor=epilogue.floor, LINK=epilogue.link)
    level |= dict(ROOT=epilogue.root, V=V, BLOCK=BLOCK, size_x=None, size_y=None, epsilon=0.0)
    k, zero = dense.KERNELS[epilogue.kernel], x.new_zeros(())
    if mode != "dot":
        level |= dict(size_y=k.value(y, zero, **epilogue.options), epsilon=torch.finfo(x.dtype).eps ** k.power(**epilogue.options))
    blocks = triton.cdiv(V, BLOCK)
    chunk = BLOCK * max(1, min(CHUNK // V, CHUNK_ROWS, N + BLOCK - 1) // BLOCK)
    raw = x.new_empty(chunk, blocks * BLOCK) if needs_grad else None
    kept = torch.empty_like(raw) if needs_grad and mode in ("linf", "lse") else None
    y_t = _across(y)
    for start in range(0, N, chunk):
        s = slice(start, start + chunk)
        xs = x[s]
        R = len(xs)
        grid = (triton.cdiv(R, BLOCK), blocks)
        level |= dict(targets=targets[s], R=R, u=None if u is None else u[s])
        if mode != "dot":
            level["size_x"] = k.value(xs, zero, **epilogue.options)
        near = x.new_empty(grid, dtype=torch.int32) if needs_grad and mode == "l2" else None
        best, total, own = x.new_empty(blocks, R), x.new_empty(blocks, R), x.new_empty(R)
        operands = dict(x=_across(xs), y=y_t, C=C, p=p, MODE=mode, TERM=term, BLOCK_C=BLOCK_C, cancelled=dense.NEAR)
        operands |= dict(PRECISION="tf32" if tf32 else "ieee", raw=raw, kept=kept, near=near, best=best, total=total, target_level=own)
        launch(_tile, grid, 4, 255 if mode == "l2" else 168, **operands, **level)
        lowest = best.amin(0)
        total = (total * (strength * _difference(best, lowest, epilogue)).exp()).sum(0)
        losses[s] = total.log() - strength * _difference(own, lowest, epilogue)
        if not needs_grad:
            continue
        across, down = x.new_empty(3, blocks, R), x.new_empty(2, grid[0], V)
        sums = dict(over_columns=across, over_rows=down)
        launch(_slopes, grid, 16, raw=raw, near=near, weight=weight[s], best=lowest, total=total, **sums, **level)
        across, down = across.sum(1), down.sum(1)
        if du is not None:
            du[s] = across[1]
        if dterms is not None:
            dterms += down[1]
        if not control:
            dstrength += across[2].sum()
        if slope is not None:
            _add_elementwise(xs, y, raw, kept, near, dx[s], dy, p, slope)
        if mode in ("l2", "dot"):
            with _matmuls(tf32):
                factor = 1 if mode == "dot" else -2  # l2: d/dx of sum A (x - y)^2 = 2 (rowsum(A) x - A y)
                dx[s].addmm_(raw[:R, :V], y, alpha=factor)
                dy.addmm_(raw[:R, :V].T, xs, alpha=factor)
        if mode == "l2":
            dx[s].addcmul_(across[0][:, None], xs, value=2)
            dy.addcmul_(down[0][:, None], y, value=2)
    return losses, tuple(gradients)


def _across(x):
    """(M, C) -> (C, M rounded up to whole blocks), zeros beyond M."""
    return F.pad(x.T, (0, -len(x) % BLOCK)).contiguous()


def _difference(level, best, epilogue):
    """`_fall` for torch."""
    return -epilogue.root * (level / best).log() if epilogue.link == "harmonic" else best - level


def _add_elementwise(x, y, slopes, kept, near, dx, dy, p, slope):
    """Adds the gradients of all pairs to dx and dy; where blocks are marked `near`, theirs only, and clears their slopes."""
    (R, C), V = x.shape, len(y)
    rows, columns, coordinates = (triton.cdiv(n, BLOCK) for n in (R, V, C))
    shared = dict(slopes=slopes, kept=kept, near=near, C=C, p=p, SLOPE=slope, BLOCK=BLOCK)
    strides = dict(own_stride=slopes.shape[1], other_stride=1, near_own=columns, near_other=1)
    launch(_gradient, (rows, coordinates), 8, 128, x=x, y=y, out=dx, M=R, K=V, **strides, **shared)
    strides = dict(own_stride=1, other_stride=slopes.shape[1], near_own=1, near_other=columns)
    launch(_gradient, (columns, coordinates), 8, 128, x=y, y=x, out=dy, M=V, K=R, **strides, **shared)
    if near is not None:
        launch(_clear, (rows, columns), 8, slopes=slopes, near=near, BLOCK=BLOCK)
