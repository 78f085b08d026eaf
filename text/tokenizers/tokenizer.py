"""What every tokenizer is: a function from text to ids, and one from an id to its bytes."""

import codecs
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

EOT, MASK = "<|endoftext|>", "<|mask|>"


@dataclass(eq=False)
class Tokenizer:
    """Text to ids and back.

    Special tokens that are written in a document, such as `<|endoftext|>` or `[SEP]`, are text
    there: they become ordinary tokens. Only in a prompt (`encode_prompt`) is the end-of-text token
    a special one, as in nanoGPT.

    Attributes:
        name: as given to `load_tokenizer`, such as `bpe:4096`.
        vocab_size: number of ids, those of special tokens included: 0 <= id < vocab_size.
        eot_id: ends every document.
        mask_id: hides a token in masked training. It is never a token of ordinary text. BERT and
            bpe:N have a mask token. For the others it is `vocab_size`, the first row that a padded
            embedding table adds, so a model that masks needs at least vocab_size + 1 rows.
        encode_texts: maps a list of texts to a list of lists of ids.
        token_bytes: maps an id in [0, vocab_size) to its bytes.
        leading_space: the space before a word belongs to the word's token, and the first space of
            a text is not shown (WordPiece).
        unk_id: stands for what the vocabulary cannot write (BERT's [UNK]). None when the vocabulary
            can write everything.
        start_id: begins a text that has no prompt. -1 stands for `eot_id`.
        eot_text: how a prompt writes the end-of-text token.
    """

    name: str
    vocab_size: int
    eot_id: int
    mask_id: int
    encode_texts: Callable[[list[str]], list[list[int]]]
    token_bytes: Callable[[int], bytes]
    leading_space: bool = False
    unk_id: int | None = None
    start_id: int = -1
    eot_text: str = EOT

    def __post_init__(self) -> None:
        if self.start_id < 0:
            self.start_id = self.eot_id

    @property
    def dtype(self) -> np.dtype:
        """The type of ids in a token file: uint16, or uint32 when the vocabulary needs it."""
        return np.dtype("<u4" if self.vocab_size > 65535 else "<u2")

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without special tokens."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text. A lone surrogate counts as U+FFFD."""
        return self.encode_texts([well_formed(text) for text in texts])

    def encode_prompt(self, text: str) -> list[int]:
        """The ids of a prompt: as `encode`, but `eot_text` in it is the end-of-text token."""
        pieces = self.encode_batch(text.split(self.eot_text))
        ids = pieces[0]
        for piece in pieces[1:]:
            ids = [*ids, self.eot_id, *piece]
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids.

        Bytes that are not UTF-8 show as U+FFFD. An id without a token, such as a padded row, shows
        as `<|50300|>`.
        """
        stream = self.stream_decoder()
        return "".join(stream(i) for i in ids) + stream(None)

    def decode_token(self, id: int) -> str:
        """One token for display, with the space that it starts with."""
        return self.bytes_of(id).decode("utf-8", errors="replace")

    def stream_decoder(self) -> "StreamDecoder":
        """Decodes ids one after the other."""
        return StreamDecoder(self)

    def bytes_of(self, id: int) -> bytes:
        """The bytes of any id, also of one without a token."""
        id = int(id)
        if 0 <= id < self.vocab_size:
            return self.token_bytes(id)
        return (MASK if id == self.mask_id else f"<|{id}|>").encode()


class StreamDecoder:
    """Turns ids into text one at a time, for text that is shown while it is generated.

    Call it with an id to get the text that is complete by then, and with None to get the rest. The
    pieces joined are `Tokenizer.decode(ids)`. The bytes of a character may be spread over several
    tokens: it comes with the last of them.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.first = True

    def __call__(self, id: int | None) -> str:
        if id is None:
            return self.utf8.decode(b"", final=True)
        data = self.tokenizer.bytes_of(id)
        if self.first and self.tokenizer.leading_space:
            data = data.removeprefix(b" ")
        self.first = False
        return self.utf8.decode(data)


def well_formed(text: str) -> str:
    """`text` with U+FFFD in place of lone surrogates.

    JSON and command lines can contain lone surrogates. UTF-8 cannot.
    """
    try:
        text.encode("utf-8")
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
