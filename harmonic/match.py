"""Gives a head of a distance the predictions of a trained softmax of dot products.

`match` sets the prototypes and the strength of a head. The head then predicts what the source, a
softmax of `h . w + b`, predicts.

Distances of kernel l2 have a closed form. A squared distance is a dot product with a penalty on the
norm of each prototype. So all prototypes are put on a sphere around the origin, where the penalty
is the same for all. That uses up one direction u, in which prototypes and states vary least.
Prototype v becomes `a P w_v + K_v u`. Here P projects away from u, a is a scale, and K_v makes all
norms equal. For euclidean the squared norm is `R^2 - 2 a b_v`, which carries the bias.

The logits are then, to first order, for euclidean (and mahalanobis at its start) and for cosine:

    -n/2 log(|h|^2 + R^2 - 2 a (h.w_v + b_v)) = const + n a / (|h|^2 + R^2) (h.w_v + b_v) + ...
    -n log(1 - h.w'_v / (|h| R)) = const + n a / (|h| R) h.w_v + ...

They are the logits of the source if `a n = |h|^2 + R^2` (euclidean) or `a n = |h| R` (cosine). The
norm |h| differs between states, so their temperatures differ. For euclidean a large R hides that.

The terms that are left out are about z^2 / n for a logit z. The default n is so large that, by this
estimate, they cost at most NEAR nats. A larger n matches better, until rounding in float32 costs
more. A smaller n is less like a softmax, but tolerates larger steps in training.

Other distances get the prototypes `a w_v`, with a and n fitted on some states.
"""

import math

import torch
from torch import Tensor

from .head import HarmonicHead
from .pairwise import fast_log_pairs, full_float32, operands

NEAR = 1e-4  # Nats: perplexity within 0.01 %.
EQUAL = 1e-6  # Nats: equal up to rounding.
ROWS = 256  # States on which predictions are compared. Needs memory for (ROWS, V) numbers.
# Pairs of state and prototype on which each scale of an elementwise distance is tried.
PAIRS = 2**24


@torch.no_grad()
def match(head: HarmonicHead, states: Tensor, weight: Tensor, bias: Tensor | None = None) -> float:
    """Sets the prototypes and the strength of `head` so that it predicts softmax(h . w + b).

    If the head was created with an exponent (or, for the softmax link, a scale), that stays. Else
    it is fitted.

    Args:
        head: has V rows, and is changed in place. Trained parameters of its distance should still
            have their initial values. If it has a bias, that becomes `bias` less its mean.
        states: (N, C) hidden states of real text. N is at least 2, better several times C.
            Predictions are compared on ROWS of them.
        weight: (V', C), the output matrix of the source. V' <= V; the other rows are padding.
        bias: (V',) or None.
    Returns: the mean KL divergence KL(source || head) in nats over those states.
    Raises: ValueError for sizes that do not match, values that are not finite, or fewer than 2
        states.
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
    with full_float32(states.device):
        h = _spread(states.float(), ROWS)
        w = weight[:rows].float()
        w = w - w.mean(0)  # This changes all logits of a state by the same number.
        b = torch.zeros(rows, device=w.device) if bias is None else bias[:rows].float()
        b = b if bias is None else b - b.mean()
        z = h @ w.T + b
        p = z.softmax(-1)
        if head.distance.kernel == "l2":
            head.padded_prototypes()[:rows] = _on_a_sphere(head, states.float(), w, b, z, p)
            return _fit_strength(head, h, p)
        few = max(2, PAIRS // rows)
        table = weight[:rows].float()
        if head.bias is None:
            table = table + torch.outer(b, _constant(states.float()))
        else:
            head.bias.zero_()[:rows] = b
        return _fit_scale(head, _spread(h, few), table, _spread(p, few))


def _constant(h: Tensor) -> Tensor:
    """The vector c with h . c nearest to 1 for all states, by least squares with a ridge.

    A prototype w + b c then has the logit h . w + b, nearly. The ridge keeps c short.
    """
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
    """The prototypes (V, C) of the closed form at the top of this file."""
    degree = head.distance.degree
    assert degree is not None  # Every distance of kernel l2 is homogeneous.
    mean = (p * z).sum(-1)  # The mean logit of each state, over the predictions of the source.
    spread = ((p * z.square()).sum(-1) - mean.square()).clamp_min(1e-6).mean().sqrt().item()
    size = h.square().sum(-1)
    H = size.mean().item()
    if degree == 0:  # The radius does not matter to cosine, so it cannot carry the bias.
        w = w + torch.outer(b, _constant(h))
    covariances = [
        m / m.trace().clamp_min(1e-30) for m in ((w.T @ w).cpu().double(), (h.T @ h).cpu().double())
    ]
    u = torch.linalg.eigh(sum(covariances)).eigenvectors[:, 0].to(w)
    along = h @ u

    # The exponent of the harmonic head that has these prototypes. It belongs to d, not to d^2.
    n = float(head.strength) * max(1, degree) if head.given else None
    if n is not None and not head.is_harmonic:
        # With R = |h|, d is this root. There, s d and n log d have the same slope.
        n *= math.sqrt(2 * H) ** degree
    if n is not None and degree == 0:
        # The formulas are those of x = 1 - cos, and d is (2 factor x)^root. At right angles x is 1,
        # where n log d has the slope n root, and s d the slope s root (2 factor)^root.
        root = head.distance.root(**head.distance.kernel_options(head.options))
        n *= root if head.is_harmonic else root * (2 * head.distance.factor) ** root
    off = mean.square().mean().sqrt().item() * (2 if degree else 1)
    # The term z^2 / n (cosine: z^2 / 2n) moves logits by off / n for each nat. That costs a KL of
    # (spread off / n)^2 / 2.
    enough = spread * off / math.sqrt(2 * NEAR)

    projected = w - torch.outer(w @ u, u)
    norms = projected.square().sum(-1)
    W = norms.max().item()
    if degree == 0:
        n = n or max(enough, 2 * math.sqrt(H * W))
        radius = n / math.sqrt(H)  # R / a.
        # The scale a of these prototypes is free. With a = 1 a step of the optimiser moves logits
        # as far as in the source.
        return projected + torch.outer((radius**2 - norms).clamp_min(0).sqrt(), u)
    n = n or max(enough, 2 * (H + W))
    # Choose the a with the smallest error. Temperatures are off by sd(|h|^2) / (a n), and the term
    # (h.u) K_v / a differs between tokens.
    scales = torch.logspace(-6, 6, 2401, dtype=torch.float64)
    height = n / scales - H / scales.square()  # R^2 / a^2, which is at least W.
    tempered = spread**2 * size.var().item() / (scales * n).square()
    tilted = along.var().item() * norms.var().item() / 4 / height.clamp_min(1e-30)
    beyond = 1e6 * (1 + 2 * W - height)  # Impossible values: the nearest one has the least error.
    error = torch.where(height >= 2 * W, tempered + tilted, beyond)
    a = scales[error.argmin()].item()
    middle = along.mean().item()
    R = middle + math.sqrt(max(0.0, middle**2 + a * n - H))  # |h|^2 + R^2 - 2 (h.u) R = a n
    K = (R**2 - 2 * a * b - a**2 * norms).clamp_min(0).sqrt()
    return a * projected + torch.outer(K, u)


def _logits_of_one(head: HarmonicHead, h: Tensor) -> Tensor:
    """The logits at strength 1, less the largest of each row: (N, C) -> (N, V)."""
    log_d = fast_log_pairs(operands(h, head.prototypes(), head.name, **head.geometry()))
    logits = -(log_d if head.is_harmonic else log_d.exp())
    return logits - logits.amax(-1, keepdim=True)


def _fit_strength(head: HarmonicHead, h: Tensor, p: Tensor) -> float:
    """Fits the strength unless the head was given one. Returns the mean KL(p || head) in nats."""
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
    """The factor s that minimises the mean KL(p || softmax(s logits)), which is convex in s.

    logits, p: (N, V). start: where the search begins.
    """
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
    """Sets prototypes a w, and the strength, with the smallest KL. Returns that KL in nats.

    The search stops at a precision of 1/16 in log a.
    """

    def error(log_a: float) -> float:
        head.padded_prototypes()[: len(w)] = math.exp(log_a) * w
        return _fit_strength(head, h, p)

    if head.is_control and (head.distance.degree == 0 or error(0.0) < EQUAL):
        return error(0.0)
    best = 0.0
    for step in (1.0, 1 / 4, 1 / 16):
        best = min((best + step * i for i in range(-4, 5)), key=error)
    return error(best)
