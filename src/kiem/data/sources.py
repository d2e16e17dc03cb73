"""A source of the configuration becomes a sorted list of items, each known by the digest of its contents.

    PATH          a file, a folder with everything below it, or a glob; hidden files and binary kinds are passed over
    -             standard input, as text
    python        the Python standard library's source and documentation on this machine, without installed packages
    hf:NAME[:CONFIG][:SPLIT]    a data set of the Hugging Face hub, or in the folder NAME; the split "train" by default

Files end in .gz or .zst if they are compressed, in .jsonl or .parquet if they hold records; the rest is text.
"""

import glob
import hashlib
import json
import os
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

import psutil

from kiem.config.run import Source
from kiem.data import documents
from kiem.data.formats import Document, Item, Problem, Rule, kind_of
from kiem.data.read import read_item
from kiem.errors import DataError, StorageError
from kiem.files import publish, read_json, write_atomically

__all__ = ["Document", "Problem", "list_items", "read_documents"]

# Not opened when a folder is read. What else turns out not to be text is reported and left out.
BINARY = frozenset(
    """
    7z a avif avi bin bmp bz2 ckpt class db dll dmg doc dylib eot epub exe flac gguf gif h5 heic
    ico iso jar jpeg jpg lib m4a mkv mo mov mp3 mp4 mpeg npy npz o obj odt ogg onnx otf pickle pkl
    png ppt pptx psd pt pth pyc pyd pyo rar safetensors so sqlite sqlite3 tar tgz tif tiff ttf war wasm
    wav webm webp whl woff woff2 xls xlsx xz zip
    """.split()  # noqa: SIM905
)
REMEMBER = 64 * 1024 * 1024  # bytes: digests of files from this size on are remembered in the cache folder
MOST_NOTE_BYTES = 1 << 20
RACY = 2.0  # seconds: a file changed so shortly before it was hashed may change again within its time stamp


Report = Callable[[Problem], None]


def read_documents(source: Source, on_bad_text: str, report: Report, cache: Path | None = None) -> Iterator[Document]:
    """Stream the documents of a source in its order. Raises DataError where there is nothing to read, and for every
    problem with `on_bad_text` "error"; with "skip" and "replace", problems go to `report`."""
    for item in list_items(source, cache, report):
        yield from read_item(item, source.text_key or "text", Rule(on_bad_text, report))


def list_items(source: Source, cache: Path | None = None, report: Report = lambda problem: None) -> list[Item]:
    """The files or data set of a source, sorted, with the digests of their contents.

    `cache`: folder for standard input and for digests of large files. `report` is told of files that are passed over.
    Raises DataError for a missing path, an empty file or folder.
    """
    path = source.path
    if path.startswith("hf:"):
        return [_dataset(path, cache)]
    if path == "python":
        return _without_copies(_digested(_standard_library(), cache))
    if path == "-":
        spooled = spool_stdin(cache or Path(tempfile.gettempdir()))
        return [replace(item, name="standard input") for item in _digested([(str(spooled), spooled)], cache)]
    return _as_text(_digested(_files(path, report), cache), cache, report)


def _files(path: str, report: Report) -> list[tuple[str, Path]]:
    """(name shown, file) for a path that a user gave."""
    try:
        return _found(path, Path(path).expanduser(), report)
    except OSError as error:  # no permission, a name that no file can have, a broken disk
        raise DataError(f"source {path}: {error.filename or path} cannot be read: {error.strerror}") from None
    except ValueError as error:  # a NUL character
        raise DataError(f"source {path!r}: no file can have this name ({error})") from None


def _found(path: str, given: Path, report: Report) -> list[tuple[str, Path]]:
    if given.is_file():
        if given.stat().st_size == 0:
            raise DataError(f"source {path}: the file is empty")
        return [(str(given), given)]
    if given.is_dir():
        if given.resolve().parent == given.resolve():
            raise DataError(f"source {path}: this is the whole file system: give the folders with your text")
        found = set(_walk(given, report))
        if not found:
            raise DataError(
                f"source {path}: the folder has no text files (hidden files and binary kinds such as .zip, "
                ".png or .pyc are passed over)"
            )
    elif given.exists():
        raise DataError(
            f"source {path}: {_special(given)}, which is not read: give a file or a folder, or pipe text into '-'"
        )
    elif glob.has_magic(path):
        found = _matches(path, given, report)
    else:
        raise DataError(
            f"source {path}: no such file or folder (looked in {Path.cwd()}). A source is a file, a "
            "folder, a glob, '-' for standard input, 'python' for the standard library, or 'hf:NAME'."
        )
    # A file that links lead to twice is read once, under its shortest name.
    once: dict[str, Path] = {}
    for file in sorted(found, key=lambda file: (len(file.parts), file.as_posix())):
        once.setdefault(os.path.realpath(file), file)
    files = sorted(once.values(), key=Path.as_posix)
    return [(str(file), file) for file in files if file.stat().st_size]


def _matches(path: str, given: Path, report: Report) -> set[Path]:
    """The files that a pattern matches, and those below folders that it matches. A folder of the pattern that exists is
    taken by its name, whatever characters it has."""
    matches = glob.glob(_with_literal_parts(given), recursive=True) or glob.glob(str(given), recursive=True)
    found: set[Path] = set()
    for match in sorted(map(Path, matches), key=Path.as_posix):
        if match.is_dir():
            found.update(_walk(match, report))
        elif match.is_file():
            found.add(match)
        else:
            report(Problem(str(match), None, _special(match), "passed over", "special"))
    if not found:
        raise DataError(
            f"source {path}: no file matches this pattern in {Path.cwd()} (in a pattern * ? and [ ] are special: for a "
            "file whose name has one of them write [*], [?] or [[])"
        )
    return found


def _with_literal_parts(given: Path) -> str:
    """The pattern in which folders that exist under their name are escaped."""
    start = Path(given.anchor)
    parts = list(given.relative_to(start).parts if given.anchor else given.parts)
    while parts and (start / parts[0]).is_dir():
        start /= parts.pop(0)
    return str(Path(glob.escape(str(start)), *parts))


def _special(path: Path) -> str:
    """What a file is that is neither a file nor a folder."""
    if path.is_fifo():
        return "a named pipe (FIFO)"
    if path.is_socket():
        return "a socket"
    if path.is_block_device() or path.is_char_device():
        return "a device"
    return "a broken link" if path.is_symlink() else "not a regular file"


def _walk(
    folder: Path, report: Report, skip: frozenset[str] = frozenset(), seen: frozenset[str] = frozenset()
) -> Iterator[Path]:
    """Files below a folder that may be text; links are followed, but not in circles."""
    real = os.path.realpath(folder)
    if real in seen:
        return
    if real == "/dev" or f"{real}/".startswith(("/proc/", "/sys/")):  # reading some of these files never ends
        report(Problem(str(folder), None, "a folder of the operating system", "passed over", "special"))
        return
    try:
        with os.scandir(folder) as scan:
            entries = sorted(scan, key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"folder {folder}: cannot be read: {error.strerror}") from None
    for entry in entries:
        if entry.name.startswith(".") or entry.name in skip:
            continue
        suffix = entry.name.rpartition(".")[2].lower()
        if entry.is_dir():
            yield from _walk(Path(entry.path), report, skip, seen | {real})
        elif not entry.is_file():
            report(Problem(entry.path, None, _special(Path(entry.path)), "passed over", "special"))
        elif suffix in BINARY:
            report(Problem(entry.path, None, f"a .{suffix} file", "passed over", "not text"))
        else:
            yield Path(entry.path)


def _standard_library() -> list[tuple[str, Path]]:
    root = Path(sysconfig.get_path("stdlib"))
    if not root.is_dir():
        raise DataError(f"source python: this Python has no standard library folder ({root}): give a path to text")
    skip = frozenset({"site-packages", "dist-packages", "__pycache__"})
    files = [
        file
        for file in _walk(root, lambda problem: None, skip)  # only some kinds are meant
        if file.suffix in {".py", ".txt", ".rst", ".md"} and file.stat().st_size
    ]
    return [(f"python:{file.relative_to(root).as_posix()}", file) for file in sorted(files, key=Path.as_posix)]


def _without_copies(items: Iterable[Item]) -> list[Item]:
    first: dict[str, Item] = {}
    for item in items:
        first.setdefault(item.digest, item)
    return list(first.values())


@lru_cache(maxsize=8)  # standard input can be read once, its text may be asked for again
def spool_stdin(folder: Path) -> Path:
    """Copy standard input into a file named by its contents."""
    stream = getattr(sys.stdin, "buffer", None)
    if stream is None or sys.stdin.isatty():
        raise DataError("source -: standard input is a terminal. Pipe text into the command, or give a path.")
    folder = folder / "stdin"
    folder.mkdir(parents=True, exist_ok=True)
    _clean(folder)
    digest, size = hashlib.sha256(), 0
    spooled = folder / f"tmp-{os.getpid()}-{os.urandom(4).hex()}"
    try:
        with open(spooled, "xb") as file:
            while block := _read_block(stream):
                digest.update(block)
                file.write(block)
                size += len(block)
            if size == 0:
                raise DataError("source -: standard input is empty")
            target = folder / f"{digest.hexdigest()[:32]}.txt"
            publish(file, target)
        return target
    finally:
        spooled.unlink(missing_ok=True)


def _read_block(stream: BinaryIO) -> bytes:
    try:
        return stream.read(1 << 20)
    except OSError as error:  # a folder, a closed terminal
        raise DataError(f"source -: standard input cannot be read: {error.strerror}") from None


def _clean(folder: Path) -> None:
    """Remove what processes that are no more have left behind."""
    for path in folder.glob("tmp*"):
        maker = path.name.split("-")[1] if path.name.startswith("tmp-") else ""
        if not (maker.isdigit() and psutil.pid_exists(int(maker))):
            path.unlink(missing_ok=True)


def _as_text(items: list[Item], cache: Path | None, report: Report) -> list[Item]:
    """Items in which web pages, notebooks, PDF and Word files are the text that is in them. Without the library that it
    takes, pages are read as they stand, and the others are left out."""
    found: list[Item | None] = []
    wanted: list[int] = []
    for item in items:
        suffix = item.path.suffix.lower().removeprefix(".") if item.path else ""
        if suffix not in documents.LIBRARIES:
            found.append(item)
        elif documents.needs(suffix):
            action = "read with its markup" if suffix in ("html", "htm") else "left out"
            report(Problem(item.name, None, f"reading a .{suffix} file needs {documents.INSTALL}", action, "needs"))
            found.append(item if action != "left out" else None)
        else:
            wanted.append(len(found))
            found.append(item)
    folder = (cache or Path(tempfile.gettempdir()) / "kiem") / "documents"
    files = [(path, items[index].digest) for index in wanted if (path := items[index].path)]
    texts = documents.convert(files, folder)
    for index, text in zip(wanted, texts, strict=True):
        name, digest = items[index].name, items[index].digest
        if isinstance(text, str):
            report(Problem(name, None, f"cannot be converted to text ({text})", "left out", "unreadable"))
            found[index] = None
            continue
        kind = "the text of a notebook" if name.endswith(".ipynb") else "the text in it"
        report(Problem(name, None, f"a {Path(name).suffix} file", f"{kind} is read", "converted"))
        stat = text.stat()
        found[index] = Item(name, "text", text, f"text of {digest}", stat.st_size, stat.st_mtime_ns)
    kept = [item for item in found if item is not None]
    if items and not kept:
        raise DataError(
            f"source {items[0].name}: it holds no readable text. Web pages, PDF and Word files need "
            f"{documents.INSTALL}; scanned pages hold no text"
        )
    return kept


# -- data sets ---------------------------------------------------------------------------------------------------------


def _dataset(path: str, cache: Path | None) -> Item:
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"source {path}: Hugging Face datasets need the datasets library: pip install 'kiem[hub]'"
        ) from None
    name, config, split = _dataset_name(path)
    try:
        if (Path(name) / "state.json").is_file() or (Path(name) / "dataset_dict.json").is_file():
            rows = datasets.load_from_disk(name)
            if isinstance(rows, datasets.DatasetDict):
                rows = rows[split]
        else:
            rows = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the library raises whatever its many readers raise
        reason = f"it has no split {split!r}, but {sorted(rows)}" if isinstance(error, KeyError) else str(error).strip()
        raise DataError(
            f"source {path}: {reason or type(error).__name__}. The form is hf:NAME[:CONFIG][:SPLIT], where NAME is "
            "a dataset on the hub or a local folder."
        ) from None
    if len(rows) == 0:
        raise DataError(f"source {path}: the dataset has no rows")
    return Item(path, "dataset", None, _rows_digest(rows, cache), rows=rows)


def _dataset_name(path: str) -> tuple[str, str | None, str]:
    """NAME, CONFIG and SPLIT of `hf:NAME[:CONFIG][:SPLIT]`."""
    name, *rest = path.removeprefix("hf:").split(":")
    if not name or len(rest) > 2:
        raise DataError(f"source {path}: the form is hf:NAME[:CONFIG][:SPLIT]")
    local = Path(name).expanduser()
    return str(local) if local.is_dir() else name, rest[0] if len(rest) == 2 else None, rest[-1] if rest else "train"


def _rows_digest(rows: Any, cache: Path | None) -> str:
    """Digest of a data set: of its Arrow files, or of the rows where they are in memory or a selection of those."""
    digest = hashlib.sha256(f"{len(rows)} {rows.column_names}".encode())
    if rows.cache_files and rows._indices is None:
        for entry in rows.cache_files:
            digest.update(_file_digest(Path(entry["filename"]), cache)[0].encode())
    else:
        for row in rows:
            digest.update(repr(row).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


# -- digests -----------------------------------------------------------------------------------------------------------


def _digested(files: list[tuple[str, Path]], cache: Path | None) -> list[Item]:
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        found = pool.map(lambda file: _file_digest(file[1], cache), files)
        return [Item(name, kind_of(path.name), path, *facts) for (name, path), facts in zip(files, found, strict=True)]


def _file_digest(path: Path, cache: Path | None) -> tuple[str, int, int]:
    """(SHA-256 of the contents, bytes, modification time). A file that cannot be read is reported in its turn."""
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            stat = os.fstat(file.fileno())
            if stat.st_size < REMEMBER or cache is None:
                return _sha256(file), stat.st_size, stat.st_mtime_ns
            return _remembered(file, path, stat, cache), stat.st_size, stat.st_mtime_ns
    except OSError as error:
        return f"unreadable: {error.errno}", 0, 0


def _without_waiting(path: str, flags: int) -> int:
    """Opens a file; one that has become a named pipe in the meantime does not wait for a writer."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _sha256(file: BufferedReader) -> str:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _remembered(file: BufferedReader, path: Path, stat: os.stat_result, cache: Path) -> str:
    """The digest of a large file, hashed again whenever its size, times or inode are not those it was hashed with."""
    note = cache / "digests" / f"{hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]}.json"
    facts = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev]
    try:
        known = read_json(note, MOST_NOTE_BYTES)
        if known["facts"] == facts and isinstance(known["sha256"], str):
            return known["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    settled = time.time() - max(stat.st_mtime, stat.st_ctime) > RACY
    digest = _sha256(file)
    if settled:
        with suppress(OSError, StorageError):  # it only saves time
            note.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(note, json.dumps({"path": str(path), "facts": facts, "sha256": digest}))
    return digest
