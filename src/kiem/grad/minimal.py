"""A standalone program that shows the wrong derivative of one operation, to paste into a bug report.

It needs torch and what the operation's own source imports. The user's script is read, never imported, as importing runs
it. A program is run here first, in a process of its own and an empty folder: handed out is one that shows the error.
"""

from __future__ import annotations

import ast
import base64
import builtins
import inspect
import linecache
import math
import os
import re
import subprocess
import symtable
import sys
import sysconfig
import tempfile
import textwrap
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kiem.format import printable
from kiem.grad.check import Verdict, inside
from kiem.grad.graph import SMALL, Graph, Op, Ref

SECONDS, BUDGET = 60, 150  # for one run of a program; no further run begins after
INLINE = 64 << 10  # bytes of tensors written out
SAID = "The gradient is wrong."
_FOLDERS = {*(sysconfig.get_path(n) for n in ("stdlib", "purelib", "platlib")), os.path.dirname(torch.__file__)}
_INSTALLED = tuple(os.path.join(folder, "") for folder in _FOLDERS)


class CannotWrite(Exception):
    """Says why no program can be written."""


def minimal_program(
    graph: Graph, op: Op, verdict: Verdict, inputs: dict[int, Tensor], into: tuple[Tensor | None, ...]
) -> str:
    """A program that shows the first wrong gradient of `verdict`, or says in its first lines why it cannot be shown.

    inputs: what the operation read, by value; into: the gradient that arrived at each output; both as the program had.
    """
    try:
        case = _Case(graph, op, verdict, inputs, into)
    except CannotWrite as reason:
        return _comment(f"No standalone program for {op.label} at {op.source}: {reason}.")
    outcomes: list[tuple[str, str]] = []
    ended = time.monotonic() + BUDGET
    for way in ["float64", "narrow"] if case.random else ["own", "float64", "narrow"]:
        for seed, write in case.numbers():
            program = case.program(way, seed, write)
            outcomes.append((_try(program), program))
            if outcomes[-1][0] == "shown":
                return program
            if outcomes[-1][0] != "right" or time.monotonic() > ended:
                break  # it cannot be run this way, whatever the numbers
        if outcomes[-1][0] == "right" or time.monotonic() > ended:
            break
    outcome, program = next((o for o in outcomes if o[0] == "right"), outcomes[0])
    return case.apology(outcome) + program


def _try(program: str) -> str:
    """`shown`, `right`, or how it failed."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "program.py")
        with open(path, "w", encoding="utf-8") as file:
            file.write(program)
        try:
            done = subprocess.run([sys.executable, path], cwd=folder, capture_output=True, timeout=SECONDS, check=False,
                                  stdin=subprocess.DEVNULL)  # fmt: skip
        except subprocess.TimeoutExpired:
            return f"it ran longer than {SECONDS} s"
    if done.returncode == 0 or (done.returncode == 1 and SAID.encode() in done.stdout):
        return "shown" if done.returncode else "right"
    lines = done.stderr.decode(errors="replace").strip().splitlines()
    return lines[-1][:200] if lines else f"it ended with {done.returncode}"


def _comment(text: str) -> str:
    lines = [line for part in printable(text).splitlines() for line in textwrap.wrap(part, 96)]
    return "".join(f"# {line}\n" for line in lines)


# -- the source of the operation ---------------------------------------------------------------------------------------

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


class _Code:
    """Gathers definitions with all that they use, each after what it needs."""

    def __init__(self):
        self.imports: dict[str, None] = {}
        self.items: list[str] = []
        self.owner: dict[str, str] = {}  # name -> the file that it is from

    def bring(self, thing: Any) -> str:
        """The name for a function or class in the program; its source comes along."""
        function = next(_functions(thing), None)
        name, file = getattr(thing, "__qualname__", ""), function.__code__.co_filename if function else ""
        if function is None or file.startswith(_INSTALLED):
            if not name or "<" in name or not getattr(thing, "__module__", None):
                raise CannotWrite(f"the source of {name or type(thing).__name__} is not to be had")
            self.imports[f"from {thing.__module__} import {name.split('.')[0]}"] = None
            return name
        space, line = self._space(function), function.__code__.co_firstlineno
        if space.names.get(name) is thing and isinstance(space.binding(name), _DEFINITION):
            self.need(name, space)
            return name
        found = [n for n in ast.walk(space.tree) if isinstance(n, _DEFINITION) and n.name == thing.__name__]
        found = [n for n in found if _first(n) <= line <= n.end_lineno]
        if not found:
            raise CannotWrite(f"the source of {name} is not to be had")
        around = dict(space.names)  # defined inside a function: what it sees there stands for itself
        for method in _functions(thing):
            around |= inspect.getclosurevars(method).nonlocals
        self.owner[thing.__name__] = f"{file}:{line}"
        self._emit(space.source(found[-1]), _Space(f"{file}:{line}", around, space.text, ast.Module([], [])))
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
        if self.owner.get(name, space.file) != space.file:
            raise CannotWrite(f"its source uses two things that are called {name}")
        if name in self.owner:
            return
        self.owner[name] = space.file
        node, value = space.binding(name), space.names.get(name)
        if isinstance(node, ast.Import | ast.ImportFrom) and _installed(getattr(node, "module", None) or value):
            self.imports[ast.unparse(node)] = None
        elif isinstance(value, types.ModuleType) and _installed(value):
            self.imports[f"import {value.__name__} as {name}"] = None
        elif isinstance(node, _DEFINITION):
            self._emit(space.source(node), space)
        elif isinstance(value, types.FunctionType | type) and not isinstance(node, ast.Assign):
            del self.owner[name]  # defined elsewhere, perhaps under this name
            made = self.bring(value)
            self.items += [] if made == name else [f"{name} = {made}"]
        elif isinstance(value, Tensor) and value.nbytes <= INLINE:
            self.items.append(f"{name} = {_exact(value)}")
        elif (constant := _constant(value)) is not None:
            self.items.append(f"{name} = {constant}")
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            self._emit(space.source(node), space)
        else:
            raise CannotWrite(f"its source uses {name}, which cannot be brought along")

    def _emit(self, text: str, space: _Space) -> None:
        for name in sorted(_free_names(symtable.symtable(text, space.file, "exec"), True)):
            self.need(name, space)
        self.items.append(text)

    def bring_registered(self, qualified: str, functions: list[Callable]) -> None:
        """What registers an operation, as `mylib::cosine`: definitions and calls of its files that speak of it."""
        for space in {f.__code__.co_filename: self._space(f) for f in functions}.values():
            library = qualified.split("::")[0]
            about = {n for n, v in space.names.items() if qualified == getattr(v, "_qualname", None)
                     or (isinstance(v, torch.library.Library) and v.ns == library)}  # fmt: skip
            for node in space.tree.body:
                inner = list(ast.walk(node))
                named = {n.id for n in inner if isinstance(n, ast.Name)}
                speaks = bool(named & about) or any(isinstance(n, ast.Constant) and n.value == qualified for n in inner)
                if speaks and getattr(node, "decorator_list", None):
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
        return {a.asname or a.name.split(".")[0] for a in node.names}
    stores = ast.walk(node) if isinstance(node, ast.Assign | ast.AnnAssign) else ()
    return {n.id for n in stores if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


def _free_names(table: symtable.SymbolTable, outermost: bool) -> set[str]:
    """Names that a piece of source takes from around it."""
    found = {s.get_name() for s in table.get_symbols() if s.is_referenced()
             and (s.is_global() or (outermost and not s.is_assigned()))}  # fmt: skip
    return found.union(*(_free_names(child, False) for child in table.get_children()))


def _installed(module: Any) -> bool:
    name = module if isinstance(module, str) else getattr(module, "__name__", "")
    file = getattr(sys.modules.get(name.split(".")[0]), "__file__", "")
    return name.split(".")[0] in sys.builtin_module_names or (file or "").startswith(_INSTALLED)


def _constant(value: Any) -> str | None:
    try:
        return expression(value, {})
    except CannotWrite:
        return None


def expression(value: Any, names: dict[int, str], bring: Callable[[Any], str] | None = None) -> str:
    """An argument as source; tensors by the `names` of their values."""
    if isinstance(value, Ref) and value.value in names:
        return names[value.value]
    if value is None or type(value) in (bool, int, str, bytes, slice):
        return repr(value)
    if type(value) in (float, complex):
        return repr(value) if math.isfinite(abs(value)) else f'{type(value).__name__}("{value}")'
    if isinstance(value, torch.dtype | torch.memory_format | torch.layout):
        return str(value)
    if isinstance(value, torch.device):
        return 'torch.device("cpu")'
    if type(value) in (list, tuple, torch.Size):
        inner = ", ".join(expression(v, names, bring) for v in value)
        return f"[{inner}]" if isinstance(value, list) else f"({inner}{',' if len(value) == 1 else ''})"
    if type(value) is dict:
        return f"dict({expression(list(value.items()), names, bring)})"
    if bring is not None and isinstance(value, types.FunctionType | type):
        return bring(value)
    raise CannotWrite(f"an argument of type {type(value).__name__} cannot be written as source")


# -- tensors -----------------------------------------------------------------------------------------------------------


def _exact(tensor: Tensor) -> str:
    """An expression that makes this tensor, to the bit."""
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
    return f"{made}.expand({tuple(tensor.shape)})" if shape != tensor.shape else _laid_out(made, tensor)


def _like(tensor: Tensor) -> str:
    """An expression for random numbers of the same shape, type and scale."""
    shape, flat = tuple(tensor.shape), tensor.detach().cpu().reshape(-1)
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return f"torch.randint({int(flat.min())}, {int(flat.max()) + 1}, {shape}).to({tensor.dtype})"
    size = flat.abs().double()
    size = size[size.isfinite()].square().mean().sqrt().item()
    kind = "randn" if tensor.is_complex() or bool((flat < 0).any()) else "rand"  # what is positive may have to be
    dtype = torch.complex128 if tensor.is_complex() else torch.float64
    return _laid_out(f"(torch.{kind}({shape}, dtype={dtype}) * {size:.3g}).to({tensor.dtype})", tensor)


def _laid_out(made: str, tensor: Tensor) -> str:
    """Backward may depend on the strides."""
    if tensor.is_contiguous() or 0 in tensor.stride():
        return made
    return f"torch.empty_strided({tuple(tensor.shape)}, {tensor.stride()}, dtype={tensor.dtype}).copy_({made})"


# -- the program -------------------------------------------------------------------------------------------------------

HARNESS = '''

def check_gradient():
    torch.manual_seed({seed})
    inputs = [
        {inputs}
    ]
    arriving = [{arriving}]  # the gradient of the loss with respect to each output
    differentiable, wrong, element = {differentiable}, {wrong}, {element}

    def wide(t):
        {wide}

    def outputs(tensors):
        torch.manual_seed(0)
        made = operation(*({passed} for t in tensors))
        return [t for t in (made if isinstance(made, (tuple, list)) else [made]) if isinstance(t, torch.Tensor)]

    def terms(direction, step):
        """Of a central difference along the direction: one for each element of the outputs."""
        def beside(h):
            return outputs([wide(t) + h * direction if i == wrong else wide(t) for i, t in enumerate(inputs)])
        up, down = beside(step), beside(-step)
        return torch.cat([(wide(g).conj() * (u - d)).real.double().reshape(-1) / (2 * step)
                          for u, d, g in zip(up, down, arriving) if g is not None])
{before}
    leaves = [t.detach().requires_grad_(i in differentiable) for i, t in enumerate(inputs)]
    made, grads = zip(*((y, g.to(y.dtype)) for y, g in zip(outputs(leaves), arriving) if g is not None))
    got = torch.autograd.grad(made, leaves[wrong], grads, allow_unused=True)[0]
    if got is None:
        print("backward returned None, which stands for zero")
    x = wide(inputs[wrong])
    got = torch.zeros_like(x) if got is None else got.to(x.dtype)
    size = x.abs().clamp_min((x.abs().square().mean().sqrt().item() or 1.0) / 100)
    one = torch.zeros_like(x)
    one[element] = size[element]
    failed = False
    for where, direction, unit in (({title!r}, one, size[element].item()),
                                   ("along a random direction", size * (x != 0) * torch.randn_like(x), 1.0)):
        with torch.no_grad():
            d1, d2, d4 = (terms(direction, {step} / n) for n in (1, 2, 4))
        first, second = (4 * d2 - d1) / 3, (4 * d4 - d2) / 3  # extrapolated (Richardson)
        parts = (got.conj() * direction).real.double()
        expected, found = second.sum().item(), parts.sum().item()
        scale, error = (second.abs().sum() + parts.abs().sum()).item(), (second - first).sum().abs().item()
        allowed = {bound} * torch.finfo({coarse}).eps * scale + 4 * error + {rounding} * scale
        print(f"{{where}}: expected {{expected / unit:.9g}}, got {{found / unit:.9g}}, "
              f"a difference of {{abs(found - expected) / unit:.2g}}; rounding explains {{allowed / unit:.2g}}")
        failed = failed or abs(found - expected) > allowed
    print("{said}" if failed else "The gradient is right.")
    return failed


raise SystemExit(1 if check_gradient() else 0)
'''
WIDE = "return t.to(torch.promote_types(t.dtype, torch.float64)) if t.is_floating_point() or t.is_complex() else t"
STALE = (
    "THIS PROGRAM DOES NOT SHOW THE ERROR: called alone, the gradient is right. Likely cause: a tensor that backward "
    "uses changed after forward.{} Keep it with ctx.save_for_backward, which raises when it was changed, and do not "
    "change it through .data or in a buffer that is used again."
)


class _Case:
    def __init__(self, graph: Graph, op: Op, verdict: Verdict, inputs: dict[int, Tensor], into: tuple):
        self.graph, self.op, self.into = graph, op, into
        wrong = next((i for i in verdict.inputs if i.verdict == "wrong"), None)
        if wrong is None:
            raise CannotWrite("no input of it has a wrong gradient")
        self.wrong, self.family = wrong, [op, *inside(graph, op)]
        self.random = any(o.random for o in self.family)
        self.on_base = op.base is not None and wrong.value == op.base
        titles = dict(reversed([(v, n) for n, v in op.inputs]))
        if self.on_base:  # it changed a view: what has a gradient is the whole
            titles = {op.base: "base", **{v: n for v, n in titles.items() if v != op.inputs[0][1]}}
        if any(v not in inputs for v in titles):
            raise CannotWrite("what it read was not kept")
        self.tensors = {v: inputs[v] for v in titles}
        self.names = {v: re.sub(r"\W", "_", name).strip("_") for v, name in titles.items()}
        self.code = _Code()
        self.operation = self._operation()

    def _operation(self) -> str:
        op, (called, args, kwargs) = self.op, self.op.call
        known = inspect.getclosurevars(called.forward).nonlocals if hasattr(called, "forward") else {}
        if "info" in known and called.__name__.startswith("GeneratedBackwardFor"):  # made by torch.library
            called, info = known["op"], known["info"]
            args, kwargs = args[:-1], args[-1].keyword_only_args
            parts = [getattr(info, name, None) for name in ("_init_fn", "_backward_fn", "_setup_context_fn")]
            self.code.bring_registered(called._schema.name, [f for f in parts if f is not None])
        function = f"{self.code.bring(called)}.apply" if isinstance(called, type) else f"torch.ops.{called}"
        before, after, names = "", "", self.names
        for value in names:
            while names[value] in {"torch", *self.code.owner, *(n for v, n in names.items() if v != value)}:
                names[value] += "_"
        if self.on_base:
            whole, view = self.graph.values[op.base], self.graph.values[op.inputs[0][1]]
            place = f"{view.shape}, {view.strides}, {view.offset - whole.offset}"
            before = f"    view = {names[op.base]}.as_strided({place})\n"
            names, after = names | {view.index: "view"}, f"\n    return {names[op.base]}"
        given = [expression(a, names, self.code.bring) for a in args]
        given += [f"{k}={expression(a, names, self.code.bring)}" for k, a in kwargs.items()]
        call = f"    {'' if after else 'return '}{function}({', '.join(given)})"
        return f"def operation({', '.join(self.names.values())}):\n{before}{call}{after}\n"

    def numbers(self) -> Iterator[tuple[int, Callable[[Tensor], str]]]:
        """Seeds and ways to write tensors: large ones as random numbers, and if that shows nothing, as they are."""
        tensors = [*self.tensors.values(), *(g for g in self.into if g is not None)]
        integers = sum(t.nbytes for t in tensors if not t.is_floating_point())

        def write(t: Tensor) -> str:
            exact = t.numel() <= SMALL or (not t.is_floating_point() and integers <= INLINE // 4)
            return _exact(t) if exact or bool((t == t.reshape(-1)[0]).all()) else _like(t)

        yield from ((seed, write) for seed in (1, 2))
        if sum(t.nbytes for t in tensors) <= INLINE:
            yield 1, _exact

    def program(self, way: str, seed: int, write: Callable[[Tensor], str]) -> str:
        """way: autograd in the tensors' `own` types and numbers in float64; both in `float64`; both `narrow`."""
        op, wrong, values = self.op, self.wrong, list(self.tensors)
        narrow = way == "narrow"
        types_ = {self.graph.values[v].dtype for o in self.family for v in (*o.outputs, *(v for _, v in o.inputs))}
        coarse = max((t for t in types_ if t.is_floating_point or t.is_complex), key=lambda t: torch.finfo(t).eps)
        trained = {v for (_, v), edge in zip(op.inputs, op.edges, strict=False) if edge} | {wrong.value}
        element = wrong.element if wrong.element is not None else (0,) * self.tensors[wrong.value].dim()
        harness = HARNESS.format(
            seed=seed, inputs="\n        ".join(f"{write(t)},  # {self.names[v]}" for v, t in self.tensors.items()),
            arriving=", ".join("None" if g is None else write(g) for g in self.into), wrong=values.index(wrong.value),
            differentiable=[i for i, v in enumerate(values) if v in trained], element=element, coarse=coarse, said=SAID,
            wide="return t" if narrow else WIDE, passed="t.clone()" if any(o.mutates for o in self.family) else "t",
            before="    inputs = [wide(t) for t in inputs]\n" if way == "float64" else "", bound=f"{wrong.bound:.6g}",
            title=f"{self.names[wrong.value]}{list(element) or ''}", step="2**-3" if narrow else "2**-9",
            rounding=f"2**6 * torch.finfo({coarse}).eps" if narrow else "2**-40",
        )  # fmt: skip
        imports = [*self.code.imports, *(["from base64 import b64decode"] if "b64decode(" in harness else [])]
        imports = sorted({"import torch", *imports}, key=lambda line: ("__future__" not in line, line))
        defined = f" Its backward: {op.backward_source}." if op.backward_source else ""
        head = _comment(
            f"The gradient of {op.label} with respect to {wrong.argument} is wrong. Called at {op.source}.{defined}\n"
            f"Compared with a numeric derivative; exit code 1 while it is wrong. torch {torch.__version__}."
        )
        return head + "\n\n\n".join(["\n".join(imports), *self.code.items, self.operation]) + harness

    def apology(self, outcome: str) -> str:
        """Why the program does not show the error."""
        if outcome != "right":
            return _comment(f"THIS PROGRAM COULD NOT BE RUN ALONE: {outcome}")
        graph, op = self.graph, self.op
        memory = {graph.values[v].storage for o in self.family for v in (*o.outputs, *(v for _, v in o.inputs))}
        for other in graph.ops[op.index + 1 :]:
            changed = [v for v in other.mutates if graph.values[v].storage in memory and other not in self.family]
            if changed:
                what = f"{other.label} at {other.source} changed memory that it uses ({graph.title(changed[0])})"
                return _comment(STALE.format(f" {what}."))
        return _comment(STALE.format(""))
