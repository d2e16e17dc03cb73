"""Errors of PyTorch programs in plain words: which line, which tensors, why it cannot be, and what would fit.

What stands in backticks is code whose shapes and data types were checked against the operation's rule.
"""

from __future__ import annotations

import ast
import linecache
import math
import os
import re
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from types import FrameType, ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PLAIN = list | tuple | dict | nn.ModuleList | nn.Sequential
LITERAL = ast.Constant | ast.UnaryOp | ast.Slice | ast.Starred
INSIDE = (os.path.dirname(torch.__file__) + os.sep, os.path.dirname(__file__) + os.sep, "<frozen")


@dataclass(frozen=True)
class FailedCall:
    """The operation that raised: `aten.mm.default`, and of each tensor argument (name, shape, data type, device)."""

    name: str
    tensors: list[tuple[str, tuple[int, ...], str, str]]


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
    """What the traceback knows: the innermost line that is not torch's, its expression, and torch's frames below it."""

    def __init__(self, error: BaseException, call: FailedCall | None) -> None:
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
        self.recorded = [
            Seen(name, tuple(shape), dtype.removeprefix("torch."), device)
            for name, shape, dtype, device in (call.tensors if call else ())
        ]

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
                base, key = self.value(base), self.value(key)
                return base[key] if isinstance(base, PLAIN) and isinstance(key, int | str) else None
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
            replace(given, name=ast.unparse(node)) if v is None else _seen(ast.unparse(node), v)
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

    def arg(self, name: str, position: int) -> Seen | None:
        """An argument of the torch function that raised, named as the user does; else an operand by position."""
        tensor = next((f.f_locals[name] for f in self.inner if isinstance(f.f_locals.get(name), Tensor)), None)
        if tensor is None:
            operands = self.operands() if self.layer is None else []
            return operands[position] if position < len(operands) and operands[position].dtype else None
        direct = self.layer is None or self.layer is self.value(getattr(self.node, "func", None))
        args = self.node.args if direct and isinstance(self.node, ast.Call) else []
        if position < len(args) and (self.value(args[position]) is None or self.value(args[position]) is tensor):
            return _seen(ast.unparse(args[position]), tensor)
        names = [key for frame in self.outer for key, value in frame.f_locals.items() if value is tensor]
        return _seen(names[0] if names else f"the {name} of {self.layer_name}" if self.layer else name, tensor)


def _seen(name: str, tensor: Tensor) -> Seen:
    return Seen(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), str(tensor.device), tensor)


Lines = str | list[str]
RULES: dict[str, str | Callable[[Scene, re.Match[str]], Lines]] = {}  # by pattern of the message; a text: see NOTES


def explains(pattern: str) -> Callable:  # messages that contain the pattern
    return lambda function: RULES.setdefault(pattern, function)


def explain_error(error: BaseException, call: FailedCall | None = None) -> str | None:
    """One to six lines: FILE:LINE with the expression that raised, what took part, why it can't be, what would fit.

    None when there is nothing to add. Call it where no recorder is active.
    """
    with suppress(Exception):  # an explanation must never hide the error that it explains
        for pattern, rule in (RULES | NOTES).items():
            if match := re.search(pattern, str(error), re.S):
                scene = Scene(error, call)
                lines = _noted(scene, match, rule) if isinstance(rule, str) else rule(scene, match)
                head = f"{scene.file}:{scene.line}: {scene.text[:100]}"
                return "\n".join(filter(None, [head, *([lines] if isinstance(lines, str) else lines)]))
    return None


def _noted(s: Scene, m: re.Match, text: str) -> Lines:
    x = s.arg("input", 0) or next(iter(s.operands()), Seen("the tensor"))
    y = next((t for name in ("target", "indices", "index") if (t := s.arg(name, 1))), x)
    tested = Seen(re.sub(r"^bool\((.*)\)$", r"\1", s.text)).code
    return text.format(x=x, n=x.code, y=y, e=s.text, t=tested, g=m[m.re.groups])


def _fits(codes: Iterable[str]) -> str:
    codes = list(dict.fromkeys(codes))
    return "Fits: " + ", or ".join(f"`{code}`" for code in codes[:3]) if codes else ""


def _dims(shape: Iterable[int]) -> str:
    return ", ".join(map(str, shape))


def _works(function: Callable, *shapes: Iterable[int]) -> bool:
    """Whether an operation takes tensors of these shapes."""
    try:
        function(*(torch.empty(tuple(shape), device="meta") for shape in shapes))
    except (RuntimeError, IndexError, ValueError):
        return False
    return True


@explains(r"[Tt]arget size \(.*must be the same as input size|a target size .* that is different to the input size")
def _loss_shapes(s: Scene, m: re.Match) -> Lines:
    a, b = s.arg("input", 0), s.arg("target", 1)
    codes = [f"{b.code}.expand({_dims(a.shape)})"] if _works(lambda x, y: y.expand_as(x), a.shape, b.shape) else []
    if math.prod(a.shape) == math.prod(b.shape):
        codes = [f"{b.code}.reshape({_dims(a.shape)})"]
        codes += [f"{b.code}.view_as({a.name})"] if b.tensor is not None and b.tensor.is_contiguous() else []
    return [
        f"{a}, {b}: the loss compares element by element, so both shapes must be equal.",
        _fits(codes) or f"Give a target for each of the {math.prod(a.shape)} outputs.",
    ]


@explains(
    r"shapes cannot be multiplied \((\d+)x(\d+) and (\d+)x(\d+)\)|size mismatch, got input|must be a matrix"
    r"|Expected size for first two dimensions of batch2|inconsistent tensor size, exp|1D tensors expected"
)
def _product(s: Scene, m: re.Match) -> Lines:
    if s.layer is not None:
        return _features(s, m)
    if "linear(" in s.text:
        x, w = s.operands()[:2]
        codes = [f"{w.code}.T"] if _works(F.linear, x.shape, w.shape[::-1]) else []
        return [f"{x}, {w}: linear is x @ weight.T, so the weight must be [outputs, {x.shape[-1]}].", _fits(codes)]
    # Where the operands are not known the message has the shapes.
    a, b = s.pair() or (
        Seen(o.name, (int(m[i]), int(m[i + 1])), "a matrix ") for o, i in zip(s.operands(), (1, 3), strict=True)
    )
    parts = [
        [(x.code, x.shape)]
        + [(f"{x.code}.{'mT' if x.shape[2:] else 'T'}", (*x.shape[:-2], *x.shape[:-3:-1])) for _ in x.shape[1:2]]
        for x in (a, b)
    ]
    forms = [(f"{p} @ {q}", i, j) for p, i in parts[0] for q, j in parts[1]]
    forms.append((f"{b.code} @ {a.code}", b.shape, a.shape))
    if math.prod(a.shape) == math.prod(b.shape) and "1D tensors" in m[0]:
        forms = [(f"{a.code}.reshape(-1) @ {b.code}.reshape(-1)", (1,), (1,))]
    return [
        f"{a}, {b}: the last dimension of the left and the next to last (or only) one of the right must be equal.",
        _fits(code for code, *shapes in forms if _works(torch.matmul, *shapes)),
    ]


@explains(r"size of tensor a \((\d+)\) must match the size of tensor b \((\d+)\) at non-singleton dimension (\d+)")
def _broadcast(s: Scene, m: re.Match) -> Lines:
    a, b = s.pair() or (s.arg("input", 0), s.arg("target", 1))
    if isinstance(getattr(s.node, "op", None), ast.MatMult):
        return f"{a}, {b}: before the last two, dimensions must be equal or one of them 1; dimension {m[3]} is not."
    forms = [
        (x, y, f"{y.code}.unsqueeze({d})", (*y.shape[:d], 1, *y.shape[d:]))
        for x, y in ((a, b), (b, a))
        if len(y.shape) < len(x.shape)
        for d in range(len(y.shape) + 1)
    ]
    forms += [(a, b, f"{b.code}.T", b.shape[::-1])] if len(b.shape) == 2 else []
    codes = [code for x, _, code, shape in forms if _works(torch.add, x.shape, shape) and len(shape) <= len(x.shape)]
    return [
        f"{a}, {b}: from the last dimension backwards, sizes must be equal or one of them 1; in dimension "
        f"{m[3]} they are {m[1]} and {m[2]}.",
        _fits(codes),
    ]


@explains(
    r"expanded size of the tensor \((\d+)\) must match the existing size \((\d+)\) at non-singleton "
    r"dimension (\d+).*Target sizes: \[(.*?)\].*Tensor sizes: \[(.*?)\]"
)
def _expand(s: Scene, m: re.Match) -> Lines:
    found = s.operands()
    if len(found) == 3 and "linear(" in s.text:
        x, w, b = found
        return [
            f"{b.name} has {m[2]} elements, the features are {m[1]} ({w}, {x}): one bias for each is needed.",
            f"Fits: a bias of `torch.zeros({w.shape[0]})`, or as a layer `nn.Linear({w.shape[1]}, {w.shape[0]})`",
        ]
    return f"{m[5] or 'one'} cannot fill {m[4]}: only a size of 1 is repeated; dimension {m[3]} has {m[2]}, not {m[1]}."


@explains(r"shape '\[(.*)\]' is invalid for input of size (\d+)")
def _reshape(s: Scene, m: re.Match) -> Lines:
    want, count = [int(size) for size in m[1].split(",")], int(m[2])
    known = s.operands()[0]
    fits = []
    for i in range(len(want)):
        rest = math.prod(size for j, size in enumerate(want) if j != i and size != -1)
        if -1 not in want[:i] + want[i + 1 :] and count % rest == 0:
            fits.append(f"{known.code}.reshape({_dims([*want[:i], count // rest, *want[i + 1 :]])})")
    need = f"{math.prod(want)} elements" if -1 not in want else f"a multiple of {-math.prod(want)} elements"
    return [f"{known}, {count} elements: shape {want} needs {need}.", _fits(fits or [f"{known.code}.reshape(-1)"])]


@explains(r"view size is not compatible with input tensor's size and stride")
def _view(s: Scene, m: re.Match) -> Lines:
    x, args = s.operands()[0], _dims(ast.unparse(arg) for arg in s.node.args)
    return [
        f"{x}: after a transpose or a slice its elements do not lie in this order in memory, so no view is it.",
        _fits([f"{x.code}.reshape({args})", f"{x.code}.contiguous().view({args})"]),
    ]


@explains(r"Sizes of tensors must match except in dimension (\d+)|must have same number of dim|stack expects each")
def _join(s: Scene, m: re.Match) -> Lines:
    found = [tensor for tensor in s.operands() if tensor.dtype] or s.recorded
    shapes, names = [t.shape for t in found], ", ".join(t.name for t in found)
    codes = [
        f"torch.cat([{names}], dim={d})"
        for d in range(max(map(len, shapes), default=0))
        if _works(lambda *parts, d=d: torch.cat(parts, d), *shapes)
    ]
    if len(found) == 2 and not codes:
        big, small = sorted(found, key=lambda t: -len(t.shape))
        codes = [
            f"{small.code}.unsqueeze({d})"
            for d in range(len(small.shape) + 1)
            if m[1] is None and _works(lambda x, y, d=d: torch.cat([x, y.unsqueeze(d)]), big.shape, small.shape)
        ]
    rule = "all dimensions" + ("" if m[0].startswith("stack") else " but the joined one")
    return [", ".join(map(str, found[:8])) + f": {rule} must be equal.", _fits(codes)]


@explains(
    r"to have the same dtype|must have the same dtype|Found dtype (\w+) but expected (\w+)|same device"
    r"|is not on the expected device|expected scalar type (?!Long)(\w+) but found"
)
def _same(s: Scene, m: re.Match) -> Lines:
    weight, x = getattr(s.layer, "weight", None), s.arg("input", 0)
    a, b = s.pair() or (s.arg("target", 1), x)
    if isinstance(weight, Tensor) and x is not None:
        a, b = x, _seen(f"{s.layer_name}.weight", weight)
    if "device" in m[0]:
        return [f"{a} on {a.device}, {b} on {b.device}: both must be on one.", _fits([f"{a.code}.to({b.device!r})"])]
    a, b = (b, a) if a.dtype.startswith("float") and not b.dtype.startswith("float") else (a, b)
    return [f"{a}, {b}: both must have the same data type.", _fits([f"{a.code}.to(torch.{b.dtype})"])]


@explains(r"Expected input batch_size|Expected target size|multi-target not supported")
def _classes(s: Scene, m: re.Match) -> Lines:
    x, y = s.arg("input", 0), s.arg("target", 1)
    forms = [(f"{y.code}.reshape(-1)", x.shape, (math.prod(y.shape),))]
    forms += (
        [
            (
                f"{x.code}.flatten(0, -2), {y.code}.flatten()",
                (math.prod(x.shape[:-1]), x.shape[-1]),
                (math.prod(y.shape),),
            )
        ]
        if len(x.shape) > 2
        else []
    )
    return [
        f"{x}, {y}: for outputs [N, classes] the loss takes N class numbers, shape [N].",
        _fits(code for code, *shapes in forms if _works(lambda p, q: F.cross_entropy(p, q.long()), *shapes)),
    ]


@explains(r"Target (-?\d+) is out of bounds|index out of range in self")
def _range(s: Scene, m: re.Match) -> Lines:
    y, x = (s.arg("target", 1), s.arg("input", 0)) if m[1] else (s.arg("input", 0), s.arg("weight", 1))
    count = x.shape[0] if not m[1] or len(x.shape) == 1 else x.shape[1]
    low, high = y.tensor.min().item(), y.tensor.max().item()
    codes = [f"{y.code} - {low}"] if low > 0 and high - low < count else []
    codes += [f"nn.Embedding({high + 1}, {x.shape[1]})"] if not m[1] and low >= 0 else []
    return [
        f"{y}, its values go from {low} to {high}; {x}: {count} {'classes' if m[1] else 'rows'}, numbered 0 to "
        f"{count - 1}.",
        _fits(codes),
    ]


@explains(
    r"(?:to have (\d+) channels, but got (\d+) channels)|normalized_shape=|running_mean should contain (\d+)"
    r"|input.size\(-1\) must be equal to input_size. Expected \d+, got (\d+)"
)
def _features(s: Scene, m: re.Match) -> Lines:
    x, layer = s.arg("input", 0), s.layer
    groups = m.groups() if "mat1" not in m.string else (None,) * 4
    size = int(groups[1] or groups[2] or groups[3] or x.shape[-1])
    takes = int(re.search(r"\(+(?:in_features=)?(\d+)", repr(layer))[1])
    codes = [f"{x.code}.movedim(-1, 1)"] if groups[0] and x.shape[-1] == takes else []
    if isinstance(layer, nn.Linear):
        codes += [f"{x.code}.flatten(1)"] if len(x.shape) > 2 and math.prod(x.shape[1:]) == takes else []
        codes += [f"{x.code}.T"] if len(x.shape) == 2 and x.shape[0] == takes else []
    if len(getattr(layer, "normalized_shape", (1,))) == 1:
        codes.append("nn." + re.sub(r"(\(+(?:in_features=)?)\d+", rf"\g<1>{size}", repr(layer), count=1))
    return [f"{x}; {s.layer_name} is {layer}: it takes {takes} features (channels), given are {size}.", _fits(codes)]


@explains(r"element 0 of tensors does not require grad")
def _no_grad(s: Scene, m: re.Match) -> Lines:
    x = s.operands()[0]
    names = [
        name
        for name, v in s.frame.f_locals.items()
        if isinstance(v, Tensor) and v.is_floating_point() and v.is_leaf and not v.requires_grad and name != x.name
    ]
    made = s.last_line(rf"^\s*{re.escape(x.name)}\s*[-+*/]?=[^=]")
    return [
        f"{x}, and no tensor that it was made from requires grad, or it was cut off (detach, item, no_grad).",
        "It was made at" + made if made else "",
        "Before it is computed: " + ", ".join(f"`{name}.requires_grad_()`" for name in names[:3]) if names else "",
    ]


@explains(r"modified by an inplace operation: \[(.*?)\], which is output \d+ of (\w+), is at version (\d+)")
def _modified(s: Scene, m: re.Match) -> Lines:
    names = [n for n, v in s.frame.f_locals.items() if isinstance(v, Tensor) and v._version == int(m[3]) and v.grad_fn]
    changed = rf"\b({'|'.join(names)})(\s*[-+*/]=|\[.*\]\s*[-+*/]?=[^=]|\.\w*[a-z0-9]_\()"
    place = s.last_line(changed) if names else ""
    return [
        f"Backward needs the output of {m[2]} ({m[1]}) as it was, but it was changed in place.",
        "Changed at" + place if place else "",
        "Make a new tensor there: `x = x + y` instead of `x += y` or `x.add_(y)`; or change `x.clone()`.",
    ]


# {x}: the first tensor, {n}: its code, {y}: the target or index, {e}, {t}: the expression, {g}: what was caught
NOTES = {
    r"Trying to backward through the graph a second time": "The first backward freed what the graph had saved.\n"
    "Compute the loss anew before each, or keep the graph in the first: `{n}.backward(retain_graph=True)`",
    r"grad can be implicitly created": "{x}: only a scalar has one gradient.\nFits: `{n}.sum().backward()`",
    r"leaf Variable that requires grad is being used in an in": "{x}: autograd cannot follow a change of a leaf.\n"
    "Fits: `with torch.no_grad(): {e}`",
    r"nly Tensors of floating point": "{x}: whole numbers have no derivative.\nFits: `{n}.float()`, or write 1.0 for 1",
    r"Can't call numpy\(\) on Tensor": "{x}, and numpy cannot follow gradients.\nFits: `{n}.detach().cpu().numpy()`",
    r"target dtype to be Long|type Long but found|dtype int32/int64 for index|'indices' to have one": (
        "{y}: numbers of classes or rows are int64.\nFits: `{y.code}.long()`"
    ),
    r"should be between 0 and 1": "{x}: this loss takes probabilities.\nFits: `torch.sigmoid({n})`",
    r"with (\d+) elements cannot be converted to Sc": "{x}: {g} numbers.\nFits: `{n}.sum().item()`, or `{n}.tolist()`",
    r"Boolean value of Tensor with more than": "{x}: it has no single truth value.\nFits: `{t}.all()`, or `{t}.any()`",
    r"could not infer output dtype|not implemented for '(?:Long|Int)'": "{x}: whole numbers.\nFits: `{n}.float()`",
    r"result type \w+ can't be cast to the desired": "{x}: in place it keeps its data type.\nFits: `{n}.float()`",
    r"not compiled with CUDA": "This PyTorch has no CUDA.\nFits: `'cuda' if torch.cuda.is_available() else 'cpu'`",
}
