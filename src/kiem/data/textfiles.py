"""A text file becomes a document: UTF-8, or what its byte order mark or its bytes say that it is."""

import codecs
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from kiem.data import encodings, formats
from kiem.data.formats import Damaged, Document, Item, Rule, blocks_of, pieces

SAMPLE = 64 * 1024  # bytes that an encoding is guessed from
# Single-byte and East Asian encodings that text without a mark is taken for.
GUESSED = [
    "cp1252",
    "cp1250",
    "cp1251",
    "koi8_r",
    "cp1253",
    "cp1254",
    "shift_jis",
    "euc_jp",
    "gb18030",
    "big5",
    "euc_kr",
]
MARKS = [
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
]


@dataclass(frozen=True)
class _Flaw:
    """The first thing in a file that is not text. `usable`: with on_bad_text "replace"."""

    kind: str
    what: str
    line: int | None
    usable: bool
    action: str = "bad bytes read as U+FFFD"
    around: bytes = b""
    cut: bool = False  # in the middle of a character, by the end of the file


def read_text(item: Item, rule: Rule) -> Iterator[Document]:
    """The document of a text file."""
    path = item.path
    assert path is not None
    stream = blocks_of(path)
    head, flaw = b"", None
    try:
        while len(head) <= formats.BLOCK and (block := next(stream, b"")):
            head += block
    except Damaged as damage:
        flaw = _damaged(damage)
    stream.close()
    whole = flaw is not None or len(head) <= formats.BLOCK

    def blocks() -> Iterable[bytes]:
        return [head] if whole else blocks_of(path)

    encoding = _marked(head)
    if encoding is None and flaw is None:
        flaw = _find_flaw(blocks())
        if flaw and flaw.kind == "not UTF-8" and not rule.strict:
            encoding = _guessed(head, flaw)
    if encoding is not None:
        try:
            flaw = _find_flaw(utf8_blocks(blocks(), encoding))
        except UnicodeError:
            flaw = _Flaw("not UTF-8", f"not valid {encoding.upper()}, which its first bytes declare", None, False)
        if flaw is None:
            rule.report(
                formats.Problem(item.name, None, f"its encoding is {encoding}", f"read as {encoding}", "encoding")
            )
    if flaw and not (rule.replaces and flaw.usable):
        rule.bad(flaw.kind, item.name, flaw.line, flaw.what)
        return
    if flaw:
        rule.bad(flaw.kind, item.name, flaw.line, flaw.what, flaw.action)
    decoded = _decode(utf8_blocks(blocks(), encoding), "replace" if flaw else "strict")
    yield from pieces(decoded, item.name)


def utf8_blocks(blocks: Iterable[bytes], encoding: str | None = None) -> Iterator[bytes]:
    """The same text in UTF-8; `encoding` None: what its byte order mark says, else UTF-8 as it is."""
    decoder = None
    for number, block in enumerate(blocks):
        if number == 0 and (encoding := encoding or _marked(block)):
            decoder = codecs.getincrementaldecoder(encoding)("strict")
        yield decoder.decode(block).encode("utf-8", "surrogatepass") if decoder else block
    if decoder:
        yield decoder.decode(b"", final=True).encode()


def _marked(head: bytes) -> str | None:
    """The encoding of a byte order mark, but UTF-8's."""
    return next((name for mark, name in MARKS if head.startswith(mark)), None)


def _guessed(head: bytes, flaw: _Flaw) -> str | None:
    """The encoding of text that is not UTF-8. None for UTF-8 with a few bad bytes, and for what looks like nothing."""
    sample = head[:SAMPLE] if not head[:SAMPLE].isascii() else flaw.around
    read = sample.decode("utf-8", "replace")
    bad = read.count("\ufffd")
    if sum(c > "\x7f" for c in read) - bad >= bad or flaw.cut:
        return None
    try:
        from charset_normalizer import from_bytes
    except ImportError:  # an installation that is older than this dependency
        return None

    best = from_bytes(sample, cp_isolation=GUESSED).best()
    if best is None:
        return encodings.clear(sample)
    return encodings.likeliest(sample) if best.encoding in encodings.LANGUAGES else best.encoding


def _damaged(damage: Damaged) -> _Flaw:
    return _Flaw("damaged", str(damage), None, True, "the text before the damage is kept")


def _find_flaw(blocks: Iterable[bytes]) -> _Flaw | None:
    """The first byte that is not text, with its offset and line; a file with a NUL byte is binary."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset, line, pending = 0, 1, 0
    flaw = None
    try:
        for block in blocks:
            if (nul := block.find(b"\0")) >= 0:
                here = line + block[:nul].count(b"\n")
                return _Flaw("not text", f"binary file, not text (NUL byte at offset {offset + nul})", here, False)
            try:
                if flaw is None:
                    decoder.decode(block)
            except UnicodeDecodeError as error:
                flaw = _not_utf8(error, offset - pending, line)
            pending = len(decoder.getstate()[0])
            offset, line = offset + len(block), line + block.count(b"\n")
    except Damaged as damage:
        return _damaged(damage)
    try:
        if flaw is None:
            decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        flaw = _not_utf8(error, offset - pending, line)
    return flaw


def _not_utf8(error: UnicodeDecodeError, base: int, line: int) -> _Flaw:
    """`error.object` starts at byte `base` of the file; bytes carried over from the block before hold no newline."""
    at = error.start
    return _Flaw(
        "not UTF-8",
        f"not UTF-8 (byte 0x{error.object[at]:02x} at offset {base + at})",
        line + error.object[:at].count(b"\n"),
        True,
        around=error.object[max(0, at - 500) : at + 500],
        cut=error.reason == "unexpected end of data",
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
    except Damaged:
        pass
    if text := decoder.decode(b"", final=True):
        yield text
