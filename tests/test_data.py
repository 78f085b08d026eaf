"""Order, noise and the reading of token folders."""

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, kstest
from test_tokenizer import nanogpt_meta

from base.errors import UserError
from base.files import seal, sha256, unseal
from harmonic import IGNORE_INDEX
from text import token_files
from text.token_files import Data, Split, data_folder, load_data
from training.data import (
    hashed,
    index,
    other_tokenizer,
    permute,
    split_problems,
    split_warnings,
    validation_windows,
)
from training.objective import MASKED_LM, NEXT_TOKEN, Batches


@pytest.mark.parametrize("n", [1, 2, 3, 7, 16, 17, 1000, 4097])
def test_permutation_is_a_bijection(n):
    for key in (0, 12345):
        assert sorted(permute(i, n, key) for i in range(n)) == list(range(n))


def test_an_old_run_resumes_in_its_order():
    """The order of windows in every run so far. Another one needs another setting."""
    assert [permute(i, 1000, 99) for i in range(5)] == [712, 946, 986, 433, 150]
    far = [permute(i, 10**9, hashed("run", 7, 2)) for i in range(3)]
    assert far == [10725340, 710357588, 71849479]


def test_permutation_looks_random():
    n = 4000
    order = np.array([permute(i, n, 99) for i in range(n)])
    assert abs(np.corrcoef(order, np.arange(n))[0, 1]) < 0.06  # 4 standard errors
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.06
    other = np.array([permute(i, n, 100) for i in range(n)])
    assert (order == other).mean() < 0.002


@pytest.mark.parametrize("n", [5, 64, 1000, 78_125_000])
def test_permutation_is_uniform(n):
    """Where a window lands over many keys, alone and together with the window after it, by
    chi-squared tests; the largest is 10^10 tokens in windows of 128."""
    keys, bins = 8000, 5
    places = np.array([[permute(i, n, key) for i in (0, 1, n // 2)] for key in range(keys)])
    assert (places < n).all()
    parts = places * bins // n
    sizes = (
        np.bincount(np.arange(n) * bins // n, minlength=bins) / n
        if n < 10**6
        else np.full(bins, 1 / bins)
    )
    for column in parts.T:
        assert chisquare(np.bincount(column, minlength=bins), keys * sizes).pvalue > 1e-4
    for a, b in ((0, 1), (0, 2)):
        together = np.bincount(parts[:, a] * bins + parts[:, b], minlength=bins**2)
        same = np.eye(bins) * (sizes * n * (sizes * n - 1))[:, None] + (
            1 - np.eye(bins)
        ) * np.outer(sizes * n, sizes * n)
        expected = (same / (n * (n - 1))).ravel()
        assert together[expected == 0].sum() == 0
        assert chisquare(together[expected > 0], keys * expected[expected > 0]).pvalue > 1e-4


def test_ten_billion_tokens_need_no_table():
    tokens, block, slots = 10**10, 1024, 480
    starts = [
        index(1, step, slot, slots, tokens, block)
        for step in (0, 10_000, 50_000)
        for slot in range(slots)
    ]
    assert len(set(starts)) == len(starts) and max(starts) + block + 1 <= tokens
    assert kstest(np.array(starts) / tokens, "uniform").pvalue > 1e-3


def test_an_epoch_visits_every_window_once():
    tokens, block, slots = 1000, 16, 4
    windows = (tokens - 1) // block - 1
    starts = [
        index(5, step, slot, slots, tokens, block)
        for step in range(3 * windows)
        for slot in range(slots)
    ]
    for epoch in range(3):
        part = starts[epoch * windows : (epoch + 1) * windows]
        assert len(set(part)) == windows and len({s % block for s in part}) == 1
        assert min(part) >= 0 and max(part) + block + 1 <= tokens
    assert starts[:windows] != starts[windows : 2 * windows]
    assert index(5, 0, 0, slots, tokens, block) != index(6, 0, 0, slots, tokens, block)


def test_small_splits_have_a_window():
    for tokens in range(17, 60):
        for step in range(5):
            start = index(0, step, 0, 1, tokens, 16)
            assert 0 <= start and start + 17 <= tokens


def test_order_does_not_depend_on_processes_or_accumulation(tiny_data):
    data = load_data(tiny_data)
    for objective in (NEXT_TOKEN, MASKED_LM):
        batches = Batches(data, objective, 16)
        whole = torch.cat([x for x, _ in batches.training(1, 3, range(6), 6, 6)])
        shares = (range(0, 2), range(2, 6))
        parts = [x for share in shares for x, _ in batches.training(1, 3, share, 6, 3)]
        assert torch.equal(whole, torch.cat(parts))


def test_targets_are_the_next_tokens(tiny_data):
    data = load_data(tiny_data)
    ((x, y),) = Batches(data, NEXT_TOKEN, 16).training(1, 0, range(3), 3, 3)
    stream = np.fromfile(tiny_data / "train.bin", np.uint16)
    for row, (a, b) in enumerate(zip(x, y, strict=True)):
        start = index(1, 0, row, 3, data.splits["train"].tokens, 16)
        assert (
            a.tolist() == stream[start : start + 16].tolist()
            and b.tolist() == stream[start + 1 : start + 17].tolist()
        )


def test_validation_windows_are_fixed_and_spread():
    assert validation_windows(1601, 16, 10) == [i * 160 for i in range(10)]
    assert validation_windows(50, 16, 10) == [0, 16, 32]


def test_bert_noise():
    """15 % of each window, of which 80 % masked, 10 % random, 10 % kept; never the end-of-text
    token; drawn by the key alone."""
    data = Data(None, "x", 100, 0, 101, {})
    rng = np.random.default_rng(0)
    counts = np.zeros(3)
    for key in range(300):
        window = rng.integers(1, 100, 128)
        window[::10] = 0
        x, y = MASKED_LM.pair(window, data, (key,))
        chosen = y != IGNORE_INDEX
        assert (
            chosen.sum() == MASKED_LM.predicted(128) == 19
            and (y[chosen] == window[chosen]).all()
            and (window[chosen] != 0).all()
        )
        assert (x[~chosen] == window[~chosen]).all()
        assert (x[chosen] != 0).all()  # With doc_mask it would begin a document.
        counts += (
            (x[chosen] == 101).sum(),
            ((x[chosen] != 101) & (x[chosen] != window[chosen])).sum(),
            (x[chosen] == window[chosen]).sum(),
        )
    share = counts / counts.sum()
    assert abs(share - [0.8, 0.098, 0.102]).max() < 0.015
    again = MASKED_LM.pair(window, data, (299,))
    assert (
        (again[0] == x).all()
        and (again[1] == y).all()
        and (MASKED_LM.pair(window, data, (300,))[1] != y).any()
    )


def test_masking_a_window_of_nothing_but_ends():
    data = Data(None, "x", 100, 0, 101, {})
    assert (MASKED_LM.pair(np.zeros(20, np.int64), data, (1,))[1] != IGNORE_INDEX).sum() == 3


def test_validation_noise_depends_on_the_window_alone(tiny_data):
    data = load_data(tiny_data)
    starts = [0, 16, 32, 48]
    one = list(Batches(data, MASKED_LM, 16).validation(starts, 4))[0]
    two = list(Batches(data, MASKED_LM, 16).validation(starts[2:], 1))
    assert torch.equal(one[0][2:], torch.cat([x for x, _ in two])) and torch.equal(
        one[1][2:], torch.cat([y for _, y in two])
    )


def test_nanogpt_folder_without_meta(tiny_data, tmp_path):
    ids = np.array([15496, 995, 50256] * 20, np.uint16)  # "Hello world", end of text
    for name in ("train", "val"):
        ids.tofile(tmp_path / f"{name}.bin")
    with pytest.raises(UserError, match="name the tokenizer"):
        load_data(tmp_path)
    data = load_data(tmp_path, "gpt2")
    assert (
        data.vocab_size == 50257
        and data.splits["train"].tokens == 60
        and MASKED_LM.rows(data) == 50258
    )
    assert data.splits["val"].bytes == 20 * len("Hello world")
    assert other_tokenizer(data) == []
    (np.arange(20_000, dtype=np.uint16) % 4096).tofile(tmp_path / "train.bin")
    (note,) = other_tokenizer(load_data(tmp_path, "gpt2"))
    assert "are all below 4,096, but gpt2 has 50,257 tokens: check --tokenizer" in note


def test_a_tokenizer_beside_token_files_is_theirs(tiny_data, tmp_path):
    for name in ("train.bin", "val.bin", "tokenizer.json"):
        shutil.copy(tiny_data / name, tmp_path)
    for given in (None, "gpt2"):
        with pytest.raises(UserError, match="--tokenizer=bpe:N"):
            load_data(tmp_path, given)
    assert load_data(tmp_path, "bpe:300").vocab_size == 300


def write_llmc(path, ids, magic=20240520, version=1, tokens=None, dtype=np.uint16):
    """A token file as llm.c's dev/data/data_common.py writes it."""
    header = np.zeros(256, np.int32)
    header[:3] = magic, version, len(ids) if tokens is None else tokens
    path.write_bytes(header.tobytes() + np.asarray(ids, dtype).tobytes())


def test_llm_c_header_is_skipped_and_checked(tmp_path):
    ids = [50256, 15496, 995] * 400
    write_llmc(tmp_path / "train.bin", ids)
    np.array(ids, np.uint16).tofile(tmp_path / "val.bin")
    data = load_data(tmp_path, "gpt2")
    train, val = data.splits["train"], data.splits["val"]
    assert train.tokens == val.tokens == 1200 and (train.read(0, 1200) == val.read(0, 1200)).all()
    assert train.read(1199, 1).tolist() == [995] and train.offset == 1024
    ((x, _),) = Batches(data, NEXT_TOKEN, 16).training(1, 0, range(3), 3, 3)
    assert set(x.unique().tolist()) == {995, 15496, 50256}
    for other in ("qwen", "bert"):
        with pytest.raises(UserError, match=f"use --tokenizer=gpt2, not {other}"):
            load_data(tmp_path, other)
    for changes, says in [
        (
            dict(tokens=1201),
            "truncated, or not a token file: 3,424 bytes, its llm.c header says 3,426",
        ),
        (dict(tokens=-5), "truncated, or not a token file"),
        (dict(version=2), "header of version 2"),
        (dict(magic=20240801, version=7, dtype=np.uint32), "llm.c's Llama 3 tokens"),
        (dict(magic=20240522), "llm.c's questions for an evaluation"),
    ]:
        write_llmc(tmp_path / "val.bin", ids, **changes)
        with pytest.raises(UserError, match=says):
            load_data(tmp_path, "gpt2")


def test_ids_of_another_width_or_tokenizer_are_named(tmp_path):
    draw = np.random.default_rng(0)
    words, characters, wide = (
        draw.integers(0, 50000, 5000),
        draw.integers(0, 65, 5000),
        draw.integers(0, 150000, 5000),
    )
    np.array(words, np.uint16).tofile(tmp_path / "val.bin")
    for ids, dtype, tokenizer, says in [
        (words, np.uint16, "gpt2", None),
        (
            words,
            np.uint32,
            "gpt2",
            r"its ids are uint32 \(every second uint16 is 0\).*np.uint32\).astype\(np.uint16\)",
        ),
        (words, np.int64, "gpt2", "its ids are uint64"),
        (words, np.uint32, "bert", "its ids are uint32"),
        (words, np.uint16, "bert", "another tokenizer made it"),
        (wide, np.uint16, "gpt2", "but gpt2 has 50,257: another tokenizer made it"),
        (wide, np.uint32, "qwen", "val.bin: it holds the id .* or its ids are uint16"),
        (wide, np.int64, "qwen", "its ids are uint64.*astype.np.uint32"),
        (
            words,
            np.uint16,
            "qwen",
            "it holds the id .* but qwen has 151,646: another tokenizer made it or its ids are"
            " uint16",
        ),
        (characters, np.uint16, "gpt2", "look like characters.*--tokenizer=char"),
        (characters, np.uint32, "qwen", "look like characters"),
        (words[:3], np.uint16, "gpt2", None),
    ]:
        ids.astype(dtype).tofile(tmp_path / "train.bin")
        if says is None:
            assert load_data(tmp_path, tokenizer).splits["train"].tokens == len(ids)
            continue
        with pytest.raises(UserError, match=says):
            load_data(tmp_path, tokenizer)
    (tmp_path / "train.bin").write_bytes(bytes(4001))
    with pytest.raises(UserError, match="4,001 bytes are not a whole number of uint16 ids"):
        load_data(tmp_path, "gpt2")
    ids = np.concatenate((words, draw.integers(50257, 60000, 1)))  # one bad id, at the very end
    ids.astype(np.uint16).tofile(tmp_path / "train.bin")
    with pytest.raises(UserError, match="it holds the id 5"):
        load_data(tmp_path, "gpt2")


def write_nanogpt(folder, text):
    """A folder as nanoGPT's data/shakespeare_char/prepare.py writes it."""
    meta = nanogpt_meta(text)
    cut = int(len(text) * 0.9)
    for name, part in (("train", text[:cut]), ("val", text[cut:])):
        np.array([meta["stoi"][c] for c in part], np.uint16).tofile(folder / f"{name}.bin")
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))


def test_nanogpts_character_folder(tmp_path):
    text = "First Citizen:\nBefore we proceed, café.\n" * 50
    write_nanogpt(tmp_path, text)
    with pytest.raises(UserError, match="--tokenizer=char"):
        load_data(tmp_path)
    for other in ("gpt2", "qwen", "bert"):
        with pytest.raises(
            UserError,
            match=(f"holds meta.pkl, the file of its tokenizer: use --tokenizer=char, not {other}"),
        ):
            load_data(tmp_path, other)
    data = load_data(tmp_path, "char")
    assert split_warnings(data, 8) == []  # The bytes of train are not known.
    val = data.splits["val"]
    cut = int(len(text) * 0.9)
    assert data.load_tokenizer().decode(val.read(0, val.tokens)) == text[cut:] and val.bytes == len(
        text[cut:].encode()
    )
    assert data.vocab_size == len(set(text)) + 1 == data.eot_id + 1 == data.mask_id


def test_short_splits_are_named_before_training(tiny_data):
    data = load_data(tiny_data)
    val, train = data.splits["val"].tokens, data.splits["train"].tokens
    for block_size in (1, val // 10 - 1, val // 9 + 1, val - 1, val, train - 1, train):
        problems, warnings = split_problems(data, block_size), split_warnings(data, block_size)
        for name, tokens in (("val", val), ("train", train)):
            windows = (tokens - 1) // block_size
            assert any(f"{name}.bin has {tokens:,} tokens" in p for p in problems) == (windows == 0)
            assert any(f"{name}.bin holds {windows} window" in w for w in warnings) == (
                0 < windows < 10
            )
        assert all(
            "--block_size" in line and "more documents" in line for line in problems + warnings
        )


def test_reading_uint32(tmp_path):
    np.arange(70_000, 70_010, dtype="<u4").tofile(tmp_path / "a.bin")
    split = Split(tmp_path / "a.bin", np.dtype("<u4"), 10, 1)
    assert split.read(3, 2).tolist() == [70_003, 70_004]
    checked = Split(split.path, split.dtype, 10, 1, sha256=sha256(split.path))
    os.utime(split.path, ns=(1, 1))  # A copy of the same text.
    assert checked.read(3, 2).tolist() == [70_003, 70_004]
    np.arange(10, dtype="<u4").tofile(tmp_path / "new.bin")
    (tmp_path / "new.bin").rename(split.path)
    for found in (split, checked):
        with pytest.raises(UserError, match="a.bin was changed while it was in use"):
            found.read(3, 2)
    longer = Split(split.path, split.dtype, 20, 1)  # As a disk that fails gives fewer ids.
    with pytest.raises(UserError, match="a.bin cannot be read: only 2 of 5 ids came"):
        longer.read(8, 5)
    split.path.unlink()
    with pytest.raises(UserError, match="a.bin cannot be read: No such file"):
        split.read(3, 2)


def test_documents_do_not_depend_on_the_parts_that_are_read(tiny_data, monkeypatch):
    data = load_data(tiny_data)
    ids = data.splits["val"].read(0, data.splits["val"].tokens)
    expected = [d for d in np.split(ids, np.flatnonzero(ids == data.eot_id)) if len(d) > 1]
    if ids[0] != data.eot_id:
        expected[0] = np.insert(expected[0], 0, data.eot_id)
    for part in (1, 7, 1 << 20):
        monkeypatch.setattr(token_files, "PART", part)
        found = list(token_files.documents_of(data, "val"))
        assert len(found) == len(expected) > 3
        assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_name_stands_for_prepared_data_before_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    assert data_folder("mine") == Path("mine")
    (tmp_path / "data/mine").mkdir(parents=True)
    assert data_folder("mine") == Path("data/mine") and data_folder("other") == Path("data/other")
    assert data_folder("./mine") == Path("mine") and data_folder("..") == Path("..")


@pytest.mark.parametrize(
    "damage, words",
    [
        (
            lambda f: (f / "train.bin").write_bytes((f / "train.bin").read_bytes()[:-2]),
            "train.bin is truncated",
        ),
        (lambda f: (f / "val.bin").unlink(), "val.bin is missing"),
        (lambda f: (f / "meta.json").write_text("{"), "meta.json is wrong"),
        (lambda f: (f / "meta.json").write_text("[]"), "meta.json is wrong"),
        (
            lambda f: (f / "meta.json").write_text(
                (f / "meta.json").read_text().replace('"bytes": 7', '"bytes": 8')
            ),
            "checksum",
        ),
        (
            lambda f: (f / "meta.json").write_text(
                seal({**unseal((f / "meta.json").read_text()), "dtype": "float64"})
            ),
            "uint16 or uint32",
        ),
        (
            lambda f: (f / "meta.json").write_text(json.dumps({"dtype": "uint16"})),
            "it has no 'splits'",
        ),
    ],
)
def test_damaged_folders_are_named(tiny_data, tmp_path, damage, words):
    for path in tiny_data.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    load_data(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=words):
        load_data(tmp_path)
