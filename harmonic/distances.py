"""Every distance: its formula, map, kernel and epilogue, in one table.

A distance is a *map* of both operands (`maps.py`), one of the *kernels* (`kernels.py`) on all
pairs, and an *epilogue* that turns raw values into d, over a denominator for some:

    d(h, w) = (factor kernel(x, y))^root / max(|terms(x) + terms(y)|, floor) x = map(h), y = map(w)

`reference.py` has each formula as it is printed. Sources: A = arXiv 2603.10225 (non-Euclidean
distance layers), B = arXiv 2502.01628 (the harmonic loss). To add a distance, add an entry here and
a function there: tests, the documentation's table, `--help` and benchmarks follow.
"""

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .kernels import KERNELS
from .maps import (
    DIAGONAL,
    FULL,
    NOISY_SIGMOID,
    SIGMOID,
    SIGN,
    TRIANGULAR,
    UNIT,
    UNIT_L1,
    Map,
)


@dataclass(frozen=True)
class Denominator:
    """max(|terms(x) + terms(y)|, floor). terms: (mapped x) -> (...)."""

    terms: Callable[[Tensor], Tensor]
    floor: float = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Distance:
    """One row of the table.

    formula: as documentation prints it, sums over coordinates.
    kernel: l2 | lp | linf | lse | canberra | dot (controls only).
    source: paper and equation or section.
    exponent: the default n of the harmonic link: a number, or a key of `links.EXPONENTS`.
    map: of h and of w alike; None: they stay what they are.
    factor, root: of the epilogue; root: (**options of the kernel) -> number.
    denominator: of the epilogue; None: there is none.
    logit: (raw value) -> logit. Of a control, in place of the epilogue.
    options: numbers that a user may set, with their defaults. The kernel takes those it knows, the
        map the others.
    constants: options of the kernel that are part of the definition.
    degree: k in d(ch, cw) = c^k d(h, w) for c > 0; None where d is not homogeneous.
    translation_invariant: d(h + t, w + t) = d(h, w).
    """

    formula: str
    kernel: str
    source: str = ""
    exponent: float | str = "dim"
    map: Map | None = None
    factor: float = 1.0
    root: Callable[..., float] = lambda **options: 1.0
    denominator: Denominator | None = None
    logit: Callable[[Tensor], Tensor] | None = None
    options: dict[str, float] = field(default_factory=dict)
    constants: dict[str, Any] = field(default_factory=dict)
    degree: int | None = 1
    translation_invariant: bool = False

    @property
    def has_squares(self) -> bool:
        """Its raw values are sums of squares of differences, whatever the root over them."""
        return self.kernel in ("l2", "l2_plus")

    @property
    def multiplies(self) -> bool:
        """Its raw values come from a matrix product, so it matters how matrices are multiplied."""
        return KERNELS[self.kernel].matmul is not None

    @property
    def has_products(self) -> bool:
        """Its raw values are products of h and w."""
        return KERNELS[self.kernel].signed

    @property
    def is_control(self) -> bool:
        """Not a distance: a dot product, which takes neither link, exponent nor scale."""
        return self.logit is not None

    def parameters(self, dim: int) -> dict[str, Tensor]:
        """What is trained beside the prototypes, at its start."""
        return self.map.parameters(dim) if self.map else {}

    def kernel_options(self, options: dict[str, Any]) -> dict[str, Any]:
        """Those of a user's options that the kernel takes, with its constants."""
        known = KERNELS[self.kernel].options
        taken = {k: v for k, v in options.items() if k in self.options and k in known}
        return taken | self.constants

    def map_options(self, options: dict[str, Any]) -> dict[str, Any]:
        """Those of a user's options that the map takes."""
        known = KERNELS[self.kernel].options
        return {k: v for k, v in options.items() if k in self.options and k not in known}

    def prepared(self, settings: dict[str, Any]) -> dict[str, Tensor]:
        """The trained parameters among the settings, as the map takes them."""
        trained = {k: v for k, v in settings.items() if k not in self.options}
        return self.map.prepare(**trained) if self.map else {}

    def map_settings(self, settings: dict[str, Any]) -> dict[str, Any]:
        """All that the map takes, of options and trained parameters."""
        return self.map_options(settings) | self.prepared(settings)


def _half(**options: Any) -> float:
    return 0.5  # never the square root: d = sqrt(raw) has no gradient at 0


def _sum(x: Tensor) -> Tensor:
    """In float64 where there is one: sums of layer-normalised states nearly cancel, and n
    multiplies the error of the logarithm."""
    return x.sum(-1) if x.device.type == "mps" else x.sum(-1, dtype=torch.float64).to(x.dtype)


def _abs_sum(x: Tensor) -> Tensor:
    return x.abs().sum(-1)


def _mahalanobis(formula: str, map: Map) -> Distance:
    return Distance(
        formula,
        "l2",
        map=map,
        root=_half,
        translation_invariant=True,
        exponent="4dim",
        source="A, Mahalanobis",
    )


def _stable(raw: Tensor) -> Tensor:
    """sign(x) log(1 + |x|), with its slope of 1 at 0."""
    positive, negative = raw.clamp_min(0), (-raw).clamp_min(0)
    return torch.where(raw >= 0, positive.log1p(), -negative.log1p())


DISTANCES = {
    "euclidean": Distance(
        "sqrt(sum (h-w)^2)",
        "l2",
        root=_half,
        translation_invariant=True,
        exponent="4dim",
        source="B, eq. 1",
    ),
    # -s d is softmax(2 s h.w - s |w|^2): cross-entropy with a temperature and a norm penalty.
    "euclidean_squared": Distance(
        "sum (h-w)^2",
        "l2",
        degree=2,
        translation_invariant=True,
        exponent="2dim",
        source="published code of A and B",
    ),
    # HarMax without the pole: with the harmonic link the logit is -n/2 log(1 + |h-w|^2), and the
    # probabilities are those of a t distribution's density, which is finite at d = 0.
    "student_t": Distance(
        "sqrt(1 + sum (h-w)^2)",
        "l2_plus",
        root=_half,
        degree=None,
        translation_invariant=True,
        exponent="4dim",
        source="t-SNE's kernel (van der Maaten and Hinton 2008), any degrees of freedom",
    ),
    # With link=softmax and learn_scale it is IsoMax+. Its harmonic link is cosine's at half the n.
    "euclidean_normalized": Distance(
        "|h/|h| - w/|w||",
        "l2",
        map=UNIT,
        root=_half,
        degree=0,
        exponent="sqrt_dim",
        source="IsoMax+, 2105.14399",
    ),
    "manhattan": Distance(
        "sum |h-w|", "lp", translation_invariant=True, exponent="dim/4", source="A, Manhattan"
    ),
    "minkowski": Distance(
        "(sum |h-w|^p)^(1/p)",
        "lp",
        root=lambda p: 1 / p,
        options={"p": 1.5},
        translation_invariant=True,
        exponent="4dim",
        source="A, Minkowski",
    ),
    "chebyshev": Distance(
        "max |h-w|", "linf", translation_invariant=True, exponent="4dim", source="A, Chebyshev"
    ),
    "chebyshev_smooth": Distance(  # d(x, x) = log(C)/a, not 0
        "log sum exp(a |h-w|) / a",
        "lse",
        degree=None,
        options={"a": 10.0},
        translation_invariant=True,
        exponent="2dim",
        source="A, Chebyshev, smooth",
    ),
    "cosine": Distance(
        "1 - cos(h, w)",
        "l2",
        map=UNIT,
        factor=0.5,
        degree=0,
        exponent="sqrt_dim",
        source="A, cosine",
    ),
    "hamming_soft": Distance(
        "sum |s(h)-s(w)|, s = sigmoid(x/t)",
        "lp",
        map=SIGMOID,
        degree=None,
        options={"t": 1.0},
        exponent="dim/4",
        source="A, Hamming",
    ),
    "hamming_gumbel": Distance(
        "sum |s(h)-s(w)|, logistic noise in s while training",
        "lp",
        map=NOISY_SIGMOID,
        degree=None,
        options={"t": 1.0},
        exponent="dim/4",
        source="A, Hamming",
    ),
    "hamming_hard": Distance(
        "sum |1[h>0]-1[w>0]|, sigmoid's derivative",
        "lp",
        map=SIGN,
        degree=0,
        options={"t": 1.0},
        exponent="sqrt_dim",
        source="A, Hamming",
    ),
    "canberra": Distance(
        "sum |h-w| / (|h|+|w|)", "canberra", degree=0, exponent="4dim", source="A, Canberra"
    ),
    "canberra_robust": Distance(
        "sum |h-w| / max(|h|+|w|, 0.001)",
        "canberra",
        degree=None,
        constants={"floor": 1e-3},
        exponent="2dim",
        source="A, Canberra",
    ),
    "canberra_weighted": Distance(
        "sum |h-w| (|h|+|w|)^(q-1) / sum (|h|+|w|)^q; q = 1 is bray_curtis_abs",
        "canberra",
        degree=0,
        options={"q": 1.0},
        constants={"weighted": True},
        exponent=4,
        source="A, Canberra",
    ),
    "bray_curtis": Distance(  # homogeneous wherever the floor of the denominator is not reached
        "sum |h-w| / max(|sum h + sum w|, 0.001)",
        "lp",
        denominator=Denominator(_sum, 1e-3),
        degree=0,
        exponent=4,
        source="A, Bray-Curtis",
    ),
    "bray_curtis_abs": Distance(
        "sum |h-w| / (sum |h| + sum |w|)",
        "lp",
        denominator=Denominator(_abs_sum),
        degree=0,
        exponent=4,
        source="A, Bray-Curtis",
    ),
    "bray_curtis_normalized": Distance(  # loses signs: d(x, -x) = 0
        "sum |a(h)-a(w)| / 2, a = |x| / sum |x|",
        "lp",
        map=UNIT_L1,
        factor=0.5,
        degree=0,
        exponent=4,
        source="A, Bray-Curtis",
    ),
    "mahalanobis": _mahalanobis("sqrt((h-w)' P (h-w)), P = A A' + 1e-6 I", FULL),
    "mahalanobis_diagonal": _mahalanobis("sqrt(sum exp(theta) (h-w)^2)", DIAGONAL),
    "mahalanobis_cholesky": _mahalanobis("|L' (h-w)|, L lower triangular", TRIANGULAR),
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
        map=UNIT,
        logit=lambda raw: ((1 + raw) / 2).clamp_min(torch.finfo(raw.dtype).eps).log(),
        degree=0,
        source='A\'s code, "cosine simple"',
    ),
    # A power of the dot product where it is large: a tail like HarMax's without a distance.
    "stablemax": Distance(
        "logit = sign(h . w) log(1 + |h . w|)",
        "dot",
        logit=_stable,
        degree=None,
        source="StableMax, 2501.04697, eq. 5",
    ),
    # nGPT's logits, cosines with a scale for each token. The scale is the prototype's length.
    "cosine_scaled": Distance(
        "logit = |w| cos(h, w)",
        "along",
        logit=lambda raw: raw,
        source="nGPT, 2410.01131, sec. 2.1",
    ),
}
HEADS = {**DISTANCES, **CONTROLS}

# Settings at which a general formula is another entry: the fast kernel serves them, and nothing is
# written twice.
_SAME_AS = {
    ("minkowski", "p", 1.0): "manhattan",
    ("minkowski", "p", 2.0): "euclidean",
    ("minkowski", "p", math.inf): "chebyshev",
    ("canberra_weighted", "q", 1.0): "bray_curtis_abs",
}


def _positive(name: str, key: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name}: {key} must be a positive number, got {value!r}") from None
    if not number > 0:
        raise ValueError(f"{name}: {key} must be positive, got {number}")
    return number


def resolve(name: str, **settings: Any) -> tuple[Distance, dict[str, Any]]:
    """Looks a head up: -> (its row, its settings with defaults filled in). A setting is an option
    or a trained parameter.

    Raises ValueError for an unknown name (naming the nearest), an unknown setting, or an option
    that is not a positive number.
    """
    if name not in HEADS:
        near = difflib.get_close_matches(str(name), HEADS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(HEADS)}"
        raise ValueError(f"unknown distance {name!r}; {hint}")
    row = HEADS[name]
    valid = [*row.options, *row.parameters(1)]
    for key in settings:
        if key not in valid:
            has = f"; it has {', '.join(valid)}" if valid else ""
            raise ValueError(f"{name} has no setting {key!r}{has}")
    for key, value in row.options.items():
        settings[key] = _positive(name, key, settings.get(key, value))
    for key in row.options:
        same = _SAME_AS.get((name, key, settings[key]))
        if same:
            return HEADS[same], {}
    return row, settings


def formula_table() -> str:
    """The Markdown table of all heads that docs/heads.md shows."""
    rows = [
        "| head | distance | kernel | degree | default n | settings | source |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, d in HEADS.items():
        formula = d.formula.replace("|", "\\|")
        settings = ", ".join([f"{k}={v:g}" for k, v in d.options.items()] + list(d.parameters(1)))
        exponent = "" if d.is_control else str(d.exponent)
        degree = "" if d.degree is None else str(d.degree)
        cells = (f"`{name}`", formula, d.kernel, degree, exponent, settings, d.source)
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)
