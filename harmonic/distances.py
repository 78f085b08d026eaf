"""Every distance: its formula, map, kernel and epilogue, in one table.

A distance is a *map* of both operands, one of the *kernels* (`kernels/dense.py`) on all pairs, and an *epilogue* that turns raw values
into d, with rank-one terms in its denominator where there are any:

    d(h, w) = (factor kernel(x, y))^root / max(|terms(x) + terms(y)|, floor),   x = map(h), y = map(w)

Sources: A = arXiv 2603.10225 (non-Euclidean distance layers), B = arXiv 2502.01628 (the harmonic loss). To add a distance, add an entry
here: tests, the documentation's table, `--help` and the benchmark loop over `DISTANCES`.
"""

import contextlib
import difflib
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from harmonic.kernels import dense
from harmonic.kernels.products import FLOAT32, Multiply, Products

# Exponents n that go with the width C: name -> (C) -> n.
EXPONENTS = {
    "dim/4": lambda dim: dim / 4,
    "sqrt_dim": math.sqrt,
    "dim": float,
    "2dim": lambda dim: 2.0 * dim,
    "4dim": lambda dim: 4.0 * dim,
}


@dataclass(frozen=True)
class Distance:
    """One row of the table.

    formula: as documentation prints it, sums over coordinates.
    kernel: l2 | lp | linf | lse | canberra | dot (controls only).
    map: (x, noise, **settings) -> mapped x, on h and on w alike, (..., C) -> (..., C); None: x itself. noise: a torch.Generator while
        training, for a map that needs one, else None.
    prepare: (**trained parameters) -> the settings that the map takes in their place, computed once.
    noisy: the map draws noise while training.
    elementwise: the map costs no more than a few operations a coordinate, so that it may be computed again to save memory.
    factor, root, terms, floor: of the epilogue; root: (**options) -> number; terms: (mapped x) -> (...).
    logit: (raw) -> logit, of a control, in place of the epilogue.
    degree: k in d(ch, cw) = c^k d(h, w) for c > 0; None where d is not homogeneous.
    options: numbers a user may set and their defaults; those named in `kernel_options` go to the kernel.
    fixed: kernel options that are part of the definition.
    parameters: (C) -> {name: initial tensor}, trained; they go to the map.
    translation_invariant: d(h + t, w + t) = d(h, w).
    straight_through: the gradient is a surrogate's, not the derivative of d.
    exponent: the default n of the harmonic link: a number, or a key of `EXPONENTS`.
    source: paper and equation or section.
    """

    formula: str
    kernel: str
    map: Callable | None = None
    prepare: Callable = lambda **trained: trained
    noisy: bool = False
    elementwise: bool = True
    factor: float = 1.0
    root: Callable = lambda **options: 1.0
    terms: Callable | None = None
    floor: float = torch.finfo(torch.float32).tiny
    logit: Callable | None = None
    degree: int | None = 1
    options: dict = field(default_factory=dict)
    kernel_options: tuple = ()
    fixed: dict = field(default_factory=dict)
    parameters: Callable = lambda dim: {}
    translation_invariant: bool = False
    straight_through: bool = False
    exponent: float | str = "dim"
    source: str = "A, sec. 3"


# maps


def _unit(x, order):
    """x over its norm of that order, at any scale of x without over- or underflow; a row of zeros stays one."""
    size = x.detach().abs().amax(-1, keepdim=True)
    zero = size == 0
    x = x / torch.where(zero, 1.0, size)  # the result does not depend on the scale, so neither does its gradient
    return x / torch.where(zero, 1.0, torch.linalg.vector_norm(x, ord=order, dim=-1, keepdim=True))


def _normalize(x, noise=None):
    return _unit(x, 2) if torch.compiler.is_exporting() else _fast_unit(x)


@torch.compiler.disable
def _fast_unit(x):
    if dense.cpu and x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() >= dense.cpu.ALONE and dense.cpu.usable():
        return dense.cpu.Unit.apply(x)
    if x.device.type == "cuda" and x.dtype == torch.float32 and (gpu := triton_kernels()) and x.shape[-1] <= gpu.Unit.WIDEST:
        return gpu.Unit.apply(x)
    return _unit(x, 2)


@functools.cache
def triton_kernels():
    """The module of Triton kernels, or None where there is no Triton."""
    try:
        from harmonic.kernels import gpu
    except ImportError:
        return None
    return gpu


def _normalize_l1(x, noise=None):
    return _unit(x.abs(), 1)


def _soft(x, noise=None, t=1.0):
    return torch.sigmoid(x / t)


def _gumbel(x, noise=None, t=1.0):
    """Binary Gumbel-softmax: the difference of two Gumbel variables is logistic noise, added while training only."""
    if noise is not None:
        u = torch.rand(x.shape, generator=noise, dtype=x.dtype, device=x.device)
        x = x + torch.logit(u.clamp(torch.finfo(x.dtype).eps, 1 - torch.finfo(x.dtype).eps))
    return torch.sigmoid(x / t)


def _hard(x, noise=None, t=1.0):
    """1[x > 0] forward, the derivative of sigmoid(x / t) backward (straight-through)."""
    soft = torch.sigmoid(x / t)
    return (x > 0).to(x.dtype) + (soft - soft.detach())


EPSILON_FULL = 1e-6  # in P = A A^T + eps I, keeps P positive definite whatever A becomes


def _positive(factor=None):
    """Full Mahalanobis: -> L with P = L L' = A A' + eps I, from A. NaN where there is none, as for an A that is not finite."""
    if factor is None:
        return {}
    identity = torch.eye(len(factor), dtype=torch.float64, device=factor.device)
    if torch.compiler.is_exporting():  # [A, sqrt(eps) I] is such an L, too, twice as wide; ONNX has no factorisation
        return {"factor": torch.cat((factor, math.sqrt(EPSILON_FULL) * identity.to(factor.dtype)), 1)}
    wide = factor.double()  # the factorisation needs the digits, not the distance
    triangle, failed = torch.linalg.cholesky_ex(wide @ wide.T + EPSILON_FULL * identity)
    return {"factor": torch.where(failed > 0, math.nan, triangle).to(factor.dtype)}


def _triangle(factor=None):
    return {} if factor is None else {"factor": factor.tril()}


def _linear(x, noise=None, factor=None, products=FLOAT32):
    if factor is None:
        return x
    if products is FLOAT32 or x.dtype != torch.float32:
        return x @ factor.to(x.dtype)
    return Multiply.apply(x, factor.to(x.dtype).T, products)


def _diagonal(x, noise=None, theta=None):
    return x if theta is None else x * (theta.to(x.dtype) / 2).exp()


# roots and terms


def _half(**options):
    return 0.5  # never the square root: d = sqrt(raw) has no gradient at 0


def _sum(x):
    """In float64 where there is one: sums of layer-normalised states nearly cancel, and n multiplies the error of the logarithm."""
    return x.sum(-1) if x.device.type == "mps" else x.sum(-1, dtype=torch.float64).to(x.dtype)


def _abs_sum(x):
    return x.abs().sum(-1)


_mahalanobis = dict(kernel="l2", root=_half, translation_invariant=True, exponent="4dim", source="A, Mahalanobis")

DISTANCES = {
    "euclidean": Distance("sqrt(sum (h-w)^2)", "l2", root=_half, translation_invariant=True, exponent="4dim", source="B, eq. 1"),
    "euclidean_squared": Distance(  # -s d is softmax(2 s h.w - s |w|^2): cross-entropy with a temperature and a norm penalty
        "sum (h-w)^2", "l2", degree=2, translation_invariant=True, exponent="2dim", source="published code of A and B"
    ),
    "manhattan": Distance("sum |h-w|", "lp", translation_invariant=True, exponent="dim/4", source="A, Manhattan"),
    "minkowski": Distance(
        "(sum |h-w|^p)^(1/p)",
        "lp",
        root=lambda p: 1 / p,
        options={"p": 1.5},
        kernel_options=("p",),
        translation_invariant=True,
        exponent="4dim",
        source="A, Minkowski",
    ),
    "chebyshev": Distance("max |h-w|", "linf", translation_invariant=True, exponent="4dim", source="A, Chebyshev"),
    "chebyshev_smooth": Distance(  # d(x, x) = log(C)/a, not 0
        "log sum exp(a |h-w|) / a",
        "lse",
        degree=None,
        options={"a": 10.0},
        kernel_options=("a",),
        translation_invariant=True,
        exponent="2dim",
        source="A, Chebyshev, smooth",
    ),
    "cosine": Distance(
        "1 - cos(h, w)",
        "l2",
        map=_normalize,
        factor=0.5,
        degree=0,
        exponent="sqrt_dim",
        source="A, cosine",
    ),
    "hamming_soft": Distance(
        "sum |s(h)-s(w)|, s = sigmoid(x/t)", "lp", map=_soft, degree=None, options={"t": 1.0}, exponent="dim/4", source="A, Hamming"
    ),
    "hamming_gumbel": Distance(
        "sum |s(h)-s(w)|, logistic noise in s while training",
        "lp",
        map=_gumbel,
        noisy=True,
        degree=None,
        options={"t": 1.0},
        exponent="dim/4",
        source="A, Hamming",
    ),
    "hamming_hard": Distance(
        "sum |1[h>0]-1[w>0]|, sigmoid's derivative",
        "lp",
        map=_hard,
        degree=0,
        options={"t": 1.0},
        straight_through=True,
        exponent="sqrt_dim",
        source="A, Hamming",
    ),
    "canberra": Distance("sum |h-w| / (|h|+|w|)", "canberra", degree=0, exponent="4dim", source="A, Canberra"),
    "canberra_robust": Distance(
        "sum |h-w| / max(|h|+|w|, 0.001)", "canberra", degree=None, fixed={"floor": 1e-3}, exponent="2dim", source="A, Canberra"
    ),
    "canberra_weighted": Distance(
        "sum |h-w| (|h|+|w|)^(q-1) / sum (|h|+|w|)^q",
        "canberra",
        degree=0,
        options={"q": 1.0},
        kernel_options=("q",),
        fixed={"weighted": True},
        exponent=4,
        source="A, Canberra",
    ),
    "bray_curtis": Distance(  # homogeneous wherever the floor of the denominator is not reached
        "sum |h-w| / max(|sum h + sum w|, 0.001)", "lp", terms=_sum, floor=1e-3, degree=0, exponent=4, source="A, Bray-Curtis"
    ),
    "bray_curtis_abs": Distance("sum |h-w| / (sum |h| + sum |w|)", "lp", terms=_abs_sum, degree=0, exponent=4, source="A, Bray-Curtis"),
    "bray_curtis_normalized": Distance(  # loses signs: d(x, -x) = 0
        "sum |a(h)-a(w)| / 2, a = |x| / sum |x|",
        "lp",
        map=_normalize_l1,
        factor=0.5,
        degree=0,
        exponent=4,
        source="A, Bray-Curtis",
    ),
    "mahalanobis": Distance(
        "sqrt((h-w)' P (h-w)), P = A A' + 1e-6 I",
        map=_linear,
        prepare=_positive,
        elementwise=False,
        parameters=lambda dim: {"factor": torch.eye(dim) * math.sqrt(1 - EPSILON_FULL)},
        **_mahalanobis,
    ),
    "mahalanobis_diagonal": Distance(
        "sqrt(sum exp(theta) (h-w)^2)", map=_diagonal, parameters=lambda dim: {"theta": torch.zeros(dim)}, **_mahalanobis
    ),
    "mahalanobis_cholesky": Distance(
        "|L' (h-w)|, L lower triangular",
        map=_linear,
        prepare=_triangle,
        elementwise=False,
        parameters=lambda dim: {"factor": torch.eye(dim)},
        **_mahalanobis,
    ),
}

# Not harmonic: they take neither link, exponent nor scale.
CONTROLS = {
    "cross_entropy": Distance(
        "logit = h . w",
        "dot",
        logit=lambda raw: raw,
        source="the usual softmax unembedding",
    ),
    "cosine_linear": Distance(  # 1 + cos is floored at twice the precision of the number format
        "logit = log((1 + cos(h, w)) / 2)",
        "dot",
        map=_normalize,
        logit=lambda raw: ((1 + raw) / 2).clamp_min(torch.finfo(raw.dtype).eps).log(),
        degree=0,
        source='A\'s code, "cosine simple"',
    ),
}
HEADS = {**DISTANCES, **CONTROLS}

# Settings at which a general formula is another entry: the fast kernel serves them, and nothing is written twice.
_SAME_AS = {
    ("minkowski", "p", 1.0): "manhattan",
    ("minkowski", "p", 2.0): "euclidean",
    ("minkowski", "p", math.inf): "chebyshev",
    ("canberra_weighted", "q", 1.0): "bray_curtis_abs",
}


def resolve(name: str, **settings) -> tuple[Distance, dict]:
    """Looks a head up: -> (its row, its settings with defaults filled in). A setting is an option or a trained parameter.

    Raises ValueError for an unknown name (naming the nearest), an unknown setting, or an option that is not a positive number.
    """
    if name not in HEADS:
        near = difflib.get_close_matches(str(name), HEADS, n=1)
        raise ValueError(f"unknown distance {name!r}; " + (f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(HEADS)}"))
    row = HEADS[name]
    valid = [*row.options, *row.parameters(1)]
    for key in settings:
        if key not in valid:
            raise ValueError(f"{name} has no setting {key!r}" + (f"; it has {', '.join(valid)}" if valid else ""))
    for key, value in row.options.items():
        settings.setdefault(key, value)
        if not settings[key] > 0:
            raise ValueError(f"{name}: {key} must be positive, got {settings[key]}")
    for key in row.options:
        same = _SAME_AS.get((name, key, float(settings[key])))
        if same:
            return HEADS[same], {}
    return row, settings


def split(row: Distance, settings: dict) -> tuple[dict, dict]:
    """Settings -> (those that the map takes, those of the kernel and the epilogue)."""
    trained = {k: v for k, v in settings.items() if k not in row.options}
    mapping = {k: v for k, v in settings.items() if k in row.options and k not in row.kernel_options}
    return {**mapping, **row.prepare(**trained)}, {k: v for k, v in settings.items() if k in row.kernel_options}


def wide(x: torch.Tensor) -> torch.Tensor:
    """float64 stays, everything else becomes float32: distances are never computed in less."""
    if not x.is_floating_point():
        raise ValueError(f"expected floating-point vectors, got {x.dtype} of shape {tuple(x.shape)}")
    return x if x.dtype == torch.float64 else x.float()


def together(h: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both wide, and float64 if one of them is."""
    h, w = wide(h), wide(w)
    return (h, w) if h.dtype == w.dtype else (h.double(), w.double())


@contextlib.contextmanager
def exactly(device: torch.device):
    """Distances inside are float32 and nothing less: no autocast, no TF32, whatever the caller has set."""
    precision = torch.get_float32_matmul_precision()
    casts = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    with torch.autocast(device.type, enabled=False) if casts else contextlib.nullcontext():
        if precision == "highest":
            yield
            return
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(precision)


def check_vectors(h, w, paired=False):
    """ValueError, which names the sizes, for operands that no distance is defined for."""
    if h.shape[-1] != w.shape[-1]:
        raise ValueError(f"h and w differ in their last dimension: {tuple(h.shape)} and {tuple(w.shape)}")
    if not paired and (w.dim() != 2 or not w.numel()):
        raise ValueError(f"w {tuple(w.shape)} is not a table of prototypes (V, C)")
    if h.device != w.device:
        raise ValueError(f"h {tuple(h.shape)} is on {h.device}, w {tuple(w.shape)} on {w.device}")


def noise_seed(row: Distance, training: bool) -> int | None:
    """The seed of a map's noise, from torch's own generator; None where there is none. h takes it, w the next."""
    return int(torch.randint(2**62, ())) if training and row.noisy else None


def mapped(row: Distance, x: torch.Tensor, seed: int | None, mapping: dict) -> torch.Tensor:
    """x behind the distance's map: (..., C) -> (..., C)."""
    if row.map is None:
        return x
    return row.map(x, None if seed is None else torch.Generator(x.device).manual_seed(seed), **mapping)


def map_both(row: Distance, h, w, seed: int | None, mapping: dict):
    """-> (mapped h, mapped w, terms of h, terms of w); the terms are None where the distance has none."""
    h, w = mapped(row, h, seed, mapping), mapped(row, w, None if seed is None else seed + 1, mapping)
    return h, w, *((row.terms(h), row.terms(w)) if row.terms else (None, None))


def operands(h, w, name, training=False, paired=False, **settings):
    """Everything a kernel and its epilogue need: -> (row, mapped h, mapped w, terms of h, terms of w, kernel options)."""
    row, settings = resolve(name, **settings)
    check_vectors(h, w, paired)
    h, w = together(h, w)
    mapping, options = split(row, settings)
    return row, *map_both(row, h, w, noise_seed(row, training), mapping), options


def log_distance(row, raw, u, v, options) -> torch.Tensor:
    """Raw values and terms that broadcast against them -> log d; for a control, its logits."""
    if row.logit:
        return row.logit(raw)
    log_d = row.root(**options) * (row.factor * raw).log()
    return log_d if u is None else log_d - (u + v).abs().clamp_min(row.floor).log()


def log_pairs(row, h, w, u, v, options, compiled=False, how: Products = FLOAT32) -> torch.Tensor:
    """log d of all pairs of mapped operands: (N, C), (V, C) -> (N, V); for a control, its logits. compiled, how: see `dense.pairs`."""
    raw = dense.pairs(h, w, row.kernel, compiled, how, **options, **row.fixed)
    return log_distance(row, raw, u if u is None else u[:, None], v, options)


def distance(h: torch.Tensor, w: torch.Tensor, name: str, **settings) -> torch.Tensor:
    """d(h, w) for all pairs: (..., C), (V, C) -> (..., V), in float32 (float64 if both are).

    Args:
        name: a key of `DISTANCES`.
        settings: the distance's options (p, a, t, q) and trained parameters (factor, theta); see its row.
    Raises: ValueError for an unknown name or setting, or mismatched sizes.
    """
    if name in CONTROLS:
        raise ValueError(f"{name} is a control, not a distance")
    with exactly(h.device):
        row, x, y, u, v, options = operands(h.reshape(-1, h.shape[-1]), w, name, **settings)
        return log_pairs(row, x, y, u, v, options).exp().view(*h.shape[:-1], len(w))


def paired_distance(h: torch.Tensor, w: torch.Tensor, name: str, **settings) -> torch.Tensor:
    """d of rows paired by broadcasting: (..., C), (..., C) -> (...). For a control: its logits."""
    with exactly(h.device):
        row, h, w, u, v, options = operands(h, w, name, paired=True, **settings)
        value = log_distance(row, dense.paired(h, w, row.kernel, **options, **row.fixed), u, v, options)
        return value if name in CONTROLS else value.exp()


@torch.no_grad()
def contributions(h: torch.Tensor, w: torch.Tensor, name: str, **settings) -> torch.Tensor:
    """The share of each coordinate in a pair's distance: (..., C), (..., C) -> (..., C), non-negative, adding up to 1.

    Exact for the sums (l2 shares are of the square). The maximum gives all to one coordinate, the smooth maximum its softmax weights.
    For a dot product the shares are of sum |h w|.
    """
    with exactly(h.device):
        row, h, w, _, _, options = operands(h, w, name, paired=True, **settings)
        terms = dense.KERNELS[row.kernel].terms(h, w, **options, **row.fixed).abs()
    return terms / terms.sum(-1, keepdim=True).clamp_min(torch.finfo(terms.dtype).tiny)


def formula_table() -> str:
    """The Markdown table of all heads that README shows."""
    rows = ["| head | distance | kernel | degree | default n | settings | source |", "|---|---|---|---|---|---|---|"]
    for name, d in HEADS.items():
        formula = d.formula.replace("|", "\\|")
        settings = ", ".join([f"{k}={v:g}" for k, v in d.options.items()] + list(d.parameters(1)))
        exponent = "" if name in CONTROLS else d.exponent
        rows.append(
            f"| `{name}` | {formula} | {d.kernel} | {'' if d.degree is None else d.degree} | {exponent} | {settings} | {d.source} |"
        )
    return "\n".join(rows)
