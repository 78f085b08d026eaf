"""The toys: where prototypes go, and the picture of it."""

import csv

import torch
from conftest import script_here

from analysis.theory import toy as train
from studies import toy


def test_prototypes_go_to_the_classes_and_stay():
    points, targets = toy.circle()
    middle = toy.centres(points, targets)
    assert middle.shape == (8, 2) and (middle.norm(dim=1) - 1).abs().max() < 0.1
    rows = {}
    for name in ("euclidean", "cross_entropy"):
        found = train(name, 600, points, targets) | {"fits": 1}
        assert len(found["path"]) == 601 and torch.equal(found["path"][-1], found["head"].weight)
        rows[name] = toy.row(name, "circle", found, middle)
    assert rows["euclidean"]["to_centres"] < 0.05 and abs(rows["euclidean"]["growth"] - 1) < 0.01
    assert rows["cross_entropy"]["growth"] > 1.2 and rows["cross_entropy"]["to_centres"] > 3


def test_the_best_start_is_shown():
    """Cosine on a circle: a start may be stuck behind another class's point."""
    points, targets = toy.circle()
    best = toy.starts("cosine", 100, points, targets)
    losses = [
        train("cosine", 100, points, targets, seed)["losses"][-1] for seed in range(toy.STARTS)
    ]
    assert best["losses"][-1] == min(losses) < max(losses) and 0 <= best["fits"] <= toy.STARTS


def test_the_picture_and_the_table(tmp_path):
    done = script_here("-m", "studies.toy", "--steps=4", f"--out={tmp_path / 't'}")
    rows = list(csv.DictReader((tmp_path / "t.csv").open()))
    assert (
        done.returncode == 0
        and len(rows) == 20 + len(toy.CIRCLE)
        and (tmp_path / "t.png").stat().st_size > 50_000
    )
    assert {r["toy"] for r in rows} == {"five", "circle"} and "euclidean" in done.stdout
    assert script_here("-m", "studies.toy", "--steps=1").returncode == 2
