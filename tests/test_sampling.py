"""What makes sampling fast changes nothing; sample.py's prompts from a file and JSON."""

import json

import pytest
import torch
from test_model import build
from test_sample import runs, sample  # noqa: F401

from harmonic import HEADS, HarmonicHead


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


def test_options_that_make_no_sense_together(sample, tmp_path):  # noqa: F811
    status, out, err = sample("gpt", "--json", "--explain")
    assert status == 2 and out == "" and "exclude each other" in err
    status, out, err = sample("bert", "--json", "--num_samples=3", "--start=the [MASK]")
    assert status == 2 and out == "" and "2 problems" in err and "masked language model" in err
    (tmp_path / "empty.txt").write_text("\n")
    status, out, err = sample("gpt", f"--prompts={tmp_path / 'empty.txt'}")
    assert status == 2 and out == "" and "has no prompts" in err
