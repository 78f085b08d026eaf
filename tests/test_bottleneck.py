"""The share of the logits' gradient that reaches the hidden state."""

import pytest
import torch

from analysis.bottleneck import gradient_shares, jacobian
from harmonic import HarmonicHead

HEADS = [("cross_entropy", "harmonic"), ("cosine", "harmonic"), ("euclidean", "softmax")]


@pytest.mark.parametrize(("name", "link"), [*HEADS, ("mahalanobis", "harmonic")])
def test_the_jacobian_is_the_heads(name, link):
    torch.manual_seed(0)
    head = HarmonicHead(6, 20, name, link=link, real_vocab_size=17, init_std=0.5)
    h = torch.randn(6)
    logits, rows = jacobian(head, h)
    torch.testing.assert_close(logits.float(), head(h), rtol=1e-4, atol=1e-4)
    step = 1e-3 * torch.randn(6)
    moved, _ = jacobian(head, h + step)
    assert (moved - logits - rows @ step.double()).abs().max() < 1e-3 * (moved - logits).abs().max()


@pytest.mark.parametrize(("name", "link"), HEADS)
def test_shares(name, link):
    """As many coordinates as directions of g (whose sum is zero for these logits): all arrives.
    Fewer: the share is what least squares reach."""
    torch.manual_seed(1)
    h, targets = torch.randn(5, 6), torch.arange(5)
    few = HarmonicHead(6, 20, name, link=link, init_std=0.5)
    shares = gradient_shares(few, h, targets)
    assert ((shares > 0) & (shares < 0.95)).all()
    logits, rows = jacobian(few, h[0])
    g = logits.softmax(-1)
    g[0] -= 1
    left = g - rows @ torch.linalg.lstsq(rows, g[:, None]).solution[:, 0]
    assert shares[0] == pytest.approx(((g.norm() ** 2 - left.norm() ** 2).sqrt() / g.norm()).item())
    many = HarmonicHead(32, 20, name, link=link, init_std=0.5)
    assert gradient_shares(many, torch.randn(5, 32), targets) == pytest.approx(torch.ones(5))
