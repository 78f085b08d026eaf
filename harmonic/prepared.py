"""A head for many calls between which it does not change, such as the steps of sampling."""

from typing import Any

import torch
from torch import Tensor

from .compiled import raw_values
from .distances import resolve
from .kernels import above, floor, l2_pairs, pairs
from .links import CONTROL, logits
from .pairwise import exactly, log_distance, mapped, wide
from .precision import FLOAT32


class PreparedHead:
    """`prepared(h)` gives the logits that `head(h)` gives in evaluation, without a gradient.

    What depends on the prototypes alone is computed once: their map (such as cosine's unit
    vectors), their squared norms and the floors under their distances. Prepare the head again
    after its weights have changed. Memory: a second table where the distance has a map.
    """

    @torch.no_grad()
    def __init__(
        self,
        name: str,
        prototypes: Tensor,
        strength: float | Tensor,
        link: str,
        bias: Tensor | None,
        **settings: Any,
    ):
        """prototypes, bias: without padding. settings: the distance's options and parameters."""
        self.distance, settings = resolve(name, **settings)
        self.of_map = self.distance.map_settings(settings)
        self.of_kernel = self.distance.kernel_options(settings)
        self.strength, self.bias = strength, bias
        self.link = CONTROL if self.distance.is_control else link
        kernel, w = self.distance.kernel, prototypes.detach()
        with exactly(w.device):
            self.prototypes = mapped(self.distance, wide(w), None, self.of_map)
            self.finite = bool(self.prototypes.sum().isfinite())
            self.terms = self.squares = self.floor = None
            if self.distance.denominator is not None:
                self.terms = self.distance.denominator.terms(self.prototypes)
            if kernel == "l2":
                self.squares = self.prototypes.square().sum(-1)
            elif kernel != "dot":
                self.floor = floor(kernel, self.prototypes, **self.of_kernel)

    @torch.no_grad()
    def __call__(self, h: Tensor) -> Tensor:
        """(..., C) -> logits (..., real_vocab_size), float32 (float64 if the table is)."""
        with exactly(h.device):
            y = self.prototypes
            rows = h.reshape(-1, h.shape[-1]).to(y.dtype)
            x = mapped(self.distance, rows, None, self.of_map)
            u = None
            if self.distance.denominator is not None:
                u = self.distance.denominator.terms(x)[:, None]
            raw = self._raw(x, y)
            log_d = log_distance(self.distance, raw, u, self.terms, self.of_kernel)
            found = logits(log_d, self.strength, self.link, self.bias)
        return found.view(*h.shape[:-1], len(y))

    def _raw(self, x: Tensor, y: Tensor) -> Tensor:
        """Raw values of all pairs, floored: (N, C), (V, C) -> (N, V)."""
        kernel = self.distance.kernel
        if kernel == "l2":
            return l2_pairs(x, y, FLOAT32, self.squares)
        raw = raw_values(x, y, kernel, self.of_kernel, self.finite)
        if raw is None or self.floor is None:
            return pairs(x, y, kernel, self.of_kernel)
        return above(raw, floor(kernel, x, **self.of_kernel)[:, None] + self.floor)
