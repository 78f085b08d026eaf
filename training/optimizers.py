"""The optimiser of a run: AdamW, or Muon for the trunk's matrices and AdamW for the rest.

To add an optimiser, write a function like `_muon`. Add it to `OPTIMIZERS`, and its name to
`TrainConfig.optimizer`. A checkpoint stores each tensor of its state under the parameter's name.
"""

from collections.abc import MutableMapping
from typing import Any

import torch

from model import Block, Model
from training.config import TrainConfig


def make_optimizer(model: Model, c: TrainConfig, device: str) -> torch.optim.Optimizer:
    """The optimiser that --optimizer names. device: cpu, cuda or mps.

    Each group has a `rate`, its learning rate as a multiple of the run's. AdamW is fused on cpu and
    cuda.
    """
    settings = dict(lr=c.learning_rate, betas=(c.beta1, c.beta2), fused=device in ("cuda", "cpu"))
    return OPTIMIZERS[c.optimizer](model, c, settings)


def _adamw(model: Model, c: TrainConfig, settings: dict[str, Any]) -> torch.optim.Optimizer:
    matrices, prototypes, embeddings, rest = parameter_groups(model, c)
    matrices["params"] += embeddings["params"]
    return torch.optim.AdamW([matrices, prototypes, rest], **settings)


def _muon(model: Model, c: TrainConfig, settings: dict[str, Any]) -> torch.optim.Optimizer:
    """Muon for the trunk's matrices, and AdamW for the rest.

    match_rms_adamw scales Muon's steps by 0.2 sqrt(larger side), to the size of AdamW's. So both
    use the same learning rate and weight decay.
    """
    matrices, *others = parameter_groups(model, c)
    muon = Muon([matrices], row_blocks(model), lr=c.learning_rate, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW([group for group in others if group["params"]], **settings)
    return Together(muon, adamw)


OPTIMIZERS = {"adamw": _adamw, "muon": _muon}


def parameter_groups(model: Model, c: TrainConfig) -> list[dict[str, Any]]:
    """The groups of parameters: matrices of the trunk, prototypes, embeddings, and the rest.

    Matrices and embeddings decay. The rest does not: biases, norms, the exponent, and the
    parameters of mahalanobis, because decay would shrink the distance itself. Prototypes have their
    own decay and rate. An embedding that is tied to them belongs to their group.
    """
    tables = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    matrices, embeddings, rest = [], [], []
    for name, p in model.named_parameters():
        if p is model.head.weight:
            continue
        if id(p) in tables:
            embeddings.append(p)
        elif p.dim() >= 2 and not name.startswith("head."):
            matrices.append(p)
        else:
            rest.append(p)
    decay = c.weight_decay if c.prototype_decay is None else c.prototype_decay
    rate = 1.0 if c.head_learning_rate is None else c.head_learning_rate / c.learning_rate
    return [
        {"params": matrices, "weight_decay": c.weight_decay, "rate": 1.0},
        {"params": [model.head.weight], "weight_decay": decay, "rate": rate},
        {"params": embeddings, "weight_decay": c.weight_decay, "rate": 1.0},
        {"params": rest, "weight_decay": 0.0, "rate": 1.0},
    ]


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Sets the learning rate of each group to `learning_rate` times its `rate`."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["rate"]


def row_blocks(model: Model) -> dict[torch.Tensor, list[int]]:
    """The weights that consist of several matrices, one below the other.

    Returns: weight -> the number of rows of each matrix.
    """
    blocks = {}
    for block in model.blocks:
        assert isinstance(block, Block)
        a = block.attention
        blocks[a.qkv.weight] = [heads * a.width for heads in (a.n_head, a.n_kv_head, a.n_kv_head)]
        if block.mlp.gated:
            blocks[block.mlp.up.weight] = [block.mlp.down.in_features] * 2
    return blocks


class Muon(torch.optim.Muon):
    """PyTorch's Muon (2502.16982) that treats each part of a fused weight as a matrix.

    rows: the number of rows of each part; see `row_blocks`. The state belongs to complete weights.
    """

    def __init__(
        self, groups: list[dict[str, Any]], rows: dict[torch.Tensor, list[int]], **how: Any
    ):
        super().__init__(groups, **how)
        self.rows = rows

    def _init_group(
        self,
        group: MutableMapping[str, Any],
        params_with_grad: list[torch.Tensor],
        grads: list[torch.Tensor],
        muon_momentum_bufs: list[torch.Tensor],
    ) -> bool:
        whole: tuple[list[torch.Tensor], ...] = [], [], []
        has_complex = super()._init_group(group, *whole)
        for p, gradient, momentum in zip(*whole, strict=True):
            rows = self.rows.get(p, [len(p)])
            params_with_grad += p.split(rows)
            grads += gradient.split(rows)
            muon_momentum_bufs += momentum.split(rows)
        return has_complex


class Together(torch.optim.Optimizer):
    """Several optimisers as one. They share one list of groups and one dict of states."""

    def __init__(self, *parts: torch.optim.Optimizer):
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        first = 0
        for part in self.parts:
            end = first + len(part.param_groups)
            part.param_groups, part.state = self.param_groups[first:end], self.state
            first = end

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # takes no closure
        for part in self.parts:
            part.step()
