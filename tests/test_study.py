"""The runner of the studies, and the study of heads: which settings it wants as results come in. No
training here but for one tiny run."""

import copy
import functools
import itertools
import json
import math

import numpy as np
import pytest
import scipy.stats
from conftest import ROOT, script_here

from analysis import intervals
from base.command_line import read_yaml
from base.errors import UserError
from studies import heads, heads_report, page, runner
from studies.runner import Job, Table
from training import checkpoint, distributed

BASE = {
    "dataset": "wikitext2",
    "arch": "gpt",
    "n_embd": 128,
    "learning_rate": 3e-3,
    "max_iters": 200,
}


def table_of(path) -> Table:
    return Table(path, heads.COLUMNS, heads.KEY)


def wanted(table, base=BASE, **settings) -> list[dict]:
    return heads.Plan(table, heads.StudyConfig(**settings), base).settings()


def run(tmp_path, loss, **settings) -> Table:
    """Plays the study with `loss(row)` in place of training -> the table."""
    table = table_of(tmp_path / "heads.csv")
    for _ in range(40):
        todo = [s for s in wanted(table, **settings) if not table.find(s)]
        if not todo:
            return table
        for s in todo:
            table.add({**s, "val_loss": f"{loss(s):.6f}"})
    raise AssertionError("it does not end")


def bowl(row) -> float:
    """Best at learning rate 0.003 and exponent 40; any head and link alike."""
    n = float(row["exponent"] or 40)
    return (
        6
        + math.log(float(row["learning_rate"]) / 3e-3) ** 2
        + math.log(n / 40) ** 2
        + abs(math.log(float(row["init_std"]) / 0.02)) / 10
    )


def test_every_family_gets_the_same_number_of_settings(tmp_path):
    table = run(tmp_path, bowl, stages="1")
    counts = {
        key: len(list(rows))
        for key, rows in itertools.groupby(
            sorted((r["head"], r["link"], r["p"]) for r in table.rows)
        )
    }
    for head, link in itertools.product(heads.FAMILIES, heads.LINKS):
        assert counts[head, link, ""] == 12 + 2 + 2 + 2, (head, link)
    for (head, flags, _), link in itertools.product(heads.VARIANTS.values(), heads.LINKS):
        assert counts[head, link, f"{flags['head_p']:.6g}" if "head_p" in flags else ""] == 4, (
            head,
            link,
        )
    assert counts[*heads.PENALTY, ""] == 12 + 2 + 2 + 2
    # The bowl's scale is on the grid and its learning rate between two of it.
    for head in heads.CONTROLS:
        assert counts[head, "control", ""] == 12 + 2 + 2 + 2, head


def test_the_grid_is_extended_beyond_its_edge(tmp_path):
    """A head whose best exponent lies far below the grid: it is followed, but not for ever."""
    table = run(
        tmp_path,
        lambda r: bowl({**r, "exponent": str(float(r["exponent"] or 40) * 400)}),
        stages="1",
        only="cosine",
    )
    exponents = sorted({float(r["exponent"]) for r in table.rows})
    # 0.125 is the best of the grid: half a step.
    assert min(exponents) == 8 / 4**4 and max(exponents) == 512 and 0.0625 in exponents
    assert len(table.rows) == 2 * (12 + heads.EDGES + 2 + 2 + 2)


def test_stage_two_trains_winners_with_every_seed(tmp_path):
    table = run(tmp_path, bowl, stages="12")
    long = [r for r in table.rows if r["stage"] == "2"]
    for head, link in [
        heads.PENALTY,
        *itertools.product(heads.FAMILIES, heads.LINKS),
        *((h, "control") for h in heads.CONTROLS),
    ]:
        mine = [r for r in long if (r["head"], r["link"], r["p"]) == (head, link, "")]
        assert (
            sorted(r["seed"] for r in mine) == ["1338", "1339", "1340"]
            and len({r["exponent"] for r in mine}) == 1
        )
        best = min(
            (
                r
                for r in table.rows
                if r["stage"] == "1" and (r["head"], r["link"], r["p"]) == (head, link, "")
            ),
            key=heads.loss,
        )
        assert (
            mine[0]["exponent"] == best["exponent"]
            and mine[0]["learning_rate"] == best["learning_rate"]
        )
    assert sum(r["head"] == "hamming_gumbel" for r in long) == 2


def test_stages_three_and_four_take_the_best_heads(tmp_path):
    order = {head: i / 10 for i, head in enumerate(heads.FAMILIES[::-1])}  # the last family is best
    table = run(
        tmp_path,
        lambda r: bowl(r) + order.get(r["head"], 0) + (0.01 if r["link"] == "softmax" else 0),
    )
    third = [r for r in table.rows if r["stage"] == "3"]
    best = set(heads.FAMILIES[: -heads.CHAMPIONS - 1 : -1])
    for place in ("bert", "qwen", "imdb_bpe"):
        mine = {(r["head"], r["link"]) for r in third if place in (r["arch"], r["dataset"])}
        assert mine == {("cross_entropy", "control"), *itertools.product(best, heads.LINKS)}
    fourth = [r for r in table.rows if r["stage"] == "4"]
    links = {
        ablation: {(r["head"], r["link"]) for r in fourth if r["ablation"] == ablation}
        for ablation in heads.ABLATIONS
    }
    winners = {*itertools.product([heads.FAMILIES[-1]], heads.LINKS), ("cross_entropy", "control")}
    assert links["untied"] == winners and links["learnt exponent"] == winners - {
        ("cross_entropy", "control")
    }
    assert {r["seed"] for r in fourth if r["ablation"] == heads.LONGER} == set(
        map(str, heads.SEEDS)
    )
    assert links[heads.LONGER] == set(itertools.product(best, heads.LINKS))
    # It has no exponent.
    assert sum(r["head"] == "cross_entropy" for r in fourth) == len(heads.ABLATIONS) - 2
    stds = {r["ablation"]: float(r["init_std"]) for r in fourth if r["head"] == "cross_entropy"}
    assert (
        stds["init x 4"] == pytest.approx(16 * stds["init x 0.25"])
        and stds["untied"] == stds["label smoothing"]
    )


def test_stage_five_comes_last_and_measures_alone(tmp_path):
    table = run(tmp_path, bowl)
    stages = [s["stage"] for s in wanted(table)]
    assert set(stages) == set("12345") and "5" not in stages[: -stages.count("5")]
    last = [r for r in table.rows if r["stage"] == "5"]
    assert {r["iters"] for r in last} == {str(heads.COST_ITERS)}
    assert {(r["head"], r["link"], r["p"]) for r in last} == {
        (r["head"], r["link"], r["p"]) for r in table.rows if r["stage"] == "2"
    }
    assert [heads.training(r).alone for r in (table.rows[0], last[0])] == [False, True]


def test_a_run_that_diverged_is_no_winner(tmp_path):
    table = run(
        tmp_path,
        lambda r: math.nan if float(r["learning_rate"]) > 5e-3 else bowl(r),
        stages="1",
        only="euclidean",
    )
    assert any(r["val_loss"] == "nan" for r in table.rows)
    (sweep,) = [
        s for s in heads.sweeps(table, BASE) if (s.head, s.link) == ("euclidean", "harmonic")
    ]
    assert float(sweep.winner()["learning_rate"]) == 0.003


def test_it_goes_on_where_it_stopped(tmp_path):
    done = run(tmp_path, bowl, stages="1", only="manhattan").rows
    again = table_of(tmp_path / "heads.csv")
    assert again.rows == done
    assert all(again.find(s) for s in wanted(again, stages="1", only="manhattan"))


def test_the_committed_table_belongs_to_this_plan():
    """Its settings are ones that the plan wants: no row of another grid."""
    table = table_of(ROOT / "results" / "heads.csv")
    known = wanted(table, read_yaml(ROOT / "configs" / "study.yaml"))
    keys = {tuple(s.values()) for s in known}
    assert table.rows and all(tuple(r[k] for k in heads.KEY) in keys for r in table.rows)
    assert len({tuple(r[k] for k in heads.KEY) for r in table.rows}) == len(table.rows)


@pytest.fixture
def small_study(tiny_data, tmp_path):
    """-> the study's settings, its measure, an empty table and a setting."""
    config = tmp_path / "study.yaml"
    sizes = dict(
        arch="gpt",
        n_layer=1,
        n_head=2,
        n_embd=16,
        block_size=16,
        batch_size=4,
        max_iters=3,
        warmup_iters=1,
        eval_iters=2,
    )
    sizes |= dict(
        eval_interval=3, learning_rate=0.003, compile=False, emissions=False, dataset=str(tiny_data)
    )
    config.write_text(
        "".join(f"{k}: {str(v).lower() if isinstance(v, bool) else v}\n" for k, v in sizes.items())
    )
    c = heads.StudyConfig(config=str(config), runs=str(tmp_path / "runs"))
    table = table_of(tmp_path / "table.csv")
    s = heads.Sweep(table, "cosine", "softmax", read_yaml(c.config)).make(1e-3, 4.0)
    return c, functools.partial(heads.measure, c), table, s


@pytest.mark.slow
def test_a_run_that_measures_a_cost(small_study):
    c, measure, _, s = small_study
    s |= {"stage": "5", "seed": "1338", "iters": "10"}
    (cost,) = runner.train(c, heads.training(s), measure)
    watts = float(cost["joules_per_token"]) * float(cost["tokens_per_s"])
    assert 1 < watts < 2000 and float(cost["tokens_per_s"]) > 50 and "test_loss" not in cost


def test_a_run_of_the_study(small_study, tiny_data, tmp_path):
    """One setting, trained and written; started again, it is not repeated."""
    c, measure, table, s = small_study
    (row,) = runner.train(c, heads.training(s), measure)
    table.add({**s, **row})
    row = table.find(s)
    assert 4 < float(row["val_loss"]) < 7 and float(row["scale"]) > 1 and row["iters"] == "3"
    assert 1 < float(row["effective_rank"]) <= 16 and float(row["seconds"]) > 0
    assert row["joules_per_token"] == ""
    folder = tmp_path / "runs" / runner.run_name(s)
    model, *_ = checkpoint.load_run(folder)
    # Looked at in stage 2; these data have none.
    assert row["test_loss"] == "" and math.isnan(heads.test_loss(model, tiny_data))
    assert table_of(tmp_path / "table.csv").find(s)["head"] == "cosine"
    (folder / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match="has no metrics.jsonl"):
        measure(folder, s)


@pytest.mark.parametrize("status", [3, 2])
def test_a_run_that_ends_early(tmp_path, monkeypatch, status):
    """With status 3 it stopped at a loss that is not finite: its row has no losses. Its time has
    that of the start before."""
    monkeypatch.setattr(distributed, "launcher", lambda processes: ["-c", f"exit({status})"])
    c = heads.StudyConfig(runs=str(tmp_path))
    training = runner.Training({"head": "cosine"}, {"init_from": "auto"})
    (tmp_path / "cosine").mkdir()
    before = {"iter": 9, "elapsed_s": 1000.0, "tokens_per_s": 5.0}
    (tmp_path / "cosine/metrics.jsonl").write_text(json.dumps(before) + "\n")
    if status == 3:
        (row,) = runner.train(c, training, heads.measure)
        assert row.keys() == {"seconds"} and 1000 <= float(row["seconds"]) < 1300
    else:
        with pytest.raises(UserError, match="cosine ended with status 2"):
            runner.train(c, training, heads.measure)


def pairs_table(path) -> Table:
    return Table(path, ["a", "b", "commit"], ["a"])


def test_the_runner_adds_what_a_table_lacks(tmp_path, capsys):
    """A job begins when it is wanted; a row that is there is not asked for again."""
    table = pairs_table(tmp_path / "t.csv")
    table.add({"a": 1, "b": "old"})

    def wanted() -> list[Job]:
        found = [Job({"a": a}, copy.copy, ([{"b": f"new {a}"}],)) for a in (1, 2)]
        return found + ([Job({"a": 3}, int, ("x",))] if table.find({"a": 2}) else [])

    with pytest.raises(ValueError, match="invalid literal"):
        runner.complete(table, wanted, 1, lambda rows: rows[0]["b"])
    rows = pairs_table(tmp_path / "t.csv").rows
    assert [(r["a"], r["b"]) for r in rows] == [("1", "old"), ("2", "new 2")]
    assert "2: new 2 (2 of 2 known so far, 00:00 left)" in capsys.readouterr().out


def test_ctrl_c_ends_a_study_with_a_word_on_how_to_resume_it(tmp_path, capsys):
    def wanted() -> list[Job]:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        runner.complete(pairs_table(tmp_path / "t.csv"), wanted, 1, lambda rows: "")
    assert stop.value.code == 130 and "call it again to resume" in capsys.readouterr().err


def test_who_may_run_beside_whom():
    jobs = [Job({"a": i}, int, alone=i == 2) for i in range(4)]
    assert runner._startable(jobs, [], 3) == jobs[:2]
    assert runner._startable(jobs, jobs[:1], 3) == jobs[1:2]
    assert runner._startable(jobs[2:], jobs[:1], 3) == []
    assert runner._startable(jobs[2:], [], 3) == jobs[2:3]
    assert runner._startable(jobs[2:], jobs[2:3], 3) == []


def test_a_studys_table_is_appended_to_or_refused(tmp_path):
    path = tmp_path / "t.csv"
    for before, rows in (
        (None, 0),
        ("", 0),
        ("a,b\r\n", 0),
        ("a,b\r\n1,2\r\n", 1),
        ("a,b\n1,2", 1),
    ):
        path.unlink(missing_ok=True)
        if before is not None:
            path.write_text(before, newline="")
        table = Table(path, ["a", "b"], ["a"])
        table.add({"a": 3, "b": 4})
        table.add({"a": 5})
        assert [(r["a"], r["b"]) for r in Table(path, ["a", "b"], ["a"]).rows] == [
            ("1", "2")
        ] * rows + [
            ("3", "4"),
            ("5", ""),
        ]
    for before, message in (
        ("a,b,c\n1,2,3\n", "t.csv has other columns"),
        ("b,a\n", "t.csv has other columns"),
        ("a,b\n1,2\n3\n", "line 3 has not as many cells"),
        ("a,b\n1,2,3\n", "line 2 has not as many cells"),
    ):
        path.write_text(before)
        with pytest.raises(UserError, match=message):
            Table(path, ["a", "b"], ["a"])
        assert path.read_text() == before


@pytest.mark.parametrize(
    "flag, words",
    [
        ("--stages=6", "stages=6 is not made of"),
        ("--long_iters=25", "long_iters=25 must be a multiple of 10"),
        ("--only=cosin", "only=cosin is not a head"),
        ("--config=configs/studi.yaml", "study.yaml"),
    ],
)
def test_bad_flags(flag, words):
    done = script_here("-m", "studies.heads", flag)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr


def known(stage, head, link, value, seed=1):
    """A row of the study."""
    return dict.fromkeys(heads.COLUMNS, "") | {
        "stage": stage,
        "head": head,
        "link": link,
        "val_loss": str(value),
        "val_losses": f"9 7 {value}",
        "iters": "20",
        "seed": str(seed),
        "bits_per_byte": "2",
        "exponent": "8",
        "scale": "8",
        "learning_rate": "0.001",
    }


@pytest.fixture
def known_rows():
    """Stage 1: cosine, once without a finite loss, and its twin. Stage 2: cosine, half a nat below
    cross_entropy with each of three seeds."""
    rows = [
        known("1", "cosine", "harmonic", 6.0),
        known("1", "cosine", "harmonic", "nan"),
        known("1", "cosine", "softmax", 6.25),
    ]
    rows += [known("2", "cross_entropy", "control", 5 + s / 10, s) for s in range(3)]
    return rows + [known("2", "cosine", "harmonic", 4.5 + s / 10, s) for s in range(3)]


def test_the_best_settings_of_known_rows(known_rows):
    first, second = heads_report.best_settings(known_rows[:3])
    assert (first["link"], first["harmax"], first["settings"]) == ("harmonic", -0.25, 2)
    assert second["harmax"] is None
    assert "| cosine | harmonic | 8 |" in heads_report.stage_one(known_rows)


def test_the_long_runs_of_known_rows(known_rows):
    with pytest.raises(UserError, match="several runs of cosine, softmax, with one seed"):
        heads_report.long_runs([known("2", "cosine", "softmax", v) for v in (5.0, 5.1)])
    best, _ = heads_report.long_runs(known_rows)
    # Paired: seeds cancel.
    assert best["name"] == "cosine" and best["above_ce"] == pytest.approx((-0.5, 0), abs=1e-9)
    assert best["loss"] == pytest.approx(4.6) and best["energy"] is None
    assert best["reached"] == pytest.approx(
        np.mean([10 + 10 * (7 - 5 - s / 10) / (7 - 4.5 - s / 10) for s in range(3)])
    )
    assert math.isinf(heads_report.reached(known_rows[-1], 4.0))
    assert heads_report.reached(known_rows[-1], 8) == 5
    assert best["half"] == pytest.approx(scipy.stats.t.ppf(0.975, 2) * 0.1 / math.sqrt(3), rel=1e-3)
    costs = [
        known("5", *head, 9) | {"tokens_per_s": "100", "joules_per_token": j}
        for head, j in ((("cosine", "harmonic"), "3"), (("cross_entropy", "control"), "2"))
    ]
    with_costs = [*known_rows, *costs]
    energy = heads_report.long_runs(with_costs)[0]["energy"]
    assert energy == pytest.approx(best["reached"] / 20 * 3 / 2)
    assert "| 100 | 3000.00 |" in heads_report.stage_two_training(with_costs)
    tested = [{**r, "val_loss": "1", "test_loss": r["val_loss"]} for r in known_rows]
    assert heads_report.long_runs(tested)[0]["loss"] == pytest.approx(4.6)


def test_the_tables_of_known_rows(known_rows):
    place, rows = {"arch": "bert", "dataset": "wikitext2"}, known_rows
    for head, link, value in (
        ("cosine", "harmonic", 7),
        ("cosine", "softmax", 7.5),
        ("cross_entropy", "control", 8),
    ):
        rows.append(known("3", head, link, value) | place)
    shown = "| bert | wikitext2 | cosine | harmonic | 7.0000 | - | -1.000 | -0.500 |"
    assert shown in heads_report.stage_three(rows)
    rows.append(known("4", "cosine", "harmonic", 4.25, 0) | {"ablation": "untied"})
    shown = "| cosine | harmonic | untied | 1 | 4.2500 | -0.250 | -0.750 | - |"
    assert shown in heads_report.stage_four(rows)
    assert "-0.500 ± 0.000" in heads_report.stage_two(rows)
    rows += [known("2", *heads.PENALTY, 4.6 + s / 10, s) for s in range(3)]
    shown = (
        "| cosine | harmonic | 8 | - | 0.001 | 3 | 4.6000 ± 0.2484 | 99.5 | 2.0000 |"
        " -0.500 ± 0.000 | -0.100 ± 0.000 | - | 18 (3 of 3) |"
    )
    assert shown in heads_report.stage_two(rows)


def test_comparisons_of_the_committed_rows():
    """Holm's correction of a worked example, and a paired difference as the page quotes it."""
    assert intervals.holm({"a": 0.03, "b": 0.01, "c": 0.04}) == pytest.approx(
        {"b": 0.03, "a": 0.06, "c": 0.06}
    )
    found = intervals.holm({"a": 0.04, "diverged": math.nan, "c": 0.001})
    assert found["a"] == pytest.approx(0.08) and found["c"] == pytest.approx(0.003)
    assert math.isnan(found["diverged"])
    rows = table_of(ROOT / "results" / "heads.csv").rows
    assert "| loss | -0.0328 ± 0.0124 |" in heads_report.compared(
        rows, "cosine/harmonic/4,euclidean/harmonic"
    )
    assert (
        "| cosine | harmonic | its softmax twin | +0.0760 ± 0.0095 | 0.001 | 0.008 |"
        in heads_report.p_values(rows)
    )
    with pytest.raises(UserError, match="compare=cosine/harmonic: name two heads"):
        heads_report.compared(rows, "cosine/harmonic")


def test_the_pages_tables_are_those_of_the_rows():
    """python -m studies.page writes them. Each table is on one page."""
    shown = []
    for path in (ROOT / "results").glob("*.md"):
        text = path.read_text()
        assert page.filled(text, ROOT / "results") == text, path.name
        names = [found["name"] for found in page.PLACE.finditer(text)]
        assert len(names) == text.count("<!-- table: "), path.name
        shown += names
    assert sorted(shown) == sorted(page.TABLES)


def test_a_table_of_another_version_is_refused(tmp_path):
    (tmp_path / "heads.csv").write_text("stage,head\n1,cosine\n")
    with pytest.raises(UserError, match="heads.csv has other columns"):
        table_of(tmp_path / "heads.csv")
    with pytest.raises(UserError, match="asks for a table 'stage 9'"):
        page.filled("<!-- table: stage 9 -->\n<!-- end -->", tmp_path)


def test_the_report_of_the_committed_table(tmp_path):
    done = script_here("-m", "studies.heads_report", f"--out={tmp_path / 'study.png'}")
    assert done.returncode == 0 and "Stage 1" in done.stdout and done.stderr == ""
    assert all((tmp_path / f"study{part}.png").stat().st_size > 10_000 for part in ("", "_curves"))
