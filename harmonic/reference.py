"""Every formula as it is printed, one short function each: what the tests compare all else with.

A distance takes a state h and a prototype w, (..., C) and (..., C) that broadcast, and gives d,
(...). They are slow, need memory for (N, V, C) where all pairs are asked for, and know no floors
but those of the formulas: use them in float64. `distance(name)` finds one.

A = arXiv 2603.10225 (non-Euclidean distance layers), B = arXiv 2502.01628 (the harmonic loss).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

EPSILON = 1e-6  # of mahalanobis' matrix


def euclidean(h: Tensor, w: Tensor) -> Tensor:
    """B, eq. 1: sqrt(sum (h - w)^2)."""
    return (h - w).square().sum(-1).sqrt()


def euclidean_squared(h: Tensor, w: Tensor) -> Tensor:
    """The published code of A and B: sum (h - w)^2."""
    return (h - w).square().sum(-1)


def student_t(h: Tensor, w: Tensor) -> Tensor:
    """sqrt(1 + sum (h - w)^2): -n log of it is -(n/2) log(1 + |h - w|^2)."""
    return (1 + (h - w).square().sum(-1)).sqrt()


def euclidean_normalized(h: Tensor, w: Tensor) -> Tensor:
    """IsoMax+, 2105.14399: |h / |h| - w / |w||."""
    a, b = (x / x.norm(dim=-1, keepdim=True) for x in (h, w))
    return euclidean(a, b)


def manhattan(h: Tensor, w: Tensor) -> Tensor:
    """A, Manhattan: sum |h - w|."""
    return (h - w).abs().sum(-1)


def minkowski(h: Tensor, w: Tensor, p: float = 1.5) -> Tensor:
    """A, Minkowski: (sum |h - w|^p)^(1/p); the largest |h - w| for p = infinity."""
    difference = (h - w).abs()
    return difference.amax(-1) if math.isinf(p) else difference.pow(p).sum(-1).pow(1 / p)


def chebyshev(h: Tensor, w: Tensor) -> Tensor:
    """A, Chebyshev: max |h - w|."""
    return (h - w).abs().amax(-1)


def chebyshev_smooth(h: Tensor, w: Tensor, a: float = 10.0) -> Tensor:
    """A, Chebyshev: log(sum exp(a |h - w|)) / a, which is log(C) / a where h = w."""
    return (a * (h - w).abs()).exp().sum(-1).log() / a


def cosine(h: Tensor, w: Tensor) -> Tensor:
    """A, cosine: 1 - h.w / (|h| |w|)."""
    similarity: Tensor = (h * w).sum(-1) / (h.norm(dim=-1) * w.norm(dim=-1))
    return 1 - similarity


def hamming_soft(h: Tensor, w: Tensor, t: float = 1.0) -> Tensor:
    """A, Hamming: sum |s(h) - s(w)| with s(x) = 1 / (1 + exp(-x / t))."""
    return ((h / t).sigmoid() - (w / t).sigmoid()).abs().sum(-1)


def hamming_gumbel(h: Tensor, w: Tensor, t: float = 1.0) -> Tensor:
    """A, Hamming: `hamming_soft`, with logistic noise added to h and w while training (not
    here)."""
    return hamming_soft(h, w, t)


def hamming_hard(h: Tensor, w: Tensor, t: float = 1.0) -> Tensor:
    """A, Hamming: the number of coordinates whose signs differ. t is only in the surrogate
    gradient, that of sigmoid(x / t)."""
    return ((h > 0) != (w > 0)).to(h.dtype).sum(-1)


def canberra(h: Tensor, w: Tensor) -> Tensor:
    """A, Canberra: sum |h - w| / (|h| + |w|); 0 / 0 is 0."""
    size = h.abs() + w.abs()
    return ((h - w).abs() / torch.where(size == 0, 1.0, size)).sum(-1)


def canberra_robust(h: Tensor, w: Tensor) -> Tensor:
    """A, Canberra: sum |h - w| / max(|h| + |w|, 0.001)."""
    return ((h - w).abs() / (h.abs() + w.abs()).clamp_min(1e-3)).sum(-1)


def canberra_weighted(h: Tensor, w: Tensor, q: float = 1.0) -> Tensor:
    """A, Canberra: the mean of |h - w| / (|h| + |w|), weighted with (|h| + |w|)^q. q = 1 is
    `bray_curtis_abs`."""
    size = h.abs() + w.abs()
    return (size.pow(q) * (h - w).abs() / size).sum(-1) / size.pow(q).sum(-1)


def bray_curtis(h: Tensor, w: Tensor) -> Tensor:
    """A, Bray-Curtis: sum |h - w| / |sum (h + w)|, the denominator at least 0.001."""
    return (h - w).abs().sum(-1) / (h.sum(-1) + w.sum(-1)).abs().clamp_min(1e-3)


def bray_curtis_abs(h: Tensor, w: Tensor) -> Tensor:
    """A, Bray-Curtis: sum |h - w| / sum (|h| + |w|)."""
    return (h - w).abs().sum(-1) / (h.abs().sum(-1) + w.abs().sum(-1))


def bray_curtis_normalized(h: Tensor, w: Tensor) -> Tensor:
    """A, Bray-Curtis: `bray_curtis_abs` of |h| / sum |h| and |w| / sum |w|."""
    a, b = (x.abs() / x.abs().sum(-1, keepdim=True) for x in (h, w))
    return bray_curtis_abs(a, b)


def mahalanobis(h: Tensor, w: Tensor, factor: Tensor) -> Tensor:
    """A, Mahalanobis: sqrt((h - w)' P (h - w)) with P = A A' + 1e-6 I. factor: A, (C, C)."""
    metric = factor @ factor.T + EPSILON * torch.eye(len(factor), dtype=factor.dtype)
    return (((h - w) @ metric) * (h - w)).sum(-1).sqrt()


def mahalanobis_diagonal(h: Tensor, w: Tensor, theta: Tensor) -> Tensor:
    """A, Mahalanobis: sqrt(sum exp(theta) (h - w)^2). theta: (C,)."""
    return (theta.exp() * (h - w).square()).sum(-1).sqrt()


def mahalanobis_cholesky(h: Tensor, w: Tensor, factor: Tensor) -> Tensor:
    """A, Mahalanobis: |L' (h - w)|. factor: (C, C), of which L is the lower triangle."""
    length: Tensor = ((h - w) @ factor.tril()).norm(dim=-1)
    return length


def cross_entropy(h: Tensor, w: Tensor) -> Tensor:
    """The logit of the usual unembedding: h.w."""
    return (h * w).sum(-1)


def cosine_linear(h: Tensor, w: Tensor) -> Tensor:
    """The logit of A's code, "cosine simple": log((1 + cos(h, w)) / 2)."""
    return ((2 - cosine(h, w)) / 2).log()


def stablemax(h: Tensor, w: Tensor) -> Tensor:
    """StableMax, 2501.04697: log s(h.w), with s(x) = x + 1 for x >= 0 and 1 / (1 - x) below."""
    x = (h * w).sum(-1)
    return torch.where(x >= 0, x.clamp_min(0) + 1, 1 / (1 - x.clamp_max(0))).log()


def cosine_scaled(h: Tensor, w: Tensor) -> Tensor:
    """nGPT, 2410.01131: the scale of a token times the cosine; here the scale is |w|."""
    logit: Tensor = w.norm(dim=-1) * (1 - cosine(h, w))
    return logit


def distance(name: str) -> Callable[..., Tensor]:
    """The function of a head; of a control it is the logit."""
    found: Callable[..., Tensor] | None = globals().get(name)
    if found is None:
        raise KeyError(f"harmonic/reference.py has no function {name}: add the formula there")
    return found


def probabilities(d: Tensor, n: float) -> Tensor:
    """HarMax, B, eq. 2: d_v^-n / sum_j d_j^-n. d: (..., V), all positive."""
    return d.pow(-n) / d.pow(-n).sum(-1, keepdim=True)


def harmonic_loss(d: Tensor, targets: Tensor, n: float) -> Tensor:
    """B: -log p of the targets, in nats. d: (N, V), targets: (N,) -> (N,)."""
    return -probabilities(d, n).gather(-1, targets[:, None])[:, 0].log()


def softmax_loss(d: Tensor, targets: Tensor, s: float) -> Tensor:
    """-log softmax(-s d) of the targets, in nats: the link "softmax". d: (N, V), targets: (N,) ->
    (N,)."""
    return -(-s * d).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
