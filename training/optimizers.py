"""The optimiser of a run, and which parameters decay."""

import torch

from model import Model


def parameter_groups(
    model: Model, weight_decay: float, prototype_decay: float | None = None
) -> list[dict]:
    """AdamW's groups: matrices, prototypes and the rest.

    Matrices decay. Biases, norms, the exponent and Mahalanobis' parameters do not, for decay would
    shrink the distance itself. Prototypes decay by `prototype_decay`; None = like matrices.
    """
    matrices, rest = [], []
    for name, p in model.named_parameters():
        if p is model.head.weight:
            continue
        is_matrix = p.dim() >= 2 and not name.startswith("head.")
        (matrices if is_matrix else rest).append(p)
    of_prototypes = weight_decay if prototype_decay is None else prototype_decay
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": [model.head.weight], "weight_decay": of_prototypes},
        {"params": rest, "weight_decay": 0.0},
    ]


def adamw(
    model: Model,
    learning_rate: float,
    betas: tuple[float, float],
    weight_decay: float,
    prototype_decay: float | None,
    device: str,
) -> torch.optim.AdamW:
    """AdamW over the model's parameter groups, fused where the device has it."""
    return torch.optim.AdamW(
        parameter_groups(model, weight_decay, prototype_decay),
        lr=learning_rate,
        betas=betas,
        fused=device in ("cuda", "cpu"),
    )
