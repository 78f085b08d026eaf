"""char, a vocabulary of the characters of your own text, as in nanoGPT's shakespeare_char."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from base.errors import UserError
from base.files import seal, unseal, write_whole
from text.foreign import NANOGPT_META, nanogpt_characters
from text.tokenizers.tokenizer import EOT, Tokenizer, well_formed

CHAR_FILE = "characters.json"  # Beside the token files.
UNKNOWN = "\ufffd"


@dataclass
class Characters:
    """A vocabulary of characters. An id is a place in `characters`. The end-of-text id is next.

    Attributes:
        characters: each character once, sorted.
        unknown: whether one more token stands for all characters that are not in the training text.
            It decodes to U+FFFD.
        start_id: begins a text without a prompt. None means the end-of-text token.
    """

    characters: str
    unknown: bool = True
    start_id: int | None = None

    def tokenizer(self) -> Tokenizer:
        """The Tokenizer of these characters."""
        eot_id = len(self.characters)
        unk_id = eot_id + 1 if self.unknown else None
        vocab_size = eot_id + 1 + self.unknown
        ids = {character: i for i, character in enumerate(self.characters)}
        tokens = [character.encode() for character in [*self.characters, EOT, UNKNOWN]]

        def encode_texts(texts: list[str]) -> list[list[int]]:
            if unk_id is not None:
                return [[ids.get(character, unk_id) for character in text] for text in texts]
            if strange := sorted(set().union(*texts) - ids.keys()):
                raise UserError(f"tokenizer char does not know {', '.join(map(repr, strange[:5]))}")
            return [[ids[character] for character in text] for text in texts]

        return Tokenizer(
            name="char",
            vocab_size=vocab_size,
            eot_id=eot_id,
            mask_id=vocab_size,
            encode_texts=encode_texts,
            token_bytes=tokens.__getitem__,
            unk_id=unk_id,
            start_id=eot_id if self.start_id is None else self.start_id,
        )


def train_char(texts: Iterable[str], folder: Path) -> None:
    """Saves the characters of all texts as characters.json in `folder`."""
    characters: set[str] = set()
    for text in texts:
        characters.update(well_formed(text))
    save_characters(Characters("".join(sorted(characters))), folder)


def load_char(name: str, folder: Path | None) -> Tokenizer:
    """The tokenizer of the characters in `folder`; see `read_characters`."""
    return read_characters(folder).tokenizer()


def rust_char(name: str, folder: Path | None) -> NoReturn:
    """Always raises UserError: transformers has no tokenizer of characters."""
    raise UserError(
        "tokenizer char: transformers has no tokenizer of characters; prepare the text with"
        " bpe:N, such as bpe:300"
    )


def copy_char(data: Path, run: Path) -> None:
    """Copies the characters from the folder of token files into the folder of a run."""
    save_characters(read_characters(data), run)


def save_characters(vocabulary: Characters, folder: Path) -> None:
    """Writes characters.json into `folder`."""
    write_whole(Path(folder) / CHAR_FILE, seal(vars(vocabulary)))


def read_characters(folder: Path | None) -> Characters:
    """The vocabulary of char in `folder`, from characters.json or else from nanoGPT's meta.pkl.

    nanoGPT's text has no end-of-text token, so that token is never trained. Therefore a text
    without a prompt begins with a line break.

    Raises: UserError if both files are missing, or the file is corrupt.
    """
    if folder is None:
        raise UserError(f"tokenizer char needs the folder that holds its {CHAR_FILE}")
    path, nanogpt = Path(folder) / CHAR_FILE, Path(folder) / NANOGPT_META
    if path.is_file():
        return _read_file(path)
    if not nanogpt.is_file():
        raise UserError(f"tokenizer char: there is no {path}; copy it there from the prepared data")
    characters = nanogpt_characters(nanogpt)
    return Characters(characters, unknown=False, start_id=max(0, characters.find("\n")))


def _read_file(path: Path) -> Characters:
    """The vocabulary in characters.json. UserError if it is corrupt."""
    try:
        vocabulary = Characters(**unseal(path.read_bytes()))
        count = len(vocabulary.characters)
        if count == 0 or len(set(vocabulary.characters)) < count:
            raise ValueError("it does not hold each character once")
    except (ValueError, TypeError) as error:
        raise UserError(f"tokenizer char: {path} is corrupt ({error})") from None
    return vocabulary
