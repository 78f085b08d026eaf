"""Rounded prototypes: against torch's own quantiser, and the table of a run."""

import csv
import math

import pytest
import torch
from test_analysis import call, home  # noqa: F401  (a fixture)

from analysis.quantization import rounded


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_rounding_is_that_of_torch(bits):
    torch.manual_seed(0)
    w = torch.randn(7, 13)
    w[2] = 0
    most = 2 ** (bits - 1) - 1
    scale = (w.abs().amax(1) / most).clamp_min(1e-30)
    expected = torch.fake_quantize_per_channel_affine(
        w, scale, torch.zeros(7, dtype=torch.int32), 0, -most, most
    )
    torch.testing.assert_close(rounded(w, bits), expected)
    assert all(len(row.unique()) <= 2**bits - 1 for row in rounded(w, bits))
    # Groups of five, five and three coordinates, each with a scale of its own.
    parts = [rounded(part, bits) for part in w.split(5, 1)]
    assert torch.equal(rounded(w, bits, 5), torch.cat(parts, 1))
    assert (rounded(w, bits, 5) - w).norm() < (rounded(w, bits) - w).norm()


def test_the_table(home, monkeypatch, capsys, tmp_path):  # noqa: F811
    from analysis import quantization

    runs = [home / "out" / name for name in ("ce", "cosine", "bert")]
    out = tmp_path / "q.csv"
    call(quantization.main, monkeypatch, *runs, "--bits=16,8,2", f"--out={out}")
    assert "cosine" in capsys.readouterr().out and out.with_suffix(".png").stat().st_size > 5000
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for name in ("ce", "cosine", "bert"):
        full, most, eight, two = [r for r in rows if r["run"] == name]
        assert full["increase"] == "" and abs(float(most["increase"])) < 1e-3
        assert 0 <= float(most["kl"]) < float(eight["kl"]) < float(two["kl"])
        loss = float(full["loss"]) + float(two["increase"])
        assert float(two["loss"]) == pytest.approx(loss, rel=1e-6)
        assert float(two["same_best"]) < float(most["same_best"]) <= 1


def test_one_window_has_no_interval(home, monkeypatch, tmp_path):  # noqa: F811
    from analysis import quantization

    for tokens, known in ((1, False), (64, True)):
        out = tmp_path / f"{tokens}.csv"
        words = ["--bits=[2]", f"--tokens={tokens}", f"--out={out}"]
        call(quantization.main, monkeypatch, home / "out/ce", *words)
        with out.open(newline="") as file:
            _, row = csv.DictReader(file)
        assert math.isfinite(float(row["increase"]))
        assert all(math.isfinite(float(row[key])) == known for key in ("low", "high"))
