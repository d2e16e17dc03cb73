"""Checkpoints: whole or absent, exact, and checked byte by byte before use.

    checkpoints/step-00001000/
        model.safetensors optimizer.safetensors random.safetensors ...   one file a group of tensors
        state.json                                                       everything that is not a tensor
        manifest.json                                                    bytes and SHA-256 of each file; written last

A checkpoint is written under a temporary name, flushed to the disk, and renamed when complete, so a run that is killed
anywhere leaves the checkpoints it had. The manifest has exactly one valid spelling and holds a checksum of itself: any
changed byte in any file is noticed. Files are safetensors and JSON; nothing in them can run.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kiem.errors import CheckpointError, StorageError
from kiem.runs.folder import (
    TEMPORARY,
    checkpoints_folder,
    clean,
    lock,
    publish,
    require_space,
    storage_error,
    sync_folder,
    try_lock,
)
from kiem.runs.tensorfile import read_tensors, tensor_bytes, write_tensors

__all__ = ["check_config", "latest", "load", "load_latest", "lock", "prune", "restore", "save", "verify"]

VERSION = 1
MANIFEST, STATE = "manifest.json", "state.json"
_NAME = re.compile(r"step-(\d{8,})")

Tensors = dict[str, dict[str, Tensor]]


def save(run: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: dict[str, Any]) -> Path:
    """Write the checkpoint of `step` and return its folder. The caller holds `lock(run)`.

    `tensors` has one mapping a group (`model`, `optimizer`, `random`): any data type and device; names that share one
    tensor are stored once and share one again after `load`. `state` is JSON; what stands at `state["config"]` is the
    configuration that `check_config` compares. Raises StorageError if the disk is full or refuses: then what was saved
    before is untouched and no partial checkpoint remains.
    """
    for group in tensors:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", group):
            raise ValueError(f"not a name for a group of tensors: {group!r}")
    folder = checkpoints_folder(run)
    target = folder / f"step-{step:08d}"
    work = folder / f"{TEMPORARY}{target.name}-{os.getpid()}"
    text = _json(state)
    needed = sum(tensor_bytes(group) for group in tensors.values()) + len(text) + 4096
    try:
        folder.mkdir(parents=True, exist_ok=True)
        clean(folder)
        require_space(folder, needed)
        work.mkdir()
        files = {}
        for group, named in tensors.items():
            files[f"{group}.safetensors"] = write_tensors(work / f"{group}.safetensors", named)
        files[STATE] = _write(work / STATE, text)
        _write(work / MANIFEST, _manifest(step, files, state.get("config")))
        sync_folder(work)
        publish(work, target)
    except BaseException as problem:
        with contextlib.suppress(OSError):
            clean(folder)
        if isinstance(problem, OSError):
            raise storage_error(problem, f"the checkpoint of step {step}", folder, needed) from problem
        raise
    return target


def load(path: Path, groups: tuple[str, ...] | None = None) -> tuple[Tensors, dict[str, Any]]:
    """Read a checkpoint: tensors by group and name, on the CPU, and its state.

    Every checksum is right before a tensor is handed out. With `groups`, only those (and the state) are read and
    checked. Raises CheckpointError that names what is damaged or missing.
    """
    path = Path(path)
    with _reading(path):
        files = _read_manifest(path)["files"]
        wanted = [name for name in files if name != STATE] if groups is None else [f"{g}.safetensors" for g in groups]
        absent = [name for name in wanted if name not in files]
        if absent:
            raise CheckpointError(f"the checkpoint {path} has no {', '.join(absent)}; it has {', '.join(files)}.")
        problems = [text for name in (*wanted, STATE) if (text := _problem(path / name, files[name], contents=False))]
        problems = problems or [text for text in [_problem(path / STATE, files[STATE])] if text]
        tensors = {}
        for name in wanted if not problems else ():
            try:
                tensors[name.removesuffix(".safetensors")] = read_tensors(path / name, files[name]["sha256"])
            except (OSError, ValueError) as problem:
                problems.append(f"{name}: {problem}")
        if problems:
            raise _damaged(path, problems)
        return tensors, json.loads((path / STATE).read_bytes())


def load_latest(
    run: Path, groups: tuple[str, ...] | None = None
) -> tuple[Path | None, Tensors, dict[str, Any], list[str]]:
    """Load the newest whole checkpoint: (its folder, tensors, state, what is wrong with each newer one).

    The folder is None, and tensors and state are empty, if there is no whole checkpoint.
    """
    problems = []
    for path in _newest_first(run):
        try:
            return path, *load(path, groups), problems
        except CheckpointError as problem:
            problems.append(str(problem))
    return None, {}, {}, problems


def latest(run: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint of a run (None if there is none), and what is wrong with each newer one."""
    problems = []
    for path in _newest_first(run):
        found = verify(path)
        if not found:
            return path, problems
        problems.append(str(_damaged(path, found)))
    return None, problems


def verify(path: Path, contents: bool = True) -> list[str]:
    """What is wrong with a checkpoint, file by file; empty if it is whole. Without `contents` only sizes count."""
    path = Path(path)
    try:
        with _reading(path):
            manifest = _read_manifest(path)
            return [text for name, expected in manifest["files"].items()
                    if (text := _problem(path / name, expected, contents))]
    except CheckpointError as problem:
        return [str(problem)]


def prune(run: Path, keep: int) -> list[Path]:
    """Remove all but the `keep` newest whole checkpoints, and return those removed.

    The newest one that counts has just been read back and found whole, so a whole one always remains. A checkpoint that
    is being read stays until the next time. Raises StorageError if one cannot be removed.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, not {keep}")
    kept, removed = 0, []
    for path in _newest_first(run):
        if kept < keep:
            kept += not verify(path, contents=kept == 0)
        elif _remove(path):
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
        raise CheckpointError(_listed(f"the checkpoint {path} belongs to another configuration ({group})", problems) +
                              "\nUse the configuration of the run's config.yaml, or start a run in a new folder.")
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(saved[name])


def check_config(state: Mapping[str, Any], config: Mapping[str, Any], path: Path, section: str = "model") -> None:
    """Raise CheckpointError naming each field of `section` in which `config` differs from the checkpoint's own."""
    saved = (state.get("config") or {}).get(section) or {}
    given = config.get(section) or {}
    names = sorted(saved.keys() | given.keys())
    problems = [f"{section}.{name} is {saved.get(name)!r} in the checkpoint, {given.get(name)!r} here"
                for name in names if saved.get(name) != given.get(name)]
    if problems:
        raise CheckpointError(_listed(f"the checkpoint {path} belongs to another configuration", problems) +
                              "\nUse the checkpoint's values, or start a run in a new folder.")


def _newest_first(run: Path) -> list[Path]:
    folder = checkpoints_folder(run)
    found = [(int(match[1]), entry) for entry in (folder.iterdir() if folder.is_dir() else ())
             if (match := _NAME.fullmatch(entry.name))]
    return [entry for _, entry in sorted(found, reverse=True)]


def _remove(path: Path) -> bool:
    """Remove a checkpoint unless it is being read. It loses its name first, so it is never seen half removed."""
    waste = path.parent / f"{TEMPORARY}removed-{path.name}"
    try:
        try:
            handle = os.open(path / MANIFEST, os.O_RDONLY)
        except FileNotFoundError:  # nobody can be reading what has no manifest
            handle = None
        try:
            if handle is not None and try_lock(handle) is False:
                return False
            os.rename(path, waste)
        finally:
            if handle is not None:
                os.close(handle)
        shutil.rmtree(waste)
    except OSError as problem:
        if os.name == "nt" and isinstance(problem, PermissionError):  # Windows: a file in it is open
            return False
        raise StorageError(
            f"cannot remove the old checkpoint {path}: {problem.strerror or problem}. Remove it by hand."
        ) from problem
    return True


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Keep `prune` away from a checkpoint: it takes the manifest's lock for itself before it removes one."""
    try:
        file = open(path / MANIFEST, "rb")  # noqa: SIM115 (closed below; errors of the body are not this one's)
    except FileNotFoundError as problem:
        what = f"it has no {MANIFEST}, so it was never finished" if path.is_dir() else "there is no such folder"
        raise CheckpointError(f"{path} is not a checkpoint: {what}.") from problem
    except OSError as problem:
        raise CheckpointError(f"cannot read the checkpoint {path}: {problem.strerror}.") from problem
    with file:
        if try_lock(file.fileno(), shared=True) is False:
            raise CheckpointError(f"the checkpoint {path} is just being removed: use a newer one.")
        yield


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def _write(path: Path, content: bytes) -> dict[str, Any]:
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _manifest(step: int, files: dict[str, dict], config: Any) -> bytes:
    body = {
        "format": "kiem checkpoint",
        "version": VERSION,
        "step": step,
        "files": files,
        "config_sha256": None if config is None else hashlib.sha256(_json(config)).hexdigest(),
    }
    return _json({**body, "sha256": hashlib.sha256(_json(body)).hexdigest()})


def _read_manifest(path: Path) -> dict[str, Any]:
    """The manifest, known to be what was written: parsing and writing it again gives the same bytes and checksum."""
    try:
        content = (path / MANIFEST).read_bytes()
    except OSError as problem:
        raise _damaged(path, [f"{MANIFEST}: {problem.strerror}"]) from problem
    try:
        manifest = json.loads(content)
        claimed = manifest.pop("sha256")
        whole = _json({**manifest, "sha256": claimed}) == content
        whole = whole and hashlib.sha256(_json(manifest)).hexdigest() == claimed
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        whole = False
    if not whole:
        raise _damaged(path, [f"{MANIFEST}: not as it was written ({len(content)} bytes)"])
    if manifest.get("version") != VERSION:
        raise CheckpointError(f"the checkpoint {path} has format version {manifest.get('version')}; this Kiem reads "
                              f"version {VERSION}. Use the Kiem that wrote it.")
    named = _NAME.fullmatch(path.name)
    if named and int(named[1]) != manifest["step"]:
        raise _damaged(path, [f"the folder is named {path.name} but holds step {manifest['step']}"])
    return manifest


def _problem(path: Path, expected: dict[str, Any], contents: bool = True) -> str | None:
    """What is wrong with one file of a checkpoint."""
    try:
        size = path.stat().st_size
        if size != expected["bytes"]:
            return f"{path.name}: {size} bytes instead of {expected['bytes']}"
        if contents:
            with open(path, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != expected["sha256"]:
                    return f"{path.name}: checksum differs"
    except FileNotFoundError:
        return f"{path.name}: missing"
    except OSError as problem:
        return f"{path.name}: {problem.strerror}"
    return None


def _damaged(path: Path, problems: list[str]) -> CheckpointError:
    return CheckpointError(f"the checkpoint {path} is damaged: {'; '.join(problems)}")


def _listed(head: str, problems: list[str], most: int = 12) -> str:
    rest = [f"  ... and {len(problems) - most} more"] if len(problems) > most else []
    return "\n".join([head + ":", *(f"  {text}" for text in problems[:most]), *rest])


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
