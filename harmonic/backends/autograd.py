"""The loss as one operator of PyTorch: what runs in a compiled or exported program as it does
outside of one.

Every gradient is taken in the forward pass, while a chunk of rows is at hand. For the reductions
"mean" and "sum" the upstream gradient is one number, so the gradients are ready up to that factor.
For "none" it is a vector known only in the backward pass, which computes the chunks again; so does
a second backward pass.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..compiled import untraced
from ..pairwise import exactly, map_both
from . import Gradients, Problem, Spec, choose
from .chunked import token_losses


def evaluate(problem: Problem) -> Tensor:
    """The reduced loss of a problem, differentiable once: a scalar, or (N,) for the reduction
    "none"."""
    if problem.spec.impl == "dense":
        losses: Tensor = _dense(problem)
        return losses
    inputs = (
        problem.states,
        problem.prototypes,
        problem.strength,
        problem.bias,
        *problem.parameters,
    )
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    found: Tensor = _operator(
        problem.states,
        problem.prototypes,
        problem.targets,
        problem.strength,
        problem.bias,
        problem.parameters,
        problem.seed,
        None,
        problem.spec.encode(),
        needs_grad and problem.spec.reduction != "none",
    )[0]
    return found


# Its checks look at values.
@untraced
def _dense(problem: Problem) -> Tensor:
    """The loss by way of all logits at once, (N, V), differentiated by PyTorch: what the backends
    are compared with."""
    problem = _weighed(problem)
    with exactly(problem.states.device):
        table = problem.prototypes[: problem.spec.rows]
        settings, options = problem.map_settings(problem.parameters), problem.kernel_options
        seed = None if problem.seed is None else int(problem.seed)
        both = map_both(problem.distance, problem.states, table, seed, settings, options)
        losses = token_losses(problem, both, problem.strength, problem.bias, problem.targets)
        losses = losses * problem.weights
    return losses if problem.spec.reduction == "none" else losses.sum()


# The name has the module's, for an exported model has copies of these files.
@torch.library.custom_op(f"{__name__.replace('.', '_')}::loss", mutates_args=())
def _operator(  # noqa: PLR0913
    states: torch.Tensor,
    prototypes: torch.Tensor,
    targets: torch.Tensor,
    strength: torch.Tensor,
    bias: torch.Tensor | None,
    parameters: list[torch.Tensor],
    seed: torch.Tensor | None,
    upstream: torch.Tensor | None,
    spec: str,
    needs_grad: bool,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """-> (the reduced loss; with needs_grad its gradients with respect to states, prototypes,
    strength, bias where there is one, and parameters). upstream: what the weights of the losses are
    multiplied by, () or (N,)."""
    problem = Problem(
        states, prototypes, targets, strength, bias, list(parameters), seed, Spec.decode(spec)
    )
    problem = _weighed(problem)
    if upstream is not None:
        problem = replace(problem, weights=problem.weights * upstream)
    with exactly(states.device), _recording():
        found, gradients = _kept_rows(problem, needs_grad)
    if gradients is None:
        return found, []
    with_bias = [] if gradients.bias is None else [gradients.bias]
    return found, [
        gradients.states,
        gradients.prototypes,
        gradients.strength,
        *with_bias,
        *gradients.parameters,
    ]


@contextlib.contextmanager
def _recording() -> Iterator[None]:
    """PyTorch runs an operator with its autograd switched off; chunks and maps are differentiated
    by it, so this switches it on again."""
    included = torch._C._dispatch_tls_local_include_set()
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.ADInplaceOrView):
        excluded = excluded.remove(key)
    with torch._C._ForceDispatchKeyGuard(included, excluded):
        yield


def _kept_rows(problem: Problem, needs_grad: bool) -> tuple[Tensor, Gradients | None]:
    """-> (the reduced loss, its gradients). On a CPU a backend sees no rows without a weight: a
    masked language model ignores most of its positions."""
    weights = problem.weights
    if not len(weights):
        # There are no losses, but gradients, which are zeros: those of one row of weight 0.
        states = problem.states.new_zeros(1, problem.states.shape[1])
        targets, weights = problem.targets.new_zeros(1), weights.new_zeros(1)
        row = replace(problem, states=states, targets=targets, weights=weights)
        loss, gradients = _run(row, needs_grad)
        gradients = gradients and replace(gradients, states=gradients.states[:0].clone())
        return loss[:0].clone() if problem.spec.reduction == "none" else loss, gradients
    if (
        problem.states.device.type != "cpu"
        or problem.spec.reduction == "none"
        or problem.seed is not None
        or weights.all()
    ):
        return _run(problem, needs_grad)
    kept = weights.nonzero()[:, 0]
    if not len(kept):
        kept = kept.new_zeros(1)  # of weight 0
    part = replace(
        problem, states=problem.states[kept], targets=problem.targets[kept], weights=weights[kept]
    )
    loss, gradients = _run(part, needs_grad)
    if gradients is not None:
        states = torch.zeros_like(problem.states)
        states[kept] = gradients.states
        gradients = replace(gradients, states=states)
    return loss, gradients


def _run(problem: Problem, needs_grad: bool) -> tuple[Tensor, Gradients | None]:
    result = choose(problem).loss(problem, needs_grad)
    if problem.spec.reduction == "none":
        return result.losses * problem.weights, result.gradients
    return result.losses.dot(problem.weights), result.gradients


@_operator.register_fake
def _(  # noqa: PLR0913
    states: Tensor,
    prototypes: Tensor,
    targets: Tensor,
    strength: Tensor,
    bias: Tensor | None,
    parameters: list[Tensor],
    seed: Tensor | None,
    upstream: Tensor | None,
    spec: str,
    needs_grad: bool,
) -> tuple[Tensor, list[Tensor]]:
    loss = states.new_empty(targets.shape if Spec.decode(spec).reduction == "none" else ())
    inputs = [states, prototypes, strength, *([] if bias is None else [bias]), *parameters]
    return loss, [torch.empty_like(t) for t in inputs] if needs_grad else []


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
    """For the backward pass. Gradients are no saved tensors, for they are changed in place."""
    *tensors, ctx.spec, _ = inputs
    states, prototypes, targets, strength, bias, parameters, seed, _ = tensors
    ctx.save_for_backward(states, prototypes, targets, strength, bias, seed, *parameters)
    ctx.gradients = output[1] or None
    ctx.mark_non_differentiable(*output[1])
    ctx.set_materialize_grads(False)  # Zeros of the gradients' size would be made for them.


@torch.autograd.function.once_differentiable
def _backward(ctx: Any, upstream: Tensor | None, _: object) -> tuple[Any, ...]:
    states, prototypes, targets, strength, bias, seed, *parameters = ctx.saved_tensors
    if upstream is None:
        return None, None, None, None, None, [None] * len(parameters), None, None, None, None
    gradients, ctx.gradients = ctx.gradients, None
    if gradients is None:
        _, gradients = _operator(
            states, prototypes, targets, strength, bias, parameters, seed, upstream, ctx.spec, True
        )
    else:
        for gradient in gradients:
            gradient.mul_(upstream)  # In place: another table would be the largest thing here.
    dx, dy, dstrength, *others = gradients
    dbias = None if bias is None else others.pop(0)
    return dx, dy, None, dstrength, dbias, others, None, None, None, None


_operator.register_autograd(_backward, setup_context=_keep)


def _weighed(problem: Problem) -> Problem:
    """The problem with weights, with targets in [0, rows), and on a CPU with values that have been
    looked at.

    Where a target is ignored its weight is 0. A target that is neither ignored nor a prototype gets
    the weight NaN: the loss shows it, without waiting for a device to say so.
    """
    targets, spec, dtype = problem.targets, problem.spec, problem.states.dtype
    finite = problem.states.device.type != "cpu" or check_values(problem)
    kept = targets != spec.ignore_index
    known = (targets >= 0) & (targets < spec.rows)
    weights = kept.to(dtype)
    if spec.reduction == "mean":
        weights = weights / weights.sum().clamp_min(1)
    weights = torch.where(known | ~kept, weights, math.nan)
    return replace(problem, targets=torch.where(known, targets, 0), weights=weights, finite=finite)


def check_values(problem: Problem) -> bool:
    """ValueError for a target out of range or a vector that is not finite; without `check_finite`:
    -> whether all are."""
    targets, rows, ignored = problem.targets, problem.spec.rows, problem.spec.ignore_index
    bad = (targets != ignored) & ((targets < 0) | (targets >= rows))
    if bad.any():
        first = targets[bad][0].item()
        raise ValueError(f"target {first} is outside [0, {rows}) and is not ignore_index={ignored}")
    for name, values in (("h", problem.states), ("w", problem.prototypes[:rows])):
        # The sum settles it in one pass.
        if values.detach().sum().isfinite() or values.isfinite().all():
            continue
        if not problem.spec.check_finite:
            return False
        bad = (~values.isfinite()).nonzero()
        where = tuple(bad[0].tolist())
        raise ValueError(
            f"{name} {tuple(values.shape)} has {len(bad):,} values that are not finite, "
            f"the first at {where}"
        )
    return True
