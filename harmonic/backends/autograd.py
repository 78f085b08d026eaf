"""The loss as one operator of PyTorch, so that compiled and exported programs can contain it.

The forward pass computes all gradients, while a chunk of rows is in memory. For the reductions
"mean" and "sum" the backward pass only multiplies them by the upstream gradient, which is one
number. For "none" the upstream gradient is a vector, so the backward pass computes the chunks
again. A second backward pass does that too. With `create_graph=True` the gradients come from all
logits at once.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..compiled import transformed
from ..double_backward import plain_gradients, wants_graph
from ..pairwise import full_float32, map_both
from ..precision import FLOAT32
from . import Gradients, Problem, Spec, choose
from .chunked import token_losses


def evaluate(problem: Problem) -> Tensor:
    """The loss of a problem, differentiable: a scalar, or (N,) for reduction="none"."""
    if problem.spec.impl == "dense" or transformed():
        if torch.compiler.is_dynamo_compiling():
            from ..graph_breaks import dense

            return dense(problem)
        if transformed():  # Our own products have no rule for torch.func either.
            problem = replace(problem, spec=replace(problem.spec, products=FLOAT32))
        return _dense(problem)
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
        *problem.spec.encode(),
        not any(t.requires_grad for t in (problem.prototypes, *problem.parameters)),
        needs_grad and problem.spec.reduction != "none",
    )[0]
    return found


# torch.compile cannot trace the checks, because they look at values.
def _dense(problem: Problem) -> Tensor:
    """The loss from all logits (N, V) at once, with PyTorch's own gradients.

    Tests compare the backends with it.
    """
    problem = _weighed(problem)
    with full_float32(problem.states.device):
        table = problem.prototypes[: problem.spec.rows]
        settings, options = problem.map_settings(problem.parameters), problem.kernel_options
        seed = None if problem.seed is None else int(problem.seed)
        both = map_both(problem.distance, problem.states, table, seed, settings, options)
        losses = token_losses(problem, both, problem.strength, problem.bias, problem.targets)
        losses = _known(losses, problem.weights) * problem.weights
    return losses if problem.spec.reduction == "none" else losses.sum()


def _known(losses: Tensor, weights: Tensor) -> Tensor:
    """The losses, with 0 in place of ignored ones. These could be infinite, and inf * 0 is NaN."""
    return torch.where(weights == 0, 0.0, losses)


# The name contains the module's, because an exported model has its own copies of these files.
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
    rows: int,
    ignore_index: int,
    skip: float,
    frozen: bool,
    needs_grad: bool,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Returns the loss and, with needs_grad, its gradients. spec to skip: from `Spec.encode`.

    Gradients are in this order: states, prototypes, strength, bias if there is one, parameters.
    That of frozen prototypes is an empty tensor.
    upstream: the upstream gradient, () or (N,), which multiplies the weights of the losses.
    """
    decoded = Spec.decode(spec, rows, ignore_index, skip)
    tensors = (states, prototypes, targets, strength, bias, list(parameters), seed)
    problem = _weighed(Problem(*tensors, decoded, frozen))
    if upstream is not None:
        problem = replace(problem, weights=problem.weights * upstream)
    with full_float32(states.device), _recording():
        found, gradients = _kept_rows(problem, needs_grad)
    if gradients is None:
        return found, []
    with_bias = [] if gradients.bias is None else [gradients.bias]
    table = states.new_empty(0) if gradients.prototypes is None else gradients.prototypes
    every = [gradients.states, table, gradients.strength, *with_bias]
    # Contiguous, as they are declared below: that of a Cholesky factor is by columns.
    return found, [gradient.contiguous() for gradient in (*every, *gradients.parameters)]


@contextlib.contextmanager
def _recording() -> Iterator[None]:
    """Turns autograd on inside an operator, where PyTorch turns it off.

    The backends use autograd to differentiate chunks and maps.
    """
    included = torch._C._dispatch_tls_local_include_set()
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.ADInplaceOrView):
        excluded = excluded.remove(key)
    with torch._C._ForceDispatchKeyGuard(included, excluded):
        yield


def _kept_rows(problem: Problem, needs_grad: bool) -> tuple[Tensor, Gradients | None]:
    """Returns the loss and its gradients. On a CPU, rows of weight 0 are not given to the backend.

    This saves time for a masked language model, which ignores most positions.
    """
    weights = problem.weights
    if not len(weights):
        # Without rows the gradients are zeros. One row of weight 0 gives them.
        states = problem.states.new_zeros(1, problem.states.shape[1])
        targets, weights = problem.targets.new_zeros(1), weights.new_zeros(1)
        row = replace(problem, states=states, targets=targets, weights=weights)
        loss, gradients = _run(row, needs_grad)
        gradients = gradients and replace(gradients, states=gradients.states[:0].clone())
        return loss[:0].clone() if problem.spec.reduction == "none" else loss, gradients
    if problem.states.device.type != "cpu" or problem.seed is not None or weights.all():
        return _run(problem, needs_grad)
    kept = weights.nonzero()[:, 0]
    if not len(kept):
        kept = kept.new_zeros(1)  # A backend needs a row. This one has weight 0.
    part = replace(
        problem, states=problem.states[kept], targets=problem.targets[kept], weights=weights[kept]
    )
    loss, gradients = _run(part, needs_grad)
    if problem.spec.reduction == "none":
        losses = torch.zeros_like(weights)
        losses[kept] = loss
        loss = losses
    if gradients is not None:
        states = problem.states.new_zeros(problem.states.shape)  # contiguous, as it was declared
        states[kept] = gradients.states
        gradients = replace(gradients, states=states)
    return loss, gradients


def _run(problem: Problem, needs_grad: bool) -> tuple[Tensor, Gradients | None]:
    result, weights = choose(problem).loss(problem, needs_grad), problem.weights
    losses = _known(result.losses, weights)
    if problem.spec.reduction == "none":
        return losses * weights, result.gradients
    return losses.dot(weights), result.gradients


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
    rows: int,
    ignore_index: int,
    skip: float,
    frozen: bool,
    needs_grad: bool,
) -> tuple[Tensor, list[Tensor]]:
    reduction = Spec.decode(spec, rows, ignore_index, skip).reduction
    loss = states.new_empty(targets.shape if reduction == "none" else ())
    table = states.new_empty(0) if frozen else prototypes
    inputs = [states, table, strength, *([] if bias is None else [bias]), *parameters]
    return loss, [t.new_empty(t.shape) for t in inputs] if needs_grad else []


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
    """Saves what the backward pass needs.

    The gradients are not saved tensors, because the backward pass changes them in place.
    """
    *tensors_and_spec, ctx.frozen, _ = inputs
    states, prototypes, targets, strength, bias, parameters, seed, _, *ctx.spec = tensors_and_spec
    ctx.save_for_backward(states, prototypes, targets, strength, bias, seed, *parameters)
    ctx.gradients = output[1] or None
    ctx.mark_non_differentiable(*output[1])
    ctx.set_materialize_grads(False)  # Zeros of the gradients' size would be made for them.


def _backward(ctx: Any, upstream: Tensor | None, _: object) -> tuple[Any, ...]:
    states, prototypes, targets, strength, bias, seed, *parameters = ctx.saved_tensors
    if upstream is None:
        return None, None, None, None, None, [None] * len(parameters), *[None] * 8
    if wants_graph():
        if seed is not None:
            raise RuntimeError(
                "gradients of gradients do not work with this head's training noise: call"
                " head.eval() first, or use impl='dense'"
            )
        dx, dy, dstrength, dbias, *others = _differentiable(
            (states, prototypes, strength, bias, *parameters), targets, seed, ctx.spec, upstream
        )
        return dx, dy, None, dstrength, dbias, others, *[None] * 8
    gradients, ctx.gradients = ctx.gradients, None
    if ctx.frozen and any(t.requires_grad for t in (prototypes, *parameters)):
        # An exported program was made with a frozen table, which is trained now.
        ctx.frozen, gradients = False, None
    if gradients is None:
        tensors = (states, prototypes, targets, strength, bias, parameters, seed, upstream)
        _, gradients = _operator(*tensors, *ctx.spec, ctx.frozen, True)
    else:
        for gradient in gradients:
            gradient.mul_(upstream)  # In place: a copy of the table's gradient would be large.
    dx, dy, dstrength, *others = gradients
    dbias = None if bias is None else others.pop(0)
    dy = None if ctx.frozen else dy
    return dx, dy, None, dstrength, dbias, others, *[None] * 8


def _differentiable(
    inputs: tuple[Tensor | None, ...],
    targets: Tensor,
    seed: Tensor | None,
    spec: tuple[str, int, int, float],
    upstream: Tensor,
) -> list[Tensor | None]:
    """The gradients of the loss from all logits (N, V) at once, for `create_graph=True`."""

    def loss(states: Tensor, prototypes: Tensor, *others: Tensor) -> Tensor:
        strength, bias, *parameters = others
        return _dense(
            Problem(
                states, prototypes, targets, strength, bias, parameters, seed, Spec.decode(*spec)
            )
        )

    return plain_gradients(loss, inputs, upstream)


_operator.register_autograd(_backward, setup_context=_keep)


def _weighed(problem: Problem) -> Problem:
    """The problem with weights, and with all targets in [0, rows). On a CPU it checks the values.

    An ignored target has weight 0. Any other target outside of [0, rows) has weight NaN. So the
    loss is NaN, and nothing has to wait for the device.
    """
    targets, spec, dtype = problem.targets, problem.spec, problem.states.dtype
    on_cpu, kept = problem.states.device.type == "cpu", targets != spec.ignore_index
    if not on_cpu or not kept.all():  # An ignored state may be NaN.
        states = torch.where(kept[:, None], problem.states, 0.0)
        problem = replace(problem, states=states)
    finite = not on_cpu or check_values(problem)
    known = (targets >= 0) & (targets < spec.rows)
    weights = kept.to(dtype)
    if spec.reduction == "mean":
        weights = weights / weights.sum().clamp_min(1)
    weights = torch.where(known | ~kept, weights, math.nan)
    return replace(problem, targets=torch.where(known, targets, 0), weights=weights, finite=finite)


def check_values(problem: Problem) -> bool:
    """Whether all vectors are finite.

    Raises: ValueError for a target out of range and, with `check_finite`, for a vector that is not
        finite.
    """
    targets, rows, ignored = problem.targets, problem.spec.rows, problem.spec.ignore_index
    bad = (targets != ignored) & ((targets < 0) | (targets >= rows))
    if bad.any():
        first = targets[bad][0].item()
        raise ValueError(f"target {first} is outside [0, {rows}) and is not ignore_index={ignored}")
    for name, values in (("h", problem.states), ("w", problem.prototypes[:rows])):
        # If the sum is finite, so is every value. That takes one pass.
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
