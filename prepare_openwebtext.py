"""Turns text into token files: train.bin and val.bin as in nanoGPT, and a meta.json about them.

    python prepare_openwebtext.py --source=openwebtext --out_dir=data/openwebtext
    python prepare_openwebtext.py --source=wiki --tokenizer=bpe:4096
    python prepare_openwebtext.py --source=input.txt --tokenizer=char
    python prepare_openwebtext.py --source=a.txt b.jsonl.gz folder/ --out_dir=data/mine

A token file holds raw little-endian ids: uint16, or uint32 if the vocabulary is above 65,535. The
end-of-text id follows every document. Empty documents and exact copies are dropped, except in a
corpus with official splits. A hash of a document's text decides which split it is in. So the files
do not depend on the number of processes, and new documents do not move old ones to another split.
(In a small corpus a split could be empty. Then it gets one document of the other split.)

The files appear together, by one rename, at the end. Documents are read one at a time, with two
exceptions: a parquet file is read by row groups, and a .json list at once. Only two things in
memory grow with the corpus: the hashes that find copies (about 100 bytes a document, 0.8 GB for the
8 million documents of OpenWebText) and, while bpe:N is trained, its distinct words.
"""

import contextlib
import os
import sys
import time

from base.loading import end_at_ctrl_c

if __name__ == "__main__":
    end_at_ctrl_c()  # While the modules below are imported.

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from base.command_line import cli, parse
from base.errors import UserError
from base.machine import cores
from text.corpora import CORPORA, Corpus
from text.documents import Tally, check_splits, split_documents
from text.parallel import encode_documents
from text.readers import plain_name
from text.sources import Found, contents_hash, find, read_files, source_names, source_problems
from text.summary import print_splits, print_warnings
from text.token_writer import is_prepared, partial_folder, publish, write_meta, write_tokens
from text.tokenizers import (
    Tokenizer,
    is_trained,
    load_tokenizer,
    name_problems,
    train_tokenizer,
)


@dataclass
class PrepareConfig:
    """What to read and how to write it."""

    source: list[str] = field(default_factory=list)
    """openwebtext, wiki (10,033 Wikipedia leads), imdb (25,000 film reviews) or wikitext2 (official
    splits); or files and folders of them: .txt, .jsonl, .json, .csv and .parquet, also compressed
    (.gz, .bz2, .xz, .zst). A .txt file is one document, or, above 4 MiB, pieces of 64 KiB cut at
    blank lines. Linked folders are read once; hidden files are left out"""
    tokenizer: str = "gpt2"
    """gpt2, qwen, bert; bpe:N, a byte-level BPE of N tokens trained on the training split; or char,
    the characters of the training split (a character that only the validation split has becomes one
    unknown token, which shows as U+FFFD)"""
    out_dir: str | None = None
    """folder of the token files; by default data/NAME, named after the source"""
    num_proc: int = cores()
    """processes that encode; the files do not depend on it"""
    val_fraction: float | None = None
    """share of the documents that goes to val.bin, at least one document. By default 0.0005 for
    openwebtext, as in nanoGPT, and 0.05 for other text. A single document is cut into at most 10
    pieces, and the end of each goes to val.bin. An end-of-text token follows every part"""
    streaming: bool = False
    """read openwebtext over the network while encoding, instead of downloading it first (24 GB, and
    40 GB unpacked). Your own files are never stored"""
    overwrite: bool = False
    """replace another preparation in out_dir"""
    max_documents: int = 0
    """read at most this many documents (of each split, if the corpus has official ones); 0 = all"""
    column: str | None = None
    """the column or key that holds the text in .csv, .json, .jsonl and .parquet files; by default
    text, or another usual name"""
    on_bad_file: Literal["stop", "skip"] = "stop"
    """what to do when something cannot be read (not UTF-8, corrupt, no such column): stop and name
    it, or skip the file or line and count it. If a file breaks off, what came before is kept"""

    def problems(self) -> list[str]:
        """Everything that is wrong with the flags and at the start of the files, in words."""
        problems = name_problems(self.tokenizer)
        if self.num_proc < 1:
            problems.append(f"--num_proc={self.num_proc} must be at least 1")
        if self.max_documents < 0:
            problems.append(
                f"--max_documents={self.max_documents} must be at least 1, or 0 for all"
            )
        if self.val_fraction is not None and not 0 < self.val_fraction < 1:
            problems.append(
                f"--val_fraction={self.val_fraction} must be between 0 and 1, both excluded"
            )
        if not self.source:
            problems.append(f"name a --source: {', '.join(CORPORA)}, or files and folders")
        elif self.corpus:
            problems += self.corpus.problems(self.column, self.val_fraction)
        else:
            skip = self.on_bad_file == "skip"
            problems += source_problems(self.source, list(CORPORA), self.column, skip)
            if len(self.source) > 1 and not self.out_dir:
                problems.append("several sources: name the --out_dir")
        return problems

    @property
    def corpus(self) -> Corpus | None:
        """The corpus that `source` names, or None for files."""
        return CORPORA.get(self.source[0]) if len(self.source) == 1 else None

    @property
    def out(self) -> Path:
        """The folder to write, absolute, links followed."""
        source = Path(os.path.realpath(self.source[0]))
        if self.corpus:
            name = self.corpus.name
        else:
            name = source.name if source.is_dir() else plain_name(source)
        # realpath, unlike Path.resolve, raises no error for a loop of links.
        return Path(os.path.realpath(self.out_dir or f"data/{name}"))

    @property
    def fraction(self) -> float | None:
        """The part of the documents for validation. None when the source has its own splits."""
        default = self.corpus.val_fraction if self.corpus else 0.05
        return self.val_fraction or default


def main(argv: list[str] | None = None) -> None:
    """Prepares what a command line asks for, by default that of the process.

    Raises: UserError. Nothing is left behind then.
    """
    [config] = parse(sys.argv[1:] if argv is None else argv, PrepareConfig, words="source")
    prepare(config)


@contextlib.contextmanager
def errors_named() -> Iterator[None]:
    """Turns an error of the system, such as a full disk, into a UserError that says where."""
    try:
        yield
    except OSError as error:
        if error.strerror is None:  # Of the network.
            raise UserError(str(error)) from None
        where = error.filename or "writing the token files"
        raise UserError(f"{where}: {error.strerror}") from None


def prepare(config: PrepareConfig) -> None:
    """Reads, encodes and writes one corpus, and prints a summary."""
    start = time.perf_counter()

    # Find the source, and whether this very preparation is there already.
    out, corpus = config.out, config.corpus
    if corpus and Path(corpus.name).exists():
        print(
            f"note: --source={corpus.name} is a corpus; for the file or folder of that name here"
            f" write ./{corpus.name}",
            file=sys.stderr,
        )
    found = Found() if corpus else find(config.source)
    if found.folders.intersection(map(str, (out, *out.parents))):
        raise UserError(f"--out_dir={out} lies in a folder that is read: name another")
    identity = {
        "format_version": 1,
        "source": corpus.name if corpus else source_names(config.source),
        "tokenizer": config.tokenizer,
    }
    settings = {
        "val_fraction": config.fraction,
        "max_documents": config.max_documents,
        "column": config.column,
        "input": corpus.version if corpus else contents_hash(found),
    }
    if config.on_bad_file == "skip":
        settings["on_bad_file"] = "skip"
    if is_prepared(out, identity | {"settings": settings}, config.overwrite):
        print(f"{shown(out)} is already prepared")
        return

    with errors_named(), partial_folder(out) as folder:
        tokenizer = make_tokenizer(config, found, folder)

        # Encode the documents in parallel, and write the token files.
        tally = Tally()
        documents = read(config, found, tally)
        documents = tqdm(documents, "encoding", unit=" documents", disable=None)
        encoded = encode_documents(documents, tokenizer, folder, config.num_proc)
        splits = write_tokens(encoded, tokenizer.dtype, folder)
        check_splits(splits, tally)

        # Describe them in meta.json, and put everything in its place.
        write_meta(folder, identity, settings, tokenizer, splits, tally)
        # In the meantime another process or the user may have written there.
        if not is_prepared(out, identity | {"settings": settings}, config.overwrite):
            publish(folder, out)

    # Say what was done.
    print_splits(splits, tally, config.fraction, found.left_out)
    print_warnings(splits, tokenizer, config.fraction, out)
    seconds = time.perf_counter() - start
    tokens = sum(split["tokens"] for split in splits.values())
    print(f"{shown(out)}: {tokens:,} tokens in {seconds:.1f} s, {tokens / seconds:,.0f} tokens/s")


def shown(folder: Path) -> Path:
    """The folder (absolute, links followed), relative if it is inside the current folder."""
    here = Path.cwd()
    return folder.relative_to(here) if folder.is_relative_to(here) else folder


def make_tokenizer(config: PrepareConfig, found: Found, folder: Path) -> Tokenizer:
    """Loads the tokenizer. bpe:N and char are first trained on the training split."""
    if is_trained(config.tokenizer):
        tally, splits = Tally(), set[str]()
        texts = training_texts(read(config, found, tally), splits)
        texts = tqdm(texts, "training the tokenizer", unit=" documents", disable=None)
        train_tokenizer(config.tokenizer, texts, folder)
        check_splits(splits, tally)
    return load_tokenizer(config.tokenizer, folder)


def training_texts(documents: Iterable[tuple[str, str]], splits: set[str]) -> Iterator[str]:
    """The texts of the training split. Adds the name of each split that has a document."""
    for split, text in documents:
        splits.add(split)
        if split == "train":
            yield text


def read(config: PrepareConfig, found: Found, tally: Tally) -> Iterator[tuple[str, str]]:
    """Yields (split, text) of every document to encode, and counts in `tally` what is read."""
    parts: Mapping[str | None, Iterable[str | None]]
    if config.corpus:
        parts = config.corpus.read(config.streaming)
    else:
        on_broken = tally.skip if config.on_bad_file == "skip" else None
        parts = {None: read_files(found, config.column, on_broken)}
    return split_documents(parts, config.fraction, config.max_documents, tally)


if __name__ == "__main__":
    cli(main)
