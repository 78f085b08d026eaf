"""Ordinary output layers that rank tokens as a head does, if that ranking is linear in the state.

The nearest prototype y of a mapped state x is the one with the largest `x . y - |y|^2 / 2`. For a
linear map, x = M h, that is `h . (M' y) - |y|^2 / 2`: a row and a constant for each token. Cosine's
map divides by the norm of h, which is the same for all tokens. There the rows are the directions of
the prototypes, and there are no constants.

GPT-2's output layer has no bias for the constants c, but its final LayerNorm can hold them. The
LayerNorm gives `g x + b`, and the coordinates of x sum to zero. With C coordinates, and 1 for the
vector of ones, the scores are

    W (g x + b) + c = W' (x + 1),   W' = W diag(g) + a 1^T,   a = (W b + c - W g) / C.

So the export has a LayerNorm whose gain and bias are ones, and the rows W'. In an RMSNorm the
coordinates do not sum to zero, so it cannot hold c.
"""

from dataclasses import fields, replace
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from base.errors import UserError, check
from harmonic import HEADS, Distance, HarmonicHead
from harmonic.distances import resolve
from harmonic.maps import DIAGONAL, FULL, TRIANGULAR, UNIT
from harmonic.match import nearest_strength
from harmonic.pairwise import mapped
from interop.pretrained import HEAD_KEY
from model import Model, ModelConfig
from text.token_files import Data
from training.data import split_problems, validation_windows
from training.objective import batches_of

STATES = 1024  # The scale is fitted on so many states. Needs memory for (STATES, V) probabilities.


def ranks_linearly(row: Distance) -> bool:
    """Whether a head ranks tokens by linear functions of the hidden state."""
    linear_map = row.map in (None, UNIT, FULL, DIAGONAL, TRIANGULAR)
    return (row.has_squares or row.has_products) and linear_map


def needs_constants(row: Distance) -> bool:
    """Whether those linear functions have constants, `-|y|^2 / 2`."""
    return row.has_squares and row.map is not UNIT


def is_dot_product(row: Distance) -> bool:
    """Whether the head is an ordinary output layer already."""
    return row is HEADS["cross_entropy"]


def check_model(model: Model) -> None:
    """Raises UserError for a head or an architecture without a linear export."""
    c, row = model.config, model.head.distance
    if not c.architecture.causal:
        raise UserError(
            f"linear=true is for models that generate text, and arch={c.arch} is a masked language"
            " model. Export it without linear=true"
        )
    linear = [name for name, other in HEADS.items() if ranks_linearly(other)]
    if not ranks_linearly(row):
        raise UserError(
            f"head={c.head} has no linear ranking: its nearest prototype is not the largest of"
            " linear functions of the hidden state. Export it without linear=true. Heads with one:"
            f" {', '.join(linear)}"
        )
    if needs_constants(row) and not isinstance(model.final_norm, nn.LayerNorm):
        without = [name for name in linear if not needs_constants(HEADS[name])]
        raise UserError(
            f"head={c.head} with arch={c.arch} has no linear export: its ranking needs a constant"
            " for each token, -|w|^2 / 2, and RMSNorm has no room for it. Export it without"
            f" linear=true. Heads without constants: {', '.join(without)}"
        )


def linear_scores(head: HarmonicHead) -> tuple[Tensor, Tensor]:
    """Rows W (V, C) and constants c (V,), float64. `W h + c` ranks tokens as the head does."""
    row, settings = resolve(head.name, **head.geometry())
    settings = row.map_settings(settings)
    y = mapped(row, head.prototypes().double(), None, settings)
    if not needs_constants(row):
        return y, y.new_zeros(len(y))
    identity = torch.eye(y.shape[1], dtype=y.dtype, device=y.device)
    matrix = mapped(row, identity, None, settings)
    return y @ matrix.T, -y.square().sum(-1) / 2


def fold(rows: Tensor, constants: Tensor, norm: nn.LayerNorm) -> Tensor:
    """The rows W' (V, C) that give the same scores after a LayerNorm whose gain and bias are ones.

    rows: W (V, C). constants: c (V,). norm: the model's final LayerNorm.
    """
    gain = norm.weight.to(rows.dtype)
    bias = torch.zeros_like(gain) if norm.bias is None else norm.bias.to(rows.dtype)
    a = (rows @ bias + constants - rows @ gain) / len(gain)
    return rows * gain + a[:, None]


def plain_config(c: ModelConfig) -> ModelConfig:
    """The configuration with an ordinary output layer that is not tied to the embedding."""
    head: dict[str, Any] = {
        f.name: f.default for f in fields(ModelConfig) if HEAD_KEY.match(f.name)
    }
    return replace(c, **head, tie_weights=False)


@torch.no_grad()
def linearize(model: Model, data: Data) -> tuple[Model, float]:
    """A model with an ordinary output layer that ranks all tokens as the model's head does.

    Any positive factor on the output layer gives the same ranking. The factor is fitted so that the
    probabilities are nearest to the head's on STATES tokens of validation text.

    Returns: the new model, and the mean KL(head || new model) on that text, in nats per token.
    Raises: UserError for a head or an architecture that has no such output layer.
    """
    c = model.config
    check_model(model)
    check(split_problems(data, c.block_size))
    rows, constants = linear_scores(model.head)
    config = plain_config(c)
    if needs_constants(model.head.distance):
        # The final LayerNorm needs a bias. All other biases come with it, as zeros.
        config.bias = True
    made = Model(config).to(rows.device).eval()
    trunk = {k: v for k, v in model.state_dict().items() if not k.startswith("head.")}
    made.load_state_dict(trunk, strict=False)
    if needs_constants(model.head.distance):
        before, after = model.final_norm, made.final_norm
        assert isinstance(before, nn.LayerNorm) and isinstance(after, nn.LayerNorm)
        rows = fold(rows, constants, before)
        nn.init.ones_(after.weight)
        nn.init.ones_(after.bias)
    made.head.weight[: len(rows)] = rows

    of_head, of_rows = [], []
    windows = validation_windows(
        data.splits["val"].tokens, c.block_size, -(-STATES // c.block_size)
    )
    for x, _ in batches_of(data, c).validation(windows, size=16):
        of_head.append(model(x)[0].flatten(0, 1))
        of_rows.append(made(x)[0].flatten(0, 1))
    own, linear = torch.cat(of_head)[:STATES].log_softmax(-1), torch.cat(of_rows)[:STATES]
    linear -= linear.amax(-1, keepdim=True)
    scale = nearest_strength(linear, own.exp())
    made.head.weight[: len(rows)] = scale * rows
    kl = F.kl_div((scale * linear).log_softmax(-1), own, log_target=True, reduction="batchmean")
    # Rounding may make a KL of 0 slightly negative.
    return made, max(0.0, kl.item())
