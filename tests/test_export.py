"""Exported runs: transformers loads them and computes the same; the harness measures the same."""

import ast
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY, script

from base.command_line import cli
from base.errors import UserError
from harmonic.integrations.transformers import SOURCES
from interop import export
from interop.formats import format_of
from model import ModelConfig
from text.tokenizers import load_tokenizer, rust_tokenizer
from training import checkpoint

RUNS = {
    "gpt": dict(arch="gpt", head="cross_entropy"),
    "gpt-no-bias": dict(
        arch="gpt", head="cross_entropy", bias=False, tie_weights=False, vocab_size=320
    ),
    "bert": dict(arch="bert", head="cross_entropy", vocab_size=320),
    "bert-untied": dict(arch="bert", head="cross_entropy", tie_weights=False, learning_rate=0.1),
    "qwen2": dict(arch="qwen", n_kv_head=1, head="cross_entropy"),
    "qwen3": dict(arch="qwen", qk_norm=True, head_dim=10, head="cross_entropy", tie_weights=False),
    "gpt-cosine": dict(arch="gpt", head="cosine", learn_exponent=True, vocab_size=320),
    "gpt-mahalanobis": dict(
        arch="gpt",
        head="mahalanobis_diagonal",
        tie_weights=False,
        link="softmax",
        exponent=9.0,
        activation="gelu",
    ),
    "bert-canberra": dict(arch="bert", head="canberra", exponent="dim"),
    "qwen2-minkowski": dict(arch="qwen", n_kv_head=1, head="minkowski", head_p=3.0, exponent=7.0),
    "qwen3-hamming": dict(arch="qwen", qk_norm=True, head="hamming_hard", vocab_size=320),
}
PLAIN = {
    "gpt": "GPT2LMHeadModel",
    "bert": "BertForMaskedLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def run_export(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["export.py", *map(str, arguments)])
    capsys.readouterr()
    try:
        cli(export.main)
    except SystemExit as stop:
        return stop.code, *capsys.readouterr()
    return 0, *capsys.readouterr()


@pytest.fixture
def exported(train, tmp_path, monkeypatch, capsys):
    """exported(name) -> (the run's model, its tokenizer, transformers' model from the exported
    folder, the folder)."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    def make(name):
        settings = RUNS[name]
        status, _, err = train(**{**settings, "block_size": 64, "max_iters": 20})
        assert status == 0, err
        status, out, err = run_export(monkeypatch, capsys, "run", f"--to={name}")
        assert status == 0 and f"wrote {name}" in out, err
        model, stored, _ = checkpoint.load_run(tmp_path / "run")
        auto = AutoModelForMaskedLM if settings["arch"] == "bert" else AutoModelForCausalLM
        theirs = auto.from_pretrained(
            tmp_path / name, trust_remote_code=settings["head"] != "cross_entropy"
        ).eval()
        return model, load_tokenizer(stored["tokenizer"], tmp_path / "run"), theirs, tmp_path / name

    return make


@pytest.mark.parametrize("name", RUNS)
def test_an_export_computes_the_same(exported, name, tmp_path, train):
    from transformers import AutoTokenizer

    ours, words, theirs, folder = exported(name)
    real = ours.config.real_vocab_size
    if RUNS[name]["head"] == "cross_entropy":
        assert type(theirs).__name__ == PLAIN[name.split("-")[0]] and not list(folder.glob("*.py"))
    ids = torch.randint(real, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = ours(ids)[0][..., :real], theirs(input_ids=ids).logits
    assert found.shape[-1] == real
    torch.testing.assert_close(
        found.log_softmax(-1), expected.log_softmax(-1), rtol=1e-4, atol=1e-4
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    text = "The old king saw a small river, 1984.\n\nNaïve — 水 "
    assert (
        tokenizer(text)["input_ids"] == words.encode(text)
        and tokenizer.decode(words.encode(text)) == text
    )
    assert (tokenizer.eos_token_id, tokenizer.mask_token_id) == (words.eot_id, words.mask_id)
    if ours.config.arch != "bert":
        prompt = words.encode("the old king")
        text = theirs.generate(
            torch.tensor([prompt]),
            max_new_tokens=30,
            do_sample=False,
            eos_token_id=-1,
            pad_token_id=0,
        )[0]
        assert text.tolist() == prompt + [t for (t,) in ours.generate([prompt], 30, temperature=0)]

    # and back again
    from_it = {
        key: None for key in ("n_layer", "n_head", "n_embd", "exponent", "vocab_size", "bias")
    }
    status, out, err = train(
        init_from=folder,
        out_dir="back",
        **{**RUNS[name], **from_it, "block_size": 64, "max_iters": 0},
    )
    assert status == 0 and "swapped" not in out, err
    losses = [
        json.loads((tmp_path / run / "metrics.jsonl").read_text().splitlines()[-1])["val_loss"]
        for run in ("run", "back")
    ]
    assert losses[0] == pytest.approx(losses[1], abs=2e-5)


def test_pipelines_and_the_card(exported):
    from transformers import pipeline

    ours, words, theirs, folder = exported("gpt-cosine")
    made = pipeline("text-generation", model=str(folder), trust_remote_code=True)
    text = made("the old king", max_new_tokens=8, do_sample=False)[0]["generated_text"]
    ids = words.encode("the old king")
    assert text == words.decode(ids + [t for (t,) in ours.generate([ids], 8, temperature=0)])
    card = (folder / "README.md").read_text()
    for line in (
        "# gpt-cosine",
        "| `head` | cosine |",
        "| val loss | ",
        "| energy of training | not measured |",
        "trust_remote_code=True",
        "after 20 iterations",
    ):
        assert line in card
    assert "{" not in card.replace("{1,", "")


def test_masks_are_filled(exported):
    from transformers import pipeline

    ours, words, theirs, folder = exported("bert-canberra")
    made = pipeline("fill-mask", model=str(folder), trust_remote_code=True)
    prompt = words.encode("the old ") + [words.mask_id] + words.encode(" saw")
    p = ours(torch.tensor([prompt]))[0][0, prompt.index(words.mask_id)].softmax(-1)
    best = made("the old <|mask|> saw", top_k=1)[0]
    assert best["token"] == p.argmax().item() and best["score"] == pytest.approx(
        p.max().item(), rel=1e-3
    )


def test_every_file_that_an_exported_file_imports_is_exported():
    """Also those that are imported inside a function."""
    for name in set(SOURCES) - {"integrations/modeling_harmonic.py"}:  # This reads them.
        for node in ast.walk(ast.parse((ROOT / "harmonic" / name).read_text())):
            if isinstance(node, ast.ImportFrom) and node.level and node.module:
                folder = (ROOT / "harmonic" / name).parents[node.level - 1]
                path = folder / node.module.replace(".", "/")
                found = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
                assert str(found.relative_to(ROOT / "harmonic")) in SOURCES, (name, found)


def test_the_folder_stands_alone(exported, tmp_path):
    """In a process that cannot import this repository: loaded, trained a step, generated with."""
    ours, words, _, folder = exported("gpt-cosine")
    ids = words.encode("the old king saw a small river near the city")
    code = f"""
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True).train()
ids = torch.tensor([{ids}])
out = model(input_ids=ids, labels=ids)
out.loss.backward()
assert out.logits is None and model.lm_head.table.grad is not None and "harmonic" not in sys.modules
model.save_pretrained("again")
again = AutoModelForCausalLM.from_pretrained("again", trust_remote_code=True).eval()
assert torch.equal(again(ids).logits, model.eval()(ids).logits)
print(out.loss.item())
"""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {
        "HF_HOME": str(tmp_path / "cache")
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    x = torch.tensor([ids])
    assert float(done.stdout) == pytest.approx(ours(x[:, :-1], x[:, 1:])[1].item(), abs=1e-4)


def test_bad_input_is_refused(train, tmp_path, monkeypatch, capsys):
    assert train()[0] == 0
    (tmp_path / "there").mkdir()
    for arguments, words in (
        (["run", "--to=there"], "to=there exists already: name another folder"),
        (["run"], "name the folder to write with --to=DIR"),
        (["--to=new"], "name one run's folder"),
        (["run", "--to=no/new"], "does not exist"),
        (["rum", "--to=new"], "holds no checkpoint (the folder does not exist)"),
    ):
        status, _, err = run_export(monkeypatch, capsys, *arguments)
        assert status == 2 and words in err, arguments
    assert not (tmp_path / "new").exists() and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(n_kv_head=1), "transformers' gpt2 supports neither n_kv_head=1 nor head_dim=0"),
        (dict(arch="qwen", qk_norm=True, bias=True), "qwen3 has no bias on Q, K and V alone"),
    ],
)
def test_what_transformers_does_not_have_is_said(train, monkeypatch, capsys, settings, words):
    assert train(**settings)[0] == 0
    status, _, err = run_export(monkeypatch, capsys, "run", "--to=new")
    assert status == 2 and words in err


def test_an_architecture_that_transformers_lacks_is_refused():
    with pytest.raises(UserError, match="arch=neox has no format of transformers"):
        format_of(ModelConfig(arch="neox"))


TEXTS = [
    "The old king's 1984 letters: naïve café, 水, 😀.",
    "  spaces\n\n\tand\r\nlines ",
    "I'll <b>go</b>… 3.14159 e\u0301",
]


@pytest.mark.parametrize("name", ["gpt2", "bert", "qwen"])
def test_tokenizers_for_transformers_give_the_same_ids(name):
    rust, words = rust_tokenizer(name), load_tokenizer(name)
    for text in TEXTS:
        assert rust.encode(text, add_special_tokens=False).ids == words.encode(text)
    if name != "bert":
        assert rust.decode(words.encode(TEXTS[0])) == TEXTS[0]
        assert (
            rust.token_to_id("<|endoftext|>") == words.eot_id
            and rust.get_vocab_size() == words.vocab_size
        )


@pytest.mark.slow
def test_the_harness_measures_what_perplexity_measures(tiny_data, tmp_path):
    """lm-evaluation-harness on an exported harmonic model, through its own command."""
    flags = {
        **TINY,
        "dataset": tiny_data,
        "head": "cosine",
        "max_iters": 60,
        "block_size": 64,
        "out_dir": tmp_path / "run",
    }
    for command in (
        ["train.py", *(f"--{k}={v}" for k, v in flags.items())],
        ["-m", "interop.export", tmp_path / "run", f"--to={tmp_path / 'model'}"],
        ["-m", "interop.lm_eval", tiny_data, "--split=val", f"--to={tmp_path / 'tasks'}"],
        [
            "-m",
            "analysis.perplexity",
            tmp_path / "run",
            "--documents",
            f"--out={tmp_path / 'perplexity.csv'}",
        ],
        [
            "-m",
            "lm_eval",
            "run",
            "--model",
            "hf",
            "--model_args",
            f"pretrained={tmp_path / 'model'},trust_remote_code=True",
            "--tasks",
            "tiny_val,tiny_val_choice",
            "--include_path",
            tmp_path / "tasks",
            "--device",
            "cpu",
            "--output_path",
            tmp_path / "results",
        ],
    ):
        done = script(*command, cwd=ROOT, env={"HF_HOME": str(tmp_path / "cache")})
        assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(next((tmp_path / "results").rglob("results*.json")).read_text())["results"]
    names, values = (
        line.split(",") for line in (tmp_path / "perplexity.csv").read_text().splitlines()
    )
    ours = dict(zip(names, values, strict=True))
    for metric in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
        assert results["tiny_val"][f"{metric},none"] == pytest.approx(float(ours[metric]), rel=1e-3)
    assert 0.25 < results["tiny_val_choice"]["acc,none"] <= 1
