"""How exact float32 is, and that nothing lowers it unasked."""

import pytest
import torch
from head_cases import C, N, V, gradients, parameters, vectors

from harmonic import (
    CONTROLS,
    DISTANCES,
    HEADS,
    HarmonicHead,
    contributions,
    distance,
    harmonic_logits,
    harmonic_loss,
    paired_distance,
    softmax_linearization_kl,
)
from harmonic.precision import SPLIT, choose_products, inner_products


@pytest.mark.parametrize("impl", ["dense", "chunked"])
@pytest.mark.parametrize("name", HEADS)
def test_float32_is_as_exact_as_float32_can_be(name, impl):
    """Against float64 at odd sizes; log-probabilities of order 10 carry an error of a few units in
    the last place times the exponent."""
    h, w = vectors(torch.float32, n=61, v=1003, c=37)
    targets = torch.arange(61) % 1003
    kw = {} if name in CONTROLS else {"exponent": "sqrt_dim"}
    truth = harmonic_loss(
        h.double(), w.double(), targets, name, impl="dense", reduction="none", **kw
    )
    loss = harmonic_loss(h, w, targets, name, impl=impl, reduction="none", **kw)
    assert loss.dtype == torch.float32
    assert (loss - truth).abs().max() < 3e-5


@pytest.mark.parametrize("lowered", ["autocast", "matmul precision", "fp32_precision"])
def test_nothing_lowers_the_precision_of_the_head(lowered):
    """Inside autocast, or with TF32 and bf16 matmuls allowed, every public function gives what it
    gives outside."""
    h, w = vectors(torch.float32)
    y = torch.arange(N)
    head = HarmonicHead(C, V, "euclidean")

    def everything():
        found = [softmax_linearization_kl(h, head)]
        for name in HEADS:
            x = h.clone().requires_grad_()
            loss = harmonic_loss(x, w, y, name, reduction="none")
            loss.sum().backward()
            found += [
                loss.detach(),
                x.grad,
                harmonic_logits(h, w, name),
                contributions(h, w[:N], name),
                paired_distance(h, w[:N], name),
            ]
            found += [distance(h, w, name)] if name in DISTANCES else []
        return found

    outside, before = everything(), torch.get_float32_matmul_precision()
    if lowered == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            inside = everything()
    elif lowered == "fp32_precision":
        matmul = torch.backends.mkldnn.matmul
        for place in (matmul, torch.backends):  # its own setting, or one for everything
            place.fp32_precision = "bf16" if place is matmul else "tf32"
            try:
                inside = everything()
                assert matmul.fp32_precision == place.fp32_precision != "ieee"
            finally:
                place.fp32_precision = "none"
        assert matmul.fp32_precision == "none"
    else:
        torch.set_float32_matmul_precision("medium")
        inside = everything()
        assert torch.get_float32_matmul_precision() == "medium"
        torch.set_float32_matmul_precision(before)
    torch.testing.assert_close(inside, outside, rtol=0, atol=0)
    assert harmonic_loss(h.bfloat16(), w, y, "euclidean").dtype == torch.float32


def test_products_follow_autocast_only_when_asked():
    h, w = vectors(torch.float32)
    y, plain = torch.arange(N), {}
    for name in ("cross_entropy", "euclidean", "cosine", "manhattan"):
        kw = {} if name == "cross_entropy" else {"exponent": "dim"}
        # Outside of autocast it means nothing.
        plain[name] = gradients(h, w, y, name, precision="autocast", **kw)
        torch.testing.assert_close(plain[name], gradients(h, w, y, name, **kw), rtol=0, atol=0)
        with torch.autocast("cpu", torch.bfloat16):
            lower = gradients(h, w, y, name, precision="autocast", **kw)
        assert (lower[0] != plain[name][0]) == (name != "manhattan")
        for a, b in zip(lower, plain[name], strict=True):
            assert (a - b).abs().max() <= 3e-2 * b.abs().max()


@pytest.mark.parametrize("impl", ["chunked", "numba"])
@pytest.mark.parametrize(
    "name", ["euclidean", "cosine", "mahalanobis", "cross_entropy", "cosine_linear"]
)
def test_split_products_are_as_exact_as_float32(name, impl):
    """Losses within 3 times float32's own error and gradients to 16 bits, at a large exponent and
    with rows of very different lengths."""
    if (name, impl) == ("cosine_linear", "numba"):
        return  # has no compiled loss
    h, w = vectors(torch.float32, n=31, v=203, c=96)
    w = w * torch.logspace(-6, 0, 203)[:, None]
    y, kw = (
        torch.arange(31),
        {} if name in CONTROLS else {"exponent": 300.0, **parameters(name, 96)},
    )
    exact = harmonic_loss(h.double(), w.double(), y, name, reduction="none", impl="dense", **kw)
    losses = {
        p: harmonic_loss(h, w, y, name, reduction="none", impl=impl, precision=p, **kw)
        for p in ("auto", "float32", "split")
    }
    error = {p: (found - exact).abs().max() for p, found in losses.items()}
    assert error["split"] <= 3 * error["float32"] + 1e-6 and torch.equal(
        losses["auto"], losses["float32"]
    )
    found, truth = (
        gradients(h, w, y, name, impl=impl, precision="split", **kw),
        gradients(h, w, y, name, torch.float64, impl="dense", **kw),
    )
    for f, t in zip(found[1:], truth[1:], strict=True):
        assert 1e-7 < (f - t).abs().max() / t.abs().max() <= 1e-4


def test_the_gradient_of_a_split_product_has_a_gradient():
    x, y = (v.requires_grad_() for v in vectors(torch.float32))
    a, b = (v.detach().double().requires_grad_() for v in (x, y))
    one, two = inner_products(x, y, SPLIT), a @ b.T
    one, two = (
        torch.autograd.grad(
            torch.autograd.grad(raw.pow(3).sum(), leaf, create_graph=True)[0].square().sum(), leaf
        )[0]
        for raw, leaf in ((one, x), (two, a))
    )
    torch.testing.assert_close(one.double(), two, rtol=1e-4, atol=1e-4 * two.abs().max().item())


@pytest.mark.parametrize(
    "capability, autocast, expected",
    [
        (
            9,
            True,
            {
                "cross_entropy": "autocast",
                "cosine_linear": "autocast",
                "euclidean": "split",
                "cosine": "split",
                "manhattan": "float32",
            },
        ),
        (
            9,
            False,
            {
                "cross_entropy": "float32",
                "cosine_linear": "float32",
                "euclidean": "split",
                "cosine": "split",
                "student_t": "split",
                "manhattan": "float32",
            },
        ),
        (
            7,
            True,
            {
                "cosine_scaled": "autocast",
                "cross_entropy": "autocast",
                "euclidean": "float32",
                "manhattan": "float32",
            },
        ),
    ],
)
def test_precision_auto(capability, autocast, expected, monkeypatch):
    """What `auto` stands for on CUDA, by the card's compute capability."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (capability, 0))
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: autocast)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda kind: torch.float16)
    for name, kind in expected.items():
        made_of = HEADS[name].multiplies, HEADS[name].has_products
        chosen = choose_products("auto", *made_of, torch.device("cuda"))
        assert chosen.name == kind
        assert choose_products("auto", *made_of, torch.device("cpu")).name == "float32"
        if kind == "autocast":  # slopes are too small for float16
            assert chosen.slopes == (torch.bfloat16 if capability >= 8 else torch.float32)
    with pytest.raises(ValueError, match="unknown precision 'half'"):
        HarmonicHead(4, 5, "cosine", precision="half")
    with pytest.raises(ValueError, match="unknown precision 'half'"):
        h, w = torch.randn(3, 4), torch.randn(5, 4)
        harmonic_loss(h, w, torch.arange(3), "cosine", impl="dense", precision="half")
