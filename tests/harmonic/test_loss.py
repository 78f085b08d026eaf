"""What the loss is, for every head: the cross-entropy of its logits, finite, refused where it could
not be computed."""

import enum
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from head_cases import (
    LINKS,
    C,
    N,
    V,
    is_straight_through,
    losses_of_strange_input,
    parameters,
    vectors,
)

from harmonic import (
    CONTROLS,
    DISTANCES,
    HEADS,
    IGNORE_INDEX,
    HarmonicHead,
    default_scale,
    distance,
    harmonic_logits,
    harmonic_loss,
    kernels,
    reference,
    softmax_linearization_kl,
)
from harmonic.backends import autograd, chunked


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_chunked_equals_dense(name, link, reduction, monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK", 3 * V + 1)  # 3 rows a chunk; 13 rows leave a remainder
    monkeypatch.setattr(chunked, "CHUNK_ROWS", 1)
    h, w = vectors()
    targets = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(1))
    targets[4] = IGNORE_INDEX
    found = {}
    for impl in ("dense", "chunked"):
        x, y = h.clone().requires_grad_(), w.clone().requires_grad_()
        torch.manual_seed(5)  # the noise of hamming_gumbel
        loss = harmonic_loss(
            x, y, targets, name, link=link, impl=impl, reduction=reduction, training=True
        )
        (
            loss * torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype).view(loss.shape)
        ).sum().backward()
        found[impl] = loss.detach(), x.grad, y.grad
    torch.testing.assert_close(found["chunked"], found["dense"], rtol=1e-10, atol=1e-13)
    if reduction == "none":
        assert found["dense"][0][4] == 0 and found["dense"][1][4].abs().max() == 0


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_frozen_head_has_no_gradient_and_changes_no_other(name, reduction, monkeypatch):
    """As LoRA trains: only the states and what is before them."""
    monkeypatch.setattr(chunked, "CHUNK_ROWS", 4)
    monkeypatch.setattr(chunked, "CHUNK", 4 * V)
    torch.manual_seed(0)
    y = torch.randint(V, (N,))
    y[2] = IGNORE_INDEX
    for impl in ("chunked", "auto"):
        head = HarmonicHead(C, V + 3, name, real_vocab_size=V, impl=impl).eval()
        h = torch.cat((torch.randn(N - 1, C), head.weight[5:6].detach()))  # the last one is near
        found = []
        for trained in (True, False):
            x = h.clone().requires_grad_()
            head.requires_grad_(trained)
            loss = head.loss(x, y, reduction=reduction)
            loss.backward(torch.linspace(1, 2, N) if reduction == "none" else None)
            assert all((p.grad is not None) == trained for p in head.parameters())
            head.zero_grad()
            found.append((loss.detach(), x.grad))
        torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("name", DISTANCES)
def test_the_loss_is_the_papers(name):
    h, w = vectors()
    y, trained = torch.arange(N), parameters(name)
    d = reference.distance(name)(h[:, None], w, **trained)
    for link, truth in (
        ("harmonic", reference.harmonic_loss(d, y, 3.0)),
        ("softmax", reference.softmax_loss(d, y, 3.0)),
    ):
        strength = {"harmonic": "exponent", "softmax": "scale"}[link]
        found = harmonic_loss(
            h, w, y, name, link=link, reduction="none", **{strength: 3.0}, **trained
        )
        torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-10)


def slope_penalty(loss, x):
    """A loss of a gradient, as in gradient penalties and meta-learning."""
    return torch.autograd.grad(loss, x, create_graph=True)[0].square().sum()


@pytest.mark.parametrize("name", [n for n in DISTANCES if not is_straight_through(n)])
def test_the_gradient_of_a_gradient_is_that_of_the_formula(name):
    """In float32, whose kernels autograd does not see."""
    h, w = vectors()
    y, trained = torch.arange(N), {k: p.requires_grad_() for k, p in parameters(name).items()}
    leaves = [h.requires_grad_(), w.requires_grad_(), *trained.values()]
    d = reference.distance(name)(h[:, None], w, **trained)
    truth = torch.autograd.grad(slope_penalty(reference.harmonic_loss(d, y, 3.0).mean(), h), leaves)
    leaves = [leaf.detach().float().requires_grad_() for leaf in leaves]
    h, w, *others = leaves
    trained = dict(zip(trained, others, strict=True))
    for loss in (
        harmonic_loss(h, w, y, name, exponent=3.0, **trained),
        harmonic_loss(h, w, y, name, exponent=3.0, reduction="none", **trained).mean(),
        F.cross_entropy(harmonic_logits(h, w, name, exponent=3.0, **trained), y),
    ):
        found = torch.autograd.grad(slope_penalty(loss, h), leaves)
        for one, exact in zip(found, truth, strict=True):
            assert (one - exact).abs().max() < 1e-3 * exact.abs().max()


@pytest.mark.parametrize("name", ["euclidean", "cosine", "manhattan"])
@pytest.mark.parametrize("reduction", ["mean", "none", "logits"])
def test_create_graph_changes_no_gradient_of_tied_prototypes(name, reduction):
    """States that depend on the prototypes, also under autocast, where a penalty is often taken."""
    h, w = vectors(torch.float32)
    w.requires_grad_()

    def gradient(create_graph):
        states = (w[:N] * h).tanh()
        if reduction == "logits":
            loss = F.cross_entropy(harmonic_logits(states, w, name), torch.arange(N))
        else:
            loss = harmonic_loss(states, w, torch.arange(N), name, reduction=reduction).mean()
        with torch.autocast("cpu", torch.bfloat16):
            return torch.autograd.grad(loss, w, create_graph=create_graph)[0]

    one, two = gradient(True), gradient(False)
    assert (one - two).abs().max() < 1e-4 * two.abs().max()


@pytest.mark.parametrize("name", HEADS)
def test_transforms_of_torch_func_are_right(name):
    """A tangent through the loss's operator would be 0 without a word. Products in parts are an
    operator of our own, too."""
    h, w = vectors(torch.float32)
    v, y = torch.randn_like(h), torch.arange(N)
    exact = torch.autograd.functional.vjp(lambda h: harmonic_loss(h, w, y, name), h)[1]
    for transform in (
        lambda loss: torch.func.jvp(loss, (h,), (v,))[1],
        lambda loss: (torch.func.grad(loss)(h) * v).sum(),
    ):
        found = transform(lambda h: harmonic_loss(h, w, y, name, precision="split"))
        torch.testing.assert_close(found, (exact * v).sum(), rtol=1e-4, atol=1e-4)


def test_a_strength_that_was_set_is_part_of_the_state():
    one, two = (HarmonicHead(C, V, "euclidean") for _ in range(2))
    assert "strength" not in one.state_dict()  # It is that of the arguments.
    before, default = one.state_dict(), one.exponent
    one.exponent = 7.0
    two.load_state_dict(one.state_dict())
    one.load_state_dict(before)
    assert one.exponent == default
    assert two.exponent == 7.0 and two.scale is None
    two.exponent = "dim"
    assert two.exponent == C
    with pytest.raises(ValueError, match="this head has no scale"):
        two.scale = 3.0
    with pytest.raises(ValueError, match="or one of .*, got 'foo'"):
        two.exponent = "foo"
    prepared, h = two.prepared(), torch.randn(3, C)
    two.link = "softmax"
    torch.testing.assert_close(prepared(h), two(h))


@pytest.mark.parametrize(
    "other", [dict(name="cosine"), dict(link="softmax"), dict(p=3.0), dict(name="cross_entropy")]
)
def test_the_state_of_another_kind_of_head_is_refused(other, tmp_path):
    """Its tensors have the same names and sizes."""
    head = torch.nn.Sequential(HarmonicHead(C, V, "minkowski"))
    torch.save(head.state_dict(), tmp_path / "head.pt")
    state = torch.load(tmp_path / "head.pt")
    torch.nn.Sequential(HarmonicHead(C, V, "minkowski", p=1.5)).load_state_dict(state)  # default
    wrong = torch.nn.Sequential(HarmonicHead(C, V, **{"name": "minkowski"} | other))
    before = wrong[0].weight.clone()
    with pytest.raises(RuntimeError, match="another kind .minkowski, p = 1.5, harmonic link. than"):
        wrong.load_state_dict(state)
    assert torch.equal(wrong[0].weight, before)
    trained, twin = (HarmonicHead(C, V, "mahalanobis", link=k) for k in ("harmonic", "softmax"))
    trained.distance_parameters["factor"].data.add_(1)
    factor = twin.distance_parameters["factor"].clone()
    with pytest.raises(RuntimeError, match="another kind"):
        twin.load_state_dict(trained.state_dict())
    assert torch.equal(twin.distance_parameters["factor"], factor)


def test_loss_is_cross_entropy_of_logits():
    h, w = vectors()
    y = torch.arange(N)
    for name in HEADS:
        for link in LINKS:
            kw = {} if name in CONTROLS else {"link": link}
            torch.testing.assert_close(
                F.cross_entropy(harmonic_logits(h, w, name, **kw), y),
                harmonic_loss(h, w, y, name, **kw),
            )
    torch.testing.assert_close(harmonic_loss(h, w, y, "cross_entropy"), F.cross_entropy(h @ w.T, y))
    cos = F.cosine_similarity(h[:, None], w, dim=-1)
    torch.testing.assert_close(
        harmonic_logits(h, w, "cosine_linear").softmax(-1),
        (1 + cos) / (1 + cos).sum(-1, keepdim=True),
    )
    # the softmax twin of cosine is the normalised softmax
    torch.testing.assert_close(
        harmonic_logits(h, w, "cosine", link="softmax", scale=7.0).log_softmax(-1),
        (7.0 * cos).log_softmax(-1),
        rtol=1e-10,
        atol=1e-10,
    )


def test_any_kind_of_text_is_a_setting():
    """As from a column of NumPy or an enumeration."""

    class Text(str, enum.Enum):  # noqa: UP042 - StrEnum is the third kind
        COSINE, SOFTMAX, MEAN, CHUNKED = "cosine", "softmax", "mean", "chunked"

    h, w, y = torch.randn(3, C), torch.randn(V, C), torch.arange(3)
    plain = {"name": "cosine", "link": "softmax", "reduction": "mean", "impl": "chunked"}
    expected = harmonic_loss(h, w, y, **plain)
    for kind in (Text, np.str_, enum.StrEnum("Same", [v.upper() for v in plain.values()])):
        settings = {key: kind(value) for key, value in plain.items()}
        assert harmonic_loss(h, w, y, **settings, check_finite=np.True_) == expected


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
    if (
        where == "target"
        and link == "harmonic"
        and name in DISTANCES
        and name not in ("chebyshev_smooth", "bray_curtis_normalized")
    ):
        p = harmonic_logits(h[:1], w, name).softmax(-1)[0]
        assert p[0] > 0.99 or name == "hamming_hard"  # an exact match is certain, not uniform


def test_a_nan_is_never_hidden():
    h, w = vectors(torch.float32)
    h[2, 3] = math.nan
    for name in HEADS:
        assert harmonic_logits(h, w, name)[2].isnan().all()
        assert harmonic_loss(
            h, w, torch.zeros(N, dtype=torch.long), name, check_finite=False
        ).isnan()
        with pytest.raises(
            ValueError,
            match=r"h \(13, 37\) has 1 values that are not finite, the first at \(2, 3\)",
        ):
            harmonic_loss(h, w, torch.zeros(N, dtype=torch.long), name)
        with pytest.raises(ValueError, match=r"w \(13, 37\) has 1 values that are not finite"):
            harmonic_loss(w[:N], h, torch.zeros(N, dtype=torch.long), name)


@pytest.mark.parametrize("name", DISTANCES)
def test_margin_bound(name):
    """With rho = d_y / min_{j != y} d_j: p_y >= 1 / (1 + (V-1) rho^n) (theory, item 4), with
    equality when all others are equally far."""
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


def test_default_scale_makes_twins_start_together():
    """The two links give nearly the same distribution for layer-normalised states and small
    prototypes."""
    g = torch.Generator().manual_seed(7)
    h, w = (
        F.layer_norm(torch.randn(50, 64, generator=g), (64,)),
        0.02 * torch.randn(V, 64, generator=g),
    )
    for name in ("euclidean", "manhattan", "chebyshev", "hamming_soft"):
        p, q = (
            harmonic_logits(h, w, name, link=link, exponent="dim").log_softmax(-1) for link in LINKS
        )
        assert (p - q).abs().mean() < 0.2 * (p - p.mean(-1, keepdim=True)).abs().mean(), name
    # n = C over |h| = sqrt(C).
    assert default_scale("euclidean", 64, "dim") == pytest.approx(8, rel=0.05)


def test_kl_to_the_softmax_linearisation():
    """After a LayerNorm and with small prototypes, -C log d is softmax(h.w - |w|^2 / 2); without
    the norm penalty it is not."""
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
        assert found[-1] == pytest.approx(
            (p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-2, abs=1e-6
        )
        dot = (h.double() @ w.T).log_softmax(-1)
        assert found[-1] < 0.2 * (p.exp() * (p - dot)).sum(-1).mean()
    assert 0 <= found[0] < 1e-5 < found[1] < 1e-2
    assert softmax_linearization_kl(h, HarmonicHead(192, 1000, "manhattan")) is None
    assert softmax_linearization_kl(h, HarmonicHead(192, 1000, "euclidean", link="softmax")) is None


def test_memory_of_the_chunked_path_does_not_grow_with_n(monkeypatch):
    """The largest tensor that appears, by torch's own dispatch, stays that of a chunk."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else [out]:
                if isinstance(t, torch.Tensor):
                    Largest.size = max(
                        Largest.size, t.untyped_storage().nbytes() // t.element_size()
                    )
            return out

    monkeypatch.setattr(chunked, "CHUNK", 8 * V)
    monkeypatch.setattr(chunked, "CHUNK_ROWS", 1)
    monkeypatch.setattr(kernels, "BLOCK", 64 * C)
    for name in ("euclidean", "manhattan", "canberra"):
        sizes = []
        for n in (100, 400):
            h, w = vectors(torch.float32, n=n)
            h.requires_grad_(), w.requires_grad_()
            Largest.size = 0
            with Largest():
                harmonic_loss(
                    h, w, torch.zeros(n, dtype=torch.long), name, impl="chunked"
                ).backward()
            sizes.append(Largest.size)
        # h and its gradient are the only things that grow.
        assert sizes[1] <= max(400 * C, sizes[0]), (name, sizes)
        assert sizes[1] < 400 * V


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda h, w, y: harmonic_loss(h, w, y, "manhatan"), "did you mean 'manhattan'"),
        (
            lambda h, w, y: harmonic_loss(h, w[:, :-1], y, "manhattan"),
            r"\(13, 37\) and \(103, 36\)",
        ),
        (lambda h, w, y: harmonic_loss(h, w, y + V, "manhattan"), "target 103 is outside"),
        (
            lambda h, w, y: harmonic_loss(h, w, y[1:], "manhattan"),
            r"targets \(12,\) do not match h \(13, 37\)",
        ),
        (
            lambda h, w, y: harmonic_loss(h, w, y, "manhattan", exponent=0.0),
            "exponent must be a positive number",
        ),
        (lambda h, w, y: harmonic_loss(h, w, y, "manhattan", exponent="dims"), "'dims'"),
        (
            lambda h, w, y: harmonic_loss(h, w, y, "cosine", link="softmax", scale=-1.0),
            "scale must be a positive number",
        ),
        (lambda h, w, y: harmonic_loss(h, w, y, "cosine", link="soft"), "unknown link 'soft'"),
        (lambda h, w, y: harmonic_loss(h, w, y, "minkowski", p=0.0), "p must be positive"),
        (
            lambda h, w, y: harmonic_loss(h, w, y, "manhattan", p=2.0),
            "manhattan has no setting 'p'",
        ),
        (lambda h, w, y: harmonic_loss(h, w, y, "manhattan", impl="fast"), "unknown impl 'fast'"),
        (
            lambda h, w, y: harmonic_loss(h, w, y, "manhattan", reduction="max"),
            "unknown reduction 'max'",
        ),
        (lambda h, w, y: harmonic_loss(h.long(), w, y, "manhattan"), "torch.int64"),
        (
            lambda h, w, y: harmonic_loss(h, w.long(), y, "manhattan"),
            r"torch.int64 of shape \(103, 37\)",
        ),
        (
            lambda h, w, y: harmonic_loss(h, w, y.float(), "manhattan"),
            r"targets \(13,\) must be integers, got torch.float32",
        ),
        (
            lambda h, w, y: harmonic_loss(h, w[0], y, "manhattan"),
            r"w \(37,\) is not a table of prototypes",
        ),
        (lambda h, w, y: harmonic_loss(h, w[:0], y, "manhattan"), r"w \(0, 37\)"),
        (lambda h, w, y: harmonic_loss(h.to("meta"), w, y, "manhattan"), "is on meta"),
        (
            lambda h, w, y: harmonic_loss(h, w, y.to("meta"), "manhattan"),
            r"targets \(13,\) on meta",
        ),
        (
            lambda h, w, y: harmonic_loss(h, w, y, "manhattan", skip=-1.0),
            r"skip must be in \[0, 1\), got -1.0",
        ),
        (lambda h, w, y: harmonic_loss(h, w, y, "manhattan", impl="triton"), "needs CUDA"),
        (
            lambda h, w, y: harmonic_loss(h.double(), w, y, "manhattan", impl="numba"),
            "needs a CPU and float32",
        ),
        (
            lambda h, w, y: harmonic_loss(h, w, y, "minkowski", p="two"),
            "p must be a positive number",
        ),
        (
            lambda h, w, y: harmonic_loss(h, w, y, "cosine", exponent=torch.ones(2)),
            r"a tensor \(2,\)",
        ),
        (lambda h, w, y: harmonic_loss(h, w, y, "manhattan", bias=torch.zeros(V)), "takes no bias"),
        (
            lambda h, w, y: harmonic_loss(h, w, y, "cross_entropy", bias=torch.zeros(9)),
            r"bias \(9,\)",
        ),
        (
            lambda h, w, y: harmonic_logits(h, w, "cross_entropy", bias=torch.zeros(9)),
            r"bias \(9,\)",
        ),
        (lambda h, w, y: HarmonicHead(C, V, "cosine", scale=3.0), "link=softmax"),
        (lambda h, w, y: HarmonicHead(C, V, "cosine", impl="cuda"), "unknown impl 'cuda'"),
        (lambda h, w, y: HarmonicHead(C, V, "cosine", skip=3.0), r"skip must be in \[0, 1\)"),
        (lambda h, w, y: HarmonicHead(C, 0, "cosine"), "0 prototypes"),
        (lambda h, w, y: HarmonicHead(C, V, init_std=-1.0), "init_std must be a finite number"),
        (
            lambda h, w, y: HarmonicHead(C, V, "cosine").set_strength(-3),
            "must be a positive number",
        ),
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
    for h, y in (
        (torch.randn(0, C), torch.zeros(0, dtype=torch.long)),
        (torch.randn(N, C), torch.full((N,), IGNORE_INDEX)),
    ):
        for impl in ("auto", "dense", "chunked"):
            head.impl = impl
            for reduction in ("mean", "sum", "none"):
                h.grad, _ = None, h.requires_grad_()
                head.zero_grad()
                loss = head.loss(h, y, reduction=reduction)
                assert loss.shape == (y.shape if reduction == "none" else ()) and not loss.any()
                loss.sum().backward()
                assert not h.grad.any() and all(
                    p.grad is not None and not p.grad.any() for p in head.parameters()
                )
    assert head(torch.randn(0, C)).shape == (0, V)


@pytest.mark.parametrize("impl", ["dense", "chunked", "numba"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_target_that_is_no_token_is_never_a_plausible_number(impl, reduction, monkeypatch):
    """Where no check of values may wait for the device, as on CUDA. -1 is no token, too."""
    monkeypatch.setattr(autograd, "check_values", lambda *_: True)
    h, w = vectors(torch.float32)
    targets = torch.arange(N)
    targets[2] = IGNORE_INDEX
    for bad in (-1, -101, V, 2**40):
        targets[5] = bad
        loss = harmonic_loss(
            h,
            w.requires_grad_(),
            targets,
            "manhattan",
            exponent=9.0,
            impl=impl,
            reduction=reduction,
        )
        assert (
            loss[5].isnan() and loss[4].isfinite() and loss[2] == 0
            if reduction == "none"
            else loss.isnan()
        )
        assert torch.autograd.grad(loss.sum(), w)[0].isnan().any()


@pytest.mark.parametrize("impl", ["chunked", "numba"])
def test_strange_input_is_never_hidden_and_never_spreads(impl):
    losses_of_strange_input(impl)


@pytest.mark.parametrize("name", ["euclidean", "student_t", "manhattan"])
@pytest.mark.parametrize("impl", ["dense", "chunked"])
def test_a_large_exponent_costs_no_digits(name, impl):
    """Logits of -10,000 have three digits after the point in float32."""
    h = F.layer_norm(vectors(torch.float32)[0], (C,))
    w, targets = 0.02 * vectors()[1].float(), torch.arange(N)
    how = dict(exponent=4000.0, impl=impl, reduction="none")
    exact = harmonic_loss(h.double(), w.double(), targets, name, **how)
    found = harmonic_loss(h, w, targets, name, **how)
    assert (found - exact).abs().max() < 4e-4


def test_an_overflow_is_nan():
    h, w = 1e9 * torch.randn(4, 8), torch.randn(9, 8)
    for impl in ("numba", "chunked"):
        x = h.clone().requires_grad_()
        loss = harmonic_loss(x, w, torch.arange(4), "minkowski", p=6.0, impl=impl)
        loss.backward()
        assert loss.isnan() and x.grad.isnan().any()


def test_hamming_gumbel_is_noisy_only_while_training():
    h, w = vectors()

    def logits(name, **kw):
        return harmonic_logits(h, w, name, exponent=5.0, **kw)

    assert torch.equal(logits("hamming_gumbel"), logits("hamming_soft"))
    assert not torch.equal(
        logits("hamming_gumbel", training=True), logits("hamming_gumbel", training=True)
    )


def test_numbers_of_other_libraries_are_numbers():
    """NumPy's scalars and 0-dim tensors, as options and as settings of the loss."""
    import numpy as np

    h, w = vectors(torch.float32)
    y = torch.arange(N)
    expected = harmonic_loss(h, w, y, "minkowski", p=3.0, exponent=8.0, skip=1e-6)
    for number in (np.float64, np.float32, torch.tensor):
        settings = {"p": number(3.0), "exponent": number(8.0), "skip": np.float64(1e-6)}
        assert torch.equal(harmonic_loss(h, w, y, "minkowski", **settings), expected)
    bias = torch.randn(V)
    lower = harmonic_loss(h, w, y, "cross_entropy", bias=bias.bfloat16())
    torch.testing.assert_close(
        lower, harmonic_loss(h, w, y, "cross_entropy", bias=bias.bfloat16().float())
    )
