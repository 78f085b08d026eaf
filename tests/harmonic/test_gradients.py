"""Gradients against finite differences and the theory's identities."""

import pytest
import torch
import torch.nn.functional as F
from head_cases import (
    HOMOGENEOUS,
    LINKS,
    SETTINGS,
    C,
    N,
    V,
    is_straight_through,
    name_of,
    parameters,
    vectors,
)

from harmonic import (
    CONTROLS,
    DISTANCES,
    HEADS,
    IGNORE_INDEX,
    HarmonicHead,
    distance,
    harmonic_logits,
    harmonic_loss,
)
from harmonic.maps import UNIT, UNIT_L1


# A surrogate gradient has its own test below.
@pytest.mark.parametrize("name", [n for n in HEADS if not is_straight_through(n)])
@pytest.mark.parametrize("link", LINKS)
def test_gradients_equal_finite_differences(name, link):
    h, w = vectors(n=3, v=7, c=5)
    targets = torch.tensor([1, 6, IGNORE_INDEX])
    trained = parameters(name, 5) if name in DISTANCES else {}
    strength = torch.tensor(2.5, dtype=torch.float64, requires_grad=True)

    for impl in ("dense", "chunked"):
        for reduction in ("mean", "none"):

            def loss(h, w, strength, *values, impl=impl, reduction=reduction):
                kw = (
                    {}
                    if name in CONTROLS
                    else {"link": link, "exponent" if link == "harmonic" else "scale": strength}
                )
                settings = dict(zip(trained, values, strict=True))
                total = harmonic_loss(
                    h, w, targets, name, impl=impl, reduction=reduction, **kw, **settings
                )
                return total if name not in CONTROLS else total + 0 * strength

            inputs = [
                h.requires_grad_(),
                w.requires_grad_(),
                strength,
                *(p.requires_grad_() for p in trained.values()),
            ]
            assert torch.autograd.gradcheck(loss, inputs, fast_mode=True)


def test_straight_through_gradient_is_that_of_the_sigmoid():
    h, w = vectors()
    h.requires_grad_()
    distance(h, w[:1], "hamming_hard")[0, 0].backward()
    soft = torch.sigmoid(h.detach()[0])
    sign = torch.sign((h[0] > 0).double() - (w[0] > 0).double())
    torch.testing.assert_close(h.grad[0], sign * soft * (1 - soft))


@pytest.mark.parametrize(
    "setting", [s for s in HOMOGENEOUS if not is_straight_through(s[0])], ids=name_of
)
def test_euler_identity(setting):
    """<dL/dh, h> + sum_j <dL/dw_j, w_j> = 0 for homogeneous d; for cosine each term vanishes alone
    (theory, item 2)."""
    name, options = setting
    h, w = (x.requires_grad_() for x in vectors())
    harmonic_loss(
        h, w, torch.arange(N), name, exponent=5.0, **options, **parameters(name)
    ).backward()
    radial_h, radial_w = (h.grad * h).sum(), (w.grad * w).sum()
    assert abs(radial_h + radial_w) < 1e-12
    if DISTANCES[name].map in (UNIT, UNIT_L1):  # each operand is normalised alone
        assert radial_h.abs() < 1e-12 and radial_w.abs() < 1e-12
    else:
        assert radial_h.abs() > 1e-6  # the identity is not trivially 0 + 0


@pytest.mark.parametrize(
    "setting", [s for s in SETTINGS if DISTANCES[s[0]].translation_invariant], ids=name_of
)
def test_translation_identity(setting):
    """d(h + t, w + t) = d(h, w), so dL/dh + sum_j dL/dw_j = 0 (theory, item 2)."""
    name, options = setting
    h, w = (x.requires_grad_() for x in vectors())
    options = {**options, **parameters(name)}
    torch.testing.assert_close(
        distance(h + 2.5, w + 2.5, name, **options), distance(h, w, name, **options)
    )
    harmonic_loss(h, w, torch.arange(N), name, exponent=5.0, **options).backward()
    assert (h.grad.sum(0) + w.grad.sum(0)).abs().max() < 1e-12 < w.grad.sum(0).abs().max()


def test_gradient_with_respect_to_the_distance():
    """dL/dd_j = (n / d_j) (1[j = y] - p_j) (theory, item 3)."""
    h, w = vectors()
    d = distance(h, w, "manhattan").requires_grad_()
    loss = F.cross_entropy(-28.0 * d.log(), torch.arange(N), reduction="sum")
    p = harmonic_logits(h, w, "manhattan", exponent=28.0).softmax(-1)
    expected = 28.0 / d.detach() * (F.one_hot(torch.arange(N), V) - p)
    torch.testing.assert_close(torch.autograd.grad(loss, d)[0], expected)
    assert harmonic_loss(
        h, w, torch.arange(N), "manhattan", exponent=28.0, reduction="sum"
    ).item() == pytest.approx(loss.item(), rel=1e-12)


@pytest.mark.parametrize("name", ["manhattan", "canberra", "bray_curtis", "cosine", "mahalanobis"])
def test_a_second_backward_pass_and_accumulation(name):
    torch.manual_seed(0)
    head, h, y = HarmonicHead(C, V, name), torch.randn(N, C, requires_grad=True), torch.arange(N)
    loss = head.loss(h, y)
    (2 * loss).backward(retain_graph=True)
    once = [p.grad.clone() for p in (h, *head.parameters())]
    (2 * loss).backward()  # the gradients made in the forward pass are spent
    head.loss(h, y).backward()
    for p, g in zip((h, *head.parameters()), once, strict=True):
        torch.testing.assert_close(p.grad, 2.5 * g, rtol=1e-4, atol=1e-6)


def test_activation_checkpointing():
    from torch.utils.checkpoint import checkpoint

    torch.manual_seed(0)
    head, h, y = (
        HarmonicHead(C, V, "hamming_gumbel").train(),
        torch.randn(N, C, requires_grad=True),
        torch.arange(N),
    )
    found = []
    for use in (False, True):
        # The same noise, which the second forward pass of a checkpoint must draw again.
        torch.manual_seed(1)
        loss = checkpoint(head.loss, h, y, use_reentrant=False) if use else head.loss(h, y)
        found.append((loss, *torch.autograd.grad(loss, (h, head.weight))))
    torch.testing.assert_close(found[1], found[0])
