"""Swapped heads: a head matched to a softmax predicts nearly the same; transformers' models take a
head and train with it."""

import copy
import json
import math
import os
import pickle
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
)
from transformers.modeling_outputs import CausalLMOutput

from harmonic import DISTANCES, HarmonicHead, harmonic_loss, load_swapped, match, swap_head
from harmonic.match import _fit_strength

ROOT = Path(__file__).resolve().parent.parent
V, C, N = 307, 45, 400  # odd on purpose


def source(bias=False, seed=0):
    """States that are no pure LayerNorm output, an unembedding with a mean and rows of different
    norms."""
    g = torch.Generator().manual_seed(seed)

    def r(*shape):
        return torch.randn(*shape, generator=g)

    h = F.layer_norm(r(N, C), (C,)) * (1 + 0.1 * r(C)) + 0.3 * r(C)
    w = 0.2 * r(V, C) * (1 + 0.3 * r(V, 1)) + 0.1 * r(C)
    return h, w, 0.5 * r(V) if bias else None


def kl(h, w, bias, head) -> float:
    p = (h.double() @ w.double().T + (0 if bias is None else bias.double())).log_softmax(-1)
    q = head(h).double()[:, : len(w)].log_softmax(-1)
    return F.kl_div(q, p, log_target=True, reduction="batchmean").item()


@pytest.mark.parametrize("link", ["harmonic", "softmax"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "name", ["euclidean", "euclidean_squared", "mahalanobis", "mahalanobis_cholesky", "cosine"]
)
def test_the_closed_form_comes_near(name, link, bias):
    """One of 45 directions is given up, and cosine cannot follow states whose norms differ: a few
    hundredths of a nat here; without matching it is nats."""
    h, w, b = source(bias)
    head = HarmonicHead(C, V, name, link=link)
    found = match(head, h, w, b)
    assert found == pytest.approx(kl(h, w, b, head), rel=0.2, abs=1e-4)
    assert found < (0.03 if name != "cosine" else 0.1)
    assert kl(h, w, b, HarmonicHead(C, V, name, link=link)) > 1


def test_nearness_grows_with_the_exponent_until_float32_rounds():
    h, w, b = source(bias=True)
    h[:, 7] = 0.01 * h[:, 7]  # a direction that may be given up
    w[:, 7] = 0.01 * w[:, 7]
    found = []
    for n in (50, 500, 5000):
        head = HarmonicHead(C, V, "euclidean", exponent=float(n))
        match(head, h, w, b)
        assert head.strength == n  # it was given
        found.append(kl(h, w, b, head))
    assert found[0] > 3 * found[1] > 9 * found[2] and found[2] < 1e-4


def test_prototypes_lie_on_a_sphere():
    """So that no norm penalty is left; with a bias the squared radius differs by 2 a b."""
    h, w, b = source()
    for name in ("euclidean", "cosine"):
        head = HarmonicHead(C, V, name)
        match(head, h, w)
        norms = head.weight.norm(dim=-1)
        torch.testing.assert_close(norms, norms.mean().expand(V), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", [n for n in DISTANCES if DISTANCES[n].kernel != "l2"])
def test_the_others_are_fitted_in_scale_and_exponent(name):
    """No other exponent and no other scale of a grid does better."""
    h, w, _ = source()
    head = HarmonicHead(C, V, name).eval()
    found = match(head, h, w)
    before = HarmonicHead(C, V, name).eval()
    before.weight.data.copy_(w)
    uniform = -(h @ w.T).softmax(-1).mul((h @ w.T).log_softmax(-1)).sum(-1).mean().item()
    # Others see little of a dot product.
    near = name in ("manhattan", "minkowski", "hamming_soft", "hamming_gumbel")
    assert found < min(kl(h, w, None, before), (math.log(V) - uniform) * (0.4 if near else 0.99))
    factor = (head.weight[0] / w[0]).mean().item()
    torch.testing.assert_close(head.weight, factor * w)
    for size in (0.3, 0.7, 1.5, 4):
        other = HarmonicHead(C, V, name).eval()
        other.weight.data.copy_(size * head.weight)
        assert _fit_strength(other, h, (h @ w.T).softmax(-1)) > 0.98 * found - 1e-3
    for change in (0.8, 1.25):
        other = HarmonicHead(C, V, name, exponent=head.strength * change).eval()
        other.weight.data.copy_(head.weight)
        assert kl(h, w, None, other) > 0.999 * kl(h, w, None, head)


def test_a_bias_is_matched_by_a_bias():
    h, w, b = source(bias=True)
    head = HarmonicHead(C, V, "cross_entropy", bias=True).eval()
    assert abs(match(head, h, w, b)) < 1e-6 and abs(kl(h, w, b, head)) < 1e-6


def test_match_refuses_what_does_not_fit():
    h, w, _ = source()
    with pytest.raises(ValueError, match="does not match an unembedding of"):
        match(HarmonicHead(C, V - 1, "cosine"), h, w)
    with pytest.raises(ValueError, match="does not match an unembedding of"):
        match(HarmonicHead(C + 1, V, "cosine"), h, w)
    with pytest.raises(ValueError, match=r"states \(1, 45\)"):
        match(HarmonicHead(C, V, "cosine"), h[:1], w)


def test_padded_rows_stay_padding():
    h, w, b = source(bias=True)
    head = HarmonicHead(C, V + 13, "euclidean", real_vocab_size=V)
    match(head, h, F.pad(w, (0, 0, 0, 5)), F.pad(b, (0, 5)))
    assert head(h).shape == (N, V) and kl(h, w, b, head) < 0.05


def is_masked(kind):
    return "bert" in kind or kind in ("esm", "luke")


def hugging_face(kind: str, **kw):
    torch.manual_seed(0)
    sizes = dict(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=V,
        pad_token_id=0 if kind in ("roberta", "esm", "luke") else None,
        initializer_range=0.2,
    )
    sizes |= (
        {}
        if kind == "gpt2"
        else {"hidden_dim" if kind == "distilbert" else "intermediate_size": 40}
    )
    sizes |= {"num_key_value_heads": 2} if kind.startswith("qwen") else {}
    config = CONFIG_MAPPING[kind](**sizes, **kw)
    return (AutoModelForMaskedLM if is_masked(kind) else AutoModelForCausalLM).from_config(config)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["gpt2", "bert", "qwen2", "qwen3"])
def test_swapped_models_give_the_heads_logits_loss_and_gradients(kind, tied):
    model = hugging_face(kind, tie_word_embeddings=tied)
    head = swap_head(model, "manhattan", exponent=20.0)
    assert (
        head.table is model.get_input_embeddings().weight
    ) == tied and model.get_output_embeddings() is head
    ids, labels = torch.randint(V, (2, 3, 11))
    labels[0, 4:] = -100
    states = []
    hook = head.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0]))
    model.eval()
    logits = model(input_ids=ids).logits
    hook.remove()
    torch.testing.assert_close(logits, head(states[0]))
    if kind != "bert":
        logits, labels_at = logits[:, :-1], labels[:, 1:]
    else:
        labels_at = labels
    expected = F.cross_entropy(logits.reshape(-1, V), labels_at.reshape(-1), ignore_index=-100)
    with_labels = model(input_ids=ids, labels=labels)
    torch.testing.assert_close(with_labels.loss, expected)
    assert with_labels.logits.shape == (3, 11, V)
    (gradient,) = torch.autograd.grad(expected, [head.table])
    model.train()
    for m in model.modules():
        if isinstance(m, torch.nn.Dropout):
            m.p = 0.0
    trained = model(ids, labels=labels)
    assert trained.logits is None  # they never existed
    trained.loss.backward()
    torch.testing.assert_close(trained.loss, expected)
    torch.testing.assert_close(head.table.grad, gradient, rtol=1e-3, atol=1e-6)
    assert isinstance(model(ids, labels=labels, return_dict=False), tuple)
    several = model(input_ids=ids, labels=labels, num_items_in_batch=torch.tensor(7)).loss
    torch.testing.assert_close(several, expected * (labels_at != -100).sum() / 7)


@pytest.mark.parametrize("kind", ["gpt2", "bert", "qwen2"])
def test_swapped_models_keep_what_they_predict(kind):
    model = hugging_face(kind).eval()
    ids = torch.randint(V, (8, 40))
    with torch.no_grad():
        before = model(input_ids=ids).logits.log_softmax(-1)
        head = swap_head(model, "euclidean", match_to=ids)
        after = model(input_ids=ids).logits.log_softmax(-1)
    spread = before.std(-1).mean()
    assert (after - before).abs().mean() < 0.15 * spread > 0.05
    assert (
        head.table is not model.get_input_embeddings().weight
        and not model.config.tie_word_embeddings
    )
    assert model.config.harmonic["name"] == "euclidean" and model.config.harmonic[
        "exponent"
    ] == float(head.strength)
    if kind != "bert":
        text = model.generate(ids[:1, :5], max_new_tokens=5, do_sample=False, pad_token_id=0)
        assert text.shape == (1, 10)


def test_outputs_are_ordered_as_transformers_orders_them():
    model, ids = hugging_face("qwen2"), torch.randint(V, (2, 9))
    before = model(input_ids=ids, labels=ids)
    swap_head(model, "cosine")
    assert list(model.eval()(input_ids=ids, labels=ids)) == list(before)
    trained = model.train()(input_ids=ids, labels=ids)
    assert trained[0] is trained.loss and "logits" not in trained


def test_models_that_do_more_with_logits_are_refused():
    model = hugging_face("gpt2")
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(
        ValueError, match="changes logits or loss after its output layer: final_logit_softcapping"
    ):
        swap_head(model, "cosine")
    with pytest.raises(ValueError, match="EsmForMaskedLM cannot be swapped: its code adds"):
        swap_head(hugging_face("esm"), "cosine")


KINDS = ["gpt2", "bert", "qwen2", "distilbert", "roberta"]  # each has other names


def swapped(kind, matched=True, name="euclidean", **arguments):
    """A model in eval mode, and ids that it reads."""
    model, ids = (
        hugging_face(kind).eval(),
        torch.randint(V, (4, 20), generator=torch.Generator().manual_seed(1)),
    )
    swap_head(model, name, match_to=ids if matched else None, **arguments)
    return model, ids


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("matched", [True, False])
@pytest.mark.parametrize(
    ("tokens", "multiple", "rows"),
    [(310, None, 310), (290, None, 290), (310, 64, 320), (None, 64, 320)],
)
def test_the_vocabulary_can_be_resized(kind, matched, tokens, multiple, rows, tmp_path):
    """Old rows stay, both tables have the same rows, and no new token is likelier than the
    others. The resized model can be saved and trained."""
    model, _ = swapped(kind, matched, "cosine")
    before = model.get_output_embeddings().table.detach().clone()
    model.resize_token_embeddings(tokens, pad_to_multiple_of=multiple)
    table, embedding = model.get_output_embeddings().table, model.get_input_embeddings().weight
    kept = min(rows, V)
    assert len(table) == len(embedding) == model.config.vocab_size == rows
    assert (
        (table is embedding)
        == model.config.tie_word_embeddings
        == (not matched and kind != "qwen2")
    )
    assert torch.equal(table[:kept], before[:kept])
    ids = torch.randint(rows, (2, 9))
    out = model(input_ids=ids, labels=ids)
    assert out.logits.shape == (2, 9, rows) and out.loss.isfinite()
    if rows > V and matched:
        p = out.logits.softmax(-1).mean((0, 1))
        assert p[V:].max() < 2 * p[:V].mean()
    if model.can_generate():
        text = model.generate(
            ids[:1, :5], max_new_tokens=3, num_beams=2, do_sample=False, pad_token_id=0
        )
        assert text.shape == (1, 8)
    if rows > V and multiple is None:
        model.save_pretrained(tmp_path)
        again = load_swapped(tmp_path).eval()
        assert torch.equal(again(input_ids=ids).logits, out.logits)
        # DistributedDataParallel stops at parameters that nothing uses.
        assert unused(model, ids) <= unused(hugging_face(kind), ids % V)


def test_a_bias_that_is_tied_the_other_way_round(tmp_path):
    """LUKE ties `lm_head.bias` to `lm_head.decoder.bias`, RoBERTa the other way round."""
    model = hugging_face("luke", entity_vocab_size=10).eval()
    swap_head(model, "cosine")
    model.resize_token_embeddings(V + 3)
    model.save_pretrained(tmp_path)
    ids = torch.randint(V, (2, 9))
    again = load_swapped(tmp_path).eval()
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


def unused(model, ids):
    """The names of the parameters that get no gradient."""
    model.train()(input_ids=ids, labels=ids).loss.backward()
    return {name for name, p in model.named_parameters() if p.grad is None}


def test_a_padded_head_is_resized_with_its_padding(tmp_path):
    model, _ = swapped("gpt2", name="manhattan", real_vocab_size=V - 7)
    model.resize_token_embeddings(V - 4, pad_to_multiple_of=64)
    ids = torch.randint(V - 4, (1, 6))
    logits = model(ids).logits
    assert logits.shape == (1, 6, 320) and len(model.lm_head.table) == 320  # as many as rows
    assert not logits.softmax(-1)[..., V - 4 :].any()
    out = model.generate(
        ids, max_new_tokens=3, output_scores=True, return_dict_in_generate=True, pad_token_id=0
    )
    scores = model.compute_transition_scores(out.sequences, out.scores, normalize_logits=True)
    one_by_one = -model.lm_head.loss(
        model.transformer(out.sequences)[0][:, -4:-1], out.sequences[:, -3:], reduction="none"
    )
    torch.testing.assert_close(scores, one_by_one)
    model.save_pretrained(tmp_path)
    again = load_swapped(tmp_path).eval()
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=0)
    assert (
        model.generate(ids, max_new_tokens=3, num_beams=2, do_sample=True, pad_token_id=0).max()
        < V - 4
    )
    model.resize_token_embeddings(None, pad_to_multiple_of=100)
    assert model(ids).logits.shape == (1, 6, 400) and len(model.lm_head.table) == 400


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("matched", [True, False])
def test_a_swapped_model_is_copied_in_every_way(kind, matched, tmp_path):
    """Deep copies, pickles, torch.save, folders: the same logits and the same loss."""
    model, ids = swapped(kind, matched)
    torch.save(model, tmp_path / "model.pt")
    model.save_pretrained(tmp_path / "folder")
    auto = AutoModelForMaskedLM if is_masked(kind) else AutoModelForCausalLM
    copies = {
        "deepcopy": copy.deepcopy(model),
        "pickle": pickle.loads(pickle.dumps(model)),
        "torch.save": torch.load(tmp_path / "model.pt", weights_only=False),
        "load_swapped": load_swapped(tmp_path / "folder"),
        "from_pretrained": type(model).from_pretrained(tmp_path / "folder"),
        "auto": auto.from_pretrained(tmp_path / "folder"),
    }
    expected = model(input_ids=ids, labels=ids)
    for how, other in copies.items():
        found = other.eval()(input_ids=ids, labels=ids)
        assert torch.equal(found.logits, expected.logits) and torch.equal(
            found.loss, expected.loss
        ), how
        tied = other.get_output_embeddings().table is other.get_input_embeddings().weight
        assert type(other) is type(model) and isinstance(other, type(hugging_face(kind))), how
        assert tied == model.config.tie_word_embeddings, how


@pytest.mark.parametrize("kind", KINDS)
def test_a_matched_head_stays_exact_in_half_precision(kind, tmp_path):
    """Its prototypes are large and differ little: in bfloat16 they would lose what they say. The
    trunk is cast."""
    model, ids = swapped(kind)
    model.save_pretrained(tmp_path)
    expected = model(input_ids=ids).logits.log_softmax(-1)
    casts = [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.bfloat16()]
    halves = [cast(copy.deepcopy(model)) for cast in casts] + [
        load_swapped(tmp_path, dtype=torch.bfloat16).eval()
    ]
    for half in halves:
        assert (
            half.get_output_embeddings().table.dtype
            == torch.float32
            != half.get_input_embeddings().weight.dtype
        )
        off = (
            F.kl_div(
                half(input_ids=ids).logits.log_softmax(-1),
                expected,
                log_target=True,
                reduction="sum",
            ).item()
            / ids.numel()
        )
        assert off < 0.02


def test_a_dot_product_in_silence_is_impossible(tmp_path, caplog):
    """Whoever multiplies by the head's weight, or loads its folder as another class."""
    model, _ = swapped("gpt2")
    with pytest.raises(AttributeError, match="has no `weight`"):
        F.linear(torch.randn(2, 32), model.get_output_embeddings().weight)
    assert not hasattr(model.lm_head, "weight")
    model.save_pretrained(tmp_path)
    with caplog.at_level("WARNING"):
        logger = transformers.utils.logging.get_logger("transformers")
        logger.addHandler(caplog.handler)
        transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
        logger.removeHandler(caplog.handler)
    assert "harmonic_gpt2" in caplog.text and "lm_head.weight" in caplog.text


@pytest.mark.parametrize(
    "first", ["harmonic", pytest.param("transformers", marks=pytest.mark.slow)]
)
def test_a_fresh_process_needs_nothing_but_the_import(first, tmp_path):
    model, ids = swapped("gpt2")
    model.save_pretrained(tmp_path)
    imports = [
        "import sys, harmonic; assert 'transformers' not in sys.modules or sys.argv[1] =="
        " 'transformers'",
        "from transformers import AutoModelForCausalLM",
    ]
    code = f"""
{chr(10).join(imports if first == "harmonic" else imports[::-1])}
import torch
print(AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}).eval()(torch.tensor({ids.tolist()})).logits.double().sum().item())
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, first],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout) == pytest.approx(model(ids).logits.double().sum().item(), rel=1e-6)


def test_rows_of_one_token_have_no_loss():
    model, ids = swapped("gpt2")
    loss = model.train()(input_ids=ids[:, :1], labels=ids[:, :1]).loss
    loss.backward()
    assert loss == 0 and all(p.grad is None or not p.grad.any() for p in model.parameters())
    assert (
        model(
            input_ids=ids, labels=torch.full_like(ids, -100), num_items_in_batch=torch.tensor(0)
        ).loss
        == 0
    )


def test_a_swapped_model_is_exported():
    model, ids = swapped("gpt2", name="cosine")
    any_number = torch.export.Dim.DYNAMIC
    shapes = {"input_ids": {0: any_number, 1: any_number}, "use_cache": None}
    program = torch.export.export(
        model, (), {"input_ids": ids, "use_cache": False}, dynamic_shapes=shapes
    )
    other = torch.randint(V, (3, 13))
    found = program.module()(input_ids=other, use_cache=False).logits
    torch.testing.assert_close(found, model(other, use_cache=False).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("modules", [["lm_head"], None])
def test_adapters_of_peft(modules, tmp_path):
    """With and without a head of their own: the loss, a step, saving, loading, merging."""
    from peft import LoraConfig, PeftModel, get_peft_model

    model, ids = swapped("gpt2", name="cosine")
    model.save_pretrained(tmp_path / "base")
    adapted = get_peft_model(
        model, LoraConfig(r=2, modules_to_save=modules, task_type="CAUSAL_LM", fan_in_fan_out=True)
    ).train()
    trained = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    for _ in range(3):
        adapted(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    assert all(p.grad is not None for p in trained.values()) and any(
        "table" in n for n in trained
    ) == bool(modules)
    logits = adapted.eval()(input_ids=ids).logits
    expected = F.cross_entropy(logits[:, :-1].reshape(-1, V), ids[:, 1:].reshape(-1))
    torch.testing.assert_close(adapted(input_ids=ids, labels=ids).loss, expected)
    adapted.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load_swapped(tmp_path / "base"), tmp_path / "adapter").eval()
    assert torch.equal(again(input_ids=ids).logits, logits)
    torch.testing.assert_close(
        again.merge_and_unload()(input_ids=ids).logits, logits, rtol=1e-4, atol=1e-3
    )


def liger(self, input_ids=None, labels=None, **more):
    """A forward as Liger's: fused where there are labels."""
    h = self.transformer(input_ids=input_ids).last_hidden_state
    if labels is None:
        return CausalLMOutput(logits=self.lm_head(h))
    return CausalLMOutput(
        loss=F.cross_entropy(F.linear(h, self.lm_head.weight).flatten(0, 1), labels.flatten())
    )


def test_a_fused_loss_of_a_library_is_the_heads_or_an_error(monkeypatch):
    """The heads' where it is put on the class; one put on the model itself stops."""
    model, ids = swapped("gpt2", name="cosine")
    expected = model(input_ids=ids, labels=ids).loss
    with monkeypatch.context() as patch:
        patch.setattr(transformers.GPT2LMHeadModel, "forward", liger)
        torch.testing.assert_close(model(input_ids=ids, labels=ids).loss, expected)
    model.forward = types.MethodType(liger, model)
    with pytest.raises(AttributeError, match="If a fused or chunked loss asked for `weight`"):
        model(input_ids=ids, labels=ids)


def test_hooks_of_accelerate_run_on_the_model_they_are_on():
    """... on a copy too, with mixed precision around them."""
    from accelerate import Accelerator
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Count(ModelHook):
        calls = 0

        def pre_forward(self, module, *arguments, **given):
            Count.calls += 1
            return arguments, given

    model, ids = swapped("gpt2", matched=False)
    expected = model(input_ids=ids, labels=ids).loss
    add_hook_to_module(model, Count())
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_output_embeddings().table.mul_(3)
    assert not torch.equal(other(input_ids=ids, labels=ids).loss, expected)
    assert torch.equal(model(input_ids=ids, labels=ids).loss, expected) and Count.calls == 2
    prepared = Accelerator(mixed_precision="no", cpu=True).prepare(model)
    assert torch.equal(prepared(input_ids=ids, labels=ids).loss, expected) and Count.calls == 3


def test_the_configuration_is_the_models_own(tmp_path):
    """Another model made from it has a dot product, and a folder's makes as many swapped models as
    one likes."""
    untried = transformers.XGLMForCausalLM(
        transformers.XGLMConfig(
            vocab_size=V, d_model=32, ffn_dim=40, num_layers=1, attention_heads=2
        )
    )
    swap_head(untried, "cosine")
    assert type(AutoModelForCausalLM.from_config(untried.config)) is type(untried)
    plain = hugging_face("gpt2")
    shared = plain.config
    model = type(plain)(shared)
    swap_head(model, "cosine", exponent=3.0)
    assert not hasattr(shared, "harmonic") and type(
        AutoModelForCausalLM.from_config(shared)
    ) is type(plain)
    assert model.config.model_type == "gpt2"  # as PEFT and others go by
    model.lm_head.set_strength(7.0)
    model.save_pretrained(tmp_path)
    stored = AutoConfig.from_pretrained(tmp_path)
    for config in (stored, stored, model.config, pickle.loads(pickle.dumps(stored))):
        assert type(AutoModelForCausalLM.from_config(config)) is type(model)
    assert load_swapped(tmp_path).lm_head.strength == 7.0
    assert pickle.loads(pickle.dumps(type(model))) is type(model)
    assert type(AutoModel.from_pretrained(tmp_path)) is transformers.GPT2Model


def test_folders_of_an_earlier_version_are_read(tmp_path):
    """Their config names the plain type, their prototypes are called `weight`; a plain folder is
    refused."""
    model, ids = swapped("gpt2", name="minkowski", p=2.0)
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model/modeling_harmonic.py").unlink()
    config = json.loads((tmp_path / "model/config.json").read_text())
    del config["auto_map"]
    config |= {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "model/model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("lm_head.table")
    save_file(tensors, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    again = load_swapped(tmp_path / "model").eval()
    assert torch.equal(again(ids).logits, model(ids).logits)
    hugging_face("gpt2").save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="holds no swapped head"):
        load_swapped(tmp_path / "plain")


def test_a_head_can_be_swapped_again_but_not_matched():
    model = hugging_face("qwen2").eval()
    swap_head(model, "cosine")
    swap_head(model, "euclidean", exponent=3.0)
    ids = torch.randint(V, (2, 9))
    out = model(input_ids=ids, labels=ids)
    torch.testing.assert_close(
        out.loss, F.cross_entropy(out.logits[:, :-1].reshape(-1, V), ids[:, 1:].reshape(-1))
    )
    with pytest.raises(ValueError, match="is euclidean already"):
        swap_head(model, "cosine", match_to=ids)


def test_a_model_without_an_unembedding_is_refused():
    from transformers import BertConfig, BertModel

    sizes = dict(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        vocab_size=20,
    )
    with pytest.raises(ValueError, match="BertModel is not a causal or masked language model"):
        swap_head(BertModel(BertConfig(**sizes)), "cosine")
    with pytest.raises(ValueError, match="not ModelHead: it changes the model in place"):
        swap_head(swap_head(hugging_face("gpt2"), "cosine"), "cosine")


def test_a_model_that_multiplies_by_its_output_matrix_itself_is_refused():
    from transformers import MambaConfig, MambaForCausalLM, MobileBertConfig, MobileBertForMaskedLM

    sizes = dict(vocab_size=20, hidden_size=16, num_hidden_layers=1)
    mobile = MobileBertConfig(**sizes, embedding_size=16, intra_bottleneck_size=16)
    for model in (MambaForCausalLM(MambaConfig(**sizes)), MobileBertForMaskedLM(mobile)):
        before = str(model)
        with pytest.raises(ValueError, match="reads the `weight` of its output layer"):
            swap_head(model, "cosine")
        assert str(model) == before


TRAINER = """
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Trainer, TrainingArguments
from harmonic import swap_head

torch.manual_seed(0)
sizes = dict(
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=128,
)
model = Qwen2ForCausalLM(Qwen2Config(vocab_size=500, **sizes))
swap_head(model, "cosine", exponent=8.0)

starts = torch.randint(500, (256, 1))  # texts that count in threes
rows = [{"input_ids": x, "labels": x} for x in (starts + 3 * torch.arange(32)) % 500]
arguments = TrainingArguments(
    "out/trainer",
    max_steps=60,
    per_device_train_batch_size=16,
    learning_rate=3e-3,
    report_to=[],
    save_strategy="no",
    use_cpu=True,
)
trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:32])
trainer.train()
print(trainer.evaluate()["eval_loss"])  # nats a token: near 0, from log 500 = 6.2
print(model.eval().generate(torch.tensor([[7, 10, 13]]), max_new_tokens=8, do_sample=False))
"""  # noqa: E501


def test_trainer_trains_the_example_of_the_docs(tmp_path, monkeypatch, capsys):
    assert TRAINER.strip() in (ROOT / "docs/interop.md").read_text()
    monkeypatch.chdir(tmp_path)
    made: dict = {}
    exec(TRAINER, made)
    lines = capsys.readouterr().out.splitlines()
    loss, text = [line for line in lines if not line.startswith("{")][-2:]
    assert float(loss) < 0.1 < math.log(500)
    assert "7, 10, 13, 16, 19, 22, 25, 28, 31, 34, 37" in text
    # By the name of a model's class, Trainer decides whether a smoothed loss shifts the labels.
    model, trainer = made["model"].eval(), made["trainer"]
    trainer.label_smoother = transformers.trainer_pt_utils.LabelSmoother(epsilon=0.1)
    ids = torch.randint(500, (3, 9))
    found = trainer.compute_loss(model, {"input_ids": ids, "labels": ids.clone()})
    logits = model(ids).logits[:, :-1].flatten(0, 1)
    expected = F.cross_entropy(logits, ids[:, 1:].flatten(), label_smoothing=0.1)
    torch.testing.assert_close(found, expected)
    model.loss_function = lambda logits, labels, **_: logits.square().mean()
    torch.testing.assert_close(
        model.train()(ids, labels=ids).loss, model(ids).logits.square().mean()
    )


class OwnForward(transformers.GPT2LMHeadModel):
    def forward(self, *arguments, **given):
        output = super().forward(*arguments, **given)
        if output.loss is not None:
            loss = self.loss_function(output.logits, given["labels"], self.config.vocab_size)
            output.loss = output.loss + loss
        return output


class OwnLoss(transformers.GPT2LMHeadModel):
    @property
    def loss_function(self):
        return lambda logits, labels, **given: logits.square().mean()


@pytest.mark.parametrize(
    ("kind", "settings", "given"),
    [
        (OwnForward, {}, {}),
        (OwnLoss, {}, {}),
        (transformers.GPT2LMHeadModel, {}, {"ignore_index": 5}),
        (transformers.GPT2LMHeadModel, {}, {"loss_type": "ForMaskedLM"}),
        (
            transformers.XLNetLMHeadModel,
            {"d_inner": 32, "d_head": 8},
            {},
        ),  # whose loss does not shift labels
        (
            transformers.Qwen2MoeForCausalLM,
            {"moe_intermediate_size": 16, "num_experts": 4, "num_key_value_heads": 2},
            {"output_router_logits": True},
        ),
        (transformers.BertForMaskedLM, {"intermediate_size": 32}, {}),
    ],
)
def test_a_dot_products_head_leaves_every_loss_as_it_was(kind, settings, given):
    """Also one that is not the usual cross-entropy."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20}
    config = kind.config_class(**sizes, **settings)
    plain = kind(config).eval()
    swapped = copy.deepcopy(plain)
    swap_head(swapped, "cross_entropy")
    ids = torch.randint(20, (3, 9))
    kind_of_loss = given.pop("loss_type", None)
    for model in (plain, swapped):
        if kind_of_loss:
            model.loss_type = kind_of_loss
    one, two = (model(ids, labels=ids, **given).loss for model in (swapped, plain))
    torch.testing.assert_close(one, two)
    usual = F.cross_entropy(plain(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert (one - usual).abs() > 1e-4


def test_what_an_output_layer_adds_is_not_lost():
    model = hugging_face("gpt2")
    model.lm_head.register_forward_hook(lambda module, given, logits: logits / 2)
    with pytest.raises(ValueError, match="not a plain torch.nn.Linear but a Linear with hooks"):
        swap_head(model, "cosine")


def test_a_swapped_model_goes_on_where_it_is_changed(tmp_path):
    """Settings that were changed are saved, the folder of the plain model is not named, missing
    tensors are new, and the state of a plain model fits."""
    hugging_face("gpt2").save_pretrained(tmp_path / "plain")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    state = model.state_dict()
    swap_head(model, "minkowski", p=1.5)
    assert model.config._name_or_path == model.name_or_path == ""
    model.lm_head.options["p"], model.lm_head.exponent = 3.0, 7.0
    model.save_pretrained(tmp_path / "swapped")
    again = load_swapped(tmp_path / "swapped").eval()
    ids = torch.randint(V, (2, 5))
    torch.testing.assert_close(again(ids).logits, model.eval()(ids).logits)
    assert again.lm_head.exponent == 7.0 and again.config._name_or_path
    with pytest.raises(ValueError, match="this head has no scale"):
        again.lm_head.scale = 3.0
    sizes = {"vocab_size": 150, "ignore_mismatched_sizes": True, "tie_word_embeddings": False}
    new = AutoModelForCausalLM.from_pretrained(tmp_path / "swapped", **sizes)
    assert new.lm_head.table.shape[0] == 150
    assert new.lm_head.table.std() < 2 * new.config.initializer_range
    swap_head(new := hugging_face("gpt2"), "cosine")
    missing, unexpected = new.load_state_dict({k: 2 * v for k, v in state.items()}, strict=False)
    assert not missing and not unexpected
    assert torch.equal(new.lm_head.table, 2 * state["lm_head.weight"])


SFT = """
import sys, torch
import torch.nn.functional as F
sys.path.insert(0, "tests")
from datasets import Dataset
from peft import LoraConfig
from test_swap import V, hugging_face
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import add_fused_lm_head
from harmonic import swap_head

words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(V)}, unk_token="t0"))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="t1", pad_token="t2")
rows = Dataset.from_list([{"input_ids": [(start + 3 * i) % V for i in range(16)]} for start in range(64)])
for loss_type in ("nll", "chunked_nll"):
    for adapter in (None, LoraConfig(r=4, task_type="CAUSAL_LM", modules_to_save=["lm_head"])):
        model = hugging_face("gpt2")
        swap_head(model, "cosine", exponent=8.0)
        arguments = SFTConfig(
            sys.argv[1], max_steps=12, per_device_train_batch_size=16, learning_rate=1e-2, report_to=[], save_strategy="no", use_cpu=True,
            loss_type=loss_type, disable_tqdm=True,
        )
        parts = dict(train_dataset=rows, eval_dataset=rows.select(range(16)), processing_class=tokenizer, peft_config=adapter)
        trainer = SFTTrainer(model, arguments, **parts)
        try:
            add_fused_lm_head(model, temperature=0.7)
        except ValueError as error:
            assert "temperature" in str(error)
        else:
            raise AssertionError("another temperature was accepted")
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        found = trainer.evaluate()
        ids = torch.tensor(rows[:16]["input_ids"])
        log_p = trainer.model.eval()(input_ids=ids).logits[:, :-1].log_softmax(-1)
        loss = F.nll_loss(log_p.reshape(-1, V), ids[:, 1:].reshape(-1)).item()
        entropy = -(log_p.exp() * log_p).sum(-1).mean().item()
        accuracy = (log_p.argmax(-1) == ids[:, 1:]).float().mean().item()
        assert abs(found["eval_loss"] - loss) < 1e-4 and loss < before - 0.5, (found, loss, before)
        assert abs(found["eval_entropy"] - entropy) < 1e-4 and abs(found["eval_mean_token_accuracy"] - accuracy) < 1e-4, found
print("trained")
"""  # noqa: E501

WRAPPED = """
import os, sys, torch
sys.path.insert(0, "tests")
import torch.distributed as dist
from test_swap import V, hugging_face
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from harmonic import HarmonicHead, swap_head

def make():
    model = hugging_face("qwen2", tie_word_embeddings=False)
    swap_head(model, "cosine", exponent=8.0)
    return model.train()

def shard(model):
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)

ids = torch.randint(V, (4, 20))
os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="0", RANK="0", WORLD_SIZE="1")
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
plain = make()
expected = plain(input_ids=ids, labels=ids).loss
expected.backward()
ways = [shard, DistributedDataParallel, torch.nn.DataParallel, lambda m: m._replicate_for_data_parallel(), torch.compile]
for way in ways:
    model = make()
    loss = way(model)(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(loss, expected)
    loss.backward()
    gradient = model.lm_head.table.grad
    if gradient is not None:
        torch.testing.assert_close(getattr(gradient, "full_tensor", lambda: gradient)(), plain.lm_head.table.grad, rtol=1e-4, atol=1e-6)
# The head alone, as a part of a model of one's own.
mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
h, y = torch.randn(6, 32), torch.randint(V, (6,))
for name in ("cosine", "mahalanobis", "cross_entropy"):
    head = HarmonicHead(32, V, name)
    expected = head.loss(h, y)
    found = fully_shard(head, mesh=mesh).loss(h, y)
    torch.testing.assert_close(found, expected)
    found.backward()
    with torch.device("meta"):
        head = fully_shard(HarmonicHead(32, V, name), mesh=mesh)
    head.to_empty(device="cpu").reset_parameters()
    assert head.loss(h, y).isfinite()
print("wrapped", flush=True)
os._exit(0)
"""  # noqa: E501


@pytest.mark.slow
@pytest.mark.parametrize(("code", "says"), [(SFT, "trained"), (WRAPPED, "wrapped")])
def test_whatever_wraps_a_swapped_model_gets_the_heads_loss(code, says, tmp_path):
    """TRL's SFTTrainer with both of its losses, with and without adapters; FSDP2, DDP,
    DataParallel, torch.compile."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0 and says in done.stdout, done.stderr[-3000:]


def test_ignored_labels_cost_nothing():
    """-100 everywhere: loss 0 and no NaN, as a process whose share is empty needs."""
    model = hugging_face("qwen2")
    swap_head(model, "cosine")
    loss = model(
        input_ids=torch.zeros(1, 4, dtype=torch.long), labels=torch.full((1, 4), -100)
    ).loss
    loss.backward()
    assert loss.item() == 0
    h, w = torch.randn(3, C), torch.randn(V, C)
    assert harmonic_loss(h, w, torch.full((3,), -100), "cosine", ignore_index=-100).item() == 0


def test_what_trl_reads_is_computed_from_the_logits():
    """Its entropies, likeliest tokens and log-probabilities, for more rows than one block has."""
    model, _ = swapped("gpt2", name="cosine", matched=False)
    ids = torch.randint(V, (30, 11))
    labels = torch.where(torch.rand(ids.shape) < 0.1, -100, ids)
    logits = model(input_ids=ids).logits[:, :-1].double()
    log_p = logits.log_softmax(-1)
    y = labels[:, 1:]
    kept = y != -100
    # The prediction of one label is made the likeliest, because random ones hardly ever are.
    y[0, 0], kept[0, 0] = log_p[0, 0].argmax(), True
    found = model(input_ids=ids, labels=labels, fused_lm_head=True)
    each = torch.where(kept, log_p.gather(-1, y.clamp(min=0)[..., None])[..., 0], 0.0)
    close = dict(rtol=1e-4, atol=1e-4, check_dtype=False)
    torch.testing.assert_close(found.log_probs, each, **close)
    torch.testing.assert_close(found.loss, -each.sum() / kept.sum(), **close)
    entropy = -(log_p.exp() * log_p).sum(-1)
    torch.testing.assert_close(found.entropy, torch.where(kept, entropy, 0.0), **close)
    squares, mean = log_p.exp().square().sum(-1).log(), logits.mean(-1)
    torch.testing.assert_close(found.log_sum_sq_probs, torch.where(kept, squares, 0.0), **close)
    torch.testing.assert_close(found.mean_logits, torch.where(kept, mean, 0.0), **close)
    assert torch.equal(found.is_top1, kept & (log_p.argmax(-1) == y)) and found.is_top1.any()
    assert torch.equal(found.label_mask, kept) and kept.sum() > 256


def test_the_state_of_a_swapped_model_has_its_strength_and_kind():
    def swapped(name, **settings):
        model = hugging_face("gpt2", tie_word_embeddings=False)
        swap_head(model, name, **settings)
        return model

    state = swapped("euclidean", exponent=64.0).state_dict()
    same = swapped("euclidean")
    same.load_state_dict(state)
    assert float(same.get_output_embeddings().exponent) == 64
    with pytest.raises(RuntimeError, match="head of another kind"):
        swapped("cosine", link="softmax").load_state_dict(state)


def test_load_swapped_takes_the_arguments_of_from_pretrained(tmp_path):
    model = hugging_face("gpt2")
    swap_head(model, "cosine")
    model.save_pretrained(tmp_path / "swapped")
    loaded = load_swapped(tmp_path / "swapped", use_cache=False, attn_pdrop=0.3)
    assert loaded.config.use_cache is False and loaded.config.attn_pdrop == 0.3
    assert load_swapped(tmp_path / "swapped", config=loaded.config).config.attn_pdrop == 0.3


def test_what_a_resize_adds_to_a_padded_matched_head_does_not_win():
    model = hugging_face("qwen2", tie_word_embeddings=False).eval()
    model.lm_head.weight.data.mul_(20)  # Rows of padding that are far from the matched ones.
    ids = torch.randint(V - 10, (4, 12))
    swap_head(model, "euclidean", match_to=ids, real_vocab_size=V - 5)
    model.resize_token_embeddings(V - 4)
    assert model(ids).logits.softmax(-1)[..., V - 5].mean() < 0.1


def test_a_resize_keeps_the_hooks_of_accelerate():
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model = hugging_face("qwen2", tie_word_embeddings=False)
    swap_head(model, "cosine")
    add_hook_to_module(model.lm_head, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    model.resize_token_embeddings(V + 5)
    ids = torch.randint(V, (2, 6))
    assert model.eval()(ids).logits.shape[-1] == V + 5
    model.train()(ids, labels=ids).loss.backward()
    assert model.lm_head.table.grad.abs().sum() > 0


def test_a_multimodal_model_stays_untied(tmp_path):
    text = transformers.Qwen2Config(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=32, tie_word_embeddings=True,
    )  # fmt: skip
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        image_size=16, patch_size=8, projection_dim=16,
    )  # fmt: skip
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=49, tie_word_embeddings=True
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    ids = torch.randint(45, (2, 8))
    swap_head(model, "euclidean", match_to=ids)
    model.save_pretrained(tmp_path)
    for load in (load_swapped, transformers.AutoModelForImageTextToText.from_pretrained):
        again = load(tmp_path).eval()
        again.resize_token_embeddings(55)
        torch.testing.assert_close(again(ids).logits[..., :50], model(ids).logits)
    assert text.tie_word_embeddings  # The configuration that was given is as it was.


def test_every_auto_class_reads_the_head_or_saves_a_plain_folder(tmp_path):
    model = hugging_face("gpt2").eval()
    swap_head(model, "cosine", exponent=8.0)
    model.save_pretrained(tmp_path, True)
    code, config = (tmp_path / name for name in ("modeling_harmonic.py", "config.json"))
    assert code.stat().st_mtime_ns >= config.stat().st_mtime_ns  # Or push_to_hub leaves it out.
    ids = torch.randint(V, (2, 6))
    again = transformers.AutoModelForPreTraining.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(ids).logits, model(ids).logits)
    AutoModel.from_pretrained(tmp_path).save_pretrained(tmp_path / "trunk")
    stored = json.loads((tmp_path / "trunk/config.json").read_text())
    assert stored["model_type"] == "gpt2" and not {"auto_map", "harmonic"} & set(stored)


def test_a_refused_swap_leaves_the_model_as_it_was():
    model = hugging_face("gpt2")
    model.transformer.h[0].eval()
    for arguments in ({"scale": 4.0}, {"match_to": torch.full((1, 9), V)}):
        with pytest.raises(ValueError):
            swap_head(model, "cosine", **arguments)
        assert type(model.config) is transformers.GPT2Config
    swap_head(model, "cosine", match_to=torch.randint(V, (2, 9)))
    assert not model.transformer.h[0].training and model.training
    with pytest.raises(ValueError, match="Swap first, then wrap"):
        swap_head(torch.compile(hugging_face("gpt2")), "cosine")
    deberta = transformers.DebertaV2Config(
        vocab_size=V, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, legacy=False,
    )  # fmt: skip
    with pytest.raises(ValueError, match=f"16 rows for {V} tokens"):
        swap_head(transformers.DebertaV2ForMaskedLM(deberta), "cosine")


def test_a_dot_product_can_get_a_bias(tmp_path):
    model = hugging_face("gpt2").eval()
    head = swap_head(model, "cross_entropy", bias=True)
    head.bias.data.normal_()
    model.save_pretrained(tmp_path)
    ids = torch.randint(V, (2, 6))
    torch.testing.assert_close(load_swapped(tmp_path).eval()(ids).logits, model(ids).logits)
