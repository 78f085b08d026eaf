"""The decoder: causality by gradient, the cache, masks, padding, initialisation, compilation."""

import importlib.util
import math
import re

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

import model as model_module
from base.command_line import parse
from harmonic import IGNORE_INDEX
from model import (
    ARCHITECTURES,
    KVCache,
    Model,
    ModelConfig,
    causal_attention,
    document_block_mask,
    uses_flex_attention,
)
from training.config import TrainConfig
from training.optimizers import make_optimizer

SIZES = dict(n_layer=2, n_head=4, n_embd=32, block_size=12, vocab_size=128, real_vocab_size=101)
ARCHS = {
    "gpt": dict(arch="gpt"),
    "bert": dict(arch="bert"),
    "qwen": dict(arch="qwen", n_kv_head=2),
    "qwen3": dict(arch="qwen", n_kv_head=1, qk_norm=True),
    "gpt-untied-no-bias": dict(arch="gpt", tie_weights=False, bias=False),
}
CAUSAL = [a for a, settings in ARCHS.items() if ARCHITECTURES[settings["arch"]].causal]


def build(arch, seed=0, **kw):
    torch.manual_seed(seed)
    return Model(ModelConfig(**{**SIZES, "head": "cosine", **ARCHS[arch], **kw}))


def ids(*shape, seed=0):
    return torch.randint(101, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("arch", ARCHS)
def test_a_position_depends_on_what_it_may_see(arch):
    """By gradient: the logits of position t move with every token up to t and, in a causal model,
    with none after it."""
    model = build(arch).eval()
    x = ids(1, 12)
    embedded = []
    model.tokens.register_forward_hook(
        lambda _, __, out: embedded.append(out.requires_grad_()) or out
    )
    logits, _ = model(x)
    for t in (0, 5, 11):
        (gradient,) = torch.autograd.grad(
            logits[0, t, :101].square().sum(), embedded[0], retain_graph=True
        )
        moved = gradient[0].abs().amax(-1) > 0
        expected = torch.arange(12) <= (t if arch in CAUSAL else 12)
        assert torch.equal(moved, expected)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("head", ["cross_entropy", "manhattan"])
def test_loss_equals_cross_entropy_of_logits(arch, head):
    model = build(arch, head=head).eval()
    x, y = ids(3, 12), ids(3, 12, seed=1)
    y[0, :5] = IGNORE_INDEX
    logits, none = model(x)
    assert none is None and logits.shape == (3, 12, 101)
    torch.testing.assert_close(model(x, y)[1], F.cross_entropy(logits.view(-1, 101), y.view(-1)))
    torch.testing.assert_close(
        model(x, y, reduction="sum")[1],
        F.cross_entropy(logits.view(-1, 101), y.view(-1), reduction="sum"),
    )


@pytest.mark.parametrize("arch, head", [("gpt", "cosine"), ("bert", "cross_entropy")])
def test_label_smoothing_is_training_alone(arch, head):
    plain, smooth = (build(arch, head=head, label_smoothing=e) for e in (0.0, 0.1))
    smooth.load_state_dict(plain.state_dict())
    idx, targets = ids(2, 8), ids(2, 8, seed=1)
    targets[0, :5] = IGNORE_INDEX
    assert smooth.train()(idx, targets)[1].item() != plain.train()(idx, targets)[1].item()
    log_p = plain(idx)[0][targets != IGNORE_INDEX][:, :101].log_softmax(-1)
    expected = 0.9 * F.nll_loss(log_p, targets[targets != IGNORE_INDEX]) - 0.1 * log_p.mean()
    torch.testing.assert_close(smooth(idx, targets)[1], expected)
    assert smooth.eval()(idx, targets)[1].item() == plain.eval()(idx, targets)[1].item()


def test_bert_computes_its_head_at_masked_positions_only():
    model = build("bert").train()
    y = torch.full((3, 12), IGNORE_INDEX)
    y[0, 3], y[2, 7] = 5, 6
    seen = []
    model.transform.register_forward_hook(lambda _, arguments, __: seen.append(arguments[0].shape))
    model(ids(3, 12), y)
    assert seen == [(2, 32)]


@pytest.mark.parametrize("arch", CAUSAL)
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_cache_gives_the_same_text(arch, temperature):
    """Prompts of different lengths, well beyond block_size, where the context slides."""
    model = build(arch, head="euclidean", head_init_std=0.3).eval()
    prompts = [[1, 2, 3], [7], list(range(20))]
    arguments = dict(max_new_tokens=40, temperature=temperature, top_k=50)
    cached = list(model.generate(prompts, **arguments))
    assert cached == list(model.generate(prompts, **arguments, cache=False))
    assert len({tuple(r) for r in zip(*cached, strict=True)}) == 3
    for r, prompt in enumerate(prompts):  # a row does not depend on its neighbours
        alone = list(model.generate([prompt], **arguments, seed=r))
        assert [t[0] for t in alone] == [t[r] for t in cached]


def test_cached_logits_equal_full_logits():
    for arch in CAUSAL:
        model = build(arch).eval()
        x = ids(2, 12)
        cache = KVCache(model.config, 2, "cpu", torch.float32)
        parts = x.split([5, 3, 1, 1, 2], 1)  # Several tokens after others, too.
        steps = [model.hidden(part, cache=cache) for part in parts]
        torch.testing.assert_close(torch.cat(steps, 1), model.hidden(x), rtol=1e-4, atol=1e-5)


def test_sampling_respects_top_k_top_p_and_padding():
    from model import Sampler

    def pick(logits, temperature, top_k, top_p, generators):
        return Sampler(temperature, top_k, top_p).pick(logits, generators)

    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -math.inf]]).repeat(2000, 1)
    generators = [torch.Generator().manual_seed(i) for i in range(2000)]
    drawn = pick(logits, 1.0, None, None, generators)
    frequency = torch.bincount(drawn, minlength=5) / 2000
    assert (frequency - logits[0].softmax(-1)).abs().max() < 0.04 and frequency[4] == 0
    assert set(pick(logits, 1.0, 2, None, generators).tolist()) == {0, 1}
    # float32 cannot divide by the second, and 0 / 0 would draw any token.
    assert set(pick(logits.flip(-1), 1e-50, None, None, generators).tolist()) == {4}
    # 0.64 alone does not reach 0.7.
    assert set(pick(logits, 1.0, None, 0.7, generators).tolist()) == {0, 1}
    assert set(pick(logits, 1.0, None, 0.6, generators).tolist()) == {0}
    assert set(pick(logits, 0, None, None, generators).tolist()) == {0}
    # The second token has 0.37 of the first one's probability.
    for least, kept in ((0.36, {0, 1}), (0.38, {0}), (1.0, {0})):
        assert set(Sampler(min_p=least).pick(logits, generators).tolist()) == kept
    equal = torch.zeros(500, 7)
    assert len(set(pick(equal, 1.0, 3, None, generators[:500]).tolist())) == 3
    model = build("gpt").eval()
    tokens = {t for row in model.generate([[1]] * 8, 30, temperature=5.0) for t in row}
    assert max(tokens) < 101


@pytest.mark.parametrize("arch", ARCHS)
def test_doc_mask_shows_each_document_as_if_alone(arch):
    model = build(arch, doc_mask=True, eot_id=0).eval()
    documents = [
        torch.cat((torch.zeros(1, dtype=torch.long), 1 + ids(1, n, seed=n)[0] % 99))
        for n in (3, 0, 4)
    ]
    rest = 1 + ids(1, 2, seed=3)[0] % 99  # the end of a document that began in the window before
    together = model.trunk(torch.cat((rest, *documents))[None])[0]
    alone = [model.trunk(d[None])[0] for d in (rest, *documents)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)
    model.config.doc_mask = False
    assert (model.trunk(torch.cat((rest, *documents))[None])[0] - together).abs().max() > 1e-3


def choose_flex_attention(monkeypatch, chosen: bool):
    """Whatever the device. On a CPU FlexAttention runs uncompiled and without gradients."""
    monkeypatch.setattr(model_module, "uses_flex_attention", lambda config, idx, training: chosen)


@pytest.mark.filterwarnings(
    "ignore:flex_attention called without torch.compile",
    "ignore:Mismatch dtype between input and weight",
)
@pytest.mark.parametrize("arch", ["gpt", "bert", "qwen", "qwen3"])
@torch.no_grad()
def test_flex_attention_gives_what_the_dense_mask_gives(arch, monkeypatch):
    """Three blocks, the last of them not full; documents that end inside a block, at its end, and
    nowhere. Also under autocast."""
    model = build(arch, doc_mask=True, eot_id=0, block_size=300, n_embd=64)
    x = 1 + ids(3, 300) % 99
    for row, begins in enumerate(([0, 5, 6, 128, 290], [299], [])):
        x[row, begins] = 0
    positions, mask = model.documents(x)
    expected = model.trunk(x)
    choose_flex_attention(monkeypatch, True)
    block_positions, block_mask = model.documents(x)
    assert isinstance(mask, torch.Tensor) and isinstance(block_mask, BlockMask)
    assert torch.equal(positions, block_positions)
    torch.testing.assert_close(model.trunk(x), expected, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model.trunk(x).float(), expected, rtol=0, atol=0.1)


@pytest.mark.parametrize("causal", [True, False])
def test_document_block_mask_is_the_one_that_torch_finds(causal):
    """torch looks at every pair of tokens."""
    for T, rate in ((128, 0.0), (129, 0.01), (500, 0.003), (500, 0.02), (512, 0.5)):
        number = (torch.rand(3, T, generator=torch.Generator().manual_seed(T)) < rate).cumsum(1)
        found = document_block_mask(number, causal)
        expected = create_block_mask(found.mask_mod, 3, 1, T, T, device="cpu")
        assert found.shape == expected.shape
        for name in (
            "kv_num_blocks",
            "kv_indices",
            "full_kv_num_blocks",
            "full_kv_indices",
            "q_num_blocks",
            "q_indices",
        ):
            assert torch.equal(getattr(found, name), getattr(expected, name)), (T, rate, name)


def test_flex_attention_is_chosen_where_it_has_a_kernel():
    class OnCuda:
        is_cuda, shape = True, (2, 300)

    config = ModelConfig(**SIZES | dict(n_embd=256))
    assert not uses_flex_attention(config, ids(2, 300), training=True)  # on a CPU
    if importlib.util.find_spec("triton") is None:
        pytest.skip("no Triton")
    assert uses_flex_attention(config, OnCuda, training=True)
    config.dropout = 0.1
    assert not uses_flex_attention(config, OnCuda, training=True)
    assert uses_flex_attention(config, OnCuda, training=False)
    config.n_embd = 32  # 8 a head
    assert not uses_flex_attention(config, OnCuda, training=False)


@torch.no_grad()
def test_blocks_under_flex_attention_compile_once(monkeypatch):
    """Documents begin elsewhere in each batch: no reason to compile again."""
    choose_flex_attention(monkeypatch, True)
    torch.compiler.reset()
    model = build("qwen", doc_mask=True, eot_id=0, block_size=130, n_embd=64)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    model.compile_blocks(backend=backend)
    for seed in range(3):
        model.trunk(ids(2, 130, seed=seed))
    assert len(graphs) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("arch", ["gpt", "bert", "qwen", "qwen3"])
def test_flex_attention_on_a_gpu_gives_loss_and_gradients_of_the_dense_mask(
    arch, compiled, monkeypatch
):
    x, y = ids(3, 300).cuda(), ids(3, 300, seed=1).cuda()  # about three documents begin in a row
    results = []
    for chosen in (False, True):
        choose_flex_attention(monkeypatch, chosen)
        torch.compiler.reset()
        # 24 a head.
        model = build(
            arch, doc_mask=True, eot_id=0, block_size=300, n_embd=96, head_impl="dense"
        ).cuda()
        for block in model.blocks if compiled else ():
            block.compile(fullgraph=True)
        _, loss = model(x, y)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for dense, flex in zip(*results, strict=True):
        assert (flex - dense).norm() <= 1e-2 * dense.norm()  # products may be TF32


def test_doc_mask_in_generation():
    """Where a document begins inside a text, nothing in front of it matters; with the cache and
    without."""
    model = build("gpt", doc_mask=True, eot_id=0).eval()
    with torch.no_grad():
        model.head.weight[0] *= 3  # documents end often
    prompts = [[5, 6, 7, 0, 8], [9, 0, 8], [0, 8], [5, 5]]
    tokens = [list(row) for row in zip(*model.generate(prompts, 40, temperature=3.0), strict=True)]
    assert tokens == [
        list(row)
        for row in zip(*model.generate(prompts, 40, temperature=3.0, cache=False), strict=True)
    ]
    assert any(0 in row for row in tokens)
    greedy = list(zip(*model.generate(prompts, 5, temperature=0), strict=True))
    assert (
        greedy[0]
        == greedy[1]
        == greedy[2]
        == next(zip(*model.generate([[0, 8]], 5, temperature=0), strict=True))
    )


@pytest.mark.parametrize("arch", ARCHS)
def test_activation_checkpointing_changes_nothing(arch):
    model = build(arch, dropout=0.3)
    x, y = ids(2, 12), ids(2, 12, seed=1)
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(3)
        model(x, y, recompute=recompute)[1].backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
        model.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_flops_of_a_bert_count_the_head_where_it_is_used():
    model = build("bert")
    head = sum(p.numel() for m in (model.head, model.transform) for p in m.parameters())
    assert model.flops_per_token() - model.flops_per_token(0.15) == pytest.approx(6 * 0.85 * head)


@pytest.mark.parametrize("arch", ARCHS)
def test_trunk_compiles_whole(arch):
    model = build(arch)
    expected = model.trunk(ids(2, 12))
    found = torch.compile(model.trunk, fullgraph=True, backend="aot_eager")(ids(2, 12))
    torch.testing.assert_close(found, expected)


@pytest.mark.slow
def test_inductor_compiles_the_blocks_on_this_machine():
    model = build("qwen")
    x, y = ids(2, 12), ids(2, 12, seed=1)
    _, eager = model(x, y)
    eager.backward()
    expected = model.head.weight.grad.clone()
    model.zero_grad()
    model.compile_blocks()
    _, compiled = model(x, y)
    compiled.backward()
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(model.head.weight.grad, expected, rtol=1e-3, atol=1e-5)
    # Names as in the uncompiled model.
    assert set(model.state_dict()) == set(build("qwen").state_dict())


def test_attention_written_out_is_no_less_exact():
    """Odd sizes, bfloat16, values and gradients, against float64: no further off than attention as
    one writes it in bfloat16."""
    torch.manual_seed(0)
    inputs = [torch.randn(2, 3, 77, 10, dtype=torch.bfloat16).requires_grad_() for _ in range(3)]
    weight = torch.randn(2, 3, 77, 10)
    later = torch.ones(77, 77, dtype=torch.bool).triu(1)

    def naive(q, k, v):
        return ((q @ k.mT) * 10**-0.5).masked_fill(later, -math.inf).softmax(-1) @ v

    def results(f, dtype):
        y = f(*(x.to(dtype) for x in inputs))
        return [y, *torch.autograd.grad((y * weight).sum(), inputs)]

    exact = results(naive, torch.float64)
    for a, b, c in zip(
        results(causal_attention, torch.bfloat16),
        results(naive, torch.bfloat16),
        exact,
        strict=True,
    ):
        assert (a - c).abs().mean() <= 1.05 * (b - c).abs().mean() < 0.01
    torch.testing.assert_close(
        causal_attention(*(x.double() for x in inputs)), exact[0], rtol=1e-6, atol=1e-6
    )


def test_bfloat16_on_a_cpu_compiles_the_attention_written_out():
    """It is in the graph that a compiler gets, instead of PyTorch's own kernel."""
    model, x, y = build("gpt"), ids(2, 12), ids(2, 12, seed=1)
    found = []

    def backend(graph, inputs):
        found.append(" ".join(str(node.target) for node in graph.graph.nodes))
        return graph

    torch.compiler.reset()
    with torch.autocast("cpu", torch.bfloat16):
        eager = model(x, y)[1].item()
        model.compile_blocks(backend=backend)
        assert model(x, y)[1].item() == pytest.approx(eager, abs=0.01)
    assert "softmax" in found[0] and "scaled_dot_product" not in found[0]


@pytest.mark.slow
def test_inductor_compiles_bfloat16_on_a_cpu():
    model, x, y = build("gpt"), ids(2, 12), ids(2, 12, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        eager = model(x, y)[1].item()
        model.compile_blocks()
        assert model(x, y)[1].item() == pytest.approx(eager, abs=0.01)


def test_initialisation_is_as_documented():
    model = build(
        "gpt",
        n_embd=128,
        n_layer=3,
        vocab_size=1024,
        real_vocab_size=1024,
        head_init_std=0.05,
        tie_weights=False,
    )
    assert model.head.weight.std().item() == pytest.approx(0.05, rel=0.05)
    assert model.tokens.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.blocks[0].attention.qkv.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.blocks[0].mlp.down.weight.std().item() == pytest.approx(
        0.02 / math.sqrt(6), rel=0.05
    )
    assert model.blocks[0].mlp.up.bias.abs().max() == 0
    tied = build("gpt")
    assert tied.tokens.weight is tied.head.weight


def test_sizes_of_the_published_models():
    """Parameter counts: GPT-2 124M (124,439,808), BERT base with its decoder (109,514,298), Qwen2
    0.5B (494,032,768)."""
    published = {
        124_439_808: dict(arch="gpt", vocab_size=50257),
        109_514_298: dict(arch="bert", block_size=512, vocab_size=30522),
        494_032_768: dict(
            arch="qwen",
            n_layer=24,
            n_head=14,
            n_kv_head=2,
            n_embd=896,
            intermediate_size=4864,
            vocab_size=151936,
            block_size=1024,
        ),
    }
    for count, settings in published.items():
        with torch.device("meta"):
            assert Model(ModelConfig(**settings)).parameter_count() == count


def test_every_parameter_is_in_one_group_and_prototypes_have_their_own():
    for kw in (
        dict(head="mahalanobis"),
        dict(head="cosine", learn_exponent=True),
        dict(head="cross_entropy", tie_weights=False),
    ):
        model = build("gpt", **kw)
        groups = make_optimizer(model, TrainConfig(prototype_decay=0.0), "cpu").param_groups
        listed = [id(p) for g in groups for p in g["params"]]
        assert sorted(listed) == sorted(id(p) for p in model.parameters())
        decay = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
        assert (
            decay[id(model.head.weight)] == 0.0 and decay[id(model.blocks[0].mlp.up.weight)] == 0.1
        )
        assert all(
            decay[id(p)] == 0
            for n, p in model.named_parameters()
            if p.dim() < 2 or n.startswith("head.")
        )


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(n_embd=30), "n_embd=30 is not divisible by n_head=4"),
        (dict(n_kv_head=3), "n_head=4 is not divisible by n_kv_head=3"),
        (dict(n_layer=0), "n_layer=0 must be at least 1"),
        (dict(dropout=1.0), "dropout=1.0"),
        (dict(head="manhattan", head_p=2.0), "head_p=2 does nothing with head=manhattan"),
        (dict(head="minkowski", head_p=-1.0), "p must be positive"),
        (dict(head="mine"), "head=mine: unknown distance 'mine'"),
        (dict(head="cross_entropy", exponent=2.0), "exponent=2.0 does nothing"),
        (dict(head="cosine", scale=2.0), "scale=2.0 is for the softmax link"),
        (dict(head="cosine", learn_scale=True), "set learn_exponent"),
        (dict(qk_norm=True), "qk_norm=true is for arch=qwen"),
        (dict(arch="qwen", n_embd=12), "even head width"),
    ],
)
def test_impossible_models_are_named(settings, words):
    assert any(words in p for p in ModelConfig(**{**SIZES, **settings}).problems())


def test_an_architecture_is_added_as_the_docs_say(tmp_path, monkeypatch):
    """The blocks of docs/add_an_architecture.md, put into model.py, make a model that trains and
    generates."""
    page = (ROOT / "docs/add_an_architecture.md").read_text()
    entry, field, use, forward = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    source = (ROOT / "model.py").read_text()
    block = "        self.norm_after = config.architecture.norm_after\n"
    for before, added in (
        ("ARCHITECTURES = {\n", entry),
        ("    scaled_residual: bool = False\n", field),
        (block, use),
        ("        if self.norm_after:\n            x = self.norm1(x +", forward),
    ):
        assert source.count(before) == 1
        whole = added + before if added is forward else before + added
        source = source.replace(before, whole)
    (tmp_path / "changed_model.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    changed = importlib.import_module("changed_model")

    flags = [f"--{key}={value}" for key, value in SIZES.items()]
    (config,) = parse(["--arch=neox", "--head=cosine", *flags], changed.ModelConfig)
    torch.manual_seed(0)
    model = changed.Model(config)
    x = ids(4, 13)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(10):
        loss = model(x[:, :-1], x[:, 1:])[1]
        losses.append(loss.item())
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.5
    cached, whole = (list(model.generate([[1, 2]], 20, cache=cache)) for cache in (True, False))
    assert cached == whole and len(cached) == 20
