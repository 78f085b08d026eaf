"""Token files of other projects: nanoGPT's characters, llm.c's header, ids of another width.

No code in a file is executed. From meta.pkl only what Python builds without an import is read:
dictionaries, lists, numbers and texts.
"""

import io
import pickle
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from base.errors import UserError

NANOGPT_META = "meta.pkl"  # beside the token files of nanoGPT's shakespeare_char
LLMC_HEADER = 256  # int32 numbers before the ids: magic number, version, count of tokens, zeros
LLMC_GPT2, LLMC_LLAMA3, LLMC_EVAL = 20240520, 20240801, 20240522  # llm.c, dev/data/data_common.py
LEAST_IDS = 32  # Fewer ids do not show how wide they are.
CHARACTERS_ONLY = 256  # Only vocabularies of characters or bytes have all ids below this.
MANY_IDS = 1000  # In ordinary text, some of so many tokens are words.


# ---- nanoGPT's meta.pkl --------------------------------------------------------------------------

# What `pickle` raises for a file that is cut short, or no pickle, and what a wrong mapping raises.
NOT_A_VOCABULARY = (
    pickle.UnpicklingError,
    struct.error,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    OverflowError,
    MemoryError,
)


class PlainUnpickler(pickle._Unpickler):
    """Refuses everything that needs an import. So nothing in a file can call a function.

    It is the reader in Python. That in C allocates as much memory as a file asks for, and so does
    the instruction that is left out here.
    """

    dispatch = {k: v for k, v in pickle._Unpickler.dispatch.items() if k != pickle.BYTEARRAY8[0]}

    def find_class(self, module: str, name: str) -> Any:
        raise ValueError(f"it holds {module}.{name}, which is more than numbers and text")

    def persistent_load(self, pid: Any) -> Any:
        raise ValueError("it refers to another file")


def nanogpt_characters(path: Path) -> str:
    """The characters in nanoGPT's meta.pkl, in the order of ids. UserError for another file."""
    try:
        meta = PlainUnpickler(io.BytesIO(path.read_bytes())).load()
        names = meta["itos"]
        characters = "".join(names[i] for i in range(len(names)))
        if len(characters) != len(names) or len(set(characters)) != len(names) or not characters:
            raise ValueError("an id stands for more or less than one character")
        if meta["stoi"] != {character: i for i, character in names.items()}:
            raise ValueError("itos and stoi differ")
        characters.encode("utf-8")
    except NOT_A_VOCABULARY as error:
        what = str(error) or "it is cut short"
        if isinstance(error, KeyError):
            what = f"it has no {error}"
        problem = f"{path} is not nanoGPT's vocabulary of characters ({what})"
        raise UserError(f"{problem}; nothing in it was run") from None
    return characters


# ---- llm.c's header ------------------------------------------------------------------------------


@dataclass
class Layout:
    """Where the ids are in a token file: their type, the bytes before them, and their number."""

    dtype: np.dtype
    offset: int
    tokens: int


def layout(path: Path, dtype: np.dtype) -> Layout:
    """The layout of a token file of nanoGPT (ids of type `dtype`) or llm.c (from its header).

    Raises: UserError for a file that is missing, empty, truncated, or of an unknown tokenizer.
    """
    size = path.stat().st_size if path.is_file() else 0
    if size < dtype.itemsize:
        raise UserError(f"{path} is missing or empty")
    start = np.fromfile(path, "<i4", 3) if size >= 4 * LLMC_HEADER else np.zeros(3)
    magic, version, tokens = map(int, start)
    if magic == LLMC_EVAL:
        raise UserError(f"{path} holds llm.c's questions for an evaluation, not text")
    if magic == LLMC_LLAMA3:
        raise UserError(
            f"{path} holds llm.c's Llama 3 tokens, unknown here: prepare the text again"
        )
    if magic == LLMC_GPT2:
        return _with_header(path, version, tokens, size)
    if size % dtype.itemsize:
        what = f"{size:,} bytes are not a whole number of {dtype.name} ids"
        raise UserError(f"{path} is truncated, or not a token file: {what}")
    return Layout(dtype, 0, size // dtype.itemsize)


def _with_header(path: Path, version: int, tokens: int, size: int) -> Layout:
    """The layout of llm.c's GPT-2 tokens."""
    if version != 1:
        raise UserError(f"{path} has llm.c's header of version {version}; only version 1 is known")
    found = Layout(np.dtype("<u2"), 4 * LLMC_HEADER, tokens)
    expected = found.offset + tokens * found.dtype.itemsize
    if size != expected or tokens < 1:
        what = f"{size:,} bytes, its llm.c header says {expected:,}"
        raise UserError(f"{path} is truncated, or not a token file: {what}")
    return found


# ---- ids that do not fit -------------------------------------------------------------------------


def ids_problem(
    ids: np.ndarray, dtype: np.dtype, tokenizer: str, vocab_size: int, trained: bool
) -> str | None:
    """Why a sample of ids cannot be text of this tokenizer, in words. None if it can.

    Args:
        ids: pieces of the file, read as `dtype`. Each begins at a multiple of 4 ids.
        trained: whether the tokenizer was trained on the text. A small one may have only ids of
            characters and bytes.
    """
    if len(ids) < LEAST_IDS:
        return None
    if not ids[1::2].any() and ids[::2].any():
        wider = 4 if not ids[2::4].any() else 2  # NumPy's default is int64.
        wide = f"uint{8 * wider * dtype.itemsize}"
        return (
            f"its ids are {wide} (every second {dtype.name} is 0), and {tokenizer} needs "
            f"{dtype.name}. Convert it with numpy: "
            f"np.fromfile(FILE, np.{wide}).astype(np.{dtype.name}).tofile(NEW_FILE)"
        )
    if ids.max() >= vocab_size:
        narrow = " or its ids are uint16" if dtype.itemsize == 4 else ""
        beyond = f"it holds the id {ids.max():,}, but {tokenizer} has {vocab_size:,}"
        return f"{beyond}: another tokenizer made it{narrow}"
    if not trained and len(ids) >= MANY_IDS and ids.max() < CHARACTERS_ONLY:
        low = f"all ids are below {CHARACTERS_ONLY}"
        return f"{low}: they look like characters, not tokens of {tokenizer}; use --tokenizer=char"
    return None
