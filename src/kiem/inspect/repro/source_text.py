"""The user's program as text: an operation's definition with all that it uses, and tensors to the bit.

The user's script is read, never imported, as importing runs it.
"""

from __future__ import annotations

import ast
import base64
import builtins
import inspect
import linecache
import math
import os
import symtable
import sys
import sysconfig
import textwrap
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kiem.inspect.graph.layouts import COMPRESSED, elements, held_by, regular
from kiem.inspect.graph.model import Ref
from kiem.inspect.graph.stats import SMALL

INLINE = 64 << 10  # bytes of tensors written out
_FOLDERS = {*(sysconfig.get_path(n) for n in ("stdlib", "purelib", "platlib")), os.path.dirname(torch.__file__)}
_INSTALLED = tuple(os.path.join(folder, "") for folder in _FOLDERS)


class CannotWrite(Exception):
    """Says why no program can be written."""


_DEFINITION = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


@dataclass(frozen=True)
class _Space:
    """A file of the user's, and what its global names stand for."""

    file: str
    names: dict[str, Any]
    text: str
    tree: ast.Module

    def source(self, node: ast.stmt) -> str:
        """The lines of a definition or statement, with its decorators, not indented."""
        return textwrap.dedent("\n".join(self.text.splitlines()[_first(node) - 1 : node.end_lineno]))

    def binding(self, name: str) -> ast.stmt | None:
        """The top-level statement that binds a name last."""
        return next((node for node in reversed(self.tree.body) if name in _binds(node)), None)


class Code:
    """Gathers definitions with all that they use, each after what it needs. `place`: the device that stands for every
    other one; None: they are written as they were."""

    def __init__(self, place: str | None = None):
        self.place = place
        self.imports: dict[str, None] = {}
        self.items: list[str] = []
        self.names: dict[str, Any] = {}  # what they stand for
        self._done: set[str] = set()

    def bring(self, thing: Any) -> str:
        """The name for a function or class in the program; its source comes along."""
        function = next(_functions(thing), None)
        name, file = getattr(thing, "__qualname__", ""), function.__code__.co_filename if function else ""
        if function is None or file.startswith(_INSTALLED):
            if "<" in name or not _installed(getattr(thing, "__module__", None)):
                raise CannotWrite(f"the source of {name or type(thing).__name__} is not to be had")
            self.imports[f"from {thing.__module__} import {name.split('.')[0]}"] = None
            return name
        space, line = self._space(function), function.__code__.co_firstlineno
        if space.names.get(name) is thing and isinstance(space.binding(name), _DEFINITION):
            self.need(name, space)
            return name
        found = [n for n in ast.walk(space.tree) if isinstance(n, _DEFINITION) and n.name == thing.__name__]
        found = [n for n in found if _first(n) <= line <= (n.end_lineno or line)]
        if not found:
            raise CannotWrite(f"the source of {name} is not to be had")
        around = dict(space.names)  # defined inside a function: what it sees there stands for itself
        for method in _functions(thing):
            around |= inspect.getclosurevars(method).nonlocals
        if self.names.setdefault(thing.__name__, thing) is thing and thing.__name__ in self._done:
            return thing.__name__
        self._done.add(thing.__name__)
        self._emit(space.source(found[-1]), _Space(file, around, space.text, ast.Module([], [])))
        return thing.__name__

    def _space(self, function: types.FunctionType) -> _Space:
        file = function.__code__.co_filename
        text = "".join(linecache.getlines(file, function.__globals__))
        if not text:
            raise CannotWrite(f"the source of {function.__qualname__} is not to be had")
        tree = ast.parse(text)
        if any(isinstance(n, ast.ImportFrom) and n.module == "__future__" for n in tree.body):
            self.imports["from __future__ import annotations"] = None
        return _Space(file, function.__globals__, text, tree)

    def need(self, name: str, space: _Space) -> None:
        """Bring along what a global name of the source stands for."""
        if name.startswith("__") or (name not in space.names and hasattr(builtins, name)):
            return
        node, value = space.binding(name), space.names.get(name)
        if self.names.setdefault(name, value) is not value:
            raise CannotWrite(f"its source uses two things that are called {name}")
        if name in self._done:
            return
        self._done.add(name)
        if isinstance(node, ast.Import | ast.ImportFrom) and _installed(getattr(node, "module", None) or value):
            for alias in node.names:  # of those of a line, only what is needed
                if _bound(alias) == name:
                    if isinstance(node, ast.Import):
                        self.imports[ast.unparse(ast.Import([alias]))] = None
                    else:
                        self.imports[ast.unparse(ast.ImportFrom(node.module, [alias], node.level))] = None
        elif isinstance(value, types.ModuleType) and _installed(value):
            self.imports[f"import {value.__name__} as {name}"] = None
        elif isinstance(node, _DEFINITION):
            self._emit(space.source(node), space)
        elif isinstance(value, types.FunctionType | type) and not isinstance(node, ast.Assign):
            self._done.remove(name)  # defined elsewhere, perhaps under this name
            made = self.bring(value)
            self._done.add(name)
            self.items += [] if made == name else [f"{name} = {made}"]
        elif isinstance(value, Tensor) and held_by(value.detach()) * value.element_size() <= INLINE:
            self.items.append(f"{name} = {exact(value, self.place)}")
        elif (constant := _constant(value, self.place)) is not None:
            self.items.append(f"{name} = {constant}")
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            self._emit(space.source(node), space)
        else:
            raise CannotWrite(f"its source uses {name}, which cannot be brought along")

    def _emit(self, text: str, space: _Space) -> None:
        for name in sorted(_free_names(symtable.symtable(text, space.file, "exec"), True)):
            self.need(name, space)
        self.items.append(text)

    def bring_registered(self, qualified: str, functions: list[types.FunctionType]) -> None:
        """What registers an operation, as `mylib::cosine`: definitions and calls of its files that speak of it."""
        for space in {f.__code__.co_filename: self._space(f) for f in functions}.values():
            library = qualified.split("::")[0]
            about = {n for n, v in space.names.items() if qualified == getattr(v, "_qualname", None)
                     or (isinstance(v, torch.library.Library) and v.ns == library)}  # fmt: skip
            for node in space.tree.body:
                inner = list(ast.walk(node))
                named = {n.id for n in inner if isinstance(n, ast.Name)}
                speaks = bool(named & about) or any(isinstance(n, ast.Constant) and n.value == qualified for n in inner)
                if speaks and isinstance(node, _DEFINITION) and node.decorator_list:
                    self.need(node.name, space)
                elif speaks and isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
                    self._emit(space.source(node), space)


def _functions(thing: Any) -> Iterator[types.FunctionType]:
    for member in vars(thing).values() if isinstance(thing, type) else [thing]:
        function = getattr(member, "__func__", member)
        function = inspect.unwrap(function) if callable(function) else None
        if isinstance(function, types.FunctionType):
            yield function


def _first(node: Any) -> int:
    return min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])


def _binds(node: ast.stmt) -> set[str]:
    if isinstance(node, _DEFINITION):
        return {node.name}
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {_bound(alias) for alias in node.names}
    stores = ast.walk(node) if isinstance(node, ast.Assign | ast.AnnAssign) else ()
    return {n.id for n in stores if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


def _bound(alias: ast.alias) -> str:
    return alias.asname or alias.name.split(".")[0]


def _free_names(table: symtable.SymbolTable, outermost: bool) -> set[str]:
    """Names that a piece of source takes from around it."""
    found = {s.get_name() for s in table.get_symbols() if s.is_referenced()
             and (s.is_global() or (outermost and not s.is_assigned()))}  # fmt: skip
    return found.union(*(_free_names(child, False) for child in table.get_children()))


def _installed(module: Any) -> bool:
    name = module if isinstance(module, str) else getattr(module, "__name__", "")
    file = getattr(sys.modules.get(name.split(".")[0]), "__file__", "")
    return name.split(".")[0] in sys.builtin_module_names or (file or "").startswith(_INSTALLED)


def registers(device: str) -> str | None:
    """The module that makes known to torch a device that torch does not know by itself."""
    kind = device.split(":")[0]
    module = getattr(torch, kind, None)
    if kind != torch._C._get_privateuse1_backend_name() or module is None:
        return None
    functions = [f for f in vars(module).values() if isinstance(f, types.FunctionType)]
    packages = [name.split(".")[0] for name in (module.__name__, *(f.__module__ for f in functions))]
    return next((name for name in packages if name not in ("torch", "__main__")), None)


def _constant(value: Any, place: str | None) -> str | None:
    try:
        return expression(value, {}, place=place)
    except CannotWrite:
        return None


def expression(
    value: Any, names: dict[int, str], bring: Callable[[Any], str] | None = None, place: str | None = None
) -> str:
    """An argument as source; tensors by the `names` of their values, devices as they are or as `place`."""
    if isinstance(value, Ref) and value.value in names:
        return names[value.value]
    if value is None or type(value) in (bool, int, str, bytes, slice):
        return repr(value)
    if type(value) in (float, complex):
        return repr(value) if math.isfinite(abs(value)) else f'{type(value).__name__}("{value}")'
    if isinstance(value, torch.dtype | torch.memory_format | torch.layout):
        return str(value)
    if isinstance(value, torch.device):
        return f'torch.device("{place or value}")'
    if type(value) in (list, tuple, torch.Size):
        inner = ", ".join(expression(v, names, bring, place) for v in value)
        return f"[{inner}]" if isinstance(value, list) else f"({inner}{',' if len(value) == 1 else ''})"
    if type(value) is dict:
        return f"dict({expression(list(value.items()), names, bring, place)})"
    if bring is not None and isinstance(value, types.FunctionType | type):
        return bring(value)
    raise CannotWrite(f"an argument of type {type(value).__name__} cannot be written as source")


# -- tensors -----------------------------------------------------------------------------------------------------------


def exact(tensor: Tensor, place: str | None = None) -> str:
    """An expression that makes this tensor, to the bit, where it was or at `place`."""
    place = place or str(tensor.device)
    if not regular(tensor):
        _check_layout(tensor)
        return assembled(tensor, exact(elements(tensor), place), lambda index: exact(index, place))
    tensor = tensor.detach().cpu().resolve_conj()
    kept = tensor[tuple(slice(0, 1 if stride == 0 else None) for stride in tensor.stride())]  # one, of what is expanded
    shape = tuple(kept.shape)
    if kept.numel() and not kept.is_complex() and bool((kept == kept.reshape(-1)[0]).all()):
        made = f"torch.full({shape}, {expression(kept.reshape(-1)[0].item(), {})}, dtype={kept.dtype})"
    elif kept.numel() <= SMALL and not kept.is_complex():
        made = f"torch.tensor({expression(kept.tolist(), {})}, dtype={kept.dtype}).reshape({shape})"
    else:
        text = base64.b64encode(kept.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).decode()
        made = f'torch.frombuffer(bytearray(b64decode("{text}")), dtype={kept.dtype}).reshape({shape})'
    if shape != tensor.shape:
        return f"{made}{_to(place)}.expand({tuple(tensor.shape)})"
    return _laid_out(made, tensor, place)


def like(tensor: Tensor, place: str | None = None) -> str:
    """An expression for random numbers of the same shape, type and scale, where it was or at `place`."""
    place = place or str(tensor.device)
    shape, flat = tuple(tensor.shape), tensor.detach().cpu().reshape(-1)
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return f"torch.randint({int(flat.min())}, {int(flat.max()) + 1}, {shape}).to({tensor.dtype}){_to(place)}"
    sizes = flat.abs().double()
    size = sizes[sizes.isfinite()].square().mean().sqrt().item()
    kind = "randn" if tensor.is_complex() or bool((flat < 0).any()) else "rand"  # what is positive may have to be
    dtype = torch.complex128 if tensor.is_complex() else torch.float64
    return _laid_out(f"(torch.{kind}({shape}, dtype={dtype}) * {size:.3g}).to({tensor.dtype})", tensor, place)


def assembled(tensor: Tensor, held: str, index: Callable[[Tensor], str]) -> str:
    """An expression that makes a tensor that is not strided, from the source of its elements. `index`: the source of a
    tensor that says where they stand."""
    _check_layout(tensor)
    shape = tuple(tensor.shape) if not tensor.is_nested else ()
    if tensor.layout == torch.sparse_coo:
        known = ", is_coalesced=True" if tensor.is_coalesced() else ""
        return f"torch.sparse_coo_tensor({index(tensor.detach().coalesce().indices())}, {held}, {shape}{known})"
    if tensor.layout in COMPRESSED:
        rows = tensor.layout in (torch.sparse_csr, torch.sparse_bsr)
        outer = tensor.crow_indices() if rows else tensor.ccol_indices()
        inner = tensor.col_indices() if rows else tensor.row_indices()
        return f"{tensor.layout}_tensor({index(outer)}, {index(inner)}, {held}, {shape})"
    jagged: Any = tensor  # torch declares none of its methods
    lengths = "" if jagged.lengths() is None else f", {index(jagged.lengths())}"
    ragged = "" if jagged._ragged_idx == 1 else f", jagged_dim={jagged._ragged_idx}"
    return f"torch.nested.nested_tensor_from_jagged({held}, {index(jagged.offsets())}{lengths}{ragged})"


def _check_layout(tensor: Tensor) -> None:
    if tensor.layout not in (torch.sparse_coo, *COMPRESSED, torch.jagged):
        layout = "nested and not jagged" if tensor.is_nested else f"laid out as {tensor.layout}"
        raise CannotWrite(f"a tensor that is {layout} cannot be written as source")


def _laid_out(made: str, tensor: Tensor, place: str) -> str:
    """Backward may depend on the strides."""
    if tensor.is_contiguous() or 0 in tensor.stride():
        return made + _to(place)
    where = "" if place == "cpu" else f', device="{place}"'
    return f"torch.empty_strided({tuple(tensor.shape)}, {tensor.stride()}, dtype={tensor.dtype}{where}).copy_({made})"


def _to(place: str) -> str:
    return "" if place == "cpu" else f'.to("{place}")'
