"""Starting from models that people already have: what is read, what is refused, and what a swapped
head predicts."""

import json
import pickle
import shutil

import pytest
import torch
from conftest import TINY, script
from safetensors.torch import load_file, save_file

from base.errors import UserError
from benchmarks import parity
from interop import pretrained
from model import ModelConfig
from training import checkpoint
from training.distributed import launcher

GPT = "GPT2LMHeadModel"


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """-> (a folder in Hugging Face's format, transformers' model). 300 rows: the vocabulary of
    tiny_data."""
    folder = tmp_path_factory.mktemp("hub") / "gpt2"
    theirs = parity.build({**parity.CASES[GPT], "vocab_size": 300})
    theirs.save_pretrained(folder)
    return folder, theirs


@pytest.fixture
def copy(gpt2, tmp_path):
    """A copy of the folder, to be spoilt."""
    shutil.copytree(gpt2[0], tmp_path / "copy")
    return tmp_path / "copy"


def load(path, **kw):
    source = pretrained.find(str(path))
    return source.load(ModelConfig(**{**source.settings, **kw})).eval()


def logits(model, ids):
    return model(ids)[0]


IDS = torch.randint(290, (2, 17), generator=torch.Generator().manual_seed(0))
# As the model has them.
SIZES = {key: None for key in ("n_layer", "n_head", "n_embd", "block_size")}


def test_shards_and_half_precision_are_read(gpt2, tmp_path):
    folder, theirs = gpt2
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    torch.testing.assert_close(
        logits(load(tmp_path / "shards"), IDS), logits(load(folder), IDS), rtol=0, atol=0
    )
    (tmp_path / "half").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(folder / name, tmp_path / "half")
    save_file(
        {k: v.bfloat16() for k, v in load_file(folder / "model.safetensors").items()},
        tmp_path / "half" / "model.safetensors",
    )
    half = load(tmp_path / "half")
    assert half.head.weight.dtype == torch.float32
    assert 0 < (logits(half, IDS) - logits(load(folder), IDS)).abs().max() < 0.5


def test_old_names_are_read(gpt2, copy):
    """The hub's own gpt2 has no prefix and buffers of masks; BERT's has gamma and beta, a pooler
    and a second head."""
    tensors = {
        k.removeprefix("transformer."): v for k, v in load_file(copy / "model.safetensors").items()
    }
    tensors |= {
        "h.0.attn.bias": torch.ones(1, 1, 4, 4),
        "lm_head.weight": tensors["wte.weight"].clone(),
    }
    save_file(tensors, copy / "model.safetensors")
    torch.testing.assert_close(logits(load(copy), IDS), logits(load(gpt2[0]), IDS), rtol=0, atol=0)

    theirs = parity.build(parity.CASES["BertForMaskedLM"])
    theirs.save_pretrained(copy.parent / "bert")
    expected = logits(load(copy.parent / "bert"), IDS)
    tensors = load_file(copy.parent / "bert" / "model.safetensors")
    renamed = {
        k.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): v
        for k, v in tensors.items()
    }
    renamed |= {
        "bert.pooler.dense.bias": torch.ones(3),
        "cls.seq_relationship.bias": torch.ones(2),
        "bert.embeddings.position_ids": torch.ones(3),
    }
    save_file(renamed, copy.parent / "bert" / "model.safetensors")
    torch.testing.assert_close(logits(load(copy.parent / "bert"), IDS), expected, rtol=0, atol=0)


def test_an_encoder_alone_gets_a_new_transform(gpt2, tmp_path, capsys):
    theirs = parity.build(parity.CASES["BertForMaskedLM"])
    theirs.bert.save_pretrained(tmp_path / "bert")
    model = load(tmp_path / "bert")
    assert "has no head.bias, transform.0.weight" in capsys.readouterr().err
    assert (
        torch.equal(model.tokens.weight, theirs.bert.embeddings.word_embeddings.weight)
        and model.tokens.weight is model.head.weight
    )
    theirs.save_pretrained(tmp_path / "whole")
    file = tmp_path / "whole/model.safetensors"
    tensors = load_file(file)
    for lost in ("cls.predictions.transform.dense.weight", "cls.predictions.bias"):
        save_file({k: v for k, v in tensors.items() if k != lost}, file)
        with pytest.raises(UserError, match=f"{lost} is missing"):
            load(tmp_path / "whole")


def nanogpt(theirs, path, **changes):
    """A checkpoint as nanoGPT's train.py writes it of a compiled model."""
    tensors = {}
    for name, tensor in theirs.state_dict().items():
        matrix = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        tensors[f"_orig_mod.{name}"] = tensor.T.contiguous() if matrix else tensor
    arguments = dict(
        n_layer=3,
        n_head=3,
        n_embd=51,
        block_size=parity.LONGEST,
        bias=True,
        vocab_size=300,
        dropout=0.1,
    )
    stored = {
        "model": tensors,
        "optimizer": {"state": {}, "param_groups": []},
        "model_args": arguments,
        "iter_num": 5,
    }
    stored |= {"best_val_loss": torch.tensor(3.0), "config": {"dataset": "openwebtext"}, **changes}
    torch.save(stored, path)


def test_nanogpts_checkpoint_is_read(gpt2, tmp_path):
    # nn.GELU(), not GPT-2's tanh.
    theirs = parity.build({**parity.CASES[GPT], "vocab_size": 300, "activation_function": "gelu"})
    nanogpt(theirs, tmp_path / "ckpt.pt")
    expected = theirs(input_ids=IDS).logits
    torch.testing.assert_close(
        logits(load(tmp_path / "ckpt.pt"), IDS), expected, rtol=1e-4, atol=1e-4
    )
    nanogpt(gpt2[1], tmp_path / "old.pt")
    assert (
        logits(load(tmp_path / "old.pt"), IDS) - gpt2[1](input_ids=IDS).logits
    ).abs().max() > 5e-4


class Evil:
    def __reduce__(self):
        return print, ("EXECUTED",)


def test_pickles_are_not_executed(gpt2, copy, tmp_path, capsys):
    nanogpt(gpt2[1], tmp_path / "evil.pt", extra=Evil())
    with pytest.raises(
        UserError,
        match=(
            "evil.pt is not a checkpoint of nanoGPT, or holds more than tensors; nothing in it"
            " was run"
        ),
    ):
        load(tmp_path / "evil.pt")
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(UserError, match="has no model.safetensors; pytorch_model.bin is a pickle"):
        load(copy)
    (copy / "model.safetensors").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match="is not a safetensors file"):
        load(copy)
    assert "EXECUTED" not in capsys.readouterr().out


def test_missing_extra_and_wrong_tensors_are_listed(copy):
    tensors = load_file(copy / "model.safetensors")
    del tensors["transformer.h.1.mlp.c_fc.bias"]
    tensors["transformer.h.0.attn.q_norm.weight"] = torch.ones(3)
    tensors["transformer.ln_f.weight"] = torch.ones(50)
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(UserError) as caught:
        load(copy)
    for words in (
        "h.1.mlp.c_fc.bias is missing",
        "h.0.attn.q_norm.weight is not part of gpt",
        "ln_f.weight is (50,), expected (51,)",
    ):
        assert words in str(caught.value)


@pytest.mark.parametrize(
    "change, words",
    [
        (
            {"model_type": "llama"},
            "is a model of type llama; supported types are gpt2, bert, qwen2, qwen3",
        ),
        (
            {"activation_function": "relu"},
            "model.py does not have the activation relu (only gelu_pytorch_tanh, gelu_new, gelu)",
        ),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon=1e-06"),
        ({"n_layer": "three"}, "config.json is wrong"),
        (None, "config.json is wrong"),
    ],
)
def test_other_models_are_refused(copy, change, words):
    stored = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text("{" if change is None else json.dumps({**stored, **change}))
    with pytest.raises(UserError) as caught:
        load(copy)
    assert words in str(caught.value)


def test_tied_tables_that_differ_are_refused(copy):
    tensors = load_file(copy / "model.safetensors")
    save_file(
        {**tensors, "lm_head.weight": tensors["transformer.wte.weight"] + 1},
        copy / "model.safetensors",
    )
    with pytest.raises(
        UserError, match="wte.weight and lm_head.weight differ, but its configuration ties them"
    ):
        load(copy)


@pytest.mark.parametrize("content", ["[]", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}', "{"])
def test_a_wrong_index_is_named(copy, content):
    (copy / "model.safetensors.index.json").write_text(content)
    load(copy)  # A whole file is preferred, as in transformers.
    (copy / "model.safetensors").unlink()
    with pytest.raises(UserError, match="model.safetensors.index.json is wrong"):
        load(copy)


def test_other_files_are_named(gpt2, tmp_path):
    torch.save(torch.ones(3), tmp_path / "tensor.pt")
    with pytest.raises(UserError, match="tensor.pt is not a checkpoint of nanoGPT"):
        load(tmp_path / "tensor.pt")
    with pytest.raises(UserError, match="name the folder, which has config.json too"):
        load(gpt2[0] / "model.safetensors")


def test_a_damaged_file_or_a_missing_shard_is_named(gpt2, copy, tmp_path):
    content = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="model.safetensors is not a safetensors file"):
        load(copy)
    gpt2[1].save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    lost = sorted((tmp_path / "shards").glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(UserError, match=f"has no {lost.name}"):
        load(tmp_path / "shards")


def test_training_starts_from_it_and_reports_both_numbers(train, gpt2, tmp_path):
    status, out, err = train(init_from=gpt2[0], head="euclidean", **{**SIZES, "block_size": 16})
    assert status == 0, err
    assert (
        "with its own head: val loss" in out
        and "its head swapped for euclidean, harmonic link, n = " in out
    )
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["iter"] == 0 and abs(first["val_loss"] - first["source_val_loss"]) < 0.05
    model, stored, _ = checkpoint.load_run(tmp_path / "run")
    assert stored["exponent"] > 10 and not stored["tie_weights"] and model.config.n_embd == 51
    status, out, _ = train(
        init_from="resume", max_iters=4, **{k: None for k in (*SIZES, "dataset")}
    )
    assert status == 0 and "iter 4" in out
    assert stored["source"] == str(gpt2[0]) and stored["init_from"] == "scratch"
    status, again, err = train(
        "run/config.yaml", out_dir="again", **{k: None for k in (*SIZES, "dataset")}
    )
    # The folder holds what starts it again.
    assert status == 0 and "with its own head: val loss" in again, err
    assert json.loads((tmp_path / "again" / "metrics.jsonl").read_text().splitlines()[0])[
        "val_loss"
    ] == pytest.approx(first["val_loss"], abs=0.1)


@pytest.mark.parametrize("link", ["harmonic", "softmax"])
def test_a_given_exponent_stays(train, gpt2, tmp_path, link):
    flags = {**SIZES, "block_size": 16, "head": "euclidean", "link": link, "exponent": 60.0}
    status, _, err = train(init_from="auto", source=gpt2[0], **flags)
    assert status == 0, err
    stored = checkpoint.load_run(tmp_path / "run")[1]
    assert (
        stored["exponent"] == 60.0
        if link == "harmonic"
        else stored["scale"] > 1 and stored["exponent"] is None
    )
    status, out, err = train(
        init_from="auto", source=gpt2[0], max_iters=3, **{k: None for k in (*SIZES, "dataset")}
    )
    assert status == 0 and "iter 3" in out and "as it is" not in out, err  # resumed


def test_a_matched_head_needs_float32(train, gpt2):
    status, _, err = train(
        init_from=gpt2[0], head="cosine", head_precision="autocast", **{**SIZES, "block_size": 16}
    )
    assert status == 2 and "head_precision=autocast: a matched head" in err


def test_a_run_and_its_own_head_go_on(train, tmp_path):
    """Also with another n and, where positions are rotary, with longer windows."""
    model = dict(head="cosine", arch="qwen")
    assert train(**model, max_iters=3)[0] == 0
    status, out, _ = train(init_from="run", out_dir="next", **model, max_iters=1)
    before = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ][-1]
    after = json.loads((tmp_path / "next" / "metrics.jsonl").read_text().splitlines()[0])
    assert status == 0 and before["val_loss"] == after["val_loss"] and "swapped" not in out
    other = dict(exponent=9.0, block_size=2 * TINY["block_size"], max_iters=1)
    status, out, err = train(init_from="run", out_dir="other", **{**model, **other})
    assert status == 0 and "n = 9" in out, err
    again, stored, _ = checkpoint.load_run(tmp_path / "other")
    assert (
        again.head.strength == stored["exponent"] == 9
        and stored["block_size"] == other["block_size"]
    )
    status, _, err = train(
        init_from="run",
        out_dir="third",
        arch="qwen",
        head="euclidean",
        link="softmax",
        head_init_std=0.5,
    )
    assert (
        status == 2 and "only a model with cross_entropy can get another head, and run has" in err
    )
    status, _, err = train(
        init_from="run", out_dir="third", **model, link="softmax", head_init_std=0.5
    )
    assert (
        status == 2
        and "has link=harmonic, not softmax" in err
        and "leave these settings out" in err
    )
    assert "has head_init_std=0.02, not 0.5" in err


def test_what_contradicts_the_model_is_listed(train, gpt2, tmp_path):
    status, _, err = train(
        init_from=gpt2[0], **{**SIZES, "n_layer": 5, "block_size": 16, "arch": "bert"}
    )
    assert status == 2 and not (tmp_path / "run").exists()
    for words in ("has arch=gpt, not bert", "has n_layer=3, not 5"):
        assert words in err
    status, _, err = train(init_from=gpt2[0], **{**SIZES, "block_size": 999})
    assert status == 2 and "block_size=999" in err and "reads at most 256 tokens" in err


def test_the_tokenizer_has_to_be_its_own(train, tmp_path):
    settings = {**parity.CASES[GPT], "vocab_size": 50257, "n_embd": 6}
    parity.build(settings).save_pretrained(tmp_path / "gpt2")
    status, _, err = train(init_from="gpt2", **SIZES)
    assert status == 2 and "gpt2 has the tokenizer gpt2, another than" in err and "(bpe:300)" in err


def test_a_tokenizer_of_the_same_name_is_not_the_same(train, tiny_data, tmp_path):
    assert train()[0] == 0
    stored = json.loads((tmp_path / "run/tokenizer.json").read_text())
    vocabulary = stored["model"]["vocab"]
    a, b = [token for token in vocabulary if len(token) == 1][:2]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (tmp_path / "run/tokenizer.json").write_text(json.dumps(stored))
    status, _, err = train(init_from="run", out_dir="next")
    assert status == 2 and "run has another tokenizer than" in err and "2 tokens differ" in err


@pytest.mark.parametrize(
    "name, words",
    [
        ("resum", "did you mean resume?"),
        ("gpt2-midium", "did you mean gpt2-medium?"),
        ("no/such/folder", "no such file or folder"),
    ],
)
def test_misspelt_names_are_answered(train, name, words):
    status, _, err = train(init_from=name)
    assert status == 2 and words in err and err.count("\n") == 1


def test_the_hub_out_of_reach_is_said(train, monkeypatch):
    import huggingface_hub

    def unreachable(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    status, _, err = train(init_from="Qwen/Qwen2.5-0.5B")
    assert (
        status == 2
        and "Qwen/Qwen2.5-0.5B: there is no such local folder, and the Hugging Face hub gave none"
        " (OSError: no route"
        in err
    )


def test_the_hub_is_asked_for_safetensors_alone(monkeypatch, gpt2):
    import huggingface_hub

    asked = []
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda name, **kw: asked.append((name, kw)) or str(gpt2[0]),
    )
    torch.testing.assert_close(
        logits(load("gpt2"), IDS), logits(load(gpt2[0]), IDS), rtol=0, atol=0
    )
    patterns = [pattern for _, kw in asked for pattern in kw["allow_patterns"]]
    assert patterns[:2] == ["config.json", "tokenizer.json"] and all(
        "safetensors" in pattern for pattern in patterns[2:]
    )


def test_weights_are_fetched_after_everything_was_checked(train, monkeypatch, gpt2, tmp_path):
    import huggingface_hub

    (tmp_path / "hub").mkdir()
    shutil.copy(gpt2[0] / "config.json", tmp_path / "hub")
    asked = []
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda name, **kw: asked.append(kw) or str(tmp_path / "hub"),
    )
    status, _, err = train(init_from="gpt2", lerning_rate=1, **SIZES)
    assert status == 2 and "lerning_rate: unknown key" in err and len(asked) == 1


@pytest.mark.slow
def test_two_processes_swap_alike(gpt2, tiny_data, tmp_path):
    flags = {
        **TINY,
        "dataset": tiny_data,
        "init_from": gpt2[0],
        "head": "euclidean",
        "backend": "gloo",
        "block_size": 16,
    }
    for key in ("n_layer", "n_head", "n_embd"):
        del flags[key]
    losses = []
    for processes in (1, 2):
        command = [
            *(launcher(processes) if processes > 1 else []),
            "train.py",
            *(f"--{k}={v}" for k, v in flags.items()),
        ]
        done = script(*command, f"--out_dir={tmp_path / str(processes)}")
        assert done.returncode == 0, done.stderr
        lines = [
            json.loads(line)
            for line in (tmp_path / str(processes) / "metrics.jsonl").read_text().splitlines()
        ]
        losses.append([m["val_loss"] for m in lines if "val_loss" in m])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
