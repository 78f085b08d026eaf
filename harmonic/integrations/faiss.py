"""Nearest-prototype decoding with faiss: an index finds each state's nearest prototypes, and only
those get logits.

    nearest = NearestHead(head, candidates=512)
    ids, logits = nearest.candidates(h)  # (N, C) -> (N, 512), (N, 512)
    logits = nearest(h)  # (N, C) -> (N, V), -inf for every other token

The index searches in the head's own distance, so that the nearest prototypes are the likeliest
tokens. The logits of the candidates are the head's own. Install faiss with: pip install faiss-cpu
"""

import math
from typing import Any

import torch
from torch import Tensor

from ..distances import DISTANCES, HEADS, Distance, resolve
from ..head import HarmonicHead
from ..kernels import paired
from ..links import CONTROL, logits
from ..pairwise import exactly, log_distance, mapped, wide
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
LINKS_OF_GRAPH = 32  # of each prototype in an HNSW graph, faiss' default
# Stands for a coordinate of exactly 0, for faiss' Canberra distance has no rule for 0 / 0.
TINY = 1e-30


def metric(distance: Distance, options: dict[str, Any]) -> str | None:
    """The name of faiss' metric for a head's row of the table; None where faiss has none.

    options: of the kernel.
    """
    if distance.denominator is not None:
        # faiss divides by sum |h + w|. That is sum |h| + sum |w| for vectors without negative
        # numbers, which `_searchable` makes. The signed sum of bray_curtis it cannot be.
        same = distance.denominator is DISTANCES["bray_curtis_abs"].denominator
        return "METRIC_BrayCurtis" if same else None
    if distance.kernel == "lp" and options.get("p", 1.0) == 1.0:
        return "METRIC_L1"
    if distance.kernel == "canberra" and options:
        return None  # A floor or weights, neither of which faiss has.
    return METRICS.get(distance.kernel)


def supported() -> list[str]:
    """The names of the heads that can be searched with their default options."""
    found = []
    for name in HEADS:
        distance, settings = resolve(name)
        if metric(distance, distance.kernel_options(settings)) is not None:
            found.append(name)
    return found


class NearestHead:
    """A head in evaluation mode, frozen as it is now, that gives logits to the nearest prototypes
    alone.

    It keeps a copy of the mapped table, and faiss another one. An index takes long to build, so it
    is not built again when the head's tensors change: calls are refused then, as far as
    `prepared.fingerprint` notices. `bounds` has the `mass_bound` of every state that it was called
    with.

    Args:
        head: the head. candidates: how many prototypes get a logit.
        index: "flat" compares all prototypes and finds the nearest ones exactly. "hnsw" searches a
            graph: it finds most of them, and the graph takes long to build.
    Raises: ImportError where faiss is missing; ValueError for a head without a metric in faiss.
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
        self.head, self.sources = head, head.tensors()
        self.made_of = fingerprint(self.sources)
        self.distance, self.metric = distance, name
        self.map_settings = {
            k: v.detach().float().cpu() if isinstance(v, Tensor) else v
            for k, v in distance.map_settings(settings).items()
        }
        self.link = CONTROL if distance.is_control else head.link
        self.strength = torch.as_tensor(head.strength).item()
        bias = None if head.bias is None else head.bias[: head.real_vocab_size]
        self.bias = None if bias is None else bias.detach().float().cpu()
        with exactly(torch.device("cpu")):
            self.table = self._mapped(head.prototypes())
        self.vocab_size = len(self.table)
        self.count = min(candidates, self.vocab_size)
        self.index = self._build(index)
        self.bounds: list[float] = []

    def _mapped(self, x: Tensor) -> Tensor:
        """On the CPU, in float32, behind the distance's map: (..., C) -> (..., C)."""
        return mapped(self.distance, wide(x.detach()).float().cpu(), None, self.map_settings)

    def _searchable(self, x: Tensor, last: Tensor | None) -> Any:
        """Mapped vectors (N, C) as faiss' metric takes them, a NumPy array.

        last: (N,), one more coordinate for a head with a bias: the bias of a prototype, 1 of a
        state.
        """
        if self.metric == "METRIC_BrayCurtis":
            # |h - w| stays the sum of both parts' differences, and no part has a sign.
            x = torch.cat((x.relu(), (-x).relu()), -1)
        elif self.metric == "METRIC_Canberra":
            x = torch.where(x == 0, TINY, x)
        elif last is not None:
            x = torch.cat((x, last[:, None]), -1)
        return x.contiguous().numpy()

    def _build(self, kind: str) -> Any:
        try:
            import faiss
        except ImportError:
            raise ImportError(
                "nearest-prototype decoding needs the package faiss: pip install faiss-cpu"
            ) from None
        table = self._searchable(self.table, self.bias)
        which = getattr(faiss, self.metric)
        if kind == "flat":
            index: Any = faiss.IndexFlat(table.shape[1], which)
            index.metric_arg = self.options.get("p", 0.0)
        else:
            index = faiss.IndexHNSWFlat(table.shape[1], LINKS_OF_GRAPH, which)
            index.hnsw.efSearch = 2 * self.count  # More than it returns, or it finds too few.
            faiss.downcast_index(index.storage).metric_arg = self.options.get("p", 0.0)
        index.add(table)
        return index

    @torch.no_grad()
    def candidates(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest prototypes and their exact logits: (N, C) -> ids (N, k), logits (N, k).

        Nearest first. Where the graph found fewer than k, the last ids are -1 and their logits
        -inf. Needs memory for N k C numbers. RuntimeError where the head has changed.
        """
        if fingerprint(self.head.tensors()) != self.made_of:
            raise RuntimeError(
                "the head's weights have changed since its index was built: make a new NearestHead"
            )
        with exactly(torch.device("cpu")):
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
            found = logits(log_d, self.strength, self.link, bias)
        found = found.masked_fill(ids < 0, -math.inf)
        return ids.to(h.device), found.to(h.device)

    def __call__(self, h: Tensor) -> Tensor:
        """Logits of all tokens, -inf for those that are no candidates: (N, C) -> (N, V)."""
        ids, found = self.candidates(h)
        self.bounds += self.mass_bound(found).tolist()
        every = found.new_full((len(found), self.vocab_size), -math.inf)
        # The largest one counts: an id of -1 must not overwrite token 0.
        return every.scatter_reduce(-1, ids.clamp_min(0), found, "amax")

    def mass_bound(self, found: Tensor) -> Tensor:
        """At most this probability is left out: logits of candidates (N, k) -> (N,), float64.

        No other token is nearer than the farthest candidate, so the V - k others have at most V - k
        times its weight. With "hnsw" this is an estimate: the graph may have missed near ones.
        """
        found = found.double()
        real = found > -math.inf
        farthest = found.masked_fill(~real, math.inf).amin(-1)
        others = (self.vocab_size - real.sum(-1)).double()
        return (others.log() + farthest - found.logsumexp(-1)).sigmoid()
