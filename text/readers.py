"""Reads the documents in a file: .txt, .jsonl, .json, .csv or .parquet, also compressed.

Every reader yields the texts of documents, and None for an empty document. For a part that cannot
be read it yields `Broken`. The caller decides whether to stop.
"""

import bz2
import codecs
import contextlib
import csv
import gzip
import io
import json
import lzma
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from base.errors import UserError, nearest

if TYPE_CHECKING:
    from _csv import Reader

    import zstandard
    from _typeshed import WriteableBuffer

# Names of a text column, tried in this order when none is given.
COLUMNS = ["text", "content", "document", "article", "body", "extract", "review"]
WHOLE_TEXT = 4 << 20  # bytes; a .txt file up to this is one document
TEXT_PIECE = 64 << 10  # characters; larger files are cut at the next blank line after each piece
ZSTD_CHUNK = 16 << 10  # compressed bytes to unpack at a time
ZSTD_WINDOW = 1 << 31  # bytes; large dumps are packed with `zstd --long=31`


@dataclass
class Broken:
    """A part of a file that cannot be read, and why.

    Attributes:
        problem: names the file, and the line, row or item.
        file: whether it is a whole file, or the rest of one. If not, it is a line, row or item.
        lines: how many lines it has.
    """

    problem: str
    file: bool = False
    lines: int = 1


Documents = Iterator[str | None | Broken]


class Unreadable(Exception):
    """An error inside this file that becomes a `Broken`."""


def records(path: Path, column: str | None) -> Documents:
    """The documents of one file. If its end cannot be read, the documents before are kept.

    Raises: UserError only if the cause is not the file, such as a missing package.
    """
    kind = kind_of(path)
    assert kind is not None, path
    try:
        yield from READERS[kind](path, column)
    except Unreadable as error:
        yield Broken(str(error), file=True)
    except UnicodeDecodeError as error:
        yield Broken(f"{path} is not UTF-8 text ({error.reason}): {_hint(path)}", file=True)
    except OSError as error:
        if error.errno is None:  # So gzip and bz2 report wrong bytes.
            yield Broken(f"{path} is corrupt: {one_line(error)}", file=True)
        else:
            yield Broken(f"{path}: {error.strerror}", file=True)
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        yield Broken(f"{path} is corrupt or cut short: {one_line(error)}", file=True)


def _hint(path: Path) -> str:
    """What to do with a file that is not UTF-8."""
    if kind_of(path) == ".parquet":
        return "write its texts again in UTF-8"
    with opened(path) as file:
        is_utf16 = file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    return f"convert it, as in iconv -f {'utf-16' if is_utf16 else 'latin1'} -t utf8"


def kind_of(path: Path) -> str | None:
    """The kind of a file: `.jsonl` for a.jsonl and for A.JSONL.gz. None for an unknown kind."""
    inner = Path(path.stem) if compression_of(path) else path
    kind = inner.suffix.lower()
    return kind if kind in READERS else None


def compression_of(path: Path) -> str | None:
    """`.gz`, `.bz2`, `.xz` or `.zst` if the name ends with it, else None."""
    suffix = path.suffix.lower()
    return suffix if suffix in COMPRESSED else None


def plain_name(path: Path) -> str:
    """The name of a file without its endings: `b` for b.txt.gz."""
    return Path(path.stem).stem if compression_of(path) else path.stem


# ---- compression ---------------------------------------------------------------------------------

Opened = io.BufferedReader | gzip.GzipFile | bz2.BZ2File | lzma.LZMAFile


def opened(path: Path) -> Opened:
    """A file for reading bytes, decompressed."""
    return OPENERS[compression_of(path)](path)


def as_text(path: Path) -> io.TextIOWrapper:
    """A file for reading UTF-8 text, decompressed. Line ends stay as they are."""
    return io.TextIOWrapper(opened(path), encoding="utf-8-sig", newline="")


def open_plain(path: Path) -> io.BufferedReader:
    """A file that is not compressed."""
    return open(path, "rb")


def open_zstd(path: Path) -> io.BufferedReader:
    """A .zst file. UserError if the package zstandard is missing."""
    try:
        import zstandard
    except ImportError:
        need = "a .zst file needs the package zstandard (pip install zstandard)"
        raise UserError(f"{path}: {need}") from None
    decompressor = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW)
    return io.BufferedReader(ZstdFile(path, decompressor, zstandard.ZstdError))


class ZstdFile(io.RawIOBase):
    """Reads a .zst file of one or more frames. EOFError if it is truncated.

    The package's own reader stops silently after the first frame, and at the end of a truncated
    file.
    """

    def __init__(
        self, path: Path, decompressor: "zstandard.ZstdDecompressor", error: type[Exception]
    ):
        self.file, self.decompressor, self.error = open(path, "rb"), decompressor, error
        self.frame: zstandard.ZstdDecompressionObj | None = None  # Unpacks one frame.
        self.ready = b""  # Unpacked bytes.
        self.left = b""  # Bytes still to unpack.

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int:
        view = memoryview(buffer)
        while not self.ready:
            data = self.left or self.file.read(ZSTD_CHUNK)
            if not data:
                if self.frame is not None and not self.frame.eof:
                    raise EOFError("the file ended within a frame")
                return 0
            self._unpack(data)
        count = min(len(view), len(self.ready))
        view[:count], self.ready = self.ready[:count], self.ready[count:]
        return count

    def _unpack(self, data: bytes) -> None:
        if self.frame is None or self.frame.eof:
            self.frame = self.decompressor.decompressobj()
        try:
            self.ready = self.frame.decompress(data)
        except self.error as error:
            raise EOFError(str(error)) from None
        self.left = self.frame.unused_data if self.frame.eof else b""

    def close(self) -> None:
        self.file.close()
        super().close()


OPENERS: dict[str | None, Callable[[Path], Opened]] = {
    None: open_plain,
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": open_zstd,
}
COMPRESSED = tuple(ending for ending in OPENERS if ending)


# ---- kinds ---------------------------------------------------------------------------------------


def read_text(path: Path, column: str | None) -> Documents:
    """A .txt file as one document, or in pieces if it has more than WHOLE_TEXT bytes."""
    with opened(path) as file:
        start = file.read(WHOLE_TEXT + 1)
    if len(start) <= WHOLE_TEXT:
        yield start.decode("utf-8-sig")
        return
    with as_text(path) as file:
        while piece := file.read(TEXT_PIECE):
            piece += file.readline(TEXT_PIECE)  # The rest of a line is not a blank line.
            while (line := file.readline(TEXT_PIECE)).strip() and len(piece) < 2 * TEXT_PIECE:
                piece += line
            yield piece + line


def read_jsonl(path: Path, column: str | None) -> Documents:
    """A JSON text on each line, or an object with the text in `column`."""
    with opened(path) as lines:
        numbered = ((f"{path} line {i}", line) for i, line in enumerate(lines, 1) if line.strip())
        yield from _texts(numbered, column)


def read_json(path: Path, column: str | None) -> Documents:
    """A JSON list of texts or objects, read into memory. Without `[` at its start: JSON lines."""
    with opened(path) as file:
        start = file.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if start != b"[":
        yield from read_jsonl(path, column)
        return
    with opened(path) as file:
        items = parse_json(file.read(), path)
    assert isinstance(items, list)  # Its first character is [.
    yield from _texts(((f"{path} item {i}", item) for i, item in enumerate(items, 1)), column)


def _texts(items: Iterable[tuple[str, object]], column: str | None) -> Documents:
    """The texts of JSON values, or of lines of JSON (bytes). Each comes with its place.

    The first object decides in which column the texts of the whole file are.
    """
    for where, item in items:
        try:
            record = parse_json(item, where) if isinstance(item, bytes) else item
            if isinstance(record, dict):
                column = text_column(list(record), column, where)
            yield text_of(record, column, where)
        except Unreadable as error:
            yield Broken(str(error))


def read_csv(path: Path, column: str | None) -> Documents:
    """The rows of a comma-separated file whose first line names the columns."""
    csv.field_size_limit(2**31 - 1)  # Python's default limit is 128 KiB.
    with as_text(path) as file:
        rows = csv.reader(file, strict=True)
        try:
            names = next(rows, None)
            if names is None:
                return
            if not names:
                raise Unreadable(f"{path} line 1 is empty: it should name the columns")
            index = names.index(text_column(names, column, path))
            yield from _rows(rows, names, index, path)
        except csv.Error as error:  # The error is in the line of names.
            raise Unreadable(f"{path} line 1 is not CSV: {error}") from None
        except UnicodeDecodeError as error:
            what = f"{path} is not UTF-8 text, after line {rows.line_num}"
            raise Unreadable(f"{what}: {error.reason}") from None


def _rows(rows: "Reader", names: list[str], index: int, path: Path) -> Documents:
    """The text of each remaining row of a csv.reader, or `Broken` for one that cannot be read."""
    while True:
        first = rows.line_num + 1
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            # The next row begins after the lines of this one.
            lines = f"line {first} is"
            if rows.line_num > first:
                lines = f"lines {first} to {rows.line_num} are"
            count = rows.line_num - first + 1
            yield Broken(f"{path} {lines} not CSV: {error}", lines=count)
            continue
        if row and len(row) <= index:
            what = f"no column {names[index]!r}, only {len(row)} columns"
            yield Broken(f"{path} line {rows.line_num}: {what}")
        elif any(row[len(names) :]):  # A comma in a text without quotes would cut it.
            what = f"{len(row)} columns, but {len(names)} names in line 1: quote texts with commas"
            yield Broken(f"{path} line {rows.line_num}: {what}")
        elif row:
            yield row[index]


def read_parquet(path: Path, column: str | None) -> Documents:
    """The text column of a parquet file."""
    import pyarrow
    import pyarrow.parquet

    broken = pyarrow.ArrowException, OSError
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(opened(path))
        if compression_of(path):
            file = stack.enter_context(on_disk(file))
        try:
            # Not opened by pyarrow, which cannot open file names that are not UTF-8.
            parquet = pyarrow.parquet.ParquetFile(file, buffer_size=1 << 20)
            schema = parquet.schema_arrow
        except broken as error:
            raise Unreadable(f"{path} is not a parquet file: {one_line(error)}") from None
        column = text_column(schema.names, column, path)
        if schema.names.count(column) > 1:
            raise Unreadable(f"{path} has several columns {column!r}")
        kind = schema.field(column).type
        if pyarrow.types.is_dictionary(kind):  # categories of pandas
            kind = kind.value_type
        if str(kind) not in ("string", "large_string", "string_view"):
            raise Unreadable(f"{path}: column {column!r} holds {kind}, not text")
        try:
            for batch in parquet.iter_batches(batch_size=100, columns=[column], use_threads=False):
                yield from batch.column(0).to_pylist()
        except broken as error:
            raise Unreadable(f"cannot read {path}: {one_line(error)}") from None


def on_disk(file: io.BufferedIOBase) -> io.BufferedRandom:
    """A temporary copy of `file`, for a reader that needs to seek in it."""
    copy = tempfile.TemporaryFile()
    while data := file.read(1 << 20):
        try:
            copy.write(data)
        except OSError as error:
            copy.close()
            place = tempfile.gettempdir()
            raise UserError(
                f"cannot unpack into {place}: {error.strerror}; set TMPDIR to a folder with more"
                " room"
            ) from None
    copy.seek(0)
    return copy


READERS = {
    ".txt": read_text,
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".parquet": read_parquet,
}
KINDS = tuple(READERS)


def parse_json(data: bytes, where: str | Path) -> object:
    """The value of a JSON text. Unreadable, with `where`, if it is not JSON in UTF-8."""
    try:
        return json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"{where} is not JSON: {one_line(error)}") from None


def text_of(record: object, column: str | None, where: str) -> str | None:
    """The text in one JSON record: the record itself, or its `column`. Unreadable, with `where`, if
    that is no text."""
    if isinstance(record, dict):
        record = record[column]
        where = f"{where}: {column!r}"
    if record is not None and not isinstance(record, str):
        raise Unreadable(f"{where} holds {json.dumps(record)[:40]}, not text")
    return record


def text_column(names: list[str], wanted: str | None, where: str | Path) -> str:
    """`wanted`, or the first of COLUMNS that is in `names`. Unreadable if there is none."""
    for name in [wanted] if wanted else COLUMNS:
        if name in names:
            return name
    if wanted:
        raise Unreadable(f"{where}: no column {wanted!r}{nearest(wanted, names) if names else ''}")
    usual = f"{', '.join(COLUMNS[:-1])} or {COLUMNS[-1]}"
    raise Unreadable(f"{where}: no column {usual}; name the text with --column: {', '.join(names)}")


def one_line(error: BaseException) -> str:
    """An exception's message without line ends, at most 300 characters."""
    return (" ".join(str(error).split()) or type(error).__name__)[:300]
