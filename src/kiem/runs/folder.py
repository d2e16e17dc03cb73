"""The run folder: one writer at a time, changes that are whole or absent, and what a full disk says.

    run/.lock                      held by the process that writes the run; the kernel drops it when that process dies
    run/checkpoints/step-00001000  whole, or it would not have this name
    run/checkpoints/.tmp-*         an interrupted save or removal: waste
    run/checkpoints/.old-step-*    a checkpoint about to be replaced; put back if the replacement never arrived
"""

import contextlib
import errno
import json
import os
import shutil
import socket
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import psutil

from kiem.errors import BusyError, StorageError
from kiem.format import bytes_text

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

TEMPORARY, REPLACED = ".tmp-", ".old-"
_TAKEN = {errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK, errno.EDEADLK}


def checkpoints_folder(run: Path) -> Path:
    """Where the run keeps its checkpoints."""
    return Path(run) / "checkpoints"


@contextlib.contextmanager
def lock(run: Path) -> Iterator[Path]:
    """Hold the run folder for writing (it is made if missing), and clear what an interrupted save left in it.

    The lock belongs to the open file, so it ends with the process however that ends, kill -9 included. Raises BusyError
    with process and host of the holder, StorageError if the folder cannot be written.
    """
    run, owner = Path(run), os.getpid()
    try:
        run.mkdir(parents=True, exist_ok=True)
        handle = os.open(run / ".lock", os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o644)
    except OSError as problem:
        raise StorageError(
            f"cannot write the run folder {run}: {problem.strerror}. Choose a folder that you may write."
        ) from problem
    try:
        _take(handle, run)
        with contextlib.suppress(OSError):  # the text is for people; a full disk must not stop a resume here
            os.ftruncate(handle, 0)
            os.lseek(handle, 0, os.SEEK_SET)  # reading what a killed run left has moved on
            os.write(handle, _self_description().encode())
        clean(checkpoints_folder(run))
        yield run
    finally:
        # A fork shares the open file: only its owner may end the hold (closing a copy does not).
        if os.getpid() == owner:
            with contextlib.suppress(OSError):
                os.ftruncate(handle, 0)
        os.close(handle)


def _take(handle: int, run: Path) -> None:
    taken = try_lock(handle)
    holder = {}
    with contextlib.suppress(OSError, ValueError):
        os.lseek(handle, 0, os.SEEK_SET)
        holder = json.loads(os.read(handle, 4096))
    if taken is None:  # the file system has no locks: ask whether the one who signed still runs
        taken = not _alive(holder)
    if taken:
        return
    who = "another process"
    if isinstance(holder, dict) and "pid" in holder:
        who = f"process {holder['pid']} on {holder.get('host')}, since {holder.get('since')}"
    raise BusyError(
        f"the run folder {run} is being written by {who}. "
        "Wait until it ends, stop it (it saves first), or choose another folder."
    )


def _self_description() -> str:
    pid = os.getpid()
    return json.dumps({
        "pid": pid,
        "host": socket.gethostname(),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
        "started": psutil.Process(pid).create_time(),
    })


def _alive(holder: dict) -> bool:
    """Whether the process that signed a lock file still runs, as far as this host can tell."""
    if not isinstance(holder, dict) or "pid" not in holder:
        return False
    if holder.get("host") != socket.gethostname():
        return True
    try:
        return abs(psutil.Process(holder["pid"]).create_time() - holder.get("started", 0.0)) < 1.0
    except (psutil.Error, TypeError, ValueError):
        return False


def try_lock(handle: int, shared: bool = False) -> bool | None:
    """Lock an open file without waiting: True if it is ours, False if held elsewhere, None if nothing locks here."""
    try:
        if fcntl is not None:
            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        elif not shared:
            os.lseek(handle, 1 << 30, os.SEEK_SET)  # Windows locks bytes against reading too: one far past the text
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
    except OSError as problem:
        return False if problem.errno in _TAKEN else None
    return True


def clean(folder: Path) -> None:
    """Remove what interrupted saves and removals left, and put back a checkpoint whose replacement never arrived."""
    if not folder.is_dir():
        return
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith(REPLACED):
            original = folder / entry.name.removeprefix(REPLACED)
            if not original.exists():
                os.rename(entry, original)
                continue
        if entry.name.startswith((TEMPORARY, REPLACED)):
            shutil.rmtree(entry, ignore_errors=True)


def publish(finished: Path, target: Path) -> None:
    """Give a finished folder its name, atomically; a folder of that name is replaced and never absent after a crash."""
    replaced = target.parent / (REPLACED + target.name)
    if target.exists():
        os.rename(target, replaced)
    os.rename(finished, target)
    sync_folder(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut. (Windows has no such call.)"""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def require_space(folder: Path, needed: int) -> None:
    """Raise OSError (ENOSPC) if the disk has fewer than `needed` bytes free, before any is written."""
    usage = shutil.disk_usage(folder)
    if usage.total and usage.free < needed:  # some network file systems report no size at all
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def storage_error(problem: OSError, what: str, folder: Path, needed: int) -> StorageError:
    """The message for a write that failed: what, why, how much it needs, how much is free, what to do."""
    try:
        free = bytes_text(shutil.disk_usage(folder).free) + " free there"
    except OSError:
        free = "the free space is unknown"
    remedy = {
        errno.ENOSPC: "Make room, or keep fewer checkpoints (train.keep_checkpoints)",
        errno.EDQUOT: "Make room within your quota, or keep fewer checkpoints (train.keep_checkpoints)",
        errno.EFBIG: "Raise the limit on file size (ulimit -f)",
        errno.EACCES: "Make the folder writable",
        errno.EPERM: "Make the folder writable",
        errno.EROFS: "Make the file system writable, or move the run folder",
    }.get(problem.errno, "Check the disk")
    return StorageError(
        f"cannot save {what} in {folder}: {problem.strerror or problem}. It needs {bytes_text(needed)}, {free}. "
        f"What was saved before is untouched. {remedy}, then resume the run by naming its folder."
    )
