"""Matching a head to the softmax of a model that was trained with another one.

`match` gives a harmonic head prototypes and a strength with which it predicts what a softmax of dot
products, `h . w + b`, predicts.

Distances of kernel l2 in closed form. All prototypes are put on a sphere around the origin, so that
no norm penalty is left: one direction u, in which prototypes and states vary least, is given up,
and prototype v becomes `a P w_v + K_v u`, P the projection away from u, with K_v such that all
norms are equal (euclidean: `|.|^2 = R^2 - 2 a b_v`, which carries the bias). Then

    -n/2 log(|h|^2 + R^2 - 2 a (h.w_v + b_v)) = const + n a / (|h|^2 + R^2) (h.w_v + b_v) + ...
    -n log(1 - h.w'_v / (|h| R)) = const + n a / (|h| R) h.w_v + ...

(the first for euclidean, and mahalanobis at P = I; the second for cosine) are the source's logits
as n grows, with `a n = |h|^2 + R^2` (euclidean; a large R makes light of states whose norms vary)
or `a n = |h| R` (cosine; states of different norms get different temperatures). What is left out
falls as z^2 / n for a logit z: the default n is where that costs NEAR nats. A larger one is nearer,
until float32 rounds more off; a smaller one is less of a softmax, and bears larger steps in
training. Other distances take `a w_v`, a and n fitted on some states.
"""

import math

import torch
from torch import Tensor

from .head import HarmonicHead
from .pairwise import exactly, fast_log_pairs, operands

NEAR = 1e-4  # nats: perplexity within 0.01 %
EQUAL = 1e-6  # nats: the same but for rounding
ROWS = 256  # states that are looked at: (ROWS, V) numbers are held
# Pairs of a state and a prototype for which elementwise distances are computed at each trial of a
# scale.
PAIRS = 2**24


@torch.no_grad()
def match(head: HarmonicHead, states: Tensor, weight: Tensor, bias: Tensor | None = None) -> float:
    """Gives `head` the prototypes and the strength with which it is nearest to softmax(h . w + b):
    see above.

    An exponent (softmax link: scale) that the head was given stays, and the prototypes are made for
    it; else it is fitted.

    Args:
        head: of a distance, with V rows; trained parameters of the distance should be at their
            start. Changed in place.
        states: (N, C) hidden states of real text, N >= 2, better several times C; predictions are
            compared on ROWS of them.
        weight: (V', C) the source's unembedding, V' <= V (rows beyond are padding). bias: (V',) or
            None.
    Returns: the mean KL divergence in nats of the head's predictions from the source's, over those
        states.
    Raises: ValueError for mismatched sizes or fewer than 2 states.
    """
    rows = head.real_vocab_size
    shape = tuple(head.padded_prototypes().shape)
    if weight.shape[1] != shape[1] or not rows <= len(weight) <= shape[0]:
        raise ValueError(
            f"a head of {shape} does not match an unembedding of {tuple(weight.shape)}"
        )
    if states.dim() != 2 or states.shape[1] != weight.shape[1] or len(states) < 2:
        raise ValueError(
            f"states {tuple(states.shape)} are not (N, {weight.shape[1]}), N at least 2"
        )
    for name, tensor in (("states", states), ("unembedding", weight)):
        if not tensor.isfinite().all():
            raise ValueError(
                f"the {name} {tuple(tensor.shape)} of the model have values that are not finite"
            )
    head.padded_prototypes()[: len(weight)] = weight
    with exactly(states.device):
        h = _spread(states.float(), ROWS)
        w = weight[:rows].float()
        w = w - w.mean(0)  # a logit the same for all tokens
        b = torch.zeros(rows, device=w.device) if bias is None else bias[:rows].float()
        b = b if bias is None else b - b.mean()
        z = h @ w.T + b
        p = z.softmax(-1)
        if head.distance.kernel == "l2":
            head.padded_prototypes()[:rows] = _on_a_sphere(head, states.float(), w, b, z, p)
            return _fit_strength(head, h, p)
        few = max(2, PAIRS // rows)
        biased = weight[:rows].float() + torch.outer(b, _constant(states.float()))
        return _fit_scale(head, _spread(h, few), biased, _spread(p, few))


def _constant(h: Tensor) -> Tensor:
    """The vector whose products with the states h are nearest to 1 in least squares: it carries a
    bias. The ridge keeps it short."""
    second = (h.T @ h).cpu().double()
    second += 1e-2 * second.trace() / len(second) * torch.eye(len(second), dtype=second.dtype)
    solution: Tensor = torch.linalg.solve(second, h.sum(0).cpu().double())
    return solution.to(h)


def _spread(x: Tensor, count: int) -> Tensor:
    places = torch.linspace(0, len(x) - 1, min(count, len(x)), device=x.device)
    return x[places.round().long()]


def _on_a_sphere(
    head: HarmonicHead, h: Tensor, w: Tensor, b: Tensor, z: Tensor, p: Tensor
) -> Tensor:
    """The prototypes of the closed form, (V, C)."""
    degree = head.distance.degree
    assert degree is not None  # Every distance of kernel l2 is homogeneous.
    mean = (p * z).sum(-1)  # of the logit, for each state, over the source's own predictions
    spread = ((p * z.square()).sum(-1) - mean.square()).clamp_min(1e-6).mean().sqrt().item()
    size = h.square().sum(-1)
    H = size.mean().item()
    if degree == 0:  # cosine: the radius carries no bias
        w = w + torch.outer(b, _constant(h))
    covariances = [
        m / m.trace().clamp_min(1e-30) for m in ((w.T @ w).cpu().double(), (h.T @ h).cpu().double())
    ]
    u = torch.linalg.eigh(sum(covariances)).eigenvectors[:, 0].to(w)
    along = h @ u

    # The exponent, of the distance and not of its square, of the harmonic head whose prototypes
    # these are.
    n = float(head.strength) * max(1, degree) if head.given else None
    if n is not None and not head.is_harmonic:
        n *= math.sqrt(2 * H) ** degree  # s d has the slope of n log d at the d of R = |h|
    if n is not None and degree == 0:
        # The formulas are those of 1 - cos. A root of it has as much less of an exponent, and is
        # 2^root at the typical cosine of 0.
        root = head.distance.root(**head.distance.kernel_options(head.options))
        n *= root if head.is_harmonic else root * 2**root
    off = mean.square().mean().sqrt().item() * (2 if degree else 1)
    # z^2 / n (cosine z^2 / 2n) moves logits by off / n a nat: KL (spread off / n)^2 / 2
    enough = spread * off / math.sqrt(2 * NEAR)

    projected = w - torch.outer(w @ u, u)
    norms = projected.square().sum(-1)
    W = norms.max().item()
    if degree == 0:
        n = n or max(enough, 2 * math.sqrt(H * W))
        radius = n / math.sqrt(H)  # over a
        # their scale is free: with this one a step of the optimiser moves logits as far as it did
        # in the source
        return projected + torch.outer((radius**2 - norms).clamp_min(0).sqrt(), u)
    n = n or max(enough, 2 * (H + W))
    # a makes the rest smallest: temperatures off by sd(|h|^2) / (a n), and (h.u) K_v / a, which
    # differs from token to token
    scales = torch.logspace(-6, 6, 2401, dtype=torch.float64)
    height = n / scales - H / scales.square()  # R^2 / a^2, of which W is the least
    tempered = spread**2 * size.var().item() / (scales * n).square()
    tilted = along.var().item() * norms.var().item() / 4 / height.clamp_min(1e-30)
    beyond = 1e6 * (1 + 2 * W - height)  # Out of reach: as near as possible.
    error = torch.where(height >= 2 * W, tempered + tilted, beyond)
    a = scales[error.argmin()].item()
    middle = along.mean().item()
    R = middle + math.sqrt(max(0.0, middle**2 + a * n - H))  # |h|^2 + R^2 - 2 (h.u) R = a n
    K = (R**2 - 2 * a * b - a**2 * norms).clamp_min(0).sqrt()
    return a * projected + torch.outer(K, u)


def _logits_of_one(head: HarmonicHead, h: Tensor) -> Tensor:
    """The head's logits at strength 1, largest of each row 0: (N, C) -> (N, V)."""
    log_d = fast_log_pairs(operands(h, head.prototypes(), head.name, **head.geometry()))
    logits = -(log_d if head.is_harmonic else log_d.exp())
    return logits - logits.amax(-1, keepdim=True)


def _fit_strength(head: HarmonicHead, h: Tensor, p: Tensor) -> float:
    """Sets the strength that minimises KL(p || head) unless it was given -> that KL in nats."""
    entropy: float = -torch.special.xlogy(p, p).sum(-1).mean().item()
    if head.is_control:
        found: Tensor = head(h)
        crossed: float = (-(p * found[:, : p.shape[1]].log_softmax(-1)).sum(-1).mean()).item()
        return crossed - entropy
    logits = _logits_of_one(head, h)
    if not head.given:
        head.set_strength(nearest_strength(logits, p, float(head.strength)))
    s = float(head.strength)
    crossed = (torch.logsumexp(s * logits, -1) - s * (p * logits).sum(-1)).mean().item()
    return crossed - entropy


def nearest_strength(logits: Tensor, p: Tensor, start: float = 1.0) -> float:
    """The factor s with which softmax(s logits) is nearest to p in mean KL divergence, which is
    convex in s. logits, p: (N, V); start: where the search begins."""
    target = (p * logits).sum(-1)
    s, low, high = start, 0.0, math.inf
    for _ in range(60):
        q = (s * logits).softmax(-1)
        first = (q * logits).sum(-1)
        slope = (first - target).mean().item()
        curve = ((q * logits.square()).sum(-1) - first.square()).mean().item()
        low, high = (s, high) if slope < 0 else (low, s)
        step = s - slope / curve if curve > 0 else math.inf
        new = step if low < step < high else 2 * s if high == math.inf else (low + high) / 2
        if abs(new - s) < 1e-6 * s:
            break
        s = max(new, 1e-6)
    return s


def _fit_scale(head: HarmonicHead, h: Tensor, w: Tensor, p: Tensor) -> float:
    """Prototypes a w with the a (and the strength) of the smallest KL, to 1/16 of log a -> that KL
    in nats."""

    def error(log_a: float) -> float:
        head.padded_prototypes()[: len(w)] = math.exp(log_a) * w
        return _fit_strength(head, h, p)

    if head.is_control and (head.distance.degree == 0 or error(0.0) < EQUAL):
        return error(0.0)
    best = 0.0
    for step in (1.0, 1 / 4, 1 / 16):
        best = min((best + step * i for i in range(-4, 5)), key=error)
    return error(best)
