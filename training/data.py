"""Token files and the order in which training reads them.

A split is a raw file of token ids, `train.bin` or `val.bin`, as nanoGPT writes it, with `meta.json`
beside it. A window is block_size tokens of it (and one more, the last target). Which window a slot
of a step reads is a pure function of (seed, step, slot): it does not depend on the number of
processes, on accumulation, evaluation or resuming, and no shuffled array exists.
"""

import contextlib
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from harmonic import IGNORE_INDEX
from text.foreign import NANOGPT_META, ids_problem, layout
from training.config import UserError, nearest
from training.files import sha256, unseal, write_whole
from training.tokenizer import BPE_FILE, CHAR_FILE, Tokenizer, load_tokenizer

VERIFIED = ".verified.json"  # beside meta.json: the files last compared with their sha256
MASKED = (
    0.15  # share of a window's tokens that masked-language training predicts (BERT, section 3.1)
)

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

    def rows(self, arch: str) -> int:
        """Rows a model's token table needs: the vocabulary, and for bert the mask token if it lies
        beyond."""
        return max(self.vocab_size, self.mask_id + 1 if arch == "bert" else 0)


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


def split_problems(data: Data, block_size: int) -> list[str]:
    """An error for each split that does not hold one window."""
    problems = []
    for name in ("train", "val"):
        split = data.splits[name]
        if split.tokens <= block_size:
            problems.append(
                f"block_size={block_size} is longer than the data: {split.path} has"
                f" {split.tokens:,} tokens. "
                f"Use a smaller --block_size, or prepare {LONGER[name]}"
            )
    return problems


def split_warnings(data: Data, block_size: int) -> list[str]:
    """A warning for each split of so few windows that its loss says little."""
    warnings = []
    for name in ("train", "val"):
        split = data.splits[name]
        windows = (split.tokens - 1) // block_size
        if 0 < windows < FEW_WINDOWS:
            warnings.append(
                f"{split.path} holds {windows} window{'s' if windows > 1 else ''} of"
                f" block_size={block_size}, so its loss is mostly noise. "
                f"Use a smaller --block_size, or prepare {LONGER[name]}"
            )
    return warnings


def _hash(*key) -> int:
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")


def permute(i: int, n: int, key: int) -> int:
    """A keyed bijection of range(n), without a table: a four-round Feistel network on the next even
    number of bits, walked until it lands inside (Black and Rogaway 2002, cycle walking)."""
    half = max(
        4, ((n - 1).bit_length() + 1) // 2
    )  # halves of fewer bits mix badly: far from uniform in a chi-squared test
    mask = (1 << half) - 1
    while True:
        left, right = i >> half, i & mask
        for r in range(4):
            mixed = (right + key + r * 0x9E3779B97F4A7C15) & (2**64 - 1)
            mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
            mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
            left, right = right, left ^ ((mixed ^ (mixed >> 31)) & mask)
        i = (left << half) | right
        if i < n:
            return i


def index(seed: int, step: int, slot: int, slots: int, tokens: int, block_size: int) -> int:
    """First token of the window that `slot` (0..slots-1) of `step` reads, in a split of `tokens`
    tokens.

    Windows are drawn without replacement: an epoch visits each once, in an order of its own,
        shifted by an offset of its own so that
    window borders move from epoch to epoch.
    """
    windows = max(1, (tokens - 1) // block_size - 1)
    epoch, i = divmod(step * slots + slot, windows)
    shift = _hash("shift", seed, epoch) % min(block_size, tokens - windows * block_size)
    return shift + block_size * permute(i, windows, _hash("order", seed, epoch))


def validation_windows(tokens: int, block_size: int, count: int) -> list[int]:
    """First tokens of at most `count` windows spread evenly over a split: always the same ones."""
    windows = (tokens - 1) // block_size
    count = min(count, windows)
    return [i * windows // count * block_size for i in range(count)]


def masked_count(block_size: int) -> int:
    """Tokens predicted in a window of masked-language training: the same number in each, so that
    every window weighs the same."""
    return max(1, round(MASKED * block_size))


def predicted_count(arch: str, block_size: int) -> int:
    """Tokens predicted in a window: all, or bert's masked ones."""
    return masked_count(block_size) if arch == "bert" else block_size


def mask_tokens(window: np.ndarray, data: Data, key: tuple) -> tuple[np.ndarray, np.ndarray]:
    """BERT's noise on one window (T,) -> (input (T,), targets (T,)): of the chosen tokens 80 %
    become the mask, 10 % a random token and
    10 % stay. The end-of-text token is not chosen while others are left. `key` determines the
    draw."""
    rng = np.random.default_rng(_hash("mask", *key))
    order = rng.permutation(len(window))
    order = order[np.argsort(window[order] == data.eot_id, kind="stable")]
    chosen = order[: masked_count(len(window))]
    x, y = window.copy(), np.full_like(window, IGNORE_INDEX)
    y[chosen] = window[chosen]
    action = rng.random(len(chosen))
    x[chosen[action < 0.8]] = data.mask_id
    other = chosen[action >= 0.9]
    x[other] = rng.integers(0, data.vocab_size, len(other))
    return x, y


def batch(
    split: Split, data: Data, starts: list[int], block_size: int, masked: list[tuple] | None = None
):
    """Windows at `starts` -> (inputs, targets), int64 (B, T) each: the next token, or with `masked`
    (a key each) BERT's noise."""
    windows = [split.read(start, block_size + (masked is None)) for start in starts]
    highest = max(w.max() for w in windows)
    if highest >= data.vocab_size:
        raise UserError(
            f"{split.path} holds the id {highest}, but its vocabulary {data.tokenizer} has"
            f" {data.vocab_size}: prepare it again"
        )
    if masked is None:
        both = np.stack(windows)
        return torch.from_numpy(both[:, :-1].copy()), torch.from_numpy(both[:, 1:].copy())
    x, y = zip(
        *(mask_tokens(w, data, key) for w, key in zip(windows, masked, strict=True)), strict=True
    )
    return torch.from_numpy(np.stack(x)), torch.from_numpy(np.stack(y))


def training_batches(
    data: Data,
    arch: str,
    block_size: int,
    seed: int,
    step: int,
    slots: range,
    total: int,
    batch_size: int,
):
    """The micro-batches of this process's `slots` (of `total`) at a step: yields (inputs, targets)
    of at most batch_size windows."""
    split = data.splits["train"]
    for i in range(0, len(slots), batch_size):
        part = slots[i : i + batch_size]
        starts = [index(seed, step, s, total, split.tokens, block_size) for s in part]
        yield batch(
            split,
            data,
            starts,
            block_size,
            [(seed, step, s) for s in part] if arch == "bert" else None,
        )


def validation_batches(
    data: Data, arch: str, block_size: int, starts: list[int], batch_size: int, split: str = "val"
):
    """The given validation windows in batches, with noise that depends on the window alone."""
    for i in range(0, len(starts), batch_size):
        part = starts[i : i + batch_size]
        yield batch(
            data.splits[split],
            data,
            part,
            block_size,
            [("val", s) for s in part] if arch == "bert" else None,
        )
