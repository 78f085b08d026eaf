"""What is measured at the end of the budget study's runs."""

import pytest
import scipy.stats
import torch
from conftest import TINY

from studies import budget, ends
from text.token_files import load_data
from training import checkpoint


def test_a_run_is_measured(train, tiny_data, tmp_path, monkeypatch):
    """Every measure of a distance head; the losses of both halves add up to the whole loss."""
    monkeypatch.setattr(ends, "SPLIT", "val")
    monkeypatch.setattr(ends, "TEXTS", {"python": None})
    monkeypatch.setattr(ends, "WINDOWS", 4)
    monkeypatch.setattr(ends, "TOKENS", 4 * TINY["block_size"])
    assert train(head="cosine")[0] == 0
    rows = {r["measure"]: float(r["value"]) for r in ends.measure(tmp_path / "run", str(tiny_data))}
    missing = {name for name in ends.MEASURES if not name.endswith(("imdb", "wiki"))} - set(rows)
    assert missing <= {"parallelogram", "shuffled"}  # The tiny vocabulary may lack the words.
    model, *_ = checkpoint.load_run(tmp_path / "run")
    data = load_data(tiny_data)
    ((h, y, _),) = ends.predictions(model, data, "val", ends.TOKENS)
    rare = ends.rare_tokens(ends.frequency(data))[y].double().mean().item()
    parts = (1 - rare) * rows["loss_frequent"] + rare * rows["loss_rare"]
    assert 0 < rare < 0.4 and parts == pytest.approx(model.head.loss(h, y).item(), abs=1e-4)
    assert rows["increase_3"] != 0 and rows["loss_python"] > 0
    # Data without a test split: the study reports the validation loss, except while it chooses.
    for stage in ("wiki", "20M settings"):
        found = budget.measure(tmp_path / "run", {"dataset": str(tiny_data), "stage": stage})
        assert found.get("test_loss") == (found["val_loss"] if stage == "wiki" else None)
    assert checkpoint.folders(tmp_path / "run") == []  # The study keeps no weights of a choice.


def test_rare_tokens_are_a_tenth_of_the_text():
    counts = torch.tensor([50, 3, 40, 4, 0, 3])
    assert ends.rare_tokens(counts).tolist() == [False, True, False, True, True, True]
    counts[3] = 5  # 11 of 101
    assert ends.rare_tokens(counts).tolist() == [False, True, False, False, True, True]


def test_the_table_pairs_runs_by_seed():
    def row(name, seed, measure, value):
        return {"stage": "20M", "name": name, "seed": seed, "measure": measure, "value": value}

    rows = [row("cross_entropy", s, "ece", v) for s, v in (("1", "0.1"), ("2", "0.3"))]
    rows += [row("cosine", s, "ece", v) for s, v in (("2", "0.25"), ("1", "0.08"), ("3", "9"))]
    rows += [row("cosine", "1", "auroc_nearest_imdb", "0.75")]
    found = ends.tables(rows)
    p = scipy.stats.ttest_rel([0.08, 0.25], [0.1, 0.3]).pvalue  # The only test.
    assert f"| expected calibration error | 0.2000 | -0.0350 ± 0.1906 (p {p:.3f}) |" in found
    assert "nearest prototype | - | is 0.750 |" in found
    assert "6 million" not in found and "20 million" in found
    # A head that is not trained longest adds no test.
    rows += [row("euclidean", s, "ece", v) for s, v in (("1", "0.2"), ("2", "0.5"))]
    first, second = ends.tables(rows).split(
        "Seeds: cross_entropy 2; in common with it: euclidean 2."
    )
    assert "Seeds: cross_entropy 2; in common with it: cosine 2." in first
    assert first.startswith(found) and "| 0.2000 | +0.1500 ± 0.6353 |" in second


def test_the_rate_is_told_apart_from_the_head():
    def row(stage, name, seed, value):
        return {"stage": stage, "name": name, "seed": seed, "measure": "ece", "value": value}

    rows = [row("2M", "cross_entropy", s, v) for s, v in (("1", "0.1"), ("2", "0.3"))]
    assert ends.rate_table(rows) == "No runs yet."
    rows += [row("2M", "cosine", s, v) for s, v in (("1", "0.2"), ("2", "0.6"), ("3", "0.9"))]
    rows += [row("2M rate", "cross_entropy", s, v) for s, v in (("1", "0.2"), ("2", "0.5"))]
    found = ends.rate_table(rows)
    assert (
        "Seeds: cross_entropy at their rate 2; in common with it: cross_entropy at its own rate 2,"
        " cosine 2." in found
    )
    half = {
        d: f"{scipy.stats.sem(d) * scipy.stats.t.ppf(0.975, 1):.4f}" for d in ((0, 0.1), (0.1, 0.2))
    }
    line = f"0.3500 | -0.1500 ± {half[0.1, 0.2]} | +0.0500 ± {half[0, 0.1]} |"
    assert f"| expected calibration error | {line}" in found


def test_jobs_are_runs_whose_weights_are_here(tmp_path):
    c = ends.EndsConfig(table="results/budget.csv", runs=str(tmp_path))
    assert ends.jobs(c) == []
    rows = ends.Table(c.table, budget.COLUMNS, budget.KEY).rows
    row = next(r for r in rows if r["stage"] == "2M")
    folder = tmp_path / ends.run_name({key: row[key] for key in budget.KEY})
    (folder / "ckpt/iter_000001").mkdir(parents=True)
    assert [job.key for job in ends.jobs(c)] == [{k: row[k] for k in ends.KEY}]
