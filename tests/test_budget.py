"""The plans of the budget study and of the study of optimisers."""

from collections import Counter
from dataclasses import replace

from base.command_line import parse
from model import ModelConfig
from studies import budget, optimizers
from studies.runner import Table
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
        if key["stage"] != "sweep":
            assert key["learning_rate"] == max(budget.RATES)
            assert key["stage"] == "strength" or key["exponent"] == (head.exponent or "")
    count = Counter(key["stage"] for key in done)
    main, controls = len(budget.HEADS), len(budget.CONTROLS)
    assert count == {
        "sweep": 3 * (main + controls), "2M": 5 * (main + controls),
        "strength": 2 * (main + controls), "0.6M": 5 * main, "6M": 3 * main, "20M": 9,
        "wiki": 3 * main, "dropout": 3,
    }  # fmt: skip
    seeds = [key["seed"] for key in done if key["stage"] == "2M"]
    assert seeds[: main + 1] == [1338] * main + [1339]  # seed by seed
    one_of_each = {key["name"]: budget.training(key).flags for key in done}
    for flags in [*one_of_each.values(), optimizers.settings()[-1].flags]:
        words = [f"--{k}={v}" for k, v in {**flags, "dataset": "wiki"}.items()]
        m, c = parse(words, ModelConfig, TrainConfig)
        assert not replace(m, n_embd=256, n_head=4).problems() + c.problems()


def test_summaries_are_paired_by_seed():
    rows = [
        dict(stage="2M", name=name, seed=seed, test_loss=loss)
        for name, losses in (("cross_entropy", (5.0, 5.2)), ("cosine", (4.9, 5.1)))
        for seed, loss in zip("12", losses, strict=True)
    ]
    assert "| 2M | cosine | 2 | 5.0000 | -0.1000 | 0.0000 |" in _single_spaced(budget.summary(rows))
    rows = [
        dict(head="cosine", link="softmax", optimizer=optimizer, seed=seed, val_loss=loss)
        for optimizer, losses in (("adamw", (5.0, 5.2)), ("muon", (4.9, 5.1)))
        for seed, loss in zip("12", losses, strict=True)
    ]
    assert "-0.100 ± 0.000" in optimizers.summary(rows)


def _single_spaced(text: str) -> str:
    return "\n".join(" ".join(line.split()) for line in text.splitlines())
