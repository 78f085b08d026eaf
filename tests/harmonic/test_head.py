"""HarmonicHead as a module: padding, casts, trained parameters, and what it says of itself."""

import pytest
import torch
import torch.nn.functional as F
from head_cases import LINKS, C, N, V
from torch.nn.utils import prune, spectral_norm

from harmonic import (
    CONTROLS,
    DISTANCES,
    HEADS,
    HarmonicHead,
    harmonic_logits,
    harmonic_loss,
    match,
)


@pytest.mark.parametrize("name", HEADS)
def test_a_padded_head_equals_one_without_padding(name):
    """In its loss, its gradients, and whatever is done with its logits: a row of padding has
    none."""
    torch.manual_seed(0)
    plain, padded = (
        HarmonicHead(C, V, name).eval(),
        HarmonicHead(C, 128, name, real_vocab_size=V).eval(),
    )
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
            torch.autograd.grad(u[key].sum(), head.weight, retain_graph=True)[0]
            for u, head in ((found, padded), (expected, plain))
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


@pytest.mark.parametrize("name", ["mahalanobis", "mahalanobis_diagonal", "mahalanobis_cholesky"])
def test_mahalanobis_parameters_train(name):
    torch.manual_seed(0)
    head = HarmonicHead(C, V, name)
    start = {k: p.clone() for k, p in head.named_parameters()}
    h = torch.randn(N, C)
    # P = I at first.
    torch.testing.assert_close(
        head(h), harmonic_logits(h, head.weight, "euclidean"), rtol=1e-4, atol=1e-3
    )
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
        assert head.strength.item() == pytest.approx(fixed.strength, rel=1e-6)
        head.loss(h, y).backward()
        assert head.log_strength.grad.abs() > 0


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("link", LINKS)
def test_a_head_is_made_again_from_its_configuration(name, link):
    options = (
        {}
        if name in CONTROLS
        else {"link": link, "learn_scale" if link == "softmax" else "learn_exponent": True}
    )
    head = HarmonicHead(C, 128, name, real_vocab_size=V, impl="chunked", **options).eval()
    again = HarmonicHead.from_config(head.config()).eval()
    again.load_state_dict(head.state_dict())
    h = torch.randn(N, C)
    assert (
        torch.equal(again(h), head(h))
        and again.config() == head.config()
        and repr(again) == repr(head)
    )
    more = head.rebuild(200)
    assert more(h).shape == (N, 200) and more.describe() == head.describe()


def test_the_distance_to_the_target_is_that_of_a_token():
    """Padding is no token, and neither is a label that is to be ignored."""
    head = HarmonicHead(C, V + 4, "manhattan", real_vocab_size=V)
    h, y = torch.randn(4, C), torch.tensor([0, V - 1, V, -100])
    found = head.target_distance(h, y)
    expected = (h[:2] - head.prototypes()[y[:2]]).double().abs().sum(-1)
    torch.testing.assert_close(found[:2].double(), expected, rtol=1e-5, atol=0)
    assert found.isnan().tolist() == [False, False, True, True]
    assert HarmonicHead(C, V, "cross_entropy").target_distance(h, y) is None


def test_a_head_says_what_it_is():
    heads = [
        HarmonicHead(64, V, "minkowski", p=2.0),
        HarmonicHead(64, V, "cosine", link="softmax", scale=3),
        HarmonicHead(64, V, "cross_entropy"),
    ]
    assert [head.describe() for head in heads] == [
        "minkowski, p = 2, harmonic link, n = 256",
        "cosine, softmax link, s = 3",
        "cross_entropy",
    ]
    assert [head.is_harmonic for head in heads] == [True, False, False] and [
        head.is_control for head in heads
    ] == [False, False, True]
    assert [head.strength_name for head in heads] == ["exponent", "scale", None] and heads[
        0
    ].distance is DISTANCES["euclidean"]


def test_a_zero_prototype_of_stablemax_learns():
    """sign(x) log(1 + |x|) has slope 1 at 0."""
    h, w = torch.tensor([[1.0, -2.0]]).double(), torch.zeros(3, 2).double().requires_grad_()
    harmonic_loss(h, w, torch.tensor([1]), "stablemax").backward()
    torch.testing.assert_close(w.grad, torch.tensor([[1.0], [-2.0], [1.0]]).double() / 3 * h)


@pytest.mark.parametrize(
    ("link", "factor"), [("harmonic", 2.0), ("softmax", 2**0.5)], ids=["harmonic", "softmax"]
)
def test_matching_a_root_of_cosine_is_matching_cosine(link, factor):
    """-n log d is the same for 1 - cos and, at twice the n, for |h/|h| - w/|w||; so are the matched
    prototypes and their KL. The softmax link has the same slopes at the typical distance."""
    torch.manual_seed(0)
    states, weight = torch.randn(400, 32), 0.1 * torch.randn(60, 32)
    strength = "exponent" if link == "harmonic" else "scale"
    cosine, root = (
        HarmonicHead(32, 60, name, link=link, **{strength: 64.0 * by})
        for name, by in (("cosine", 1.0), ("euclidean_normalized", factor))
    )
    kl, kl_of_root = (match(head, states, weight) for head in (cosine, root))
    assert kl < 1e-2
    assert kl_of_root == pytest.approx(kl, rel=1e-3 if link == "harmonic" else 0.5)


def test_matching_a_control_fits_its_scale():
    torch.manual_seed(0)
    states, weight = 3 * F.normalize(torch.randn(400, 16), dim=-1), torch.randn(60, 16)
    assert match(HarmonicHead(16, 60, "cosine_scaled"), states, weight) < 1e-2


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
def test_another_default_dtype_changes_nothing_of_a_float32_head(dtype):
    """transformers sets the default dtype while it builds a model."""

    def made():
        torch.manual_seed(0)
        made = HarmonicHead(768, 5, "euclidean", learn_exponent=True)
        return made, HarmonicHead(64, 5, "cosine", link="softmax").scale

    expected, scale = made()
    h, targets = torch.randn(3, 768), torch.arange(3)
    loss = expected.loss(h, targets)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        found, other_scale = made()
        assert other_scale == scale
        assert found.exponent.item() == pytest.approx(3072, rel=1e-6)
        assert found.weight.dtype == torch.promote_types(dtype, torch.float32)
        assert torch.equal(expected.loss(h, targets), loss)  # of a head made before
    finally:
        torch.set_default_dtype(before)


def test_a_trained_strength_without_a_value_and_one_that_was_set():
    with torch.device("meta"):
        empty = HarmonicHead(8, 20, "euclidean", learn_exponent=True)
    assert "n = 32" in repr(empty) and empty.config()["exponent"] == 32
    assert empty(torch.randn(3, 8, device="meta")).shape == (3, 20)
    fixed = HarmonicHead(8, 20, "euclidean", exponent=4.0)
    fixed.exponent = 9.0
    learning = HarmonicHead(8, 20, "euclidean", learn_exponent=True)
    learning.load_state_dict(fixed.state_dict())
    assert learning.exponent.item() == pytest.approx(9)


@pytest.mark.parametrize("name", ["euclidean", "cross_entropy"])
@pytest.mark.parametrize("prepare", [prune.RandomUnstructured.apply, spectral_norm])
def test_the_loss_is_of_the_weight_that_hooks_prepare(name, prepare):
    """... as the logits are, also after a step of an optimiser."""
    torch.manual_seed(0)
    head = HarmonicHead(C, V, name)
    prepare(head, "weight", *([0.5] if prepare is not spectral_norm else []))
    h, y = torch.randn(N, C), torch.randint(0, V, (N,))
    head.loss(h, y).backward()
    torch.optim.SGD(head.parameters(), lr=1.0).step()
    head.eval()
    loss = head.loss(h, y)  # before the logits, whose hooks would prepare the weight
    torch.testing.assert_close(loss, F.cross_entropy(head(h), y))
    assert torch.equal(loss, head(h, y)) and head(h, y, reduction="none").shape == (N,)
    head.register_forward_pre_hook(lambda _, inputs: (2 * inputs[0],))
    torch.testing.assert_close(head.loss(h, y), F.cross_entropy(head(h), y))
    with pytest.raises(ValueError, match="a loss needs targets"):
        head.loss(h, None)


@pytest.mark.parametrize("name", ["cosine", "mahalanobis", "cross_entropy"])
def test_parameters_of_a_head_from_the_meta_device_are_reset(name):
    settings = {"bias": True} if name == "cross_entropy" else {"learn_exponent": True}
    torch.manual_seed(0)
    expected = HarmonicHead(C, V, name, init_std=0.5, **settings).state_dict()
    with torch.device("meta"):
        head = HarmonicHead(C, V, name, init_std=0.5, **settings)
    head.to_empty(device="cpu")
    for p in head.parameters():
        p.data.fill_(torch.nan)
    torch.manual_seed(0)
    head.reset_parameters()
    for key, value in head.state_dict().items():
        assert torch.equal(value, expected[key]), key


def test_torch_func_works_for_a_large_table_too():
    head = HarmonicHead(128, 8192, "cosine")  # large enough for a compiled map
    h, targets = torch.randn(2, 128), torch.tensor([3, 5])
    x = h.clone().requires_grad_()
    head.loss(x, targets).backward()
    found = torch.func.grad(lambda h: head.loss(h, targets))(h)
    torch.testing.assert_close(found, x.grad, rtol=1e-4, atol=1e-6)


def test_a_state_brings_its_n_and_what_does_not_fit_is_refused(tmp_path):
    head = HarmonicHead(C, V, "minkowski", exponent=8.0, p=4.0)
    torch.save(head.state_dict(), tmp_path / "head.pt")
    again = HarmonicHead(C, V, "minkowski", exponent=64.0, p=4.0)
    again.load_state_dict(torch.load(tmp_path / "head.pt"))
    h = torch.randn(N, C)
    assert again.exponent == 8 and torch.equal(again(h), head(h))
    for shape in ((V - 1, C), (V, C + 1)):
        with pytest.raises(ValueError, match=f"a table of {shape[0]} x {shape[1]} does not fit"):
            head.weight = torch.nn.Parameter(torch.zeros(shape))
    head.weight = torch.nn.Parameter(torch.randn(V + 3, C))  # The rest is padding.
    assert head(h).shape == (N, V) and f"(padded to {V + 3})" in repr(head)
    for key, value in (("p", 3.0), ("a", 1.0), ("name", "manhattan"), ("n", 20.0), ("s", 2.0)):
        with pytest.raises(AttributeError, match=f"{key} cannot be set later|head.exponent"):
            setattr(head, key, value)
    # A state that does not fit changes nothing, and one of pruned prototypes has its n.
    with pytest.raises(RuntimeError, match="size mismatch"):
        HarmonicHead(C, V, "minkowski", exponent=2.0, p=4.0).load_state_dict(head.state_dict())
    small = HarmonicHead(C, V - 1, "minkowski", exponent=2.0, p=4.0)
    with pytest.raises(RuntimeError, match="size mismatch"):
        small.load_state_dict(again.state_dict())
    assert small.exponent == 2
    pruned = [HarmonicHead(C, V, "cosine", exponent=n) for n in (4.0, 9.0)]
    for one in pruned:
        prune.l1_unstructured(one, "weight", 0.5)
    pruned[1].load_state_dict(pruned[0].state_dict())
    assert pruned[1].exponent == 4
    for wrong, meant in (("n", "exponent"), ("s", "exponent"), ("head", "name")):
        with pytest.raises(ValueError, match=f"no setting '{wrong}'; did you mean {meant}"):
            HarmonicHead(C, V, **{wrong: 8})
