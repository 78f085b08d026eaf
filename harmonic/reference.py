"""Every formula as the papers print it, one short function each. The tests compare all other code
with these functions.

A distance takes a state h and a prototype w, both (..., C), which broadcast. It returns d, (...).
`distance(name)` finds the function of a head.

The functions are simple, not fast. The distances of all pairs need memory for (N, V, C) numbers.
They have no floors but those of the formulas, so use them in float64.

Sources: A = arXiv 2603.10225 (non-Euclidean distance layers), B = arXiv 2502.01628 (the harmonic
loss).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

EPSILON = 1e-6  # Keeps the matrix of `mahalanobis` positive definite.


def euclidean(h: Tensor, w: Tensor) -> Tensor:
    """B, eq. 1: sqrt(sum (h - w)^2)."""
    return (h - w).square().sum(-1).sqrt()


def euclidean_squared(h: Tensor, w: Tensor) -> Tensor:
    """sum (h - w)^2, as in the published code of A and B."""
    return (h - w).square().sum(-1)


def student_t(h: Tensor, w: Tensor) -> Tensor:
    """sqrt(1 + sum (h - w)^2). The logit is then -(n/2) log(1 + |h - w|^2), a t distribution's."""
    return (1 + (h - w).square().sum(-1)).sqrt()


def euclidean_normalized(h: Tensor, w: Tensor) -> Tensor:
    """IsoMax+, 2105.14399: |h / |h| - w / |w||."""
    a, b = (x / x.norm(dim=-1, keepdim=True) for x in (h, w))
    return euclidean(a, b)


def manhattan(h: Tensor, w: Tensor) -> Tensor:
    """A, Manhattan: sum |h - w|."""
    return (h - w).abs().sum(-1)


def minkowski(h: Tensor, w: Tensor, p: float = 1.5) -> Tensor:
    """A, Minkowski: (sum |h - w|^p)^(1/p). For p = infinity it is max |h - w|."""
    difference = (h - w).abs()
    return difference.amax(-1) if math.isinf(p) else difference.pow(p).sum(-1).pow(1 / p)


def chebyshev(h: Tensor, w: Tensor) -> Tensor:
    """A, Chebyshev: max |h - w|."""
    return (h - w).abs().amax(-1)


def chebyshev_smooth(h: Tensor, w: Tensor, a: float = 10.0) -> Tensor:
    """A, Chebyshev, smooth: log(sum exp(a |h - w|)) / a. At h = w it is log(C) / a, not 0."""
    return (a * (h - w).abs()).exp().sum(-1).log() / a


def cosine(h: Tensor, w: Tensor) -> Tensor:
    """A, cosine: 1 - h.w / (|h| |w|)."""
    similarity: Tensor = (h * w).sum(-1) / (h.norm(dim=-1) * w.norm(dim=-1))
    return 1 - similarity


def hamming_soft(h: Tensor, w: Tensor, t: float = 1.0) -> Tensor:
    """A, Hamming: sum |s(h) - s(w)| with s(x) = 1 / (1 + exp(-x / t))."""
    return ((h / t).sigmoid() - (w / t).sigmoid()).abs().sum(-1)


def hamming_gumbel(h: Tensor, w: Tensor, t: float = 1.0) -> Tensor:
    """A, Hamming: `hamming_soft`. In training, logistic noise is added to h and w; not here."""
    return hamming_soft(h, w, t)


def hamming_hard(h: Tensor, w: Tensor, t: float = 1.0) -> Tensor:
    """A, Hamming: the number of coordinates of which one is positive and the other is not.

    t does not change the value. Training replaces the gradient of the step by sigmoid(x / t)'s.
    """
    return ((h > 0) != (w > 0)).to(h.dtype).sum(-1)


def canberra(h: Tensor, w: Tensor) -> Tensor:
    """A, Canberra: sum |h - w| / (|h| + |w|); 0 / 0 is 0."""
    size = h.abs() + w.abs()
    return ((h - w).abs() / torch.where(size == 0, 1.0, size)).sum(-1)


def canberra_robust(h: Tensor, w: Tensor) -> Tensor:
    """A, Canberra: sum |h - w| / max(|h| + |w|, 0.001)."""
    return ((h - w).abs() / (h.abs() + w.abs()).clamp_min(1e-3)).sum(-1)


def canberra_weighted(h: Tensor, w: Tensor, q: float = 1.0) -> Tensor:
    """A, Canberra: the mean of |h - w| / (|h| + |w|) with weights (|h| + |w|)^q.

    q = 1 gives `bray_curtis_abs`.
    """
    size = h.abs() + w.abs()
    return (size.pow(q) * (h - w).abs() / size).sum(-1) / size.pow(q).sum(-1)


def bray_curtis(h: Tensor, w: Tensor) -> Tensor:
    """A, Bray-Curtis: sum |h - w| / max(|sum (h + w)|, 0.001)."""
    return (h - w).abs().sum(-1) / (h.sum(-1) + w.sum(-1)).abs().clamp_min(1e-3)


def bray_curtis_abs(h: Tensor, w: Tensor) -> Tensor:
    """A, Bray-Curtis: sum |h - w| / sum (|h| + |w|)."""
    return (h - w).abs().sum(-1) / (h.abs().sum(-1) + w.abs().sum(-1))


def bray_curtis_normalized(h: Tensor, w: Tensor) -> Tensor:
    """A, Bray-Curtis: `bray_curtis_abs` of the vectors |h| / sum |h| and |w| / sum |w|."""
    a, b = (x.abs() / x.abs().sum(-1, keepdim=True) for x in (h, w))
    return bray_curtis_abs(a, b)


def mahalanobis(h: Tensor, w: Tensor, factor: Tensor) -> Tensor:
    """A, Mahalanobis: sqrt((h - w)' P (h - w)) with P = F F' + 1e-6 I. factor: F, (C, C)."""
    metric = factor @ factor.T + EPSILON * torch.eye(len(factor), dtype=factor.dtype)
    return (((h - w) @ metric) * (h - w)).sum(-1).sqrt()


def mahalanobis_diagonal(h: Tensor, w: Tensor, theta: Tensor) -> Tensor:
    """A, Mahalanobis: sqrt(sum exp(theta) (h - w)^2). theta: (C,)."""
    return (theta.exp() * (h - w).square()).sum(-1).sqrt()


def mahalanobis_cholesky(h: Tensor, w: Tensor, factor: Tensor) -> Tensor:
    """A, Mahalanobis: |L' (h - w)|, with L the lower triangle of `factor` (C, C)."""
    length: Tensor = ((h - w) @ factor.tril()).norm(dim=-1)
    return length


def cross_entropy(h: Tensor, w: Tensor) -> Tensor:
    """The logit of the usual output layer: h.w."""
    return (h * w).sum(-1)


def cosine_linear(h: Tensor, w: Tensor) -> Tensor:
    """The logit of "cosine simple" in A's code: log((1 + cos(h, w)) / 2)."""
    return ((2 - cosine(h, w)) / 2).log()


def stablemax(h: Tensor, w: Tensor) -> Tensor:
    """StableMax, 2501.04697: log s(h.w). s(x) is x + 1 for x >= 0 and 1 / (1 - x) for x < 0."""
    x = (h * w).sum(-1)
    return torch.where(x >= 0, x.clamp_min(0) + 1, 1 / (1 - x.clamp_max(0))).log()


def cosine_scaled(h: Tensor, w: Tensor) -> Tensor:
    """nGPT, 2410.01131: a scale for each token times cos(h, w). Here the scale is |w|."""
    logit: Tensor = w.norm(dim=-1) * (1 - cosine(h, w))
    return logit


def distance(name: str) -> Callable[..., Tensor]:
    """The function of a head: its distance or, for a control, its logit. KeyError for no head."""
    found: Callable[..., Tensor] | None = globals().get(name)
    if found is None:
        raise KeyError(f"harmonic/reference.py has no function {name}: add the formula there")
    return found


def probabilities(d: Tensor, n: float) -> Tensor:
    """HarMax, B, eq. 2: p_v = d_v^-n / sum_j d_j^-n. d: (..., V), all positive -> (..., V)."""
    return d.pow(-n) / d.pow(-n).sum(-1, keepdim=True)


def harmonic_loss(d: Tensor, targets: Tensor, n: float) -> Tensor:
    """B: the loss -log p_target of each row, in nats. d: (N, V), targets: (N,) -> (N,)."""
    return -probabilities(d, n).gather(-1, targets[:, None])[:, 0].log()


def softmax_loss(d: Tensor, targets: Tensor, s: float) -> Tensor:
    """The loss of the link "softmax" in nats: -log softmax(-s d) at the targets.

    d: (N, V), targets: (N,) -> (N,).
    """
    return -(-s * d).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
