"""Checkpoints: whole or absent, exact, and checked byte by byte before use.

    checkpoints/step-00001000/
        model.safetensors optimizer.safetensors random.safetensors ...   one file a group of tensors
        state.json                                                       everything that is not a tensor
        manifest.json                                                    bytes and SHA-256 of each file; written last
    checkpoints/.tmp-*          an interrupted save or removal: waste
    checkpoints/.old-step-*     a checkpoint about to be replaced; put back if the replacement never arrived

A checkpoint is written under a temporary name, flushed to the disk, and renamed when complete, so a run that is killed
anywhere leaves the checkpoints it had. The manifest has exactly one valid spelling and holds a checksum of itself: any
changed byte in any file is noticed. Files are safetensors and JSON; nothing in them can run. Whoever saves or prunes
holds the lock of the run (runs/run.py).
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kiem.errors import CheckpointError, StorageError
from kiem.files import TEMPORARY, from_json, open_regular, storage_error, sync_folder
from kiem.runs.tensorfile import read_tensors, tensor_bytes, write_tensors

__all__ = ["Checkpoint", "clean", "latest", "load", "newest", "prune", "restore", "save", "verify"]

VERSION = 1
MANIFEST, STATE, REPLACED = "manifest.json", "state.json", ".old-"
MOST_MANIFEST_BYTES, MOST_STATE_BYTES = 1 << 20, 64 << 20
_NAME = re.compile(r"step-(\d{8,18})", re.ASCII)
_GROUP = r"[a-z][a-z0-9_]{0,99}"
_FILE = re.compile(rf"{_GROUP}\.safetensors|{re.escape(STATE)}", re.ASCII)

Tensors = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class Checkpoint:
    """What was read of one: tensors by group and name, on the CPU, and its state; and of each newer checkpoint what is
    wrong with it."""

    path: Path
    tensors: Tensors
    state: dict[str, Any]
    problems: tuple[str, ...] = ()


class NewerFormatError(CheckpointError):
    """A whole checkpoint of a format that this Kiem does not read: it must not be passed over."""


def save(run: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: dict[str, Any]) -> Path:
    """Write the checkpoint of `step` and return its folder.

    `tensors` has one mapping a group (`model`, `optimizer`, `random`): any data type and device; names that share one
    tensor are stored once and share one again after `load`. `state` is JSON. Raises StorageError if the disk is full or
    refuses: then what was saved before is untouched and no partial checkpoint remains.
    """
    for group in tensors:
        if not re.fullmatch(_GROUP, group):
            raise ValueError(f"not a name for a group of tensors: {group!r}")
    folder = _folder(run)
    target = folder / f"step-{step:08d}"
    work = folder / f"{TEMPORARY}{target.name}-{os.getpid()}"
    text = _json(state)
    needed = sum(tensor_bytes(group) for group in tensors.values()) + len(text) + 4096
    try:
        folder.mkdir(parents=True, exist_ok=True)
        clean(run)
        _require_space(folder, needed)
        work.mkdir()
        files = {}
        for group, named in tensors.items():
            files[f"{group}.safetensors"] = write_tensors(work / f"{group}.safetensors", named)
        files[STATE] = _write(work / STATE, text)
        _write(work / MANIFEST, _manifest(step, files))
        sync_folder(work)
        _publish(work, target)
    except BaseException as problem:
        with contextlib.suppress(OSError):
            clean(run)
        if isinstance(problem, OSError):
            raise storage_error(problem, f"the checkpoint of step {step} in {folder}", folder, needed) from problem
        raise
    return target


def load(path: Path, groups: tuple[str, ...] | None = None) -> Checkpoint:
    """Read one checkpoint.

    Every checksum is right before a tensor is handed out. With `groups`, only those (and the state) are read and
    checked. Raises CheckpointError that names what is damaged or missing.
    """
    path = Path(path)
    files = _read_manifest(path)["files"]
    wanted = [name for name in files if name != STATE] if groups is None else [f"{g}.safetensors" for g in groups]
    if absent := [name for name in (*wanted, STATE) if name not in files]:
        raise CheckpointError(f"the checkpoint {path} has no {', '.join(absent)}; it has {', '.join(files)}.")
    problems = [text for name in (*wanted, STATE) if (text := _problem(path / name, files[name], contents=False))]
    problems = problems or [text for text in [_problem(path / STATE, files[STATE])] if text]
    tensors, state = {}, None
    for name in wanted if not problems else ():
        try:
            tensors[name.removesuffix(".safetensors")] = read_tensors(path / name, files[name]["sha256"])
        except (OSError, ValueError) as problem:
            problems.append(f"{name}: {problem}")
    if not problems:
        try:
            state = from_json(_read(path / STATE, MOST_STATE_BYTES))
        except (OSError, ValueError) as problem:
            problems.append(f"{STATE}: {problem}")
        if not problems and not isinstance(state, dict):
            problems.append(f"{STATE}: not a JSON object")
    if problems or not isinstance(state, dict):
        raise _damaged(path, problems)
    return Checkpoint(path, tensors, state)


def newest(run: Path, groups: tuple[str, ...] | None = None) -> tuple[Checkpoint | None, list[str]]:
    """The newest whole checkpoint (None if there is none), and what is wrong with each newer one.

    One that is removed while it is read is no problem: there is a newer one. Raises CheckpointError for a checkpoint
    that a later Kiem wrote.
    """
    problems: list[str] = []
    for path in newest_first(run):
        try:
            found = load(path, groups)
            return Checkpoint(path, found.tensors, found.state, tuple(problems)), problems
        except NewerFormatError:
            raise
        except CheckpointError as problem:
            if not os.path.isdir(path):  # it was removed while it was read
                return newest(run, groups)
            problems.append(str(problem))
    return None, problems


def latest(run: Path) -> tuple[Path | None, list[str]]:
    """As `newest`, but only checked, every byte: its folder."""
    problems: list[str] = []
    for path in newest_first(run):
        found = verify(path)
        if not found:
            return path, problems
        problems.append(str(_damaged(path, found)))
    return None, problems


def verify(path: Path, contents: bool = True) -> list[str]:
    """What is wrong with a checkpoint, file by file; empty if it is whole. Without `contents` only sizes count."""
    path = Path(path)
    try:
        manifest = _read_manifest(path)
    except CheckpointError as problem:
        return [str(problem)]
    return [text for name, of in manifest["files"].items() if (text := _problem(path / name, of, contents))]


def prune(run: Path, keep: int, keep_step: int | None = None) -> list[Path]:
    """Remove all but the `keep` newest whole checkpoints and the newest up to `keep_step`; return those removed.

    The newest one that counts has just been read back and found whole, so a whole one always remains. Raises
    StorageError if one cannot be removed.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, not {keep}")
    kept, removed = 0, []
    for path in newest_first(run):
        if kept < keep:
            kept += not verify(path, contents=kept == 0)
            if keep_step is not None and step_of(path) <= keep_step:
                keep_step = None
        elif keep_step is not None and step_of(path) <= keep_step and not verify(path, contents=False):
            keep_step = None
        else:
            remove(path)
            removed.append(path)
    return removed


def restore(targets: Mapping[str, Tensor], saved: Mapping[str, Tensor], path: Path, group: str) -> None:
    """Copy saved tensors into `targets` in place, bit for bit. `path` and `group` are for the message.

    Raises CheckpointError, before anything is copied, that names each tensor that is missing, unknown, or of another
    shape or data type.
    """
    problems = [f"{name} is not in the checkpoint" for name in targets if name not in saved]
    problems += [f"{name} is in the checkpoint but not in this run" for name in saved if name not in targets]
    for name, target in targets.items():
        if name not in saved:
            continue
        found = saved[name]
        if found.shape != target.shape:
            problems.append(f"{name} has shape {list(found.shape)} in the checkpoint, {list(target.shape)} in this run")
        elif found.dtype != target.dtype:
            problems.append(f"{name} is {_dtype(found)} in the checkpoint, {_dtype(target)} in this run")
    if problems:
        raise CheckpointError(listed(f"the checkpoint {path} belongs to another model ({group})", problems))
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(saved[name])


def newest_first(run: Path) -> list[Path]:
    """The folders named as checkpoints, by step."""
    try:
        with os.scandir(_folder(run)) as entries:
            found = [Path(entry.path) for entry in entries if _NAME.fullmatch(entry.name)]
    except OSError:
        return []
    return sorted(found, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.name.removeprefix("step-"))


def clean(run: Path) -> None:
    """Remove what interrupted writes left, and put back a checkpoint whose replacement never arrived."""
    for folder in (Path(run), _folder(run), Path(run) / "tokenizer"):
        for entry in sorted(folder.iterdir()) if folder.is_dir() else ():
            if entry.name.startswith(REPLACED):
                original = folder / entry.name.removeprefix(REPLACED)
                if not original.exists():
                    os.rename(entry, original)
                    continue
            if entry.name.startswith((TEMPORARY, REPLACED)):
                if entry.is_dir():
                    shutil.rmtree(entry, ignore_errors=True)
                else:
                    entry.unlink(missing_ok=True)


def remove(path: Path) -> None:
    """Remove a checkpoint. It loses its name first, so it is never seen half removed. Raises StorageError."""
    waste = path.parent / f"{TEMPORARY}removed-{path.name}"
    try:
        os.rename(path, waste)
        shutil.rmtree(waste)
    except OSError as problem:
        if os.name == "nt" and isinstance(problem, PermissionError):  # Windows: a file in it is open
            return
        raise StorageError(
            f"cannot remove the old checkpoint {path}: {problem.strerror or problem}. Remove it by hand."
        ) from problem


def listed(head: str, problems: list[str], most: int = 12) -> str:
    """A message of many lines, cut to `most` problems."""
    rest = [f"  ... and {len(problems) - most} more"] if len(problems) > most else []
    return "\n".join([head + ":", *(f"  {text}" for text in problems[:most]), *rest])


def _folder(run: Path) -> Path:
    return Path(run) / "checkpoints"


def _publish(finished: Path, target: Path) -> None:
    """Give a finished folder its name, atomically; a folder of that name is replaced and never absent after a crash."""
    replaced = target.parent / (REPLACED + target.name)
    if target.exists():
        os.rename(target, replaced)
    os.rename(finished, target)
    sync_folder(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _require_space(folder: Path, needed: int) -> None:
    """Raise OSError (ENOSPC) if the disk has fewer than `needed` bytes free, before any is written."""
    usage = shutil.disk_usage(folder)
    if usage.total and usage.free < needed:  # some network file systems report no size at all
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def _write(path: Path, content: bytes) -> dict[str, Any]:
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _read(path: Path, most: int) -> bytes:
    with open_regular(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"more than {most} bytes")
    return content


def _manifest(step: int, files: dict[str, dict]) -> bytes:
    body = {"format": "kiem checkpoint", "version": VERSION, "step": step, "files": files}
    return _json({**body, "sha256": hashlib.sha256(_json(body)).hexdigest()})


def _read_manifest(path: Path) -> dict[str, Any]:
    """The manifest, known to be what was written: parsing and writing it again gives the same bytes and checksum."""
    try:
        content = _read(path / MANIFEST, MOST_MANIFEST_BYTES)
        manifest = from_json(content)
        claimed = manifest.pop("sha256")
        whole = _json({**manifest, "sha256": claimed}) == content
        whole = whole and hashlib.sha256(_json(manifest)).hexdigest() == claimed
    except (FileNotFoundError, NotADirectoryError) as problem:
        what = f"it has no {MANIFEST}, so it was never finished" if os.path.isdir(path) else "there is no such folder"
        raise CheckpointError(f"{path} is not a checkpoint: {what}.") from problem
    except OSError as problem:
        raise _damaged(path, [f"{MANIFEST}: {problem.strerror}"]) from problem
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        whole = False
    if not whole:
        raise _damaged(path, [f"{MANIFEST}: changed since it was written"])
    if manifest.get("version") != VERSION:
        raise NewerFormatError(
            f"the checkpoint {path} has format version {manifest.get('version')!r:.40}; this Kiem reads version "
            f"{VERSION}. Use the Kiem that wrote it."
        )
    if odd := _not_a_manifest(manifest):
        raise _damaged(path, [f"{MANIFEST}: {odd}"])
    named = _NAME.fullmatch(path.name)
    if named and int(named[1]) != manifest["step"]:
        raise _damaged(path, [f"the folder is named {path.name} but holds step {manifest['step']}"])
    return manifest


def _not_a_manifest(manifest: dict[str, Any]) -> str | None:
    """What is odd about a manifest whose checksum is right: somebody else may have made it."""
    files, step = manifest.get("files"), manifest.get("step")
    if type(step) is not int or step < 0:
        return "its step is not a number of updates"
    if not isinstance(files, dict) or not all(_FILE.fullmatch(name) for name in files):
        return "its list of files is not a list"
    for name, of in files.items():
        if not isinstance(of, dict) or type(of.get("bytes")) is not int or not isinstance(of.get("sha256"), str):
            return f"{name} has no size or checksum"
    return None


def _problem(path: Path, expected: dict[str, Any], contents: bool = True) -> str | None:
    """What is wrong with one file of a checkpoint."""
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size != expected["bytes"]:
                return f"{path.name}: {size} bytes instead of {expected['bytes']}"
            if contents and hashlib.file_digest(file, "sha256").hexdigest() != expected["sha256"]:
                return f"{path.name}: checksum differs"
    except FileNotFoundError:
        return f"{path.name}: missing"
    except OSError as problem:
        return f"{path.name}: {problem.strerror}"
    return None


def _damaged(path: Path, problems: Iterable[str]) -> CheckpointError:
    return CheckpointError(f"the checkpoint {path} is damaged: {'; '.join(problems)}")


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
