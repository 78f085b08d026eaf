"""HarMax in log space: logits and loss.

    harmonic   logit_v = -n log d(h, w_v)   so that p_v = d_v^-n / sum_j d_j^-n (2502.01628, eq. 2)
    softmax    logit_v = -s d(h, w_v)       the same geometry without HarMax: its control

Everything is float32 (float64 stays) whatever autocast says, except the operands of matrix products
where `precision` says so. Nothing is clamped, smoothed or filled in; the only constant is the floor
under the logarithm that `kernels.py` documents.

How a loss is computed is chosen by three arguments:

    impl       "auto": the fastest that the device and the distance have. "chunked": plain PyTorch
               that holds a few chunks of rows, whatever N. "numba", "triton": the same with
               compiled kernels, in float32 on a CPU and on CUDA. "dense": all logits, (N, V).
    skip       Elementwise kernels leave out pairs whose slope |dL/draw| is below skip / V of the
               target's. What is left out of a row adds up to less than `skip` of the target's.
    precision  Of the matrix products (kernels l2 and dot): "float32"; "split", nearly as exact and
               on a GPU several times faster; "autocast", torch.autocast's type inside it. "auto" is
               split for distances and autocast for dot products on CUDA, float32 elsewhere. Norms,
               logarithms and sums are always float32, and so is "dense". See `precision.py`.
"""

from typing import Any

import torch
from torch import Tensor

from .backends import IMPLS, Problem, Spec
from .backends.autograd import evaluate
from .distances import HEADS, resolve
from .links import logits, resolve_strength
from .pairwise import check_vectors, draw_seed, exactly, fast_log_pairs, operands, together
from .precision import choose_products

IGNORE_INDEX = -100  # the target of a position without a loss, as in F.cross_entropy
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
    """Logits whose log-softmax is HarMax: (..., C), (V, C) -> (..., V), float32 (float64 if h and w
    are).

    Args:
        name: a key of `DISTANCES`, or a control ("cross_entropy", "cosine_linear"), which ignores
            exponent, link and scale.
        exponent: n, the power of the distance (not of its square): a number, a 0-dim tensor, a key
            of `EXPONENTS`, None = the default.
        link: "harmonic" (-n log d) or "softmax" (-s d).
        scale: s; None = matched to the exponent by `default_scale`.
        bias: (V,), for "cross_entropy" only; of a loss with padded rows: (rows,).
        training: draws the noise of hamming_gumbel.
        settings: the distance's options and trained parameters, see `distance`.
    Raises: ValueError for unknown names, non-positive numbers, mismatched sizes.
    """
    check_bias(bias, name, len(w), h.device)
    with exactly(h.device):
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
    """Negative log likelihood of the targets in nats, unsmoothed. The rest: `harmonic_logits`.

    Args:
        h: (..., C) hidden states.
        w: (V, C) prototypes.
        targets: (...) integers in [0, V) or `ignore_index`.
        reduction: "mean" over the targets that are not ignored, "sum" or "none".
        impl: auto, dense, chunked, numba or triton.
        skip: gradients below this share of the target's, in sum, are left out; 0 = none.
        precision: of matrix products: auto, float32, split or autocast.
        rows: how many rows of w are prototypes, where the rest is padding; None: all.
        check_finite: raise for vectors that are not finite; else the loss is NaN.

    Returns: a scalar, or (...) for reduction="none"; float32 (float64 if h or w is). The mean over
        no targets is 0 with zero gradients, so that a process without targets harms no other.
    Raises: ValueError for unknown names, non-positive numbers, mismatched sizes, devices that
        differ, integer vectors; on a CPU also for targets out of range and vectors that are not
        finite (elsewhere the check would wait for the device: a NaN comes out).
    """
    distance, filled = resolve(name, **settings)
    link, strength = resolve_strength(name, w.shape[-1], link, exponent, scale, **settings)
    rows = len(w) if rows is None else rows
    check_how(impl, skip)
    check_bias(bias, name, rows, h.device)
    _check(h, w, targets, reduction, rows)
    precision = "float32" if impl == "dense" else precision  # The others are compared with it.
    products = choose_products(precision, distance.multiplies, distance.has_products, h.device)
    options = {k: float(v) for k, v in settings.items() if k in HEADS[name].options}
    trained = distance.prepared(filled)
    how = (ignore_index, reduction, impl, float(skip), products, check_finite)
    spec = Spec(name, options, link, list(trained), rows, *how)
    states, prototypes = together(h.reshape(-1, h.shape[-1]), w)
    if not isinstance(strength, Tensor):  # Filled there: a GPU need not wait for a copy.
        strength = torch.full((), strength, device=states.device)
    bias = None if bias is None else bias.to(states)
    tensors = (states, prototypes, targets.reshape(-1).long(), strength.to(states), bias)
    problem = Problem(*tensors, list(trained.values()), draw_seed(distance, training), spec)
    losses = evaluate(problem)
    return losses.view(targets.shape) if reduction == "none" else losses


def check_how(impl: str, skip: float) -> None:
    """ValueError for no way to compute a loss."""
    if impl not in IMPLS:
        raise ValueError(f"unknown impl {impl!r}; choose from {', '.join(IMPLS)}")
    if not 0 <= skip < 1:
        raise ValueError(f"skip must be in [0, 1), got {skip}")


def check_bias(bias: Tensor | None, name: str, rows: int, device: torch.device) -> None:
    """ValueError for a bias that does not fit."""
    if bias is None:
        return
    if name != "cross_entropy":
        raise ValueError(f"{name} takes no bias")
    if bias.shape != (rows,) or bias.device != device:
        raise ValueError(f"bias {tuple(bias.shape)} on {bias.device} is not ({rows},) on {device}")


def _check(h: Tensor, w: Tensor, targets: Tensor, reduction: str, rows: int) -> None:
    """ValueError for arguments of `harmonic_loss` that it could not honour."""
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
