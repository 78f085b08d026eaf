"""Settings and vectors that the tests of the head share. They come from the table: a new distance
is tested, too."""

import math

import torch

from harmonic import (
    DISTANCES,
    HEADS,
    IGNORE_INDEX,
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


def losses_of_strange_input(impl, device="cpu"):
    """Checks of a backend: biases and ignored states that are not finite, and tables at whose
    nearest distance a ratio overflows."""
    generator = torch.Generator().manual_seed(0)
    h, w = torch.randn(6, 8, generator=generator), torch.randn(70, 8, generator=generator)
    targets, columns = torch.arange(6) % 3, torch.randn(70, 3, generator=generator)

    def run(name="cross_entropy", h=h, w=w, targets=targets, bias=None, how=impl, **settings):
        x, y = (a.detach().clone().to(device).requires_grad_() for a in (h, w))
        t = targets.to(device)
        bias = None if bias is None else bias.to(device)
        settings |= dict(bias=bias, impl=how, check_finite=False)
        loss = harmonic_loss(x, y, t, name, **settings)
        loss.sum().backward()
        return loss.detach(), x.grad, y.grad

    def alike(found, expected):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)

    alike(run(bias=columns[:, 1]), run(bias=columns[:, 1].contiguous(), how="dense"))
    for strange in (math.nan, math.inf):
        bias = torch.zeros(70)
        bias[5] = strange
        loss, dx, dy = run(bias=bias)
        assert loss.isnan() and dx.isnan().all() and dy.isnan().any()
    masked = torch.where(torch.arange(70) < 3, 0.0, -math.inf)  # more than a whole block
    loss, dx, dy = run(bias=masked)
    alike((loss, dx, dy[:3]), run(w=w[:3], how="dense"))
    assert dy[3:].abs().max() < 1e-30

    ignored, known = torch.tensor([1, 4]), torch.tensor([0, 2, 3, 5])
    states, some = h.clone(), targets.clone()
    states[ignored], some[ignored] = math.nan, IGNORE_INDEX
    bias = torch.zeros(70)
    bias[0] = -math.inf
    some[some == 0] = 3
    for reduction in ("mean", "none"):
        loss, dx, dy = run(h=states, targets=some, bias=bias, reduction=reduction)
        whole = run(h=h[known], targets=some[known], bias=bias, how="dense", reduction=reduction)
        loss = loss[known] if reduction == "none" else loss
        alike((loss, dx[known], dy), whole)
        assert not dx[ignored].any()
    on_device = (x.to(device) for x in (states, w, some))
    assert harmonic_loss(*on_device, "manhattan", impl=impl).isfinite()  # `check_finite` passes.

    near = h.clone()
    near[0] = w[7]
    zero, table = h.clone(), w.clone()
    zero[0] = table[7] = 0
    for name, states, settings in (
        ("minkowski", near, {"p": 8.0, "exponent": 64.0}),
        ("manhattan", zero, {}),
        ("canberra", zero, {}),
        ("bray_curtis_abs", zero, {}),
    ):
        given = dict(h=states, w=table if states is zero else w, reduction="none", **settings)
        alike(run(name, **given)[0], run(name, how="dense", **given)[0])
