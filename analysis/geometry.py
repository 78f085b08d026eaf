"""The shape of an embedding: how many directions it uses and how evenly, beside a null model."""

import torch


def spectrum(x: torch.Tensor) -> dict:
    """Principal components of the rows of x (M, C), centred: shares of variance of the top 2 and top 5, components for 90 %, effective rank
    exp(entropy of the normalised singular values) (Roy and Vetterli 2007), participation ratio (sum v)^2 / sum v^2 of the variances v."""
    x = x.detach().double()
    x = x - x.mean(0)
    variance = torch.linalg.eigvalsh(x.T @ x).flip(0).clamp_min(0)
    share = variance / variance.sum()
    singular = variance.sqrt() / variance.sqrt().sum()
    return {
        "top2": share[:2].sum().item(),
        "top5": share[:5].sum().item(),
        "components_90": int((share.cumsum(0) < 0.9).sum()) + 1,
        "effective_rank": torch.special.entr(singular).sum().exp().item(),
        "participation_ratio": (1 / share.square().sum()).item(),
    }
