"""How large the pages of a Parquet file are, before any is read: a page of a few kilobytes can unpack to gigabytes.

A column chunk is a sequence of pages, each behind a header in Thrift's compact protocol
(https://github.com/apache/parquet-format). pyarrow takes as much memory for a page as its header says, and does not
show the headers.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

# Fields of PageHeader.
KIND, UNPACKED, PACKED, DATA, DATA_V2 = 1, 2, 3, 5, 8
NUM_VALUES = 1  # of DataPageHeader and DataPageHeaderV2
DATA_KINDS = {0: DATA, 3: DATA_V2}
# Types of Thrift's compact protocol.
STOP, TRUE, FALSE, BYTE, I16, I32, I64, DOUBLE, BINARY, STRUCT = 0, 1, 2, 3, 4, 5, 6, 7, 8, 12
MOST_NESTED = 4


@dataclass(frozen=True)
class Page:
    """A page's memory, packed or unpacked, whichever is more, and its values; of a dictionary none."""

    bytes: int
    values: int


def pages(file: BinaryIO, chunk: Any) -> Iterator[Page]:
    """The pages of a column chunk (of pyarrow's metadata). Raises ValueError where there is none."""
    position = chunk.data_page_offset
    if chunk.has_dictionary_page and 0 < chunk.dictionary_page_offset < position:
        position = chunk.dictionary_page_offset
    values = 0
    while values < chunk.num_values:
        file.seek(position)
        header = _fields(file)
        packed, unpacked = header.get(PACKED), header.get(UNPACKED)
        if not isinstance(packed, int) or not isinstance(unpacked, int) or packed < 0 or unpacked < 0:
            raise ValueError("a page header has no sizes")
        position = file.tell() + packed
        inner = header.get(DATA_KINDS.get(header.get(KIND, -1), -1), {})
        count = inner.get(NUM_VALUES, 0) if isinstance(inner, dict) else 0
        yield Page(max(packed, unpacked), count)
        values += count


def _fields(file: BinaryIO, depth: int = 0) -> dict[int, Any]:
    """The fields of a structure by number: whole numbers and structures; what else there may be is passed over."""
    if depth > MOST_NESTED:
        raise ValueError("a page header is nested too deeply")
    found: dict[int, Any] = {}
    number = 0
    while (head := _byte(file)) & 15 != STOP:
        number = number + (head >> 4) if head >> 4 else _signed(file)
        kind = head & 15
        if kind == STRUCT:
            found[number] = _fields(file, depth + 1)
        elif kind in (I16, I32, I64):
            found[number] = _signed(file)
        elif kind in (BYTE, DOUBLE):
            file.seek(1 if kind == BYTE else struct.calcsize("d"), 1)
        elif kind == BINARY:
            file.seek(_unsigned(file), 1)
        elif kind not in (TRUE, FALSE):
            raise ValueError("a page header has a field of unknown type")
    return found


def _signed(file: BinaryIO) -> int:
    value = _unsigned(file)
    return (value >> 1) ^ -(value & 1)


def _unsigned(file: BinaryIO) -> int:
    value = 0
    for shift in range(0, 70, 7):
        byte = _byte(file)
        value |= (byte & 127) << shift
        if byte < 128:
            return value & (1 << 64) - 1
    raise ValueError("a page header has a number that is too long")


def _byte(file: BinaryIO) -> int:
    data = file.read(1)
    if not data:
        raise ValueError("the file ends in a page header")
    return data[0]
