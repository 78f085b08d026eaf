"""The plans of the budget study and of the study of optimisers, and the report of the first."""

import math
from collections import Counter
from dataclasses import replace

import pytest

from base.command_line import parse
from base.errors import UserError
from model import ModelConfig
from studies import budget, budget_report, optimizers
from studies.runner import Table
from studies.search import next_setting
from training.config import TrainConfig


def test_the_sweep_decides_and_every_run_is_one_that_train_takes(tmp_path, monkeypatch):
    """A study in which the largest rate is the best."""
    monkeypatch.chdir(tmp_path)
    table = Table(tmp_path / "budget.csv", budget.COLUMNS, budget.KEY)
    plan, done = budget.Plan(table), []
    while todo := [key for key in plan.settings() if table.find(key) is None]:
        for key in todo:
            table.add({**key, "val_loss": 5 - 100 * key["learning_rate"]})
        done += todo
    for key in done:
        head = budget.ALL[key["name"]]
        if key["stage"] not in budget.UNTESTED:
            assert key["learning_rate"] == 8 * max(budget.RATES)  # three steps beyond the edge
            assert key["exponent"] == (head.exponent or "")
    # A rate at the edge is left at the best strength too, where no other rate was tried.
    tried = [(16, 1e-3), (16, 2e-3), (16, 4e-3), (8, 1e-3), (32, 1e-3), (64, 1e-3)]
    assert next_setting((32, 1e-3), tried) == (32, 5e-4)
    assert next_setting((32, 1e-3), [*tried, (32, 5e-4)]) is None
    count = Counter(key["stage"] for key in done)
    main, controls = len(budget.HEADS), len(budget.CONTROLS)
    assert count == {
        "sweep": 8 * (main + controls), "2M": 5 * (main + controls), "0.6M": 5 * main,
        "6M": 3 * main, "20M": 9, "2M rate": 5, "wiki": 3 * main, "imdb": 3 * main, "dropout": 3,
        "20M settings": 6, "cost": 3 * (main + controls),
    }  # fmt: skip
    assert set(count) == set(budget.STAGES)
    elsewhere = {(key["stage"], key["dataset"]) for key in done} - {
        (stage, "wikitext2") for stage in budget.STAGES
    }
    assert elsewhere == {("imdb", "imdb_bpe"), ("wiki", "wiki")}
    some = ("cosine", "euclidean")  # The runs of some heads, as the whole plan has them.
    assert budget.Plan(table, some).settings() == [k for k in plan.settings() if k["name"] in some]
    assert all(
        k["name"] in some
        for k in budget.Plan(
            Table(tmp_path / "new.csv", budget.COLUMNS, budget.KEY), some
        ).settings()
    )
    wrong = "stages: unknown stage 20m; did you mean 20M.*heads: unknown head cos"
    with pytest.raises(UserError, match=f"(?s){wrong}"):
        parse(["--stages=6M,20m", "--heads=cos"], budget.BudgetConfig)
    seeds = [key["seed"] for key in done if key["stage"] == "2M"]
    long = len(budget.LONG)
    assert seeds[: long + 1] == [2001] * long + [2002]  # seed by seed
    one_of_each = {key["name"]: budget.training(key).flags for key in done}
    empty = Table(tmp_path / "none.csv", optimizers.COLUMNS, optimizers.KEY)
    muon = optimizers.training(optimizers.settings(empty)[-1]).flags
    for flags in [*one_of_each.values(), muon]:
        words = [f"--{k}={v}" for k, v in {**flags, "dataset": "wiki"}.items()]
        m, c = parse(words, ModelConfig, TrainConfig)
        assert not replace(m, n_embd=256, n_head=4).problems() + c.problems()


def test_summaries_are_paired_by_seed():
    rows = [
        dict(stage="2M", name=name, seed=seed, test_loss=loss)
        for name, losses in (("cross_entropy", (5.0, 5.2)), ("cosine", (4.9, 5.1)))
        for seed, loss in zip("12", losses, strict=True)
    ]
    assert "| 2M | cosine | 2 | 5.0000 | -0.100 ± 0.000 |" in _single_spaced(budget.summary(rows))


def test_optimisers_are_compared_at_the_best_rate_and_strength_of_each(tmp_path):
    """With Muon the best rate is beyond the edge. cross_entropy is best at four times its size, and
    at that size with half the rate."""
    table = Table(tmp_path / "optimizers.csv", optimizers.COLUMNS, optimizers.KEY)
    while todo := [run for run in optimizers.settings(table) if table.find(run) is None]:
        for run in todo:
            best = 8e-3 if run["optimizer"] == "muon" else 2e-3
            if run["head"] == "cross_entropy" and run["factor"] == 4:
                best /= 2
            loss = 5 + 0.1 * abs(math.log2(run["learning_rate"] / best))
            loss -= (run["head"] == "cosine") + 0.5 * (run["link"] == "softmax")
            if run["head"] == "euclidean":  # The best rate is the lowest.
                loss = 9 + run["learning_rate"] if run["learning_rate"] < 3e-3 else math.nan
            away = 2 if run["head"] == "cross_entropy" else 0
            loss += 0.3 * abs(math.log2(run["factor"]) - away)
            table.add({**run, "val_loss": loss + 0.1 * (run["seed"] - 1337)})
    found = {name: {} for name in optimizers.OPTIMIZERS}
    for row in table.rows:
        if (row["head"], row["link"]) == ("cosine", "softmax"):
            found[row["optimizer"]].setdefault(optimizers.setting_of(row), set()).add(row["seed"])
    sweep, seeds = {"1337"}, {str(seed) for seed in optimizers.SEEDS}
    assert found["adamw"] == {
        **{(1, rate): sweep for rate in (1e-3, 4e-3)},
        (1, 2e-3): {*sweep, *seeds},
        **{(factor, 2e-3): sweep for factor in (0.5, 2)},
    }
    assert {rate for _, rate in found["muon"]} == {1e-3, 2e-3, 4e-3, 8e-3, 16e-3}
    rates, tuned = optimizers.tuned_rates(table.rows), optimizers.tuned(table.rows)
    start, losses = "| cosine | softmax | 3 | 0.002 | 0.008 | 13.86 | 13.86 |", "3.7000 | 3.7000"
    rest, sure = f"{start} {losses} | +0.000 ± 0.000", "(p < 0.001)"
    assert f"{rest} | -2.100 ± 0.000 {sure} | -2.100 ± 0.000 {sure} | - | - |" in rates
    assert f"{rest} | -1.500 ± 0.000 {sure} | -1.500 ± 0.000 {sure} | - | - |" in tuned
    assert "| cross_entropy | - | 3 | 0.001 | 0.004 | 0.08 | 0.08 | 5.2000 | 5.2000 |" in tuned
    less = f"-1.000 ± 0.000 {sure}"
    assert f"| {less} | {less} | +0.500 ± 0.000 | +0.500 ± 0.000 |" in tuned
    assert "| euclidean | softmax | 3 | 9.76563e-07 | 9.76563e-07 | 768 |" in tuned
    assert "4 of 10 winners of the sweep lie on the edge" in tuned
    with pytest.raises(UserError, match="the default strengths are those of n_embd=192"):
        parse(["--config=configs/budget.yaml"], optimizers.OptimizersConfig)
    assert "No head has finished" in optimizers.tuned(table.rows[:30])
    euclidean = {"head": "euclidean", "link": "softmax", "optimizer": "muon", "seed": 1}
    flags = optimizers.training({**euclidean, "factor": 0.5, "learning_rate": 0.1}).flags
    assert (flags["exponent"], flags["link"]) == (384, "softmax") and "factor" not in flags


def test_controls_are_compared_at_their_one_length():
    # The p-value of 0.0037 counts seven times.
    known = {"student_t": (5.1, 5.2, 5.31), "euclidean": (5.0, 5.1, 5.2)}
    more = [
        dict(stage="2M", name=name, seed=str(seed), test_loss=str(loss))
        for name, losses in known.items()
        for seed, loss in enumerate(losses)
    ]
    found = budget_report.controls([*more, dict(more[0], stage="6M")])
    assert "| student_t | euclidean | 2 M | 3 | +0.103 ± 0.014 | 0.007 | behind |" in found
    assert "| 6 M |" not in found


def test_the_report_answers_from_the_rows_that_are_there(tmp_path):
    """cosine leads with three seeds, then with one; its twin diverges; the orders are opposite."""
    rows = []

    def add(stage: str, name: str, *losses: float):
        for seed, loss in enumerate(losses):
            rows.append(dict(stage=stage, name=name, seed=str(seed), test_loss=str(loss)))

    add("0.6M", "cross_entropy", 5.4, 5.5, 5.6)
    add("0.6M", "cosine", 5.3, 5.41, 5.49)
    add("0.6M", "cosine softmax", 5.2, 5.29)
    add("0.6M", "euclidean", 5.1)
    add("0.6M", "euclidean softmax", 5.0)
    add("2M", "cross_entropy", 5.0)
    add("2M", "cosine", 5.1)
    add("2M", "cosine softmax", 5.2)
    add("2M", "euclidean", 5.3)
    add("2M", "euclidean softmax", 5.4)
    add("6M", "cosine softmax", "nan")
    add("6M", "cosine", 4.9)
    leads = budget_report.leads(rows)
    # The p-value of 0.0033 counts 32 times: five tests of each of six distances are planned, and
    # one more of each cosine, at 20 M.
    assert (
        "| cosine | cross_entropy | 0.6 M | 3 | -0.100 ± 0.025 | 0.106 | not told apart | - |"
        in leads
    )
    assert "| cosine | cross_entropy | 2 M | 1 | +0.100 | - | one seed | +0.200 |" in leads
    assert "20 M" not in leads and budget_report.leads([]) == budget_report.NOTHING
    links = budget_report.links(rows)
    assert (
        "| cosine | cosine softmax | 0.6 M | 2 | +0.110 ± 0.127 | 0.635 | not told apart | - |"
        in links
    )
    assert "| cosine | cosine softmax | 6 M | 1 | -inf | - | a run diverged | -inf |" in links
    assert "| 0.6 M | 2 M | 5 | 1 | -1.00 |" in budget_report.ranks(rows)
    assert "20 M" not in budget_report.ranks(rows)
    sweep = [
        dict(stage="sweep", name="cosine", exponent="16", learning_rate=rate, val_loss=loss)
        for rate, loss in (("0.0015", "5.2"), ("0.003", "5.1"), ("0.006", "nan"))
    ]
    assert "| cosine | 3 | 0.003 | 16 | 5.1000 |" in budget_report.settings(sweep)
    progress = budget_report.progress(rows)
    assert "17 of 264 planned runs are done" in progress and "| 0.6M | 10 | 35 |" in progress
    budget_report.draw(rows, tmp_path / "budget.png")
    assert (tmp_path / "budget.png").stat().st_size > 10_000
    assert budget_report.turns(rows) == budget_report.NOTHING
    losses = ["9", *(f"{5 - 0.1 * min(i, 30 - i):.4f}" for i in range(1, 21))]
    course = dict(stage="20M", tokens="20.0", name="cosine", seed="1", val_losses=" ".join(losses))
    assert "| cosine | 1 | 15.0 of 20.0 M | 3.5000 | +0.5000 |" in budget_report.turns([course])
    other = {**course, "exponent": 64, "learning_rate": 1, "val_loss": 4}
    other |= {"seed": budget.SEEDS[0]}
    checked = budget_report.checks([{**other, "val_loss": 3}, {**other, "stage": "20M settings"}])
    assert "| cosine | 1 | 64 | 4.0000 | +1.000 | - |" in checked
    lower = {**course, "name": "cross_entropy", "val_losses": " ".join(["9"] + ["3"] * 20)}
    assert "| cosine | 20 M | 1 | +1.000 | +1.000 |" in budget_report.halfway([course, lower])
    long = [{**course, "name": name} for name in budget.LONG]
    budget_report.draw_curves(long, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_energy_is_that_of_a_token_times_the_tokens(tmp_path):
    rows = [
        dict(stage="cost", name=name, seed=seed, joules_per_token=joules)
        for name, *both in (("cross_entropy", "0.010", "0.010"), ("cosine", "0.011", "0.013"))
        for seed, joules in zip("12", both, strict=True)
    ]
    rows += [dict(stage="2M", name="cosine", bits_per_byte=b) for b in ("1.8", "2.0")]
    found = budget_report.energy(rows)
    assert "| cross_entropy | 2 | 10.00 ± 0.00 | 1.00 | - | 200 |" in found
    assert "| cosine | 2 | 12.00 ± 12.71 | 1.20 | +2.00 ± 12.71 | 240 |" in found
    shape = [
        dict(stage="2M", name=name, seed="1", components_90=n, grad_norm_cv="0.5", ece="0.01")
        for name, n in (("cosine", "90"), ("cosine softmax", "100"))
    ]
    measures = budget_report.measures(shape)
    assert "| cosine | cosine softmax | 2 M | 1 | -10.0 | +0.000 | +0.0000 |" in measures
    assert measures.count("\n") == 2
    budget_report.draw_energy(rows, tmp_path / "energy.png")
    assert (tmp_path / "energy.png").stat().st_size > 10_000
    assert budget.training({**budget.base("cosine"), "stage": "cost"}).alone


def _single_spaced(text: str) -> str:
    return "\n".join(" ".join(line.split()) for line in text.splitlines())
