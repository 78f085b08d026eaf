"""Linear exports: plain classes of transformers rank tokens as the head does."""

import json
import re
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, TINY, script_here
from torch import nn

from base.command_line import cli
from benchmarks.linear_export import PROMPTS, Pair, compare_texts, compare_tops
from harmonic import HEADS, HarmonicHead
from interop import export, linear
from model import Model
from text.token_files import load_data
from training import checkpoint
from training.data import validation_windows
from training.objective import batches_of

# float32 may swap tokens whose logits differ by less: their probabilities differ by 0.1 %.
NEAR = 1e-3
SIZE = dict(vocab_size=320, block_size=64)
RUNS = {
    "cosine": dict(head="cosine", bias=False, exponent=9.0),
    "cosine-softmax": dict(head="cosine", link="softmax"),
    "euclidean": dict(head="euclidean", bias=False, tie_weights=False),
    "squared-softmax": dict(head="euclidean_squared", link="softmax", scale=0.7),
    "mahalanobis": dict(head="mahalanobis"),
    "diagonal-softmax": dict(head="mahalanobis_diagonal", link="softmax"),
    "cholesky": dict(head="mahalanobis_cholesky"),
    "minkowski": dict(head="minkowski", head_p=2.0),
    "student_t": dict(head="student_t", exponent=9.0),
    "stablemax": dict(head="stablemax"),
    "cosine_scaled": dict(head="cosine_scaled", bias=False),
    "qwen2": dict(head="cosine", arch="qwen", n_kv_head=1),
    "qwen3": dict(head="cosine_linear", arch="qwen", qk_norm=True),
}


@pytest.fixture(scope="module")
def trained(tiny_data, tmp_path_factory):
    """A run's folder and what load_run reads from it."""
    folder = tmp_path_factory.mktemp("linear")
    settings = TINY | SIZE | dict(dataset=tiny_data, out_dir="run", head="cosine")
    flags = [f"--{key}={value}" for key, value in settings.items()]
    done = script_here("train.py", *flags, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, checkpoint.load_run(folder / "run")


@pytest.fixture
def run_of(trained, monkeypatch):
    """run_of(head=...) -> the model of such a run, as if it were the trained one: random weights,
    with biases, gains and the distance's parameters away from their start."""
    folder, (model, stored, manifest) = trained
    monkeypatch.chdir(folder)

    def make(**settings):
        config = replace(model.config, **settings)
        made = Model(config).eval()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in made.parameters():
                p.add_(torch.randn(p.shape, generator=generator) * 0.1)
        loaded = made, stored | vars(config), manifest
        monkeypatch.setattr(checkpoint, "load_run", lambda *_: loaded)
        return made

    return make


def run_export(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["export.py", *map(str, arguments)])
    capsys.readouterr()
    status = 0
    try:
        cli(export.main)
    except SystemExit as stop:
        status = stop.code
    return status, *capsys.readouterr()


def test_constants_fit_into_a_layer_norm():
    torch.manual_seed(0)
    rows, constants, states = (
        torch.randn(*shape, dtype=torch.float64) for shape in ((90, 24), (90,), (50, 24))
    )
    norm, ones = nn.LayerNorm(24).double(), nn.LayerNorm(24).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    nn.init.ones_(ones.bias)
    for size in (1.0, 1e-3):  # At the second one the eps of the norm counts.
        expected = norm(size * states + 3) @ rows.T + constants
        found = ones(size * states + 3) @ linear.fold(rows, constants, norm).T
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "name", [name for name, row in HEADS.items() if linear.ranks_linearly(row)]
)
def test_scores_rank_as_every_linear_head(name):
    torch.manual_seed(0)
    head, h = HarmonicHead(12, 40, name, init_std=0.7).double(), torch.randn(200, 12).double()
    with torch.no_grad():
        for values in head.distance_parameters.values():
            values.add_(torch.randn_like(values) * 0.3)
        rows, constants = linear.linear_scores(head)
        expected = head(h).argsort(-1)
    assert torch.equal((h @ rows.T + constants).argsort(-1), expected)


@pytest.mark.parametrize("name", RUNS)
def test_a_linear_export_ranks_as_the_head(name, run_of, tiny_data, tmp_path, monkeypatch, capsys):
    import transformers

    model, folder = run_of(**RUNS[name]), tmp_path / "new"
    status, out, err = run_export(monkeypatch, capsys, "run", f"--to={folder}", "--linear")
    assert status == 0, err

    config = json.loads((folder / "config.json").read_text())
    plain = getattr(transformers, config["architectures"][0])
    assert plain.__name__ in ("GPT2LMHeadModel", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
    assert config["tie_word_embeddings"] is False and not list(folder.glob("*.py"))
    assert not {"auto_map", "harmonic"} & set(config)
    pair = Pair(model, plain.from_pretrained(folder).eval())
    own_tokens = model.tokens.weight[: model.config.real_vocab_size]
    assert torch.equal(pair.theirs.get_input_embeddings().weight, own_tokens)
    assert {p.dtype for p in pair.theirs.parameters()} == {torch.float32}

    data = load_data(tiny_data)
    starts = validation_windows(data.splits["val"].tokens, 64, 16)
    ((ids, _),) = batches_of(data, model.config).validation(starts, 16)
    with torch.no_grad():
        tops = compare_tops(pair, ids)
        texts = compare_texts(pair, ids.view(32, 32)[:PROMPTS, :8], new=20)
    assert max(tops["gap"], texts["gap"]) < NEAR
    assert tops["same_top"] > 0.9 * tops["positions"]
    (printed,) = re.findall(r"probabilities: (\S+) nats", out)
    assert float(printed) == pytest.approx(tops["kl"], rel=0.01, abs=1e-6)
    assert f"divergence is {printed} nats a token" in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(head="manhattan"), "head=manhattan has no linear ranking"),
        (
            dict(head="euclidean", arch="qwen"),
            "for each token, -|w|^2 / 2, and RMSNorm has no room for it. Export it without"
            " linear=true. Heads without constants: euclidean_normalized, cosine, ",
        ),
        (dict(head="cosine", arch="bert"), "arch=bert is a masked language model"),
    ],
)
def test_heads_without_a_linear_ranking_are_refused(
    run_of, tmp_path, monkeypatch, capsys, settings, words
):
    run_of(**settings)
    status, _, err = run_export(monkeypatch, capsys, "run", f"--to={tmp_path / 'new'}", "--linear")
    assert status == 2 and words in err
    assert not (tmp_path / "new").exists()


def test_cross_entropy_is_linear_already(run_of, tmp_path, monkeypatch, capsys):
    """The folder is the plain export's. Nothing is fitted, so no data are needed."""
    run_of(head="cross_entropy")
    flags = {"plain": [], "linear": ["--linear", "--dataset=data/none"]}
    for name, more in flags.items():
        to = f"--to={tmp_path / name}"
        status, out, err = run_export(monkeypatch, capsys, "run", to, *more)
        assert status == 0, err
    assert "head=cross_entropy is linear already" in out
    for name in ("config.json", "model.safetensors"):
        files = [(tmp_path / folder / name).read_bytes() for folder in flags]
        assert files[0] == files[1]


def test_the_page_names_every_head_with_a_linear_export():
    table = (ROOT / "docs/interop.md").read_text().split("### Which heads have a linear export")[1]
    rows = re.findall(r"^\| (`.*`.*) \| (yes) \| (yes|no) \|$", table, re.M)
    said = {name: qwen == "no" for names, _, qwen in rows for name in re.findall("`(.+?)`", names)}
    assert said.pop("minkowski")  # With p = 2 it is euclidean.
    assert said == {
        name: linear.needs_constants(row)
        for name, row in HEADS.items()
        if linear.ranks_linearly(row) and name != "cross_entropy"
    }


def test_missing_data_are_named(run_of, tmp_path, monkeypatch, capsys):
    run_of(head="cosine")
    flags = [f"--to={tmp_path / 'new'}", "--linear", "--dataset=data/none"]
    status, _, err = run_export(monkeypatch, capsys, "run", *flags)
    assert status == 2 and "no data folder data/none" in err
    status, _, err = run_export(monkeypatch, capsys, "run", flags[0], flags[2])
    assert status == 2 and "does nothing without linear=true" in err
