"""One file, or one data set, becomes documents. Streams: memory does not grow with the file.

A text file is one document; a line of JSONL, a row of Parquet or of a data set is one document. A long document comes
in pieces cut at line boundaries; the pieces after the first have `continues`, so that no end of text is put between.
"""

import codecs
import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kiem.errors import DataError

PIECE = 256 * 1024  # characters: the most text that is in memory, hashed or tokenized as one
BLOCK = 1024 * 1024  # bytes read at once; a file up to this size is read once, a larger one is first checked whole
ROWS = 256  # rows of Parquet and data sets read at once

Kind = Literal["text", "jsonl", "parquet", "dataset"]


@dataclass(frozen=True, slots=True)
class Document:
    """A document, or a piece of one. `continues`: the text goes on where the piece before it stopped."""

    text: str
    origin: str
    continues: bool = False


@dataclass(frozen=True, slots=True)
class Problem:
    """Text that could not be used as it is. `line` counts from 1 (in a table: the row); None is the whole file."""

    origin: str
    line: int | None
    what: str
    action: str

    def __str__(self) -> str:
        where = self.origin if self.line is None else f"{self.origin}, line {self.line}"
        return f"{where}: {self.what}; {self.action}"


@dataclass(frozen=True)
class Item:
    """One file or data set of a source: its name for messages, and the digest, size and time of the contents read."""

    name: str
    kind: Kind
    path: Path | None
    digest: str
    size: int = 0
    mtime_ns: int = 0
    rows: Any = None


@dataclass(frozen=True)
class Rule:
    """`on_bad_text`: "skip" leaves the document out, "replace" puts U+FFFD for bad bytes, "error" raises DataError."""

    on_bad_text: str
    report: Callable[[Problem], None]

    @property
    def replaces(self) -> bool:
        return self.on_bad_text == "replace"

    def bad(self, origin: str, line: int | None, what: str, action: str = "left out") -> None:
        problem = Problem(origin, line, what, action)
        if self.on_bad_text == "error":
            where = origin if line is None else f"{origin}, line {line}"
            raise DataError(
                f"{where}: {what}. Mend or remove it, or set data.on_bad_text to skip (leave such "
                "documents out) or replace (read bad bytes as U+FFFD)."
            )
        self.report(problem)


class ChangedError(DataError):
    """Text is not what it was when its digest was taken."""


def kind_of(name: str) -> Kind:
    """What a file is, by its name without .gz or .zst."""
    name = name.lower().removesuffix(".gz").removesuffix(".zst")
    if name.endswith((".jsonl", ".ndjson")):
        return "jsonl"
    return "parquet" if name.endswith((".parquet", ".pq")) else "text"


def read_item(item: Item, text_key: str, rule: Rule) -> Iterator[Document]:
    """The documents of one item, in order. `text_key`: field or column of the text, where there are any.

    Raises ChangedError when it is at the end of a file that has another size or time than when it was hashed.
    """
    try:
        if item.kind == "text":
            yield from _read_text(item, rule)
        elif item.kind == "jsonl":
            yield from _read_jsonl(item, text_key, rule)
        elif item.kind == "parquet":
            yield from _read_parquet(item, text_key, rule)
        else:
            yield from _read_rows(item, text_key, rule)
    except OSError as error:
        rule.bad(item.name, None, f"cannot be read: {error.strerror or error}")
        return
    if item.path is not None:
        stat = item.path.stat() if item.path.exists() else None
        if stat is None or (stat.st_size, stat.st_mtime_ns) != (item.size, item.mtime_ns):
            raise ChangedError(f"{item.name}: changed while it was read. Run again when nothing writes to it.")


# -- bytes -------------------------------------------------------------------------------------------------------------


class _Damaged(Exception):
    """A compressed file that does not decompress to its end."""


def _blocks(path: Path) -> Iterator[bytes]:
    """The decompressed bytes of a file, at most about BLOCK at a time."""
    suffix = path.suffix.lower()
    with open(path, "rb") as file:
        if suffix == ".gz":
            yield from _gzip_blocks(file)
        elif suffix == ".zst":
            yield from _zstd_blocks(file)
        else:
            while block := file.read(BLOCK):
                yield block


def _gzip_blocks(file: Any) -> Iterator[bytes]:
    try:
        with gzip.GzipFile(fileobj=file) as stream:
            while block := stream.read1(BLOCK):  # read() would keep to itself what comes before the damage
                yield block
    except EOFError:
        raise _Damaged("truncated gzip file") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise _Damaged(f"damaged gzip file ({error})") from None


def _zstd_blocks(file: Any) -> Iterator[bytes]:
    import zstandard

    frame = None
    try:
        while data := file.read(16 * 1024):
            while data:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                if block := frame.decompress(data):
                    yield block
                data, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    except zstandard.ZstdError as error:
        raise _Damaged(f"damaged zstd file ({error})") from None
    if frame is not None:  # the library's own stream reader passes a truncated file in silence
        raise _Damaged("truncated zstd file")


# -- text files --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Flaw:
    what: str
    line: int | None
    usable: bool  # with on_bad_text "replace"
    action: str = "bad bytes read as U+FFFD"


def _read_text(item: Item, rule: Rule) -> Iterator[Document]:
    stream = _blocks(item.path)
    head, flaw = b"", None
    try:
        while len(head) <= BLOCK and (block := next(stream, b"")):
            head += block
    except _Damaged as damage:
        flaw = _Flaw(str(damage), None, True, "the text before the damage is kept")
    stream.close()
    whole = flaw is not None or len(head) <= BLOCK
    flaw = flaw or _find_flaw([head] if whole else _blocks(item.path))
    if flaw and not (rule.replaces and flaw.usable):
        rule.bad(item.name, flaw.line, flaw.what)
        return
    if flaw:
        rule.bad(item.name, flaw.line, flaw.what, flaw.action)
    yield from pieces(_decode([head] if whole else _blocks(item.path), "replace" if flaw else "strict"), item.name)


def _find_flaw(blocks: Iterable[bytes]) -> _Flaw | None:
    """The first byte that is not text, with its offset and line; a file with a NUL byte is binary."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset, line, pending = 0, 1, 0
    flaw = None
    try:
        for block in blocks:
            if offset == 0 and block[:2] in (b"\xff\xfe", b"\xfe\xff"):
                return _Flaw("UTF-16 text, not UTF-8: convert it, for example with iconv -f UTF-16 -t UTF-8", 1, False)
            if (nul := block.find(b"\0")) >= 0:
                here = line + block[:nul].count(b"\n")
                return _Flaw(f"binary file, not text (NUL byte at offset {offset + nul})", here, False)
            try:
                if flaw is None:
                    decoder.decode(block)
            except UnicodeDecodeError as error:
                flaw = _not_utf8(error, offset - pending, line)
            pending = len(decoder.getstate()[0])
            offset, line = offset + len(block), line + block.count(b"\n")
        if flaw is None:
            decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        flaw = _not_utf8(error, offset - pending, line)
    except _Damaged as damage:
        return _Flaw(str(damage), None, True, "the text before the damage is kept")
    return flaw


def _not_utf8(error: UnicodeDecodeError, base: int, line: int) -> _Flaw:
    """`error.object` starts at byte `base` of the file; bytes carried over from the block before hold no newline."""
    at = error.start
    return _Flaw(
        f"not UTF-8 (byte 0x{error.object[at]:02x} at offset {base + at})", line + error.object[:at].count(b"\n"), True
    )


def _decode(blocks: Iterable[bytes], errors: str) -> Iterator[str]:
    """Text of UTF-8 bytes without a byte order mark. Damage ends the text: it has been reported before."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors)
    first = True
    try:
        for block in blocks:
            if text := decoder.decode(block):
                yield text.removeprefix("\ufeff") if first else text
                first = False
    except _Damaged:
        pass
    if text := decoder.decode(b"", final=True):
        yield text


def pieces(texts: Iterable[str], origin: str) -> Iterator[Document]:
    """Cut a stream of text after newlines, at most PIECE characters each; the cuts depend on the text alone."""
    buffer, continues = "", False
    for text in texts:
        buffer = buffer + text if buffer else text
        start = 0
        while len(buffer) - start > PIECE:
            limit = start + PIECE
            cut = buffer.rfind("\n", start, limit) + 1 or buffer.rfind(" ", start + 1, limit)
            cut = cut if cut > start else limit
            yield Document(buffer[start:cut], origin, continues)
            start, continues = cut, True
        buffer = buffer[start:]
    if buffer:
        yield Document(buffer, origin, continues)


# -- records -----------------------------------------------------------------------------------------------------------


def _lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    parts: list[bytes] = []
    for block in blocks:
        *lines, rest = block.split(b"\n")
        for line in lines:
            yield b"".join([*parts, line]) if parts else line
            parts = []
        if rest:
            parts.append(rest)
    if parts:
        yield b"".join(parts)


def _read_jsonl(item: Item, text_key: str, rule: Rule) -> Iterator[Document]:
    number = 0
    try:
        for number, line in enumerate(_lines(_blocks(item.path)), start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield from _record(line, text_key, item.name, number, rule)
    except _Damaged as damage:
        rule.bad(item.name, number + 1, str(damage), "the records before it are kept, the rest is left out")


def _record(line: bytes, text_key: str, name: str, number: int, rule: Rule) -> Iterator[Document]:
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        what = f"not UTF-8 (byte 0x{line[error.start]:02x} at byte {error.start} of the record)"
        if not rule.replaces:
            rule.bad(name, number, what)
            return
        rule.bad(name, number, what, "bad bytes read as U+FFFD")
        text = line.decode(errors="replace")
    try:
        record = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        rule.bad(name, number, f"not a JSON record ({error})")
        return
    if not isinstance(record, dict):
        rule.bad(name, number, f"a JSON record must be an object, this is {type(record).__name__}")
    elif text_key not in record:
        rule.bad(name, number, f"no field {text_key!r}, it has {_some(record)}: set text_key")
    else:
        yield from _value(record[text_key], text_key, name, number, rule)


def _value(value: Any, text_key: str, name: str, number: int, rule: Rule) -> Iterator[Document]:
    """The document of one field: str, or bytes in UTF-8. An empty text is no document."""
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError as error:
            rule.bad(
                name,
                number,
                f"not UTF-8 (byte 0x{value[error.start]:02x} at byte {error.start} of {text_key!r})",
                "bad bytes read as U+FFFD" if rule.replaces else "left out",
            )
            if not rule.replaces:
                return
            value = value.decode(errors="replace")
    if not isinstance(value, str):
        rule.bad(name, number, f"field {text_key!r} is {type(value).__name__}, not text")
        return
    if bad := next((c for c in value if "\ud800" <= c <= "\udfff"), None) if not value.isascii() else None:
        rule.bad(
            name,
            number,
            f"half of a surrogate pair (U+{ord(bad):04X}) is not text",
            "read as U+FFFD" if rule.replaces else "left out",
        )
        if not rule.replaces:
            return
        value = "".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in value)
    yield from pieces([value], f"{name}:{number}")


def _some(names: Iterable[str]) -> str:
    names = [repr(str(n)) for n in names]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") if names else "no fields"


def _read_parquet(item: Item, text_key: str, rule: Rule) -> Iterator[Document]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{item.name}: reading Parquet needs pyarrow: pip install 'kiem[parquet]'") from None
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(item.path) as table:
            columns = table.schema_arrow.names
            if text_key not in columns:
                rule.bad(item.name, None, f"no column {text_key!r}, it has {_some(columns)}: set text_key")
                return
            for batch in table.iter_batches(batch_size=ROWS, columns=[text_key]):
                for cell in batch.column(0):
                    number += 1
                    try:
                        value = cell.as_py()
                    except UnicodeDecodeError:  # a string column whose bytes nobody checked
                        value = cell.as_buffer().to_pybytes()
                    yield from _value(value, text_key, item.name, number, rule)
    except pyarrow.ArrowException as error:
        rule.bad(
            item.name,
            number + 1 if number else None,
            f"damaged Parquet file ({error})",
            "the rows before it are kept" if number else "left out",
        )


def _read_rows(item: Item, text_key: str, rule: Rule) -> Iterator[Document]:
    if text_key not in item.rows.column_names:
        rule.bad(item.name, None, f"no column {text_key!r}, it has {_some(item.rows.column_names)}: set text_key")
        return
    column = item.rows.select_columns([text_key])
    for start in range(0, len(column), ROWS):
        for number, value in enumerate(column[start : start + ROWS][text_key], start=start + 1):
            yield from _value(value, text_key, item.name, number, rule)
