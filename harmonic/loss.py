"""HarMax in log space: logits, loss and the head as a module.

    harmonic   logit_v = -n log d(h, w_v)   so that p_v = d_v^-n / sum_j d_j^-n     (2502.01628, eq. 2)
    softmax    logit_v = -s d(h, w_v)       the same geometry without HarMax: its control

Everything is float32 (float64 stays) whatever autocast says. Nothing is clamped, smoothed or filled in; the only constant is the floor
under the logarithm that `kernels/dense.py` documents.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from harmonic.distances import CONTROLS, HEADS, exactly, log_pairs, operands, paired_distance, resolve
from harmonic.kernels import dense

LINKS = ("harmonic", "softmax")
IMPLS = ("auto", "dense", "chunked", "numba")
# A chunk has about CHUNK logits, 8 MiB of floats that stay in cache from one elementwise pass to the next, but at least CHUNK_ROWS rows,
# for each chunk also adds once to the (V, C) gradient.
CHUNK = 2**21
CHUNK_ROWS = 256


def resolve_exponent(name: str, dim: int, exponent: float | str | None = None) -> float:
    """The exponent as a number: "sqrt_dim", "dim", a positive number, or None for the distance's default. ValueError otherwise."""
    exponent = HEADS[name].exponent if exponent is None else exponent
    n = {"sqrt_dim": math.sqrt(dim), "dim": float(dim)}.get(exponent, exponent)
    if not isinstance(n, int | float) or not 0 < n < math.inf:
        raise ValueError(f"exponent must be a positive number, 'sqrt_dim' or 'dim', got {exponent!r}")
    return float(n)


@torch.no_grad()
def default_scale(name: str, dim: int, exponent: float | str | None = None, **settings) -> float:
    """The s at which `-s d` and `-n log d` have the same slope for a freshly initialised model: n over the median distance between a
    layer-normalised state and a prototype of standard deviation 0.02. So that twins start from the same place."""
    generator = torch.Generator().manual_seed(0)
    h, w = (torch.randn(64, dim, generator=generator) for _ in range(2))
    mapped = {k: v for k, v in settings.items() if k in resolve(name)[0].options}
    typical = paired_distance(F.layer_norm(h, (dim,)), 0.02 * w, name, **mapped).median().item()
    return resolve_exponent(name, dim, exponent) / typical


def _logits(log_d, strength, link, bias=None):
    """log d (a control: its logits), strength n or s (a control: unused) -> logits."""
    if link == "control":
        return log_d if bias is None else log_d + bias
    return -strength * (log_d if link == "harmonic" else log_d.exp())


def _strength(name, link, dim, exponent, scale, settings):
    """-> (the link, or "control"; n or s as a number or tensor)."""
    if name in CONTROLS:
        return "control", 1.0
    if link not in LINKS:
        raise ValueError(f"unknown link {link!r}; choose from {', '.join(LINKS)}")
    chosen = scale if link == "softmax" else exponent
    if isinstance(chosen, torch.Tensor):
        return link, chosen
    if link == "harmonic":
        return link, resolve_exponent(name, dim, exponent)
    s = default_scale(name, dim, exponent, **settings) if scale is None else scale
    if not 0 < s < math.inf:
        raise ValueError(f"scale must be a positive number, got {scale!r}")
    return link, float(s)


def harmonic_logits(
    h: torch.Tensor,
    w: torch.Tensor,
    name: str,
    *,
    exponent: float | str | torch.Tensor | None = None,
    link: str = "harmonic",
    scale: float | torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    training: bool = False,
    **settings,
) -> torch.Tensor:
    """Logits whose log-softmax is HarMax: (..., C), (V, C) -> (..., V), float32 (float64 if h and w are).

    Args:
        name: a key of `DISTANCES`, or a control ("cross_entropy", "cosine_linear"), which ignores exponent, link and scale.
        exponent: n, the power of the distance (not of its square): a number, a 0-dim tensor, "sqrt_dim", "dim", None = the default.
        link: "harmonic" (-n log d) or "softmax" (-s d).
        scale: s; None = matched to the exponent by `default_scale`.
        bias: (V,), for "cross_entropy" only.
        training: draws the noise of hamming_gumbel.
        settings: the distance's options and trained parameters, see `distance`.
    Raises: ValueError for unknown names, non-positive numbers, mismatched sizes.
    """
    with exactly(h.device):
        row, x, y, u, v, options = operands(h.reshape(-1, h.shape[-1]), w, name, training, **settings)
        link, strength = _strength(name, link, w.shape[-1], exponent, scale, settings)
        return _logits(log_pairs(row, x, y, u, v, options, compiled=True), strength, link, bias).view(*h.shape[:-1], len(w))


def harmonic_loss(
    h: torch.Tensor,
    w: torch.Tensor,
    targets: torch.Tensor,
    name: str,
    *,
    exponent: float | str | torch.Tensor | None = None,
    link: str = "harmonic",
    scale: float | torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    ignore_index: int = -1,
    reduction: str = "mean",
    impl: str = "auto",
    training: bool = False,
    **settings,
) -> torch.Tensor:
    """Negative log likelihood of the targets in nats, unsmoothed.

    Args:
        h: (..., C) hidden states. w: (V, C) prototypes. targets: (...) integers in [0, V) or `ignore_index`.
        reduction: "mean" over the targets that are not ignored, "sum", or "none" -> (...).
        impl: "dense" materialises (N, V); "chunked" never holds more than a few chunks of rows, whatever N; "numba" is chunked with
            compiled kernels on a CPU; "auto" picks the fastest that the device and the distance have.
        The rest: see `harmonic_logits`.
    Returns: a scalar, or (...) for reduction="none"; float32 (float64 if h and w are). The mean over no targets is 0, with zero
        gradients (not NaN), so that a process whose share is empty does not poison the others.
    Raises: ValueError for unknown names, non-positive numbers, mismatched sizes, targets out of range.
    """
    if impl not in IMPLS:
        raise ValueError(f"unknown impl {impl!r}; choose from {', '.join(IMPLS)}")
    if impl == "numba" and (h.device.type != "cpu" or dense.cpu is None):
        raise ValueError(f"impl='numba' needs a CPU and the package numba; h is on {h.device}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"unknown reduction {reduction!r}; choose from mean, sum, none")
    if targets.shape != h.shape[:-1]:
        raise ValueError(f"targets {tuple(targets.shape)} do not match h {tuple(h.shape)}")
    with exactly(h.device):
        row, x, y, u, v, options = operands(h.reshape(-1, h.shape[-1]), w, name, training, **settings)
        link, strength = _strength(name, link, w.shape[-1], exponent, scale, settings)
        strength = torch.as_tensor(strength, dtype=x.dtype, device=x.device)
        flat = targets.reshape(-1)
        kept = flat != ignore_index
        if not torch.compiler.is_compiling() and flat.device.type == "cpu":  # on a GPU the check would wait for it; CUDA asserts itself
            bad = kept & ((flat < 0) | (flat >= len(w)))
            if bad.any():
                raise ValueError(f"target {flat[bad][0].item()} is outside [0, {len(w)}) and is not ignore_index={ignore_index}")
        weight = kept.to(x.dtype)
        if reduction == "mean":
            weight = weight / weight.sum().clamp_min(1)
        flat = torch.where(kept, flat, 0)
        arguments = (x, y, u, v, strength, bias, flat, row, link, options, impl in ("auto", "numba"))
        if impl == "dense":
            losses = _token_losses(*arguments) * weight
            return losses.view(targets.shape) if reduction == "none" else losses.sum()
        needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, y, u, v, strength, bias))
        losses = _chunked(*arguments, weight, reduction == "none", needs_grad)
        return losses.view(targets.shape) if reduction == "none" else losses


def _token_losses(x, y, u, v, strength, bias, targets, row, link, options, compiled):
    logits = _logits(log_pairs(row, x, y, u, v, options, compiled), strength, link, bias)
    return F.cross_entropy(logits, targets, reduction="none")


@torch.compiler.disable  # a loop over chunks that differentiates as it goes: nothing to trace
def _chunked(*arguments):
    return _Chunked.apply(*arguments)


class _Chunked(torch.autograd.Function):
    """The loss a chunk of rows at a time, with every gradient taken in the forward pass while the chunk is at hand.

    For "mean" and "sum" the upstream gradient is one number, so the gradients are stored up to that factor. For "none" it is a vector
    known only in the backward pass, which computes the chunks again.
    """

    @staticmethod
    def forward(ctx, x, y, u, v, strength, bias, targets, row, link, options, compiled, weight, per_token, needs_grad):
        ctx.constants = (row, link, options, compiled)
        ctx.per_token = per_token
        inputs = (x, y, u, v, strength, bias)
        losses, gradients = _run(inputs, targets, weight, ctx.constants, needs_grad and not per_token)
        if needs_grad:
            ctx.save_for_backward(*((*inputs, targets, weight) if per_token else gradients))
        return losses * weight if per_token else losses.dot(weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        if ctx.per_token:
            *inputs, targets, weight = ctx.saved_tensors
            with exactly(upstream.device):
                _, gradients = _run(inputs, targets, weight * upstream, ctx.constants, True)
        else:
            gradients = [g if g is None else g * upstream for g in ctx.saved_tensors]
        return *gradients, *(None,) * 8


def _run(inputs, targets, weight, constants, needs_grad):
    """-> (the unweighted loss of each row, the gradients of sum(weight * loss) with respect to each of `inputs`)."""
    x, y, u, v, strength, bias = inputs
    losses = x.new_empty(len(x))
    shared = [t if t is None else t.detach().requires_grad_(needs_grad) for t in (y, v, strength, bias)]
    dx, du = (None if t is None else torch.zeros_like(t) for t in (x, u))
    dshared = [None if t is None else torch.zeros_like(t) for t in shared]
    rows = max(CHUNK_ROWS, CHUNK // len(y))
    for i in range(0, len(x), rows):
        s = slice(i, i + rows)
        own = [None if t is None else t[s].detach().requires_grad_(needs_grad) for t in (x, u)]
        with torch.set_grad_enabled(needs_grad):
            part = _token_losses(own[0], shared[0], own[1], *shared[1:], targets[s], *constants)
        losses[s] = part.detach()
        if not needs_grad:
            continue
        leaves = [t for t in (*own, *shared) if t is not None]
        gradients = iter(torch.autograd.grad(part, leaves, weight[s], allow_unused=True))
        for place in (dx, du):
            if place is not None:
                place[s] = next(gradients)
        for place in dshared:
            if place is not None:
                gradient = next(gradients)
                if gradient is not None:  # a control uses no strength
                    place += gradient
    return losses, (dx, dshared[0], du, *dshared[1:])


class HarmonicHead(nn.Module):
    """An unembedding: prototypes (V, C), a distance, a link, and whatever of them is trained.

    `head(h)` gives logits (..., V), so that F.cross_entropy, sampling and top-k work unchanged; `head.loss(h, targets)` gives the loss
    without ever holding all logits.

    Args:
        n_embd: C. vocab_size: V, the rows of the table.
        name: a key of `DISTANCES` or `CONTROLS`.
        exponent, link, scale: see `harmonic_logits`. learn_exponent / learn_scale train log n / log s from that start.
        real_vocab_size: rows from here on are padding: they get logit -inf, no probability and no gradient.
        bias: a trained (V,) bias; "cross_entropy" only.
        init_std: prototypes start from N(0, init_std^2); GPT-2's 0.02 by default.
        options: the distance's options: p, a, t, q.
    Raises: ValueError for anything it could not honour.
    """

    def __init__(
        self,
        n_embd: int,
        vocab_size: int,
        name: str = "euclidean",
        *,
        exponent: float | str | None = None,
        link: str = "harmonic",
        scale: float | None = None,
        learn_exponent: bool = False,
        learn_scale: bool = False,
        real_vocab_size: int | None = None,
        bias: bool = False,
        init_std: float = 0.02,
        impl: str = "auto",
        **options,
    ):
        super().__init__()
        row, _ = resolve(name, **options)
        self.kind, strength = _strength(name, link, n_embd, exponent, scale, options)
        if name in CONTROLS and (learn_exponent or learn_scale):
            raise ValueError(f"{name} has no exponent or scale to learn")
        if (learn_exponent and link == "softmax") or (learn_scale and link == "harmonic"):
            has, flag = ("a scale", "learn_scale") if link == "softmax" else ("an exponent", "learn_exponent")
            raise ValueError(f"the {link} link has {has}: set {flag}")
        if bias and name != "cross_entropy":
            raise ValueError(f"{name} takes no bias")
        if real_vocab_size is not None and not 0 < real_vocab_size <= vocab_size:
            raise ValueError(f"real_vocab_size {real_vocab_size} is not in 1..{vocab_size}")
        self.name, self.link, self.impl, self.options = name, link, impl, options
        self.real_vocab_size = real_vocab_size or vocab_size
        self.weight = nn.Parameter(torch.empty(vocab_size, n_embd).normal_(std=init_std))
        self.bias = nn.Parameter(torch.zeros(vocab_size)) if bias else None
        self.fixed_strength = strength
        self.log_strength = nn.Parameter(torch.tensor(math.log(strength))) if learn_exponent or learn_scale else None
        self.distance_parameters = nn.ParameterDict(row.parameters(n_embd))

    def extra_repr(self):
        symbol = {"harmonic": "n = ", "softmax": "s = "}.get(self.kind)
        strength = f", {self.kind} link, {symbol}{torch.as_tensor(self.strength()).item():.4g}" if symbol else ""
        return f"{self.name}{strength}, {len(self.weight):,} prototypes of {self.weight.shape[1]} coordinates"

    def strength(self):
        """n or s: a float, or a 0-dim tensor when it is learnt."""
        return self.fixed_strength if self.log_strength is None else self.log_strength.exp()

    def _settings(self):
        key = "scale" if self.link == "softmax" else "exponent"
        bias = None if self.bias is None else self.bias[: self.real_vocab_size]
        return {key: self.strength(), "link": self.link, "bias": bias, "training": self.training, **self.geometry()}

    def geometry(self) -> dict:
        """The distance's options and trained parameters: the keyword settings of `distance`, `paired_distance`, `contributions`."""
        return {**self.options, **self.distance_parameters}

    def prototypes(self) -> torch.Tensor:
        """The rows that are tokens: (real_vocab_size, C)."""
        return self.weight[: self.real_vocab_size]

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """(..., C) -> logits (..., V); padded rows are -inf."""
        logits = harmonic_logits(h, self.prototypes(), self.name, **self._settings())
        return F.pad(logits, (0, len(self.weight) - self.real_vocab_size), value=-math.inf)

    def loss(self, h: torch.Tensor, targets: torch.Tensor, ignore_index: int = -1, reduction: str = "mean") -> torch.Tensor:
        """Negative log likelihood in nats: (..., C), (...) -> scalar, or (...) for reduction="none"."""
        return harmonic_loss(
            h, self.prototypes(), targets, self.name, ignore_index=ignore_index, reduction=reduction, impl=self.impl, **self._settings()
        )

    @torch.no_grad()
    def target_distance(self, h: torch.Tensor, targets: torch.Tensor) -> torch.Tensor | None:
        """d(h, w_target) of each row, without noise: (..., C), (...) -> (...). None for a control."""
        if self.kind == "control":
            return None
        return paired_distance(h, self.weight[targets], self.name, **self.geometry())


@torch.no_grad()
def softmax_linearization_kl(h: torch.Tensor, head: HarmonicHead) -> float | None:
    """How far a head of the l2 kernel is from the softmax it linearises to: mean KL(p || q) in nats over the rows of h (N, C).

    -n log d = -m log r for the squared distance r = |x|^2 + |y|^2 - 2 x.y of the mapped vectors. Around r0 its tangent is -m r / r0, a
    softmax of dot products with a norm penalty: q. r0 = |x|^2, the value at y = 0, where prototypes are small beside the state
    (euclidean, mahalanobis; with n = |x|^2 = C this is softmax(x.y - |y|^2 / 2)); r0 = 2, the value at right angles, for cosine.
    None where the kernel is not l2 or the link not harmonic.
    """
    row, _ = resolve(head.name, **head.options)
    if row.kernel != "l2" or head.kind != "harmonic":
        return None
    with exactly(h.device):
        _, x, y, u, v, options = operands(h, head.prototypes(), head.name, **head.geometry())
        log_d = log_pairs(row, x, y, u, v, options)
        degree = row.degree  # 1: d is the root of the raw value r; 0: d is r / 2
        log_r = 2 * log_d if degree == 1 else log_d + math.log(2)
        squares = x.square().sum(-1, keepdim=True)
        r0 = squares if degree == 1 else torch.full_like(squares, 2.0)
        m = head.strength() / (2 if degree == 1 else 1)
        p, q = (-m * log_r).log_softmax(-1), (-m * log_r.exp() / r0).log_softmax(-1)
        return F.kl_div(q, p, log_target=True, reduction="batchmean").item()
