"""Heads compared over seeds."""

import csv
import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
from test_analysis import call, home  # noqa: F401

from analysis import compare
from analysis.runs import find_runs
from base.errors import UserError


@pytest.fixture
def runs(home):  # noqa: F811
    """Two seeds of cross_entropy, three of cosine, and one of cosine with another exponent."""
    ce, cosine = find_runs([home / "out/ce", home / "out/cosine"])

    def again(run, seed, **model):
        return replace(
            run,
            model_config=replace(run.model_config, **model),
            config=replace(run.config, seed=seed),
        )

    return [
        *(again(ce, seed) for seed in (1, 2)),
        *(again(cosine, seed) for seed in (2, 1, 3)),
        again(cosine, 1, exponent=3.0),
    ]


def test_runs_that_differ_in_their_seed_are_one_group(runs):
    (ce, cosine, other), members = zip(*compare.groups(runs).items(), strict=True)
    assert ce == "cross_entropy" and other == "cosine, exponent=3.0"
    assert cosine.startswith("cosine, exponent=") and members == (
        {1: 0, 2: 1},
        {2: 2, 1: 3, 3: 4},
        {1: 5},
    )
    twin = replace(runs[2], model_config=replace(runs[2].model_config, link="softmax"))
    assert list(compare.groups([runs[2], twin])) == ["cosine", "cosine softmax"]
    # Where a run was stored and how often it printed changes nothing.
    elsewhere = replace(runs[0], config=replace(runs[0].config, log_interval=7, seed=5))
    assert list(compare.groups([runs[0], elsewhere])) == ["cross_entropy"]


def test_groups_are_compared_seed_by_seed():
    found = {"a": {1: 0, 2: 1, 3: 2}, "b": {2: 3, 1: 4, 4: 5}, "c": {3: 6}, "d": {9: 7}}
    rng = np.random.default_rng(0)
    losses = list(
        rng.normal(size=(8, 50)) / 10 + np.array([4, 4.1, 4.2, 5, 5.2, 5.1, 7, 6])[:, None]
    )
    pairs = {(p.group, p.minus): p for p in compare.pairs(found, losses)}
    assert list(pairs) == [("b", "a"), ("c", "a")]  # All others have no seed in common.
    b, c = pairs.values()
    each = [losses[4].mean() - losses[0].mean(), losses[3].mean() - losses[1].mean()]
    test = scipy.stats.ttest_1samp(each, 0)
    assert b.seeds == 2 and b.p == pytest.approx(test.pvalue)
    assert (b.low, b.high) == pytest.approx(test.confidence_interval(0.95))
    d = compare.difference(losses[6], losses[2])
    assert (c.seeds, c.mean, c.low, c.high, c.p) == (1, d.mean, d.low, d.high, d.p)
    p = compare.corrected([b, c])
    assert p == pytest.approx([b.p, min(1, 2 * c.p)]) and b.p > c.p  # Holm, in the order of pairs
    assert compare.verdict(c, p[1]) == "behind on this text"
    assert (
        compare.verdict(b, 0.2) == "not told apart" and compare.verdict(b, math.nan) == "not finite"
    )
    assert "but it is not told apart from b" in compare.in_words([replace(b, p=0.3)])
    assert "every other head with the same seeds is behind" in compare.in_words(
        [replace(b, p=0.01, low=0.5)]
    )
    assert compare.in_words([c]) is None


def test_the_command(home, tmp_path, monkeypatch, capsys):  # noqa: F811
    out = tmp_path / "x.csv"
    call(compare.main, monkeypatch, home / "out/ce", home / "out/cosine", f"--out={out}")
    printed = capsys.readouterr()
    assert "seeds in common" in printed.out and out.with_suffix(".png").stat().st_size > 5000
    assert "hold" in printed.err and "train more seeds" in printed.err
    (row,) = csv.DictReader(out.open())
    assert float(row["mean"]) > 0 and row["seeds"] == "1"
    # Tables of earlier analyses are no runs, and runs of other data cannot be compared.
    call(compare.main, monkeypatch, home / "out/ce", out, f"--out={out}")
    assert "x.csv: no run, left out" in capsys.readouterr().err
    with pytest.raises(UserError, match="x.csv is not a run's folder"):
        call(compare.main, monkeypatch, out)
    with pytest.raises(UserError, match="other|tokenizer|text"):
        call(compare.main, monkeypatch, home / "out/ce", home / "out/other", f"--out={out}")
