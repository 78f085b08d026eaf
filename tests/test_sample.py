"""sample.py as a user runs it."""

import io
import json
import os
import shutil
import sys

import pytest
from conftest import TINY, script_here, text
from test_data import write_nanogpt

from base.command_line import cli, parse
from model import Diverged
from sample import SampleConfig
from text.tokenizers import EOT, train_bpe


@pytest.fixture(scope="session")
def runs(tiny_data, tmp_path_factory):
    """Folders of a trained cosine GPT and a trained BERT."""
    folder = tmp_path_factory.mktemp("sampled") / "runs"
    for name, extra in {
        "gpt": {"head": "cosine"},
        "bert": {"arch": "bert", "head": "manhattan"},
    }.items():
        settings = {
            **TINY,
            "dataset": tiny_data,
            "max_iters": 150,
            "learning_rate": 1e-2,
            "out_dir": folder / name,
            **extra,
        }
        done = script_here("train.py", *[f"--{k}={v}" for k, v in settings.items()])
        assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def sample(runs, monkeypatch, capsys):
    import sample as module

    def run(name, *words):
        monkeypatch.setattr(sys, "argv", ["sample.py", f"--out_dir={runs / name}", *words])
        status = 0
        try:
            cli(module.main)
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return run


def test_text_follows_the_prompt_and_the_seed(sample):
    one = sample("gpt", "--start=the old king", "--max_new_tokens=30", "--seed=3")
    assert one[0] == 0 and one[1].startswith("the old king") and len(one[1]) > 50
    assert sample("gpt", "--start=the old king", "--max_new_tokens=30", "--seed=3")[1] == one[1]
    assert sample("gpt", "--start=the old king", "--max_new_tokens=30", "--seed=4")[1] != one[1]
    assert "the context slides" in one[2]  # block_size is 16


def test_cache_gives_the_same_text(sample):
    words = ["--start=the old king", "the", "--num_samples=2", "--max_new_tokens=40"]
    with_cache, without = sample("gpt", *words), sample("gpt", *words, "--cache=false")
    assert with_cache[1] == without[1] and with_cache[1].count("---------------") == 4


def test_a_batch_gives_the_same_text_as_one(sample):
    both = sample("gpt", "--start", "a red house", "the", "--max_new_tokens=20", "--seed=5")[1]
    assert both.startswith(
        sample("gpt", "--start=a red house", "--max_new_tokens=20", "--seed=5")[1]
    )


def test_greedy_top_k_top_p(sample):
    greedy = sample("gpt", "--start=the", "--temperature=0", "--max_new_tokens=20")[1]
    assert sample("gpt", "--start=the", "--top_k=1", "--max_new_tokens=20")[1] == greedy
    assert (
        sample("gpt", "--start=the", "--top_p=0.000001", "--max_new_tokens=20", "--seed=9")[1]
        == greedy
    )


def test_no_prompt_starts_a_document(sample):
    status, out, _ = sample("gpt", "--max_new_tokens=20")
    assert status == 0 and "endoftext" not in out.split("\n")[0][:13] and len(out) > 20


def test_prompt_from_a_file(sample, tmp_path):
    path = tmp_path / "prompt.txt"
    for data, prompt in [
        (b"the old king", "the old king"),
        (b"\xef\xbb\xbfthe old king", "the old king"),
        (b"\xef\xbb\xbfthe old\r\nking\r\n", "the old\nking\n"),
        (b"the old\rking", "the old\nking"),
        (b"\n", "\n"),
    ]:
        path.write_bytes(data)
        words = ["--seed=3", "--max_new_tokens=5"]
        assert (
            sample("gpt", f"--start=FILE:{path}", *words)[1]
            == sample("gpt", f"--start={prompt}", *words)[1]
            != ""
        ), data
    expected = sample("gpt", "--start=the old\nking\n", *words)[1]
    path.write_bytes(b"the old\r\nking\r\n")
    before = os.dup(0)
    try:
        with open(path) as file:
            os.dup2(file.fileno(), 0)
        assert sample("gpt", "--start=FILE:-", *words)[1] == expected
    finally:
        os.dup2(before, 0)
        os.close(before)


def test_prompt_files_that_are_no_text(sample, tmp_path):
    path = tmp_path / "prompt.txt"
    for data, says in [
        ("the king".encode("utf-16-le"), "it holds NUL characters"),
        ("the king".encode("utf-16"), "not UTF-8 text"),
        (b"the\0king", "it holds NUL characters"),
        (b"caf\xe9", "not UTF-8 text"),
        (b"\xef\xbb\xbf", "the prompt is empty"),
    ]:
        path.write_bytes(data)
        status, out, err = sample("gpt", f"--start=FILE:{path}")
        assert status == 2 and out == "" and says in err, (data, err)
    os.mkfifo(tmp_path / "pipe")
    for name, says in (
        (tmp_path / "pipe", "a named pipe"),
        ("/dev/zero", "a device"),
        (tmp_path, "Is a directory"),
    ):
        status, out, err = sample("gpt", f"--start=FILE:{name}")
        assert status == 2 and out == "" and says in err, err


def test_any_prompt_that_is_not_empty(sample):
    """nanoGPT's default prompt is a line end, and its other one the end-of-text token."""
    for prompt in ("\n", " ", "\t\n"):
        status, out, err = sample("gpt", f"--start={prompt}", "--max_new_tokens=5")
        assert status == 0 and out.startswith(prompt) and len(out) > 20, err
    words = ["--max_new_tokens=20", "--seed=2"]
    implicit, explicit = sample("gpt", *words), sample("gpt", f"--start={EOT}", *words)
    assert explicit[1] == EOT + implicit[1], "the same tokens; what the user wrote is shown"
    inside = sample("gpt", f"--start=the old king.{EOT}the", *words)
    assert inside[0] == 0 and inside[1].startswith(f"the old king.{EOT}the")
    assert sample("bert", "--start=the [MASK] king[SEP]")[0] == 0


@pytest.mark.parametrize("text", ["#", "### ", "---", "\n#", "# Title", "~", "--", "5", "true"])
def test_a_text_on_the_command_line_is_not_yaml(text):
    [config] = parse([f"--stop={text}"], SampleConfig)
    assert config.stop == text


def test_a_text_stops(sample):
    """A text is the one without the flag up to its first end-of-text token, or to the end of
    --stop: alone, in a batch, cached or not, explained or not."""
    words = ["--max_new_tokens=120", "--seed=5", "--temperature=1.5"]
    prompts = ["the old king", f"a red{EOT}", "music"]
    for extra in (
        ["--start", prompts[0]],
        ["--start", *prompts],
        ["--start", *prompts, "--cache=false"],
        [],
    ):
        whole, stopped = (
            sample("gpt", *extra, *words)[1],
            sample("gpt", *extra, *words, "--stop_at_eot")[1],
        )
        assert whole.count(EOT) > len(extra) - 1, "the test needs texts that end"
        shown, cut = [], []
        stop = whole[len(prompts[0]) + 9 :][:3]  # of the first text, and not one token
        for written, prompt in zip(
            whole.split("\n---------------\n"), extra[1:4] or [""], strict=False
        ):
            first, word = written.find(EOT, len(prompt)), written.find(stop, len(prompt))
            shown.append(written if first < 0 else written[:first])
            cut.append(written if word < 0 else written[: word + 3])
        assert stopped == "".join(f"{part}\n---------------\n" for part in shown)
        stopped = sample("gpt", *extra, *words, f"--stop={stop}")[1]
        assert stopped == "".join(f"{part}\n---------------\n" for part in cut)
    one = sample("gpt", "--start=music", *words, "--explain", "--stop_at_eot")[1]
    assert one.count("nearest:") < 120 and repr(EOT) in one.splitlines()[-3], (
        "the last token explained is the end"
    )


def test_characters_from_text_to_sample(train, tmp_path, monkeypatch, capsys):
    """--tokenizer=char: prepared here, and as nanoGPT prepares it."""
    import prepare_openwebtext
    import sample as module

    (tmp_path / "input.txt").write_text("\n".join(text(60)))
    prepare_openwebtext.main(
        [
            "--source=input.txt",
            "--tokenizer=char",
            "--out_dir=data/ours",
            "--num_proc=1",
            "--val_fraction=0.1",
        ]
    )
    assert "train" in capsys.readouterr().out
    (tmp_path / "data" / "theirs").mkdir()
    write_nanogpt(tmp_path / "data" / "theirs", (tmp_path / "input.txt").read_text())
    for name, flags in (("ours", {}), ("theirs", {"tokenizer": "char"})):
        status, out, err = train(
            dataset=name, out_dir=f"run_{name}", vocab_size=64, block_size=32, **flags
        )
        assert status == 0 and "char" in out, err
        shutil.rmtree(tmp_path / "data" / name)  # the run alone is enough
        for words, begins in ((["--start=the old"], "the old"), ([], "")):
            monkeypatch.setattr(
                sys, "argv", ["sample.py", f"--out_dir=run_{name}", *words, "--max_new_tokens=9"]
            )
            cli(module.main)
            out = capsys.readouterr().out
            assert out.startswith(begins) and len(out) > 20
        monkeypatch.setattr(
            sys, "argv", ["sample.py", f"--out_dir=run_{name}", "--start=caf\u00e9"]
        )
        with pytest.raises(SystemExit):
            cli(module.main)
        assert "does not know" in capsys.readouterr().err


def test_explain(sample):
    status, out, _ = sample("gpt", "--start=the old", "--max_new_tokens=5", "--explain")
    assert status == 0
    assert out.count("nearest:") == out.count("coordinates:") == 5 and out.count("% of d") == 0
    # A legend says once what the lines mean.
    assert out.count("nearest shows the 5 likeliest tokens") == 1
    assert out.count("coordinates shows which of the 16 coordinates") == 1
    # Cosine's shares are of the distance itself.
    assert out.count(" of d\n") == 5 and "of d^2" not in out


def test_bert_fills_masks(sample):
    status, out, _ = sample("bert", "--start=the [MASK] king sings in the <|mask|> house")
    assert status == 0 and "MASK" not in out and "mask|" not in out
    assert "mask 1" in out and "mask 2" in out and out.count("nearest:") == 2
    assert out.count("nearest shows") == 1
    assert out.splitlines()[0].startswith("the ") and out.splitlines()[0].endswith(" house")


BAD = {
    "a file": ("gpt/config.yaml", [], ["config.yaml holds no checkpoint (it is a file"]),
    "several runs": (".", [], ["holds no checkpoint: it holds the runs", "gpt", "name one"]),
    "folders of runs": ("..", [], ["it holds the runs", "/gpt", "name one"]),
    "a run as prompt": ("gpt", ["{home}/gpt"], ["gpt' is a run's folder", "use --out_dir="]),
    "a long prompt, no run": ("nowhere", ["--start=" + "город " * 60], ["does not exist"]),
    "no run": ("nowhere", [], ["nowhere holds no checkpoint", "does not exist"]),
    "empty prompt": ("gpt", ["--start="], ["the prompt is empty"]),
    "missing file": ("gpt", ["--start=FILE:nope.txt"], ["nope.txt", "No such file"]),
    "several": (
        "gpt",
        ["--start", "FILE:nope.txt", "FILE:nope2.txt"],
        ["2 problems", "nope.txt", "nope2.txt"],
    ),
    "bert writes freely": ("bert", ["--start=the old king"], ["masked language model", "[MASK]"]),
    "bert draws nothing": (
        "bert",
        ["--start=the [MASK] king", "--top_k=5", "--seed=2"],
        ["2 problems", "--top_k does nothing with a bert", "--seed does nothing with a bert"],
    ),
    "ann_index": ("gpt", ["--ann_index=hnsw"], ["ann_index=hnsw does nothing without --ann"]),
    "bert without a prompt": ("bert", [], ["masked language model"]),
    "bert, too long": ("bert", ["--start=" + "the [MASK] old king " * 30], ["block_size is 16"]),
    "cuda": ("gpt", ["--device=cuda"], ["no CUDA device"]),
    "temperature": (
        "gpt",
        ["--temperature=-1", "--top_p=2"],
        ["2 problems", "temperature=-1.0", "top_p=2.0"],
    ),
    "unknown key": ("gpt", ["--temprature=1"], ["unknown key; did you mean temperature?"]),
    "top_k": ("gpt", ["--top_k=0"], ["top_k=0 must be at least 1"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(sample, runs, case):
    name, words, expected = BAD[case]
    status, out, err = sample(name, *(word.replace("{home}", str(runs)) for word in words))
    assert status == 2 and out == "" and "Traceback" not in err
    assert all(e in err for e in expected), err


def test_runs_that_cannot_write(sample, runs, tmp_path, monkeypatch):
    """The tokenizer is another run's, or training has diverged."""
    shutil.copytree(runs / "gpt", tmp_path / "gpt")
    words = " ".join(f"{a}{b}{a}" for a in "abcdefghij" for b in "klmnopqrst")
    train_bpe([words] * 9, 341, tmp_path / "gpt")
    status, _, err = sample(tmp_path / "gpt", "--start=a")
    assert status == 2 and "has a model of 300 tokens, and its tokenizer" in err

    def diverged(*_, **__):
        raise Diverged("logits are not finite")

    monkeypatch.setattr("model.Model.generate", diverged)
    status, _, err = sample("gpt", "--start=a")
    assert status == 2 and "logits are not finite" in err and "Traceback" not in err


def test_json_in_a_terminal_without_unicode(monkeypatch):
    import sample as module

    written = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="backslashreplace")
    monkeypatch.setattr(sys, "stdout", written)
    texts = module.ShownTexts(Emoji(), [[0]], None)
    module.write_json(texts, iter([[1]]), 1)
    written.flush()
    assert json.loads(written.buffer.getvalue())["text"] == "é😀"


class Emoji:
    """A tokenizer with one text for every token but 0."""

    def stream_decoder(self):
        return lambda token: "é😀" if token else ""


def test_an_unknown_character_in_a_word_piece_prompt(monkeypatch):
    from base.errors import UserError
    from sample import encode
    from text.tokenizers import Tokenizer

    words = Tokenizer("bert", 10, 2, 3, lambda texts: [[0, 5] for _ in texts], None, unk_id=0)
    with pytest.raises(UserError, match="does not know"):
        encode("☃ [MASK]", words, True)
