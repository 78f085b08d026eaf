"""What may stand behind --source: every kind of file, name and link, and what cannot be read."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from conftest import ROOT
from test_prepare import documents, fails, make_documents, run, write_jsonl

from base.command_line import cli, parse, read_yaml, show_bytes, write_yaml
from base.errors import UserError
from base.files import seal, unseal
from text.documents import cut, pieces
from text.readers import COMPRESSED, KINDS, Broken, records
from text.sources import find, left_out_line
from text.summary import print_warnings
from text.token_files import load_data
from training.config import TrainConfig

PACK = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}
CAFE = os.fsdecode(b"caf\xe9")  # a name that is not UTF-8


def file_bytes(kind: str, texts: list[str]) -> bytes:
    """A file of a kind that holds `texts`, a .txt all of them in one."""
    if kind == ".txt":
        return "".join(texts).encode()
    if kind == ".jsonl":
        return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    if kind == ".json":
        return json.dumps(texts).encode()
    if kind == ".csv":
        table = io.StringIO(newline="")
        csv.writer(table).writerows([["id", "text"], *enumerate(texts)])
        return table.getvalue().encode()
    table = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), table, row_group_size=5)
    return table.getvalue()


def write(folder: Path, name: str, texts: list[str]) -> Path:
    """Writes a file of the kind, and compressed as, its name says."""
    path = folder / name
    packed = path.suffix in COMPRESSED
    data = file_bytes(Path(path.stem).suffix if packed else path.suffix, texts)
    path.write_bytes(PACK[path.suffix](data) if packed else data)
    return path


def expected(kind: str, texts: list[str]) -> list[str]:
    return ["".join(texts)] if kind == ".txt" else texts


# ---- kinds and compression ---------------------------------------------------------------------


def test_every_kind_is_read_in_every_compression(tmp_path):
    texts = make_documents(12)
    for kind in KINDS:
        for packed in ("", *COMPRESSED):
            path = write(tmp_path, f"a{kind}{packed}", texts)
            assert list(records(path, None)) == expected(kind, texts), path.name
            assert path in find([str(tmp_path)]).files
    meta = run(f"--source={tmp_path / 'a.csv.bz2'}", f"--out_dir={tmp_path / 'out'}")
    assert meta["documents_read"] == 12 and meta["source"] == "a.csv.bz2"


def test_joined_archives_are_read_whole(tmp_path):
    """`cat a.gz b.gz` is a valid archive of both, in every format."""
    texts = make_documents(8)
    for packed, pack in PACK.items():
        path = tmp_path / f"a.jsonl{packed}"
        path.write_bytes(
            pack(file_bytes(".jsonl", texts[:4])) + pack(file_bytes(".jsonl", texts[4:]))
        )
        assert list(records(path, None)) == texts, packed


def test_a_broken_archive_is_named_and_skipped(tmp_path):
    texts = make_documents(300)
    for kind in KINDS:
        for packed in COMPRESSED:
            path = write(tmp_path, f"a{kind}{packed}", texts)
            whole = path.read_bytes()
            for damage in (
                whole[: len(whole) // 2],
                whole[:40] + b"\xff" * 40 + whole[80:],
                b"no archive at all",
            ):
                path.write_bytes(damage)
                *kept, last = records(path, None)
                assert isinstance(last, Broken) and last.file and str(path) in last.problem, (
                    path.name,
                    last,
                )
                assert kept == texts[: len(kept)] or (kind == ".json" and not kept)


def test_zst_without_its_package(tmp_path, monkeypatch):
    path = write(tmp_path, "a.txt.zst", make_documents(3))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    for mode in ("stop", "skip"):  # not the file's fault, so it is not skipped
        assert "pip install zstandard" in fails(
            tmp_path, f"--source={path}", f"--on_bad_file={mode}"
        )


# ---- folders and links -------------------------------------------------------------------------


def test_links_are_followed_once(tmp_path):
    corpus, other = tmp_path / "corpus", tmp_path / "other"
    (corpus / "sub").mkdir(parents=True)
    (other / "deep").mkdir(parents=True)
    for path in (
        corpus / "z.txt",
        corpus / "sub" / "b.txt",
        other / "c.txt",
        other / "deep" / "d.txt",
    ):
        path.write_text(path.name)
    (corpus / "a_link.txt").symlink_to("z.txt")
    (corpus / "elsewhere").symlink_to(other)
    (corpus / "again").symlink_to(other)
    (corpus / "a_sub").symlink_to("sub")
    (corpus / "sub" / "up").symlink_to("..")
    (other / "back").symlink_to(corpus)
    files = find([str(corpus)]).files
    assert [str(f.relative_to(corpus)) for f in files] == [
        "again/c.txt",
        "again/deep/d.txt",
        "sub/b.txt",
        "z.txt",
    ]
    assert find([str(corpus), str(other), str(corpus / "z.txt")]).files == files
    for out in (corpus / "out", other / "out", corpus / "elsewhere" / "out"):
        with pytest.raises(UserError, match="lies in a folder that is read"):
            run(f"--source={corpus}", f"--out_dir={out}")


def test_what_is_left_out_is_counted_and_named(tmp_path, capsys):
    source = tmp_path / "corpus"
    (source / ".git").mkdir(parents=True)
    write_jsonl(source / "a.jsonl", make_documents(10))
    for name in ("a.pdf", "b.PDF", "README", "c.tar.gz", ".hidden.txt", ".git/x.txt"):
        (source / name).write_text("x")
    os.mkfifo(source / "pipe.txt")
    (source / "gone.txt").symlink_to("nowhere")
    run(f"--source={source}", f"--out_dir={tmp_path / 'out'}")
    line = (
        "left out 8 files and folders: 2 .pdf, 1 .tar.gz, 1 broken link, 1 hidden, 1 hidden"
        " folder, 1 named pipe, 1 without an ending"
    )
    assert line in capsys.readouterr().out
    assert left_out_line({f".{i}": 1 for i in range(20)}).endswith("12 of other kinds")
    assert left_out_line({"hidden": 1}) == "left out 1 file: 1 hidden"


def test_what_is_no_file_is_named_and_nothing_blocks(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "gone.txt").symlink_to("nowhere.txt")
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    (tmp_path / "empty").mkdir()
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(b"x")
    (tmp_path / "a.xml.gz").write_bytes(b"x")
    cases = {
        "/dev/null": "/dev/null is a device",
        "pipe.txt": "pipe.txt is a named pipe",
        "socket.txt": "socket.txt is a socket",
        "gone.txt": "is a link to nowhere.txt, which does not exist",
        "loop.txt": "loop.txt: Too many levels of symbolic links",
        "empty": "no file to read in the folder",
        "pictures": "left out 1 file: 1 .png",
        "a.xml.gz": "unknown kind of file; known are",
        "x" * 300 + ".txt": "File name too long",
    }
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket.txt"))
        for name, says in cases.items():
            for mode in ("stop", "skip"):
                assert says in fails(
                    tmp_path, f"--source={tmp_path / name}", f"--on_bad_file={mode}"
                ), name


# ---- names that are not UTF-8 ------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="other systems allow no such names")
def test_any_file_name_is_read(tmp_path, capsys):
    sys.stdout.reconfigure(errors="show_bytes")  # as `cli` does
    folder = tmp_path / CAFE
    folder.mkdir()
    texts = make_documents(30)
    for kind in KINDS:
        for packed in ("", *COMPRESSED):
            path = write(folder, f"{CAFE}{kind}{packed}", texts)
            assert list(records(path, None)) == expected(kind, texts)
    write_jsonl(folder / "other.jsonl", texts)
    for tokenizer in ("bpe:300", "char"):
        for source in (folder, folder / f"{CAFE}.jsonl", folder / f"{CAFE}.parquet"):
            flags = [
                f"--source={source}",
                f"--tokenizer={tokenizer}",
                "--overwrite=true",
                f"--out_dir={tmp_path / f'out{CAFE}'}",
            ]
            meta = run(*flags)
            assert meta["source"] == source.name
        run(*flags[:2], *flags[3:])
        assert "already prepared" in capsys.readouterr().out
        assert load_data(tmp_path / f"out{CAFE}").load_tokenizer().decode([0])
    assert sorted(
        documents(tmp_path / f"out{CAFE}", "train") + documents(tmp_path / f"out{CAFE}", "val")
    ) == sorted(texts)
    hashes = set()
    for name in (f"{CAFE}.jsonl", os.fsdecode(b"caf\xe8.jsonl")):
        path = write_jsonl(tmp_path / name, texts)
        hashes.add(
            run(f"--source={path}", "--overwrite=true", f"--out_dir={tmp_path / 'named'}")[
                "settings"
            ]["input"]
        )
    assert len(hashes) == 2, "another name is another input"
    assert f"{CAFE}.txt is empty" in fails(tmp_path, f"--source={_empty(tmp_path)}")


def _empty(folder: Path) -> Path:
    path = folder / f"{CAFE}.txt"
    path.touch()
    return path


@pytest.mark.skipif(sys.platform != "linux", reason="other systems allow no such names")
def test_any_folder_name_can_be_trained_on_and_sampled_from(
    train, tiny_data, tmp_path, monkeypatch, capsys
):
    import sample

    (tmp_path / CAFE).symlink_to(tiny_data)
    for out_dir in (f"run{CAFE}", "run"):
        status, _, error = train(dataset=str(tmp_path / CAFE), out_dir=out_dir, max_iters=1)
        assert status == 0, error
    Path(f"{CAFE}.txt").write_text("the old king")
    monkeypatch.setattr(
        sys,
        "argv",
        ["sample.py", f"--out_dir=run{CAFE}", f"--start=FILE:{CAFE}.txt", "--max_new_tokens=1"],
    )
    cli(sample.main)
    assert capsys.readouterr().out.startswith("the old king")


@pytest.mark.parametrize(
    ("main", "message"),
    [
        (lambda: Path("a" * 300).is_file() or open("a" * 300), "aaa: File name too long"),
        (lambda: Path("no/such/file").read_text(), "no/such/file: No such file"),
    ],
)
def test_what_the_system_refuses_is_one_message(main, message, capfd):
    with pytest.raises(SystemExit) as stop:
        cli(main)
    assert stop.value.code == 2 and message in capfd.readouterr().err


def test_output_that_cannot_be_written(tmp_path):
    """Python itself would write at exit, fail there, and exit with status 120."""
    full = "-c: output: No space left on device\n"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    for main, redirection, expected in (
        ("print(1)", "> /dev/full", (2, full)),
        ("print('x' * 10**5)", "> /dev/full", (2, full.replace("output: ", ""))),
        ("print(1, flush=True)", "> /dev/full", (2, full)),
        ("print(1) or sys.exit(4)", "> /dev/full", (4, full)),
        ("print(1) or 1 / 0", "> /dev/full 2> /dev/full", (1, "")),
        ("print(1) or open('no/such/file')", "> /dev/full 2> /dev/full", (2, "")),
        ("print(1), prints=False", "> /dev/full", (0, full)),
        ("print(1)", ">&-", (0, "")),
        ("print(1) or sys.exit(4)", ">&-", (4, "")),
        ("sys.stdout.close()", "", (0, "")),
    ):
        code = f"import sys; from base.command_line import cli; cli(lambda: {main})"
        done = subprocess.run(
            ["sh", "-c", f'"$0" -c "$1" {redirection}', sys.executable, code],
            cwd=ROOT,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert (done.returncode, done.stderr) == expected, (main, redirection)


def test_a_full_file_is_one_message_and_the_output_stays(capfd):
    def full_file():
        print(1)
        with open("/dev/full", "w", buffering=1) as file:
            file.write("a\n")

    with pytest.raises(SystemExit) as stop:
        cli(full_file)
    out, err = capfd.readouterr()
    assert (stop.value.code, out) == (2, "1\n") and "No space left on device" in err


def test_values_of_a_config_file_are_those_of_a_command_line(tmp_path):
    """010 is ten, as for --seed=010, and an overridden .inf does not matter. `~` is a folder."""
    (tmp_path / "c.yaml").write_text(
        "seed: 010\nlearning_rate: .inf\nbeta1: 5e-1\nbatch_size: 0x10\nout_dir: ~/run\n"
    )
    words = [str(tmp_path / "c.yaml"), "--learning_rate=1"]
    (found,) = parse(words, TrainConfig, config_file=True)
    assert (found.seed, found.learning_rate, found.beta1, found.batch_size) == (10, 1, 0.5, 16)
    assert found.out_dir == str(Path.home() / "run")


def test_any_file_name_is_printed_and_stored(tmp_path, monkeypatch):
    for encoding, shown in (("utf-8", "caf\\xe9 é"), ("ascii", "caf\\xe9 \\xe9")):
        stream = io.TextIOWrapper(io.BytesIO(), encoding)
        monkeypatch.setattr(sys, "stdout", stream)
        cli(lambda: print(f"{CAFE} é", flush=True))
        assert stream.buffer.getvalue().decode() == f"{shown}\n"
    assert show_bytes(UnicodeEncodeError("ascii", "aé\udce9", 1, 3, "")) == ("\\xe9\\udce9", 3)
    write_yaml(tmp_path / "config.yaml", TrainConfig(out_dir=CAFE))
    assert read_yaml(tmp_path / "config.yaml")["out_dir"] == CAFE
    assert unseal(seal({"source": CAFE}).encode()) == {"source": CAFE}


# ---- what cannot be read -----------------------------------------------------------------------

GOOD = make_documents(20)
LINES = [json.dumps({"text": text}).encode() + b"\n" for text in GOOD]
ROWS = [f'{i},"{text.strip()}"\n'.encode() for i, text in enumerate(GOOD)]
BAD = {  # file: (its bytes, documents kept, files and records skipped)
    "latin1.txt": (b"caf\xe9", 0, 1, 0),
    "line.jsonl": (
        b"".join(
            [
                *LINES[:10],
                b'{"text": \n',
                b"\xff\n",
                b'{"txt": "a"}\n',
                b'{"text": 3}\n',
                *LINES[10:],
            ]
        ),
        20,
        0,
        4,
    ),
    "item.json": (json.dumps([*GOOD, 7, {"a": "b"}]).encode(), 20, 0, 2),
    "list.json": (b'["a", ', 0, 1, 0),
    "row.csv": (b"".join([b"id,text\n", *ROWS[:5], b"1\n", b'2,"a"b\n', *ROWS[5:]]), 20, 0, 2),
    "quote.csv": (b"".join([b"id,text\n", *ROWS, b'1,"unclosed\n', b"2,lost\n"]), 20, 0, 2),
    "latin1.csv": (b"".join([b"id,text\n", *ROWS, b"1,caf\xe9\n"]), None, 1, 0),
    "columns.csv": (b"id,label\n1,2\n", 0, 1, 0),
    "blank.csv": (b"\n1,2\n", 0, 1, 0),
    "columns.parquet": (None, 0, 1, 0),
    "no.parquet": (b"PAR1 not really", 0, 1, 0),
    "cut.jsonl.gz": (gzip.compress(b"".join(LINES))[:-20], None, 1, 0),
}


@pytest.mark.parametrize("name", BAD)
def test_on_bad_file(tmp_path, capsys, name):
    data, kept, files, others = BAD[name]
    bad, good = tmp_path / "corpus" / name, tmp_path / "corpus" / "good.jsonl"
    bad.parent.mkdir()
    if data is None:
        pyarrow.parquet.write_table(pyarrow.table({"label": [1, 2]}), bad)
    else:
        bad.write_bytes(data)
    write_jsonl(good, make_documents(30, seed=1))
    message = fails(tmp_path, f"--source={bad.parent}")
    assert str(bad) in message and "--on_bad_file=skip" in message
    meta = run(f"--source={bad.parent}", "--on_bad_file=skip", f"--out_dir={tmp_path / 'out'}")
    assert (
        meta["skipped"] == {"files": files, "records": others}
        and meta["settings"]["on_bad_file"] == "skip"
    )
    if kept is not None:
        assert meta["documents_read"] == 30 + kept
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("skipped"))
    assert str(bad) in line and (line.endswith("; ...") == (others > 3))
    if kept == 0:
        message = fails(tmp_path / "corpus", f"--source={bad}", "--on_bad_file=skip")
        assert "no documents left" in message and "skipped 1 file that cannot be read" in message


def test_an_empty_table_and_a_hidden_link_stop_nothing(tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    write_jsonl(corpus / "a.jsonl", GOOD)
    (corpus / "empty.csv").touch()
    (corpus / ".loop").symlink_to(".loop")
    assert run(f"--source={corpus}", f"--out_dir={tmp_path / 'out'}")["documents_read"] == len(GOOD)


@pytest.mark.parametrize("tokenizer", ["char", "bpe:300"])
def test_blank_documents_are_counted(tmp_path, tokenizer):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "a.txt").write_text("  \n")
    (corpus / "b.txt").write_text("")
    message = fails(tmp_path, f"--source={corpus}", f"--tokenizer={tokenizer}")
    assert "no documents left for train and val: 2 read, 2 of them empty" in message


def test_good_files_need_no_flag(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", GOOD)
    for mode in ("stop", "skip"):
        meta = run(
            f"--source={tmp_path / 'a.jsonl'}",
            f"--on_bad_file={mode}",
            f"--out_dir={tmp_path / mode}",
        )
        assert ("skipped" in meta) == ("on_bad_file" in meta["settings"]) == (mode == "skip")
    assert (tmp_path / "stop" / "train.bin").read_bytes() == (
        tmp_path / "skip" / "train.bin"
    ).read_bytes()


# ---- the summary -------------------------------------------------------------------------------


def test_the_summary_says_how_it_was_split_and_when_val_is_short(tmp_path, capsys):
    (tmp_path / "one.txt").write_text("".join(make_documents(100)))
    (tmp_path / "two").mkdir()
    for name in "ab":
        (tmp_path / "two" / f"{name}.txt").write_text(f"{name} short document")
    write_jsonl(tmp_path / "many.jsonl", make_documents(600))
    short = "val has only"
    cases = [
        (
            "one.txt",
            "split: the only document is cut in two; the last 0.05 of it is val (--val_fraction)",
            True,
        ),
        ("two", "one was moved to val, which would have been empty", True),
        (
            "many.jsonl",
            "split: by a hash of each document's text, about 0.05 of the documents to val"
            " (--val_fraction)\n",
            False,
        ),
    ]
    for source, says, warns in cases:
        meta = run(
            f"--source={tmp_path / source}", f"--out_dir={tmp_path / 'out'}", "--overwrite=true"
        )
        out = capsys.readouterr().out
        assert says in out and (short in out) == warns, (source, out)
        if warns:
            assert (
                f"val has only {meta['splits']['val']['tokens']:,} tokens" in out
                and "raise --val_fraction (now 0.05)" in out
            )


def test_a_parquet_file_with_two_columns_of_one_name(tmp_path):
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert "has several columns 'text'" in fails(tmp_path, f"--source={tmp_path / 'a.parquet'}")


@pytest.mark.parametrize("length, count", [(300, 1), (200_000, 2), (3_000_000, 10)])
def test_a_single_document_is_validated_on_all_of_its_parts(length, count):
    """Its second half is another kind of text. Together the parts are the text."""
    line = "some words of a line\n"
    text = line * (length // 42) + "0x0029 " * (length // 14)
    assert pieces(text, 0.05) == count
    parts = cut(text, 0.05, count)
    assert "".join(part for _, part in parts) == text
    val = "".join(part for split, part in parts if split == "val")
    assert 0.045 < len(val) / len(text) < 0.15 and "0x0029" in val
    assert ("words" in val) == (count > 1)
    with pytest.raises(UserError, match="the only document has 1 characters: too short"):
        cut("x", 0.05, 1)


@pytest.mark.parametrize("val, warns", [(3.2, False), (2.8, True), (4.0, True)])
def test_a_val_of_another_kind_of_text_is_noticed(val, warns, capsys):
    words = SimpleNamespace(name="gpt2", vocab_size=50257, unk_id=None)
    sizes = {"train": (3.5, 10**6), "val": (val, 10**5)}
    splits = {k: {"tokens": n, "bytes": round(b * n)} for k, (b, n) in sizes.items()}
    print_warnings(splits, words, 0.05, Path())
    assert ("val is another kind of text than train" in capsys.readouterr().out) == warns


def test_characters_that_only_val_has_are_counted(tmp_path, capsys):
    path = tmp_path / "one.txt"
    path.write_text("some letters\n" * 200 + "ÄÖ")
    meta = run(f"--source={path}", "--tokenizer=char", f"--out_dir={tmp_path / 'out'}")
    assert "val: 2 unknown tokens" in capsys.readouterr().out
    [train], [val] = documents(tmp_path / "out", "train"), documents(tmp_path / "out", "val")
    assert train + val == "some letters\n" * 200 + "\ufffd\ufffd"
    assert meta["tokenizer_file"] == "characters.json" and meta["vocab_size"] == len(set(train)) + 2
    assert meta["splits"]["val"]["bytes"] == len(val.encode()) - 2, "the bytes of the text itself"


def test_a_bad_value_of_on_bad_file(tmp_path):
    with pytest.raises(UserError, match="on_bad_file=skp: unknown on_bad_file; did you mean skip"):
        run("--source=a.txt", "--on_bad_file=skp", f"--out_dir={tmp_path / 'out'}")
