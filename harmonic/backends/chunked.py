"""The loss in plain PyTorch, one chunk of rows at a time. Any device, float32 or float64."""

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..links import log_ratio, logits
from ..pairwise import Operands, level_pairs, log_pairs
from . import Backend, Problem, Result
from .mapped import Sides

# A chunk has about CHUNK logits, 8 MiB, which stay in cache from one elementwise pass to the next.
# It has at least CHUNK_ROWS rows, because each chunk also adds to the whole (V, C) gradient.
CHUNK = 2**21
CHUNK_ROWS = 256


def token_losses(
    problem: Problem, both: Operands, strength: Tensor, bias: Tensor | None, targets: Tensor
) -> Tensor:
    """The loss of each row of mapped operands, differentiable: (N,). targets: (N,)."""
    link, products = problem.spec.link, problem.spec.products
    if link == "harmonic":
        # Logits relative to the nearest prototype. -n log d itself would be too large to be exact.
        level = level_pairs(both, products)
        far = log_ratio(level, level.detach().amin(-1, keepdim=True))
        found = -strength * both.distance.root(**both.options) * far
    else:
        found = logits(log_pairs(both, products), strength, link, bias)
    return F.cross_entropy(found, targets, reduction="none")


T = TypeVar("T", Tensor, Tensor | None)


def _leaf(t: T, wanted: bool) -> T:
    """The same values, to differentiate by them if that is wanted."""
    return t if t is None else t.detach().requires_grad_(wanted)


def _zeros(t: T) -> T:
    return t if t is None else torch.zeros_like(t)


def loss(problem: Problem, needs_grad: bool) -> Result:
    """See `Backend`."""
    sides = Sides(problem)
    x, targets, weights = sides.states.whole(), problem.targets, problem.weights
    losses = x.new_empty(len(x))

    table = needs_grad and not problem.frozen  # whether the gradient of the table is wanted
    y, v = _leaf(sides.prototypes.whole(), table), _leaf(sides.v, table)
    strength, bias = _leaf(problem.strength, needs_grad), _leaf(problem.bias, needs_grad)
    dx, du, dstrength = torch.zeros_like(x), _zeros(sides.u), torch.zeros_like(strength)
    dy, dv = (_zeros(y), _zeros(v)) if table else (None, None)
    dbias = _zeros(bias)
    rows = max(CHUNK_ROWS, CHUNK // problem.spec.rows)
    for i in range(0, len(x), rows):
        s = slice(i, i + rows)
        own, u = _leaf(x[s], needs_grad), _leaf(None if sides.u is None else sides.u[s], needs_grad)
        with torch.set_grad_enabled(needs_grad):
            both = Operands(problem.distance, own, y, u, v, problem.kernel_options)
            part = token_losses(problem, both, strength, bias, targets[s])
        losses[s] = part.detach()
        if not needs_grad:
            continue
        leaves = [t for t in (own, u, y, v, strength, bias) if t is not None and t.requires_grad]
        gradients = iter(torch.autograd.grad(part, leaves, weights[s], allow_unused=True))
        for place in (dx, du):
            if place is not None:
                place[s] = next(gradients)
        for place in (dy, dv, dstrength, dbias):
            if place is not None:
                gradient = next(gradients)
                if gradient is not None:  # A control does not use the strength.
                    place += gradient
    if not needs_grad:
        return Result(losses, None)
    return sides.result(losses, dx, dy, du, dv, dstrength, dbias)


BACKEND = Backend("chunked", lambda problem: None, loss)  # It computes every loss.
