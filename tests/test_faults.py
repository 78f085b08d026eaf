"""The storm's own tools, one small storm, and the tables that docs/ takes from
results/."""

import csv
import math
import random

import pytest
from conftest import ROOT, script

from analysis import tables
from base.command_line import parse
from base.errors import UserError
from benchmarks import parity, scaling, swap, train_speed
from tests.faults import storm


def rows(name: str) -> list[dict]:
    with open(ROOT / "results" / name, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("how", ["bit", "cut", "missing"])
def test_spoiling_changes_a_file(tmp_path, how):
    path = tmp_path / "a"
    path.write_bytes(bytes(100))
    assert path.name in storm.spoil(path, how, random.Random(1))
    left = path.read_bytes() if path.exists() else None
    expected = {
        "bit": left is not None and len(left) == 100 and sum(map(int.bit_count, left)) == 1,
        "cut": left is not None and len(left) < 100,
    }
    assert expected.get(how, left is None)


@pytest.mark.slow
def test_a_small_storm(tiny_data, tmp_path):
    """Two damages; asked for again, it adds nothing but the table."""
    out = tmp_path / "faults.csv"
    for _ in range(2):
        done = script(
            "-m",
            "tests.faults.storm",
            "--only=damage",
            "--trials=2",
            f"--dataset={tiny_data}",
            f"--out={out}",
        )
        assert done.returncode == 0 and "| damage | 1 | 2 | 2 |" in done.stdout, (
            done.stdout + done.stderr
        )
    with out.open(newline="") as file:
        found = list(csv.DictReader(file))
    assert [(r["fault"], r["trial"], r["as_it_should"]) for r in found] == [
        ("damage", "0", "True"),
        ("damage", "1", "True"),
    ]


def test_a_storm_needs_data(tmp_path):
    with pytest.raises(UserError, match="no prepared data in nowhere"):
        parse(["--dataset=nowhere", f"--out={tmp_path / 'a.csv'}"], storm.StormConfig)


def test_tables_are_the_measured_ones():
    readme, page = (
        (ROOT / "docs/reliability.md").read_text(),
        (ROOT / "docs/multi_node.md").read_text(),
    )
    assert storm.markdown(rows("faults.csv")) in readme
    assert all(r["as_it_should"] == "True" for r in rows("faults.csv"))
    assert (
        train_speed.markdown(rows("train_speed.csv")) in (ROOT / "docs/performance.md").read_text()
    )
    assert scaling.markdown(rows("scaling.csv")) in page
    assert (ROOT / "results/multinode.txt").read_text() in page


@pytest.mark.parametrize(
    "module, name",
    [
        (parity, "parity"),
        (scaling, "scaling"),
        (storm, "faults"),
        (swap, "head_swap"),
        (train_speed, "train_speed"),
    ],
)
def test_the_columns_are_those_of_the_committed_table(tmp_path, module, name):
    tables.write_csv(tmp_path / "a.csv", [], module.COLUMNS)
    header = (tmp_path / "a.csv").read_bytes()
    assert (ROOT / f"results/{name}.csv").read_bytes().startswith(header)


def test_the_calculation_of_scaling():
    """GPT-2 small on two machines: 2 * 15/16 * 4 bytes of each of 124 M gradients over 12.5 GB/s
    are 75 ms."""
    found = {
        (r["processes"]): r
        for r in scaling.calculated(scaling.ScalingConfig(), "gpt2_124m", "ddp", "ethernet")
    }
    assert float(found[16]["ms_moving"]) == pytest.approx(
        2 * 15 / 16 * 4 * 124.48e6 / 12.5e9 * 1e3, rel=1e-3
    )
    assert float(found[1]["efficiency"]) == 1 and float(found[16]["efficiency"]) > float(
        found[16]["efficiency_without_overlap"]
    )


def test_the_plain_loop_of_the_benchmark_is_a_gpt():
    """Its parameters are those of the model it is compared with, but for the order of things."""
    import torch

    from model import Model, ModelConfig

    torch.manual_seed(0)
    plain = train_speed.Plain(2, 2, 16, 8)
    ours = Model(
        ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=train_speed.VOCABULARY)
    )
    assert sum(p.numel() for p in plain.parameters()) == ours.parameter_count()
    x = torch.randint(0, train_speed.VOCABULARY, (2, 8))
    for model_loss in (plain(x, x), ours(x, x)[1]):  # nothing learnt: a uniform guess
        assert model_loss.item() == pytest.approx(math.log(train_speed.VOCABULARY), abs=0.3)


def test_mutants_are_faults_that_python_can_read():
    """Every fault changes one expression of its file."""
    import ast

    from tests.faults.mutants import ROOT, chosen

    mutants = chosen(20, seed=3)
    assert len({m.file.split("/")[0] for m in mutants}) == 3
    for mutant in mutants:
        original = (ROOT / mutant.file).read_text()
        assert ast.dump(ast.parse(mutant.source)) != ast.dump(ast.parse(original))
