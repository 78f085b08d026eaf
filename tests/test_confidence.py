"""Calibration after scaling, and the detection of other text."""

import csv
import math

import numpy as np
import pytest
import torch
from scipy.stats import norm
from sklearn.metrics import roc_auc_score
from test_analysis import call, home  # noqa: F401  (a fixture)

from analysis import confidence, quantization
from base.command_line import parse
from base.errors import UserError
from text.token_files import load_data


def test_auroc_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    own, other = rng.normal(0.5, 1, 40).round(1), rng.normal(0, 1, 30).round(1)
    labels = np.r_[np.ones(40), np.zeros(30)]
    assert confidence.auroc(own, other) == pytest.approx(
        roc_auc_score(labels, np.r_[own, other]), abs=1e-12
    )


def test_the_interval_of_auroc_holds_the_truth():
    """In 95 % of the draws, also near 1, where a bootstrap of windows has it in 80 %."""
    rng, distance = np.random.default_rng(0), 2**0.5 * norm.ppf(0.98)
    held, draws = 0, 400
    for _ in range(draws):
        low, high = confidence.auroc_interval(rng.normal(distance, 1, 64), rng.normal(0, 1, 64))
        held += low < 0.98 < high
    assert 0.91 < held / draws <= 0.98
    assert np.isnan(confidence.auroc_interval(np.array([1.0, np.nan]), np.arange(2.0))).all()


def test_perfect_separation_has_an_interval():
    """With 30 pairs of windows, none in the wrong order: 3 / 30 is the rule of three's bound."""
    own, other = np.arange(100, 140.0), np.arange(30.0)
    low, high = confidence.auroc_interval(own, other)
    assert (
        high == 1 and 0.05 == pytest.approx(low**30) and low == pytest.approx(1 - 3 / 30, abs=0.01)
    )
    assert confidence.auroc_interval(other, own) == pytest.approx((0, 1 - low))


def test_the_temperature_of_overconfident_logits_is_found():
    """Targets drawn from the softmax of logits; the model's are three times as large."""
    torch.manual_seed(0)
    logits = 2 * torch.randn(20_000, 7)
    targets = torch.multinomial(logits.softmax(-1), 1)[:, 0]
    assert confidence.best_temperature(3 * logits, targets) == pytest.approx(3, rel=0.1)
    row = confidence.calibration(3 * logits.view(40, 500, 7), targets.view(40, 500))
    assert row["ece"] > 0.1 > 0.03 > row["ece_scaled"]
    assert row["ece_low"] <= row["ece"] <= row["ece_high"] and 0 <= row["ece_scaled_low"]
    calibrated = confidence.calibration(logits.view(40, 500, 7), targets.view(40, 500))
    assert calibrated["ece"] == pytest.approx(calibrated["ece_floor"], rel=0.5)


def test_the_table(home, monkeypatch, capsys, tmp_path):  # noqa: F811
    """The other text has a tokenizer of its own; scores are a loop's over tokens."""
    out, runs = tmp_path / "c.csv", [home / "out" / name for name in ("ce", "cosine")]
    words = [f"--other={home / 'data' / 'other'}", "--windows=4", f"--out={out}"]
    call(confidence.main, monkeypatch, *runs, *words)
    assert "nearest" in capsys.readouterr().out and out.with_suffix(".png").stat().st_size > 5000
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [r["score"] for r in rows if r["run"] == "ce"] == ["", "max", "energy", "loss"]
    cosine = [r for r in rows if r["run"] == "cosine"]
    assert [r["score"] for r in cosine] == ["", "max", "energy", "nearest", "loss"]
    assert all(0 <= float(r["auroc"]) <= 1 for r in rows if r["auroc"])
    (run,) = confidence.find_runs([str(home / "out" / "cosine")])
    model, _ = run.load()
    x = confidence.own_windows(run.data(), "val", 16, 4)
    found = confidence.score(model, x)
    h = model.hidden(x[:1, :-1])[0]
    distances = torch.cdist(
        torch.nn.functional.normalize(h, dim=-1),
        torch.nn.functional.normalize(model.head.prototypes(), dim=-1),
    )
    assert found.scores["nearest"][0] == pytest.approx(
        -model.head.distance.factor * (distances**2).amin(1).mean().item(), rel=1e-3
    )
    assert found.scores["loss"][0] == pytest.approx(-model.head.loss(h, x[0, 1:]).item(), rel=1e-4)
    assert math.isfinite(found.scores["energy"].sum())


def test_the_same_text_with_another_tokenizer_is_no_other_domain(home):  # noqa: F811
    """Boundaries of documents stay boundaries, and no window is left out for its length."""
    own, other = (load_data(home / "data" / name) for name in ("small", "other"))
    theirs, words = other.load_tokenizer(), own.load_tokenizer()
    texts = ["The king of the sea", "was a dark day."]
    ids = np.array([i for text in texts for i in (*theirs.encode(text), theirs.eot_id)])
    expected = [i for text in texts for i in (*words.encode(text), words.eot_id)]
    assert confidence.encoded(ids, theirs, words) == expected
    assert len(confidence.encoded_windows(other, own, "val", 16, 4)) == 4
    with pytest.raises(UserError, match="windows that are long enough"):
        confidence.own_windows(own, "test", 16, 4)


def test_bert_is_refused(home, monkeypatch):  # noqa: F811
    with pytest.raises(Exception, match="bert predicts masked tokens"):
        call(confidence.main, monkeypatch, home / "out" / "bert")


@pytest.mark.parametrize(
    ("given", "expected"),
    [("wikitext2", ["wikitext2"]), ("1984, 007,", ["1984", "007"]), ('["a,b"]', ["a,b"])],
)
def test_lists_need_no_brackets(given, expected):
    (c,) = parse(["out/a", f"--other={given}"], confidence.ConfidenceConfig, words="runs")
    assert c.other == expected
    (q,) = parse(["out/a", "--bits=8,4"], quantization.QuantizationConfig, words="runs")
    assert q.bits == [8, 4]
    with pytest.raises(UserError, match=r"--bits=\[8,x\]: expected a list"):
        parse(["out/a", "--bits=8,x"], quantization.QuantizationConfig, words="runs")
