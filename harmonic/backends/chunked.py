"""The loss in plain PyTorch, a chunk of rows at a time: on any device, in float32 or float64."""

import torch
import torch.nn.functional as F

from harmonic.backends import Backend, Problem, Result
from harmonic.backends.mapped import Sides
from harmonic.links import logits
from harmonic.pairwise import Operands, log_pairs

# About CHUNK logits at a time, 8 MiB of floats that stay in cache from one elementwise pass to the next, but at least CHUNK_ROWS rows, for
# each chunk also adds once to the (V, C) gradient.
CHUNK = 2**21
CHUNK_ROWS = 256


def token_losses(problem: Problem, both: Operands, strength, bias, targets) -> torch.Tensor:
    """The loss of each row of mapped operands, differentiable: (N,)."""
    found = logits(log_pairs(both, problem.spec.products), strength, problem.spec.link, bias)
    return F.cross_entropy(found, targets, reduction="none")


def supports(problem: Problem) -> str | None:
    return None


def loss(problem: Problem, needs_grad: bool) -> Result:
    sides = Sides(problem)
    x, targets, weights = sides.states.whole(), problem.targets, problem.weights
    losses = x.new_empty(len(x))
    shared = [
        t if t is None else t.detach().requires_grad_(needs_grad)
        for t in (sides.prototypes.whole(), sides.v, problem.strength, problem.bias)
    ]
    dx, du = (None if t is None else torch.zeros_like(t) for t in (x, sides.u))
    dshared = [None if t is None else torch.zeros_like(t) for t in shared]
    rows = max(CHUNK_ROWS, CHUNK // problem.spec.rows)
    for i in range(0, len(x), rows):
        s = slice(i, i + rows)
        own = [None if t is None else t[s].detach().requires_grad_(needs_grad) for t in (x, sides.u)]
        with torch.set_grad_enabled(needs_grad):
            both = Operands(problem.distance, own[0], shared[0], own[1], shared[1], problem.kernel_options)
            part = token_losses(problem, both, shared[2], shared[3], targets[s])
        losses[s] = part.detach()
        if not needs_grad:
            continue
        leaves = [t for t in (*own, *shared) if t is not None]
        gradients = iter(torch.autograd.grad(part, leaves, weights[s], allow_unused=True))
        for place in (dx, du):
            if place is not None:
                place[s] = next(gradients)
        for place in dshared:
            if place is not None:
                gradient = next(gradients)
                if gradient is not None:  # a control uses no strength
                    place += gradient
    if not needs_grad:
        return Result(losses, None)
    dy, dv, dstrength, dbias = dshared
    return sides.result(losses, dx, dy, du, dv, dstrength, dbias)


BACKEND = Backend("chunked", supports, loss)
