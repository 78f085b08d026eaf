"""Every distance: its formula, map, kernel and epilogue, in one table.

A distance has three parts. A *map* changes both vectors (`maps.py`). A *kernel* compares all pairs
and gives raw values (`kernels.py`). An *epilogue* turns raw values into d, and for some distances
divides by a denominator:

    x = map(h), y = map(w)
    d(h, w) = (factor * kernel(x, y))^root / max(|terms(x) + terms(y)|, floor)

`reference.py` has each formula as the papers print it. To add a distance, add an entry here and a
function there. Tests, benchmarks, `--help` and the documentation's table follow from the entry.

Sources: A = arXiv 2603.10225 (non-Euclidean distance layers), B = arXiv 2502.01628 (the harmonic
loss).
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
    """The denominator max(|terms(x) + terms(y)|, floor) of a distance.

    terms: a function of mapped vectors, (..., C) -> (...).
    """

    terms: Callable[[Tensor], Tensor]
    floor: float = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Distance:
    """One row of the table: a distance, or a control.

    formula: as the documentation prints it; sums are over coordinates.
    kernel: a key of `KERNELS`; dot and along are for controls only.
    source: paper, and equation or section.
    exponent: the default n of the harmonic link: a number, or a key of `links.EXPONENTS`.
    map: applied to h and to w. None: both stay as they are.
    factor, root: numbers of the epilogue. root is a function of the options of the kernel.
    denominator: of the epilogue; None if the distance has none.
    logit: for a control, the function from a raw value to the logit. It replaces the epilogue.
    options: numbers that a user may set, with their defaults. The kernel takes those that it knows,
        and the map takes the others.
    constants: fixed options of the kernel that belong to the definition.
    degree: k in d(ch, cw) = c^k d(h, w) for c > 0. None if d is not homogeneous.
    translation_invariant: whether d(h + t, w + t) = d(h, w).
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
    degree: float | None = 1
    translation_invariant: bool = False

    @property
    def has_squares(self) -> bool:
        """Whether raw values are sums of squared differences, with or without a root over them."""
        return self.kernel in ("l2", "l2_plus")

    @property
    def multiplies(self) -> bool:
        """Whether raw values come from a matrix product, whose precision then matters."""
        return KERNELS[self.kernel].matmul is not None

    @property
    def has_products(self) -> bool:
        """Whether raw values are products of h and w, so that they may be negative."""
        return KERNELS[self.kernel].signed

    @property
    def is_control(self) -> bool:
        """Whether it is a dot product instead of a distance, without link, exponent and scale."""
        return self.logit is not None

    def parameters(self, dim: int) -> dict[str, Tensor]:
        """The initial values of what is trained besides the prototypes, by name. dim: C."""
        return self.map.parameters(dim) if self.map else {}

    def kernel_options(self, options: dict[str, Any]) -> dict[str, Any]:
        """The user's options that the kernel takes, and its constants."""
        known = KERNELS[self.kernel].options
        taken = {k: v for k, v in options.items() if k in self.options and k in known}
        return taken | self.constants

    def map_options(self, options: dict[str, Any]) -> dict[str, Any]:
        """The user's options that the map takes."""
        known = KERNELS[self.kernel].options
        return {k: v for k, v in options.items() if k in self.options and k not in known}

    def prepared(self, settings: dict[str, Any], exported: bool = False) -> dict[str, Tensor]:
        """The trained parameters among the settings, in the form that the map takes.

        exported: see `Map`.
        """
        if not self.map:
            return {}
        trained = {k: v for k, v in settings.items() if k not in self.options}
        return ((exported and self.map.exported) or self.map.prepare)(**trained)

    def map_settings(self, settings: dict[str, Any]) -> dict[str, Any]:
        """The options and trained parameters that the map takes."""
        exported = torch.compiler.is_exporting()
        return self.map_options(settings) | self.prepared(settings, exported)


def _half(**options: Any) -> float:
    return 0.5  # A root of the logarithm: sqrt(raw) itself would have no gradient at 0.


def _sum(x: Tensor) -> Tensor:
    """The signed sum, in float64 where the device has it.

    The coordinates of a layer-normalised state nearly cancel, and n multiplies the error of log d.
    """
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
    """sign(x) log(1 + |x|), written so that its gradient at 0 is 1."""
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
    # With the softmax link, p = softmax(2 s h.w - s |w|^2): cross-entropy with a temperature and a
    # penalty on |w|^2.
    "euclidean_squared": Distance(
        "sum (h-w)^2",
        "l2",
        degree=2,
        translation_invariant=True,
        exponent="2dim",
        source="published code of A and B",
    ),
    # HarMax without the pole at h = w. With the harmonic link the logit is -n/2 log(1 + |h-w|^2),
    # so the probabilities follow the density of a t distribution, which is finite at h = w.
    "student_t": Distance(
        "sqrt(1 + sum (h-w)^2)",
        "l2_plus",
        root=_half,
        degree=None,
        translation_invariant=True,
        exponent="4dim",
        source="t-SNE's kernel (van der Maaten and Hinton 2008), any degrees of freedom",
    ),
    # With link=softmax and learn_scale this is IsoMax+. With the harmonic link and exponent n it
    # equals cosine with exponent n / 2.
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
    "chebyshev_smooth": Distance(  # d(x, x) is log(C)/a, not 0.
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
    "bray_curtis": Distance(  # Homogeneous while the denominator is above its floor.
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
    "bray_curtis_normalized": Distance(  # Signs do not count: d(x, -x) = 0.
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

# Dot products to compare with. They have no link, exponent or scale.
CONTROLS = {
    "cross_entropy": Distance(
        "logit = h . w",
        "dot",
        logit=lambda raw: raw,
        degree=2,
        source="the usual softmax unembedding",
    ),
    "cosine_linear": Distance(  # (1 + cos) / 2 is at least the epsilon of the number format.
        "logit = log((1 + cos(h, w)) / 2)",
        "dot",
        map=UNIT,
        logit=lambda raw: ((1 + raw) / 2).clamp_min(torch.finfo(raw.dtype).eps).log(),
        degree=0,
        source='A\'s code, "cosine simple"',
    ),
    # For large |h . w| the probability is a power of it: a tail like HarMax's without a distance.
    "stablemax": Distance(
        "logit = sign(h . w) log(1 + |h . w|)",
        "dot",
        logit=_stable,
        degree=None,
        source="StableMax, 2501.04697, eq. 5",
    ),
    # nGPT's logit is a cosine times a scale for each token. Here the scale is |w|.
    "cosine_scaled": Distance(
        "logit = |w| cos(h, w)",
        "along",
        logit=lambda raw: raw,
        source="nGPT, 2410.01131, sec. 2.1",
    ),
}
HEADS = {**DISTANCES, **CONTROLS}

# What others call some heads. Messages about an unknown name suggest the head.
OTHER_NAMES = {
    "softmax": "cross_entropy",
    "linear": "cross_entropy",
    "dot": "cross_entropy",
    "harmonic": "euclidean",  # of the paper that introduced the harmonic loss
    "harmax": "euclidean",
    "l2": "euclidean",
    "l1": "manhattan",
    "linf": "chebyshev",
}

# Settings at which one distance equals another. The other is used, because its kernel is faster.
_SAME_AS = {
    ("minkowski", "p", 1.0): "manhattan",
    ("minkowski", "p", 2.0): "euclidean",
    ("minkowski", "p", math.inf): "chebyshev",
    ("canberra_weighted", "q", 1.0): "bray_curtis_abs",
}


# States are layer-normalised, so |h-w| can be 10, and 10^32 is near the largest float32.
LARGEST_P = 32.0


def _positive(name: str, key: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name}: {key} must be a positive number, got {value!r}") from None
    if not number > 0:
        raise ValueError(f"{name}: {key} must be positive, got {number}")
    if number == math.inf and key != "p":
        raise ValueError(f"{name}: {key} must be finite, got {number}")
    if key == "p" and LARGEST_P < number < math.inf:
        raise ValueError(
            f"{name}: p={number:g} is above {LARGEST_P:g}, so |h-w|^p leaves the range of float32:"
            " use chebyshev, which is p = inf, or chebyshev_smooth"
        )
    return number


def add_distance(name: str, distance: Distance) -> None:
    """Adds a distance for the rest of the program. ValueError if there is a head of this name."""
    if name in HEADS:
        raise ValueError(f"there is a head {name!r} already")
    DISTANCES[name] = HEADS[name] = distance


def is_option(name: str) -> bool:
    """Whether any head has an option of this name."""
    return any(name in row.options for row in HEADS.values())


def resolve(name: str, **settings: Any) -> tuple[Distance, dict[str, Any]]:
    """Looks a head up. Returns its row of the table, and its settings with defaults filled in.

    settings: the head's options and trained parameters.
    Raises: ValueError for an unknown name (the message has the nearest one), an unknown setting, or
        an option that is not a positive number.
    """
    if name not in HEADS:
        near = difflib.get_close_matches(str(name), HEADS, n=1)
        if other := OTHER_NAMES.get(str(name).lower()):
            near = [other]
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
    """The Markdown table of all heads in docs/heads.md."""
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
