"""The functions that torch.compile runs as they are, with a graph break.

Their callers import this file only while something is compiled: `torch.compiler.disable` imports
torch._dynamo, which takes as long as importing PyTorch.
"""

from collections.abc import Callable
from typing import TypeVar

from torch.compiler import disable

from .backends.autograd import _dense
from .compiled import _raw_values
from .kernels import _pairs
from .maps import _fast_unit

F = TypeVar("F", bound=Callable[..., object])


def _untraced(function: F) -> F:
    found: F = disable(function)  # type: ignore[no-untyped-call]  # untyped in torch
    return found


dense = _untraced(_dense)
raw_values = _untraced(_raw_values)
pairs = _untraced(_pairs)
fast_unit = _untraced(_fast_unit)
