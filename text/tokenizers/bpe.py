"""bpe:N, a byte-level BPE of N tokens that is trained on your own text."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from base.errors import UserError
from base.files import write_whole
from text.tokenizers.tokenizer import EOT, MASK, Tokenizer, well_formed

if TYPE_CHECKING:
    # At run time it is imported only where it is used. Training on token files does not need it.
    from tokenizers import Tokenizer as RustTokenizer

BPE_FILE = "tokenizer.json"  # Beside the token files.
BPE_MINIMUM = 256 + 2  # All bytes and the two special tokens.
BPE_MAXIMUM = 2**20  # Training holds a table of this size in memory.


def train_bpe(texts: Iterable[str], vocab_size: int, folder: Path) -> None:
    """Trains a byte-level BPE on texts and saves it as tokenizer.json in `folder`.

    The same texts in any order give the same file. It has fewer than `vocab_size` tokens if the
    texts do not have enough pairs to merge. Memory grows with the number of different words.
    """
    from tokenizers import Tokenizer as RustTokenizer
    from tokenizers import decoders, models, pre_tokenizers, trainers

    rust = RustTokenizer(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOT, MASK],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rust.train_from_iterator((well_formed(text) for text in texts), trainer)
    (Path(folder) / BPE_FILE).write_text(rust.to_str(pretty=True), encoding="utf-8")


def load_bpe(name: str, folder: Path | None) -> Tokenizer:
    """The byte-level BPE that `train_bpe` saved in `folder`.

    Raises: UserError if the file is missing or is not a byte-level BPE.
    """
    if folder is None:
        raise UserError(f"tokenizer {name} needs the folder that holds its {BPE_FILE}")
    path = Path(folder) / BPE_FILE
    if not path.is_file():
        raise UserError(
            f"tokenizer {name}: there is no {path}; copy it there from the prepared data"
        )
    try:
        rust = rust_from_file(path)
        vocab = rust.get_vocab()
        specials = vocab[EOT], vocab[MASK]
        byte_of = byte_of_character()
        pieces = {}
        for token, i in vocab.items():
            pieces[i] = token.encode() if i in specials else bytes(byte_of[c] for c in token)
    except Exception as error:  # The package raises a plain Exception for a wrong file.
        raise UserError(
            f"tokenizer {name}: {path} is not a byte-level BPE tokenizer ({error})"
        ) from None
    rust.encode_special_tokens = True  # A written `<|endoftext|>` is plain text.
    return Tokenizer(name, len(vocab), *specials, rust_encoder(rust), pieces.__getitem__)


def rust_bpe(name: str, folder: Path | None) -> "RustTokenizer":
    """The same as one of the package tokenizers, which transformers reads."""
    load_bpe(name, folder)  # Raises a UserError if something is wrong.
    assert folder is not None
    return rust_from_file(Path(folder) / BPE_FILE)


def copy_bpe(data: Path, run: Path) -> None:
    """Copies tokenizer.json from the folder of token files into that of a run."""
    write_whole(Path(run) / BPE_FILE, (Path(data) / BPE_FILE).read_bytes())


def rust_from_file(path: Path) -> "RustTokenizer":
    """Reads a tokenizer of the package tokenizers from a file."""
    from tokenizers import Tokenizer as RustTokenizer

    # The package itself cannot open a file whose name is not UTF-8.
    return RustTokenizer.from_str(path.read_text(encoding="utf-8"))


def rust_vocabulary(tokenizer: "RustTokenizer | Path") -> dict[str, int]:
    """The ids of all tokens, of a tokenizer of the package tokenizers or its file.

    Raises: UserError if the file holds no tokenizer.
    """
    try:
        return (rust_from_file(tokenizer) if isinstance(tokenizer, Path) else tokenizer).get_vocab()
    except Exception as error:  # The package raises a plain Exception for a wrong file.
        raise UserError(f"{tokenizer} is not a tokenizer ({error})") from None


def rust_encoder(rust: "RustTokenizer") -> Callable[[list[str]], list[list[int]]]:
    """A function from texts to lists of ids, by a tokenizer of the package tokenizers."""

    def encode_texts(texts: list[str]) -> list[list[int]]:
        return [e.ids for e in rust.encode_batch_fast(texts, add_special_tokens=False)]

    return encode_texts


def byte_of_character() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for (GPT-2's table).

    Printable bytes stand for themselves. The others are the characters from U+0100 on.
    """
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
