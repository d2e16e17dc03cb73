"""A program to look at: a plain Python file, or a function of a module. It needs no configuration."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import runpy
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import torch

from kiem.errors import ConfigError


@dataclass
class Program:
    """Something to run once under a recorder. title: for people. library: path prefixes of code that is not the user's.
    namespace: the names of the program after `run` (also after one that failed)."""

    title: str
    start: Callable[[], dict[str, Any]] = field(repr=False)
    library: tuple[str, ...] = ()
    namespace: dict[str, Any] = field(default_factory=dict, repr=False)

    def run(self) -> None:
        """Run it. What the program raises passes through."""
        try:
            self.namespace = self.start()
        except BaseException as error:
            self.namespace = _names_at_failure(error, self.title)
            raise


def script(path: str | Path, arguments: Sequence[str] = ()) -> Program:
    """A Python file, run as `python FILE ARGUMENTS` would."""
    file, place = str(path), _Place(str(Path(path).resolve().parent), [str(path), *arguments])

    def start() -> dict[str, Any]:
        with place.entered():
            try:
                return runpy.run_path(file, run_name="__main__")
            except SystemExit as end:
                if end.code not in (None, 0):
                    raise
                return _names_at_failure(end, file)

    return Program(file, start)


def _names_at_failure(error: BaseException, file: str) -> dict[str, Any]:
    """The globals of the file that an exception left."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_filename == file and frame.f_code.co_name == "<module>":
            return dict(frame.f_globals)
    return {}


@dataclass
class _Place:
    """Where a program runs: its folder is on sys.path, sys.argv is its own. Afterwards the process is as before, and
    modules from the folder are forgotten (another program may have others of the same name)."""

    folder: str
    argv: list[str]
    modules: dict[str, ModuleType] = field(default_factory=dict)

    @contextmanager
    def entered(self) -> Iterator[None]:
        path, before, argv, main = sys.path, list(sys.path), sys.argv, sys.modules.get("__main__")
        known, folder = set(sys.modules), os.getcwd()
        sys.path.insert(0, self.folder)
        sys.argv = list(self.argv)
        sys.modules.update(self.modules)
        importlib.invalidate_caches()
        leave: Any = os._exit
        setattr(os, "_exit", _exit_here(leave))  # noqa: B010
        try:
            yield
        finally:
            setattr(os, "_exit", leave)  # noqa: B010
            sys.path, sys.argv = path, argv
            path[:] = before
            with suppress(OSError):
                os.chdir(folder)
            for name in [name for name in sys.modules if name not in known and self._own(sys.modules[name])]:
                self.modules[name] = sys.modules.pop(name)
            if main is not None:
                sys.modules["__main__"] = main

    def _own(self, module: ModuleType) -> bool:
        file: str | None = getattr(module, "__file__", None)
        libraries = (sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib"))
        others = [os.path.realpath(place) for place in (*libraries, str(Path(__file__).parents[1])) if place]
        return file is not None and _below(file, self.folder) and not any(_below(file, other) for other in others)


def _exit_here(leave: Callable[[int], NoReturn]) -> Callable[[int], NoReturn]:
    """os._exit that ends the program and not Kiem, so that a verdict is not lost; processes it forked end as ever."""
    own = os.getpid()

    def end(status: int) -> NoReturn:
        if os.getpid() != own:
            leave(status)
        raise SystemExit(status)

    return end


def _below(file: str, folder: str) -> bool:
    return os.path.realpath(file).startswith(os.path.join(os.path.realpath(folder), ""))


# ---- a function


def function(target: str, arguments: Sequence[str] = ()) -> Program:
    """`module:function`, called with text arguments; a loss that it returns goes backward. Raises ConfigError if there
    is no such module or function, or if it cannot be called so."""
    module_name, name = target.split(":")
    place = _Place(os.getcwd(), sys.argv)
    with place.entered():
        module = _imported(module_name)
    call = getattr(module, name, None)
    if not callable(call):
        own = [key for key, value in vars(module).items() if inspect.isfunction(value) and not key.startswith("_")]
        close = difflib.get_close_matches(name, own, n=1)
        hint = f"did you mean {module_name}:{close[0]}?" if close else f"its functions: {', '.join(own) or 'none'}"
        what = "is not a function" if hasattr(module, name) else "does not exist"
        raise ConfigError(f"{target}: {name} {what} in {getattr(module, '__file__', None) or module_name}: {hint}")
    with suppress(ValueError):  # no signature to look at
        signature = inspect.signature(call)
        try:
            signature.bind(*arguments)
        except TypeError as error:
            raise ConfigError(
                f"{target}: {name}{signature} cannot be called with {_arguments(len(arguments))}: {error}. "
                f"Give them after the target, or name a function that needs none"
            ) from None

    def start() -> dict[str, Any]:
        with place.entered():
            result = call(*arguments)
            if _waits_for_backward(result):
                result.backward()
        return {**getattr(call, "__globals__", {}), "result": result}

    return Program(target, start)


def _arguments(count: int) -> str:
    return "1 argument" if count == 1 else f"{count} arguments"


def _imported(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise ConfigError(
                f"{name}: there is no module {error.name} in {os.getcwd()} or among the installed "
                "packages: run from the folder it is in, or install it"
            ) from None
        raise _not_importable(name, error) from error
    except (Exception, SystemExit) as error:
        raise _not_importable(name, error) from error


def _not_importable(name: str, error: BaseException) -> ConfigError:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<")]
    inside = [
        f
        for f in frames
        if not _below(f.filename, str(Path(__file__).parent))
        and not _below(f.filename, os.path.dirname(importlib.__file__))
    ]
    at = f" at {inside[-1].filename}:{inside[-1].lineno}" if inside else ""
    kind = "it ends the process (SystemExit)" if isinstance(error, SystemExit) else type(error).__name__
    return ConfigError(f"{name}: the module does not import: {kind}: {error}{at}: fix it, or name another module")


def _waits_for_backward(result: Any) -> bool:
    """Whether it is a scalar whose graph no backward pass has been through."""
    if not isinstance(result, torch.Tensor) or result.numel() != 1 or not result.requires_grad:
        return False
    if result.grad_fn is None:
        return result.grad is None
    seen, waiting = {result.grad_fn}, [result.grad_fn]
    while waiting:
        node = waiting.pop()
        leaf = getattr(node, "variable", None)
        if (leaf is not None and leaf.grad is not None) or _freed(node):
            return False
        new = {other for other, _ in node.next_functions if other is not None} - seen
        seen |= new
        waiting += new
    return True


def _freed(node: Any) -> bool:
    """Whether a backward pass has freed what an autograd node had saved."""
    try:
        for name in dir(node):
            if name == "saved_tensors" or name.startswith("_saved_"):
                getattr(node, name, None)
    except RuntimeError as error:
        return "freed" in str(error)
    return False
