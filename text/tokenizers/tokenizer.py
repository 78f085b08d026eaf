"""The type of all tokenizers: a function from text to ids, and one from an id to its bytes."""

import codecs
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

EOT, MASK = "<|endoftext|>", "<|mask|>"


@dataclass(eq=False)
class Tokenizer:
    """Text to ids and back.

    If a document contains the name of a special token, such as `<|endoftext|>` or `[SEP]`, that is
    plain text and becomes ordinary tokens. In a prompt (`encode_prompt`) the name of the
    end-of-text token becomes that token, as in nanoGPT.

    Attributes:
        name: as in `load_tokenizer`, such as `bpe:4096`.
        vocab_size: the number of ids, with special tokens: 0 <= id < vocab_size.
        eot_id: ends every document.
        mask_id: replaces hidden tokens in masked training. It never stands for text. BERT and bpe:N
            have a mask token. For the others it is `vocab_size`, a row after the vocabulary. So a
            masked model needs at least vocab_size + 1 rows.
        encode_texts: a function from a list of texts to a list of lists of ids.
        token_bytes: a function from an id in [0, vocab_size) to its bytes.
        leading_space: whether the token of a word begins with a space (WordPiece). The first space
            of a text is not shown.
        unk_id: stands for text that the vocabulary cannot write (BERT's [UNK]). None if it can
            write everything.
        start_id: begins a text without a prompt. -1 stands for `eot_id`.
        eot_text: how the end-of-text token is written in a prompt.
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
        """The type of ids in a token file: uint16, or uint32 if the vocabulary needs it."""
        return np.dtype("<u4" if self.vocab_size > 65535 else "<u2")

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without special tokens."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text. Lone surrogates are replaced by U+FFFD."""
        return self.encode_texts([well_formed(text) for text in texts])

    def encode_prompt(self, text: str) -> list[int]:
        """The ids of a prompt, in which `eot_text` becomes the end-of-text token."""
        pieces = self.encode_batch(text.split(self.eot_text))
        ids = pieces[0]
        for piece in pieces[1:]:
            ids = [*ids, self.eot_id, *piece]
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids.

        Bytes that are not UTF-8 become U+FFFD. An id without a token, such as that of a padded row,
        becomes `<|50300|>`.
        """
        stream = self.stream_decoder()
        return "".join(stream(i) for i in ids) + stream(None)

    def decode_token(self, id: int) -> str:
        """The text of one token for display, with its leading space."""
        return self.bytes_of(id).decode("utf-8", errors="replace")

    def stream_decoder(self) -> "StreamDecoder":
        """A decoder that takes ids one by one."""
        return StreamDecoder(self)

    def bytes_of(self, id: int) -> bytes:
        """The bytes of an id. An id without a token gives `<|id|>`."""
        id = int(id)
        if 0 <= id < self.vocab_size:
            return self.token_bytes(id)
        return (MASK if id == self.mask_id else f"<|{id}|>").encode()


class StreamDecoder:
    """Turns ids into text one by one, for text that is shown while it is generated.

    Call it with an id to get the text that is complete, and with None at the end to get the rest.
    All pieces together are `Tokenizer.decode(ids)`. If a character consists of several tokens, it
    comes with the last of them.
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

    JSON and command lines can contain lone surrogates, but UTF-8 cannot.
    """
    try:
        text.encode("utf-8")
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
