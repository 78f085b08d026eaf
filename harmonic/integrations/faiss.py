"""Nearest-prototype decoding with faiss. An index finds the prototypes nearest to a state, and only
these get logits.

    nearest = NearestHead(head, candidates=512)
    ids, logits = nearest.candidates(h)  # (N, C) -> (N, 512), (N, 512)
    logits = nearest(h)  # (N, C) -> (N, V), -inf for every other token

The index searches with the distance of the head, so the nearest prototypes are the most likely
tokens. The candidates get exact logits. Install faiss with: pip install faiss-cpu
"""

import math
from typing import Any

import torch
from torch import Tensor

from ..distances import DISTANCES, HEADS, Distance, resolve
from ..head import HarmonicHead
from ..kernels import paired
from ..links import CONTROL, logits
from ..pairwise import at_least_float32, full_float32, log_distance, mapped
from ..prepared import fingerprint

INDEXES = ("flat", "hnsw")
# Kernel -> the faiss metric that orders mapped vectors as the kernel does.
METRICS = {
    "l2": "METRIC_L2",
    "l2_plus": "METRIC_L2",
    "lp": "METRIC_Lp",
    "linf": "METRIC_Linf",
    "canberra": "METRIC_Canberra",
    "dot": "METRIC_INNER_PRODUCT",
    "along": "METRIC_INNER_PRODUCT",
}
LINKS_OF_GRAPH = 32  # Links of each prototype in an HNSW graph; the default of faiss.
# Replaces a coordinate of exactly 0, because the Canberra distance of faiss does not define 0 / 0.
TINY = 1e-30


def metric(distance: Distance, options: dict[str, Any]) -> str | None:
    """The name of the faiss metric for a distance; None if faiss has none.

    options: of the kernel.
    """
    if distance.denominator is not None:
        # faiss divides by sum |h + w|. For vectors without negative numbers, which `_searchable`
        # makes, that is sum |h| + sum |w|. It is never the signed sum of bray_curtis.
        same = distance.denominator is DISTANCES["bray_curtis_abs"].denominator
        return "METRIC_BrayCurtis" if same else None
    if distance.kernel == "lp" and options.get("p", 1.0) == 1.0:
        return "METRIC_L1"
    if distance.kernel == "canberra" and options:
        return None  # faiss has no floor and no weights.
    return METRICS.get(distance.kernel)


def supported() -> list[str]:
    """The names of the heads that faiss can search, with their default options."""
    found = []
    for name in HEADS:
        distance, settings = resolve(name)
        if metric(distance, distance.kernel_options(settings)) is not None:
            found.append(name)
    return found


def _faiss() -> Any:
    """The package faiss. ImportError says how to install it."""
    try:
        import faiss
    except ImportError:
        raise ImportError(
            "nearest-prototype decoding needs the package faiss: pip install faiss-cpu"
        ) from None
    return faiss


class NearestHead:
    """A frozen copy of a head that gives logits only to the nearest prototypes.

    It holds one copy of the mapped table, and faiss holds another. `bounds` lists the `mass_bound`
    of every state that it was called with. An index takes long to build, so it is not built again
    after the head's weights have changed: a call raises an error then, as far as
    `prepared.fingerprint` notices.

    Args:
        head: the head, as in evaluation.
        candidates: how many prototypes get a logit.
        index: "flat" compares all prototypes and finds the nearest ones exactly. "hnsw" searches a
            graph. It finds most of them, and the graph takes long to build.
    Raises: ImportError if faiss is not installed. ValueError for a head without a metric in faiss,
        an unknown index or candidates < 1.
    """

    @torch.no_grad()
    def __init__(self, head: HarmonicHead, candidates: int = 512, index: str = "flat"):
        distance, settings = resolve(head.name, **head.geometry())
        self.options = distance.kernel_options(settings)
        name = metric(distance, self.options)
        if name is None:
            raise ValueError(
                f"faiss has no metric for {head.name}: it has one for {', '.join(supported())}"
            )
        if index not in INDEXES:
            raise ValueError(f"unknown index {index!r}; choose from {', '.join(INDEXES)}")
        if candidates < 1:
            raise ValueError(f"candidates={candidates} must be at least 1")
        self.faiss = _faiss()
        self.head, self.sources = head, head.tensors()
        self.made_of = fingerprint(self.sources)
        self.distance, self.metric = distance, name
        self.map_settings = {
            k: v.detach().float().cpu() if isinstance(v, Tensor) else v
            for k, v in distance.map_settings(settings).items()
        }
        self.link = CONTROL if distance.is_control else head.link
        bias = None if head.bias is None else head.bias[: head.real_vocab_size]
        self.bias = None if bias is None else bias.detach().float().cpu()
        with full_float32(torch.device("cpu")):
            self.table = self._mapped(head.prototypes())
        self.vocab_size = len(self.table)
        self.count = min(candidates, self.vocab_size)
        self.index = self._build(index)
        self.bounds: list[float] = []

    def _mapped(self, x: Tensor) -> Tensor:
        """Applies the map of the distance, on the CPU in float32: (..., C) -> (..., C)."""
        return mapped(
            self.distance, at_least_float32(x.detach()).float().cpu(), None, self.map_settings
        )

    def _searchable(self, x: Tensor, last: Tensor | None) -> Any:
        """Mapped vectors (N, C) in the form that the faiss metric needs, as a NumPy array.

        last: (N,), one more coordinate for a head with a bias. For prototypes it is the bias, and
        for states it is 1. None for other heads.
        """
        if self.metric == "METRIC_BrayCurtis":
            # The positive and the negative part of each coordinate. The sum of their differences is
            # still |h - w|, and neither is negative.
            x = torch.cat((x.relu(), (-x).relu()), -1)
        elif self.metric == "METRIC_Canberra":
            x = torch.where(x == 0, TINY, x)
        elif last is not None:
            x = torch.cat((x, last[:, None]), -1)
        return x.contiguous().numpy()

    def _build(self, kind: str) -> Any:
        faiss = self.faiss
        table = self._searchable(self.table, self.bias)
        which = getattr(faiss, self.metric)
        if kind == "flat":
            index: Any = faiss.IndexFlat(table.shape[1], which)
            index.metric_arg = self.options.get("p", 0.0)
        else:
            index = faiss.IndexHNSWFlat(table.shape[1], LINKS_OF_GRAPH, which)
            index.hnsw.efSearch = 2 * self.count  # With fewer it would find too few.
            faiss.downcast_index(index.storage).metric_arg = self.options.get("p", 0.0)
        index.add(table)
        return index

    @torch.no_grad()
    def candidates(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest prototypes and their exact logits: (N, C) -> ids (N, k), logits (N, k).

        The nearest is first. If the graph found fewer than k, the last ids are -1 and their logits
        -inf. Needs memory for N * k * C numbers.

        Raises: RuntimeError if the head's weights have changed.
        """
        if fingerprint(self.head.tensors()) != self.made_of:
            raise RuntimeError(
                "the head's weights have changed since its index was built: make a new NearestHead"
            )
        with full_float32(torch.device("cpu")):
            x = self._mapped(h)
            one = None if self.bias is None else torch.ones(len(x))
            ids = torch.from_numpy(self.index.search(self._searchable(x, one), self.count)[1])
            rows = ids.clamp_min(0)
            y = self.table[rows]
            raw = paired(x[:, None], y, self.distance.kernel, self.options)
            u = v = None
            if self.distance.denominator is not None:
                u, v = (self.distance.denominator.terms(z) for z in (x[:, None], y))
            log_d = log_distance(self.distance, raw, u, v, self.options)
            bias = None if self.bias is None else self.bias[rows]
            strength = torch.as_tensor(self.head.strength).item()
            found = logits(log_d, strength, self.link, bias)
        found = found.masked_fill(ids < 0, -math.inf)
        return ids.to(h.device), found.to(h.device)

    def __call__(self, h: Tensor) -> Tensor:
        """Logits of all tokens, -inf for all but the candidates: (N, C) -> (N, V)."""
        ids, found = self.candidates(h)
        self.bounds += self.mass_bound(found).tolist()
        every = found.new_full((len(found), self.vocab_size), -math.inf)
        # "amax", because an id of -1 must not overwrite token 0.
        return every.scatter_reduce(-1, ids.clamp_min(0), found, "amax")

    def mass_bound(self, found: Tensor) -> Tensor:
        """An upper bound of the probability of all tokens that are not candidates.

        found: logits of candidates (N, k) -> (N,), float64. No other token is nearer than the
        farthest candidate. So the V - k others together have at most V - k times its weight. With
        "hnsw" the bound is an estimate, because the graph may have missed near prototypes.
        """
        found = (found.cpu() if found.device.type == "mps" else found).double()
        real = found > -math.inf
        farthest = found.masked_fill(~real, math.inf).amin(-1)
        others = (self.vocab_size - real.sum(-1)).double()
        return (others.log() + farthest - found.logsumexp(-1)).sigmoid()
