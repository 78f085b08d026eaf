"""Gradients that can be differentiated again, for `create_graph=True`.

The backward passes of kernels and losses compute without autograd's notice. Where the caller wants
the gradient of a gradient, they differentiate a plain formula instead, slowly.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def wants_graph() -> bool:
    """Whether the caller of a backward pass said `create_graph=True`."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def plain_gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor | None], upstream: Tensor
) -> list[Tensor | None]:
    """The differentiable gradient of function(*inputs) for each input, None for one without."""
    from .pairwise import full_float32

    # An input may have been computed from another one, such as states from tied prototypes. Views
    # stand for inputs that are independent: the caller adds up the rest.
    inputs = [x.view_as(x) if x is not None and x.requires_grad else x for x in inputs]
    trained = [x for x in inputs if x is not None and x.requires_grad]
    with full_float32(upstream.device):
        found = torch.autograd.grad(
            function(*inputs), trained, upstream, create_graph=True, allow_unused=True
        )
    by_input = {id(x): gradient for x, gradient in zip(trained, found, strict=True)}
    return [by_input.get(id(x)) for x in inputs]
