"""Files on disk: the atomic write, the lock, JSON with numbers that are not finite, and reading what others have left.

Everything that a crash can leave half done has a name that begins with TEMPORARY; whoever holds a folder's lock may
remove such files.
"""

import contextlib
import errno
import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from io import BufferedReader
from pathlib import Path
from typing import IO, Any

from kiem.errors import BusyError, StorageError
from kiem.format import bytes_text

TEMPORARY = ".tmp-"
LOCK, OWNER = ".lock", ".lock.owner"
MOST_JSON_BYTES = 256 << 20
# What a number is called that JSON has no word for: one spelling, for files, pages and --json.
NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_NO_FLOCK = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


# -- writing -----------------------------------------------------------------------------------------------------------


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace the file at once: a reader, and a start after a power cut, sees the old one or the new one.

    Text is written as UTF-8, lone surrogates as escapes. Raises StorageError; then the old file is untouched.
    """
    path = Path(path)
    data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    temporary = path.with_name(f"{TEMPORARY}{path.name[:60]}-{os.urandom(4).hex()}")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            publish(file, path)
        sync_folder(path.parent)
    except OSError as problem:
        raise storage_error(problem, str(path), path.parent, len(data)) from problem
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def publish(file: IO[bytes], path: Path) -> None:
    """Close a file that was written under a temporary name and give it its own, once it is on the disk.

    Raises OSError. The name survives a power cut after `sync_folder`.
    """
    file.flush()
    os.fsync(file.fileno())
    file.close()  # Windows renames no open file
    os.replace(file.name, path)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut. (Windows has no such call.)"""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def storage_error(problem: OSError, what: str, folder: Path, needed: int | None = None) -> StorageError:
    """The message for a write that failed: what, why, how much it needs, how much is free, what to do."""
    import shutil

    try:
        free = bytes_text(shutil.disk_usage(folder).free) + " free there"
    except OSError:
        free = "free space unknown"
    remedy = {
        errno.ENOSPC: "Make room",
        errno.EDQUOT: "Make room within your quota",
        errno.EFBIG: "Raise the limit on file size (ulimit -f)",
        errno.EACCES: "Make the folder writable",
        errno.EPERM: "Make the folder writable",
        errno.EROFS: "Make the file system writable, or choose another folder",
        errno.ENAMETOOLONG: "Choose a shorter name",
    }.get(problem.errno or 0, "Check the disk")
    need = "" if needed is None else f" It needs {bytes_text(needed)}, {free}."
    return StorageError(
        f"cannot write {what}: {problem.strerror or problem}.{need} What was complete before is untouched. "
        f"{remedy}, then run the same command again."
    )


# -- the lock ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def lock(folder: Path, what: str) -> Iterator[None]:
    """Hold a folder (it must exist) for writing, without waiting for another holder. `what` names it in messages.

    The lock ends with the process however that ends, kill -9 included. On a file system that cannot lock files it is a
    marker file with the holder's process and host. Raises BusyError that names the holder, StorageError if the
    folder cannot be written.
    """
    held, owner = _acquire(folder, what), os.getpid()
    try:
        with contextlib.suppress(StorageError):  # the note is for people; a full disk must not stop a resume here
            write_atomically(folder / OWNER, json.dumps(_self_description()) + "\n")
        yield
    finally:
        if os.getpid() == owner:  # a fork shares the lock: only its owner ends the hold
            with contextlib.suppress(OSError):
                (folder / OWNER).unlink(missing_ok=True)
            held.release()


@contextlib.contextmanager
def exclusive(file: Path, timeout: float = -1) -> Iterator[None]:
    """Hold a lock file, waiting for another holder up to `timeout` seconds; below 0 as long as it takes.

    Raises TimeoutError, and OSError as the system gives it. On a file system that cannot lock files as `lock` says.
    """
    held = _held(file, timeout)
    try:
        yield
    finally:
        held.release()


def _held(file: Path, timeout: float) -> Any:
    import warnings

    from filelock import FileLock, SoftFileLock, Timeout

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # filelock falls back by itself on some systems, and warns
        try:
            held = FileLock(file, timeout=timeout)
            held.acquire()
        except OSError as problem:
            if isinstance(problem, Timeout) or problem.errno not in _NO_FLOCK:
                raise
            held = SoftFileLock(f"{file}.marker", timeout=timeout)
            held.acquire()
    return held


def _acquire(folder: Path, what: str) -> Any:
    from filelock import Timeout

    try:
        held = _held(folder / LOCK, 0)
    except Timeout as problem:
        raise BusyError(
            f"{what} is being written by {_holder(folder)}. "
            f"Wait until it ends, stop it (it saves first), or choose another folder."
        ) from problem
    except OSError as problem:
        raise storage_error(problem, what, folder) from problem
    return held


def _holder(folder: Path) -> str:
    try:
        holder = read_json(folder / OWNER, 4096)
        return f"process {int(holder['pid'])} on {holder['host']!s:.100}, since {holder['since']!s:.40}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def _self_description() -> dict[str, Any]:
    import socket
    from datetime import UTC, datetime

    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
    }


# -- JSON --------------------------------------------------------------------------------------------------------------


def to_json(value: Any, indent: int | None = None, sort_keys: bool = False) -> str:
    """JSON that every reader takes: numbers that are not finite by name (NON_FINITE), lone surrogates as escapes,
    scalars of numpy and torch as numbers, paths and anything unknown as text."""
    text = json.dumps(plain(value), indent=indent, sort_keys=sort_keys, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def plain(value: Any) -> Any:
    """The value made of what JSON has."""
    if isinstance(value, Mapping):
        return {str(key): plain(of) for key, of in value.items()}
    if isinstance(value, list | tuple):
        return [plain(of) for of in value]
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        return plain(value.item())
    return os.fspath(value) if isinstance(value, os.PathLike) else str(value)


def from_json(text: str | bytes) -> Any:
    """The value of JSON text. Raises ValueError for any text that is none, however deep or long its numbers are."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(path: Path, most_bytes: int = MOST_JSON_BYTES) -> Any:
    """The value in a JSON file. Raises ValueError for what is no JSON or longer than `most_bytes`, OSError as open."""
    with open_regular(path) as file:
        data = file.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise ValueError(f"more than {bytes_text(most_bytes)}")
    return from_json(data)


def open_regular(path: Path) -> BufferedReader:
    """Open a file for reading. Raises OSError for a pipe or a device too, which would be waited for."""
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def embedded_json(value: Any) -> str:
    """JSON for a script element: nothing in it can end the element, open a comment or break a line of JavaScript."""
    text = json.dumps(plain(value), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def digest(text: str) -> str:
    """The hash by which a Content-Security-Policy names a script or style."""
    import base64
    import hashlib

    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
