"""gradients, geometry, emissions, theory, calibration and paired comparison: against definitions,
known cases and libraries."""

import csv
import dataclasses
import json
import math
import shutil
import subprocess
import uuid

import numpy as np
import pytest
import scipy.spatial.distance
import scipy.stats
import torch
from codecarbon.output_methods.emissions_data import EmissionsData
from codecarbon.output_methods.file import FileOutput
from test_analysis import call, home, make_run  # noqa: F401  (a fixture)

from analysis import (
    calibration,
    compare,
    emissions,
    figures,
    geometry,
    gradients,
    perplexity,
    report,
    summary,
    tables,
    theory,
)
from analysis.relations import RELATIONS, pairs
from analysis.runs import find_runs
from base.errors import UserError
from harmonic import IGNORE_INDEX, HarmonicHead
from model import Model, ModelConfig
from text.tokenizers.characters import Characters
from training import checkpoint
from training.emissions import Emissions, energy, total
from training.environment import write_environment
from training.metrics import Metrics, clock, read_metrics
from training.objective import objective_of

g = np.random.default_rng(0)


def steps(norms, **more):
    return [
        {"iter": i, "grad_norm": float(n), "train_loss": 5.0, "prototype_radius": 1.0, **more}
        for i, n in enumerate(norms)
    ]


# gradients


def test_stability_of_known_series():
    norms = np.full(1000, 0.5)
    # From 100 on nine spikes in 900 steps, each above 3 medians and above the clip.
    norms[::100] = 2.0
    found = gradients.stability(steps(norms), clip=1.0)
    assert found["spike_rate"] == found["clip_rate"] == 9 / 900
    assert found["mean"] == pytest.approx(norms[100:].mean()) and found["cv"] == pytest.approx(
        norms[100:].std() / norms[100:].mean()
    )
    assert gradients.stability(steps(norms), clip=0)["clip_rate"] == 0
    values = g.standard_normal(173)
    before = [math.inf] + [
        np.median(values[max(0, i - gradients.WINDOW) : i]) for i in range(1, 173)
    ]
    for length in (0, 1, gradients.WINDOW, gradients.WINDOW + 1, 173):
        np.testing.assert_array_equal(gradients.medians_before(values[:length]), before[:length])
    assert math.isnan(gradients.stability([{"iter": 0, "val_loss": 1.0}])["mean"])
    # A NaN is not hidden.
    assert gradients.not_finite(steps([1.0] * 50 + [math.nan] * 40), "grad_norm") == 40


def test_growth_is_the_exponent_of_a_power_law():
    radius = 2 * np.maximum(np.arange(2000), 1) ** 0.25
    metrics = [{"prototype_radius": float(r)} for r in radius]
    assert gradients.growth(metrics)["growth"] == pytest.approx(0.25, abs=1e-6)
    assert gradients.growth([{"prototype_radius": 3.0}] * 100)["growth"] == pytest.approx(0)


def test_loss_spikes_are_counted():
    losses = 5 + 0.1 * g.standard_normal(1000)
    losses[[300, 500, 700]] += 3
    found = gradients.loss_spikes([{"train_loss": float(x)} for x in losses])
    assert 3 / 900 <= found < 8 / 900  # and what of the noise is three deviations off
    # Skipped steps are left out, in all measures.
    metrics = [{"train_loss": float(x), "grad_norm": 1 + 0.1 * float(x)} for x in losses]
    skipped = [{"train_loss": math.nan, "grad_norm": math.inf}]
    assert gradients.loss_spikes(metrics[:600] + skipped + metrics[600:]) == found
    whole = gradients.stability(metrics)
    assert gradients.stability(metrics[:600] + skipped + metrics[600:]) == whole


# geometry


def test_spectrum_of_known_shapes():
    x = torch.randn(20000, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = geometry.spectrum(x)
    assert found["effective_rank"] == pytest.approx(6, abs=0.01) and found[
        "participation_ratio"
    ] == pytest.approx(6, abs=0.02)
    assert found["components_90"] == 6 and found["top2"] == pytest.approx(1 / 3, abs=0.02)
    line = geometry.spectrum(x[:, :1] * torch.arange(1.0, 5) + 100)  # its offset is no direction
    assert (
        line["effective_rank"] == pytest.approx(1, abs=1e-3)
        and line["components_90"] == 1
        and line["top2"] == pytest.approx(1)
    )
    scaled = geometry.spectrum(x * torch.tensor([10.0, 10, 0.1, 0.1, 0.1, 0.1]))
    assert scaled["components_90"] == 2 and scaled["top2"] > 0.99


def test_mean_cosine_and_null_model():
    x = torch.randn(40, 7) + 1
    unit = x / x.norm(dim=1, keepdim=True)
    pairwise = 1 - scipy.spatial.distance.pdist(unit.double().numpy(), "cosine")
    assert geometry.mean_cosine(x) == pytest.approx(pairwise.mean(), abs=1e-6)
    null = geometry.matched_null(x)
    torch.testing.assert_close(null.norm(dim=1), x.norm(dim=1))
    assert abs(geometry.mean_cosine(null)) < 0.1 < geometry.mean_cosine(x)


def test_rank_correlation_is_spearmans():
    a, b = torch.randn(50), torch.randn(50)
    ranks = [scipy.stats.rankdata(x) for x in (a.round(), (a + b).round())]  # ties share a rank
    assert geometry.rank_correlation(a.round(), (a + b).round()) == pytest.approx(
        np.corrcoef(*ranks)[0, 1], abs=1e-6
    )


def test_linear_cka():
    a = torch.randn(300, 8)
    q = torch.linalg.qr(torch.randn(8, 8)).Q
    assert geometry.linear_cka(a, 3 * a @ q + 5) == pytest.approx(1)
    assert geometry.linear_cka(a, torch.randn(300, 8)) < 0.1
    b = torch.randn(300, 5) + a[:, :5]
    h = torch.eye(300) - 1 / 300
    k, l = h @ a @ a.T @ h, h @ b @ b.T @ h  # the definition with kernels
    assert geometry.linear_cka(a, b) == pytest.approx(
        ((k * l).sum() / (k.norm() * l.norm())).item(), abs=1e-5
    )


class Words:
    """A tokenizer of whole words."""

    def __init__(self):
        self.ids = {
            w: i
            for i, w in enumerate(
                dict.fromkeys(w for r in RELATIONS for pair in pairs(r) for w in pair)
            )
        }

    def encode(self, text):
        return [self.ids[text.strip()]]


def test_parallelogram_loss_is_zero_for_parallelograms():
    words = Words()
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(len(words.ids), 12, generator=rng)
    loss, null, _ = geometry.parallelogram(x, words)
    assert loss == pytest.approx(null, rel=0.15) and loss > 0.5  # chance
    for first, second in pairs("opposites"):
        x[words.ids[second]] = x[words.ids[first]] + torch.arange(12.0)
    changed, _, each = geometry.parallelogram(x, words)
    assert each["opposites"] < 1e-6 and each["one: many"] > 0.1 and changed < loss


def test_words_that_share_a_token_count_once():
    """The last token of "largest" and of "smallest" is "est": their differences would be those of
    first words alone."""
    ends = {
        w: i
        for i, w in enumerate(
            ("est", "large", "small", "high", "low", "great", "old", "long", "good", "best")
        )
    }

    class LastTokens:
        def encode(self, text):
            word = text.strip()
            return [0, ends["est"]] if word.endswith("est") and word != "best" else [ends[word]]

    kept = geometry.token_pairs(LastTokens(), "good: best")
    assert kept == [(ends["good"], ends["best"]), (ends["large"], ends["est"])]


def test_words_with_unknown_characters_are_left_out():
    small = Characters(" abcdefghijklmnopqrstuvwxyz", unknown=False).tokenizer()
    assert not geometry.token_pairs(small, "country: capital")
    assert geometry.token_pairs(small, "good: best")


def test_names_of_runs_are_shown_as_they_are():
    long = [f"wikitext2-width256-lr2e-3-cosine-n16-seed{i}" for i in range(3)]
    names = ["_hidden", r"x$\frac$", "a$b$", *long]
    figure = figures.figure(3)
    axes = figure.subplots()
    for name in names:
        axes.plot([0, 1], label=figures.literal(name))
    figures.legend_below(figure, [axes])
    figure.draw_without_rendering()
    assert axes.get_position().height * figure.get_figheight() > 2
    (legend,) = figure.legends
    shown = [entry.get_text().replace(r"\$", "$").strip() for entry in legend.get_texts()]
    box = legend.get_window_extent()
    assert shown == names and 0 <= box.x0 and box.x1 <= figure.bbox.x1


def test_relations_are_pairs():
    assert len(RELATIONS) >= 12 and all(
        len(pairs(r)) >= 6 and all(len(p) == 2 for p in pairs(r)) for r in RELATIONS
    )


def test_geometry_command(home, tmp_path, monkeypatch, capsys):  # noqa: F811
    call(
        geometry.main,
        monkeypatch,
        home / "out/ce",
        home / "out/cosine",
        f"--out={tmp_path / 'g.csv'}",
        "--words=king sun",
        "--device=cpu",
    )
    out = capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "g.csv").open()))
    what = [f"{w}{chance}" for w in ("prototypes", "hidden states") for chance in ("", ", chance")]
    assert [(r["run"], r["what"]) for r in rows] == [(r, w) for r in ("ce", "cosine") for w in what]
    for found, chance in zip(rows[::2], rows[1::2], strict=True):
        assert (
            float(found["radius"]) == pytest.approx(float(chance["radius"]), rel=1e-5)
            and abs(float(chance["mean_cosine"])) < 0.05
        )
    (run,) = find_runs([home / "out/ce"])
    assert float(rows[0]["effective_rank"]) == pytest.approx(
        geometry.spectrum(run.load()[0].head.prototypes())["effective_rank"]
    )
    cka = list(csv.DictReader((tmp_path / "g_cka.csv").open()))
    assert [r["layer"] for r in cka] == ["0", "head"] and all(
        0 <= float(r["chance"]) < float(r["cka"]) <= 1 for r in cka
    )
    assert "' king'" in out and (tmp_path / "g.png").stat().st_size > 10_000


# emissions


def test_energy_of_all_machines():
    assert total([(1.0, 0.5), None, (2.0, 0.25)]) == (3.0, 0.75) and total([None]) is None


def test_time_and_energy_to_a_target():
    points = [(0.0, 8.0), (10.0, 6.0), (20.0, 5.0), (30.0, 5.5)]
    assert (
        emissions.time_to(5.5, points) == pytest.approx(15)
        and emissions.time_to(9.0, points) == 0.0
    )
    assert emissions.time_to(5.0, [(0, 9.0), (10, math.nan), (20, 4.0)]) == 20
    assert emissions.time_to(4.0, points) is None and emissions.time_to(5.0, points) == 20.0


@pytest.mark.parametrize("first, known", [(4.0, False), (4.0, True), (9.0, True)])
def test_time_in_steps_over_a_resume(tmp_path, first, known):
    """The first line after the resume may be later in its start than the last one before it."""
    lines = [{"iter": i, "elapsed_s": s, "tokens_per_s": 10.0} for i, s in ((0, 3.0), (1, 8.0))]
    lines += [{"iter": 2, "val_loss": 1.0}, {"iter": 2, "elapsed_s": first, "tokens_per_s": 5.0}]
    if known:
        # One start went back before an earlier one. One was killed before its first line.
        for iteration in (0, 3, 2, 2):
            write_environment(tmp_path, {}, iteration, {})
    times = [(3.0, 2.0), (8.0, 4.0), (8.0, 4.0), (8.0 + first, 8.0)]
    assert clock(tmp_path, lines, tokens=20) == times


def test_several_nodes_are_added_up_once(tmp_path):
    """Their energy, over all starts; their time is that of the longest."""
    for name, rows in (("emissions", "1,2,30\n3,4,40\n"), ("emissions_node1", "10,20,60\n")):
        (tmp_path / f"{name}.csv").write_text(f"energy_consumed,emissions,duration\n{rows}")
    used = energy(tmp_path)
    assert (used["energy_consumed"], used["emissions"], used["duration"]) == (
        14.0,
        26.0,
        70.0,
    ) and used["gpu_energy"] == 0


@pytest.mark.parametrize("arch", ["gpt", "bert", "qwen"])
@pytest.mark.parametrize("head", ["cross_entropy", "manhattan", "mahalanobis"])
def test_work_counted_is_the_work_calculated(arch, head):
    """Attention too: of which torch's counter knows nothing where a CPU fuses it."""
    c = ModelConfig(
        arch=arch, n_layer=3, n_head=4, n_embd=128, block_size=128, vocab_size=4096, head=head
    )
    calculated = Model(c).flops_per_token(objective_of(arch).predicted(128) / 128)
    assert emissions.counted_flops(c) == pytest.approx(calculated, rel=0.02)


def test_the_target_is_reached_by_all_that_learnt(home, capsys, monkeypatch):  # noqa: F811
    runs = find_runs([home / "out/ce", home / "out/cosine", home / "out/bert"])
    series = [
        [{"iter": i, "val_loss": v} for i, v in enumerate(values)]
        for values in ((8.0, 5.0, 6.0), (8.0, 5.5, math.nan), (8.5, 9.0, math.nan))
    ]
    assert emissions.target_of(runs, series, "val_loss") == 5.5
    assert "bert never fell below its first loss" in capsys.readouterr().err
    with pytest.raises(UserError, match="there is no default target"):
        emissions.target_of(runs[2:], series[2:], "val_loss")
    # A resume has changed the windows: 5.0 is of others than 6.0.
    monkeypatch.setattr(emissions, "evaluated_alike_since", lambda _: 1)
    assert emissions.target_of(runs[:1], series[:1], "val_loss") == 6.0
    assert "a resume of ce changed its" in emissions.changed_windows(runs[0], series[0])
    monkeypatch.setattr(emissions, "evaluated_alike_since", lambda _: -1)
    assert emissions.changed_windows(runs[0], series[0]) is None


def test_what_needs_no_weights_runs_without_a_checkpoint(home, tmp_path, monkeypatch, capsys):  # noqa: F811
    """A run that diverged before its first one is the one to look at; nor is its data needed."""
    run = shutil.copytree(
        home / "out/ce", tmp_path / "early", ignore=shutil.ignore_patterns("ckpt")
    )
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(
        config.replace(str(home / "data/small"), str(home / "data/gone"))
    )
    call(gradients.main, monkeypatch, run)
    call(emissions.main, monkeypatch, run)
    assert "target: " in capsys.readouterr().out  # A single run needs no data.
    call(emissions.main, monkeypatch, run, home / "out/cosine")
    assert "not checked whether the losses can be compared" in capsys.readouterr().err
    with pytest.raises(UserError, match="holds no checkpoint"):
        call(geometry.main, monkeypatch, run)


def test_emissions_command(home, tmp_path, monkeypatch, capsys):  # noqa: F811
    call(
        emissions.main,
        monkeypatch,
        home / "out/ce",
        home / "out/cosine",
        f"--out={tmp_path / 'e.csv'}",
    )
    rows = list(csv.DictReader((tmp_path / "e.csv").open()))
    assert "target: 5.0000" in capsys.readouterr().out
    for row in rows:
        assert float(row["kwh"]) == pytest.approx(0.005) and float(row["kg_co2e"]) == pytest.approx(
            0.003
        )
        tokens = 4 * 12 * 16  # iterations, windows, block_size
        steps = tokens / 100  # seconds, at 100 tokens/s; 24 s with evaluations
        whole = 60.0
        assert float(row["minutes"]) == pytest.approx(whole / 60) and float(
            row["steps"]
        ) == pytest.approx(steps / whole)
        assert float(row["evaluation"]) == pytest.approx((24 - steps) / whole) and float(
            row["start_end"]
        ) == pytest.approx(1 - 24 / whole)
        assert float(row["joules_per_token"]) == pytest.approx(
            0.005 * steps / whole * 3.6e6 / tokens
        )
        assert float(row["minutes_to_target"]) == pytest.approx(steps / 60)
        assert float(row["kwh_to_target"]) == pytest.approx(0.005 * steps / whole)
    assert (tmp_path / "e.png").stat().st_size > 10_000
    # CodeCarbon saw 6 s of a run whose steps and evaluations took 24.
    run = shutil.copytree(home / "out/ce", tmp_path / "part")
    emitted = (run / "emissions.csv").read_text()
    (run / "emissions.csv").write_text(emitted.replace("30,", "3,"))
    call(emissions.main, monkeypatch, run, f"--out={tmp_path / 'part.csv'}")
    assert (
        "the energy of part is not shown: only a part of the run was measured"
        in capsys.readouterr().err
    )
    (row,) = csv.DictReader((tmp_path / "part.csv").open())
    assert row["kwh"] == "" and float(row["minutes"]) == pytest.approx(24 / 60)


# theory


def test_margins_are_those_of_a_loop():
    torch.manual_seed(0)
    h, y = torch.randn(9, 5), torch.randint(7, (9,))
    head = HarmonicHead(5, 7, "manhattan", exponent=3.0, init_std=1.0)
    rho, gamma, p = theory.margins(head, h, y)
    for i in range(9):
        d = (h[i] - head.weight.detach()).abs().sum(-1)
        other = min(d[j] for j in range(7) if j != y[i])
        assert rho[i] == pytest.approx((d[y[i]] / other).item(), rel=1e-5) and gamma[
            i
        ] == pytest.approx((other - d[y[i]]).item(), abs=1e-5)
        assert p[i] == pytest.approx((d[y[i]] ** -3 / (d**-3).sum()).item(), rel=1e-4)
        assert p[i] >= 1 / (1 + 6 * rho[i] ** 3) * (1 - 1e-5)


def test_the_toy_has_a_finite_minimiser():
    """|W| of a distance head ends at the class centres, on a sphere of radius 1; cross-entropy's
    grows on."""
    found = {name: theory.toy(name, 1000) for name in theory.TOY}
    for name in ("euclidean", "manhattan"):
        torch.testing.assert_close(found[name]["path"][-1], found[name]["points"], rtol=0, atol=0.1)
        assert found[name]["norms"][-1] == pytest.approx(math.sqrt(5), rel=0.02)
    for name in ("euclidean", "manhattan", "cosine"):
        assert (
            found[name]["losses"][-1] < 1e-3
            and found[name]["norms"][-1] / found[name]["norms"][500] < 1.02
        )
    assert found["cross_entropy"]["norms"][-1] / found["cross_entropy"]["norms"][500] > 1.15


def test_theory_command(home, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(theory, "toy", lambda name: {"norms": [1.0, 2.0]})
    call(
        theory.main,
        monkeypatch,
        home / "out/ce",
        home / "out/cosine",
        home / "out/bert",
        f"--out={tmp_path / 't.csv'}",
        "--device=cpu",
    )
    rows = list(csv.DictReader((tmp_path / "t.csv").open()))
    assert [r["margin_bound_holds"] for r in rows] == ["", "1.0", "1.0"] and rows[0]["rho_50"] == ""
    assert (
        float(rows[1]["rho_5"]) < float(rows[1]["rho_95"])
        and (tmp_path / "t.png").stat().st_size > 10_000
    )


# calibration


def test_calibration_error_of_known_predictions():
    n = 10_000
    confidence = g.uniform(0.02, 1, n)
    honest = {
        "confidence": confidence,
        "correct": (g.uniform(size=n) < confidence).astype(float),
        "nll": confidence,
    }
    assert calibration.calibration_error(honest["confidence"], honest["correct"]) < 0.02
    boastful = {**honest, "correct": np.zeros(n)}
    assert calibration.calibration_error(
        boastful["confidence"], boastful["correct"]
    ) == pytest.approx(confidence.mean(), abs=1e-6)


def test_bins_hold_every_token_once():
    tokens = {
        "x": np.array([0.0, 0.5, 1.0, 2.0, 5.0]),
        "nll": np.arange(5.0),
        "confidence": np.ones(5),
        "correct": np.ones(5),
    }
    rows = calibration.bins_of(tokens, "x", np.array([0.0, 1.0, 2.0]))
    assert [(r["from"], r["tokens"], r["nll"]) for r in rows] == [(0.0, 2, 0.5), (1.0, 3, 3.0)]


def test_detail_and_another_corpus(home, tmp_path, monkeypatch, capsys):  # noqa: F811
    words = [
        "--detail",
        f"--corpus={home / 'data/other'}",
        f"--out={tmp_path / 'p.csv'}",
        "--device=cpu",
    ]
    call(perplexity.main, monkeypatch, home / "out/ce", home / "out/cosine", *words)
    rows = list(csv.DictReader((tmp_path / "p.csv").open()))
    details = list(csv.DictReader((tmp_path / "p_detail.csv").open()))
    assert {(r["run"], r["by"]) for r in details} == {
        *((run, by) for run in ("ce", "cosine") for by in ("position", "frequency", "confidence")),
        ("cosine", "nearest"),
    }
    for run in ("ce", "cosine"):
        for by in ("position", "frequency", "confidence"):
            mine = [r for r in details if (r["run"], r["by"]) == (run, by)]
            total = sum(int(r["tokens"]) for r in mine)
            mean = sum(int(r["tokens"]) * float(r["nll"]) for r in mine) / total
            assert total > 100 and mean == pytest.approx(
                float(next(r for r in rows if r["run"] == run)["nats_per_token"]), rel=0.2
            )
    # the same text in other tokens: the same bits per byte as scoring it document by document
    call(
        perplexity.main,
        monkeypatch,
        home / "out/ce",
        "--documents",
        f"--out={tmp_path / 'd.csv'}",
        "--device=cpu",
    )
    own = next(csv.DictReader((tmp_path / "d.csv").open()))
    for name in ("own_documents", "other_documents"):
        assert float(rows[0][name]) == pytest.approx(float(own["bits_per_byte"]), rel=1e-4)
    assert "ECE" in capsys.readouterr().out


def test_bert_scores_no_other_corpus(home, tmp_path, monkeypatch):  # noqa: F811
    with pytest.raises(UserError, match="bert predicts masked tokens"):
        call(
            perplexity.main,
            monkeypatch,
            home / "out/bert",
            f"--corpus={home / 'data/other'}",
            f"--out={tmp_path / 'p.csv'}",
        )


def test_nearest_is_the_distance_to_the_nearest_prototype(home):  # noqa: F811
    run = find_runs([home / "out/cosine"])[0]
    (model, _), data = run.load(), run.data()
    tokens = calibration.examine(model, data, "val", tokens=64)
    h, y = theory.states_of(model, data, "val")
    w = torch.nn.functional.normalize(model.head.prototypes(), dim=-1)
    d = (1 - torch.nn.functional.normalize(h, dim=-1) @ w.T).amin(-1)
    np.testing.assert_allclose(
        np.sort(tokens["nearest"][:16]), np.sort(d[:16].detach().numpy()), rtol=1e-3
    )


# paired comparison


def test_difference_agrees_with_the_paired_t_test():
    a = 5 + g.standard_normal(200)
    for shift in (0.0, 0.05, 0.5):
        b = a - shift + 0.3 * g.standard_normal(200)
        found, t = compare.difference(a, b), scipy.stats.ttest_rel(a, b)
        interval = t.confidence_interval()
        assert (found.mean, found.p) == pytest.approx(((a - b).mean(), t.pvalue))
        assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    one = compare.difference(np.array([5.0]), np.array([4.0]))  # A single window has no spread.
    assert one.mean == 1 and math.isnan(one.low) and math.isnan(one.p)
    assert math.isnan(compare.difference(np.array([5.0, math.nan]), np.ones(2)).mean)


def test_the_best_of_equal_runs_seldom_seems_better():
    """The best is chosen after a look, so p is corrected for all pairs of runs. Without that, half
    of such pages would say that one of the equal runs is worse."""
    draws = np.random.default_rng(3).normal(5, 0.05, (60, 8, 64))
    p = [min(d.p for i, d in enumerate(found) if i != best)
         for best, found in (compare.compare(list(losses)) for losses in draws)]  # fmt: skip
    assert np.mean(np.array(p) <= 0.05) <= 0.1
    best, found = compare.compare([np.full(64, math.nan), *draws[0][:2]])
    assert best > 0 and math.isnan(found[0].p) and found[3 - best].p > 0.05


def test_window_losses_average_to_the_likelihood(home):  # noqa: F811
    run = find_runs([home / "out/ce"])[0]
    (model, _), data = run.load(), run.data()
    losses = compare.window_losses(model, data)
    nats, tokens = perplexity.likelihood(model, data, "val", stride=16)
    assert (
        losses.mean() == pytest.approx(nats / tokens, rel=0.05)
        and len(losses) == (data.splits["val"].tokens - 1) // 16
    )
    assert compare.compare([losses, losses - 1])[0] == 1


# bad input


@pytest.mark.parametrize("main", [gradients.main, geometry.main, emissions.main, theory.main])
def test_bad_runs_are_told(home, tmp_path, monkeypatch, main):  # noqa: F811
    for words, message in (
        ([], "name one run's folder"),
        ([home / "out/cosin"], "did you mean .*out/cosine"),
        ([home / "out/ce", f"--out={tmp_path}/no/x.csv"], "does not exist"),
        ([home / "out/ce", "--out=x.txt"], "must end in .csv"),
    ):
        with pytest.raises(UserError, match=message):
            call(main, monkeypatch, *words)


def test_broken_metrics(home, tmp_path, monkeypatch, capsys):  # noqa: F811
    run = shutil.copytree(home / "out/ce", tmp_path / "ce")
    lines = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(lines + '{"iter": 5, "train_l')
    call(gradients.main, monkeypatch, run)
    assert "the last line is incomplete and skipped" in capsys.readouterr().err
    (run / "metrics.jsonl").write_text("{broken\n" + lines)
    with pytest.raises(UserError, match="line 1 is not a metrics record"):
        call(gradients.main, monkeypatch, run)
    (run / "metrics.jsonl").write_text(json.dumps({"iter": 0, "val_loss": 3.0}) + "\n")
    with pytest.raises(UserError, match="has no steps"):
        call(gradients.main, monkeypatch, run)


# files of another version


class Tracker:
    """CodeCarbon's tracker without its search for hardware: real rows, written by its real
    FileOutput."""

    def __init__(self, output_dir, output_file, on_csv_write, **settings):
        self.file = FileOutput(output_file, output_dir, on_csv_write)
        values = {f.name: "x" for f in dataclasses.fields(EmissionsData)}
        numbers = {
            "energy_consumed": 8.0,
            "emissions": 4.0,
            "cpu_energy": 5.0,
            "gpu_energy": 1.0,
            "ram_energy": 2.0,
            "duration": 10.0,
        }
        self.row = EmissionsData(**values | numbers | {"run_id": str(uuid.uuid4())})

    def flush(self):
        self.file.out(self.row, None)

    start = flush


EARLIER = {  # a file of an earlier start -> its energy and its duration
    "two rows": ("energy_consumed,emissions,duration\n1,2,30\n3,4,40\n", 4.0, 70.0),
    "a unit in a name": ("energy_consumed_kwh,emissions_kg,duration_s\n1,2,30\n", 1.0, 30.0),
    "no duration": ("energy_consumed,emissions,length\n1,2,30\n", 1.0, math.nan),
    "more columns, empty cells": (
        "new,emissions,gpu_energy,energy_consumed,duration\nx,2,,1,30\n",
        1.0,
        30.0,
    ),
    "a name in Latin-1": (
        b"project_name,emissions,energy_consumed,duration\ncaf\xe9,2,1,30\n",
        1.0,
        30.0,
    ),
    "no row": ("energy_consumed,emissions,duration\n", 0.0, 0.0),
    "nothing": ("", 0.0, 0.0),
}


@pytest.mark.parametrize("node", [0, 1])
def test_energy_of_earlier_starts_stays_whatever_version_wrote_it(tmp_path, monkeypatch, node):
    monkeypatch.setattr("codecarbon.OfflineEmissionsTracker", Tracker)
    for name, (text, kwh, seconds) in EARLIER.items():
        run = tmp_path / name
        run.mkdir()
        file = run / ("emissions_node1.csv" if node else "emissions.csv")
        old = text if isinstance(text, bytes) else text.encode()
        file.write_bytes(old)
        for starts in (1, 2):  # the second one finds a file of this version
            tracker = Emissions(run, "USA", node)
            tracker.flush()
            used = energy(run)
            assert used["energy_consumed"] == kwh + 8 * starts, name
            assert used["duration"] == pytest.approx(seconds + 10 * starts, nan_ok=True), name
        assert not old or old in [path.read_bytes() for path in run.glob("emissions*.csv")], name


def test_energy_that_codecarbon_put_aside_is_counted(tmp_path):
    for name in ("emissions.csv", "emissions.csv.bak", "emissions.csv_0.bak"):
        (tmp_path / name).write_text("energy_consumed,emissions,duration\n1,2,30\n")
    (tmp_path / "emissions.csv.swp").write_bytes(b"\0")
    assert (energy(tmp_path)["energy_consumed"], energy(tmp_path)["duration"]) == (3.0, 90.0)


def lines_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def put(run, lines):
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_key_that_a_run_has_not_is_a_dash(home, tmp_path, monkeypatch, capsys):  # noqa: F811
    """Each key of metrics.jsonl is taken away from all lines, and from the earlier half, as of a
    run that a newer version resumed."""
    folder = shutil.copytree(home / "out/ce", tmp_path / "ce")
    whole = lines_of(folder)
    (run,) = find_runs([folder])
    model, _ = run.load()
    monkeypatch.setattr(emissions, "counted_flops", lambda config: 1e6)
    optional = {key for line in whole for key in line} - {"iter", "val_loss"}
    for key in sorted(optional):
        for kept in (0, len(whole) // 2):
            put(
                folder,
                [{k: v for k, v in line.items() if k != key} for line in whole[: len(whole) - kept]]
                + whole[len(whole) - kept :],
            )
            metrics = read_metrics(folder)
            cost = emissions.measure(run, metrics, "val_loss", 5.5)
            emissions.draw([run], [metrics], [cost], "val_loss")
            assert tables.text([cost], emissions.COLUMNS)
            unknown = key in ("tokens_per_s", "elapsed_s") or (key == "train_loss" and not kept)
            assert (cost["steps"] is None) == (cost["minutes_to_target"] is None) == unknown, key
            assert cost["kwh"] == 0.005
            if key == "grad_norm" and not kept:
                assert gradients.measure(run)[0]["mean"] is None
            gradients.draw([run])
            assert tables.text(gradients.measure(run), gradients.COLUMNS)
            everything = dict(losses=True, work=True, energy=True, windows=True)
            agree = summary.Agreement(**everything)
            shown = summary.summary_table([summary.summarize(run, model, metrics)], agree, None)
            assert len(shown["rows"][0]) == len(summary.COLUMNS) and report.curves(metrics)
            theory.measure(run, model, 4, run.data(), "val")


def test_keys_that_nobody_knows_stay_in_metrics(home, tmp_path):  # noqa: F811
    folder = shutil.copytree(home / "out/ce", tmp_path / "ce")
    strange = {"note": "warm", "shape": [1, 2], "empty": None, "new_number": 3.5, "why": {"a": 1}}
    lines = [{"format": 2}, *({**line, **strange} for line in lines_of(folder))]
    put(folder, lines)
    assert all("note" not in m and m["new_number"] == 3.5 for m in read_metrics(folder))
    metrics = Metrics(folder, 2)
    metrics.write({"iter": 2, "train_loss": math.nan})
    metrics.close()
    expected = [line for line in lines if line.get("iter", 0) < 2]
    assert lines_of(folder) == [*expected, {"iter": 2, "train_loss": "nan"}] and math.isnan(
        read_metrics(folder)[-1]["train_loss"]
    )


def test_settings_of_another_version_are_named_and_ignored(home, tmp_path, monkeypatch, capsys):  # noqa: F811
    folder = shutil.copytree(home / "out/cosine", tmp_path / "cosine")
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(
        text.replace("label_smoothing", "smoothing") + "flash: true\nworkers: [1, 2]\n"
    )
    call(gradients.main, monkeypatch, folder)
    told = capsys.readouterr().err
    assert told.count("note: ") == 1 and "smoothing, flash, workers" in told and str(folder) in told
    (run,) = find_runs([folder])
    assert (
        run.load()[0].head.name == run.model_config.head == "cosine"
        and run.model_config.label_smoothing == 0
    )


def test_an_optimiser_of_another_version_is_refused(home):  # noqa: F811
    (run,) = find_runs([home / "out/ce"])
    model, _ = run.load()
    optimizer = torch.optim.AdamW(model.parameters())
    for key in ("exp_avg/blocks.9.gone", "momentum"):
        with (
            pytest.MonkeyPatch.context() as patch,
            pytest.raises(UserError, match=f"holds '{key}'.*--init_from="),
        ):
            patch.setattr(checkpoint, "load_tensors", lambda path, key=key: {key: torch.zeros(2)})
            checkpoint.load_optimizer(model, optimizer, checkpoint.newest(run.path))


# nothing to measure


def short(data, tokens: int):
    """The data with the first tokens of each split."""
    splits = {
        name: dataclasses.replace(split, tokens=tokens) for name, split in data.splits.items()
    }
    return dataclasses.replace(data, splits=splits)


@pytest.mark.parametrize("name", ["ce", "cosine", "bert"])
def test_a_split_without_a_window_is_told(home, name):  # noqa: F811
    (run,) = find_runs([home / "out" / name])
    (model, _), data = run.load(), run.data()
    measures = {
        "windows": lambda d, s: compare.window_losses(model, d, s),
        "calibration": lambda d, s: calibration.examine(model, d, s),
        "geometry": lambda d, s: geometry.layers(model, d, s),
        "theory": lambda d, s: theory.measure(run, model, 4, d, s),
    }
    for measure in measures.values():
        measure(short(data, 17), "val")  # one window
        for tokens in (1, 16):
            with pytest.raises(UserError, match=f"has {tokens} tokens, and block_size=16 needs 17"):
                measure(short(data, tokens), "val")
        with pytest.raises(UserError, match="has no split gone: it has train, val, test"):
            measure(data, "gone")


def test_documents_of_one_token_or_none(home):  # noqa: F811
    (run,) = find_runs([home / "out/ce"])
    (model, _), data = run.load(), run.data()
    eot = data.eot_id
    documents = [np.array(ids) for ids in ([eot], [eot, 5], [eot], [eot, *range(1, 40)], [eot])]
    batches = list(perplexity.document_batches(documents, eot, 16, 16, 2))
    scored = torch.cat([y[y != IGNORE_INDEX] for _, y in batches])
    assert scored.tolist() == [5, *range(1, 40)]
    assert list(perplexity.document_batches([np.array([eot])], eot, 16, 16, 2)) == []
    empty = data.splits["val"]
    ends = np.full(20, eot, "<u2")
    blank = type(
        "Blank",
        (type(empty),),
        {"read": lambda self, start, count: ends[start : start + count].astype(np.int64)},
    )
    data = dataclasses.replace(data, splits={"val": blank(**vars(empty) | {"tokens": 20})})
    with pytest.raises(UserError, match="has no document to score"):
        perplexity.likelihood(model, data, "val", documents=True)
    config = perplexity.PerplexityConfig()
    with pytest.raises(UserError, match="has no document with text"):
        perplexity._by_document(model, run.data(), data, "val", config)


def test_no_token_has_no_calibration():
    names = ("nll", "position", "target", "confidence", "correct", "nearest")
    tokens = {name: np.zeros(0) for name in names}
    assert (
        math.isnan(calibration.calibration_error(tokens["confidence"], tokens["correct"]))
        and calibration.detail(tokens, np.zeros(5), 16) == []
    )


def test_pictures_are_drawn_of_a_run_without_all_norms(home):  # noqa: F811
    gradients.draw(find_runs([home / "out/ce"]))


# the page in a browser

CLICKS = """
<script>
addEventListener("error", event => document.title = "ERROR " + event.message);
const waiting = setInterval(() => {
  if (!document.querySelector("#charts .curve")) return;
  clearInterval(waiting);
  const chart = document.querySelector("svg.chart"), curves = () => chart.querySelectorAll(".curve").length, found = [curves()];
  const [first] = document.querySelectorAll("#legend button");
  first.click(); found.push(curves(), first.getAttribute("aria-pressed"));
  first.click(); found.push(curves());
  const before = chart.innerHTML, log = document.getElementById("log");
  log.click(); found.push(chart.innerHTML !== before);
  document.getElementById("find").value = "king"; document.getElementById("find").dispatchEvent(new Event("input"));
  found.push([...document.querySelectorAll("#mapped circle")].filter(c => c.getAttribute("r") === "7").length);
  found.push(document.querySelectorAll("#panels figure").length, document.documentElement.scrollWidth <= innerWidth);
  const box = document.getElementById("summary").parentElement;
  if (innerWidth < 700) box.querySelector("td").textContent = "0.302 (0.289 to 0.314), p < 0.001; ".repeat(2);  // long words wrap in a card
  found.push(box.scrollWidth <= box.clientWidth);
  const set = (id, value, event) => {
    const control = document.getElementById(id);
    control.value = value; control.dispatchEvent(new Event(event));
  };
  const noisy = document.querySelectorAll("svg.chart")[2], rough = noisy.querySelector(".curve").getAttribute("d");
  set("smoothing", 10, "input"); found.push(noisy.querySelector(".curve").getAttribute("d") !== rough);
  set("across", "tokens", "change"); found.push(chart.getAttribute("aria-label").includes("over tokens"));
  const at = chart.getBoundingClientRect(), tip = chart.parentElement.querySelector(".tip");
  chart.dispatchEvent(new PointerEvent("pointermove", { clientX: at.left + at.width / 2, clientY: at.top + 50 }));
  found.push(!tip.hidden && tip.textContent.includes("cosine"));
  const light = getComputedStyle(document.body).backgroundColor.match(/\\d+/g).reduce((a, b) => a + +b, 0) > 384;
  found.push(light);
  if (!document.title.startsWith("ERROR")) document.title = JSON.stringify(found);
}, 50);
</script></body>"""  # noqa: E501


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium (apt-get install chromium)")
@pytest.mark.parametrize(("width", "light"), [(1400, True), (400, True), (1400, False)])
def test_the_page_in_chromium(home, tmp_path, monkeypatch, width, light):  # noqa: F811
    monkeypatch.setattr(summary, "RANKED_MINUTES", 0)  # So that the triangle is drawn.
    page = tmp_path / "r.html"
    runs = [
        make_run(tmp_path / head, home / "data/small", 40, head=head)
        for head in ("cross_entropy", "cosine")
    ]
    call(report.main, monkeypatch, *runs, f"--out={page}", "--max_new_tokens=5", "--device=cpu")
    page.write_text(page.read_text().replace("</body>", CLICKS))
    command = [
        "chromium",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        f"--window-size={width},2000",
        f"--blink-settings=preferredColorScheme={int(light)}",
    ]
    command += ["--virtual-time-budget=30000", "--dump-dom", page.as_uri()]
    for _ in range(3):
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        title = done.stdout.split("<title>")[1].split("</title>")[0]
        if title.startswith(("[", "ERROR")):
            break
    assert json.loads(title) == [2, 1, "false", 2, True, 2, 3, True, True, True, True, True, light]
