"""The compiled kernels for a CPU: as exact as plain float32, whatever the sizes, threads and
processes."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from head_cases import FAST, LINKS, SETTINGS, C, N, V, gradients, name_of, parameters, vectors
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from harmonic import (
    CONTROLS,
    IGNORE_INDEX,
    distance,
    harmonic_logits,
    harmonic_loss,
)
from harmonic.backends import mapped, numba
from harmonic.pairwise import operands


@pytest.fixture(autouse=True, scope="module")
def small_work_is_shared():
    """The sizes here are below those at which threads share the work: let two of them share it all
    the same."""
    before, numba.ALONE, threads = numba.ALONE, 0, torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    numba.ALONE = before
    torch.set_num_threads(threads)


def test_compiled_unit_vectors():
    """Value and gradient against float64, a row of zeros and rows of extreme size included."""
    x = vectors(torch.float32)[0]
    x[3], x[4], x[5] = 0, 1e-30 * x[4], 1e25 * x[5]
    g = torch.randn(N, C, generator=torch.Generator().manual_seed(0))
    found, truth = (v.clone().requires_grad_() for v in (x, x.double()))
    one, two = numba.Unit.apply(found), F.normalize(truth, dim=-1, eps=0)
    kept = [i for i in range(N) if i != 3]
    torch.testing.assert_close(one[kept].double(), two[kept], rtol=1e-6, atol=1e-7)
    assert one[3].abs().max() == 0
    dx = torch.autograd.grad(one, found, g, retain_graph=True)[0]
    dy = torch.autograd.grad(two, truth, g.double(), retain_graph=True)[0]
    for i in kept:
        assert (dx[i].double() - dy[i]).abs().max() <= 1e-5 * dy[i].abs().max()
    assert torch.equal(dx[3], g[3])
    one, two = (
        torch.autograd.grad(
            torch.autograd.grad(unit, x, slope, create_graph=True)[0][:3].square().sum(), x
        )[0]
        for unit, x, slope in ((one, found, g), (two, truth, g.double()))
    )
    torch.testing.assert_close(one[:3].double(), two[:3], rtol=1e-4, atol=1e-5)
    assert two[:3].abs().min() > 1e-5


def test_little_work_takes_one_thread_and_the_same_values(monkeypatch):
    h, w = vectors(torch.float32)
    shared = [
        gradients(h, w, torch.arange(N), name) for name in ("manhattan", "cosine", "chebyshev")
    ]
    monkeypatch.setattr(numba, "ALONE", 10**9)
    assert numba.follow_torch(1) == 1
    alone = [
        gradients(h, w, torch.arange(N), name) for name in ("manhattan", "cosine", "chebyshev")
    ]
    torch.testing.assert_close(alone, shared, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_process_computes():
    """One whose parent has run Numba's kernels, as a DataLoader's worker may."""
    done = subprocess.run(
        [sys.executable, "-c", FORK], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 7, done.stderr
    assert done.stderr.count("this process was forked after Numba's kernels had run") == 1


FORK = """
import os, torch
from harmonic import HEADS, HarmonicHead, distance
torch.set_num_threads(2)
h, y = torch.randn(300, 64), torch.randint(500, (300,))
heads = [HarmonicHead(64, 500, name) for name in ("manhattan", "cosine", "canberra", "cross_entropy")]
before = [head.loss(h, y).item() for head in heads]
if os.fork():
    raise SystemExit(os.waitstatus_to_exitcode(os.wait()[1]))
for head, expected in zip(heads, before):
    loss = head.loss(h, y)
    loss.backward()
    assert abs(loss.item() - expected) < 1e-4 and head(h).isfinite().all(), head
os._exit(7)
"""  # noqa: E501


def test_importing_needs_no_folder_that_can_be_written(tmp_path):
    """Numba's cache has none: neither beside the package nor in the user's home."""
    shutil.copytree(
        ROOT / "harmonic", tmp_path / "harmonic", ignore=shutil.ignore_patterns("__pycache__")
    )
    # A file: no folder can be made there, even by root.
    (tmp_path / "harmonic" / "backends" / "__pycache__").touch()
    code = "from harmonic.compiled import load; print(load('numba') is not None)"
    environment = {
        **os.environ,
        "HOME": "/dev/null",
        "XDG_CACHE_HOME": "/dev/null",
        "PYTHONPATH": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.strip() == "True", done.stderr


def quick_or_slow(setting):
    """Special cases of p take 5 to 8 seconds each to compile. They are slow tests."""
    special = setting[1].get("p") in (0.5, 3.0)
    return pytest.param(setting, marks=pytest.mark.slow) if special else setting


@pytest.mark.parametrize(
    ("n", "v", "c"), [(13, 103, 37), (1, 5, 3), (2, 4, 8), (61, 1003, 37), (1, 1, 1)]
)
@pytest.mark.parametrize(
    "setting", [*map(quick_or_slow, SETTINGS), ("minkowski", {"p": 2.5})], ids=name_of
)
def test_compiled_kernels_equal_the_truth(setting, n, v, c):
    """Numba against float64: errors of loss and gradients no larger than dense float32's, with
    remainders in every dimension."""
    name, options = setting
    h, w = vectors(torch.float32, n=n, v=v, c=c)
    y = torch.arange(n) % v
    options = {**options, **{k: p.float() for k, p in parameters(name, c).items()}}

    def run(dtype, impl):
        settings = {
            k: x.to(dtype) if isinstance(x, torch.Tensor) else x for k, x in options.items()
        }
        a, b = h.to(dtype, copy=True).requires_grad_(), w.to(dtype, copy=True).requires_grad_()
        loss = harmonic_loss(a, b, y, name, exponent=7.0, impl=impl, reduction="sum", **settings)
        loss.backward()
        return loss.detach().double(), a.grad.double(), b.grad.double()

    if options.get("q", 1.0) != 1 or name not in FAST:
        with pytest.raises(ValueError, match="no compiled kernel"):
            run(torch.float32, "numba")
        return
    truth = run(torch.float64, "dense")
    plain, fast = run(torch.float32, "dense"), run(torch.float32, "numba")
    for exact, naive, found in zip(truth, plain, fast, strict=True):
        assert (found - exact).abs().max() <= (naive - exact).abs().max() + 1e-5 * max(
            1.0, exact.abs().max().item()
        )


def cancellation(h, w, name) -> float:
    """What compiled gradients of kernel l2 may lose: differences of two products cancel for a state
    that nearly is a prototype."""
    both = operands(h.double(), w.double(), name)
    if both.distance.kernel != "l2":
        return 0.0
    d = torch.cdist(both.x, both.y)
    lost = (both.x.norm(dim=-1, keepdim=True) + both.y.norm(dim=-1)) / d
    return torch.finfo(torch.float32).eps / 2 * lost[d > 0].max().item()


def no_worse(found, naive, truth, tolerance=1e-5):
    for f, n, t in zip(found, naive, truth, strict=True):
        assert (f - t).abs().max() <= (n - t).abs().max() + tolerance * max(
            1.0, t.abs().max().item()
        )


@given(
    head=st.tuples(st.sampled_from(FAST), st.sampled_from(LINKS)),
    size=st.tuples(st.integers(1, 30), st.integers(1, 90), st.integers(1, 70)),
    exponent=st.floats(0.3, 300),
    spread=st.sampled_from([0.02, 0.3, 1.0]),
    ignored=st.floats(0, 1),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_any_loss_is_as_exact_as_dense_float32(head, size, exponent, spread, ignored, dtype, seed):
    name, link = head
    # Coarse numbers tie for the maximum, which has several gradients then.
    assume(name != "chebyshev" or dtype == torch.float32)
    n, v, c = size
    h, w = vectors(torch.float32, seed, n, v, c)
    h, w = h.to(dtype), (spread * w).to(dtype)
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(v, (n,), generator=g)
    y[torch.rand(n, generator=g) < ignored] = IGNORE_INDEX
    kw = (
        {}
        if name in CONTROLS
        else {"link": link, "exponent" if link == "harmonic" else "scale": exponent}
    )
    truth = gradients(h, w, y, name, torch.float64, impl="dense", **kw)
    naive = gradients(h, w, y, name, impl="dense", **kw)
    # Of the logits themselves.
    rounding = 2e-7 * harmonic_logits(h.double(), w.double(), name, **kw).abs().max().item()
    rounding += cancellation(h, w, name)
    no_worse(gradients(h, w, y, name, impl="numba", skip=0.0, **kw), naive, truth, 1e-5 + rounding)
    loss = harmonic_loss(h, w, y, name, impl="numba", **kw)  # half precision comes in as it is
    assert (
        loss.dtype == torch.float32
        and abs(loss.item() - truth[0].item())
        <= 1e-5 + 2e-4 * abs(truth[0].item()) + (naive[0] - truth[0]).abs()
    )


@pytest.mark.parametrize("name", FAST)
def test_chunks_and_blocks_change_nothing(name, monkeypatch):
    """Several chunks of rows, several blocks of mapped prototypes, remainders of both."""
    h, w = vectors(torch.float32)
    y = torch.arange(N)
    whole = gradients(h, w, y, name, impl="numba")
    monkeypatch.setattr(numba, "CHUNK", 10 * V)
    # 103 = 6 * 17 + 1: the last block is one row, less than a tile.
    monkeypatch.setitem(mapped.MAP, "cpu", 17 * C)
    for found, expected in zip(gradients(h, w, y, name, impl="numba"), whole, strict=True):
        torch.testing.assert_close(
            found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item()
        )


def test_what_is_skipped_is_bounded():
    """The slopes left out of a row add up to less than `skip` of the target's, so no coordinate of
    dL/dh moves by more."""
    h, w = vectors(torch.float32, n=50, v=1003)
    y = torch.arange(50)
    exact = gradients(h, w, y, "manhattan", exponent=300.0, skip=0.0, reduction="sum")
    d = distance(h.double(), w.double(), "manhattan")
    p = (-300.0 * d.log()).softmax(-1)
    slope = 300.0 / d * p
    at_target = (300.0 / d * (1 - p))[torch.arange(50), y]
    for skip in (1e-6, 1e-2, 0.5):
        found = gradients(h, w, y, "manhattan", exponent=300.0, skip=skip, reduction="sum")
        out = slope < skip / 1003 * at_target[:, None]
        out[torch.arange(50), y] = False
        bound = torch.where(out, slope, 0).sum(-1)
        assert (bound <= skip * at_target).all() and found[0] == exact[0]
        assert ((found[1] - exact[1]).abs().amax(-1) <= bound + 1e-5 * at_target).all()
    # The largest bound does leave pairs out.
    assert out.float().mean() > 0.5 and not torch.equal(found[1], exact[1])


def test_numba_leaves_torchs_threads_alone():
    """Starting Numba's threads sets OpenMP's number, which is torch's: it must be put back."""
    code = (
        "import torch, harmonic as m; h, w = torch.randn(9, 8), torch.randn(20, 8); before ="
        " torch.get_num_threads()"
    )
    code += (
        "; m.harmonic_loss(h, w, torch.arange(9), 'manhattan'); assert before =="
        " torch.get_num_threads() == 1"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_compiled_kernels_take_views_and_follow_torchs_threads():
    h, w = (x[::2].requires_grad_() for x in vectors(torch.float32, n=26, v=206))  # not contiguous
    y, before = torch.arange(13), torch.get_num_threads()
    found = []
    for threads in (1, before):
        torch.set_num_threads(threads)
        found.append(torch.autograd.grad(harmonic_loss(h, w, y, "manhattan", impl="numba"), (h, w)))
    torch.set_num_threads(before)
    expected = torch.autograd.grad(harmonic_loss(h, w, y, "manhattan", impl="dense"), (h, w))
    for one in found:
        torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("p", [0.05, 0.9, 8.0])
def test_equal_coordinates_add_nothing_to_a_power(p):
    h, w = (x.relu() for x in vectors(torch.float32))
    found = [
        harmonic_loss(h.to(dtype), w.to(dtype), torch.arange(N), "minkowski", p=p, exponent=4.0)
        for dtype in (torch.float64, torch.float32)
    ]
    torch.testing.assert_close(found[1].double(), found[0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["euclidean", "euclidean_squared", "mahalanobis"])
def test_gradients_of_near_pairs_keep_their_digits(name, monkeypatch):
    """States beside a prototype that is not their target: there |h|^2 + |w|^2 - 2 h.w cancels."""
    monkeypatch.setattr(numba, "CHUNK", 3 * V)  # several chunks
    h, w = vectors(torch.float32)
    for near in (1e-2, 1e-4, 1e-6):
        h[:5] = w[20:25] + near * torch.randn(5, C)
        targets, found = torch.arange(N), []
        for dtype, impl in ((torch.float64, "dense"), (torch.float32, "numba")):
            x, y = (t.detach().to(dtype).requires_grad_() for t in (h, w))
            harmonic_loss(x, y, targets, name, exponent=8.0, impl=impl, skip=0).backward()
            found.append((x.grad.double(), y.grad.double()))
        for exact, own in zip(*found, strict=True):
            error = (own - exact).norm(dim=-1) / exact.norm(dim=-1).clamp_min(exact.norm() * 1e-6)
            assert error.max() < 2e-5, (near, error.max())
