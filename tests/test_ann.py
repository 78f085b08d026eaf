"""Nearest-prototype decoding: candidates, their logits, and the probability that is left out."""

import csv
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY, script_here

from analysis import tables
from benchmarks.ann import COLUMNS
from harmonic import HEADS, HarmonicHead
from harmonic.integrations.faiss import NearestHead, supported

pytest.importorskip("faiss", reason="faiss is missing: pip install faiss-cpu")

V, C, K = 300, 24, 40
REFUSED = [name for name in HEADS if name not in supported()]
CASES = [(name, {}) for name in supported()]
CASES += [("minkowski", {"p": p}) for p in (1.0, 2.0, 3.0, float("inf"))]
CASES += [("canberra_weighted", {"q": 1.0}), ("cross_entropy", {"bias": True})]
CASES += [("manhattan", {"link": "softmax"}), ("cosine", {"learn_exponent": True})]


def make(name, settings):
    """A head with padding and trained parameters that are not at their start, and states."""
    torch.manual_seed(0)
    exponent = {} if HEADS[name].is_control or "link" in settings else {"exponent": 8.0}
    head = HarmonicHead(C, V + 4, name, real_vocab_size=V, init_std=0.5, **exponent, **settings)
    with torch.no_grad():
        for parameter in head.distance_parameters.values():
            parameter += 0.1 * torch.randn_like(parameter)
        if head.bias is not None:
            head.bias.normal_()
        head.weight[3, :5] = 0  # As in a state below: canberra's 0 / 0 is 0.
    h = F.layer_norm(torch.randn(7, C), (C,))
    h[0, :9] = 0
    return head.eval(), h


def test_an_index_of_other_weights_is_refused():
    head, h = make("manhattan", {})
    nearest = NearestHead(head, K)
    nearest(h)
    head.set_strength(32)  # The order of neighbours does not depend on it.
    torch.testing.assert_close(nearest.candidates(h)[1], head(h).topk(K).values)
    head.load_state_dict(head.state_dict())
    with pytest.raises(RuntimeError, match="make a new NearestHead"):
        nearest(h)


@pytest.mark.parametrize("name, settings", CASES)
def test_candidates_are_the_likeliest_tokens_with_their_logits(name, settings):
    head, h = make(name, settings)
    nearest = NearestHead(head, K)
    ids, found = nearest.candidates(h)
    exact = head(h).detach()
    # Values, not ids: tokens at equal distances (hamming_hard) are interchangeable.
    torch.testing.assert_close(found, exact.topk(K).values, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found, exact.gather(1, ids), rtol=1e-4, atol=1e-4)
    assert all(len(set(row)) == K for row in ids.tolist())

    some = nearest(h)
    assert some.shape == exact.shape and ((some > -torch.inf).sum(1) == K).all()
    left_out = 1 - exact.double().softmax(1).gather(1, ids).sum(1)
    assert len(nearest.bounds) == len(h)
    assert (left_out <= torch.tensor(nearest.bounds) * (1 + 1e-3) + 1e-9).all()
    assert NearestHead(head, 10 * V)(h).isfinite().all()


@pytest.mark.parametrize("name", ["cosine", "minkowski", "canberra", "bray_curtis_abs"])
def test_a_graph_finds_most_of_them(name):
    head, h = make(name, {})
    ids, found = NearestHead(head, K, "hnsw").candidates(h)
    exact = head(h).detach()
    torch.testing.assert_close(found, exact.gather(1, ids), rtol=1e-4, atol=1e-4)
    assert (exact.topk(10).indices[:, :, None] == ids[:, None]).any(2).float().mean() > 0.9


def test_too_few_found_leaves_the_others_out():
    head, h = make("cosine", {})
    nearest = NearestHead(head, K)
    search = nearest.index.search

    class Poor:
        def search(self, x, k):
            d, ids = search(x, k)
            ids[:, K // 2 :] = -1
            return d, ids

    nearest.index = Poor()
    logits = nearest(h)
    assert ((logits > -torch.inf).sum(1) == K // 2).all()
    assert all(0 < bound < 1 for bound in nearest.bounds)


def test_heads_without_a_metric_are_refused():
    assert "bray_curtis" in REFUSED and "chebyshev_smooth" in REFUSED
    cases = [(name, {}) for name in REFUSED]
    for name, options in [*cases, ("canberra_weighted", {"q": 2.0})]:
        with pytest.raises(ValueError, match=f"no metric for {name}: it has one for euclidean"):
            NearestHead(make(name, options)[0])


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match="pip install faiss-cpu"):
        NearestHead(make("cosine", {})[0])


def test_the_page_has_the_measured_table():
    with (ROOT / "results/ann.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert tables.markdown(rows, COLUMNS) in (ROOT / "docs/ann.md").read_text()


def test_sampling_writes_the_same_text(tiny_data, tmp_path):
    """With at least top_k candidates and an exact search."""
    settings = {**TINY, "dataset": tiny_data, "max_iters": 1, "head": "manhattan"}
    words = [f"--{k}={v}" for k, v in settings.items()]
    done = script_here("train.py", *words, f"--out_dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    words = [f"--out_dir={tmp_path / 'run'}", "--max_new_tokens=20", "--top_k=50"]
    exact = script_here("sample.py", *words)
    nearest = script_here("sample.py", *words, "--ann", "--ann_candidates=60")
    assert nearest.returncode == 0 and nearest.stdout == exact.stdout
    assert "probability of the tokens that --ann left out: at most 0." in nearest.stderr
