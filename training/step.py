"""The results of an iteration, and the norms of its gradients."""

import math
from dataclasses import dataclass

import torch

from model import Model
from training.config import TrainConfig
from training.distributed import Processes, local
from training.objective import Batches


@dataclass
class Progress:
    """How far a run is.

    iteration: iterations done. best_loss: the lowest validation loss. evaluated: the iteration of
    the last evaluation, or -1. skipped, skipped_in_a_row: iterations without a step, because they
    were not finite.
    """

    iteration: int = 0
    best_loss: float = math.inf
    evaluated: int = -1
    skipped: int = 0
    skipped_in_a_row: int = 0

    def ended(self, iterations: int) -> bool:
        """Whether a run of so many iterations has been trained and evaluated."""
        evaluated = self.iteration == iterations and self.evaluated == iterations
        return evaluated or self.iteration > iterations


@dataclass
class Step:
    """The results of an iteration. Tensors stay on the device until the log reads them.

    Of this process alone:
        loss: the sum over targets. distance: the sum of d(h, w_target). nearest: the smallest one.
    Of all processes, zero until `Gradients.measure` has computed them:
        norm, norm_head, norm_trunk: of the gradient. squares (P,): squared norms of the gradient of
        each parameter. radius: the mean norm of prototypes.
    skipped: how many iterations of the run had no step so far.
    """

    loss: torch.Tensor
    distance: torch.Tensor
    nearest: torch.Tensor
    norm: torch.Tensor
    norm_head: torch.Tensor
    norm_trunk: torch.Tensor
    radius: torch.Tensor
    squares: torch.Tensor
    lr: float = 0.0
    skipped: int = 0

    @staticmethod
    def begin(device: str) -> "Step":
        """The results before the first micro-batch: sums of 0."""
        zero = torch.zeros((), device=device)
        return Step(
            zero, zero, torch.full((), math.inf, device=device), zero, zero, zero, zero, zero
        )

    def add(self, loss: torch.Tensor, distances: torch.Tensor | None) -> None:
        """Adds a micro-batch: its summed loss, and d(h, w_target) of its targets or None."""
        self.loss = self.loss + loss.detach()
        if distances is not None and len(distances):
            self.distance = self.distance + distances.sum()
            self.nearest = torch.minimum(self.nearest, distances.min())

    def numbers(self) -> torch.Tensor:
        """The seven numbers in the order of NAMES: (7,), float32."""
        return torch.stack([getattr(self, name).float() for name in NAMES])


NAMES = ("loss", "distance", "nearest", "norm", "norm_head", "norm_trunk", "radius")


@dataclass
class Work:
    """The size of an iteration: tokens and targets over all processes, and operations per token."""

    tokens: int
    targets: int
    flops_per_token: float

    @staticmethod
    def of(c: TrainConfig, model: Model, batches: Batches) -> "Work":
        length = batches.block_size
        predicted = batches.objective.predicted(length)
        flops = model.flops_per_token(predicted / length)
        return Work(c.windows * length, c.windows * predicted, flops)


def norms(tensors: list[torch.Tensor]) -> torch.Tensor:
    """The Euclidean norm of each tensor: (n,), float32.

    On a CPU, PyTorch's norm of 50,304 x 768 numbers is 0.3 % too small. Row by row it is exact, up
    to rounding.
    """
    if tensors[0].device.type == "cpu":
        return torch.stack([t.norm(dim=-1).norm() for t in tensors])
    return torch.stack(torch._foreach_norm(tensors))


class Gradients:
    """The gradients of a model, which may be sharded, and their norms over all processes."""

    def __init__(self, model: Model, processes: Processes, sharded: bool):
        self.model, self.processes, self.sharded = model, processes, sharded
        self.names, self.parameters = zip(*model.named_parameters(), strict=True)
        of_head = [name.startswith("head.") for name in self.names]
        self.of_head = torch.tensor(of_head, device=processes.device)

    @torch.no_grad()
    def measure(self, step: Step) -> None:
        """Computes the norms of a step."""
        p, head = self.processes, self.model.head
        table = local(head.weight)
        # The number of rows that processes of lower rank hold.
        before = p.rank * -(-len(head.weight) // p.world) if self.sharded else 0
        here = min(max(head.real_vocab_size - before, 0), len(table))
        radius = table[:here].norm(dim=-1).sum()
        squares = torch.cat((norms(self._local()).square(), radius[None]))
        if self.sharded:
            p.reduce(squares)
        step.squares, step.radius = squares[:-1], squares[-1] / head.real_vocab_size
        step.norm = step.squares.sum().sqrt()
        step.norm_head = torch.where(self.of_head, step.squares, 0.0).sum().sqrt()
        step.norm_trunk = torch.where(self.of_head, 0.0, step.squares).sum().sqrt()

    @torch.no_grad()
    def clip(self, norm: torch.Tensor, most: float) -> None:
        """Scales all gradients so that their norm is at most `most`."""
        torch._foreach_mul_(self._local(), (most / (norm + 1e-6)).clamp(max=1.0))

    def not_finite(self, squares: torch.Tensor) -> list[str]:
        """The names of parameters whose gradient is not finite."""
        values = squares.tolist()
        return [name for name, x in zip(self.names, values, strict=True) if not math.isfinite(x)]

    def _local(self) -> list[torch.Tensor]:
        return [local(q.grad) for q in self.parameters]
