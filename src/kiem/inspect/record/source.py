"""Where in the user's program something happens: lines, names of tensors, paths of modules."""

from __future__ import annotations

import functools
import linecache
import os
import sys
import sysconfig
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from types import FrameType
from typing import Any

import torch

from kiem.inspect.graph.model import Op, Source

_OWN = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep  # the inspector's
_TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep
_STANDARD = tuple({sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib")})
_SITE = tuple({sysconfig.get_path(name) + os.sep for name in ("purelib", "platlib")})
_CONTAINERS = (dict, OrderedDict, list, tuple)
MOST_ENTRIES = 256  # of a dict or list that are looked at for names
# A line of one of these files above an operation says what the operation is part of.
_REGIONS = {
    os.path.join(_TORCH, "utils", "checkpoint.py"): "checkpoint",
    os.path.join(_TORCH, "optim", "optimizer.py"): "optimizer",
    os.path.join(_TORCH, "autograd", "__init__.py"): "backward",
}


class Lines:
    """Finds the user's line on the stack. `library`: further path prefixes that are not the user's."""

    def __init__(self, library: tuple[str, ...] = ()):
        self._library = tuple(os.path.join(os.path.abspath(p), "") for p in library)
        self._kinds: dict[str, str] = {}

    def _kind(self, file: str) -> str:
        kind = self._kinds.get(file)
        if kind is None:
            if file in _REGIONS:
                kind = _REGIONS[file]
            elif file.startswith((_OWN, _TORCH, "<frozen", "<string>", "<torch", *self._library)) or (
                file.startswith(_STANDARD) and not file.startswith(_SITE)
            ):
                kind = "library"
            else:
                kind = "user"
            self._kinds[file] = kind
        return kind

    def find(self, frame: FrameType | None) -> tuple[FrameType | None, str]:
        """The innermost frame of the user's code, and the region of torch that called the operation, if any."""
        region = ""
        while frame is not None:
            kind = self._kind(frame.f_code.co_filename)
            if kind == "user":
                return frame, region
            if kind != "library":
                region = region or kind
            frame = frame.f_back
        return None, region


def inside(frame: FrameType | None, region: str) -> bool:
    """Whether a region of torch is anywhere above a frame."""
    while frame is not None:
        if _REGIONS.get(frame.f_code.co_filename) == region:
            return True
        frame = frame.f_back
    return False


@functools.lru_cache(maxsize=65536)
def source_of(code_file: str, line: int, function: str) -> Source:
    """A Source with the text of its line. The file is named relative to the working folder where that is shorter."""
    text = linecache.getline(code_file, line).strip()
    name = _cell(code_file) or code_file
    if os.path.isabs(name):
        relative = (
            os.path.relpath(code_file) if os.path.splitdrive(code_file)[0] == os.path.splitdrive(os.getcwd())[0] else ""
        )
        name = relative if relative and not relative.startswith(os.pardir) else code_file
    return Source(name, line, function, text)


def _cell(code_file: str) -> str | None:
    """What a notebook calls the cell that a file stands for: In[3]."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    number = getattr(getattr(shell, "compile", None), "_filename_map", {}).get(code_file)
    return None if number is None else f"In[{number}]"


def at(frame: FrameType | None) -> Source:
    """The line that a frame executes."""
    if frame is None:
        return Source("<unknown>", 0, "", "")
    return source_of(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_qualname)


def hook_lines(tensor: torch.Tensor) -> tuple[str, ...]:
    """Where the functions hung on a tensor are defined."""
    found = []
    for hooks in (tensor._backward_hooks, getattr(tensor, "_post_accumulate_grad_hooks", None)):
        for hook in (hooks or {}).values():
            code = getattr(hook, "__code__", None)
            known = code and source_of(code.co_filename, code.co_firstlineno, code.co_qualname)
            found.append(str(known) if known else repr(hook))
    return tuple(found)


def saving(parent: Op | None) -> tuple[str, bool]:
    """Of the operation that runs now, inside the custom Function `parent`: "checkpoint" if its results are thrown
    away and computed again, and whether what its backward saves goes through somebody's hooks (to unpack it has
    effects)."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    again = parent is not None and (parent.region == "checkpoint" or parent.name == "CheckpointFunction")
    again = again or (hooks is not None and getattr(hooks[0], "__module__", "") == "torch.utils.checkpoint")
    return "checkpoint" if again else "", hooks is not None


def traceback_source(error: BaseException, lines: Lines) -> Source | None:
    """The innermost line of the user's code in an exception's traceback."""
    found, step = None, error.__traceback__
    while step is not None:
        frame = step.tb_frame
        if lines.find(frame)[0] is frame:
            found = source_of(frame.f_code.co_filename, step.tb_lineno, frame.f_code.co_qualname)
        step = step.tb_next
    return found


def variables(frame: FrameType) -> tuple[list[tuple[str, torch.Tensor]], list[tuple[str, torch.Tensor]]]:
    """What a frame calls tensors: its variables, and entries of its dicts and lists (`params["w1"]`, `ws[0]`). Entries
    that all have a variable of their own are left out."""
    own, held = [], []
    for name, value in list(frame.f_locals.items()):
        if type(value) in _CONTAINERS:
            held.append((name, value))
        elif isinstance(value, torch.Tensor) and not name.startswith("__"):
            own.append((name, value))
    lists = [entries for name, value in held if value and (entries := _entries(name, value))]
    known = {id(tensor) for _, tensor in own} if lists else ()
    return own, [e for entries in lists if not all(id(t) in known for _, t in entries) for e in entries]


def _entries(name: str, container: dict | list | tuple) -> list[tuple[str, torch.Tensor]]:
    """The tensors that a container of tensors holds, by place; of another one nothing."""
    items: Iterable[tuple[Any, Any]] = container.items() if isinstance(container, dict) else enumerate(container)
    first = list(islice(items, MOST_ENTRIES))
    if not isinstance(first[0][1], torch.Tensor):
        return []
    texts = ((f'"{k}"' if isinstance(k, str) else str(k), t) for k, t in first if isinstance(k, str | int))
    return [(f"{name}[{text}]", t) for text, t in texts if isinstance(t, torch.Tensor)]


def _is_module(value: object) -> bool:
    """Whether it is a module that was set up; asked of the type, as a proxy may do anything when it is asked itself."""
    return issubclass(type(value), torch.nn.Module) and "_modules" in vars(value)


def _modules_shown(frame: FrameType) -> Iterator[tuple[str, torch.nn.Module]]:
    """Modules that a frame's variables show, and what it calls them: `layers[1]` of a list of modules, as its loop's
    variable names them all alike. What a method calls its own object (`self`) is no name."""
    code = frame.f_code
    method = code.co_argcount and "." in code.co_qualname and not code.co_qualname.endswith(f"<locals>.{code.co_name}")
    receiver = code.co_varnames[0] if method else "self"
    local = [(n, v) for n, v in list(frame.f_locals.items()) if not n.startswith("__")]
    for name, value in local:
        if isinstance(value, list | tuple) and len(value) > 1 and all(map(_is_module, value[:MOST_ENTRIES])):
            yield from ((f"{name}[{i}]", module) for i, module in enumerate(value[:MOST_ENTRIES]))
    yield from ((n if n not in (receiver, "self") else "", v) for n, v in local if _is_module(v))


class ModulePaths:
    """Which nn.Module is running, by its path from the outermost one, and the names of all parameters seen."""

    def __init__(self, lines: Lines, records_here: Callable[[], bool]):
        self._lines, self._records_here = lines, records_here
        self._stack: list[tuple[str, str]] = []
        self._paths: dict[int, tuple[weakref.ref, str]] = {}
        self._tensors: dict[int, tuple[weakref.ref, str]] = {}
        self._owners: dict[str, weakref.ref] = {}  # of modules' names
        self._roots: weakref.WeakSet = weakref.WeakSet()
        self._handles: list = []

    def __enter__(self) -> ModulePaths:
        hooks = torch.nn.modules.module
        self._handles = [
            hooks.register_module_forward_pre_hook(self._enter),
            hooks.register_module_forward_hook(self._leave, always_call=True),
        ]
        return self

    def __exit__(self, *_) -> None:
        for handle in self._handles:
            handle.remove()

    @property
    def current(self) -> tuple[str, str]:
        """Path and class of the innermost running module; two empty texts outside of any."""
        return self._stack[-1] if self._stack else ("", "")

    def _enter(self, module: torch.nn.Module, _inputs) -> None:
        if torch.compiler.is_compiling() or not self._records_here():
            return  # traced by torch.compile (what is compiled is one operation), or another thread's
        if not self._stack and module not in self._roots:
            self._name_root(module)
        path = self._known(self._paths, module) or type(module).__name__
        self._stack.append((path, type(module).__name__))

    def _leave(self, _module, _inputs, _output) -> None:
        if not torch.compiler.is_compiling() and self._stack and self._records_here():
            self._stack.pop()

    def _name_root(self, module: torch.nn.Module) -> None:
        """Name a module that runs inside no other one, and all that is in it, as part of the outermost module around it
        that the program has a variable for: that may call its parts itself. A name that is known stays."""
        self._roots.add(module)
        if self._known(self._paths, module) is not None:
            return
        shown, root = self._shown(sys._getframe(2)), module
        for found in {id(m): m for _, m in shown}.values():
            if found is not root and any(m is root for m in found.modules()):
                root = found
        name = self._known(self._paths, root) or next((n for n, m in shown if m is root and n), type(root).__name__)
        for path, child in root.named_modules():
            called = self._known(self._paths, child)
            if called is None:
                called = self._free(f"{name}.{path}" if path else name, child)
                name = name if path else called
                self._paths[id(child)] = (weakref.ref(child), called)
            for own, tensor in (*child.named_parameters(recurse=False), *child.named_buffers(recurse=False)):
                if self._known(self._tensors, tensor) is None:
                    self._tensors[id(tensor)] = (weakref.ref(tensor), f"{called}.{own}")

    def _shown(self, frame: FrameType | None) -> list[tuple[str, torch.nn.Module]]:
        """Modules that the variables of the user's frames show, innermost first, then those of the frames' files."""
        local: list[tuple[str, torch.nn.Module]] = []
        files: dict[int, dict[str, Any]] = {}
        while frame is not None:
            if self._lines.find(frame)[0] is frame:
                local += _modules_shown(frame)
                files[id(frame.f_globals)] = frame.f_globals
            elif (found := frame.f_locals.get("self")) is not None and _is_module(found):
                local.append(("", found))
            frame = frame.f_back
        outside = (item for members in files.values() for item in list(members.items()))
        return local + [(n, v) for n, v in outside if not n.startswith("_") and _is_module(v)]

    def _free(self, name: str, module: torch.nn.Module) -> str:
        """The name, numbered if another living module has it."""
        free, number = name, 1
        while (owner := self._owners.get(free)) is not None and owner() is not None and owner() is not module:
            number += 1
            free = f"{name}#{number}"
        self._owners[free] = weakref.ref(module)
        return free

    @staticmethod
    def _known(names: dict[int, tuple[weakref.ref, str]], thing: object) -> str | None:
        known = names.get(id(thing))
        return known[1] if known is not None and known[0]() is thing else None

    def name_of(self, tensor: torch.Tensor) -> str | None:
        """The path of a parameter or buffer of a module that has run, under its first name."""
        return self._known(self._tensors, tensor)
