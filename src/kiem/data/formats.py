"""What the readers of files share: documents, problems, the rule for bad text, and the bytes of a file.

A text file is one document; a line of JSONL, a row of Parquet or of a data set is one document. A long document comes
in pieces cut at line boundaries; the pieces after the first have `continues`, so that no end of text is put between.
"""

import gzip
import zlib
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from kiem.errors import DataError

PIECE = 256 * 1024  # characters: the most text that is in memory, hashed or tokenized as one
BLOCK = 1024 * 1024  # bytes read at once; a file up to this size is read once, a larger one is first checked whole
LONGEST_RECORD = 64 * 1024 * 1024  # bytes: a longer line of JSONL, or a larger JSON file, is left out
EXAMPLES = 20  # problems of each kind that are kept; all are counted

Kind = Literal["text", "json", "jsonl", "parquet", "dataset"]

# Kinds of problems, and how one and several of them are called.
PROBLEMS = {
    "not text": ("file is not text", "files are not text"),
    "special": ("is no regular file", "are no regular files"),
    "unreadable": ("file cannot be read", "files cannot be read"),
    "damaged": ("compressed or table file is damaged", "compressed or table files are damaged"),
    "encoding": ("file is not in UTF-8", "files are not in UTF-8"),
    "not UTF-8": ("document is not valid UTF-8", "documents are not valid UTF-8"),
    "record": ("record is not a JSON object", "records are not JSON objects"),
    "no text": ("record has no text", "records have no text"),
    "chat": ("record is a chat", "records are chats"),
    "too long": ("record is too long", "records are too long"),
    "converted": ("document was converted to text", "documents were converted to text"),
    "needs": ("file needs another library", "files need another library"),
    "surrogate": ("text has a lone surrogate", "texts have a lone surrogate"),
}


@dataclass(frozen=True, slots=True)
class Document:
    """A document, or a piece of one. `continues`: the text goes on where the piece before it stopped."""

    text: str
    origin: str
    continues: bool = False


@dataclass(frozen=True, slots=True)
class Problem:
    """Text that could not be used as it is. `line` counts from 1 (in a table: the row); None is the whole file. `kind`
    is one of PROBLEMS."""

    origin: str
    line: int | None
    what: str
    action: str
    kind: str = "not text"

    def __str__(self) -> str:
        where = self.origin if self.line is None else f"{self.origin}, line {self.line}"
        return f"{where}: {self.what}; {self.action}"


@dataclass
class Problems:
    """Counts all problems, and keeps the first ones of each kind, so that no kind crowds out the others."""

    count: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    first: list[dict[str, Any]] = field(default_factory=list)

    def __call__(self, problem: Problem) -> None:
        self.count += 1
        known = self.counts[problem.kind] = self.counts.get(problem.kind, 0) + 1
        if known <= EXAMPLES:
            self.first.append(asdict(problem))

    def merged(self, other: "Problems") -> "Problems":
        """The problems of both."""
        counts = dict(Counter(self.counts) + Counter(other.counts))
        return Problems(self.count + other.count, counts, [*self.first, *other.first])

    def sentences(self) -> list[str]:
        """One for each kind: how many, the first of them, and what was done."""
        found = []
        for kind, count in self.counts.items():
            first = next(problem for problem in self.first if problem["kind"] == kind)
            where = first["origin"] if first["line"] is None else f"{first['origin']}, line {first['line']}"
            one, several = PROBLEMS[kind]
            example = "" if count == 1 else "for example "
            words = f"{count:,} {one if count == 1 else several}"
            found.append(f"{words} ({example}{where}: {first['what']}): {first['action']}")
        return found


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

    @property
    def strict(self) -> bool:
        return self.on_bad_text == "error"

    def bad(self, kind: str, origin: str, line: int | None, what: str, action: str = "left out") -> None:
        problem = Problem(origin, line, what, action, kind)
        if self.strict:
            where = origin if line is None else f"{origin}, line {line}"
            raise DataError(
                f"{where}: {what}. Fix or remove it, or set data.on_bad_text to skip (leave such "
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
    if name.endswith(".json"):
        return "json"
    return "parquet" if name.endswith((".parquet", ".pq")) else "text"


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


# -- bytes -------------------------------------------------------------------------------------------------------------


class Damaged(Exception):
    """A compressed file that does not decompress to its end."""


def blocks_of(path: Path) -> Generator[bytes, None, None]:
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
        raise Damaged("truncated gzip file") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise Damaged(f"damaged gzip file ({error})") from None


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
        raise Damaged(f"damaged zstd file ({error})") from None
    if frame is not None:  # the library's own stream reader passes a truncated file in silence
        raise Damaged("truncated zstd file")
