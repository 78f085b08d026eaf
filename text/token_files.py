"""Token files: a split is a raw file of token ids, `train.bin` or `val.bin`, as nanoGPT writes it,
with `meta.json` beside it."""

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from base.errors import UserError, nearest
from base.files import sha256, unseal, write_whole
from text.foreign import NANOGPT_META, ids_problem, layout
from text.tokenizers import BPE_FILE, CHAR_FILE, Tokenizer, load_tokenizer

VERIFIED = ".verified.json"  # beside meta.json: the files last compared with their sha256

# A validation loss over fewer windows is mostly noise. The loss of a token varies by about 3 nats,
# so 10 windows of 256 tokens, a small block_size, leave a standard error of 3 / sqrt(2560) = 0.06
# nats. Preparation does not know the block_size and uses that product.
FEW_WINDOWS = 10

FEW_TOKENS = FEW_WINDOWS * 256

LONGER = {  # how to prepare a longer split
    "train": "more documents",
    "val": "more documents or a larger --val_fraction",
}

SAMPLE = 1 << 16  # ids looked at in each of three places of a file that no meta.json describes


@dataclass
class Split:
    """One token file. `bytes`: UTF-8 bytes of the text behind it, for bits per byte. `offset`:
    bytes before the first id."""

    path: Path
    dtype: np.dtype
    tokens: int
    bytes: int
    sha256: str | None = None
    offset: int = 0

    def identity(self) -> str:
        """What tells it from other files: its sha256, or its length where no meta.json gives
        one."""
        return self.sha256 or f"{self.tokens} tokens"

    def read(self, start: int, count: int) -> np.ndarray:
        """`count` ids from `start`, int64. Read, not memory-mapped: resident memory stays flat
        however long training runs."""
        offset = self.offset + start * self.dtype.itemsize
        return np.fromfile(self.path, self.dtype, count, offset=offset).astype(np.int64)


@dataclass
class Data:
    """A prepared folder: `splits` by name, and what the model and the metrics need to know of its
    tokenizer."""

    folder: Path
    tokenizer: str
    vocab_size: int
    eot_id: int
    mask_id: int
    splits: dict[str, Split]

    def load_tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.tokenizer, self.folder)


def data_folder(dataset: str) -> Path:
    """`wiki` -> data/wiki; anything with a separator, or a folder that exists, is a path."""
    path = Path(dataset)
    return path if path.is_dir() or len(path.parts) > 1 else Path("data") / dataset


def tokenizer_folder(run: Path, dataset: str) -> Path:
    """Where a run's trained tokenizer lies: in the run, or, for runs without a copy, beside the
    data."""
    copied = (run / BPE_FILE).is_file() or (run / CHAR_FILE).is_file()
    return run if copied else data_folder(dataset)


def load_data(folder, tokenizer: str | None = None) -> Data:
    """Reads a prepared folder's meta.json; a nanoGPT folder without one is read when its tokenizer
    is named.

    Raises: UserError when the folder, meta.json or a token file is missing, wrong or truncated.
    """
    folder = Path(folder)
    if not folder.is_dir():
        there = (
            [p.name for p in folder.parent.iterdir() if p.is_dir()]
            if folder.parent.is_dir()
            else []
        )
        near = nearest(folder.name, there) if there else ""
        raise UserError(
            f"no data folder {folder}{near} (make it with prepare_openwebtext.py"
            f" --out_dir={folder})"
        )
    if not (folder / "meta.json").is_file():
        if not (folder / "train.bin").is_file():
            raise UserError(
                f"{folder} holds no token files: make them with prepare_openwebtext.py"
                f" --source={folder} --out_dir=data/NAME,"
                " and name --dataset=NAME"
            )
        if tokenizer is None:
            name = "char" if (folder / NANOGPT_META).is_file() else "gpt2"
            raise UserError(
                f"{folder} has no meta.json: prepare it with prepare_openwebtext.py, "
                f"or name the tokenizer of existing .bin files with --tokenizer={name}"
            )
        return _without_meta(folder, tokenizer)
    try:
        meta = unseal((folder / "meta.json").read_bytes())
        dtype = np.dtype(meta["dtype"]).newbyteorder("<")
        splits = {
            n: Split(folder / s["file"], dtype, s["tokens"], s["bytes"], s.get("sha256"))
            for n, s in meta["splits"].items()
        }
        data = Data(
            folder,
            meta["tokenizer"],
            int(meta["vocab_size"]),
            int(meta["eot_id"]),
            int(meta["mask_id"]),
            splits,
        )
        complete = (
            {"train", "val"} <= set(splits)
            and dtype.kind == "u"
            and all(s.tokens > 0 and s.bytes > 0 for s in splits.values())
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(
            f"{folder}/meta.json is wrong ({what}): prepare the folder again with"
            " prepare_openwebtext.py --overwrite=true"
        ) from None
    if tokenizer not in (None, data.tokenizer):
        raise UserError(f"tokenizer={tokenizer}, but {folder} was prepared with {data.tokenizer}")
    if not complete:
        raise UserError(
            f"{folder}/meta.json is wrong (it needs dtype uint16 or uint32 and non-empty splits"
            " train and val): prepare the folder again"
        )
    for split in splits.values():
        expected = split.tokens * split.dtype.itemsize
        size = split.path.stat().st_size if split.path.is_file() else -1
        if size != expected:
            state = "is missing" if size < 0 else f"is truncated or foreign: {size:,} bytes"
            raise UserError(
                f"{split.path} {state}, meta.json says {expected:,}: prepare the folder again"
            )
    return data


def verify(data: Data):
    """Compares the token files with the sha256 in meta.json: at their first use and whenever they
    have changed since. UserError naming the file that differs."""
    stamp = data.folder / VERIFIED
    try:
        known = json.loads(stamp.read_bytes())
    except (OSError, ValueError):
        known = {}
    now = {}
    for split in data.splits.values():
        about = split.path.stat()
        now[split.path.name] = [split.sha256, about.st_size, about.st_mtime_ns]
        if (
            split.sha256
            and now[split.path.name] != known.get(split.path.name)
            and sha256(split.path) != split.sha256
        ):
            raise UserError(
                f"{split.path} is damaged: it does not match its sha256 in meta.json; prepare the"
                " folder again"
            )
    if now != known:
        with contextlib.suppress(
            OSError
        ):  # a disk that is full or read-only: the files are compared again the next time
            write_whole(stamp, json.dumps(now))


def _without_meta(folder: Path, tokenizer: str) -> Data:
    """The data of a folder that nanoGPT or llm.c made. UserError when its ids are not those of the
    tokenizer."""
    if tokenizer != "char" and (folder / NANOGPT_META).is_file():
        raise UserError(
            f"{folder} holds nanoGPT's {NANOGPT_META}, so its tokens are characters: use"
            f" --tokenizer=char, not {tokenizer}"
        )
    words = load_tokenizer(tokenizer, folder)
    splits = {name: _token_file(folder / f"{name}.bin", words) for name in ("train", "val")}
    val = splits["val"]  # bits per byte needs the bytes of val only
    pieces = (val.read(i, 2**16) for i in range(0, val.tokens, 2**16))
    val.bytes = max(1, sum(len(words.decode(ids[ids != words.eot_id]).encode()) for ids in pieces))
    return Data(folder, tokenizer, words.vocab_size, words.eot_id, words.mask_id, splits)


def _token_file(path: Path, words: Tokenizer) -> Split:
    """A token file that no meta.json describes. UserError when it cannot be text of the
    tokenizer."""
    found = layout(path, np.dtype("<u2" if words.vocab_size <= 2**16 - 1 else "<u4"))
    split = Split(path, found.dtype, found.tokens, 1, offset=found.offset)
    places = {0, split.tokens // 2 // 4 * 4, max(0, split.tokens - SAMPLE) // 4 * 4}
    sample = np.concatenate([split.read(place, SAMPLE) for place in sorted(places)])
    if problem := ids_problem(sample, split.dtype, words.name, words.vocab_size):
        raise UserError(f"{path}: {problem}")
    return split
