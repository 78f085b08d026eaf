"""How exactly the head multiplies matrices: the inner products of the kernels l2 and dot, and the products of their gradients.

    float32    operands as they are
    split      each operand is the sum of two half-precision parts, high and low: a.b = high.high + high.low + low.high
    autocast   operands rounded to autocast's type

Sums are float32 in all three. A split product is three products on tensor cores and about as exact as one in float32
(results/precision.csv). Inner products take parts in float16, with each row scaled by a power of two so that nothing over- or underflows:
they keep 22 bits of a number. Slopes span many decades, so the products of gradients take parts in bfloat16: 16 bits, at any size.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

# Whether torch.mm takes half-precision operands and gives float32 sums: from PyTorch 2.8 on, and on CUDA only.
HAS_OUT_DTYPE = "out_dtype" in (torch.mm.__doc__ or "") and not torch.version.hip
PRECISIONS = ("auto", "float32", "split", "autocast")


class Operand(NamedTuple):
    """One side of the products of a chunk.

    inner: (M, C), or the concatenated parts (M, 3C), for products of rows. unit: (M,), what a row of `inner` has been divided by, or None.
    parts: (P, M, C), for the products with slopes, or None.
    """

    inner: torch.Tensor
    unit: torch.Tensor | None
    parts: torch.Tensor | None


@dataclass(frozen=True)
class Products:
    """A way to multiply. inner, slopes: the types of the operands of x.y, and of slopes and what they are multiplied with."""

    name: str
    inner: torch.dtype
    slopes: torch.dtype
    parts: int = 1

    def operand(self, x: torch.Tensor, left: bool, needs_grad: bool) -> Operand:
        """Rows x (M, C), float32, as the left or the right side of products."""
        parts = self.split(x, self.slopes) if needs_grad else None
        if self.parts == 1:
            same = parts is not None and self.inner == self.slopes
            return Operand(parts[0] if same else self.split(x, self.inner)[0], None, parts)
        exponent = torch.frexp(x.abs().amax(1)).exponent.clamp(-100, 120) - 15  # float16 ends at 2^16
        unit = ((exponent + 127) << 23).view(torch.float32)  # 2^exponent, exactly
        high, low = self.split(x / unit[:, None], self.inner)
        return Operand(torch.cat((high, high, low) if left else (high, low, high), 1), unit, parts)

    def split(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """x as a sum of numbers of this type: (...) -> (P, ...)."""
        if self.parts == 1:
            return x.to(dtype)[None]
        high = x.to(dtype)
        return torch.stack((high, (x - high.to(x.dtype)).to(dtype)))

    def inner_products(self, x: Operand, y: Operand) -> torch.Tensor:
        """(R, .), (V, .) -> (R, V), in units of `x.unit[:, None] * y.unit`."""
        return self.multiply(x.inner, y.inner.T)

    def pull_left(self, slopes: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """slopes @ y: parts (P, R, V), (P, V, C) -> (R, C). The product of the two low parts is left out."""
        total = None
        for i, part in enumerate(y):
            high = slopes[: len(slopes) - i]
            product = self.multiply(high.reshape(-1, high.shape[2]), part).view(*high.shape[:2], -1).sum(0)
            total = product if total is None else total + product
        return total

    def pull_right(self, slopes: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """slopes.T @ x: parts (P, R, V), (P, R, C) -> (V, C). The product of the two low parts is left out."""
        total = None
        for i, part in enumerate(x):
            high = slopes[: len(slopes) - i]
            product = self.multiply(high.reshape(-1, high.shape[2]).T, part.repeat(len(high), 1))
            total = product if total is None else total.add_(product)
        return total

    def gradients(self, slopes: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """slopes @ y and slopes.T @ x: (R, V), (R, C), (V, C), all float32 -> (R, C), (V, C)."""
        a, p, q = (self.split(t, self.slopes) for t in (slopes, x, y))
        return self.pull_left(a, q), self.pull_right(a, p)

    def multiply(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """a @ b, two matrices of one type -> float32. The caller has TF32 off."""
        if a.dtype in (torch.float32, torch.float64):
            return a @ b
        if a.device.type == "cuda" and HAS_OUT_DTYPE:
            return torch.mm(a, b, out_dtype=torch.float32)
        if self.parts > 1:  # products of half-precision numbers are exact in float32: what tensor cores do
            return a.float() @ b.float()
        return (a @ b).float()

    def encode(self) -> str:
        """What `decode` reads."""
        return f"{self.name} {str(self.inner).removeprefix('torch.')} {str(self.slopes).removeprefix('torch.')} {self.parts}"

    @staticmethod
    def decode(text: str) -> "Products":
        """The products that `encode` wrote."""
        name, inner, slopes, parts = text.split()
        return BY_NAME.get(name) or Products(name, getattr(torch, inner), getattr(torch, slopes), int(parts))


FLOAT32 = Products("float32", torch.float32, torch.float32)
SPLIT = Products("split", torch.float16, torch.bfloat16, parts=2)
BY_NAME = {"float32": FLOAT32, "split": SPLIT}  # "autocast" depends on its type


def choose_products(precision: str, kernel: str, device: torch.device) -> Products:
    """The products of a head with this kernel of kernels.py.

    auto: on CUDA split for l2, and for dot products autocast; elsewhere float32, which is as fast as anything that exact on a CPU.
    autocast: float32 outside of autocast. Slopes are never float16, which ends at 6e-8: they are bfloat16 where the device has it, else
    float32. A GPU without bfloat16, or whose torch.mm gives no float32, has no split. Raises: ValueError for an unknown precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}; choose from {', '.join(PRECISIONS)}")
    if precision == "auto":
        if device.type != "cuda":
            return FLOAT32
        precision = "autocast" if kernel == "dot" else "split"
    if kernel not in ("l2", "dot"):
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
    def forward(ctx, x, y, products):
        ctx.products = products
        ctx.save_for_backward(x, y)
        a, b = products.operand(x, True, False), products.operand(y, False, False)
        raw = products.inner_products(a, b)
        return raw if a.unit is None else raw.mul_(a.unit[:, None]).mul_(b.unit)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, slopes):
        return *ctx.products.gradients(slopes, *ctx.saved_tensors), None
