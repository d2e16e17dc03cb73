"""One file, or one data set, becomes documents. Streams: memory does not grow with the file."""

from collections.abc import Iterator

from kiem.data.formats import ChangedError, Document, Item, Rule
from kiem.data.records import read_json, read_jsonl
from kiem.data.tables import read_parquet, read_rows
from kiem.data.textfiles import read_text


def read_item(item: Item, text_key: str, rule: Rule) -> Iterator[Document]:
    """The documents of one item, in order. `text_key`: field or column of the text, where there are any.

    Raises ChangedError when it is at the end of a file that has another size or time than when it was hashed.
    """
    try:
        if item.kind == "text":
            yield from read_text(item, rule)
        elif item.kind == "json":
            yield from read_json(item, text_key, rule)
        elif item.kind == "jsonl":
            yield from read_jsonl(item, text_key, rule)
        elif item.kind == "parquet":
            yield from read_parquet(item, text_key, rule)
        else:
            yield from read_rows(item, text_key, rule)
    except OSError as error:
        rule.bad("unreadable", item.name, None, f"cannot be read: {error.strerror or error}")
        return
    if item.path is not None:
        stat = item.path.stat() if item.path.exists() else None
        if stat is None or (stat.st_size, stat.st_mtime_ns) != (item.size, item.mtime_ns):
            raise ChangedError(f"{item.name}: changed while it was read. Run again when nothing writes to it.")
