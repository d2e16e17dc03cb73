"""Rows become documents: those of Parquet files and of Hugging Face data sets.

Memory is bounded as for records (records.py): a cell of more than LONGEST_RECORD bytes is left out, and what is read
at once is chosen so that it holds at most LARGEST_PAGE bytes.
"""

import os
from collections.abc import Iterator
from typing import Any

from kiem.data import formats
from kiem.data.formats import Document, Item, Rule
from kiem.data.pages import pages
from kiem.data.records import CHAT, CHATS, field_document, some_of
from kiem.errors import DataError
from kiem.files import open_regular

ROWS = 256  # read at once, where they are not large
LARGEST_PAGE = 512 * 1024 * 1024  # bytes: a page of Parquet is unpacked as a whole; usual ones have 1 MiB


def read_parquet(item: Item, text_key: str, rule: Rule) -> Iterator[Document]:
    """The rows of a Parquet file."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{item.name}: reading Parquet needs pyarrow: pip install 'kiem[parquet]'") from None
    assert item.path is not None
    number = 0
    try:
        # The name in bytes: pyarrow takes no text that is not UTF-8.
        with (
            open_regular(item.path) as file,
            pyarrow.OSFile(os.fsencode(item.path)) as source,
            pyarrow.parquet.ParquetFile(source, buffer_size=formats.BLOCK) as table,
        ):
            names = table.schema_arrow.names
            column, path = (text_key, []) if text_key in names else _column(text_key)
            if column not in names:
                _no_column(item.name, text_key, names, rule)
                return
            for index in range(table.num_row_groups):
                group = table.metadata.row_group(index)
                rows = _rows_at_once(file, group, column)
                if not rows:
                    what = f"a part of {group.num_rows:,} rows has a page of more than {LARGEST_PAGE:,} bytes"
                    rule.bad("too long", item.name, number + 1, what, "these rows are left out")
                    number += group.num_rows
                    continue
                for batch in table.iter_batches(batch_size=rows, row_groups=[index], columns=[column]):
                    yield from _cells(batch.column(0), path, text_key, item.name, number, rule)
                    number += len(batch)
    except (pyarrow.ArrowException, ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the system, not of pyarrow
            raise
        kept = "the rows before it are kept" if number else "left out"
        rule.bad("damaged", item.name, number + 1 if number else None, f"damaged Parquet file ({error})", kept)


def _rows_at_once(file: Any, group: Any, column: str) -> int:
    """How many rows of a row group take at most LARGEST_PAGE bytes together; 0 if one page takes more."""
    largest = 1
    for index in range(group.num_columns):
        chunk = group.column(index)
        if chunk.path_in_schema != column and not chunk.path_in_schema.startswith(f"{column}."):
            continue
        values = 0
        for page in pages(file, chunk):
            values += page.values
            largest = max(largest, page.bytes)
            if largest > LARGEST_PAGE:
                return 0
        if values > group.num_rows:  # lists: all of them may be of one row
            largest = max(largest, 8 * values)
    return min(ROWS, LARGEST_PAGE // largest)


def read_rows(item: Item, text_key: str, rule: Rule) -> Iterator[Document]:
    """The rows of a data set."""
    names = item.rows.column_names
    column, path = (text_key, []) if text_key in names else _column(text_key)
    if column not in names:
        _no_column(item.name, text_key, names, rule)
        return
    table = item.rows.select_columns([column]).with_format("arrow")
    largest = max((chunk.nbytes for chunk in item.rows.data.column(column).chunks), default=1)
    rows = max(1, min(ROWS, LARGEST_PAGE // max(1, largest)))
    for start in range(0, len(table), rows):
        for chunk in table[start : start + rows].column(0).chunks:
            yield from _cells(chunk, path, text_key, item.name, start, rule)
            start += len(chunk)


def _cells(cells: Any, path: list[str], text_key: str, name: str, before: int, rule: Rule) -> Iterator[Document]:
    """The documents of the cells of a column. `before`: rows before them."""
    small = cells.nbytes <= formats.LONGEST_RECORD
    for number, cell in enumerate(cells, start=before + 1):
        found = _inside(cell, path)
        buffer = None if found is None or not hasattr(found, "as_buffer") else found.as_buffer()
        if not small and buffer is not None and buffer.size > formats.LONGEST_RECORD:
            what = f"a record of more than {formats.LONGEST_RECORD:,} bytes"
            rule.bad("too long", name, number, what)
            continue
        try:
            value = None if found is None else found.as_py()
        except UnicodeDecodeError:  # a string column whose bytes nobody checked
            value = found.as_buffer().to_pybytes()
        yield from field_document(value, text_key, name, number, rule)


def _column(text_key: str) -> tuple[str, list[str]]:
    """The column and the fields in it of a path a.b."""
    column, *path = text_key.split(".")
    return column, path


def _inside(cell: Any, path: list[str]) -> Any:
    """The cell at a path in a cell of groups; None if there is none."""
    for part in path:
        try:
            cell = cell[part]
        except (KeyError, TypeError, IndexError, ValueError):
            return None
    return getattr(cell, "value", None) if hasattr(cell, "dictionary") else cell


def _no_column(name: str, text_key: str, columns: list[str], rule: Rule) -> None:
    if chat := next((column for column in CHATS if column in columns), None):
        rule.bad("chat", name, None, f"no column {text_key!r}; column {chat!r} is {CHAT}")
    else:
        rule.bad("no text", name, None, f"no column {text_key!r}, it has {some_of(columns)}: set data.text_key=COLUMN")
