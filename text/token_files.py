"""Reads token files: raw token ids, as nanoGPT writes them, with meta.json beside them.

Each split is one file: train.bin, val.bin and, if the corpus has one, test.bin.
"""

import contextlib
import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from base.errors import UserError, nearest
from base.files import json_object, sha256, unseal, write_whole
from text.foreign import NANOGPT_META, ids_problem, layout
from text.tokenizers import (
    BPE_FILE,
    CHAR_FILE,
    TRAINED_FILES,
    Tokenizer,
    is_trained,
    load_tokenizer,
    same_tokens,
    tokenizer_file,
)

VERIFIED = ".verified.json"  # Beside meta.json: the files that matched their sha256 last time.

# The loss over fewer windows is mostly noise. The loss of a token varies by about 3 nats. So 10
# windows of 256 tokens, a small block_size, have a standard error of 3 / sqrt(2560) = 0.06 nats.
# Preparation does not know the block_size, so it uses this product.
FEW_WINDOWS = 10

FEW_TOKENS = FEW_WINDOWS * 256

UNLIKE = 0.1  # Texts of one kind differ less in bytes a token.

LONGER = {  # What makes a split longer.
    "train": "more documents",
    "val": "more documents or a larger --val_fraction",
}

PART = 1 << 20  # Ids that `documents_of` reads at a time.
SAMPLE = 1 << 16  # Without meta.json, so many ids are checked in each of three places of a file.


@dataclass
class Split:
    """One token file.

    Attributes:
        dtype: the type of its ids.
        bytes: the UTF-8 bytes of its text, for bits per byte; 0 if they are unknown.
        sha256: of the file; None without meta.json.
        offset: bytes before the first id.
        stamp: identifies the file on the disk when it was first described.
    """

    path: Path
    dtype: np.dtype
    tokens: int
    bytes: int
    sha256: str | None = None
    offset: int = 0
    stamp: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.stamp and self.path.is_file():
            self.stamp = _stamp(os.stat(self.path))

    @property
    def bytes_per_token(self) -> float:
        return self.bytes / self.tokens

    def identity(self) -> str:
        """Identifies the file: its sha256, or its length if that is unknown."""
        return self.sha256 or f"{self.tokens} tokens"

    def read(self, start: int, count: int) -> np.ndarray:
        """`count` ids from `start`, int64.

        Raises: UserError if the file cannot be read, or has been changed meanwhile.
        """
        # Not memory-mapped, so that resident memory does not grow during training.
        offset = self.offset + start * self.dtype.itemsize
        try:
            with open(self.path, "rb") as file:
                self._check(_stamp(os.fstat(file.fileno())))
                ids = np.fromfile(file, self.dtype, count, offset=offset)
        except OSError as error:
            raise UserError(f"{self.path} cannot be read: {error.strerror or error}") from None
        if len(ids) < min(count, self.tokens - start):  # fromfile hides errors of the disk.
            raise UserError(f"{self.path} cannot be read: only {len(ids)} of {count} ids came")
        return ids.astype(np.int64)

    def _check(self, stamp: tuple[int, ...]) -> None:
        """UserError if the file has another stamp than at first, and other content."""
        if stamp == self.stamp:
            return
        if self.sha256 is None or sha256(self.path) != self.sha256:
            raise UserError(
                f"{self.path} was changed while it was in use: start again, or put the old file"
                " back and resume"
            )
        self.stamp = stamp  # It was copied or touched.


def _stamp(status: os.stat_result) -> tuple[int, ...]:
    """Changes when a file is written or replaced."""
    return status.st_size, status.st_mtime_ns


@dataclass
class Data:
    """A prepared folder.

    Attributes:
        tokenizer: its name.
        splits: by name: train, val and perhaps test.
    """

    folder: Path
    tokenizer: str
    vocab_size: int
    eot_id: int
    mask_id: int
    splits: dict[str, Split]

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer that made the ids."""
        return load_tokenizer(self.tokenizer, self.folder)


def other_kind(train: float, val: float) -> str | None:
    """A sentence if val is another kind of text than train, else None.

    train, val: the bytes of a token in each split; 0 if they are unknown.
    """
    if 0 in (train, val) or abs(val / train - 1) <= UNLIKE:
        return None
    return (
        f"a token of val has {val:.2f} bytes, and one of train {train:.2f}: val is another kind of"
        " text than train, so its loss says little about training"
    )


def data_folder(dataset: str) -> Path:
    """`wiki` -> data/wiki. A name with a separator is a path. So is the name of a folder or
    file that exists, unless data/ has a folder of that name too."""
    path, named = Path(dataset), Path("data") / dataset
    is_path = "/" in dataset or len(path.parts) != 1 or dataset == ".."
    return path if is_path or (path.exists() and not named.is_dir()) else named


def check_tokenizer(run: Path, data: Data) -> None:
    """Raises UserError if a run has its own copy of a tokenizer that the data's does not equal.

    Two folders may have trained a tokenizer of one name on different texts.
    """
    if is_trained(data.tokenizer) and tokenizer_folder(run, "") == run:
        if not same_tokens(load_tokenizer(data.tokenizer, run), data.load_tokenizer()):
            raise UserError(
                f"{data.folder} has another {data.tokenizer} than {run}, so its ids stand for other"
                " tokens: name the data that the run was trained on, or prepare the text with the"
                " run's tokenizer"
            )


def tokenizer_folder(run: Path, dataset: str) -> Path:
    """The folder with a run's trained tokenizer: the run's, or else that of the data."""
    copied = any((run / file).is_file() for file in TRAINED_FILES)
    return run if copied else data_folder(dataset)


def load_data(folder: Path | str, tokenizer: str | None = None) -> Data:
    """The description of a prepared folder, from its meta.json.

    A folder of nanoGPT has no meta.json. For such a folder, name the tokenizer.

    Raises: UserError if the folder, meta.json or a token file is missing, wrong or truncated.
    """
    folder = Path(folder)
    if folder.is_file():
        raise UserError(
            f"{folder} is a file, not a data folder: make one with prepare_openwebtext.py"
            f" --source={folder} --out_dir=data/{folder.stem}, and name it: --dataset={folder.stem}"
        )
    if not folder.is_dir():
        raise UserError(
            f"no data folder {folder}{_nearest_folder(folder)} (make it with"
            f" prepare_openwebtext.py --source=... --tokenizer=... --out_dir={folder})"
        )
    if (folder / "meta.json").is_file():
        data = _with_meta(folder)
        if tokenizer not in (None, data.tokenizer):
            raise UserError(
                f"tokenizer={tokenizer}, but {folder} was prepared with {data.tokenizer}"
            )
        return data
    if not (folder / "train.bin").is_file():
        raise UserError(
            f"{folder} holds no token files: make them with prepare_openwebtext.py"
            f" --source={folder} --out_dir=data/NAME, and name --dataset=NAME"
        )
    if tokenizer is None:
        _, name = _tokenizer_of(folder) or ("", "gpt2")
        raise UserError(
            f"{folder} has no meta.json: prepare it with prepare_openwebtext.py, "
            f"or name the tokenizer of existing .bin files with --tokenizer={name}"
        )
    return _without_meta(folder, tokenizer)


def has_tokenizer(data: Data) -> bool:
    """Whether the file of its tokenizer is there, if the tokenizer was trained."""
    file = tokenizer_file(data.tokenizer) if is_trained(data.tokenizer) else None
    return file is None or any((data.folder / name).is_file() for name in (file, NANOGPT_META))


def documents_of(data: Data, split: str) -> Iterator[np.ndarray]:
    """Yields the ids of each document of a split, int64, with an end-of-text id in front.

    The end-of-text id after a document is not part of it. Empty documents are skipped.
    """
    file, rest = data.splits[split], np.array([data.eot_id])
    for start in range(0, file.tokens, PART):
        ids = np.concatenate((rest, file.read(start, min(PART, file.tokens - start))))
        starts = np.flatnonzero(ids == data.eot_id)
        for begin, end in itertools.pairwise(starts):
            if end > begin + 1:
                yield ids[begin:end]
        rest = ids[starts[-1] :]  # The document in which this part ends.
    if len(rest) > 1:
        yield rest


def verify(data: Data) -> None:
    """Compares the token files with their sha256 in meta.json.

    A file is read at its first use, and again if it has changed.

    Raises: UserError that names the file that differs.
    """
    stamp = data.folder / VERIFIED
    try:
        known = json_object(stamp.read_text(encoding="utf-8", errors="replace")) or {}
    except OSError:
        known = {}
    now = {}
    for split in data.splits.values():
        name, about = split.path.name, split.path.stat()
        now[name] = [split.sha256, about.st_size, about.st_mtime_ns]
        if now[name] == known.get(name) or not split.sha256:
            continue
        if sha256(split.path) != split.sha256:
            raise UserError(
                f"{split.path} is corrupt: it does not match its sha256 in meta.json; prepare the"
                " folder again with prepare_openwebtext.py --overwrite=true"
            )
    if now != known:
        # If the disk is full or read-only, the files are compared again next time.
        with contextlib.suppress(OSError):
            write_whole(stamp, json.dumps(now))


def _nearest_folder(folder: Path) -> str:
    """`; did you mean X?` for a missing folder, from the folders beside it."""
    if not folder.parent.is_dir():
        return ""
    there = [path.name for path in folder.parent.iterdir() if path.is_dir()]
    return nearest(folder.name, there) if there else ""


def _with_meta(folder: Path) -> Data:
    """The data of a folder with meta.json. UserError if it or a token file is wrong."""
    again = "prepare the folder again with prepare_openwebtext.py --overwrite=true"
    try:
        data = _read_meta(folder)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{folder}/meta.json is wrong ({what}): {again}") from None
    for split in data.splits.values():
        expected = split.tokens * split.dtype.itemsize
        size = split.path.stat().st_size if split.path.is_file() else -1
        if size != expected:
            state = "is missing" if size < 0 else f"is truncated, or another file: {size:,} bytes"
            raise UserError(f"{split.path} {state}, meta.json says {expected:,}: {again}")
    return data


def _read_meta(folder: Path) -> Data:
    """The content of meta.json. ValueError, KeyError, TypeError or AttributeError if wrong."""
    meta = unseal((folder / "meta.json").read_bytes())
    dtype = np.dtype(meta["dtype"]).newbyteorder("<")
    splits = {}
    for name, entry in meta["splits"].items():
        path = folder / entry["file"]
        splits[name] = Split(path, dtype, entry["tokens"], entry["bytes"], entry.get("sha256"))
    data = Data(
        folder=folder,
        tokenizer=meta["tokenizer"],
        vocab_size=int(meta["vocab_size"]),
        eot_id=int(meta["eot_id"]),
        mask_id=int(meta["mask_id"]),
        splits=splits,
    )
    filled = all(split.tokens > 0 and split.bytes > 0 for split in splits.values())
    if not ({"train", "val"} <= set(splits) and dtype.kind == "u" and filled):
        raise ValueError("it needs dtype uint16 or uint32 and non-empty splits train and val")
    return data


def _without_meta(folder: Path, tokenizer: str) -> Data:
    """The data of a folder from nanoGPT or llm.c.

    Raises: UserError if its ids are not those of the tokenizer.
    """
    file, own = _tokenizer_of(folder) or ("", tokenizer)
    if tokenizer.partition(":")[0] != own.partition(":")[0]:
        raise UserError(
            f"{folder} holds {file}, the file of its tokenizer: use --tokenizer={own}, not"
            f" {tokenizer}"
        )
    words = load_tokenizer(tokenizer, folder)
    splits = {name: _token_file(folder / f"{name}.bin", words) for name in ("train", "val")}
    val = splits["val"]
    # Only bits per byte needs it, and only for val.
    for start in range(0, val.tokens, 2**16):
        ids = val.read(start, 2**16)
        val.bytes += len(words.decode(ids[ids != words.eot_id]).encode())
    val.bytes = max(1, val.bytes)
    return Data(folder, tokenizer, words.vocab_size, words.eot_id, words.mask_id, splits)


def _tokenizer_of(folder: Path) -> tuple[str, str] | None:
    """The file of a tokenizer in a folder without meta.json, and its --tokenizer. None if there is
    none."""
    names = {BPE_FILE: "bpe:N (N is its number of tokens)", CHAR_FILE: "char", NANOGPT_META: "char"}
    return next(((file, name) for file, name in names.items() if (folder / file).is_file()), None)


def _token_file(path: Path, words: Tokenizer) -> Split:
    """A token file without meta.json.

    Raises: UserError if it cannot be text of the tokenizer.
    """
    found = layout(path, words.dtype)
    if found.offset and words.name != "gpt2":  # Only llm.c's files have a header.
        raise UserError(
            f"{path} holds GPT-2's tokens, as its header says: use --tokenizer=gpt2, not"
            f" {words.name}"
        )
    split = Split(path, found.dtype, found.tokens, 0, offset=found.offset)
    places = {0, split.tokens // 2 // 4 * 4, max(0, split.tokens - SAMPLE) // 4 * 4}
    sample = np.concatenate([split.read(place, SAMPLE) for place in sorted(places)])
    trained = is_trained(words.name)
    if problem := ids_problem(sample, split.dtype, words.name, words.vocab_size, trained):
        raise UserError(f"{path}: {problem}")
    return split
