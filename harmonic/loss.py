"""HarMax in log space: logits and loss.

    harmonic   logit_v = -n log d(h, w_v)   so p_v = d_v^-n / sum_j d_j^-n (2502.01628, eq. 2)
    softmax    logit_v = -s d(h, w_v)       the twin: the same distance without HarMax

Arithmetic is float32, also inside torch.autocast; float64 vectors stay float64. Only matrix
products may be less exact: see `precision` below. No logit of a distance is clamped or smoothed.
The only constant that the formulas do not have is the floor under the logarithm (`kernels.py`).

Three arguments choose how a loss is computed:

    impl       "auto": the fastest one for this device and distance. "chunked": plain PyTorch, with
               a few chunks of rows in memory, however large N is. "numba" (CPU), "triton" (CUDA):
               the same with compiled kernels, in float32. "dense": all logits at once, (N, V).
    skip       Numba's kernels skip a pair if its gradient is below skip / V times that of the
               target. The gradients that a row skips together are below `skip` times the target's.
    precision  How heads with a matrix product multiply (kernels l2, l2_plus, dot and along).
               "float32". "split": nearly as exact, and several times faster on a GPU. "autocast":
               in the type of torch.autocast. "auto": on CUDA, split for distances and autocast for
               dot products; elsewhere float32. Norms, logarithms, sums and impl="dense" are always
               float32. Only gradients of logits, of impl="dense" and by torch.func come from
               PyTorch's own backward pass, which uses TF32 if you allow it. See `precision.py`.
"""

from typing import Any

import torch
from torch import Tensor

from .backends import IMPLS, Problem, Spec
from .backends.autograd import evaluate
from .distances import HEADS, resolve
from .links import logits, resolve_strength
from .pairwise import (
    check_vectors,
    draw_seed,
    fast_log_pairs,
    full_float32,
    operands,
    same_precision,
)
from .precision import PRECISIONS, choose_products

IGNORE_INDEX = -100  # This target marks a position without a loss, as in F.cross_entropy.
REDUCTIONS = ("mean", "sum", "none")
SKIP = 1e-6


def harmonic_logits(  # noqa: PLR0913
    h: Tensor,
    w: Tensor,
    name: str,
    *,
    exponent: float | str | Tensor | None = None,
    link: str = "harmonic",
    scale: float | Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    **settings: Any,
) -> Tensor:
    """The logits of all tokens; with the harmonic link their softmax is HarMax.

    Args:
        h: (..., C) hidden states.
        w: (V, C) prototypes.
        name: a key of `DISTANCES` or `CONTROLS`. Controls ignore exponent, link and scale.
        exponent: n, the power of the distance (not of its square): a number, a 0-dim tensor or a
            key of `EXPONENTS`. None: the default of the distance.
        link: "harmonic" (-n log d) or "softmax" (-s d).
        scale: s of the softmax link: a number or a 0-dim tensor. None: `default_scale`.
        bias: (V,), for "cross_entropy" only.
        training: add the noise of hamming_gumbel.
        settings: the options and trained parameters of the distance, see `distance`.
    Returns: (..., V), float32, or float64 if h or w is.
    Raises: ValueError for unknown names, numbers that are not positive, or sizes that do not match.
    """
    check_bias(bias, name, len(w), h.device)
    with full_float32(h.device):
        both = operands(h.reshape(-1, h.shape[-1]), w, name, training, **settings)
        link, strength = resolve_strength(name, w.shape[-1], link, exponent, scale, **settings)
        return logits(fast_log_pairs(both), strength, link, bias).view(*h.shape[:-1], len(w))


def harmonic_loss(  # noqa: PLR0913
    h: Tensor,
    w: Tensor,
    targets: Tensor,
    name: str,
    *,
    exponent: float | str | Tensor | None = None,
    link: str = "harmonic",
    scale: float | Tensor | None = None,
    bias: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    reduction: str = "mean",
    impl: str = "auto",
    skip: float = SKIP,
    precision: str = "auto",
    rows: int | None = None,
    training: bool = False,
    check_finite: bool = True,
    **settings: Any,
) -> Tensor:
    """The negative log likelihood of the targets in nats, without all logits at once (but for
    impl="dense"). Arguments that are not listed here are those of `harmonic_logits`.

    Args:
        h: (..., C) hidden states. w: (V, C) prototypes.
        targets: (...) integers in [0, V), or `ignore_index`.
        bias: (V,), or (rows,) if `rows` is given. For "cross_entropy" only.
        reduction: "mean" over the targets that are not ignored, "sum" or "none".
        impl: "auto", "dense", "chunked", "numba" or "triton"; see the top of this file.
        skip: the share of the target's gradient that may be skipped in a row; 0 skips nothing.
        precision: of matrix products: "auto", "float32", "split" or "autocast".
        rows: only the first `rows` rows of w are prototypes. None: all are.
        check_finite: on a CPU, raise for vectors that are not finite. If False, the loss is NaN.

    Returns: a scalar, or (...) for reduction="none"; float32, or float64 if h or w is. The mean
        over no targets is 0, with zero gradients.
    Raises: ValueError for unknown names, bad numbers or sizes, different devices and integer
        vectors. On a CPU also for targets out of range and vectors that are not finite; elsewhere
        these give NaN, because a check would have to wait for the device.
    """
    distance, filled = resolve(name, **settings)
    link, strength = resolve_strength(name, w.shape[-1], link, exponent, scale, **settings)
    rows = len(w) if rows is None else rows
    check_how(impl, skip, precision)
    check_bias(bias, name, rows, h.device)
    _check(h, w, targets, reduction, rows)
    precision = "float32" if impl == "dense" else precision  # Tests compare the others with it.
    products = choose_products(precision, distance.multiplies, distance.has_products, h.device)
    options = {k: float(v) for k, v in settings.items() if k in HEADS[name].options}
    trained = distance.prepared(filled)
    how = (ignore_index, reduction, impl, float(skip), products, check_finite)
    spec = Spec(name, options, link, list(trained), rows, *how)
    states, prototypes = same_precision(h.reshape(-1, h.shape[-1]), w)
    if not isinstance(strength, Tensor):  # `full` would make torch.compile compile each value.
        strength = torch.ones((), dtype=states.dtype, device=states.device) * strength
    bias = None if bias is None else bias.to(states).contiguous()
    tensors = (states, prototypes, targets.reshape(-1).long(), strength.to(states), bias)
    problem = Problem(*tensors, list(trained.values()), draw_seed(distance, training), spec)
    losses = evaluate(problem)
    return losses.view(targets.shape) if reduction == "none" else losses


def check_how(impl: str, skip: float, precision: str) -> None:
    """Raises ValueError for an unknown `impl` or `precision`, or a `skip` outside [0, 1)."""
    if impl not in IMPLS:
        raise ValueError(f"unknown impl {impl!r}; choose from {', '.join(IMPLS)}")
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}; choose from {', '.join(PRECISIONS)}")
    if not 0 <= skip < 1:
        raise ValueError(f"skip must be in [0, 1), got {skip}")


def check_bias(bias: Tensor | None, name: str, rows: int, device: torch.device) -> None:
    """Raises ValueError for a bias that the head cannot have. rows: prototypes without padding."""
    if bias is None:
        return
    if name != "cross_entropy":
        raise ValueError(f"{name} takes no bias")
    if bias.shape != (rows,) or bias.device != device:
        raise ValueError(f"bias {tuple(bias.shape)} on {bias.device} is not ({rows},) on {device}")


def _check(h: Tensor, w: Tensor, targets: Tensor, reduction: str, rows: int) -> None:
    """Raises ValueError for sizes, types or devices that do not go together."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"unknown reduction {reduction!r}; choose from {', '.join(REDUCTIONS)}")
    check_vectors(h, w)
    if targets.shape != h.shape[:-1]:
        raise ValueError(f"targets {tuple(targets.shape)} do not match h {tuple(h.shape)}")
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise ValueError(f"targets {tuple(targets.shape)} must be integers, got {targets.dtype}")
    if targets.device != h.device:
        raise ValueError(
            f"h {tuple(h.shape)} is on {h.device}, "
            f"targets {tuple(targets.shape)} on {targets.device}"
        )
    if not 0 < rows <= len(w):
        raise ValueError(f"rows {rows} is not in 1..{len(w)}")
