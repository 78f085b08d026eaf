"""A head for many calls between which it does not change, such as the steps of sampling."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .compiled import raw_values
from .distances import resolve
from .kernels import above, floor, l2_pairs, pairs
from .links import CONTROL, logits
from .pairwise import at_least_float32, check_vectors, full_float32, log_distance, mapped
from .precision import FLOAT32

if TYPE_CHECKING:
    from .head import HarmonicHead

# How many of a tensor's numbers are compared to see that it has changed.
COMPARED = 16


def fingerprint(tensors: list[Tensor]) -> tuple[Any, ...]:
    """What differs after the tensors have changed: of each its address, PyTorch's count of changes
    in place, and COMPARED of its numbers, evenly spread.

    The count tells of `load_state_dict`, of most optimisers and of a single row. The numbers tell
    of what writes the whole tensor without counting: fused optimisers, `.data`, `.numpy()` and
    tensors that were made in inference mode. A change of a few rows that is not counted stays
    unnoticed.
    """
    counted = [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors]
    # One copy from the device for all of them. As bytes, for NaN does not equal itself.
    numbers = torch.cat([_some(t.detach()).view(torch.uint8) for t in tensors])
    return *counted, bytes(numbers.tolist())


def _some(tensor: Tensor) -> Tensor:
    """At most COMPARED numbers of a tensor, evenly spread: their places are computed, so that a
    table that is not contiguous is not copied."""
    count = min(COMPARED, tensor.numel())
    places = torch.arange(count, device=tensor.device) * tensor.numel() // max(1, count)
    return tensor[torch.unravel_index(places, tensor.shape)] if tensor.dim() else tensor[None]


class PreparedHead:
    """`prepared(h)` gives the logits that `head(h)` gives in evaluation, without a gradient.

    What depends on the prototypes alone is computed once: their map (such as cosine's unit
    vectors), their squared norms and the floors under their distances. It is computed again when
    the head's tensors have changed, as far as `fingerprint` notices: after a change of a few
    rows through `.data`, prepare the head again. Memory: a second table where the distance has a
    map.
    """

    def __init__(self, head: "HarmonicHead"):
        self.head = head
        self._prepare()

    @torch.no_grad()
    def _prepare(self) -> None:
        """Computes what depends on the prototypes alone."""
        head = self.head
        # They are kept, so that no other tensor gets their address.
        self.sources = head.tensors()
        self.made_of = self._source()
        self.distance, settings = resolve(head.name, **head.geometry())
        self.of_map = self.distance.map_settings(settings)
        self.of_kernel = self.distance.kernel_options(settings)
        self.link = CONTROL if self.distance.is_control else head.link
        self.bias = None if head.bias is None else head.bias[: head.real_vocab_size]
        kernel, w = self.distance.kernel, head.prototypes().detach()
        with full_float32(w.device):
            self.prototypes = mapped(self.distance, at_least_float32(w), None, self.of_map)
            self.finite = bool(self.prototypes.sum().isfinite())
            self.terms = self.squares = self.floor = None
            if self.distance.denominator is not None:
                self.terms = self.distance.denominator.terms(self.prototypes)
            if kernel in ("l2", "l2_plus"):
                self.squares = self.prototypes.square().sum(-1)
            elif kernel != "dot":
                self.floor = floor(kernel, self.prototypes, **self.of_kernel)

    def _source(self) -> tuple[object, ...]:
        """What the prepared tensors depend on."""
        head = self.head
        settings = (head.name, head.link, tuple(head.options.items()), head.real_vocab_size)
        return fingerprint(head.tensors()), settings

    @torch.no_grad()
    def __call__(self, h: Tensor) -> Tensor:
        """(..., C) -> logits (..., real_vocab_size), float32 (float64 if the table is).

        Raises: ValueError for integers, another width or another device.
        """
        if self._source() != self.made_of:
            self._prepare()
        y = self.prototypes
        check_vectors(h, y)
        with full_float32(h.device):
            rows = at_least_float32(h.reshape(-1, h.shape[-1])).to(y.dtype)
            x = mapped(self.distance, rows, None, self.of_map)
            u = None
            if self.distance.denominator is not None:
                u = self.distance.denominator.terms(x)[:, None]
            raw = self._raw(x, y)
            log_d = log_distance(self.distance, raw, u, self.terms, self.of_kernel)
            found = logits(log_d, self.head.strength, self.link, self.bias)
        return found.view(*h.shape[:-1], len(y))

    def _raw(self, x: Tensor, y: Tensor) -> Tensor:
        """Raw values of all pairs, floored: (N, C), (V, C) -> (N, V)."""
        kernel = self.distance.kernel
        if self.squares is not None:
            squared = l2_pairs(x, y, FLOAT32, self.squares)
            return squared if kernel == "l2" else 1 + squared
        raw = raw_values(x, y, kernel, self.of_kernel, self.finite)
        if raw is None or self.floor is None:
            return pairs(x, y, kernel, self.of_kernel)
        return above(raw, floor(kernel, x, **self.of_kernel)[:, None] + self.floor)
