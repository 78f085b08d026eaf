"""The first and last step of every backend: the map of the distance, and its backward pass."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..pairwise import mapped
from . import Gradients, Problem, Result

# How many numbers are mapped at a time. On a CPU 4 MiB: enough to share between threads, and small
# enough for a cache. On a GPU 256 MiB, because each slice costs about ten kernel launches.
MAP = {"cpu": 2**20, "cuda": 2**26}


class Mapped:
    """Vectors (M, C) after the map of their distance, one block of rows at a time.

    A cheap map is computed each time a block is needed, so a mapped copy of the prototypes never
    exists. Other maps are computed once.
    """

    def __init__(self, problem: Problem, x: Tensor, seed: int | None, padding: int = 0):
        self.problem, self.seed, self.padding = problem, seed, padding
        self.x = x.detach().contiguous()
        self.parameters = [t.detach() for t in problem.parameters]
        numbers = MAP["cuda" if x.device.type == "cuda" else "cpu"]
        self.rows = -(-numbers // x.shape[1])  # Rows of a slice.
        self.shift: Tensor | None = None
        self.buffer: Tensor | None = None
        self.kept: Tensor | None = None
        chosen = problem.distance.map
        if chosen is None:
            self.kept = self.x
        elif not chosen.cheap:
            self.kept = self._map(self.x, 0, self.parameters)

    def __len__(self) -> int:
        return len(self.x)

    def _map(self, x: Tensor, first: int, parameters: list[Tensor]) -> Tensor:
        seed = None if self.seed is None else self.seed + first
        return mapped(self.problem.distance, x, seed, self.problem.map_settings(parameters))

    def _slices(self) -> list[slice]:
        """Slices of about MAP numbers.

        The last one may have up to three rows more, so that it fills a tile of four rows.
        """
        starts = [*range(0, max(1, len(self.x) - 3), self.rows), len(self.x)]
        return [slice(a, b) for a, b in zip(starts, starts[1:], strict=False)]

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """Yields blocks as (index of the first row, mapped rows). `shift` is subtracted, if set."""
        if self.kept is not None and self.shift is None:
            yield 0, self.kept
            return
        for s in self._slices():
            if self.kept is None:
                block = self._map(self.x[s], s.start, self.parameters)
            else:
                block = self.kept[s]
            yield s.start, block if self.shift is None else block - self.shift
            del block  # Its memory serves the next block.

    def whole(self) -> Tensor:
        """All mapped rows: (M, C)."""
        if self.kept is not None:
            return self.kept
        return torch.cat([block for _, block in self.blocks()])

    def new_gradient(self) -> Tensor:
        """An empty (M, C) for the gradient. Zeros for the padding follow it in memory."""
        self.buffer = self.x.new_empty(len(self.x) + self.padding, self.x.shape[1])
        self.buffer[len(self.x) :] = 0
        return self.buffer[: len(self.x)]

    def padded(self, gradient: Tensor) -> Tensor:
        """The gradient with zeros for the padding: (M + padding, C)."""
        if self.buffer is not None:
            return self.buffer
        return F.pad(gradient, (0, 0, 0, self.padding)) if self.padding else gradient

    def terms(self) -> Tensor | None:
        """The terms of the distance's denominator: (M,), or None."""
        denominator = self.problem.distance.denominator
        if denominator is None:
            return None
        parts = (part for _, block in self.blocks() for part in torch.split(block, self.rows))
        return torch.cat([denominator.terms(part) for part in parts])

    def pull(self, gradient: Tensor, of_terms: Tensor | None) -> list[Tensor]:
        """The backward pass of the map.

        gradient: with respect to the mapped vectors (M, C). In place, it becomes that of x.
        of_terms: with respect to their terms of the denominator (M,), or None.
        Returns: the gradients of the trained parameters.
        """
        distance, denominator = self.problem.distance, self.problem.distance.denominator
        found = [torch.zeros_like(t) for t in self.parameters]
        if distance.map is None and of_terms is None:
            return found
        for s in self._slices():
            with torch.enable_grad():
                leaves = [t.detach().requires_grad_() for t in (self.x[s], *self.parameters)]
                y = self._map(leaves[0], s.start, leaves[1:])
                outputs, upstream = [y], [gradient[s]]
                if denominator is not None and of_terms is not None:
                    outputs, upstream = [y, denominator.terms(y)], [gradient[s], of_terms[s]]
            gradient[s], *more = torch.autograd.grad(outputs, leaves, upstream)
            for total, part in zip(found, more, strict=True):
                total += part
        return found


class Sides:
    """States and prototypes of a problem after the map.

    u, v: their terms of the denominator, (N,) and (V,), or None.
    """

    def __init__(self, problem: Problem):
        table = problem.prototypes[: problem.spec.rows]
        seed = None if problem.seed is None else int(problem.seed)
        self.states = Mapped(problem, problem.states, seed)
        following = None if seed is None else seed + 1
        self.prototypes = Mapped(problem, table, following, problem.padding)
        self.u, self.v = self.states.terms(), self.prototypes.terms()

    def result(
        self,
        losses: Tensor,
        dx: Tensor,
        dy: Tensor | None,
        du: Tensor | None,
        dv: Tensor | None,
        dstrength: Tensor,
        dbias: Tensor | None,
    ) -> Result:
        """Makes the result of a backend.

        losses: (N,). The others are gradients with respect to mapped states, mapped prototypes, u,
        v, strength and bias. dy is None if the prototypes are frozen.
        """
        through_h = self.states.pull(dx, du)
        if dy is None:
            return Result(losses, Gradients(dx, None, dstrength, dbias, through_h))
        through_w = self.prototypes.pull(dy, dv)
        parameters = [a + b for a, b in zip(through_h, through_w, strict=True)]
        gradients = Gradients(dx, self.prototypes.padded(dy), dstrength, dbias, parameters)
        return Result(losses, gradients)
