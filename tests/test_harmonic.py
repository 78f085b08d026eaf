"""The head against float64 formulas, scipy and the theory's identities, looping over the tables: a new distance is tested too."""

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import scipy.spatial.distance as scipy_distance
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import harmonic.loss
from harmonic import (
    CONTROLS,
    DISTANCES,
    HEADS,
    IGNORE_INDEX,
    HarmonicHead,
    contributions,
    default_scale,
    distance,
    harmonic_logits,
    harmonic_loss,
    paired_distance,
    softmax_linearization_kl,
)
from harmonic.distances import formula_table, operands, resolve
from harmonic.kernels import dense
from harmonic.kernels.products import choose

ROOT = Path(__file__).resolve().parent.parent
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


@pytest.fixture(autouse=True, scope="module")
def small_work_is_shared():
    """The sizes here are below those at which threads share the work: let two of them share it all the same."""
    before, dense.cpu.ALONE, threads = dense.cpu.ALONE, 0, torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    dense.cpu.ALONE = before
    torch.set_num_threads(threads)


def name_of(setting):
    return setting[0] + "".join(f"-{k}{v}" for k, v in setting[1].items()) if isinstance(setting, tuple) else None


def vectors(dtype=torch.float64, seed=0, n=N, v=V, c=C):
    g = torch.Generator().manual_seed(seed)
    # an offset keeps bray_curtis away from the floor of its denominator, where it is not homogeneous
    return (torch.randn(n, c, generator=g).to(dtype) + 0.3), (torch.randn(v, c, generator=g).to(dtype) * 0.7 + 0.2)


def parameters(name, c=C, seed=3):
    """Mahalanobis parameters away from the identity."""
    g = torch.Generator().manual_seed(seed)
    return {k: (p + 0.3 * torch.randn(p.shape, generator=g)).double() for k, p in DISTANCES[name].parameters(c).items()}


def reference(h, w, name, p=1.5, a=10.0, t=1.0, q=1.0, factor=None, theta=None):
    """One pair of float64 numpy vectors, written from the formulas, independent of the code under test."""
    import numpy as np

    def s(x):
        return 1 / (1 + np.exp(-x / t))

    d, size = np.abs(h - w), np.abs(h) + np.abs(w)
    if name in ("mahalanobis", "mahalanobis_cholesky"):
        P = factor @ factor.T + 1e-6 * np.eye(len(h)) if name == "mahalanobis" else np.tril(factor) @ np.tril(factor).T
        return math.sqrt((h - w) @ P @ (h - w))
    return {
        "euclidean": lambda: scipy_distance.euclidean(h, w),
        "euclidean_squared": lambda: scipy_distance.sqeuclidean(h, w),
        "manhattan": lambda: scipy_distance.cityblock(h, w),
        "minkowski": lambda: d.max() if math.isinf(p) else (d**p).sum() ** (1 / p),
        "chebyshev": lambda: scipy_distance.chebyshev(h, w),
        "chebyshev_smooth": lambda: np.log(np.exp(a * d).sum()) / a,
        "cosine": lambda: scipy_distance.cosine(h, w),
        "hamming_soft": lambda: np.abs(s(h) - s(w)).sum(),
        "hamming_gumbel": lambda: np.abs(s(h) - s(w)).sum(),  # without noise: evaluation
        "hamming_hard": lambda: scipy_distance.hamming(h > 0, w > 0) * len(h),
        "canberra": lambda: scipy_distance.canberra(h, w),
        "canberra_robust": lambda: (d / np.maximum(size, 1e-3)).sum(),
        "canberra_weighted": lambda: (size**q / (size**q).sum() * d / size).sum(),
        "bray_curtis": lambda: d.sum() / max(abs(h.sum() + w.sum()), 1e-3),
        "bray_curtis_abs": lambda: d.sum() / (np.abs(h).sum() + np.abs(w).sum()),
        "bray_curtis_normalized": lambda: scipy_distance.braycurtis(np.abs(h) / np.abs(h).sum(), np.abs(w) / np.abs(w).sum()),
        "mahalanobis_diagonal": lambda: math.sqrt((np.exp(theta) * (h - w) ** 2).sum()),
    }[name]()


@pytest.mark.parametrize("setting", SETTINGS, ids=name_of)
def test_distance_equals_the_formula(setting):
    name, options = setting
    h, w = vectors()
    options = {**options, **parameters(name)}
    plain = {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    truth = torch.tensor([[reference(x, y, name, **plain) for y in w.numpy()] for x in h.numpy()], dtype=torch.float64)
    torch.testing.assert_close(distance(h, w, name, **options), truth, rtol=1e-11, atol=0)
    torch.testing.assert_close(paired_distance(h[:, None], w, name, **options), truth, rtol=1e-11, atol=0)
    torch.testing.assert_close(distance(h.float(), w.float(), name, **options).double(), truth, rtol=3e-6, atol=0)


def test_every_distance_is_tested():
    assert {name for name, _ in SETTINGS} == set(DISTANCES)
    assert len(DISTANCES) == 19 and set(CONTROLS) == {"cross_entropy", "cosine_linear"}


@pytest.mark.parametrize("name", [n for n in HEADS if not HEADS[n].straight_through])  # a surrogate gradient has its own test below
@pytest.mark.parametrize("link", LINKS)
def test_gradients_equal_finite_differences(name, link):
    h, w = vectors(n=3, v=7, c=5)
    targets = torch.tensor([1, 6, IGNORE_INDEX])
    trained = parameters(name, 5) if name in DISTANCES else {}
    strength = torch.tensor(2.5, dtype=torch.float64, requires_grad=True)

    for impl in ("dense", "chunked"):
        for reduction in ("mean", "none"):

            def loss(h, w, strength, *values, impl=impl, reduction=reduction):
                kw = {} if name in CONTROLS else {"link": link, "exponent" if link == "harmonic" else "scale": strength}
                settings = dict(zip(trained, values, strict=True))
                total = harmonic_loss(h, w, targets, name, impl=impl, reduction=reduction, **kw, **settings)
                return total if name not in CONTROLS else total + 0 * strength

            inputs = [h.requires_grad_(), w.requires_grad_(), strength, *(p.requires_grad_() for p in trained.values())]
            assert torch.autograd.gradcheck(loss, inputs, fast_mode=True)


def test_straight_through_gradient_is_that_of_the_sigmoid():
    h, w = vectors()
    h.requires_grad_()
    distance(h, w[:1], "hamming_hard")[0, 0].backward()
    soft = torch.sigmoid(h.detach()[0])
    sign = torch.sign((h[0] > 0).double() - (w[0] > 0).double())
    torch.testing.assert_close(h.grad[0], sign * soft * (1 - soft))


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_chunked_equals_dense(name, link, reduction, monkeypatch):
    monkeypatch.setattr(harmonic.loss, "CHUNK", 3 * V + 1)  # 3 rows a chunk; 13 rows leave a remainder
    monkeypatch.setattr(harmonic.loss, "CHUNK_ROWS", 1)
    h, w = vectors()
    targets = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(1))
    targets[4] = IGNORE_INDEX
    found = {}
    for impl in ("dense", "chunked"):
        x, y = h.clone().requires_grad_(), w.clone().requires_grad_()
        torch.manual_seed(5)  # the noise of hamming_gumbel
        loss = harmonic_loss(x, y, targets, name, link=link, impl=impl, reduction=reduction, training=True)
        (loss * torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype).view(loss.shape)).sum().backward()
        found[impl] = loss.detach(), x.grad, y.grad
    torch.testing.assert_close(found["chunked"], found["dense"], rtol=1e-10, atol=1e-13)
    if reduction == "none":
        assert found["dense"][0][4] == 0 and found["dense"][1][4].abs().max() == 0


@pytest.mark.parametrize("impl", ["dense", "chunked"])
@pytest.mark.parametrize("name", HEADS)
def test_float32_is_as_exact_as_float32_can_be(name, impl):
    """Against float64 at odd sizes; log-probabilities of order 10 carry an error of a few units in the last place times the exponent."""
    h, w = vectors(torch.float32, n=61, v=1003, c=37)
    targets = torch.arange(61) % 1003
    kw = {} if name in CONTROLS else {"exponent": "sqrt_dim"}
    truth = harmonic_loss(h.double(), w.double(), targets, name, impl="dense", reduction="none", **kw)
    loss = harmonic_loss(h, w, targets, name, impl=impl, reduction="none", **kw)
    assert loss.dtype == torch.float32
    assert (loss - truth).abs().max() < 3e-5


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("where", ["target", "other", "all", "zero", "zero h", "zero w"])
def test_finite_where_the_distance_is_zero(name, link, dtype, where):
    h, w = vectors(dtype)
    if where == "target":
        w[0] = h[0]
    elif where == "other":
        w[1] = h[0]
    elif where == "all":
        w = h[:1].repeat(V, 1)
    elif where == "zero":
        h, w = torch.zeros_like(h), torch.zeros_like(w)
    else:
        (h if where == "zero h" else w)[1] = 0
    for impl in ("dense", "chunked"):
        x, y = h.clone().requires_grad_(), w.clone().requires_grad_()
        loss = harmonic_loss(x, y, torch.zeros(N, dtype=torch.long), name, link=link, impl=impl)
        loss.backward()
        assert loss.isfinite() and x.grad.norm().isfinite() and y.grad.norm().isfinite()
    if where == "target" and link == "harmonic" and name in DISTANCES and name not in ("chebyshev_smooth", "bray_curtis_normalized"):
        p = harmonic_logits(h[:1], w, name).softmax(-1)[0]
        assert p[0] > 0.99 or name == "hamming_hard"  # an exact match is certain, not uniform


def test_a_nan_is_never_hidden():
    h, w = vectors(torch.float32)
    h[2, 3] = math.nan
    for name in HEADS:
        assert harmonic_logits(h, w, name)[2].isnan().all()
        assert harmonic_loss(h, w, torch.zeros(N, dtype=torch.long), name, check_finite=False).isnan()
        with pytest.raises(ValueError, match=r"h \(13, 37\) has 1 values that are not finite, the first at \(2, 3\)"):
            harmonic_loss(h, w, torch.zeros(N, dtype=torch.long), name)
        with pytest.raises(ValueError, match=r"w \(13, 37\) has 1 values that are not finite"):
            harmonic_loss(w[:N], h, torch.zeros(N, dtype=torch.long), name)


@pytest.mark.parametrize("setting", HOMOGENEOUS, ids=name_of)
def test_homogeneity(setting):
    """d(ch, cw) = c^k d(h, w), and HarMax does not change (theory, item 1)."""
    name, options = setting
    h, w = vectors()
    options = {**options, **parameters(name)}
    for c in (1e-3, 7.0, 1e4):
        torch.testing.assert_close(distance(c * h, c * w, name, **options), c ** DISTANCES[name].degree * distance(h, w, name, **options))
        small = (1e-3 * h).float(), (1e-3 * w).float()
        p, q = (harmonic_logits(x, y, name, exponent=28.0, **options).softmax(-1) for x, y in ((h.float(), w.float()), small))
        assert (p - q).abs().max() < 2e-5


def test_distances_without_a_degree_are_not_homogeneous():
    h, w = vectors()
    for name in ("hamming_soft", "chebyshev_smooth"):
        ratio = distance(10 * h, 10 * w, name) / distance(h, w, name)
        assert ratio.max() / ratio.min() > 1.01 and DISTANCES[name].degree is None


@pytest.mark.parametrize("setting", [s for s in HOMOGENEOUS if not DISTANCES[s[0]].straight_through], ids=name_of)
def test_euler_identity(setting):
    """<dL/dh, h> + sum_j <dL/dw_j, w_j> = 0 for homogeneous d; for cosine each term vanishes alone (theory, item 2)."""
    name, options = setting
    h, w = (x.requires_grad_() for x in vectors())
    harmonic_loss(h, w, torch.arange(N), name, exponent=5.0, **options, **parameters(name)).backward()
    radial_h, radial_w = (h.grad * h).sum(), (w.grad * w).sum()
    assert abs(radial_h + radial_w) < 1e-12
    if name in ("cosine", "bray_curtis_normalized"):  # each operand is normalised alone
        assert radial_h.abs() < 1e-12 and radial_w.abs() < 1e-12
    else:
        assert radial_h.abs() > 1e-6  # the identity is not trivially 0 + 0


@pytest.mark.parametrize("setting", [s for s in SETTINGS if DISTANCES[s[0]].translation_invariant], ids=name_of)
def test_translation_identity(setting):
    """d(h + t, w + t) = d(h, w), so dL/dh + sum_j dL/dw_j = 0 (theory, item 2)."""
    name, options = setting
    h, w = (x.requires_grad_() for x in vectors())
    options = {**options, **parameters(name)}
    torch.testing.assert_close(distance(h + 2.5, w + 2.5, name, **options), distance(h, w, name, **options))
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
    assert harmonic_loss(h, w, torch.arange(N), "manhattan", exponent=28.0, reduction="sum").item() == pytest.approx(loss.item(), rel=1e-12)


@pytest.mark.parametrize("name", DISTANCES)
def test_margin_bound(name):
    """With rho = d_y / min_{j != y} d_j: p_y >= 1 / (1 + (V-1) rho^n) (theory, item 4), with equality when all others are equally far."""
    h, w = vectors()
    d = distance(h, w, name)
    nearest = d.topk(2, largest=False).values
    rho = nearest[:, 0] / nearest[:, 1]
    for n in (1.0, 28.0, 200.0):
        p = harmonic_logits(h, w, name, exponent=n).softmax(-1).amax(-1)
        assert (p >= 1 / (1 + (V - 1) * rho**n) - 1e-12).all()
    circle = torch.eye(C, dtype=torch.float64)[:4]
    d = distance(0.5 * circle[0], circle, "euclidean")
    p = harmonic_logits(0.5 * circle[0], circle, "euclidean", exponent=3.0).softmax(-1)[0]
    assert p.item() == pytest.approx(1 / (1 + 3 * (d[0] / d[1]).item() ** 3), rel=1e-12)


@pytest.mark.parametrize("name", HEADS)
def test_permutation_equivariance(name):
    h, w = vectors()
    order = torch.randperm(V, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(harmonic_logits(h, w[order], name), harmonic_logits(h, w, name)[:, order])


def test_weighted_canberra_at_power_one_is_bray_curtis_abs():
    """Computed by the general kernel, not through the shortcut that `resolve` takes."""
    h, w = vectors()
    general = dense.pairs(h, w, "canberra", q=1.0, weighted=True)
    torch.testing.assert_close(general, distance(h, w, "bray_curtis_abs"))
    assert resolve("canberra_weighted", q=1.0)[0] is DISTANCES["bray_curtis_abs"]
    assert not torch.allclose(distance(h, w, "canberra_weighted", q=2.0), general)


def test_minkowski_takes_the_fast_kernels():
    for p, name in ((1, "manhattan"), (2, "euclidean"), (math.inf, "chebyshev")):
        assert resolve("minkowski", p=p)[0] is DISTANCES[name]
    h, w = vectors()
    torch.testing.assert_close(dense.pairs(h, w, "lp", p=2.0).sqrt(), distance(h, w, "euclidean"))


def test_loss_is_cross_entropy_of_logits():
    h, w = vectors()
    y = torch.arange(N)
    for name in HEADS:
        for link in LINKS:
            kw = {} if name in CONTROLS else {"link": link}
            torch.testing.assert_close(F.cross_entropy(harmonic_logits(h, w, name, **kw), y), harmonic_loss(h, w, y, name, **kw))
    torch.testing.assert_close(harmonic_loss(h, w, y, "cross_entropy"), F.cross_entropy(h @ w.T, y))
    cos = F.cosine_similarity(h[:, None], w, dim=-1)
    torch.testing.assert_close(harmonic_logits(h, w, "cosine_linear").softmax(-1), (1 + cos) / (1 + cos).sum(-1, keepdim=True))
    # the softmax twin of cosine is the normalised softmax
    torch.testing.assert_close(
        harmonic_logits(h, w, "cosine", link="softmax", scale=7.0).log_softmax(-1), (7.0 * cos).log_softmax(-1), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("offset", [1e-1, 1e-3, 1e-5, 1e-6])
@pytest.mark.parametrize("name", ["euclidean", "cosine", "mahalanobis_diagonal"])
def test_small_distances_survive_cancellation(name, offset):
    """|h|^2 + |w|^2 - 2 h.w loses d^2 when h is almost on a prototype; the distance must not."""
    h, w = vectors(torch.float32, c=768)
    w[3] = h[5] + offset * torch.randn(768, generator=torch.Generator().manual_seed(0))
    truth = distance(h.double(), w.double(), name)[5, 3]
    relative = abs(distance(h, w, name)[5, 3].item() / truth.item() - 1)
    # mapping to the unit sphere rounds the coordinates themselves: 6e-8 of a coordinate against `offset` of one
    assert relative < (1e-5 if name == "euclidean" else max(1e-5, 3e-7 / offset))


def test_l2_stays_exact_when_every_pair_is_near():
    g = torch.Generator().manual_seed(0)
    h, w = (5 + 1e-3 * torch.randn(n, 300, generator=g) for n in (150, 120))
    truth = distance(h.double(), w.double(), "euclidean")
    assert (distance(h, w, "euclidean") / truth - 1).abs().max() < 1e-5
    h.requires_grad_()
    harmonic_loss(h, w, torch.zeros(150, dtype=torch.long), "euclidean", exponent=20.0).backward()
    x = h.detach().double().requires_grad_()
    harmonic_loss(x, w.double(), torch.zeros(150, dtype=torch.long), "euclidean", exponent=20.0).backward()
    torch.testing.assert_close(h.grad.double(), x.grad, rtol=1e-3, atol=1e-6 * x.grad.abs().max().item())


@pytest.mark.parametrize("name", HEADS)
def test_a_padded_head_equals_one_without_padding(name):
    """In its loss, its gradients, and whatever is done with its logits: a row of padding has none."""
    torch.manual_seed(0)
    plain, padded = HarmonicHead(C, V, name).eval(), HarmonicHead(C, 128, name, real_vocab_size=V).eval()
    with torch.no_grad():
        padded.weight[:V], padded.weight[V:] = plain.weight, 1e3
    h, y = torch.randn(2, N, C), torch.randint(0, V, (2, N))

    def uses(head):
        logits = head(h).flatten(0, -2)
        log_p = logits.log_softmax(-1)
        return {
            "logits": logits,
            "loss": head.loss(h, y),
            "smoothed": F.cross_entropy(logits, y.view(-1), label_smoothing=0.1),
            "entropy": -(log_p.exp() * log_p).sum(-1),
            "least likely": logits.topk(V).values[:, -1],
            "mean": logits.mean(),
            "draw": torch.multinomial(log_p.exp(), 1, generator=torch.Generator().manual_seed(0)),
        }

    expected, found = uses(plain), uses(padded)
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
    for key in ("loss", "smoothed", "entropy"):
        ours, theirs = (
            torch.autograd.grad(u[key].sum(), head.weight, retain_graph=True)[0] for u, head in ((found, padded), (expected, plain))
        )
        assert torch.equal(ours[:V], theirs) and ours[V:].abs().max() == 0 < ours.abs().max(), key


@pytest.mark.parametrize("name", HEADS)
def test_prototypes_stay_float32(name):
    """Whatever casts the module they are in; those of a dot product follow, as any matrix does."""
    for cast in (torch.nn.Module.half, torch.nn.Module.bfloat16, lambda m: m.to(torch.float16)):
        model = cast(torch.nn.Sequential(torch.nn.Linear(C, C), HarmonicHead(C, V, name)))
        kept = {p.dtype for p in model[1].parameters()} == {torch.float32}
        assert model[0].weight.dtype != torch.float32 and kept == (name in DISTANCES)
    assert model.double()[1].weight.dtype == torch.float64
    assert HarmonicHead(C, V, name).to("meta", torch.float16).weight.device.type == "meta"


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("link", LINKS)
def test_a_head_without_numbers_has_the_same_strength(name, link):
    """On the meta device, where models are made whose weights are loaded afterwards."""
    for learn in (False, True) if name in DISTANCES else (False,):
        options = {"link": link, "learn_scale" if link == "softmax" else "learn_exponent": learn}
        with torch.device("meta"):
            head = HarmonicHead(C, V, name, **options)
        assert head.fixed_strength == HarmonicHead(C, V, name, **options).fixed_strength


@pytest.mark.parametrize("name", HEADS)
def test_a_head_is_exported(name):
    """torch.export with any number of states; pairs that cancel are in it."""
    torch.manual_seed(0)
    head = HarmonicHead(C, 128, name, real_vocab_size=V).eval()
    any_number = torch.export.Dim.DYNAMIC
    program = torch.export.export(head, (torch.randn(2, 3, C),), dynamic_shapes=({0: any_number, 1: any_number},))
    h = torch.randn(5, 7, C)
    h[0, 0], h[0, 1], h[0, 2] = head.weight[3], 1.001 * head.weight[5], 0
    torch.testing.assert_close(program.module()(h), head(h), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", HEADS)
def test_onnxruntime_computes_an_exported_head(name):
    import onnxruntime

    torch.manual_seed(0)
    head = HarmonicHead(C, V, name).eval()
    shapes = ({0: torch.export.Dim.DYNAMIC},)
    model = torch.onnx.export(head, (torch.randn(4, C),), dynamo=True, dynamic_shapes=shapes, verbose=False).model_proto
    session = onnxruntime.InferenceSession(model.SerializeToString())
    h = torch.randn(9, C)
    (found,) = session.run(None, {session.get_inputs()[0].name: h.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), head(h), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["euclidean", "cosine", "manhattan", "cross_entropy", "canberra", "mahalanobis"])
def test_compiled_equals_eager(name):
    torch.manual_seed(0)
    head = HarmonicHead(C, V, name)
    h, y = torch.randn(N, C), torch.arange(N)
    eager = head.loss(h, y), head(h)
    compiled = torch.compile(lambda x: (head.loss(x * 1.0, y), head(x * 1.0)), backend="aot_eager")(h)
    torch.testing.assert_close(compiled, eager)
    eager[0].backward()
    expected = head.weight.grad.clone()
    head.weight.grad = None
    compiled[0].backward()
    torch.testing.assert_close(head.weight.grad, expected)


@pytest.mark.parametrize("name", ["mahalanobis", "mahalanobis_diagonal", "mahalanobis_cholesky"])
def test_mahalanobis_parameters_train(name):
    torch.manual_seed(0)
    head = HarmonicHead(C, V, name)
    start = {k: p.clone() for k, p in head.named_parameters()}
    h = torch.randn(N, C)
    torch.testing.assert_close(head(h), harmonic_logits(h, head.weight, "euclidean"), rtol=1e-4, atol=1e-3)  # P = I at first
    optimizer = torch.optim.SGD(head.parameters(), 0.01)
    head.loss(h, torch.arange(N)).backward()
    optimizer.step()
    moved = {k for k, p in head.named_parameters() if not torch.equal(p, start[k])}
    assert moved == set(start) and len(moved) == 2


def test_learnt_exponent_and_scale_move():
    h, y = torch.randn(N, C), torch.arange(N)
    for link, kw in (("harmonic", {"learn_exponent": True}), ("softmax", {"learn_scale": True})):
        head = HarmonicHead(C, V, "cosine", link=link, **kw)
        fixed = HarmonicHead(C, V, "cosine", link=link)
        assert head.strength().item() == pytest.approx(fixed.strength(), rel=1e-6)
        head.loss(h, y).backward()
        assert head.log_strength.grad.abs() > 0


@pytest.mark.parametrize("lowered", ["autocast", "matmul precision"])
def test_nothing_lowers_the_precision_of_the_head(lowered):
    """Inside autocast, or with TF32 and bf16 matmuls allowed, every public function gives what it gives outside."""
    h, w = vectors(torch.float32)
    y = torch.arange(N)
    head = HarmonicHead(C, V, "euclidean")

    def everything():
        found = [softmax_linearization_kl(h, head)]
        for name in HEADS:
            x = h.clone().requires_grad_()
            loss = harmonic_loss(x, w, y, name, reduction="none")
            loss.sum().backward()
            found += [loss.detach(), x.grad, harmonic_logits(h, w, name), contributions(h, w[:N], name), paired_distance(h, w[:N], name)]
            found += [distance(h, w, name)] if name in DISTANCES else []
        return found

    outside, before = everything(), torch.get_float32_matmul_precision()
    if lowered == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            inside = everything()
    else:
        torch.set_float32_matmul_precision("medium")
        inside = everything()
        assert torch.get_float32_matmul_precision() == "medium"
        torch.set_float32_matmul_precision(before)
    torch.testing.assert_close(inside, outside, rtol=0, atol=0)
    assert harmonic_loss(h.bfloat16(), w, y, "euclidean").dtype == torch.float32


def test_normalised_distances_work_at_any_scale():
    h, w = vectors(torch.float32)
    for name in ("cosine", "bray_curtis_normalized"):
        for scale in (1e-30, 1e25):
            torch.testing.assert_close(distance(scale * h, w, name), distance(h, w, name), rtol=1e-4, atol=1e-6)


def test_compiled_unit_vectors():
    """Value and gradient against float64, a row of zeros and rows of extreme size included."""
    x = vectors(torch.float32)[0]
    x[3], x[4], x[5] = 0, 1e-30 * x[4], 1e25 * x[5]
    g = torch.randn(N, C, generator=torch.Generator().manual_seed(0))
    found, truth = (v.clone().requires_grad_() for v in (x, x.double()))
    one, two = dense.cpu.Unit.apply(found), F.normalize(truth, dim=-1, eps=0)
    kept = [i for i in range(N) if i != 3]
    torch.testing.assert_close(one[kept].double(), two[kept], rtol=1e-6, atol=1e-7)
    assert one[3].abs().max() == 0
    dx, dy = torch.autograd.grad(one, found, g)[0], torch.autograd.grad(two, truth, g.double())[0]
    for i in kept:
        assert (dx[i].double() - dy[i]).abs().max() <= 1e-5 * dy[i].abs().max()
    assert torch.equal(dx[3], g[3])


def test_little_work_takes_one_thread_and_the_same_values(monkeypatch):
    h, w = vectors(torch.float32)
    shared = [gradients(h, w, torch.arange(N), name) for name in ("manhattan", "cosine", "chebyshev")]
    monkeypatch.setattr(dense.cpu, "ALONE", 10**9)
    assert dense.cpu.follow_torch(1) == 1
    alone = [gradients(h, w, torch.arange(N), name) for name in ("manhattan", "cosine", "chebyshev")]
    torch.testing.assert_close(alone, shared, rtol=1e-4, atol=1e-6)


def test_hamming_gumbel_is_noisy_only_while_training():
    h, w = vectors()
    logits = lambda name, **kw: harmonic_logits(h, w, name, exponent=5.0, **kw)
    assert torch.equal(logits("hamming_gumbel"), logits("hamming_soft"))
    assert not torch.equal(logits("hamming_gumbel", training=True), logits("hamming_gumbel", training=True))


def test_default_scale_makes_twins_start_together():
    """The two links give nearly the same distribution for layer-normalised states and small prototypes."""
    g = torch.Generator().manual_seed(7)
    h, w = F.layer_norm(torch.randn(50, 64, generator=g), (64,)), 0.02 * torch.randn(V, 64, generator=g)
    for name in ("euclidean", "manhattan", "chebyshev", "hamming_soft"):
        p, q = (harmonic_logits(h, w, name, link=link, exponent="dim").log_softmax(-1) for link in LINKS)
        assert (p - q).abs().mean() < 0.2 * (p - p.mean(-1, keepdim=True)).abs().mean(), name
    assert default_scale("euclidean", 64, "dim") == pytest.approx(8, rel=0.05)  # n = C over |h| = sqrt(C)


def test_kl_to_the_softmax_linearisation():
    """After a LayerNorm and with small prototypes, -C log d is softmax(h.w - |w|^2 / 2); without the norm penalty it is not."""
    torch.manual_seed(0)
    h = F.layer_norm(torch.randn(64, 192), (192,))
    found = []
    for std in (0.02, 0.1):
        head = HarmonicHead(192, 1000, "euclidean", exponent="dim", init_std=std)
        found.append(softmax_linearization_kl(h, head))
        w = head.weight.double()
        p = head.double()(h.double()).log_softmax(-1)
        r0 = torch.cdist(h.double(), w).square().mean(-1, keepdim=True)  # nearly |h|^2 = 192 = n
        q = (192 / r0 * (h.double() @ w.T - w.square().sum(-1) / 2)).log_softmax(-1)
        assert found[-1] == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-2, abs=1e-6)
        dot = (h.double() @ w.T).log_softmax(-1)
        assert found[-1] < 0.2 * (p.exp() * (p - dot)).sum(-1).mean()
    assert 0 <= found[0] < 1e-5 < found[1] < 1e-2
    assert softmax_linearization_kl(h, HarmonicHead(192, 1000, "manhattan")) is None
    assert softmax_linearization_kl(h, HarmonicHead(192, 1000, "euclidean", link="softmax")) is None


@pytest.mark.parametrize("name", HEADS)
def test_contributions_add_up(name):
    h, w = vectors()
    shares = contributions(h, w[:N], name)
    assert shares.shape == (N, C) and (shares >= 0).all()
    torch.testing.assert_close(shares.sum(-1), torch.ones(N, dtype=torch.float64))
    if name in ("manhattan", "bray_curtis_abs", "canberra"):  # sums: taking a coordinate away takes its share away
        d = paired_distance(h, w[:N], name)
        one = {"canberra": 1.0, "manhattan": 1.0, "bray_curtis_abs": (h.abs() + w[:N].abs()).sum(-1)}[name]
        scale = (h.abs() + w[:N].abs()) if name == "canberra" else 1.0
        torch.testing.assert_close(shares * d[:, None], (h - w[:N]).abs() / scale / (one if name != "bray_curtis_abs" else one[:, None]))
    if name == "chebyshev":
        assert (shares.count_nonzero(-1) == 1).all() and torch.equal(shares.argmax(-1), (h - w[:N]).abs().argmax(-1))


def test_memory_of_the_chunked_path_does_not_grow_with_n(monkeypatch):
    """The largest tensor that appears, by torch's own dispatch, stays that of a chunk."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else [out]:
                if isinstance(t, torch.Tensor):
                    Largest.size = max(Largest.size, t.untyped_storage().nbytes() // t.element_size())
            return out

    monkeypatch.setattr(harmonic.loss, "CHUNK", 8 * V)
    monkeypatch.setattr(harmonic.loss, "CHUNK_ROWS", 1)
    monkeypatch.setattr(dense, "BLOCK", 64 * C)
    for name in ("euclidean", "manhattan", "canberra"):
        sizes = []
        for n in (100, 400):
            h, w = vectors(torch.float32, n=n)
            h.requires_grad_(), w.requires_grad_()
            Largest.size = 0
            with Largest():
                harmonic_loss(h, w, torch.zeros(n, dtype=torch.long), name, impl="chunked").backward()
            sizes.append(Largest.size)
        assert sizes[1] <= max(400 * C, sizes[0]), (name, sizes)  # h and its gradient are the only things that grow
        assert sizes[1] < 400 * V


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda h, w, y: harmonic_loss(h, w, y, "manhatan"), "did you mean 'manhattan'"),
        (lambda h, w, y: harmonic_loss(h, w[:, :-1], y, "manhattan"), r"\(13, 37\) and \(103, 36\)"),
        (lambda h, w, y: harmonic_loss(h, w, y + V, "manhattan"), "target 103 is outside"),
        (lambda h, w, y: harmonic_loss(h, w, y[1:], "manhattan"), r"targets \(12,\) do not match h \(13, 37\)"),
        (lambda h, w, y: harmonic_loss(h, w, y, "manhattan", exponent=0.0), "exponent must be a positive number"),
        (lambda h, w, y: harmonic_loss(h, w, y, "manhattan", exponent="dims"), "'dims'"),
        (lambda h, w, y: harmonic_loss(h, w, y, "cosine", link="softmax", scale=-1.0), "scale must be a positive number"),
        (lambda h, w, y: harmonic_loss(h, w, y, "cosine", link="soft"), "unknown link 'soft'"),
        (lambda h, w, y: harmonic_loss(h, w, y, "minkowski", p=0.0), "p must be positive"),
        (lambda h, w, y: harmonic_loss(h, w, y, "manhattan", p=2.0), "manhattan has no setting 'p'"),
        (lambda h, w, y: harmonic_loss(h, w, y, "manhattan", impl="fast"), "unknown impl 'fast'"),
        (lambda h, w, y: harmonic_loss(h, w, y, "manhattan", reduction="max"), "unknown reduction 'max'"),
        (lambda h, w, y: harmonic_loss(h.long(), w, y, "manhattan"), "torch.int64"),
        (lambda h, w, y: harmonic_loss(h, w.long(), y, "manhattan"), r"torch.int64 of shape \(103, 37\)"),
        (lambda h, w, y: harmonic_loss(h, w, y.float(), "manhattan"), r"targets \(13,\) must be integers, got torch.float32"),
        (lambda h, w, y: harmonic_loss(h, w[0], y, "manhattan"), r"w \(37,\) is not a table of prototypes"),
        (lambda h, w, y: harmonic_loss(h, w[:0], y, "manhattan"), r"w \(0, 37\)"),
        (lambda h, w, y: harmonic_loss(h.to("meta"), w, y, "manhattan"), "is on meta"),
        (lambda h, w, y: harmonic_loss(h, w, y.to("meta"), "manhattan"), r"targets \(13,\) on meta"),
        (lambda h, w, y: harmonic_loss(h, w, y, "manhattan", skip=-1.0), r"skip must be in \[0, 1\), got -1.0"),
        (lambda h, w, y: harmonic_loss(h, w, y, "manhattan", impl="triton"), "needs CUDA"),
        (lambda h, w, y: harmonic_loss(h.double(), w, y, "manhattan", impl="numba"), "needs a CPU, float32"),
        (lambda h, w, y: distance(h, w, "cross_entropy"), "a control, not a distance"),
        (lambda h, w, y: HarmonicHead(C, V, "cross_entropy", learn_exponent=True), "no exponent"),
        (lambda h, w, y: HarmonicHead(C, V, "cosine", learn_scale=True), "set learn_exponent"),
        (lambda h, w, y: HarmonicHead(C, V, "cosine", bias=True), "takes no bias"),
        (lambda h, w, y: HarmonicHead(C, V, "cosine", real_vocab_size=V + 1), "not in 1..103"),
    ],
)
def test_bad_input_is_named(call, words):
    h, w = vectors(torch.float32)
    with pytest.raises(ValueError, match=words):
        call(h, w, torch.arange(N))


@pytest.mark.parametrize("name", HEADS)
def test_the_loss_of_no_targets_is_zero(name):
    """No states, or none whose target counts: loss 0 and gradients that are zeros."""
    head = HarmonicHead(C, V, name)
    for h, y in ((torch.randn(0, C), torch.zeros(0, dtype=torch.long)), (torch.randn(N, C), torch.full((N,), IGNORE_INDEX))):
        for impl in ("auto", "dense", "chunked"):
            head.impl = impl
            for reduction in ("mean", "sum", "none"):
                h.grad, _ = None, h.requires_grad_()
                head.zero_grad()
                loss = head.loss(h, y, reduction=reduction)
                assert loss.shape == (y.shape if reduction == "none" else ()) and not loss.any()
                loss.sum().backward()
                assert not h.grad.any() and all(p.grad is not None and not p.grad.any() for p in head.parameters())
    assert head(torch.randn(0, C)).shape == (0, V)


@pytest.mark.parametrize("impl", ["dense", "chunked", "numba"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_target_that_is_no_token_is_never_a_plausible_number(impl, reduction, monkeypatch):
    """Where no check of values may wait for the device, as on CUDA. -1 is no token, too."""
    monkeypatch.setattr(harmonic.loss, "_check_values", lambda *_: True)
    h, w = vectors(torch.float32)
    targets = torch.arange(N)
    targets[2] = IGNORE_INDEX
    for bad in (-1, -101, V, 2**40):
        targets[5] = bad
        loss = harmonic_loss(h, w.requires_grad_(), targets, "manhattan", exponent=9.0, impl=impl, reduction=reduction)
        assert loss[5].isnan() and loss[4].isfinite() and loss[2] == 0 if reduction == "none" else loss.isnan()
        assert torch.autograd.grad(loss.sum(), w)[0].isnan().any()


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
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_process_computes():
    """One whose parent has run Numba's kernels, as a DataLoader's worker may."""
    done = subprocess.run([sys.executable, "-c", FORK], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 7, done.stderr
    assert done.stderr.count("this process was forked after Numba's kernels had run") == 1


def test_importing_needs_no_folder_that_can_be_written(tmp_path):
    """Numba's cache has none: neither beside the package nor in the user's home."""
    shutil.copytree(ROOT / "harmonic", tmp_path / "harmonic", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "harmonic" / "kernels" / "__pycache__").touch()  # a file: no folder can be made there, even by root
    code = "from harmonic.kernels.dense import cpu; print(cpu is not None)"
    environment = {**os.environ, "HOME": "/dev/null", "XDG_CACHE_HOME": "/dev/null", "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "True", done.stderr


def test_table_of_formulas_has_every_head():
    table = formula_table()
    assert all(f"| `{name}` |" in table for name in HEADS) and len(table.splitlines()) == len(HEADS) + 2


@pytest.mark.parametrize(("n", "v", "c"), [(13, 103, 37), (1, 5, 3), (2, 4, 8), (61, 1003, 37), (1, 1, 1)])
@pytest.mark.parametrize("setting", [*SETTINGS, ("minkowski", {"p": 2.5})], ids=name_of)
def test_compiled_kernels_equal_the_truth(setting, n, v, c):
    """Numba against float64: errors of loss and gradients no larger than dense float32's, with remainders in every dimension."""
    name, options = setting
    h, w = vectors(torch.float32, n=n, v=v, c=c)
    y = torch.arange(n) % v
    options = {**options, **{k: p.float() for k, p in parameters(name, c).items()}}

    def run(dtype, impl):
        settings = {k: x.to(dtype) if isinstance(x, torch.Tensor) else x for k, x in options.items()}
        a, b = h.to(dtype, copy=True).requires_grad_(), w.to(dtype, copy=True).requires_grad_()
        loss = harmonic_loss(a, b, y, name, exponent=7.0, impl=impl, reduction="sum", **settings)
        loss.backward()
        return loss.detach().double(), a.grad.double(), b.grad.double()

    if options.get("q", 1.0) != 1:
        with pytest.raises(ValueError, match="'chunked' has all of them"):
            run(torch.float32, "numba")
        return
    truth = run(torch.float64, "dense")
    plain, fast = run(torch.float32, "dense"), run(torch.float32, "numba")
    for exact, naive, found in zip(truth, plain, fast, strict=True):
        assert (found - exact).abs().max() <= (naive - exact).abs().max() + 1e-5 * max(1.0, exact.abs().max().item())


FAST = [n for n in HEADS if n != "cosine_linear"]  # what Numba compiles


def gradients(h, w, y, name, dtype=torch.float32, **kw):
    """-> loss and gradients in float64, computed in `dtype`."""
    a, b = h.detach().to(dtype, copy=True).requires_grad_(), w.detach().to(dtype, copy=True).requires_grad_()
    loss = harmonic_loss(a, b, y, name, **kw)
    loss.backward()
    return loss.detach().double(), a.grad.double(), b.grad.double()


def no_worse(found, naive, truth, tolerance=1e-5):
    for f, n, t in zip(found, naive, truth, strict=True):
        assert (f - t).abs().max() <= (n - t).abs().max() + tolerance * max(1.0, t.abs().max().item())


def cancellation(h, w, name) -> float:
    """What compiled gradients of kernel l2 may lose: differences of two products cancel for a state that nearly is a prototype."""
    row, x, y, *_ = operands(h.double(), w.double(), name)
    if row.kernel != "l2":
        return 0.0
    d = torch.cdist(x, y)
    lost = (x.norm(dim=-1, keepdim=True) + y.norm(dim=-1)) / d
    return torch.finfo(torch.float32).eps / 2 * lost[d > 0].max().item()


@given(
    name=st.sampled_from(FAST),
    link=st.sampled_from(LINKS),
    size=st.tuples(st.integers(1, 30), st.integers(1, 90), st.integers(1, 70)),
    exponent=st.floats(0.3, 300),
    spread=st.sampled_from([0.02, 0.3, 1.0]),
    ignored=st.floats(0, 1),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_any_loss_is_as_exact_as_dense_float32(name, link, size, exponent, spread, ignored, dtype, seed):
    assume(name != "chebyshev" or dtype == torch.float32)  # coarse numbers tie for the maximum, which has several gradients then
    n, v, c = size
    h, w = vectors(torch.float32, seed, n, v, c)
    h, w = h.to(dtype), (spread * w).to(dtype)
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(v, (n,), generator=g)
    y[torch.rand(n, generator=g) < ignored] = IGNORE_INDEX
    kw = {} if name in CONTROLS else {"link": link, "exponent" if link == "harmonic" else "scale": exponent}
    truth = gradients(h, w, y, name, torch.float64, impl="dense", **kw)
    naive = gradients(h, w, y, name, impl="dense", **kw)
    rounding = 2e-7 * harmonic_logits(h.double(), w.double(), name, **kw).abs().max().item()  # of the logits themselves
    rounding += cancellation(h, w, name)
    no_worse(gradients(h, w, y, name, impl="numba", skip=0.0, **kw), naive, truth, 1e-5 + rounding)
    loss = harmonic_loss(h, w, y, name, impl="numba", **kw)  # half precision comes in as it is
    assert (
        loss.dtype == torch.float32
        and abs(loss.item() - truth[0].item()) <= 1e-5 + 2e-4 * abs(truth[0].item()) + (naive[0] - truth[0]).abs()
    )


@pytest.mark.parametrize("name", FAST)
def test_chunks_and_blocks_change_nothing(name, monkeypatch):
    """Several chunks of rows, several blocks of mapped prototypes, remainders of both."""
    h, w = vectors(torch.float32)
    y = torch.arange(N)
    whole = gradients(h, w, y, name, impl="numba")
    monkeypatch.setattr(dense.cpu, "CHUNK", 10 * V)
    monkeypatch.setitem(harmonic.loss.MAP, "cpu", 17 * C)  # 103 = 6 * 17 + 1: the last block is one row, less than a tile
    for found, expected in zip(gradients(h, w, y, name, impl="numba"), whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


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
    head, h, y = HarmonicHead(C, V, "hamming_gumbel").train(), torch.randn(N, C, requires_grad=True), torch.arange(N)
    found = []
    for use in (False, True):
        torch.manual_seed(1)  # the same noise, which the second forward pass of a checkpoint must draw again
        loss = checkpoint(head.loss, h, y, use_reentrant=False) if use else head.loss(h, y)
        found.append((loss, *torch.autograd.grad(loss, (h, head.weight))))
    torch.testing.assert_close(found[1], found[0])


def test_what_is_skipped_is_bounded():
    """The slopes left out of a row add up to less than `skip` of the target's, so no coordinate of dL/dh moves by more."""
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
    assert out.float().mean() > 0.5 and not torch.equal(found[1], exact[1])  # the largest bound does leave pairs out


def test_products_follow_autocast_only_when_asked():
    h, w = vectors(torch.float32)
    y, plain = torch.arange(N), {}
    for name in ("cross_entropy", "euclidean", "cosine", "manhattan"):
        kw = {} if name == "cross_entropy" else {"exponent": "dim"}
        plain[name] = gradients(h, w, y, name, precision="autocast", **kw)  # outside of autocast it means nothing
        torch.testing.assert_close(plain[name], gradients(h, w, y, name, **kw), rtol=0, atol=0)
        with torch.autocast("cpu", torch.bfloat16):
            lower = gradients(h, w, y, name, precision="autocast", **kw)
        assert (lower[0] != plain[name][0]) == (name != "manhattan")
        for a, b in zip(lower, plain[name], strict=True):
            assert (a - b).abs().max() <= 3e-2 * b.abs().max()


@pytest.mark.parametrize("impl", ["chunked", "numba"])
@pytest.mark.parametrize("name", ["euclidean", "cosine", "mahalanobis", "cross_entropy", "cosine_linear"])
def test_split_products_are_as_exact_as_float32(name, impl):
    """Losses within 3 times float32's own error and gradients to 16 bits, at a large exponent and with rows of very different lengths."""
    if (name, impl) == ("cosine_linear", "numba"):
        return  # has no compiled loss
    h, w = vectors(torch.float32, n=31, v=203, c=96)
    w = w * torch.logspace(-6, 0, 203)[:, None]
    y, kw = torch.arange(31), {} if name in CONTROLS else {"exponent": 300.0, **parameters(name, 96)}
    exact = harmonic_loss(h.double(), w.double(), y, name, reduction="none", impl="dense", **kw)
    losses = {p: harmonic_loss(h, w, y, name, reduction="none", impl=impl, precision=p, **kw) for p in ("auto", "float32", "split")}
    error = {p: (found - exact).abs().max() for p, found in losses.items()}
    assert error["split"] <= 3 * error["float32"] + 1e-6 and torch.equal(losses["auto"], losses["float32"])
    found, truth = gradients(h, w, y, name, impl=impl, precision="split", **kw), gradients(h, w, y, name, torch.float64, impl="dense", **kw)
    for f, t in zip(found[1:], truth[1:], strict=True):
        assert 1e-7 < (f - t).abs().max() / t.abs().max() <= 1e-4


@pytest.mark.parametrize("capability, autocast, expected", [
    (9, True, {"cross_entropy": "autocast", "cosine_linear": "autocast", "euclidean": "split", "cosine": "split", "manhattan": "float32"}),
    (9, False, {"cross_entropy": "float32", "cosine_linear": "float32", "euclidean": "split", "cosine": "split", "manhattan": "float32"}),
    (7, True, {"cross_entropy": "autocast", "euclidean": "float32", "manhattan": "float32"}),
])  # fmt: skip
def test_precision_auto(capability, autocast, expected, monkeypatch):
    """What `auto` stands for on CUDA, by the card's compute capability."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (capability, 0))
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: autocast)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda kind: torch.float16)
    for name, kind in expected.items():
        chosen = choose("auto", HEADS[name].kernel, torch.device("cuda"))
        assert chosen.name == kind
        assert choose("auto", HEADS[name].kernel, torch.device("cpu")).name == "float32"
        if kind == "autocast":  # slopes are too small for float16
            assert chosen.slopes == (torch.bfloat16 if capability >= 8 else torch.float32)
    with pytest.raises(ValueError, match="unknown precision 'half'"):
        HarmonicHead(4, 5, "cosine", precision="half")


def test_numba_leaves_torchs_threads_alone():
    """Starting Numba's threads sets OpenMP's number, which is torch's: it must be put back."""
    code = "import torch, harmonic as m; h, w = torch.randn(9, 8), torch.randn(20, 8); before = torch.get_num_threads()"
    code += "; m.harmonic_loss(h, w, torch.arange(9), 'manhattan'); assert before == torch.get_num_threads() == 1"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_elementwise_distances_are_compiled():
    """Every one takes a Numba kernel at its default settings."""
    x = torch.ones(2, 3)
    slow = set()
    for name in DISTANCES:
        row, settings = resolve(name, **DISTANCES[name].options)
        options = {k: v for k, v in settings.items() if k in row.kernel_options} | row.fixed
        if row.kernel != "l2" and not dense.find_compiled(x, row.kernel, options):
            slow.add(name)
    assert not slow


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
