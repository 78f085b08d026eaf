"""Settings and vectors that the tests of the head share. They come from the table: a new distance
is tested, too."""

import math

import torch

from harmonic import (
    DISTANCES,
    HEADS,
    harmonic_loss,
)
from harmonic.backends import numba

N, V, C = 13, 103, 37  # odd on purpose: no dimension divides a block
LINKS = ["harmonic", "softmax"]
# settings of each distance beyond its defaults
SETTINGS = [(name, {}) for name in DISTANCES]
SETTINGS += [("minkowski", {"p": p}) for p in (0.5, 1.0, 2.0, 3.0, math.inf)]
SETTINGS += [
    ("canberra_weighted", {"q": 2.0}),
    ("canberra_weighted", {"q": 0.5}),
    ("chebyshev_smooth", {"a": 3.0}),
    ("hamming_soft", {"t": 0.3}),
]
HOMOGENEOUS = [s for s in SETTINGS if DISTANCES[s[0]].degree is not None]
# What Numba compiles: a new kernel of kernels.py may do without, and so may a control.
COMPILED = ("l2", *(kernel for kernel, _ in numba.COMPILED))
FAST = ["cross_entropy", *(n for n, d in DISTANCES.items() if d.kernel in COMPILED)]


def is_straight_through(name):
    return HEADS[name].map is not None and HEADS[name].map.straight_through


def name_of(setting):
    return (
        setting[0] + "".join(f"-{k}{v}" for k, v in setting[1].items())
        if isinstance(setting, tuple)
        else None
    )


def vectors(dtype=torch.float64, seed=0, n=N, v=V, c=C):
    g = torch.Generator().manual_seed(seed)
    # an offset keeps bray_curtis away from the floor of its denominator, where it is not
    # homogeneous
    return (torch.randn(n, c, generator=g).to(dtype) + 0.3), (
        torch.randn(v, c, generator=g).to(dtype) * 0.7 + 0.2
    )


def parameters(name, c=C, seed=3):
    """Mahalanobis parameters away from the identity."""
    g = torch.Generator().manual_seed(seed)
    return {
        k: (p + 0.3 * torch.randn(p.shape, generator=g)).double()
        for k, p in DISTANCES[name].parameters(c).items()
    }


def gradients(h, w, y, name, dtype=torch.float32, **kw):
    """-> loss and gradients in float64, computed in `dtype`."""
    a, b = (
        h.detach().to(dtype, copy=True).requires_grad_(),
        w.detach().to(dtype, copy=True).requires_grad_(),
    )
    loss = harmonic_loss(a, b, y, name, **kw)
    loss.backward()
    return loss.detach().double(), a.grad.double(), b.grad.double()
