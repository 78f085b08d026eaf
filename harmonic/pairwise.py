"""Distances of all pairs and of paired rows: `distance`, `paired_distance` and `contributions`."""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .compiled import raw_values
from .distances import Distance, resolve
from .kernels import KERNELS, floored, pairs
from .kernels import paired as paired_values
from .precision import FLOAT32, Products


class Operands(NamedTuple):
    """States and prototypes after the map of their distance.

    x: mapped states (N, C) or (..., C). y: mapped prototypes (V, C) or (..., C).
    u, v: their terms of the denominator, (N,) and (V,), or None. options: of the kernel.
    """

    distance: Distance
    x: Tensor
    y: Tensor
    u: Tensor | None
    v: Tensor | None
    options: dict[str, Any]


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32; float64 stays. ValueError for integers."""
    if not x.is_floating_point():
        raise ValueError(
            f"expected floating-point vectors, got {x.dtype} of shape {tuple(x.shape)}"
        )
    return x if x.dtype == torch.float64 else x.float()


def same_precision(h: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Both vectors in float32, or in float64 if one of them is."""
    h, w = at_least_float32(h), at_least_float32(w)
    return (h, w) if h.dtype == w.dtype else (h.double(), w.double())


@contextlib.contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Inside, arithmetic is full float32: no autocast, no TF32 and no sums in float16.

    The caller's settings come back afterwards.
    """
    casts = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    with (
        torch.autocast(device.type, enabled=False) if casts else contextlib.nullcontext(),
        _sums_in_float32(device),
        _full_products(),
    ):
        yield


@contextlib.contextmanager
def _sums_in_float32(device: torch.device) -> Iterator[None]:
    """Inside, CUDA does not add products of float16 matrices in float16."""
    if device.type != "cuda" or not torch.backends.cuda.matmul.allow_fp16_accumulation:
        yield
        return
    torch.backends.cuda.matmul.allow_fp16_accumulation = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_fp16_accumulation = True


@contextlib.contextmanager
def _full_products() -> Iterator[None]:
    """Inside, products of float32 matrices are full float32."""
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # The caller has set `fp32_precision`, which replaces that function.
        with _ieee():
            yield
        return
    if precision == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


@contextlib.contextmanager
def _ieee() -> Iterator[None]:
    """`_full_products` by the newer settings of PyTorch."""
    mkldnn: Any = torch.backends.mkldnn
    backends = (torch.backends.cuda.matmul, mkldnn.matmul)
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = "none"  # what a wider setting says
            if backend.fp32_precision != precision:
                backend.fp32_precision = precision


def check_vectors(h: Tensor, w: Tensor, paired: bool = False) -> None:
    """Raises ValueError, with the sizes, for vectors that cannot be compared."""
    if h.shape[-1] != w.shape[-1]:
        raise ValueError(
            f"h and w differ in their last dimension: {tuple(h.shape)} and {tuple(w.shape)}"
        )
    if not paired and (w.dim() != 2 or not w.numel()):
        raise ValueError(f"w {tuple(w.shape)} is not a table of prototypes (V, C)")
    if h.device != w.device:
        raise ValueError(f"h {tuple(h.shape)} is on {h.device}, w {tuple(w.shape)} on {w.device}")


def draw_seed(distance: Distance, training: bool) -> Tensor | None:
    """The seed of the map's noise, from torch's generator; None without noise.

    States use this seed, and prototypes the next one.
    """
    noisy = training and distance.map is not None and distance.map.noisy
    return torch.randint(2**62, (), device="cpu") if noisy else None


def mapped(distance: Distance, x: Tensor, seed: int | None, settings: dict[str, Any]) -> Tensor:
    """Applies the map of a distance: (..., C) -> (..., C). settings: of the map."""
    if distance.map is None:
        return x
    if seed is not None:
        settings = settings | {"noise": torch.Generator(x.device).manual_seed(seed)}
    return distance.map.function(x, **settings)


def map_both(
    distance: Distance,
    h: Tensor,
    w: Tensor,
    seed: int | None,
    settings: dict[str, Any],
    options: dict[str, Any],
) -> Operands:
    """Applies the map to both operands. settings: of the map. options: of the kernel."""
    x = mapped(distance, h, seed, settings)
    y = mapped(distance, w, None if seed is None else seed + 1, settings)
    if distance.denominator is None:
        return Operands(distance, x, y, None, None, options)
    u, v = distance.denominator.terms(x), distance.denominator.terms(y)
    return Operands(distance, x, y, u, v, options)


def operands(
    h: Tensor, w: Tensor, name: str, training: bool = False, paired: bool = False, **settings: Any
) -> Operands:
    """Checks and maps states and prototypes. The result is all that kernel and epilogue need."""
    distance, settings = resolve(name, **settings)
    check_vectors(h, w, paired)
    h, w = same_precision(h, w)
    drawn = draw_seed(distance, training)
    seed = None if drawn is None else int(drawn)
    of_map, of_kernel = distance.map_settings(settings), distance.kernel_options(settings)
    return map_both(distance, h, w, seed, of_map, of_kernel)


def log_distance(
    distance: Distance, raw: Tensor, u: Tensor | None, v: Tensor | None, options: dict[str, Any]
) -> Tensor:
    """Turns raw values into log d; for a control, into logits. u and v broadcast with `raw`."""
    if distance.logit is not None:
        return distance.logit(raw)
    log_d: Tensor = distance.root(**options) * (distance.factor * raw).log()
    if distance.denominator is None or u is None or v is None:  # Either all three exist, or none.
        return log_d
    return log_d - (u + v).abs().clamp_min(distance.denominator.floor).log()


def log_pairs(both: Operands, products: Products = FLOAT32) -> Tensor:
    """log d of all pairs, (N, V); for a control, its logits."""
    raw = pairs(both.x, both.y, both.distance.kernel, both.options, products)
    u = None if both.u is None else both.u[:, None]
    return log_distance(both.distance, raw, u, both.v, both.options)


def level_pairs(both: Operands, products: Products = FLOAT32) -> Tensor:
    """d^(1/root) of all pairs, up to a constant factor: (N, V). Not for controls.

    Unlike log d it keeps the digits in which near distances differ.
    """
    level = pairs(both.x, both.y, both.distance.kernel, both.options, products)
    if both.distance.denominator is None or both.u is None or both.v is None:
        return level
    size = (both.u[:, None] + both.v).abs().clamp_min(both.distance.denominator.floor)
    return level / size ** (1 / both.distance.root(**both.options))


def fast_log_pairs(both: Operands) -> Tensor:
    """`log_pairs`, with a compiled kernel if there is one for these tensors."""
    if torch.compiler.is_exporting():
        return log_pairs(both)
    raw = raw_values(both.x, both.y, both.distance.kernel, both.options)
    if raw is None:
        return log_pairs(both)
    raw = floored(raw, both.x, both.y, both.distance.kernel, both.options)
    u = None if both.u is None else both.u[:, None]
    return log_distance(both.distance, raw, u, both.v, both.options)


def distance(h: Tensor, w: Tensor, name: str, **settings: Any) -> Tensor:
    """The distances d(h, w) of all pairs.

    Args:
        h: (..., C) hidden states.
        w: (V, C) prototypes.
        name: a key of `DISTANCES`.
        settings: the options (p, a, t, q) and trained parameters (factor, theta) of the distance.
    Returns: (..., V), float32, or float64 if h or w is.
    Raises: ValueError for an unknown name or setting, a control, or sizes that do not match.
    """
    if resolve(name, **settings)[0].is_control:
        raise ValueError(f"{name} is a control, not a distance")
    with full_float32(h.device):
        both = operands(h.reshape(-1, h.shape[-1]), w, name, **settings)
        return log_pairs(both).exp().view(*h.shape[:-1], len(w))


def paired_distance(h: Tensor, w: Tensor, name: str, **settings: Any) -> Tensor:
    """The distances of rows that are paired by broadcasting: (..., C), (..., C) -> (...).

    For a control, its logits. Settings and errors are those of `distance`.
    """
    with full_float32(h.device):
        both = operands(h, w, name, paired=True, **settings)
        raw = paired_values(both.x, both.y, both.distance.kernel, both.options)
        value = log_distance(both.distance, raw, both.u, both.v, both.options)
        return value if both.distance.is_control else value.exp()


@torch.no_grad()
def contributions(h: Tensor, w: Tensor, name: str, **settings: Any) -> Tensor:
    """The share of each coordinate in the distance of a pair: (..., C), (..., C) -> (..., C).

    The shares of a pair are not negative and add up to 1; all are 0 if h = w. For distances that
    are sums they are exact; those of l2 are shares of the squared distance. For the maximum, one
    coordinate has share 1. For the smooth maximum they are its softmax weights. For a dot product
    they are shares of sum |h w|. Full Mahalanobis mixes coordinates: with d = h - w they are shares
    of sum |d (P d)|. Settings are those of `distance`.
    """
    with full_float32(h.device):
        both = operands(h, w, name, paired=True, **settings)
        chosen = both.distance
        terms = KERNELS[chosen.kernel].terms(both.x, both.y, **both.options).abs()
        if chosen.map is not None and chosen.map.multiplies:
            factor = chosen.map_settings(resolve(name, **settings)[1]).get("factor")
            if factor is not None:  # P = factor factor'
                x, y = same_precision(h, w)
                terms = ((x - y) * ((both.x - both.y) @ factor.to(x.dtype).T)).abs()
    return terms / terms.sum(-1, keepdim=True).clamp_min(torch.finfo(terms.dtype).tiny)
