"""Heads compared over seeds."""

import csv
import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
from test_analysis import call, home, make_report  # noqa: F401

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


def test_runs_that_differ_in_their_seed_are_one_group(runs, capsys):
    (ce, cosine, other), members = zip(*compare.groups(runs).items(), strict=True)
    assert (ce, other) == ("cross_entropy", "cosine, n=3.0") and cosine.startswith("cosine, n=")
    assert members == ({1: 0, 2: 1}, {2: 2, 1: 3, 3: 4}, {1: 5})
    run, twin = (
        runs[0],
        replace(runs[2], model_config=replace(runs[2].model_config, link="softmax")),
    )
    assert list(compare.groups([runs[2], twin])) == ["cosine", "cosine softmax"]
    assert capsys.readouterr().err == ""

    def other_run(model=(), **config):
        changed = replace(run.config, seed=1, **config)
        return replace(run, config=changed, model_config=replace(run.model_config, **dict(model)))

    for same in (dict(log_interval=7), dict(out_dir="x"), dict(model={"head_impl": "dense"})):
        assert len(compare.groups([run, other_run(**same)])) == 1
        assert "ce has the same seed" in capsys.readouterr().err
    for one in (
        dict(learning_rate=0.1), dict(weight_decay=0.3), dict(max_iters=7), dict(batch_size=2),
        dict(source="x"), dict(model={"dropout": 0.3}), dict(model={"head_precision": "split"}),
        dict(model={"head_skip": 0.5}), dict(model={"n_layer": 9}),
    ):  # fmt: skip
        assert len(compare.groups([run, other_run(**one)])) == 2, one
    assert len(compare.groups([run, replace(run, trained_on="elsewhere/data")])) == 2
    assert len(compare.groups([run, replace(run, trained_on=f"/moved/{run.trained_on}")])) == 1


def test_groups_are_compared_seed_by_seed():
    found = {"a": {1: 0, 2: 1, 3: 2}, "b": {2: 3, 1: 4, 4: 5}, "c": {3: 6}, "d": {9: 7}}
    rng = np.random.default_rng(0)
    middles = np.array([4, 4.1, 4.2, 5, 5.2, 5.1, 7, 6])
    losses = list(rng.normal(size=(8, 50)) / 10 + middles[:, None])
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
    assert p == [b.p, c.p]  # A test over seeds and one over windows are corrected apart.
    assert compare.corrected([b, c, b, b])[::2] == pytest.approx([min(1, 3 * b.p)] * 2)
    assert compare.verdict(c, p[1], alike=False) == "unequal training"
    assert compare.verdict(c, p[1]) == "behind on this text"
    assert compare.verdict(b, 0.2) == "not told apart"
    assert compare.verdict(b, math.nan) == "not finite"


def test_the_result_in_words():
    """It is about heads with several seeds, whatever other runs there are."""

    def say(groups, values):
        losses = [np.full(3, value) for value in values]
        return compare.in_words(groups, losses), compare.pairs(groups, losses)

    three, two = {1: 0, 2: 1, 3: 2}, {1: 3, 2: 4, 3: 5}
    text, _ = say({"a": three, "b": two}, [4, 4.1, 4.2, 5.0, 5.11, 5.2])
    assert "a has the lowest mean loss. On the seeds that both have, it leads b (1.003 ± " in text
    text, _ = say({"a": three, "b": two}, [4, 4.1, 4.2, 4.1, 4.0, 4.3])
    assert "a has the lowest mean loss. It is not told apart from b." in text
    # A seed that the other has not decides the means, but not the comparison.
    text, (pair,) = say({"a": three | {4: 6}, "b": two}, [5, 5.1, 5.2, 4.8, 4.901, 4.998, 2])
    assert (pair.group, pair.minus) == ("a", "b") and pair.mean == pytest.approx(0.2, abs=0.01)
    assert "a has the lowest mean loss. It is not told apart from b." in text
    # One seed proves nothing, and a run that diverged is no tie.
    text, _ = say({"lone": {1: 6}, "a": three, "b": two}, [4, 4.1, 4.2, 5.0, 5.11, 5.2, 1])
    assert "a has the lowest" in text and "lone" not in text
    assert say({"a": {1: 0}, "b": {1: 1}}, [4, 5])[0] is None
    assert say({"a": three, "b": two}, [4, 4, 4, 4, math.nan, 4])[0] is None


def test_the_command(home, tmp_path, monkeypatch, capsys):  # noqa: F811
    out = tmp_path / "x.csv"
    call(compare.main, monkeypatch, home / "out/ce", home / "out/cosine", f"--out={out}")
    printed = capsys.readouterr()
    assert "seeds in common" in printed.out and out.with_suffix(".png").stat().st_size > 5000
    assert "train more seeds" in printed.err
    (row,) = csv.DictReader(out.open())
    assert float(row["mean"]) > 0 and row["seeds"] == "1"
    # Tables of earlier analyses are no runs, and runs of other data cannot be compared.
    for words, message in (
        ([home / "out/ce", out], "differ in nothing but their seed"),
        ([out], "x.csv is not a run's folder"),
        ([home / "out/ce", home / "out/other"], "the runs have different"),
    ):
        with pytest.raises(UserError, match=message):
            call(compare.main, monkeypatch, *words, f"--out={out}")
    assert "x.csv: not a run, skipped" in capsys.readouterr().err
    (row,) = csv.DictReader(out.open())  # Nothing is lost.


def test_the_report_begins_with_the_seeds(home, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr("analysis.summary.in_words", lambda found, losses: f"{len(found)} heads.")
    page = make_report(monkeypatch, tmp_path / "r.html", home / "out/ce", home / "out/cosine")
    assert page.document()["lead"] == "2 heads."
