"""The algorithmic tasks: what they say, that train and test are apart, and that a batch of seeds is
the seeds one after another."""

import itertools
import math

import numpy as np
import pytest
import torch
from conftest import ROOT, script_here

from studies import algorithmic, algorithmic_report
from studies.algorithmic import TASKS, Batch
from studies.runner import Table
from studies.search import beyond, on_edge, search


def test_addition_and_equivalence():
    assert all(t == (x + y) % 31 for (x, y), t in TASKS["addition"].examples())
    assert len(TASKS["addition113"].examples()) == 113**2
    table = dict(TASKS["equivalence"].examples())
    assert table[7, 12] == table[0, 35] == 41 and table[7, 13] == 40 and len(table) == 1600


def test_the_lattice_is_of_parallelograms():
    found = TASKS["lattice"].examples()
    for (a, b, c), d in found:
        assert np.array_equal(
            np.subtract(divmod(d, 5), divmod(c, 5)), np.subtract(divmod(b, 5), divmod(a, 5))
        )
        assert a not in (b, c)
    assert len(found) == 85**2 - 2 * 25 * 25 + 25  # all of them less those with b = a or c = a


def test_permutations_are_a_group():
    table = dict(TASKS["permutation"].examples())
    assert len(table) == 576 and all(table[0, i] == table[i, 0] == i for i in range(24))
    rng = np.random.default_rng(0)
    for a, b, c in rng.integers(24, size=(50, 3)).tolist():
        assert table[table[a, b], c] == table[a, table[b, c]]
    assert (
        all(sorted(table[i, j] for j in range(24)) == list(range(24)) for i in range(24))
        and table[1, 2] != table[2, 1]
    )


def test_the_family_is_a_tree():
    table = dict(TASKS["family"].examples())
    assert len(table) == 126 + 124 + 126
    for i in range(3, 127):
        assert (
            table[i, 128] == table[table[i, 127], 127]
            and table[table[i, 129], 129] == i
            and table[table[i, 129], 127] == table[i, 127]
        )


@pytest.mark.parametrize("name", [n for n in TASKS if n != "addition113"])
def test_train_and_test_share_nothing(name):
    task = TASKS[name]
    train, test = algorithmic.split(task, 0.8, 3)
    keys = [{task.same(tuple(row[:-1])) for row in side.tolist()} for side in (train, test)]
    assert not keys[0] & keys[1] and len(train) > 2 * len(test) > 0
    assert set(map(tuple, [*train.tolist(), *test.tolist()])) <= {
        (*x, y) for x, y in task.examples()
    }
    again, other = algorithmic.split(task, 0.8, 3)[0], algorithmic.split(task, 0.8, 4)[0]
    assert np.array_equal(train, again) and not np.array_equal(train[:50], other[:50])


@pytest.mark.parametrize(
    "model, head",
    [("mlp", "manhattan"), ("mlp", "mahalanobis"), ("mlp", "cross_entropy"), ("decoder", "cosine")],
)
def test_a_batch_is_its_seeds_one_after_another(model, head):
    batch = Batch(
        "main",
        "permutation",
        model,
        head,
        "control" if head == "cross_entropy" else "harmonic",
        0.8,
        4,
        3,
    )
    data = algorithmic.splits(TASKS["permutation"], 0.8, [5, 6, 7])

    def make():
        return [algorithmic.make(batch, 1.0, seed) for seed in (5, 6, 7)]

    together = algorithmic.train(make(), data, 1e-3, 4, 4)
    for i, alone in enumerate(make()):
        one = algorithmic.train([alone], [d[i : i + 1] for d in data], 1e-3, 4, 4)
        torch.testing.assert_close(one.prototypes[0], together.prototypes[i], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one.loss[:, 0], together.loss[:, i], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together.prototypes[0], together.prototypes[1])


def test_the_mlp_learns_the_permutations(tmp_path):
    rows = algorithmic.run(
        Batch("main", "permutation", "mlp", "euclidean", "harmonic", 0.9, 300, 2),
        (1e-2, 1.0),
        str(tmp_path),
    )
    assert len(rows) == 2 and all(
        float(r["train_accuracy"]) > 0.9 and r["train_90"] != "" for r in rows
    )
    assert all(0 < float(r["top2"]) <= 1 and r["exponent"] == "16" for r in rows)
    kept = torch.load(next(tmp_path.iterdir()), weights_only=True)
    assert kept["prototypes"].shape == (2, 24, 16) and len(kept["path"]) == len(
        kept["steps"]
    ) == len(kept["test"])


def test_levels_reached_and_intervals():
    accuracy = torch.tensor([[0.1, 0.2], [0.95, 0.3], [0.5, 0.4]])
    first, never = algorithmic.reached([0, 10, 20], accuracy, 0.9)
    assert first == 10 and math.isnan(never)
    # Wilson's interval of k of n (Brown, Cai and DasGupta 2001, equation 4).
    z, p, n = 1.96, 13 / 20, 20
    middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    found = algorithmic_report.success([{"test_99": "9"}] * 13 + [{"test_99": ""}] * 7)
    assert found == f"13/20 ({100 * (middle - half):.0f}-{100 * (middle + half):.0f} %)"
    rows = [{"test_99": x} for x in ("100", "300", "", "")]
    assert (
        math.isinf(algorithmic_report.median_step(rows, "test_99"))
        and algorithmic_report.median_step(rows[:3], "test_99") == 300
    )
    # The medians are 200 and 280. The gaps of the seeds are 240, 40, 80 and 120.
    ends = [(160, 400), (200, 240), (200, 280), (200, 320)]
    rows = [{"train_99": str(a), "test_99": str(b)} for a, b in ends]
    assert algorithmic_report.median_gap(rows) == 100
    rows += [{"train_99": "100", "test_99": ""} for _ in range(5)]
    assert algorithmic_report.median_gap(rows) is None


def test_steps_are_compared_where_every_seed_gets_there():
    rows = []
    for task, link, steps in (
        ("addition", "harmonic", (80, 90)),
        ("addition", "softmax", (130, 100)),
        ("lattice", "harmonic", (30, 30)),
        ("lattice", "softmax", (40, "")),
    ):
        for seed, step in enumerate(steps):
            row = dict(stage="main", task=task, head="euclidean", link=link, seed=str(seed))
            rows.append(row | {"test_99": str(step)})
    # Half of the interval is 12.706 * 20.
    assert "| euclidean | -30.0 ± 254.1 | - |" in algorithmic_report.step_twins(rows)


def test_the_best_setting_of_a_sweep_is_chosen():
    row = dict(stage="sweep", task="addition", fraction="0.8", model="mlp")
    row |= dict(head="cosine", link="harmonic")
    found = [
        row | dict(learning_rate="0.01", multiple="0.25", test_accuracy=a, test_loss="1")
        for a in ("0.5", "0.9")
    ]
    found += [
        row | dict(learning_rate="0.003", multiple="4", test_accuracy="0.7", test_loss=x)
        for x in ("nan", "0.9")
    ]
    sweeps = algorithmic.swept(found)
    assert sweeps.keys() == {("addition", 0.8, "mlp", "cosine", "harmonic")}
    # Equal accuracy: the lower loss.
    assert algorithmic.choice(sweeps["addition", 0.8, "mlp", "cosine", "harmonic"]) == (0.01, 0.25)
    assert algorithmic.choice(None) is None


def test_a_sweep_goes_beyond_the_edge():
    """The best lies off the grid: it is followed axis by axis, and not beyond the number of
    settings that is allowed."""
    tried = []

    def costs(settings, best=(64.0, 0.01)):
        tried.extend(settings)
        return [abs(math.log(m / best[0])) + abs(math.log(rate / best[1])) for m, rate in settings]

    grid = list(itertools.product((1.0, 4.0), (0.1, 0.3)))
    search(grid, (4, 10**0.5), 6, costs)
    assert tried[:4] == grid and [m for m, _ in tried[4:7]] == [16, 64, 256] and len(tried) == 4 + 6
    assert min(rate for _, rate in tried) == pytest.approx(0.1 / 10**0.5)
    found = dict(zip(tried, costs(tried[:]), strict=False))
    # The budget ended there.
    assert beyond(min(found, key=found.get), list(found), (4, 10**0.5)) is not None
    tried.clear()
    search(grid, (4, 3), 6, lambda s: costs(s, (1.0, 0.1)))
    # One step off each edge, which is no better.
    assert min(m for m, _ in tried) == 0.25 and min(r for _, r in tried) < 0.04
    found = dict(zip(tried, costs(tried[:], (1.0, 0.1)), strict=False))
    assert on_edge([found]).startswith("0 of 1") and on_edge(
        [found, {(1.0, 1.0): 1.0, (4.0, 1.0): 2.0}]
    ).startswith("1 of 2")
    # A refinement that is alone on its line is on no edge.
    fine = {(1.0, 1.0): 3.0, (4.0, 1.0): 2.0, (16.0, 1.0): 3.0, (4.0, 1.3): 1.0, (4.0, 3.0): 3.0}
    assert on_edge([fine]).startswith("0 of 1")
    del fine[4.0, 3.0]
    fine[4.0, 1.0] = 5.0
    assert on_edge([{**fine, (16.0, 1.3): 4.0}]).startswith("1 of 1")  # No rate above 1.3.


def test_every_head_has_its_jobs():
    found = algorithmic.batches(algorithmic.AlgorithmicConfig())
    for stage, task in itertools.product(("main",), ("addition", "lattice", "permutation")):
        assert [
            (j.head, j.link) for j in found if (j.stage, j.task) == (stage, task)
        ] == algorithmic.HEADS
    assert {j.seeds for j in found if j.stage == "main"} == {20} and len(
        {tuple(j.key().values()) for j in found}
    ) == len(found)
    decoders = algorithmic.batches(algorithmic.AlgorithmicConfig(models="decoder"))
    assert {j.stage for j in decoders} == {"sweep", "decoder"} and {j.model for j in found} == {
        "mlp"
    }


def test_the_committed_table_is_complete():
    table = Table(ROOT / "results/algorithmic.csv", algorithmic.COLUMNS, algorithmic.KEY)
    c = algorithmic.AlgorithmicConfig(models="mlp decoder")
    jobs = algorithmic.wanted(table, c)
    assert len(jobs) == len(algorithmic.batches(c)) and all(table.find(job.key) for job in jobs)


@pytest.mark.parametrize(
    "flag, words",
    [
        ("--tasks=lattic", "unknown lattic"),
        ("--models=rnn", "unknown rnn"),
        ("--only=cosin", "is not a head"),
        ("--seeds=0", "seeds=0"),
    ],
)
def test_bad_flags(flag, words):
    done = script_here("-m", "studies.algorithmic", flag)
    assert done.returncode == 2 and words in done.stderr


def test_the_report(tmp_path):
    rows = []
    for job in (
        Batch("main", "lattice", "mlp", "cosine", "harmonic", 0.8, 2, 2),
        Batch("main", "addition", "mlp", "cosine", "harmonic", 0.8, 2, 1),
        Batch("decoder", "addition", "mlp", "cosine", "harmonic", 0.3, 2, 1),
        Batch("fraction", "addition", "mlp", "cosine", "harmonic", 0.5, 2, 1),
    ):
        rows += algorithmic.run(job, (1e-3, 1.0), str(tmp_path / "runs"))
    Table(tmp_path / "a.csv", algorithmic.COLUMNS, algorithmic.KEY).add(*rows)
    words = [
        "-m",
        "studies.algorithmic_report",
        f"--table={tmp_path / 'a.csv'}",
        f"--runs={tmp_path / 'runs'}",
        f"--out={tmp_path / 'a'}",
    ]
    done = script_here(*words)
    assert done.returncode == 0 and "| cosine | 0/2 (0-66 %) | never |" in done.stdout, done.stderr
    assert (tmp_path / "a.png").stat().st_size > 5000 and (
        tmp_path / "a_curves.png"
    ).stat().st_size > 5000
    assert (tmp_path / "a.gif").read_bytes()[:3] == b"GIF"
    before = (tmp_path / "a.png").read_bytes()
    # No curves: the pictures stay as they were.
    done = script_here(*words[:3], "--runs=nowhere", words[-1])
    assert (
        done.returncode == 0
        and "no " in done.stdout
        and (tmp_path / "a.png").read_bytes() == before
    )
    assert script_here("-m", "studies.algorithmic_report", "--table=nowhere.csv").returncode == 2
