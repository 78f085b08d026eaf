"""harmonic.swap: a head matched to a softmax predicts nearly the same; transformers' models take a head and train with it."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from harmonic import DISTANCES, HarmonicHead, harmonic_loss, load_swapped, match, swap_head
from harmonic.match import _fit_strength

ROOT = Path(__file__).resolve().parent.parent
V, C, N = 307, 45, 400  # odd on purpose


def source(bias=False, seed=0):
    """States that are no pure LayerNorm output, an unembedding with a mean and rows of different norms."""
    g = torch.Generator().manual_seed(seed)
    r = lambda *shape: torch.randn(*shape, generator=g)
    h = F.layer_norm(r(N, C), (C,)) * (1 + 0.1 * r(C)) + 0.3 * r(C)
    w = 0.2 * r(V, C) * (1 + 0.3 * r(V, 1)) + 0.1 * r(C)
    return h, w, 0.5 * r(V) if bias else None


def kl(h, w, bias, head) -> float:
    p = (h.double() @ w.double().T + (0 if bias is None else bias.double())).log_softmax(-1)
    q = head(h).double()[:, : len(w)].log_softmax(-1)
    return F.kl_div(q, p, log_target=True, reduction="batchmean").item()


@pytest.mark.parametrize("link", ["harmonic", "softmax"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", ["euclidean", "euclidean_squared", "mahalanobis", "mahalanobis_cholesky", "cosine"])
def test_the_closed_form_comes_near(name, link, bias):
    """One of 45 directions is given up, and cosine cannot follow states whose norms differ: a few hundredths of a nat here; without
    matching it is nats."""
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
        assert head.strength() == n  # it was given
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
    near = name in ("manhattan", "minkowski", "hamming_soft", "hamming_gumbel")  # others see little of a dot product
    assert found < min(kl(h, w, None, before), (math.log(V) - uniform) * (0.4 if near else 0.99))
    factor = (head.weight[0] / w[0]).mean().item()
    torch.testing.assert_close(head.weight, factor * w)
    for size in (0.3, 0.7, 1.5, 4):
        other = HarmonicHead(C, V, name).eval()
        other.weight.data.copy_(size * head.weight)
        assert _fit_strength(other, h, (h @ w.T).softmax(-1)) > 0.98 * found - 1e-3
    for change in (0.8, 1.25):
        other = HarmonicHead(C, V, name, exponent=head.strength() * change).eval()
        other.weight.data.copy_(head.weight)
        assert kl(h, w, None, other) > 0.999 * kl(h, w, None, head)


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


def hugging_face(kind: str, **kw):
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForMaskedLM

    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=V, pad_token_id=None, initializer_range=0.2)
    sizes |= {} if kind == "gpt2" else {"intermediate_size": 40}
    sizes |= {"num_key_value_heads": 2} if kind.startswith("qwen") else {}
    config = CONFIG_MAPPING[kind](**sizes, **kw)
    return (AutoModelForMaskedLM if kind == "bert" else AutoModelForCausalLM).from_config(config)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["gpt2", "bert", "qwen2", "qwen3"])
def test_swapped_models_give_the_heads_logits_loss_and_gradients(kind, tied):
    model = hugging_face(kind, tie_word_embeddings=tied)
    head = swap_head(model, "manhattan", exponent=20.0)
    assert (head.table is model.get_input_embeddings().weight) == tied and model.get_output_embeddings() is head
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
        m.p = 0.0 if hasattr(m, "p") else None  # no dropout
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
    assert head.table is not model.get_input_embeddings().weight and not model.config.tie_word_embeddings
    assert model.config.harmonic["name"] == "euclidean" and model.config.harmonic["exponent"] == float(head.strength())
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
    with pytest.raises(ValueError, match="does more with logits than its unembedding: final_logit_softcapping"):
        swap_head(model, "cosine")


def test_tokens_can_be_added_after_a_swap():
    model = hugging_face("gpt2")
    swap_head(model, "cosine")
    model.resize_token_embeddings(V + 3)
    ids = torch.tensor([[V + 2, 1, V + 1]])
    out = model.eval()(input_ids=ids, labels=ids)
    assert out.logits.shape[-1] == V + 3 and out.logits.isfinite().all() and out.loss.isfinite()


def test_a_matched_head_of_a_bfloat16_model_stays_exact():
    """Its prototypes are large and differ little: in bfloat16 they would lose what they say."""
    model = hugging_face("qwen2").eval()
    ids = torch.randint(V, (8, 40))
    half = hugging_face("qwen2").eval().bfloat16()
    with torch.no_grad():
        before = half(input_ids=ids).logits.float().log_softmax(-1)
        swap_head(half, "euclidean", match_to=ids)
        after = half(input_ids=ids).logits.log_softmax(-1)
        off = F.kl_div(after, before, log_target=True, reduction="sum").item() / ids.numel()
        swap_head(model, "euclidean", match_to=ids)
    assert half.lm_head.table.dtype == torch.float32 and off < 0.02


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
@pytest.mark.parametrize("matched", [True, False])
def test_a_swapped_model_is_saved_and_loaded(kind, matched, tmp_path):
    model, ids = hugging_face(kind).eval(), torch.randint(V, (4, 20))
    swap_head(model, "minkowski", p=2.0, match_to=ids if matched else None)
    model.save_pretrained(tmp_path / "model")
    again = load_swapped(tmp_path / "model").eval()
    torch.testing.assert_close(again(input_ids=ids).logits, model(input_ids=ids).logits, rtol=0, atol=0)
    half = load_swapped(tmp_path / "model", dtype=torch.bfloat16)
    weight = half.get_output_embeddings().table
    assert weight.dtype == (torch.float32 if matched else torch.bfloat16)
    hugging_face(kind).save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="holds no swapped head"):
        load_swapped(tmp_path / "plain")


def test_a_head_can_be_swapped_again_but_not_matched():
    model = hugging_face("qwen2").eval()
    swap_head(model, "cosine")
    swap_head(model, "euclidean", exponent=3.0)
    ids = torch.randint(V, (2, 9))
    out = model(input_ids=ids, labels=ids)
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits[:, :-1].reshape(-1, V), ids[:, 1:].reshape(-1)))
    with pytest.raises(ValueError, match="is euclidean already"):
        swap_head(model, "cosine", match_to=ids)


def test_a_model_without_an_unembedding_is_refused():
    from transformers import BertConfig, BertModel

    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=20)
    with pytest.raises(ValueError, match="BertModel is not a causal or masked language model"):
        swap_head(BertModel(BertConfig(**sizes)), "cosine")


TRAINER = """
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Trainer, TrainingArguments
from harmonic import swap_head

torch.manual_seed(0)
sizes = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=128)
model = Qwen2ForCausalLM(Qwen2Config(vocab_size=500, **sizes))
swap_head(model, "cosine", exponent=8.0)

starts = torch.randint(500, (256, 1))  # texts that count in threes
rows = [{"input_ids": x, "labels": x} for x in (starts + 3 * torch.arange(32)) % 500]
arguments = TrainingArguments(
    "out/trainer", max_steps=60, per_device_train_batch_size=16, learning_rate=3e-3, report_to=[], save_strategy="no", use_cpu=True
)
trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:32])
trainer.train()
print(trainer.evaluate()["eval_loss"])  # nats a token: a few hundredths, from log 500 = 6.2
print(model.eval().generate(torch.tensor([[7, 10, 13]]), max_new_tokens=8, do_sample=False))
"""


def test_trainer_trains_the_example_of_the_readme(tmp_path):
    assert TRAINER.strip() in (ROOT / "README.md").read_text()
    command = [sys.executable, "-c", TRAINER]
    env = {**__import__("os").environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    loss, text = [line for line in done.stdout.splitlines() if not line.startswith("{")][-2:]
    assert float(loss) < 0.1 < math.log(500)
    assert "7, 10, 13, 16, 19, 22, 25, 28, 31, 34, 37" in text


@pytest.mark.slow
def test_the_package_installs_alone(tmp_path):
    """pip install ./harmonic, and nothing of this repository on the path."""
    copy = tmp_path / "source"
    subprocess.run(["cp", "-r", ROOT / "harmonic", copy], check=True)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", tmp_path / "site", copy]
    done = subprocess.run(pip, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    code = (
        "import torch, harmonic; print(harmonic.__file__);"
        "head = harmonic.HarmonicHead(6, 9, 'canberra'); print(head.loss(torch.randn(5, 6), torch.arange(5)).item())"
    )
    env = {**__import__("os").environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    where, loss = done.stdout.split()
    assert where.startswith(str(tmp_path / "site")) and math.isfinite(float(loss))


def test_ignored_labels_cost_nothing():
    """-100 everywhere: loss 0 and no NaN, as a process whose share is empty needs."""
    model = hugging_face("qwen2")
    swap_head(model, "cosine")
    loss = model(input_ids=torch.zeros(1, 4, dtype=torch.long), labels=torch.full((1, 4), -100)).loss
    loss.backward()
    assert loss.item() == 0
    h, w = torch.randn(3, C), torch.randn(V, C)
    assert harmonic_loss(h, w, torch.full((3,), -100), "cosine", ignore_index=-100).item() == 0
