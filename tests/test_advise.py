"""Which head to use: the plan, the decision on made-up losses, and the command. Nothing trains but
one run of a few iterations, and a slow test."""

import math
import re
import sys

import pytest
from conftest import TINY, script_here

from analysis.tables import read_csv
from base.command_line import write_yaml
from studies import advise, runner, verdict
from studies.advise import Costs, Speed
from studies.runner import Table, TrainingConfig

TWINS = {"cosine": "cosine softmax"}
WHERE = "after 1.0 M tokens of wiki (3 seeds)"


def losses(**means) -> verdict.Losses:
    """Losses of three seeds around each mean. Seeds differ by far more than pairs do."""
    noise = {"cross_entropy": (0, 0, 0), "cosine": (0.004, 0, -0.004), "twin": (0, 0.005, -0.003)}
    found = {}
    for name, mean in means.items():
        values = [mean + 0.2 * i + noise[name][i] for i in range(3)]
        found["cosine softmax" if name == "twin" else name] = dict(zip("123", values, strict=True))
    return found


def conclude(found: verdict.Losses) -> list[str]:
    return verdict.conclude(found, TWINS, WHERE, lambda seeds: 10.0 * seeds)


def test_a_clear_difference_is_said_and_credited_to_the_geometry():
    first, twins = conclude(losses(cross_entropy=5.0, cosine=4.9, twin=4.9))
    assert first == (
        "cosine is better than cross_entropy by 0.100 ± 0.010 nats a token after 1.0 M tokens of"
        " wiki (3 seeds). Also better: cosine softmax. The order among these is not tested."
    )
    assert twins.startswith("The gain comes from the geometry, not from HarMax: ")


def test_a_gain_is_credited_to_harmax_where_the_twin_has_none_or_less():
    alone, some = (
        conclude(losses(cross_entropy=5.0, cosine=4.8, twin=twin))[1] for twin in (5.0, 4.9)
    )
    assert alone.startswith("The gain comes from HarMax: cosine is better than cosine softmax by")
    assert some.startswith("HarMax adds to the gain of the geometry: ")
    worse = conclude(losses(cross_entropy=5.0, cosine=4.9, twin=4.8))[1]
    assert worse.startswith("The gain comes from the geometry, not from HarMax: cosine softmax is")


def test_what_cannot_be_told_is_said_with_what_might_tell():
    first, twins = conclude(losses(cross_entropy=5.0, cosine=4.996, twin=5.1))
    assert first.startswith("cannot tell after 1.0 M tokens of wiki (3 seeds): cosine minus cross_")
    assert first.endswith(
        "With 10 seeds (100 minutes) a true difference of this size would be clear about half of"
        " the time. cross_entropy is better than cosine softmax."
    )
    # The head with the lower mean is decided, and the other one is not.
    found = losses(cross_entropy=5.0, cosine=5.1, twin=5.4)
    found["cosine softmax"]["1"] -= 0.8
    first = conclude(found)[0]
    assert ": cosine softmax minus cross_entropy is" in first
    assert first.endswith("cross_entropy is better than cosine.")
    first, twins = conclude(losses(cross_entropy=5.0, cosine=5.0, twin=5.0))
    assert first.endswith("More than 30 seeds would be needed: train longer instead (--minutes).")
    assert twins.startswith("Cannot tell cosine from cosine softmax: ")
    (first, *_) = conclude(losses(cross_entropy=5.0, cosine=5.2, twin=5.1))
    assert first.startswith("cross_entropy is better than every other head: the nearest, cosine so")


def test_a_head_that_is_not_finite_is_left_out():
    found = losses(cross_entropy=5.0, cosine=4.9, twin=4.9)
    found["cosine"]["2"] = math.inf
    first, failed = conclude(found)
    assert first.startswith("cosine softmax is better")
    assert failed.startswith("cosine is not compared: 1 of its 3 runs")
    found["cross_entropy"]["1"] = math.inf
    assert conclude(found)[0].startswith("cannot tell: no head can be compared")


def test_holm_corrects_for_the_number_of_comparisons():
    """A difference that is clear alone is not clear beside two others of the same kind."""
    found = losses(cross_entropy=5.0, cosine=4.99, twin=5.0)
    alone = verdict.differences({n: found[n] for n in ("cross_entropy", "cosine")}, {})
    among = verdict.differences(found, TWINS)
    pair = "cosine", "cross_entropy"
    assert alone[pair].p == pytest.approx(0.0494, abs=1e-3) and alone[pair].better
    assert among[pair].p > 2 * alone[pair].p and not among[pair].better


@pytest.mark.parametrize("workers", (1, 2))
def test_the_plan_fits_the_minutes(workers):
    speeds = [Speed(8.0, 0.1), Speed(9.0, 0.25)]
    costs = Costs(speeds, spent=30.0, workers=workers, seeds=3)
    iterations = costs.iterations(10)
    seconds = 30.0
    for speed in speeds:
        seconds += 5 * (speed.fixed + speed.iteration * iterations // 2)
        seconds += 3 * (speed.fixed + speed.iteration * iterations)
    assert 0.85 * 600 < seconds / workers < 600
    assert iterations % 2 == 0 and costs.minutes(iterations) <= 10 < costs.minutes(iterations + 2)
    assert Costs(speeds, spent=30.0, workers=workers, seeds=6).iterations(10) < iterations
    assert costs.iterations(0.1) == 0


@pytest.fixture
def command(tiny_data, tmp_path, monkeypatch, capsys):
    """command(minutes=...) -> stdout of the whole study. Losses are made up: the best rate is the
    config's, and strengths hardly matter. A run lasts a second, and an iteration a tenth of one."""
    monkeypatch.chdir(tmp_path)
    asked = []
    scores = {"cross_entropy": 5.0, "cosine": 4.8, "cosine softmax": 4.79}

    def complete(c, table, wanted, measure):
        while todo := [t for t in wanted() if not table.find(t.key)]:
            asked.extend(todo)
            for training in todo:
                key = training.key
                loss = scores[key["name"]] + 0.01 * (int(key["seed"]) % 3)
                loss += abs(math.log(float(key["learning_rate"]) / 1e-3))
                row = {"val_loss": loss, "half_loss": loss + 1, "tokens_per_s": 640}
                table.add({**key, **row, "seconds": 1 + 0.1 * int(key["iterations"])})

    monkeypatch.setattr(advise, "complete_trainings", complete)
    sizes = {name: TINY[name] for name in ("n_layer", "n_head", "n_embd", "block_size")}
    flags = {"dataset": tiny_data, "batch_size": 4, "learning_rate": 1e-3, "heads": "cosine"}

    def run(**more):
        asked.clear()
        words = [f"--{k}={v}" for k, v in {**sizes, **flags, **more}.items()]
        config = tmp_path / "empty.yaml"
        config.write_text("bias: false\n")
        monkeypatch.setattr(sys, "argv", ["advise", str(config), *words])
        advise.main()
        return capsys.readouterr().out, [t.key for t in asked]

    return run


def test_all_heads_get_equal_grids_and_the_same_seeds(command, tmp_path):
    out, asked = command(minutes=10)
    for name in ("cross_entropy", "cosine", "cosine softmax"):
        mine = [key for key in asked if key["name"] == name]
        assert [key["stage"] for key in mine] == ["speed"] + ["sweep"] * 5 + ["final"] * 3
        finals = mine[-3:]
        assert [key["seed"] for key in finals] == ["1338", "1339", "1340"]
        assert {key["learning_rate"] for key in finals} == {"0.001"}
        assert int(finals[0]["iterations"]) == 2 * int(mine[1]["iterations"]) >= 100
    assert "cosine softmax is better than cross_entropy by 0.210 ± 0.000 nats a token" in out
    assert "Halfway, cosine softmax minus cross_entropy was -0.210" in out
    assert (tmp_path / "out/advise/tiny.png").stat().st_size > 5000
    table = read_csv(tmp_path / "out/advise/tiny.csv", advise.COLUMNS)
    # Called again, nothing is repeated; another model begins anew, in the same table.
    assert command(minutes=10)[1] == [] and len(table) == 3 * 9
    assert len(command(minutes=10, n_embd=32)[1]) == 3 * 9


@pytest.fixture
def tiny_config(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text("".join(f"{k}: {str(v).lower()}\n" for k, v in TINY.items()))
    return path


def test_a_run_is_trained_and_measured(tiny_data, tiny_config, tmp_path):
    words = [str(tiny_config), f"--dataset={tiny_data}", "--heads=cosine"]
    c, m, t, data = advise.configure(words)
    study = advise.Study(c, m, t, data, Table(tmp_path / "t.csv", advise.COLUMNS, advise.KEY))
    write_yaml(tmp_path / "config.yaml", m, t)
    how = TrainingConfig(str(tmp_path / "config.yaml"), runs=str(tmp_path / "runs"))
    key = study.key("final", "cosine softmax", 6, (1e-3, 0.5), 1338)
    (row,) = runner.train(how, study.training(key), advise.measure)
    assert 4 < float(row["val_loss"]) < float(row["half_loss"]) < 7
    assert key["exponent"] == "2" and float(row["tokens_per_s"]) > 0
    assert (tmp_path / "runs" / runner.run_name(key) / "metrics.jsonl").is_file()
    assert not list(tmp_path.glob("runs/*/ckpt/iter_*"))


@pytest.mark.slow
def test_a_real_study_in_the_time_that_it_asked_for(tiny_data, tiny_config, tmp_path):
    words = ["-m", "studies.advise", tiny_config, f"--dataset={tiny_data}"]
    words += ["--heads=cosine_linear", f"--out={tmp_path / 'out'}"]
    done = script_here(*words, "--minutes=0.01")
    assert done.returncode == 2 and "is enough for final runs of 0 iterations" in done.stderr
    (minutes,) = re.findall(r"use --minutes=(\d+)", done.stderr)
    done = script_here(*words, f"--minutes={minutes}")
    assert done.returncode == 0, done.stderr
    assert "cosine_linear" in done.stdout and (tmp_path / "out" / "tiny.png").is_file()
    rows = read_csv(tmp_path / "out" / "tiny.csv", advise.COLUMNS)
    assert len(rows) == 2 * 9 and all(0 < float(row["val_loss"]) < 7 for row in rows)


def test_mistakes_are_told_at_once():
    done = script_here("-m", "studies.advise", "--heads=cosin", "--seeds=1")
    assert done.returncode == 2 and "did you mean cosine?" in done.stderr
    assert "seeds=1 must be at least 3" in done.stderr
    done = script_here("-m", "studies.advise", "--head=cosine", "--init_from=gpt2")
    assert done.returncode == 2 and "--head: the study sets it itself" in done.stderr
    assert "trains from scratch" in done.stderr
    done = script_here("-m", "studies.advise", "--link=softmax")
    assert done.returncode == 2 and "--link: the study sets it itself" in done.stderr
