"""Tokenizers by name: gpt2, qwen, bert, char, and bpe:N.

The first three are published vocabularies. The last two are trained on the training split. Their
file is beside the token files.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from base.errors import UserError, nearest
from text.tokenizers.bpe import (
    BPE_FILE,
    BPE_MAXIMUM,
    BPE_MINIMUM,
    copy_bpe,
    load_bpe,
    rust_bpe,
    rust_vocabulary,
    train_bpe,
)
from text.tokenizers.characters import (
    CHAR_FILE,
    copy_char,
    load_char,
    read_characters,
    rust_char,
    train_char,
)
from text.tokenizers.published import (
    load_bert,
    load_gpt2,
    load_qwen,
    rust_bert,
    rust_gpt2,
    rust_qwen,
)
from text.tokenizers.tokenizer import EOT, MASK, Tokenizer, well_formed

if TYPE_CHECKING:
    # At run time it is imported only where it is used. Training on token files does not need it.
    from tokenizers import Tokenizer as RustTokenizer

__all__ = [
    "BPE_FILE",
    "CHAR_FILE",
    "EOT",
    "MASK",
    "TOKENIZERS",
    "TRAINED_FILES",
    "Tokenizer",
    "copy_tokenizer",
    "is_trained",
    "load_tokenizer",
    "name_problems",
    "read_characters",
    "rust_tokenizer",
    "rust_vocabulary",
    "same_tokens",
    "tokenizer_file",
    "train_bpe",
    "train_char",
    "train_tokenizer",
    "well_formed",
]


@dataclass(frozen=True)
class Kind:
    """What can be done with one kind of tokenizer.

    Attributes:
        load: makes the Tokenizer. For a trained kind its arguments are (name, folder). For a
            published vocabulary it has none.
        rust: makes the same tokenizer as one of the package tokenizers. Arguments as for `load`.
        file: the file of a trained tokenizer, beside the token files. None for a published one.
        train: makes that file. Its arguments are (texts, folder), or (texts, vocab_size, folder) if
            the name has a size.
        copy: copies that file from the folder of token files into the folder of a run.
    """

    load: Callable[..., Tokenizer]
    rust: Callable[..., "RustTokenizer"]
    file: str | None = None
    train: Callable[..., None] | None = None
    copy: Callable[[Path, Path], None] | None = None


TOKENIZERS = {
    "gpt2": Kind(load_gpt2, rust_gpt2),
    "qwen": Kind(load_qwen, rust_qwen),
    "bert": Kind(load_bert, rust_bert),
    "char": Kind(load_char, rust_char, CHAR_FILE, train_char, copy_char),
    "bpe": Kind(load_bpe, rust_bpe, BPE_FILE, train_bpe, copy_bpe),
}
TRAINED_FILES = [kind.file for kind in TOKENIZERS.values() if kind.file]


def name_problems(name: str) -> list[str]:
    """What is wrong with a tokenizer's name, in words; empty for a valid one."""
    if not name:
        return [
            "no tokenizer is named: write one, such as `tokenizer: gpt2`, into the run's"
            " config.yaml"
        ]
    bpe = re.fullmatch(r"bpe:([0-9]+)", name)
    if bpe and int(bpe[1]) > BPE_MAXIMUM:
        return [f"tokenizer {name}: a BPE has at most {BPE_MAXIMUM:,} tokens here"]
    if bpe and int(bpe[1]) < BPE_MINIMUM:
        return [
            f"tokenizer {name}: a byte-level BPE has at least {BPE_MINIMUM} tokens, 256 bytes and 2"
            " special ones"
        ]
    if bpe or name in TOKENIZERS and name != "bpe":
        return []
    if name.startswith("bpe"):
        size = "".join(filter(str.isdecimal, name)) or "4096"
        return [f"unknown tokenizer {name!r}: write the vocabulary's size, as in bpe:{size}"]
    names = [*TOKENIZERS, "bpe:4096"]
    names.remove("bpe")
    return [f"unknown tokenizer {name!r}{nearest(name, names)}"]


def load_tokenizer(name: str, folder: Path | None = None) -> Tokenizer:
    """The tokenizer called `name`.

    Args:
        folder: holds the file of a trained tokenizer, beside the token files.
    Raises: UserError for an unknown name, a vocabulary that cannot be downloaded, or a missing or
        corrupt file.
    """
    kind = _kind(name)
    return kind.load(name, folder) if kind.file else kind.load()


def rust_tokenizer(name: str, folder: Path | None = None) -> "RustTokenizer":
    """The tokenizer called `name` as one of the package tokenizers, which transformers reads.

    It gives the same ids. Raises: UserError as `load_tokenizer`, and always for char.
    """
    kind = _kind(name)
    return kind.rust(name, folder) if kind.file else kind.rust()


def is_trained(name: str) -> bool:
    """Whether a tokenizer is trained on the training split."""
    return tokenizer_file(name) is not None


def tokenizer_file(name: str) -> str | None:
    """The name of a trained tokenizer's file, beside the token files. None for other names."""
    kind = TOKENIZERS.get(name.partition(":")[0])
    return kind.file if kind else None


def train_tokenizer(name: str, texts: Iterable[str], folder: Path) -> None:
    """Trains `bpe:N` or `char` on texts and saves it in `folder`."""
    train = _kind(name).train
    assert train, f"{name} is a published vocabulary"
    size = name.partition(":")[2]
    if size:
        train(texts, int(size), folder)
    else:
        train(texts, folder)


def copy_tokenizer(name: str, data: Path, run: Path) -> None:
    """Copies a trained tokenizer from the folder of its token files into the folder of a run.

    So you can sample from the run on any machine.
    """
    if is_trained(name) and (copy := _kind(name).copy):
        copy(data, run)


def same_tokens(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether every id stands for the same bytes in both."""
    if one.vocab_size != other.vocab_size:
        return False
    return all(one.bytes_of(i) == other.bytes_of(i) for i in range(one.vocab_size))


def _kind(name: str) -> Kind:
    """The entry of TOKENIZERS for a name. UserError for an unknown one."""
    if problems := name_problems(name):
        raise UserError(problems[0])
    return TOKENIZERS[name.partition(":")[0]]
