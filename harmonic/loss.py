"""HarMax in log space: logits, loss and the head as a module.

    harmonic   logit_v = -n log d(h, w_v)   so that p_v = d_v^-n / sum_j d_j^-n     (2502.01628, eq. 2)
    softmax    logit_v = -s d(h, w_v)       the same geometry without HarMax: its control

Everything is float32 (float64 stays) whatever autocast says, except the operands of matrix products where `precision` says so. Nothing is
clamped, smoothed or filled in; the only constant is the floor under the logarithm that `kernels/dense.py` documents.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F

from harmonic.distances import (
    CONTROLS,
    EXPONENTS,
    HEADS,
    Distance,
    check_vectors,
    exactly,
    log_pairs,
    map_both,
    mapped,
    noise_seed,
    operands,
    paired_distance,
    resolve,
    split,
    together,
)
from harmonic.kernels import dense
from harmonic.kernels.dense import cpu
from harmonic.kernels.products import FLOAT32, PRECISIONS, Products, choose

gpu = None
if torch.cuda.is_available():
    try:
        from harmonic.kernels import gpu
    except ImportError:  # without Triton the chunked implementation serves
        pass

LINKS = ("harmonic", "softmax")
IMPLS = ("auto", "dense", "chunked", "numba", "triton")
IGNORE_INDEX = -100  # the target of a position without a loss, as in F.cross_entropy
# The chunked implementation: about CHUNK logits at a time, 8 MiB of floats that stay in cache from one elementwise pass to the next, but
# at least CHUNK_ROWS rows, for each chunk also adds once to the (V, C) gradient.
CHUNK = 2**21
CHUNK_ROWS = 256
# Numbers of a table that are mapped at a time: on a CPU 4 MiB, large enough for threads to share, small enough for a cache; on a GPU
# 256 MiB, for each slice costs about ten launches.
MAP = {"cpu": 2**20, "cuda": 2**26}
SKIP = 1e-6


def resolve_exponent(name: str, dim: int, exponent: float | str | None = None) -> float:
    """The exponent as a number, from a positive number, a key of `EXPONENTS`, or None for the distance's default. ValueError otherwise."""
    exponent = HEADS[name].exponent if exponent is None else exponent
    n = EXPONENTS[exponent](dim) if exponent in EXPONENTS else exponent
    if not isinstance(n, int | float) or not 0 < n < math.inf:
        raise ValueError(f"exponent must be a positive number or one of {', '.join(EXPONENTS)}, got {exponent!r}")
    return float(n)


@torch.no_grad()
def default_scale(name: str, dim: int, exponent: float | str | None = None, **settings) -> float:
    """The s at which `-s d` and `-n log d` have the same slope for a freshly initialised model: n over the median distance between a
    layer-normalised state and a prototype of standard deviation 0.02. So that twins start from the same place."""
    generator = torch.Generator().manual_seed(0)
    h, w = (torch.randn(64, dim, generator=generator, device="cpu") for _ in range(2))  # also inside torch.device("meta")
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
        exponent: n, the power of the distance (not of its square): a number, a 0-dim tensor, a key of `EXPONENTS`, None = the default.
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
    ignore_index: int = IGNORE_INDEX,
    reduction: str = "mean",
    impl: str = "auto",
    skip: float = SKIP,
    precision: str = "auto",
    rows: int | None = None,
    training: bool = False,
    check_finite: bool = True,
    **settings,
) -> torch.Tensor:
    """Negative log likelihood of the targets in nats, unsmoothed.

    Args:
        h: (..., C) hidden states. w: (V, C) prototypes. targets: (...) integers in [0, V) or `ignore_index`.
        reduction: "mean" over the targets that are not ignored, "sum", or "none" -> (...).
        impl: "dense" materialises (N, V); "chunked" never holds more than a few chunks of rows, whatever N; "numba" is the same with
            compiled kernels, on a CPU in float32; "triton" on CUDA; "auto" picks the fastest that the device and the distance have.
        skip: elementwise kernels leave out pairs whose slope |dL/draw| is below skip / V of the target's, so that what is left out of any
            row adds up to less than `skip` of the target's slope. 0: none.
        precision: of the matrix products (kernels l2 and dot): "float32"; "split", nearly as exact and on a GPU several times faster;
            "autocast", torch.autocast's type inside it. "auto" is split for distances and autocast for dot products on CUDA, float32
            elsewhere. Norms, logarithms and sums are always float32, and so is all of impl "dense". See `kernels/products.py`.
        rows: how many rows of w are prototypes, where the rest is padding; None: all.
        check_finite: raise for vectors that are not finite; else the loss is NaN, as in a training loop that looks at it.
        The rest: see `harmonic_logits`.
    Returns: a scalar, or (...) for reduction="none"; float32 (float64 if h or w is). The mean over no targets is 0, with zero
        gradients (not NaN), so that a process whose share is empty does not poison the others. No states at all are as good as states
        whose targets are all ignored.
    Raises: ValueError for unknown names, non-positive numbers, mismatched sizes, devices that differ, integer vectors; on a CPU also for
        targets out of range and vectors that are not finite (elsewhere the check would wait for the device: a NaN comes out).
    """
    if impl not in IMPLS:
        raise ValueError(f"unknown impl {impl!r}; choose from {', '.join(IMPLS)}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"unknown reduction {reduction!r}; choose from mean, sum, none")
    if not 0 <= skip < 1:
        raise ValueError(f"skip must be in [0, 1), got {skip}")
    row, kept = resolve(name, **settings)
    link, strength = _strength(name, link, w.shape[-1], exponent, scale, settings)
    check_vectors(h, w)
    _check_targets(h, targets)
    rows = len(w) if rows is None else rows
    if not 0 < rows <= len(w):
        raise ValueError(f"rows {rows} is not in 1..{len(w)}")
    products = choose(precision, row.kernel, h.device)
    if impl == "dense":  # what the others are compared with
        products = FLOAT32
    with exactly(h.device):
        x, y = together(h.reshape(-1, h.shape[-1]), w)
        mapping, options = split(row, kept)
        trained = {k: v for k, v in mapping.items() if isinstance(v, torch.Tensor)}
        mapping = {k: v for k, v in mapping.items() if k not in trained}
        if products.name == "split" and not row.elementwise:  # the map is a matrix product, too
            mapping["products"] = products
        how = _How(row, link, options, mapping, tuple(trained), ignore_index, reduction, impl, skip, products, rows, training, check_finite)
        if not isinstance(strength, torch.Tensor):
            strength = torch.full((), strength, device=x.device)  # filled there: a GPU need not wait for a copy
        strength = strength.to(x)
        losses = _loss(x, y, targets.reshape(-1).long(), strength, bias, how, *trained.values())
    return losses.view(targets.shape) if reduction == "none" else losses


def _check_targets(h, targets):
    if targets.shape != h.shape[:-1]:
        raise ValueError(f"targets {tuple(targets.shape)} do not match h {tuple(h.shape)}")
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise ValueError(f"targets {tuple(targets.shape)} must be integers, got {targets.dtype}")
    if targets.device != h.device:
        raise ValueError(f"h {tuple(h.shape)} is on {h.device}, targets {tuple(targets.shape)} on {targets.device}")


def _check_values(x, y, targets, how):
    """ValueError for a target out of range or a vector that is not finite; without `check_finite`: -> whether all are."""
    bad = (targets != how.ignore_index) & ((targets < 0) | (targets >= how.rows))
    if bad.any():
        raise ValueError(f"target {targets[bad][0].item()} is outside [0, {how.rows}) and is not ignore_index={how.ignore_index}")
    for name, values in (("h", x), ("w", y[: how.rows])):
        if values.detach().sum().isfinite() or values.isfinite().all():  # the sum settles it in one pass
            continue
        if not how.check_finite:
            return False
        bad = (~values.isfinite()).nonzero()
        where = tuple(bad[0].tolist())
        raise ValueError(f"{name} {tuple(values.shape)} has {len(bad):,} values that are not finite, the first at {where}")
    return True


def _weigh(targets, dtype, how):
    """-> (targets in [0, rows); the weight of each row's loss in what is returned: 0 where the target is ignored).

    A target that is neither ignored nor a prototype gets the weight NaN: the loss shows it, without waiting for a device to say so."""
    kept = targets != how.ignore_index
    known = (targets >= 0) & (targets < how.rows)
    weight = kept.to(dtype)
    if how.reduction == "mean":
        weight = weight / weight.sum().clamp_min(1)
    return torch.where(known, targets, 0), torch.where(known | ~kept, weight, math.nan)


@dataclass(frozen=True)
class _How:
    """What a loss is, beside its tensors; `trained` names the settings of the map that are tensors."""

    row: Distance
    link: str
    options: dict
    mapping: dict
    trained: tuple
    ignore_index: int
    reduction: str
    impl: str
    skip: float
    products: Products
    rows: int
    training: bool
    check_finite: bool

    def epilogue(self):
        row = self.row
        return dense.Epilogue(row.kernel, {**self.options, **row.fixed}, self.link, row.factor, row.root(**self.options), row.floor)

    def implementation(self, x):
        """The function that runs it: see `_chunked`."""
        compiled = x.dtype == torch.float32 and (not self.row.logit or self.row is HEADS["cross_entropy"])
        numba = compiled and x.device.type == "cpu" and cpu and cpu.supports(self.epilogue())
        triton = compiled and x.device.type == "cuda" and gpu and gpu.supports(self.epilogue())
        for name, found, device in (("numba", numba, "a CPU"), ("triton", triton, "CUDA")):
            if self.impl == name and not found:
                raise ValueError(
                    f"impl={name!r} needs {device}, float32, the package {name} and a kernel for this distance"
                    f" (h is {x.dtype} on {x.device}); 'chunked' has all of them"
                )
        if self.impl == "chunked":
            return _chunked
        return cpu.run if numba else _triton if triton else _chunked


@torch.compiler.disable  # loops over chunks that differentiate as they go, and checks of values: nothing to trace
def _loss(x, y, targets, strength, bias, how, *trained):
    if x.device.type == "cpu" and not _check_values(x, y, targets, how):
        how = replace(how, impl="chunked")  # compiled maxima lose a NaN
    targets, weight = _weigh(targets, x.dtype, how)
    if not len(x):  # The sum of no losses is 0, but it still has gradients: zeros.
        nothing = sum(t.flatten()[:0].sum() for t in (x, y, strength, bias, *trained) if t is not None)
        return x.new_zeros(0) + nothing if how.reduction == "none" else nothing
    seed = noise_seed(how.row, how.training)
    if how.impl == "dense":
        settings = {**how.mapping, **dict(zip(how.trained, trained, strict=True))}
        both = map_both(how.row, x, y[: how.rows], seed, settings)
        losses = _token_losses(*both, strength, bias, targets, how) * weight
        return losses if how.reduction == "none" else losses.sum()
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, y, strength, bias, *trained))
    if x.device.type != "cpu" or how.reduction == "none" or seed is not None or weight.all():
        return _Fused.apply(x, y, strength, bias, targets, weight, how, seed, needs_grad, *trained)
    kept = weight.nonzero()[:, 0]  # masked language models ignore most rows: they cost nothing
    if not len(kept):
        kept = kept.new_zeros(1)  # of weight 0
    return _Fused.apply(x[kept], y, strength, bias, targets[kept], weight[kept], how, seed, needs_grad, *trained)


def _token_losses(x, y, u, v, strength, bias, targets, how):
    logits = _logits(log_pairs(how.row, x, y, u, v, how.options, how=how.products), strength, how.link, bias)
    return F.cross_entropy(logits, targets, reduction="none")


class _Fused(torch.autograd.Function):
    """The loss with every gradient taken in the forward pass, while a chunk of rows is at hand.

    For "mean" and "sum" the upstream gradient is one number, so the gradients are ready up to that factor. For "none" it is a vector
    known only in the backward pass, which computes the chunks again; so does a second backward pass.
    """

    @staticmethod
    def forward(ctx, x, y, strength, bias, targets, weight, how, seed, needs_grad, *trained):
        ctx.how, ctx.seed = how, seed
        ctx.save_for_backward(x, y, strength, bias, targets, weight, *trained)
        per_token = how.reduction == "none"
        losses, ctx.gradients = _run(x, y, strength, bias, targets, weight, how, seed, needs_grad and not per_token, *trained)
        return losses * weight if per_token else losses.dot(weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        x, y, strength, bias, targets, weight, *trained = ctx.saved_tensors
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            with exactly(x.device):
                _, gradients = _run(x, y, strength, bias, targets, weight * upstream, ctx.how, ctx.seed, True, *trained)
        else:
            for g in gradients:
                if g is not None:
                    g.mul_(upstream)  # in place: another table would be the largest thing here
        dx, dy, dstrength, dbias, *dtrained = gradients
        return dx, dy, dstrength, dbias, None, None, None, None, None, *dtrained


def _run(x, y, strength, bias, targets, weight, how, seed, needs_grad, *trained):
    """-> (the unweighted loss of each row; the gradients of sum(weight * loss) with respect to x, y, strength, bias, *trained)."""
    settings = dict(zip(how.trained, trained, strict=True))
    states = Mapped(x, how, seed, settings)
    prototypes = Mapped(y[: how.rows], how, None if seed is None else seed + 1, settings, len(y) - how.rows)
    u, v = states.terms(), prototypes.terms()
    losses, gradients = how.implementation(x)(states.whole(), prototypes, u, v, strength, bias, targets, weight, how, needs_grad)
    if not needs_grad:
        return losses, None
    dx, dy, du, dv, dstrength, dbias = gradients
    through_h, through_w = states.pull(dx, du), prototypes.pull(dy, dv)
    dy = prototypes.padded(dy)
    return losses, (dx, dy, dstrength, dbias, *(a + b for a, b in zip(through_h, through_w, strict=True)))


class Mapped:
    """Vectors (M, C) behind their distance's map, a block of rows at a time, and the way of gradients back through it.

    An elementwise map is computed whenever a block is asked for, so that a mapped copy of the prototypes never exists; others once.
    """

    def __init__(self, x, how, seed, trained, padding=0):
        self.x, self.how, self.seed, self.padding = x.detach().contiguous(), how, seed, padding
        self.rows = -(-MAP["cuda" if x.device.type == "cuda" else "cpu"] // x.shape[1])  # of a slice
        self.trained = {k: t.detach() for k, t in trained.items()}
        self.kept = self.x if how.row.map is None else None if how.row.elementwise else self._map(self.x, 0, self.trained)
        self.shift = self.buffer = None

    def __len__(self):
        return len(self.x)

    def _map(self, x, first, trained):
        seed = None if self.seed is None else self.seed + first
        return mapped(self.how.row, x, seed, {**self.how.mapping, **trained})

    def _slices(self):
        """Of about MAP numbers; the last may have three rows more, for a kernel's tile has four."""
        starts = [*range(0, max(1, len(self.x) - 3), self.rows), len(self.x)]
        return [slice(a, b) for a, b in zip(starts, starts[1:], strict=False)]

    def blocks(self):
        """Yields (the index of the first row, the mapped rows less `shift`)."""
        if self.kept is not None and self.shift is None:
            yield 0, self.kept
            return
        for s in self._slices():
            block = self._map(self.x[s], s.start, self.trained) if self.kept is None else self.kept[s]
            yield s.start, block if self.shift is None else block - self.shift
            block = None  # The next one is made in its memory.

    def whole(self):
        """All of it: (M, C)."""
        return self.kept if self.kept is not None else torch.cat([block for _, block in self.blocks()])

    def new_gradient(self):
        """An empty (M, C) for the gradient, with room for the padding behind it."""
        self.buffer = self.x.new_empty(len(self.x) + self.padding, self.x.shape[1])
        self.buffer[len(self.x) :] = 0
        return self.buffer[: len(self.x)]

    def padded(self, gradient):
        """The gradient with zeros for the padding."""
        if self.buffer is not None:
            return self.buffer
        return F.pad(gradient, (0, 0, 0, self.padding)) if self.padding else gradient

    def terms(self):
        """The rank-one terms of the epilogue: (M,), or None."""
        terms = self.how.row.terms
        return terms and torch.cat([terms(part) for _, block in self.blocks() for part in block.split(self.rows)])

    def pull(self, gradient, of_terms) -> list:
        """Turns the gradient with respect to the mapped vectors (M, C), and their terms (M,), into that with respect to x, in place.

        Returns: the gradients with respect to the trained settings."""
        row, trained = self.how.row, list(self.trained.values())
        found = [torch.zeros_like(t) for t in trained]
        if row.map is None and of_terms is None:
            return found
        for s in self._slices():
            with torch.enable_grad():
                leaves = [t.detach().requires_grad_() for t in (self.x[s], *trained)]
                y = self._map(leaves[0], s.start, dict(zip(self.trained, leaves[1:], strict=True)))
                outputs, upstream = [y], [gradient[s]]
                if of_terms is not None:
                    outputs, upstream = [y, row.terms(y)], [gradient[s], of_terms[s]]
            gradient[s], *more = torch.autograd.grad(outputs, leaves, upstream)
            for total, part in zip(found, more, strict=True):
                total += part
        return found


def _triton(x, y, u, v, strength, bias, targets, weight, how, needs_grad):
    return gpu.run(x, y.whole(), u, v, strength, bias, targets, weight, how.epilogue(), needs_grad, how.products)


def _chunked(x, y, u, v, strength, bias, targets, weight, how, needs_grad):
    """The loss of mapped operands in plain PyTorch, a chunk of rows at a time: what every implementation does.

    Args: x (N, C) states, y: prototypes as `Mapped`; u (N,), v (V,): their terms, or None; strength (); bias (V,) or None; targets (N,)
        in [0, V); weight (N,), of each row in the sum that is differentiated; how: `_How`.
    Returns: losses (N,), unweighted; the gradients of sum(weight * losses) with respect to x, y, u, v, strength, bias, or None.
    """
    losses = x.new_empty(len(x))
    shared = [t if t is None else t.detach().requires_grad_(needs_grad) for t in (y.whole(), v, strength, bias)]
    dx, du = (None if t is None else torch.zeros_like(t) for t in (x, u))
    dshared = [None if t is None else torch.zeros_like(t) for t in shared]
    rows = max(CHUNK_ROWS, CHUNK // len(y))
    for i in range(0, len(x), rows):
        s = slice(i, i + rows)
        own = [None if t is None else t[s].detach().requires_grad_(needs_grad) for t in (x, u)]
        with torch.set_grad_enabled(needs_grad):
            part = _token_losses(own[0], shared[0], own[1], *shared[1:], targets[s], how)
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
    dy, dv, dstrength, dbias = dshared
    return losses, (dx, dy, du, dv, dstrength, dbias) if needs_grad else None


def _at_least_float32(before, after):
    """A tensor that a module's cast has made narrower than float32 gets its own numbers back, on the new device."""
    if after.dtype in (torch.float16, torch.bfloat16) and before.dtype in (torch.float32, torch.float64):
        return before.to(after.device)
    return after


class HarmonicHead(nn.Module):
    """An unembedding: prototypes (V, C), a distance, a link, and whatever of them is trained.

    `head(h)` gives the logits of all tokens, so that F.cross_entropy, sampling and top-k work unchanged; `head.loss(h, targets)` gives the
    loss without ever holding all logits. Casting a model to half precision leaves the prototypes of a distance float32, unless they are
    tied to an embedding that is cast.

    Args:
        n_embd: C. vocab_size: V, the rows of the table.
        name: a key of `DISTANCES` or `CONTROLS`.
        exponent, link, scale: see `harmonic_logits`. learn_exponent / learn_scale train log n / log s from that start.
        real_vocab_size: rows from here on are padding: they get no logit, no probability and no gradient.
        bias: a trained (V,) bias; "cross_entropy" only.
        init_std: prototypes start from N(0, init_std^2); GPT-2's 0.02 by default.
        impl, skip, precision: see `harmonic_loss`.
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
        skip: float = SKIP,
        precision: str = "auto",
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
        if precision not in PRECISIONS:
            raise ValueError(f"unknown precision {precision!r}; choose from {', '.join(PRECISIONS)}")
        self.name, self.link, self.options = name, link, options
        self.impl, self.skip, self.precision = impl, skip, precision
        self.real_vocab_size = real_vocab_size or vocab_size
        self.weight = nn.Parameter(torch.empty(vocab_size, n_embd).normal_(std=init_std))
        self.bias = nn.Parameter(torch.zeros(vocab_size)) if bias else None
        self.fixed_strength = strength
        self.given = (scale if self.kind == "softmax" else exponent) is not None
        self.log_strength = nn.Parameter(torch.tensor([math.log(strength)])) if learn_exponent or learn_scale else None
        self.distance_parameters = nn.ParameterDict(row.parameters(n_embd))

    def _apply(self, fn, recurse=True):
        """What `.to`, `.half`, `.cuda` and others do to a module: every tensor becomes fn(tensor)."""
        if self.name in CONTROLS:
            return super()._apply(fn, recurse)
        return super()._apply(lambda tensor: _at_least_float32(tensor, fn(tensor)), recurse)

    def extra_repr(self):
        symbol = {"harmonic": "n = ", "softmax": "s = "}.get(self.kind)
        strength = f", {self.kind} link, {symbol}{torch.as_tensor(self.strength()).item():.4g}" if symbol else ""
        rows, coordinates = self.padded_prototypes().shape
        return f"{self.name}{strength}, {rows:,} prototypes of {coordinates} coordinates"

    def strength(self):
        """n or s: a float, or a 0-dim tensor when it is learnt."""
        return self.fixed_strength if self.log_strength is None else self.log_strength.exp()[0]

    @torch.no_grad()
    def set_strength(self, value: float):
        """Sets n or s."""
        self.fixed_strength = value
        if self.log_strength is not None:
            self.log_strength.fill_(math.log(value))

    def _settings(self):
        key = "scale" if self.link == "softmax" else "exponent"
        bias = None if self.bias is None else self.bias[: self.real_vocab_size]
        return {key: self.strength(), "link": self.link, "bias": bias, "training": self.training, **self.geometry()}

    def products(self) -> Products:
        """How `loss` multiplies matrices on the prototypes' device, inside torch.autocast if this is called inside it."""
        row, _ = resolve(self.name, **self.options)
        return choose(self.precision, row.kernel, self.padded_prototypes().device)

    def geometry(self) -> dict:
        """The distance's options and trained parameters: the keyword settings of `distance`, `paired_distance`, `contributions`."""
        return {**self.options, **self.distance_parameters}

    def prototypes(self) -> torch.Tensor:
        """The rows that are tokens: (real_vocab_size, C)."""
        table = self.padded_prototypes()
        return table if self.real_vocab_size == len(table) else table[: self.real_vocab_size]

    def padded_prototypes(self) -> torch.Tensor:
        """The whole table, with rows that are padding: (V, C)."""
        return self.weight

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """(..., C) -> logits (..., real_vocab_size)."""
        return harmonic_logits(h, self.prototypes(), self.name, **self._settings())

    def loss(self, h: torch.Tensor, targets: torch.Tensor, ignore_index: int = IGNORE_INDEX, reduction: str = "mean") -> torch.Tensor:
        """Negative log likelihood in nats: (..., C), (...) -> scalar, or (...) for reduction="none". NaN where h or w is not finite."""
        how = {"ignore_index": ignore_index, "reduction": reduction, "impl": self.impl, "skip": self.skip, "precision": self.precision}
        how |= {"rows": self.real_vocab_size, "check_finite": False}  # a slice of the table would cost a copy of its gradient
        return harmonic_loss(h, self.padded_prototypes(), targets, self.name, **how, **self._settings())

    @torch.no_grad()
    def target_distance(self, h: torch.Tensor, targets: torch.Tensor) -> torch.Tensor | None:
        """d(h, w_target) of each row, without noise: (..., C), (...) -> (...). None for a control; NaN where a target is no token."""
        if self.kind == "control":
            return None
        known = (targets >= 0) & (targets < self.real_vocab_size)
        d = paired_distance(h, self.prototypes()[torch.where(known, targets, 0)], self.name, **self.geometry())
        return torch.where(known, d, math.nan)


@torch.no_grad()
def softmax_linearization_kl(h: torch.Tensor, head: HarmonicHead) -> float | None:
    """How far a head of the l2 kernel is from the softmax it linearises to: mean KL(p || q) in nats over the rows of h (N, C).

    -n log d = -m log r for the squared distance r = |x|^2 + |y|^2 - 2 x.y of the mapped vectors. Around r0, the mean of r over the
    prototypes, its tangent is -m r / r0, a softmax of dot products with a norm penalty: q. Where prototypes are small beside the state r0
    is |x|^2 (euclidean, mahalanobis; with n = |x|^2 = C this is softmax(x.y - |y|^2 / 2)), and for cosine about 2, the value at right
    angles. None where the kernel is not l2 or the link not harmonic.
    """
    row, _ = resolve(head.name, **head.options)
    if row.kernel != "l2" or head.kind != "harmonic":
        return None
    with exactly(h.device):
        _, x, y, u, v, options = operands(h, head.prototypes(), head.name, **head.geometry())
        log_d = log_pairs(row, x, y, u, v, options)
        root = row.root()
        log_r = log_d / root - math.log(row.factor)
        r0 = log_r.exp().mean(-1, keepdim=True)
        m = head.strength() * root
        p, q = (-m * log_r).log_softmax(-1), (-m * log_r.exp() / r0).log_softmax(-1)
        return F.kl_div(q, p, log_target=True, reduction="batchmean").item()
