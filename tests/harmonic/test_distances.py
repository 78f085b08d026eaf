"""Distances against their formulas and scipy, and the symmetries they have. A new entry of the
table is tested, too."""

import math

import pytest
import scipy.spatial.distance as scipy_distance
import torch
from head_cases import HOMOGENEOUS, SETTINGS, C, N, V, name_of, parameters, vectors

from harmonic import (
    CONTROLS,
    DISTANCES,
    HEADS,
    contributions,
    distance,
    harmonic_logits,
    harmonic_loss,
    kernels,
    paired_distance,
    reference,
)
from harmonic.distances import formula_table, resolve


@pytest.mark.parametrize("setting", SETTINGS, ids=name_of)
def test_distance_equals_the_formula(setting):
    name, options = setting
    h, w = vectors()
    options = {**options, **parameters(name)}
    truth = reference.distance(name)(h[:, None], w, **options)
    torch.testing.assert_close(distance(h, w, name, **options), truth, rtol=1e-11, atol=0)
    torch.testing.assert_close(
        paired_distance(h[:, None], w, name, **options), truth, rtol=1e-11, atol=0
    )
    torch.testing.assert_close(
        distance(h.float(), w.float(), name, **options).double(), truth, rtol=5e-6, atol=0
    )


ZERO_AT_EQUALITY = [
    name
    for name, kernel in kernels.KERNELS.items()
    if not kernel.signed and not kernel.value(torch.ones(2), torch.ones(2)).any()
]


def users(name: str) -> str:
    """A kernel and its distances, so that pytest's -k finds a kernel by the distance."""
    return "-".join([name, *(n for n, entry in DISTANCES.items() if entry.kernel == name)])


@pytest.mark.parametrize("name", ZERO_AT_EQUALITY, ids=users)
def test_a_kernel_is_exact_near_a_prototype_and_far_from_it(name):
    """Near one the kernel has the degree `power`. float32 loses no digits: a loss has log d."""
    kernel = kernels.KERNELS[name]
    _, w = vectors(torch.float32)
    directions = vectors(torch.float32, seed=1)[1]
    raws = []
    for step in (1e-2, 1e-3, 1e-4):
        x = w + step * directions
        raws.append(kernel.value(x.double(), w.double()))
        torch.testing.assert_close(
            kernel.value(x, w).double(), raws[-1], rtol=1e-5, atol=0,
            msg=lambda text: f"near a prototype (do log1p or expm1 help?): {text}",
        )  # fmt: skip
    far = w + 1e3 * directions
    torch.testing.assert_close(
        kernel.value(far, w).double(), kernel.value(far.double(), w.double()), rtol=1e-5, atol=0,
        msg=lambda text: f"far from a prototype: {text}",
    )  # fmt: skip
    degree = (raws[0] / raws[2]).log10().mean().item() / 2
    assert degree == pytest.approx(kernel.power(), abs=0.02), "Kernel.power"


@pytest.mark.parametrize("name", CONTROLS)
def test_the_logit_of_a_control_equals_the_formula(name):
    h, w = vectors()
    torch.testing.assert_close(
        paired_distance(h[:, None], w, name),
        reference.distance(name)(h[:, None], w),
        rtol=1e-11,
        atol=1e-12,
    )


SCIPY = {
    "euclidean": scipy_distance.euclidean,
    "euclidean_squared": scipy_distance.sqeuclidean,
    "manhattan": scipy_distance.cityblock,
    "minkowski": lambda x, y: scipy_distance.minkowski(x, y, 1.5),
    "chebyshev": scipy_distance.chebyshev,
    "cosine": scipy_distance.cosine,
    "hamming_hard": lambda x, y: scipy_distance.hamming(x > 0, y > 0) * len(x),
    "canberra": scipy_distance.canberra,
    "bray_curtis_normalized": lambda x, y: scipy_distance.braycurtis(
        abs(x) / abs(x).sum(), abs(y) / abs(y).sum()
    ),
}


@pytest.mark.parametrize("name", SCIPY)
def test_the_formula_is_scipys(name):
    h, w = vectors()
    truth = torch.tensor(
        [[SCIPY[name](x, y) for y in w.numpy()] for x in h.numpy()], dtype=torch.float64
    )
    torch.testing.assert_close(reference.distance(name)(h[:, None], w), truth, rtol=1e-11, atol=0)


def test_mahalanobis_is_scipys():
    h, w = vectors()
    (factor,) = parameters("mahalanobis").values()
    metric = factor @ factor.T + 1e-6 * torch.eye(C, dtype=torch.float64)
    truth = torch.tensor(
        [[scipy_distance.mahalanobis(x, y, metric.numpy()) for y in w.numpy()] for x in h.numpy()],
        dtype=torch.float64,
    )
    torch.testing.assert_close(
        reference.mahalanobis(h[:, None], w, factor), truth, rtol=1e-11, atol=0
    )


@pytest.mark.parametrize("setting", HOMOGENEOUS, ids=name_of)
def test_homogeneity(setting):
    """d(ch, cw) = c^k d(h, w), and HarMax does not change (theory, item 1)."""
    name, options = setting
    h, w = vectors()
    options = {**options, **parameters(name)}
    for c in (1e-3, 7.0, 1e4):
        torch.testing.assert_close(
            distance(c * h, c * w, name, **options),
            c ** DISTANCES[name].degree * distance(h, w, name, **options),
        )
        small = (1e-3 * h).float(), (1e-3 * w).float()
        p, q = (
            harmonic_logits(x, y, name, exponent=28.0, **options).softmax(-1)
            for x, y in ((h.float(), w.float()), small)
        )
        # Float32 rounds: today's distances stay below 2e-5, another correct one may not.
        assert (p - q).abs().max() < 5e-5


def test_distances_without_a_degree_are_not_homogeneous():
    h, w = vectors()
    for name in ("hamming_soft", "chebyshev_smooth"):
        ratio = distance(10 * h, 10 * w, name) / distance(h, w, name)
        assert ratio.max() / ratio.min() > 1.01 and DISTANCES[name].degree is None


@pytest.mark.parametrize("name", HEADS)
def test_permutation_equivariance(name):
    h, w = vectors()
    order = torch.randperm(V, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(
        harmonic_logits(h, w[order], name), harmonic_logits(h, w, name)[:, order]
    )


def test_weighted_canberra_at_power_one_is_bray_curtis_abs():
    """Computed by the general kernel, not through the shortcut that `resolve` takes."""
    h, w = vectors()
    general = kernels.pairs(h, w, "canberra", {"q": 1.0, "weighted": True})
    torch.testing.assert_close(general, distance(h, w, "bray_curtis_abs"))
    assert resolve("canberra_weighted", q=1.0)[0] is DISTANCES["bray_curtis_abs"]
    assert not torch.allclose(distance(h, w, "canberra_weighted", q=2.0), general)


def test_minkowski_takes_the_fast_kernels():
    for p, name in ((1, "manhattan"), (2, "euclidean"), (math.inf, "chebyshev")):
        assert resolve("minkowski", p=p)[0] is DISTANCES[name]
    h, w = vectors()
    torch.testing.assert_close(
        kernels.pairs(h, w, "lp", {"p": 2.0}).sqrt(), distance(h, w, "euclidean")
    )


def test_normalised_distances_work_at_any_scale():
    h, w = vectors(torch.float32)
    for name in ("cosine", "bray_curtis_normalized"):
        for scale in (1e-30, 1e25):
            torch.testing.assert_close(
                distance(scale * h, w, name), distance(h, w, name), rtol=1e-4, atol=1e-6
            )


@pytest.mark.parametrize("q", [0.5, 1.0001, 2.0, 40.0])
def test_coordinates_that_are_zero_in_both_count_for_nothing(q):
    h, w = (x.relu() for x in vectors())
    both, difference = h[:, None] + w, (h[:, None] - w).abs()
    powers = [torch.where(both > 0, both**power, 0.0) for power in (q - 1, q)]
    expected = (difference * powers[0]).sum(-1) / powers[1].sum(-1)
    for dtype in (torch.float64, torch.float32):
        found = distance(100 * h.to(dtype), 100 * w.to(dtype), "canberra_weighted", q=q)
        rtol = 1e-12 if dtype == torch.float64 else 1e-4
        torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=0)


@pytest.mark.parametrize("name", ["mahalanobis", "mahalanobis_cholesky"])
def test_contributions_are_those_of_the_coordinates_themselves(name):
    h, w = vectors()
    w = w[:N].clone()
    w[:, :5], w[:, 6:] = h[:, :5], h[:, 6:]  # Only coordinate 5 differs.
    shares = contributions(h, w, name, factor=torch.randn(C, C, dtype=torch.float64))
    torch.testing.assert_close(shares[:, 5], torch.ones(N, dtype=torch.float64))


@pytest.mark.parametrize("name", HEADS)
def test_contributions_add_up(name):
    h, w = vectors()
    shares = contributions(h, w[:N], name)
    assert shares.shape == (N, C) and (shares >= 0).all()
    torch.testing.assert_close(shares.sum(-1), torch.ones(N, dtype=torch.float64))
    # Sums: taking a coordinate away takes its share away.
    if name in ("manhattan", "bray_curtis_abs", "canberra"):
        d = paired_distance(h, w[:N], name)
        one = {
            "canberra": 1.0,
            "manhattan": 1.0,
            "bray_curtis_abs": (h.abs() + w[:N].abs()).sum(-1),
        }[name]
        scale = (h.abs() + w[:N].abs()) if name == "canberra" else 1.0
        torch.testing.assert_close(
            shares * d[:, None],
            (h - w[:N]).abs() / scale / (one if name != "bray_curtis_abs" else one[:, None]),
        )
    if name == "chebyshev":
        assert (shares.count_nonzero(-1) == 1).all() and torch.equal(
            shares.argmax(-1), (h - w[:N]).abs().argmax(-1)
        )


def test_table_of_formulas_has_every_head():
    table = formula_table()
    assert (
        all(f"| `{name}` |" in table for name in HEADS)
        and len(table.splitlines()) == len(HEADS) + 2
    )


@pytest.mark.parametrize("offset", [1e-1, 1e-3, 1e-5, 1e-6])
@pytest.mark.parametrize("name", ["euclidean", "cosine", "mahalanobis_diagonal"])
def test_small_distances_survive_cancellation(name, offset):
    """|h|^2 + |w|^2 - 2 h.w loses d^2 when h is almost on a prototype; the distance must not."""
    h, w = vectors(torch.float32, c=768)
    w[3] = h[5] + offset * torch.randn(768, generator=torch.Generator().manual_seed(0))
    truth = distance(h.double(), w.double(), name)[5, 3]
    relative = abs(distance(h, w, name)[5, 3].item() / truth.item() - 1)
    # mapping to the unit sphere rounds the coordinates themselves: 6e-8 of a coordinate against
    # `offset` of one
    assert relative < (1e-5 if name == "euclidean" else max(1e-5, 3e-7 / offset))


def test_l2_stays_exact_when_every_pair_is_near():
    g = torch.Generator().manual_seed(0)
    h, w = (5 + 1e-3 * torch.randn(n, 300, generator=g) for n in (150, 120))
    truth = distance(h.double(), w.double(), "euclidean")
    assert (distance(h, w, "euclidean") / truth - 1).abs().max() < 1e-5
    h.requires_grad_()
    harmonic_loss(h, w, torch.zeros(150, dtype=torch.long), "euclidean", exponent=20.0).backward()
    x = h.detach().double().requires_grad_()
    harmonic_loss(
        x, w.double(), torch.zeros(150, dtype=torch.long), "euclidean", exponent=20.0
    ).backward()
    torch.testing.assert_close(
        h.grad.double(), x.grad, rtol=1e-3, atol=1e-6 * x.grad.abs().max().item()
    )
