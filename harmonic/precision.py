"""How a head multiplies matrices: for inner products of states and prototypes, and for gradients.

    float32    operands as they are
    split      each operand is the sum of two half-precision parts, high and low:
               a.b = high.high + high.low + low.high
    autocast   operands rounded to autocast's type

Sums are float32 in all three, but on a CPU autocast rounds each result too. A split product is
three products on tensor cores. Where sums are rounded to nearest it is about as exact as a float32
product (results/precision.csv). Tensor cores truncate in their sums. The effect of that has not
been measured.

Inner products use float16 parts, which keep 22 bits of a number. Each row is scaled by a power of
two, so nothing overflows or underflows. Gradients use bfloat16 parts, which keep 16 bits of numbers
of any size, because slopes range over many orders of magnitude.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .double_backward import wants_graph

# Whether torch.mm can return float32 for half-precision operands: PyTorch 2.8 or newer, and CUDA.
HAS_OUT_DTYPE = "out_dtype" in (torch.mm.__doc__ or "") and not torch.version.hip
PRECISIONS = ("auto", "float32", "split", "autocast")


class Operand(NamedTuple):
    """One side of the products of a chunk, ready to multiply.

    inner: rows for inner products: (M, C), or the concatenated parts (M, 3C).
    unit: (M,), the numbers that the rows of `inner` were divided by, or None.
    parts: (P, M, C), for the products with slopes, or None.
    """

    inner: Tensor
    unit: Tensor | None
    parts: Tensor | None


@dataclass(frozen=True)
class Products:
    """A way to multiply matrices.

    name: float32, split or autocast. parts: how many numbers an operand is split into.
    inner: the type of both operands of inner products x.y.
    slopes: the type of both operands of products of slopes with x or y, in the backward pass.
    """

    name: str
    inner: torch.dtype
    slopes: torch.dtype
    parts: int = 1

    def operand(self, x: Tensor, left: bool, needs_grad: bool) -> Operand:
        """Prepares rows x (M, C), float32, as the left or the right side of products."""
        parts = self.split(x, self.slopes) if needs_grad else None
        if self.parts == 1:
            if parts is not None and self.inner == self.slopes:
                return Operand(parts[0], None, parts)
            return Operand(self.split(x, self.inner)[0], None, parts)
        exponent = torch.frexp(x.abs().amax(1)).exponent.clamp(-100, 120)
        exponent = exponent - 15  # The largest float16 is below 2^16.
        unit = ((exponent + 127) << 23).view(torch.float32)  # 2^exponent, exactly.
        high, low = self.split(x / unit[:, None], self.inner)
        return Operand(torch.cat((high, high, low) if left else (high, low, high), 1), unit, parts)

    def split(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """x as a sum of P numbers of this type: (...) -> (P, ...)."""
        if self.parts == 1:
            return x.to(dtype)[None]
        high = x.to(dtype)
        return torch.stack((high, (x - high.to(x.dtype)).to(dtype)))

    def inner_products(self, x: Operand, y: Operand) -> Tensor:
        """(R, .), (V, .) -> (R, V), in units of `x.unit[:, None] * y.unit`."""
        return self.multiply(x.inner, y.inner.T)

    def pull_left(self, slopes: Tensor, y: Tensor) -> Tensor:
        """slopes @ y without the product of the two low parts: (P, R, V), (P, V, C) -> (R, C)."""
        total = self._pull_left(slopes, y[0])
        for i in range(1, len(y)):
            total = total + self._pull_left(slopes[: len(slopes) - i], y[i])
        return total

    def _pull_left(self, slopes: Tensor, part: Tensor) -> Tensor:
        """The sum of slopes @ part over the parts of the slopes: (P, R, V), (V, C) -> (R, C)."""
        product = self.multiply(slopes.reshape(-1, slopes.shape[2]), part)
        return product.view(*slopes.shape[:2], -1).sum(0)

    def pull_right(self, slopes: Tensor, x: Tensor) -> Tensor:
        """slopes.T @ x without the product of the low parts: (P, R, V), (P, R, C) -> (V, C)."""
        total = self._pull_right(slopes, x[0])
        for i in range(1, len(x)):
            total.add_(self._pull_right(slopes[: len(slopes) - i], x[i]))
        return total

    def _pull_right(self, slopes: Tensor, part: Tensor) -> Tensor:
        """The sum of slopes.T @ part over the parts of the slopes: (P, R, V), (R, C) -> (V, C)."""
        return self.multiply(slopes.reshape(-1, slopes.shape[2]).T, part.repeat(len(slopes), 1))

    def gradients(self, slopes: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """slopes @ y (R, C) and slopes.T @ x (V, C), from float32 (R, V), (R, C) and (V, C)."""
        a, p, q = (self.split(t, self.slopes) for t in (slopes, x, y))
        return self.pull_left(a, q), self.pull_right(a, p)

    def multiply(self, a: Tensor, b: Tensor) -> Tensor:
        """a @ b in float32, of two matrices of one type. The caller has turned TF32 off."""
        if a.dtype in (torch.float32, torch.float64):
            return a @ b
        if a.device.type == "cuda" and HAS_OUT_DTYPE:
            return torch.mm(a, b, out_dtype=torch.float32)
        if self.parts > 1:
            # Products of two half-precision numbers are exact in float32, as on tensor cores.
            return a.float() @ b.float()
        return (a @ b).float()

    def encode(self) -> str:
        """A text that `decode` reads."""
        inner, slopes = (str(t).removeprefix("torch.") for t in (self.inner, self.slopes))
        return f"{self.name} {inner} {slopes} {self.parts}"

    @staticmethod
    def decode(text: str) -> "Products":
        """The products that `encode` wrote."""
        name, inner, slopes, parts = text.split()
        return BY_NAME.get(name) or Products(
            name, getattr(torch, inner), getattr(torch, slopes), int(parts)
        )


FLOAT32 = Products("float32", torch.float32, torch.float32)
SPLIT = Products("split", torch.float16, torch.bfloat16, parts=2)
BY_NAME = {"float32": FLOAT32, "split": SPLIT}  # "autocast" depends on torch.autocast's type.


def choose_products(
    precision: str, multiplies: bool, has_products: bool, device: torch.device
) -> Products:
    """How a head multiplies matrices.

    Args:
        precision: "float32", "split", "autocast" or "auto". On CUDA, "auto" is split for distances
            and autocast for inner products. Elsewhere it is float32, which no other choice of this
            accuracy beats on a CPU. "autocast" is float32 outside of torch.autocast.
        multiplies, has_products: of the head's distance. One that does not multiply uses float32.

    Slopes are never float16, whose smallest number is 6e-8. They are bfloat16 if the device has it,
    else float32. "split" is float32 on a GPU without bfloat16, or without HAS_OUT_DTYPE.
    """
    if precision == "auto":
        if device.type != "cuda":
            return FLOAT32
        precision = "autocast" if has_products else "split"
    if not multiplies:
        return FLOAT32
    has_bfloat16 = device.type != "cuda" or torch.cuda.get_device_capability(device)[0] >= 8
    if precision == "split":
        return SPLIT if has_bfloat16 and (HAS_OUT_DTYPE or device.type != "cuda") else FLOAT32
    if precision == "float32" or not torch.is_autocast_enabled(device.type):
        return FLOAT32
    dtype = torch.get_autocast_dtype(device.type)
    return Products("autocast", dtype, torch.bfloat16 if has_bfloat16 else torch.float32)


class Multiply(torch.autograd.Function):
    """x @ y.T, differentiable: (N, C), (V, C) -> (N, V)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, products: Products) -> Tensor:
        ctx.products = products
        ctx.save_for_backward(x, y)
        a, b = products.operand(x, True, False), products.operand(y, False, False)
        raw = products.inner_products(a, b)
        if a.unit is None or b.unit is None:  # Either both have units, or none.
            return raw
        return raw.mul_(a.unit[:, None]).mul_(b.unit)

    @staticmethod
    def backward(ctx: Any, slopes: Tensor) -> tuple[Tensor, Tensor, None]:
        if wants_graph():
            x, y = ctx.saved_tensors
            from .pairwise import full_float32

            with full_float32(slopes.device):
                return slopes @ y, slopes.T @ x, None
        return *ctx.products.gradients(slopes, *ctx.saved_tensors), None


def inner_products(x: Tensor, y: Tensor, products: Products) -> Tensor:
    """x @ y.T, multiplied in this way, differentiable: (N, C), (V, C) -> (N, V)."""
    found: Tensor = Multiply.apply(x, y, products)  # type: ignore[no-untyped-call]  # torch
    return found
