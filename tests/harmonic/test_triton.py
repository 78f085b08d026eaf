"""The Triton kernels against float64, on a GPU where there is one and in Triton's interpreter
anywhere; and that every one compiles.

The interpreter is chosen by an environment variable before Triton is imported, so
`test_in_the_interpreter` runs this file's other tests in a process of its own.
"""

import csv
import os
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, script
from head_cases import losses_of_strange_input

pytest.importorskip("triton")

from harmonic import kernels  # noqa: E402
from harmonic.backends import triton as gpu  # noqa: E402
from harmonic.precision import FLOAT32, SPLIT, Products  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
runs = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(),
    reason="no GPU; test_in_the_interpreter runs it without one",
)
SPILLED = 16  # bytes a thread
compiles = pytest.mark.skipif(INTERPRETED, reason="nothing is compiled in the interpreter")


class Epilogue:
    def __init__(self, kernel, options=None, link="harmonic", factor=0.5, root=1.0, floor=1e-3):
        self.kernel, self.options, self.link, self.factor, self.root, self.floor = (
            kernel,
            options or {},
            link,
            factor,
            root,
            floor,
        )

    def __repr__(self):
        return "-".join([self.kernel, *(f"{k}{v:g}" for k, v in self.options.items()), self.link])


KERNELS = [
    ("l2", {}, 0.5),
    ("linf", {}, 1.0),
    ("lse", {"a": 10.0}, 1.0),
    ("canberra", {}, 1.0),
    ("canberra", {"floor": 1.0}, 1.0),
]
KERNELS += [("lp", {"p": p}, 1 / p) for p in (0.5, 1.0, 1.5, 2.0, 2.5, 3.0)]
EPILOGUES = [
    Epilogue(k, o, link, root=root) for k, o, root in KERNELS for link in ("harmonic", "softmax")
]
EPILOGUES += [Epilogue("dot", link="control", factor=1.0)]
# A kernel that is new: with its defaults.
NEW = {k for k in kernels.KERNELS if gpu._find(Epilogue(k))} - {e.kernel for e in EPILOGUES}
EPILOGUES += [Epilogue(k, link=link) for k in sorted(NEW) for link in ("harmonic", "softmax")]
ONE_LINK = [e for e in EPILOGUES if e.link != "softmax"]


def in_turn(rows, columns):
    """Arguments of every row with one of the columns in turn; the other pairs are slow tests."""
    return [
        pytest.param(row, column, marks=[] if (i + j) % len(columns) == 0 else pytest.mark.slow)
        for i, row in enumerate(rows)
        for j, column in enumerate(columns)
    ]


def arguments(epilogue, n=13, v=37, c=21, terms=False, strength=None, seed=0):
    """What `gpu.run` takes, up to the epilogue. terms: signed, so that some denominators reach the
    floor; a control gets a bias."""
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(n, c, generator=g) + 0.3, 0.7 * torch.randn(v, c, generator=g) + 0.2
    u, bias = 0.1 * torch.randn(n, generator=g), 0.1 * torch.randn(v, generator=g)
    second = -u[torch.arange(v) % n] + torch.where(torch.arange(v) % 3 > 0, 1.0, 1e-4)
    weight = torch.rand(n, generator=g)
    weight[1:2] = 0
    control = epilogue.link == "control"
    u, second = (u, second) if terms and not control else (None, None)
    strength = strength or (28.0 if epilogue.link == "harmonic" else 0.5)
    made = (
        x,
        y,
        u,
        second,
        torch.tensor(strength),
        bias if terms and control else None,
        torch.randint(v, (n,), generator=g),
        weight,
    )
    return tuple(t if t is None else t.to(DEVICE) for t in made)


def dense_loss(dtype, inputs, epilogue):
    """The same in plain PyTorch: in float32 as kernels.py does it, in float64 from the kernel's
    formula above the float32 floor."""
    x, y, u, v, strength, bias, targets, weight = inputs
    leaves = [
        t if t is None else t.detach().to(dtype).requires_grad_()
        for t in (x, y, u, v, strength, bias)
    ]
    h, w, a, b, n, c = leaves
    if dtype == torch.float32:
        raw = kernels.pairs(h, w, epilogue.kernel, epilogue.options)
    else:
        raw = kernels.KERNELS[epilogue.kernel].value(h[:, None], w, **epilogue.options)
        if epilogue.kernel != "dot":
            low = [kernels.floor(epilogue.kernel, t, **epilogue.options).double() for t in (x, y)]
            raw = kernels.above(raw, low[0][:, None] + low[1])
    if epilogue.link == "control":
        logits = raw if c is None else raw + c
    else:
        log_d = epilogue.root * (epilogue.factor * raw).log()
        if a is not None:
            log_d = log_d - (a[:, None] + b).abs().clamp_min(epilogue.floor).log()
        logits = -n * (log_d if epilogue.link == "harmonic" else log_d.exp())
    losses = F.cross_entropy(logits, targets, reduction="none")
    gradients = iter(
        torch.autograd.grad(
            losses, [t for t in leaves if t is not None], weight.to(dtype), allow_unused=True
        )
    )
    return losses.detach(), [t if t is None else next(gradients) for t in leaves]


def compare(inputs, epilogue):
    """Losses and gradients are as near to float64 as kernels.py's own in float32, and 1e-5 of the
    largest."""
    losses, gradients = gpu.run(*inputs, epilogue, True)
    truth, naive = (dense_loss(dtype, inputs, epilogue) for dtype in (torch.float64, torch.float32))
    names = ("losses", "x", "y", "u", "v", "strength", "bias")
    for name, ours, exact, plain in zip(
        names, (losses, *gradients), (truth[0], *truth[1]), (naive[0], *naive[1])
    ):
        if exact is None:  # of a control's strength
            assert ours is None or not ours.any(), name
            continue
        size = exact.abs().max()
        allowed = (plain - exact).abs().max() / size + 1e-5
        assert (ours - exact).abs().max() / size <= allowed, f"{name} of {epilogue}"
    return losses, gradients


@runs
@pytest.mark.parametrize(
    ("epilogue", "terms"),
    [
        *in_turn([e for e in EPILOGUES if e.link == "harmonic"], [True, False]),
        *in_turn([e for e in EPILOGUES if e.link != "harmonic"], [False, True]),
    ],
    ids=repr,
)
def test_losses_and_gradients(epilogue, terms):
    inputs = arguments(epilogue, terms=terms)
    losses, gradients = compare(inputs, epilogue)
    assert not gradients[0][1].any()  # an ignored row
    assert [g is None for g in gradients] == [t is None for t in inputs[:6]]
    again, none = gpu.run(*inputs, epilogue, False)
    assert torch.equal(losses, again) and none == (None,) * 6


@runs
@pytest.mark.parametrize("kernel", ["l2", "lp", "linf", "dot"])
def test_frozen_prototypes_get_no_gradient(kernel):
    epilogue = next(e for e in EPILOGUES if e.kernel == kernel)
    inputs = arguments(epilogue)
    _, gradients = gpu.run(*inputs, epilogue, True)
    _, found = gpu.run(*inputs, epilogue, True, frozen=True)
    assert found[1] is None and torch.equal(found[0], gradients[0])


@runs
@pytest.mark.parametrize(
    "epilogue",
    # The powers differ in their terms only, which test_losses_and_gradients compares.
    [
        pytest.param(
            e, marks=pytest.mark.slow if e.kernel == "lp" and e.options.get("p") != 2.5 else []
        )
        for e in ONE_LINK
    ],
    ids=repr,
)
def test_blocks_and_chunks(epilogue, monkeypatch):
    """Several blocks each way, none of them full, and several chunks, the last of them short; the
    terms of one, the bias of the other."""
    monkeypatch.setattr(gpu, "BLOCK", 16)
    monkeypatch.setattr(gpu, "CHUNK", 16 * 35)
    compare(arguments(epilogue, 21, 35, 19, terms=epilogue.kernel in ("lp", "dot")), epilogue)


@runs
@pytest.mark.parametrize("epilogue", [Epilogue("l2", root=0.5), Epilogue("lp")], ids=repr)
def test_large_exponent(epilogue):
    compare(arguments(epilogue, 5, 40, 96, strength=768.0), epilogue)


@runs
@pytest.mark.parametrize(
    "epilogue", [Epilogue("l2", root=0.5), Epilogue("lp", {"p": 8.0}, root=1 / 8)], ids=repr
)
def test_a_prototype_infinitely_nearer_than_the_rest(epilogue):
    """A state of zeros on a prototype of zeros: the floor is the smallest number, and the ratio to
    the others overflows."""
    x, y, *others = arguments(epilogue, strength=2.0)
    x[0] = y[4] = 0
    targets = others[4]
    targets[0] = 4
    losses, gradients = compare((x, y, *others), epilogue)
    assert losses[0] == 0 and all(g is None or g.isfinite().all() for g in gradients)


@runs
@pytest.mark.parametrize("link", ["harmonic", "softmax"])
def test_rows_on_prototypes(link, monkeypatch):
    """l2 by a matrix product cancels there; one row is exactly on a prototype: on the floor, where
    there is no gradient."""
    monkeypatch.setattr(gpu, "BLOCK", 16)  # some blocks have near pairs, some do not
    epilogue = Epilogue("l2", link=link, root=0.5)
    x, y, *others = arguments(epilogue, 20, 40, 33, strength=3.0)
    x[0], x[2], x[18] = y[3] + 1e-4 * x[0], y[20] + 1e-2 * x[2], y[39]
    _, (dx, *_) = compare((x, y, *others), epilogue)
    row = dense_loss(torch.float64, (x, y, *others), epilogue)[1][0]
    for i in (0, 2):
        assert (dx[i] - row[i]).abs().max() <= 1e-5 * row[i].abs().max()


@runs
@pytest.mark.parametrize(
    "epilogue", [e for e in EPILOGUES if e.link == "harmonic" and e.kernel != "linf"], ids=repr
)
def test_equal_coordinates_and_zeros(epilogue):
    """Whole numbers: signs of zero, 0/0 of canberra and its floor, exactly as autograd has them."""
    x, y, *others = arguments(epilogue, 7, 11, 9)
    compare((x.round(), y.round(), *others), epilogue)


MATMULS = [
    Epilogue("l2", root=0.5),
    Epilogue("l2", link="softmax", root=0.5),
    Epilogue("dot", link="control", factor=1.0),
]


def near_some(x, y):
    """Moves two states almost onto prototypes, so that some blocks of l2 are marked near and others
    are not."""
    x[2], x[18] = y[3] + 1e-2 * x[2], y[39] + 1e-2 * x[18]


@runs
@pytest.mark.parametrize("epilogue", MATMULS, ids=repr)
def test_split_products(epilogue, monkeypatch):
    """Losses as exact as float32's, gradients to 16 bits; rows of very different sizes, several
    chunks and blocks."""
    monkeypatch.setattr(gpu, "BLOCK", 16)
    monkeypatch.setattr(gpu, "CHUNK", 16 * 70)
    x, y, *others = arguments(epilogue, 37, 70, 33, terms=True)
    near_some(x, y)
    y[5] *= 1e-6
    if epilogue.kernel == "dot":
        x[7], y[9] = 1e4 * x[7], 1e-4 * y[9]
    losses, gradients = gpu.run(x, y, *others, epilogue, True, SPLIT)
    exact, naive = (
        dense_loss(dtype, (x, y, *others), epilogue) for dtype in (torch.float64, torch.float32)
    )
    allowed = 3 * (naive[0] - exact[0]).abs() + 3e-6 * exact[0].abs().clamp_min(1)
    assert ((losses - exact[0]).abs() <= allowed).all()
    for ours, truth in zip(gradients, exact[1], strict=True):
        if ours is not None and truth is not None:
            assert (ours - truth).abs().max() <= 5e-5 * truth.abs().max()
    assert torch.equal(losses, gpu.run(x, y, *others, epilogue, False, SPLIT)[0])


@runs
@pytest.mark.parametrize("epilogue", MATMULS[::2], ids=repr)
def test_products_in_bfloat16(epilogue, monkeypatch):
    """Operands that bfloat16 holds: only the slopes are rounded, so the losses are as good as
    ever."""
    # As CUDA does it: a CPU rounds the result, too.
    monkeypatch.setattr(Products, "multiply", lambda self, a, b: a.float() @ b.float())
    monkeypatch.setattr(gpu, "BLOCK", 16)
    x, y, *others = arguments(epilogue, 21, 70, 33)
    near_some(x, y)
    x, y = (t.bfloat16().float() for t in (x, y))
    losses, gradients = gpu.run(
        x, y, *others, epilogue, True, Products("autocast", torch.bfloat16, torch.bfloat16)
    )
    exact, naive = (
        dense_loss(dtype, (x, y, *others), epilogue) for dtype in (torch.float64, torch.float32)
    )
    assert (losses - exact[0]).abs().max() <= (naive[0] - exact[0]).abs().max() + 1e-5 * exact[
        0
    ].abs().max()
    for ours, truth in zip(gradients[:2], exact[1], strict=False):
        error = (ours - truth).abs().max() / truth.abs().max()
        assert 1e-7 < error < 1e-2


@runs
@pytest.mark.parametrize("products", [FLOAT32, SPLIT], ids=["float32", "split"])
def test_an_offset_that_all_vectors_share(products, monkeypatch):
    """l2 does not depend on it; inner products of vectors a hundred times as long would lose the
    distances."""
    monkeypatch.setattr(gpu, "BLOCK", 16)
    epilogue = Epilogue("l2", root=0.5)
    x, y, *others = arguments(epilogue, 20, 40, 33)
    x, y = x + 100, y + 100
    losses, gradients = gpu.run(x, y, *others, epilogue, True, products)
    exact = dense_loss(torch.float64, (x, y, *others), epilogue)
    assert (losses - exact[0]).abs().max() < 1e-4
    for ours, truth in zip(gradients[:2], exact[1], strict=False):
        assert (ours - truth).abs().max() <= 1e-4 * truth.abs().max()


@runs
def test_unit_vectors():
    """As in float64, at lengths whose squares over- and underflow; zeros stay zeros, a NaN stays in
    its row."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(7, 37, generator=g).to(DEVICE)
    x[1] *= 1e25
    x[2] *= 1e-25
    x[3] = 0
    slope = torch.randn(7, 37, generator=g).to(DEVICE)
    leaf, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    unit, truth = gpu.Unit.apply(leaf), F.normalize(exact, dim=-1, eps=1e-300)
    (found,), (expected,) = (
        torch.autograd.grad(unit, leaf, slope, retain_graph=True),
        torch.autograd.grad(truth, exact, slope.double(), retain_graph=True),
    )
    assert (unit - truth).abs().max() < 2e-7
    others = torch.arange(7) != 3
    assert ((found - expected).norm(dim=1) <= 1e-6 * expected.norm(dim=1))[
        others
    ].all() and torch.equal(found[3], slope[3])
    unit, truth = (
        torch.autograd.grad(
            torch.autograd.grad(y, x, s, create_graph=True)[0][0].square().sum(), x
        )[0][0]
        for y, x, s in ((unit, leaf, slope), (truth, exact, slope.double()))
    )
    assert (unit - truth).norm() <= 1e-5 * truth.norm()
    x[5, 4] = torch.nan
    assert gpu.Unit.apply(x).isnan().any(1).tolist() == [False] * 5 + [True, False]


@runs
def test_linf_ties():
    """One of the coordinates that attain the maximum has the whole gradient."""
    epilogue = Epilogue("linf")
    x, y, *others = arguments(epilogue, 1, 2, 5, strength=3.0)
    x[:], y[0], y[1] = 0, 1, 2
    _, (dx, dy, *_) = gpu.run(x, y, *others, epilogue, True)
    exact = dense_loss(torch.float64, (x, y, *others), epilogue)[1]
    assert ((dy != 0).sum(1) == 1).all()
    torch.testing.assert_close(dy.sum(1).double(), exact[1].sum(1))
    torch.testing.assert_close(dx.sum().double(), exact[0].sum())


@runs
@pytest.mark.parametrize(
    "epilogue",
    [pytest.param(e, marks=pytest.mark.slow if e.link == "softmax" else []) for e in EPILOGUES],
    ids=repr,
)
def test_nan_is_not_hidden(epilogue):
    x, y, *others = arguments(epilogue, 5, 9, 6)
    x[2, 3] = torch.nan
    losses, (dx, dy, *_) = gpu.run(x, y, *others, epilogue, True)
    assert losses.isnan().tolist() == [False, False, True, False, False]
    assert dx[2].isnan().any() and dx[0].isfinite().all() and dy.isnan().any(1).all()
    x, y, *others = arguments(epilogue, 5, 9, 6)
    y[4, 0] = torch.nan
    assert gpu.run(x, y, *others, epilogue, False)[0].isnan().all()


@runs
def test_a_target_that_is_no_prototype():
    x, y, u, v, strength, bias, targets, weight = arguments(Epilogue("lp"), 5)
    targets[1:4] = torch.tensor([-5, 37, 1037])
    losses, _ = gpu.run(x, y, u, v, strength, bias, targets, weight, Epilogue("lp"), True)
    assert losses.isnan().tolist() == [False, True, True, True, False]


@runs
def test_strange_input_is_never_hidden_and_never_spreads():
    losses_of_strange_input("triton", DEVICE)


@runs
def test_no_rows():
    epilogue = Epilogue("lp")
    x, y, u, v, strength, bias, targets, weight = arguments(epilogue)
    losses, (dx, dy, *_) = gpu.run(
        x[:0], y, u, v, strength, bias, targets[:0], weight[:0], epilogue, True
    )
    assert losses.shape == (0,) and dx.shape == (0, 21) and not dy.any()


def test_supports():
    assert all(gpu._find(e) for e in EPILOGUES)
    for kernel, options in (
        ("canberra", {"q": 1.0}),
        ("canberra", {"weighted": True}),
        ("l2", {"p": 2.0}),
        ("other", {}),
    ):
        assert not gpu._find(Epilogue(kernel, options))


@pytest.mark.skipif(INTERPRETED, reason="this is the run that it starts")
@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_in_the_interpreter(which):
    done = script(
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-W",
        "ignore",
        "-m",
        which,
        __file__,
        env={"TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert " passed" in done.stdout, done.stdout[-1000:]


def may_spill(kernel: str, variant: str) -> int:
    return 96 if (kernel, variant) == ("gradient", "canberra by rows") else SPILLED


@compiles
@pytest.mark.parametrize(
    "turn, turns, arch",
    [
        (0, 24, 90),
        *(
            pytest.param(turn, 6, (90, 80, 100)[turn % 3], marks=pytest.mark.slow)
            for turn in range(6)
        ),
    ],
)
def test_compiles(turn, turns, arch):
    """The kernels of a training step, softmax link aside, for the architectures in turn; the
    benchmark does all for all of them."""
    gpu_compile = pytest.importorskip("benchmarks.gpu_compile")
    step = [
        (name, work) for name, work in gpu_compile.variants().items() if "softmax" not in name[1]
    ]
    step = [(name, work) for name, work in step if name[0] != "tile" or "+raw" in name[1]]
    for name, work in step[turn::turns]:
        found = gpu_compile.compiled(*work, arch)
        assert max(found["spill_stores"], found["spill_loads"]) <= may_spill(*name), (name, found)


@compiles
def test_table_of_registers():
    """results/gpu_compile.csv lists today's kernels. None but canberra's gradient spills more than
    a few registers."""
    gpu_compile = pytest.importorskip("benchmarks.gpu_compile")
    rows = list(csv.DictReader((ROOT / "results" / "gpu_compile.csv").open()))
    assert Counter((r["kernel"], r["variant"]) for r in rows) == dict.fromkeys(
        gpu_compile.variants(), 3
    )
    assert {r["arch"] for r in rows} == {"sm_80", "sm_90", "sm_100"}
    for r in rows:
        spilled = max(int(r["spill_stores"]), int(r["spill_loads"]))
        assert spilled <= may_spill(r["kernel"], r["variant"]), r
