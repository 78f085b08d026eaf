"""What makes sampling fast changes nothing; sample.py's prompts from a file and JSON."""

import json

import pytest
import torch
from test_model import build
from test_sample import runs, sample  # noqa: F401

from harmonic import HEADS, HarmonicHead
from sample import Texts, write, write_json


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


def test_diverged_weights_are_no_text():
    model = build("gpt").eval()
    with torch.no_grad():
        model.final_norm.weight.fill_(torch.nan)
    with pytest.raises(RuntimeError, match="not finite"):
        next(model.generate([[1]], 1))


def test_prompts_from_a_file_and_json(sample, tmp_path):  # noqa: F811
    path = tmp_path / "prompts.txt"
    path.write_text("the old king\n\nmusic\n")
    words = ["--max_new_tokens=60", "--seed=20", "--temperature=1.5", "--num_samples=2"]
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
    texts = Texts(Letters(), [[ord(c)] for c in "xyz"], eot_id=ord("."))
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
    assert status == 2 and out == "" and "2 problems" in err and "fills masks" in err
    (tmp_path / "empty.txt").write_text("\n")
    status, out, err = sample("gpt", f"--prompts={tmp_path / 'empty.txt'}")
    assert status == 2 and out == "" and "has no prompts" in err
