"""What makes sampling fast changes nothing; sample.py's prompts from a file and JSON."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from test_model import build
from test_sample import runs, sample  # noqa: F401

from harmonic import HEADS, HarmonicHead
from harmonic.prepared import fingerprint
from model import ModelConfig, Sampler, Texts
from sample import Explainer, ShownTexts, write, write_json


@pytest.mark.parametrize("name", HEADS)
def test_a_prepared_head_gives_the_same_logits(name):
    torch.manual_seed(0)
    head = HarmonicHead(48, 257, name, real_vocab_size=250).eval()
    h = torch.randn(2, 3, 48)
    # A state on a prototype: its pair is computed from the difference.
    h[0, 0] = head.weight[5].detach()
    assert torch.equal(head.prepared()(h), head(h))
    double, states = head.double(), h.double()
    torch.testing.assert_close(double.prepared()(states), double(states))
    for wrong, message in (
        (h[..., 1:], "differ in their last"),
        (h.int(), "floating-point"),
        (h.to("meta"), "is on meta"),
    ):
        with pytest.raises(ValueError, match=message):
            head.prepared()(wrong)


def load(head):
    head.load_state_dict({name: value.flip(0) for name, value in head.state_dict().items()})


def replace(head):
    other = HarmonicHead.from_config(head.config())
    head.load_state_dict(other.state_dict(), assign=True)


def step(head, fused=False):
    for parameter in head.parameters():
        parameter.grad = torch.randn_like(parameter)
    torch.optim.SGD(head.parameters(), lr=0.1, fused=fused).step()


@torch.no_grad()
def one_row(head):
    head.weight[7] += 1


@torch.no_grad()
def whole_table_without_counting(head):
    head.weight.data += 0.1


CHANGES = {
    "load_state_dict": load,
    "other tensors": replace,
    "an optimiser's step": step,
    "a step that PyTorch does not count": lambda head: step(head, fused=True),
    "one row": one_row,
    "a table through .data": whole_table_without_counting,
    "the strength": lambda head: head.set_strength(3.0),
    "float64": lambda head: head.double(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("learnt", [False, True])
def test_a_prepared_head_follows_its_weights(change, learnt):
    torch.manual_seed(0)
    name = "mahalanobis_diagonal" if learnt else "cosine"
    head = HarmonicHead(48, 250, name, learn_exponent=learnt).eval()
    h, score = torch.randn(3, 48), head.prepared()
    before = score(h)
    CHANGES[change](head)
    after = score(h)
    assert torch.equal(after, head(h).detach().to(after))
    assert change == "float64" or not torch.equal(after, before)


def test_the_fingerprint_of_tensors(monkeypatch):
    """NaN equals itself, and every place of a small or transposed tensor counts. NumPy, which the
    package does not require, is not used."""
    monkeypatch.setattr(torch.Tensor, "numpy", None)
    small = [torch.tensor(3.0), torch.tensor([torch.nan, 1.0]), torch.zeros(0)]
    assert fingerprint(small) == fingerprint(small)
    table = torch.randn(4, 3)
    for view in (table, table.T):
        before = fingerprint([view])
        table.data[2, 1] += 1
        assert fingerprint([view]) != before


def test_a_text_of_weights_that_change_ends():
    model = build("gpt").eval()
    steps = model.generate([[1, 2]], 5)
    next(steps)
    with torch.no_grad():
        model.final_norm.weight.mul_(1)
    with pytest.raises(RuntimeError, match="have changed"):
        next(steps)


def test_rows_with_one_prompt_compute_it_once():
    model = build("gpt").eval()
    shapes = []
    model.tokens.register_forward_hook(lambda _, ids, __: shapes.append(tuple(ids[0].shape)))
    prompts = [[1, 2, 3], [4], [1, 2, 3]]
    together = list(model.generate(prompts, 5, seed=2))
    assert shapes == [(2, 3)] + [(3, 1)] * 4
    for row, prompt in enumerate(prompts):
        alone = model.generate([prompt], 5, seed=2 + row)
        assert [tokens[row] for tokens in together] == [token for (token,) in alone]


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_no_text(temperature, value):
    def score(h):
        logits = torch.zeros(len(h), 101)
        logits[-1, 7] = value
        return logits

    model = build("gpt").eval()
    for prompts in ([[1]], [[1], [2]]):
        with pytest.raises(RuntimeError, match="not finite"):
            next(model.generate(prompts, 1, temperature=temperature, head=score))
    with torch.no_grad():
        model.final_norm.weight.fill_(torch.nan)
    with pytest.raises(RuntimeError, match="not finite"):
        next(model.generate([[1]], 1, temperature=temperature))


@pytest.mark.parametrize(
    "sampling",
    [{"temperature": -1.0}, {"temperature": math.nan}, {"top_k": 0}, {"top_p": 0.0}, {"min_p": 2}],
)
def test_sampling_that_no_distribution_has_is_refused(sampling):
    (name,) = sampling
    with pytest.raises(ValueError, match=name):
        next(build("gpt").eval().generate([[1]], 1, **sampling))


def test_top_p_of_one_keeps_all_tokens(monkeypatch):
    logits = 5 * torch.randn(1, 50_257, generator=torch.Generator().manual_seed(0))
    clocks = torch.ones_like(logits).index_fill_(1, logits.argmin(-1), 1e-30)
    monkeypatch.setattr("model.exponential_clocks", lambda p, generators: clocks)
    assert Sampler(top_p=1.0).pick(logits, []) == logits.argmin()
    assert Sampler(top_p=1e-50).pick(logits, []) == logits.argmax()


@pytest.mark.parametrize("prompts", [[], [[]], [[1, 2], []]])
def test_an_empty_prompt_is_refused(prompts):
    with pytest.raises(ValueError, match="a prompt is empty"):
        next(build("gpt").eval().generate(prompts, 1))


def test_contexts_slide_within_their_documents():
    """block_size is 8, so that a context which is full loses 4 tokens."""
    config = ModelConfig(block_size=8, doc_mask=True, eot_id=0)
    texts = Texts(config, [[5, 5, 5, 5], [5, 0, 5], [5]], 12, torch.device("cpu"))
    starts, moved = [], []
    # The second row's document begins at column 2. Its next one does at column 11, the third row's
    # at column 6.
    for tokens in zip([5] * 12, [5] * 7 + [0] + [5] * 4, [5, 5, 0] + [5] * 9, strict=True):
        moved.append(texts.begin_contexts())
        starts.append(tuple(texts.starts))
        texts.add(torch.tensor(tokens))
    begun = [(0, 2, 3)] * 3 + [(0, 2, 6)] * 2 + [(4, 2, 6)] * 2 + [(4, 6, 6), (4, 11, 6)]
    assert starts == begun + [(8, 11, 6)] * 2 + [(8, 11, 10)]
    assert moved == [now != before for before, now in zip([None, *starts], starts, strict=False)]


# How much each coordinate of h = (1, 2, 3), w = (2, 2, 5) carries, as the formulas say.
SHARES = {
    "euclidean": ("2 (80.0%), 0 (20.0%), 1 (0.0%) of d^2", {}),
    "manhattan": ("2 (66.7%), 0 (33.3%), 1 (0.0%) of d", {}),
    "minkowski": ("2 (88.9%), 0 (11.1%), 1 (0.0%) of d^3", {"p": 3.0}),
    "chebyshev": ("2 (100.0%) of d", {}),
    "cross_entropy": ("2 (71.4%), 1 (19.0%), 0 (9.5%) of sum |h w|", {}),
}


@pytest.mark.parametrize("name", SHARES)
def test_explained_shares(name):
    expected, options = SHARES[name]
    head = HarmonicHead(3, 4, name, **options).eval()
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[9.0, 9, 9], [2, 2, 5], [-4, 0, 1], [0, 7, 0]]))
    model = SimpleNamespace(head=head)
    explainer = Explainer(model, SimpleNamespace(decode_token=str), 1)
    explainer(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([1]))
    (lines,) = explainer.lines[0]
    assert lines.splitlines()[-1] == f"      coordinates: {expected}", lines


def test_prompts_from_a_file_and_json(sample, tmp_path):  # noqa: F811
    path = tmp_path / "prompts.txt"
    (tmp_path / "secret").write_text("music")
    path.write_text(f"FILE:{tmp_path / 'secret'}\n")
    assert "FILE:" in sample("gpt", f"--prompts={path}", "--json", "--max_new_tokens=1")[1]
    path.write_text("the old king\n\nmusic\n")
    words = ["--max_new_tokens=60", "--seed=5", "--temperature=1.5", "--num_samples=2"]
    status, out, err = sample("gpt", f"--prompts={path}", "--json", "--stop_at_eot", *words)
    assert status == 0, err
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["prompt"] for line in lines] == ["the old king"] * 2 + ["music"] * 2
    assert all(set(line) == {"prompt", "text", "tokens", "finish_reason"} for line in lines)
    for line in lines:
        assert (line["finish_reason"] == "eot") == (len(line["tokens"]) < 60)
    plain = sample("gpt", "--start", "the old king", "music", "--stop_at_eot", *words)[1]
    shown = "".join(f"{line['prompt']}{line['text']}\n---------------\n" for line in lines)
    assert plain == shown


class Letters:
    """A tokenizer whose ids are characters."""

    def stream_decoder(self):
        return lambda token: "" if token is None else chr(token)


@pytest.mark.parametrize("as_json", [False, True])
def test_a_text_appears_when_it_and_those_before_it_are_complete(as_json, capsys):
    texts = ShownTexts(Letters(), [[ord(c)] for c in "xyz"], eot_id=ord("."))
    seen = []

    def steps():
        for tokens in ("aaa", "bb.", ".bb", "aaa", "b.b"):
            yield list(map(ord, tokens))
            seen.append(capsys.readouterr().out)

    if as_json:
        write_json(texts, steps(), 6)
    else:
        write(texts, steps(), None, 6)
    seen.append(capsys.readouterr().out)
    if as_json:
        seen = [[json.loads(line) for line in out.splitlines()] for out in seen]
        seen = [[line["prompt"] + line["text"] for line in lines] for lines in seen]
    else:
        seen = [out.split("\n---------------\n")[:-1] for out in seen]
    assert seen == [[], [], ["xab"], [], ["yabba", "za"]]


def test_options_that_make_no_sense_together(sample, tmp_path):  # noqa: F811
    status, out, err = sample("gpt", "--json", "--explain")
    assert status == 2 and out == "" and "exclude each other" in err
    status, out, err = sample("bert", "--json", "--num_samples=3", "--start=the [MASK]")
    assert status == 2 and out == "" and "2 problems" in err and "masked language model" in err
    (tmp_path / "empty.txt").write_text("\n")
    status, out, err = sample("gpt", f"--prompts={tmp_path / 'empty.txt'}")
    assert status == 2 and out == "" and "has no prompts" in err
