"""The two links from distances to logits. Each has one number, its strength.

    harmonic   logit_v = -n log d(h, w_v)   so p_v = d_v^-n / sum_j d_j^-n (2502.01628, eq. 2)
    softmax    logit_v = -s d(h, w_v)       the twin: the same distance without HarMax

The strength is the exponent n of the harmonic link, or the scale s of the softmax link.
"""

import math
import numbers
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .distances import HEADS, resolve
from .pairwise import paired_distance

LINKS = ("harmonic", "softmax")
CONTROL = "control"  # Stands in place of a link for a head that is a dot product.

# Exponents n that grow with the width C: name -> function from C to n.
EXPONENTS: dict[str, Callable[[int], float]] = {
    "dim/4": lambda dim: dim / 4,
    "sqrt_dim": math.sqrt,
    "dim": float,
    "2dim": lambda dim: 2.0 * dim,
    "4dim": lambda dim: 4.0 * dim,
}


def logits(
    log_d: Tensor, strength: float | Tensor, link: str, bias: Tensor | None = None
) -> Tensor:
    """Turns log d (..., V) into logits (..., V).

    strength: n or s. A control passes its logits in place of log d. It has no strength.
    bias: (V,), for controls only.
    """
    if link == CONTROL:
        return log_d if bias is None else log_d + bias
    return -strength * (log_d if link == "harmonic" else log_d.exp())


def log_ratio(level: Tensor, nearest: Tensor) -> Tensor:
    """log(level / nearest) for 0 < nearest <= level; exact where both are close."""
    ratio = (level - nearest) / nearest
    if ratio.device.type == "cpu" and not torch.compiler.is_compiling() and (ratio < 1e37).all():
        return ratio.log1p()
    return torch.where(ratio < 1e37, ratio.log1p(), level.log() - nearest.log())


def resolve_exponent(name: str, dim: int, exponent: float | str | Tensor | None = None) -> float:
    """The exponent n as a number.

    exponent: a positive number, a key of `EXPONENTS`, or None for the default of the distance.
    Raises: ValueError for anything else.
    """
    exponent = HEADS[name].exponent if exponent is None else exponent
    n = exponent
    if isinstance(exponent, str) and exponent in EXPONENTS:
        n = EXPONENTS[exponent](dim)
    if not isinstance(n, numbers.Real) or not 0 < n < math.inf:
        raise ValueError(
            f"exponent must be a positive number or one of {', '.join(EXPONENTS)}, got {exponent!r}"
        )
    return float(n)


@torch.no_grad()
def default_scale(
    name: str, dim: int, exponent: float | str | Tensor | None = None, **settings: Any
) -> float:
    """The scale s with which both links start training alike.

    s = n / median d, with d between layer-normalised states and prototypes of standard deviation
    0.02, as in a new model. At that distance `-s d` and `-n log d` have the same slope.
    """
    generator = torch.Generator().manual_seed(0)
    # This may run inside torch.device("meta"), and with another default dtype.
    like: dict[str, Any] = dict(device="cpu", dtype=torch.float32)
    h, w = (torch.randn(64, dim, generator=generator, **like) for _ in range(2))
    options = {k: v for k, v in settings.items() if k in resolve(name)[0].options}
    typical = paired_distance(F.layer_norm(h, (dim,)), 0.02 * w, name, **options).median().item()
    return resolve_exponent(name, dim, exponent) / typical


def resolve_strength(
    name: str,
    dim: int,
    link: str = "harmonic",
    exponent: float | str | Tensor | None = None,
    scale: float | Tensor | None = None,
    **settings: Any,
) -> tuple[str, float | Tensor]:
    """Returns the link, or "control" for a control, and the strength: a number or a 0-dim tensor.

    settings: of the distance.
    Raises: ValueError for an unknown link, or a strength that is not a positive number.
    """
    if HEADS[name].is_control:
        return CONTROL, 1.0
    if link not in LINKS:
        raise ValueError(f"unknown link {link!r}; choose from {', '.join(LINKS)}")
    chosen = scale if link == "softmax" else exponent
    if isinstance(chosen, Tensor):
        if chosen.dim():
            raise ValueError(f"exponent and scale are numbers, got a tensor {tuple(chosen.shape)}")
        return link, chosen
    if link == "harmonic":
        return link, resolve_exponent(name, dim, exponent)
    s = default_scale(name, dim, exponent, **settings) if scale is None else scale
    if not isinstance(s, numbers.Real) or not 0 < s < math.inf:
        raise ValueError(f"scale must be a positive number, got {scale!r}")
    return link, float(s)
