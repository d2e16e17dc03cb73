"""Where an error was raised: the line of the program that is not torch's, its expression, and the tensors in it."""

from __future__ import annotations

import ast
import linecache
import os
import re
import traceback
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from types import FrameType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from kiem.inspect.graph.model import Graph

Lines = str | list[str]
PLAIN = list | tuple | dict | nn.ModuleList | nn.Sequential
LITERAL = ast.Constant | ast.UnaryOp | ast.Slice | ast.Starred
INSIDE = (os.path.dirname(torch.__file__) + os.sep, os.path.dirname(os.path.dirname(__file__)) + os.sep, "<frozen")


@dataclass(frozen=True)
class Seen:
    """A tensor that took part. name: what the program calls it; dtype: empty if only the name is known."""

    name: str
    shape: tuple[int, ...] = ()
    dtype: str = ""
    device: str = ""
    tensor: Tensor | None = None

    def __str__(self) -> str:
        return f"{self.name} is {self.dtype}{list(self.shape)}" if self.dtype else self.name

    @property
    def code(self) -> str:
        """The name, so that `.method()` can follow."""
        return self.name if re.fullmatch(r"[\w.]+(\([^()]*\)|\[[^\[\]]*\])?", self.name) else f"({self.name})"


class Scene:
    """What the traceback knows: the innermost line that is not torch's, its expression, and torch's frames below it.
    graph: what was recorded up to the error."""

    def __init__(self, error: BaseException, graph: Graph | None = None) -> None:
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        own = [i for i, frame in enumerate(frames) if not frame.f_code.co_filename.startswith(INSIDE)]
        self.outer: list[FrameType] = [frames[i] for i in reversed(own)]
        self.inner: list[FrameType] = frames[: own[-1] : -1]
        self.frame, self.place = self.outer[0], traceback.extract_tb(error.__traceback__)[own[-1]]
        self.file, self.line = self.place.filename, self.place.lineno or 0
        self.node = self._expression()
        self.text = ast.unparse(self.node) if self.node else linecache.getline(self.file, self.line).strip()
        selves = [frame.f_locals.get("self") for frame in self.inner]
        self.layer = next((part for part in selves if isinstance(part, nn.Module)), None)
        self.graph = graph
        self.recorded = [] if graph is None else _failed_inputs(graph)

    def _expression(self) -> ast.AST | None:
        """The expression that raised, cut out of the source where the bytecode says."""
        last = self.place.end_lineno or self.line
        lines = [linecache.getline(self.file, number).encode() for number in range(self.line, last + 1)]
        lines[-1] = lines[-1][: self.place.end_colno]
        lines[0] = lines[0][self.place.colno or 0 :]
        text = b"".join(lines).decode()
        for form in (f"({text}\n)", text):
            with suppress(SyntaxError, IndexError):
                node = ast.parse(form).body[0]
                return node.value if isinstance(node, ast.Expr) else node
        return None

    @property
    def statement(self) -> str:
        """The whole statement that raised, on one line."""
        with suppress(SyntaxError, ValueError):
            tree = ast.parse("".join(linecache.getlines(self.file)))
            simple = (node for node in ast.walk(tree) if isinstance(node, ast.stmt) and not hasattr(node, "body"))
            around = [node for node in simple if node.lineno <= self.line <= (node.end_lineno or node.lineno)]
            if around:
                return ast.unparse(around[-1])
        return linecache.getline(self.file, self.line).strip()

    def last_line(self, pattern: str) -> str:
        """The last line above this one that matches: ` FILE:LINE: text`, or nothing."""
        for number in range(self.line - 1, 0, -1):
            if re.search(pattern, line := linecache.getline(self.file, number)):
                return f" {self.file}:{number}: {line.strip()}"
        return ""

    def value(self, node: ast.AST | None) -> Any:
        """The object that an expression names, found without running code of the program; None: unknown."""
        match node:
            case ast.Constant(value):
                return value
            case ast.Name(name):
                return self.frame.f_locals.get(name, self.frame.f_globals.get(name))
            case ast.Attribute(base, name):
                base = self.value(base)
                if isinstance(base, Tensor):
                    return getattr(base, name) if name in ("T", "mT", "data") else None
                members = getattr(base, "__dict__", {})
                parts = [members, *(members.get(kind) or {} for kind in ("_parameters", "_buffers", "_modules"))]
                return next((part[name] for part in parts if name in part), None)
            case ast.Subscript(base, key):
                held: Any = self.value(base)
                at = self.value(key)
                if not isinstance(held, PLAIN) or not isinstance(at, int | str):
                    return None
                container: Any = held
                return container[at]
        return None

    def operands(self) -> list[Seen]:
        """The tensors of the expression in order, a method's receiver first, members of a list one by one."""
        match self.node:
            case ast.BinOp(left, _, right) | ast.AugAssign(left, _, right) | ast.Subscript(left, right):
                nodes = [left, right]
            case ast.Compare(left, _, rights):
                nodes = [left, *rights]
            case ast.Call(_, args, keywords):
                nodes = args + [k.value for k in keywords]
                base = self.value(getattr(self.node.func, "value", None))
                if (
                    isinstance(self.node.func, ast.Attribute)
                    and self.value(self.node.func) is None
                    and not isinstance(base, nn.Module | ModuleType)
                ):
                    nodes.insert(0, self.node.func.value)
            case ast.Name() | ast.Attribute():
                nodes = [self.node]
            case _:
                nodes = []
        nodes = [part for node in nodes for part in (node.elts if isinstance(node, ast.List | ast.Tuple) else [node])]
        values = [
            (node, v)
            for node in nodes
            if isinstance(v := self.value(node), Tensor) or (v is None and not isinstance(node, LITERAL))
        ]
        agree = len(self.recorded) == len(values) and all(
            v is None or tuple(v.shape) == given.shape for (_, v), given in zip(values, self.recorded, strict=True)
        )
        known = self.recorded if agree else [Seen("")] * len(values)
        return [
            replace(given, name=ast.unparse(node)) if v is None else seen(ast.unparse(node), v)
            for (node, v), given in zip(values, known, strict=True)
        ]

    def pair(self) -> list[Seen]:
        """The two tensors of the operation; empty if they are not known."""
        known = [tensor for tensor in self.operands() if tensor.dtype]
        return next((found for found in (known, self.recorded) if len(found) == 2), [])

    @property
    def layer_name(self) -> str:
        """How the program reaches the layer in which it happened."""
        for frame in self.outer:
            for name, value in [*frame.f_locals.items(), *frame.f_globals.items()]:
                for path, part in value.named_modules() if isinstance(value, nn.Module) else ():
                    if part is self.layer:
                        return f"{name}.{path}" if path else name
        return type(self.layer).__name__

    def need(self, name: str, position: int) -> Seen:
        """`arg`, or LookupError where it is not known: then nothing can be explained."""
        found = self.arg(name, position)
        if found is None:
            raise LookupError(name)
        return found

    def arg(self, name: str, position: int) -> Seen | None:
        """An argument of the torch function that raised, named as the user does; else an operand by position."""
        tensor = next((f.f_locals[name] for f in self.inner if isinstance(f.f_locals.get(name), Tensor)), None)
        if tensor is None:
            operands = self.operands() if self.layer is None else []
            return operands[position] if position < len(operands) and operands[position].dtype else None
        direct = self.layer is None or self.layer is self.value(getattr(self.node, "func", None))
        args = self.node.args if direct and isinstance(self.node, ast.Call) else []
        if position < len(args) and (self.value(args[position]) is None or self.value(args[position]) is tensor):
            return seen(ast.unparse(args[position]), tensor)
        names = [key for frame in self.outer for key, value in frame.f_locals.items() if value is tensor]
        return seen(names[0] if names else f"the {name} of {self.layer_name}" if self.layer else name, tensor)


def _failed_inputs(graph: Graph) -> list[Seen]:
    """The tensors of the last operation that raised."""
    op = next((op for op in reversed(list(graph.ops)) if op.error), None)
    values = [(name, graph.value(v)) for name, v in op.inputs] if op else []
    return [Seen(name, v.shape, str(v.dtype).removeprefix("torch."), v.device) for name, v in values]


def seen(name: str, tensor: Tensor) -> Seen:
    """A tensor under a name."""
    return Seen(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), str(tensor.device), tensor)


def fits(codes: Iterable[str]) -> str:
    """`Try: ...`, at most three of them; empty if there is none."""
    codes = list(dict.fromkeys(codes))
    return "Try: " + ", or ".join(f"`{code}`" for code in codes[:3]) if codes else ""
