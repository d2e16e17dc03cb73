"""Records become documents: lines of JSONL, JSON files that hold records; and what a field of a record may be."""

import json
from collections.abc import Iterable, Iterator
from typing import Any

from kiem.data import formats
from kiem.data.formats import Damaged, Document, Item, Rule, blocks_of, pieces
from kiem.data.textfiles import read_text, utf8_blocks

CHATS = ("messages", "conversations", "conversation", "dialog", "dialogue", "chat")
_MISSING = object()
CHAT = "a list of chat messages, which is data for fine-tuning: pretraining needs plain text"


def read_jsonl(item: Item, text_key: str, rule: Rule) -> Iterator[Document]:
    """One record a line; records spread over several lines, or an array of them, in a file that is not too large."""
    assert item.path is not None
    if (whole := _over_lines(item)) is not None:
        for number, record in enumerate(whole, start=1):
            yield from _fields(record, text_key, item.name, number, rule)
        return
    number = 0
    try:
        for number, line in enumerate(_lines(utf8_blocks(blocks_of(item.path))), start=1):
            if line is None:
                what = f"a record of more than {formats.LONGEST_RECORD:,} bytes"
                rule.bad("too long", item.name, number, what)
                continue
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield from _record(line, text_key, item.name, number, rule)
    except Damaged as damage:
        kept = "the records before it are kept, the rest is left out"
        rule.bad("damaged", item.name, number + 1, str(damage), kept)
    except UnicodeError as error:
        rule.bad("not UTF-8", item.name, number + 1, f"not in the encoding that its byte order mark declares ({error})")


def read_json(item: Item, text_key: str, rule: Rule) -> Iterator[Document]:
    """A JSON file: the records of an array, or of one object that has the text; any other is read as plain text."""
    records = _whole(item)
    if isinstance(records, dict) and _lookup(records, text_key) is not _MISSING:
        records = [records]
    if isinstance(records, list) and records and all(isinstance(record, dict) for record in records):
        for number, record in enumerate(records, start=1):
            yield from _fields(record, text_key, item.name, number, rule)
        return
    yield from read_text(item, rule)


def _whole(item: Item) -> Any:
    """The JSON value of a whole file; None if it is none, or too large to be read at once."""
    try:
        return json.loads(_bounded(item), parse_int=_number, parse_float=_number)
    except (ValueError, RecursionError, Damaged):
        return None


def _bounded(item: Item) -> str:
    """The text of a file. Raises ValueError if it is too large or not text."""
    assert item.path is not None
    parts, size = [], 0
    for block in utf8_blocks(blocks_of(item.path)):
        parts.append(block)
        size += len(block)
        if size > formats.LONGEST_RECORD:
            raise ValueError("too large")
    return b"".join(parts).decode("utf-8-sig")


def _over_lines(item: Item) -> list[Any] | None:
    """The records of a JSONL file whose first line is only the beginning of one; None for a file as it should be."""
    assert item.path is not None
    try:
        head = next(utf8_blocks(blocks_of(item.path)), b"")
        first = head.removeprefix(b"\xef\xbb\xbf").lstrip().partition(b"\n")[0].strip()
        if not first.startswith((b"[", b"{")) or (first not in (b"[", b"{") and not first.startswith(b"[{")):
            return None
        text, decoder = _bounded(item), json.JSONDecoder(parse_int=_number, parse_float=_number)
        found: list[Any] = []
        at = 0
        while at < len(text):
            if text[at].isspace() or text[at] == ",":
                at += 1
                continue
            value, at = decoder.raw_decode(text, at)
            found += value if isinstance(value, list) else [value]
    except (ValueError, RecursionError, Damaged):
        return None
    return found


def _lines(blocks: Iterable[bytes]) -> Iterator[bytes | None]:
    """Lines without their ends; None for one that is too long."""
    parts: list[bytes] = []
    size = 0
    for block in blocks:
        *lines, rest = block.split(b"\n")
        for line in lines:
            if size + len(line) > formats.LONGEST_RECORD:
                yield None
            else:
                yield b"".join([*parts, line]) if parts else line
            parts, size = [], 0
        size += len(rest)
        if size > formats.LONGEST_RECORD:
            parts = []
        elif rest:
            parts.append(rest)
    if size > formats.LONGEST_RECORD:
        yield None
    elif parts:
        yield b"".join(parts)


def _record(line: bytes, text_key: str, name: str, number: int, rule: Rule) -> Iterator[Document]:
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        what = f"not UTF-8 (byte 0x{line[error.start]:02x} at byte {error.start} of the record)"
        if not rule.replaces:
            rule.bad("not UTF-8", name, number, what)
            return
        rule.bad("not UTF-8", name, number, what, "bad bytes read as U+FFFD")
        text = line.decode(errors="replace")
    try:
        record = json.loads(text, parse_int=_number, parse_float=_number)
    except (ValueError, RecursionError) as error:
        why = "too deeply nested" if isinstance(error, RecursionError) else str(error)
        rule.bad("record", name, number, f"not a JSON record ({why})")
        return
    yield from _fields(record, text_key, name, number, rule)


def _fields(record: Any, text_key: str, name: str, number: int, rule: Rule) -> Iterator[Document]:
    """The document of one record."""
    if not isinstance(record, dict):
        rule.bad("record", name, number, f"a JSON record must be an object, this is {_json_type(record)}")
        return
    value = _lookup(record, text_key)
    if value is not _MISSING:
        yield from field_document(value, text_key, name, number, rule)
    elif chat := next((key for key in CHATS if isinstance(record.get(key), list)), None):
        rule.bad("chat", name, number, f"no field {text_key!r}; field {chat!r} is {CHAT}")
    else:
        groups = [key for key, value in record.items() if isinstance(value, dict) and text_key in value]
        advice = f"data.text_key={groups[0]}.{text_key}" if groups else "data.text_key=FIELD"
        rule.bad("no text", name, number, f"no field {text_key!r}, it has {some_of(record)}: set {advice}")


def _lookup(record: dict[str, Any], key: str) -> Any:
    """A field by its name, or by the path a.b of one in a group."""
    if key in record:
        return record[key]
    value: Any = record
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            return _MISSING
        value = value[part]
    return value


def _number(digits: str) -> int:
    """Stands for any number: none is needed, and to read one of many digits takes quadratic time."""
    return 0


def _json_type(value: Any) -> str:
    names = {list: "an array", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def some_of(names: Iterable[str]) -> str:
    names = [repr(str(n)) for n in names]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") if names else "no fields"


def field_document(value: Any, text_key: str, name: str, number: int, rule: Rule) -> Iterator[Document]:
    """The document of one field: str, or bytes in UTF-8. An empty text is no document."""
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError as error:
            what = f"not UTF-8 (byte 0x{value[error.start]:02x} at byte {error.start} of {text_key!r})"
            rule.bad("not UTF-8", name, number, what, "bad bytes read as U+FFFD" if rule.replaces else "left out")
            if not rule.replaces:
                return
            value = value.decode(errors="replace")
    if not isinstance(value, str):
        _no_text(value, text_key, name, number, rule)
        return
    if bad := next((c for c in value if "\ud800" <= c <= "\udfff"), None) if not value.isascii() else None:
        what = f"a lone surrogate (U+{ord(bad):04X}) is not text"
        rule.bad("surrogate", name, number, what, "read as U+FFFD" if rule.replaces else "left out")
        if not rule.replaces:
            return
        value = "".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in value)
    yield from pieces([value], f"{name}:{number}")


def _no_text(value: Any, text_key: str, name: str, number: int, rule: Rule) -> None:
    """Say what a field holds that is not text, and how to reach the text in it."""
    if isinstance(value, dict):
        inner = next((key for key in value if isinstance(value[key], str)), next(iter(value), "FIELD"))
        what = f"field {text_key!r} is a group with {some_of(value)}: set data.text_key={text_key}.{inner}"
        rule.bad("no text", name, number, what)
    elif isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value):
        rule.bad("chat", name, number, f"field {text_key!r} is {CHAT}")
    else:
        rule.bad("no text", name, number, f"field {text_key!r} is {_json_type(value)}, not text")
