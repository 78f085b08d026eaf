"""The share of the logits' gradient that reaches the hidden state."""

import math

import numpy as np
import pytest
import torch
from test_analysis import call, home  # noqa: F401  (a fixture)

from analysis.bottleneck import gradient_shares, jacobian, spread
from analysis.runs import find_runs, predictions
from harmonic import CONTROLS, HarmonicHead
from studies import bottleneck

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


@pytest.mark.parametrize(
    ("name", "link"), [*HEADS, ("manhattan", "harmonic"), ("cosine_scaled", "")]
)
def test_shares_of_confident_tokens(name, link):
    """Their probability is 1 in float32 or float64. NumPy's least squares give the same share."""
    torch.manual_seed(0)
    strength = dict(exponent=40.0) if link == "harmonic" else dict(scale=200.0)
    settings = {} if name in CONTROLS else dict(link=link, **strength)
    head = HarmonicHead(6, 20, name, init_std=1.0, **settings)
    for near in (1e-2, 1e-6):
        with torch.no_grad():
            w = head.weight[3]
            if name in CONTROLS:
                h = w / near
            else:
                h = w + near * torch.randn(6)
            if name == "cosine_scaled":  # Its logit does not grow with h.
                w *= 100
            assert head(h).softmax(-1)[3] == 1
        (share,) = gradient_shares(head, h[None], torch.tensor([3])).tolist()
        logits, rows = (tensor.numpy() for tensor in jacobian(head, h))
        others = np.delete(logits, 3)
        p = np.exp(others - others.max())
        g = np.insert(p / p.sum(), 3, -1)
        rest = g - rows @ np.linalg.lstsq(rows, g, rcond=1e-12)[0]
        assert share == pytest.approx(math.sqrt(1 - rest @ rest / (g @ g)), abs=1e-7)


@pytest.mark.parametrize("name", ["ce", "bert"])
@torch.no_grad()
def test_tokens_are_spread_over_the_split(home, name):  # noqa: F811
    (run,) = find_runs([home / "out" / name])
    (model, _), data = run.load(), run.data()
    every = torch.cat([h for h, *_ in predictions(model, data, "val", 10**9)])
    for count in (5, 17, 40):
        h, y = spread(model, data, "val", count)
        assert len(h) == len(y) == min(count, len(every))
        if name == "ce":  # What is masked in a window of bert depends on the other windows.
            places = torch.cdist(h, every).argmin(1) / len(every)
            assert places[0] < 0.15 and places[-1] > 0.75 and places.diff().abs().max() < 0.4


def test_the_studys_table():
    rows = [
        {"head": head, "link": "harmonic", "iter": str(stage), "val_loss": "5.5", "share": "0.25"}
        for head in ("stablemax", "cosine")
        for stage in bottleneck.STAGES
    ]
    shares = " | ".join(["0.250"] * 5)
    table = bottleneck.summary(rows)
    assert f"| cosine | harmonic | {shares} | 5.5000 |" in table
    assert f"| stablemax | - | {shares} | 5.5000 |" in table  # A control has no link.
    assert bottleneck.summary([]) == "No head is done yet."
