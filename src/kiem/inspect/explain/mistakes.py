"""Errors of PyTorch programs in plain words: which line, which tensors, why it cannot be, and what would fit.

What stands in backticks is code whose shapes and data types were checked against the operation's rule.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable, Iterable
from contextlib import suppress

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kiem.inspect.explain import backward_errors
from kiem.inspect.explain.scene import Lines, Scene, Seen, fits, seen
from kiem.inspect.graph.model import Graph

RULES: dict[str, str | Callable[[Scene, re.Match[str]], Lines]] = {}  # by pattern of the message; a text: see NOTES


def explains(pattern: str) -> Callable:  # messages that contain the pattern
    return lambda function: RULES.setdefault(pattern, function)


def explain_error(error: BaseException, graph: Graph | None = None) -> str | None:
    """One to eight lines: FILE:LINE with the expression that raised, what took part, why it can't be, what to try.
    `graph`: what was recorded up to the error.

    None when there is nothing to add. Call it where no recorder is active.
    """
    with suppress(Exception):  # an explanation must never hide the error that it explains
        for pattern, rule in (RULES | backward_errors.RULES | NOTES).items():
            if match := re.search(pattern, str(error), re.S):
                scene = Scene(error, graph)
                lines = _noted(scene, match, rule) if isinstance(rule, str) else rule(scene, match)
                head = f"{scene.file}:{scene.line}: {scene.text[:100]}"
                return "\n".join(filter(None, [head, *([lines] if isinstance(lines, str) else lines)]))
    return None


def _noted(s: Scene, m: re.Match, text: str) -> Lines:
    x = s.arg("input", 0) or next(iter(s.operands()), Seen("the tensor"))
    y = next((t for name in ("target", "indices", "index") if (t := s.arg(name, 1))), x)
    tested = Seen(re.sub(r"^bool\((.*)\)$", r"\1", s.text)).code
    return text.format(x=x, n=x.code, y=y, e=s.text, t=tested, g=m[m.re.groups])


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
    a, b = s.need("input", 0), s.need("target", 1)
    codes = [f"{b.code}.expand({_dims(a.shape)})"] if _works(lambda x, y: y.expand_as(x), a.shape, b.shape) else []
    if math.prod(a.shape) == math.prod(b.shape):
        codes = [f"{b.code}.reshape({_dims(a.shape)})"]
        codes += [f"{b.code}.view_as({a.name})"] if b.tensor is not None and b.tensor.is_contiguous() else []
    return [
        f"{a}, {b}: the loss compares element by element, so both shapes must be equal.",
        fits(codes) or f"Give a target for each of the {math.prod(a.shape)} outputs.",
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
        return [f"{x}, {w}: linear is x @ weight.T, so the weight must be [outputs, {x.shape[-1]}].", fits(codes)]
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
        fits(code for code, *shapes in forms if _works(torch.matmul, *shapes)),
    ]


@explains(r"size of tensor a \((\d+)\) must match the size of tensor b \((\d+)\) at non-singleton dimension (\d+)")
def _broadcast(s: Scene, m: re.Match) -> Lines:
    a, b = s.pair() or (s.need("input", 0), s.need("target", 1))
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
        fits(codes),
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
            f"Try: a bias of `torch.zeros({w.shape[0]})`, or as a layer `nn.Linear({w.shape[1]}, {w.shape[0]})`",
        ]
    return f"{m[5] or 'one'} cannot fill {m[4]}: only a size of 1 is repeated; dimension {m[3]} has {m[2]}, not {m[1]}."


@explains(r"shape '\[(.*)\]' is invalid for input of size (\d+)")
def _reshape(s: Scene, m: re.Match) -> Lines:
    want, count = [int(size) for size in m[1].split(",")], int(m[2])
    known = s.operands()[0]
    forms = []
    for i in range(len(want)):
        rest = math.prod(size for j, size in enumerate(want) if j != i and size != -1)
        if -1 not in want[:i] + want[i + 1 :] and count % rest == 0:
            forms.append(f"{known.code}.reshape({_dims([*want[:i], count // rest, *want[i + 1 :]])})")
    need = f"{math.prod(want)} elements" if -1 not in want else f"a multiple of {-math.prod(want)} elements"
    return [f"{known}, {count} elements: shape {want} needs {need}.", fits(forms or [f"{known.code}.reshape(-1)"])]


@explains(r"view size is not compatible with input tensor's size and stride")
def _view(s: Scene, m: re.Match) -> Lines:
    x, args = s.operands()[0], ", ".join(ast.unparse(arg) for arg in getattr(s.node, "args", []))
    return [
        f"{x}: after a transpose or a slice its elements do not lie in this order in memory: it has no such view.",
        fits([f"{x.code}.reshape({args})", f"{x.code}.contiguous().view({args})"]),
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
    return [", ".join(map(str, found[:8])) + f": {rule} must be equal.", fits(codes)]


@explains(
    r"to have the same dtype|must have the same dtype|Found dtype (\w+) but expected (\w+)|same device"
    r"|is not on the expected device|expected scalar type (?!Long)(\w+) but found"
)
def _same(s: Scene, m: re.Match) -> Lines:
    weight, x = getattr(s.layer, "weight", None), s.arg("input", 0)
    if isinstance(weight, Tensor) and x is not None:
        a, b = x, seen(f"{s.layer_name}.weight", weight)
    else:
        a, b = s.pair() or (s.need("target", 1), x or s.need("input", 0))
    if "device" in m[0]:
        return [f"{a} on {a.device}, {b} on {b.device}: both must be on one.", fits([f"{a.code}.to({b.device!r})"])]
    a, b = (b, a) if a.dtype.startswith("float") and not b.dtype.startswith("float") else (a, b)
    return [f"{a}, {b}: both must have the same data type.", fits([f"{a.code}.to(torch.{b.dtype})"])]


@explains(r"Expected input batch_size|Expected target size|multi-target not supported")
def _classes(s: Scene, m: re.Match) -> Lines:
    x, y = s.need("input", 0), s.need("target", 1)
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
        fits(code for code, *shapes in forms if _works(lambda p, q: F.cross_entropy(p, q.long()), *shapes)),
    ]


@explains(r"Target (-?\d+) is out of bounds|index out of range in self")
def _range(s: Scene, m: re.Match) -> Lines:
    y, x = (s.need("target", 1), s.need("input", 0)) if m[1] else (s.need("input", 0), s.need("weight", 1))
    if y.tensor is None:
        raise LookupError(y.name)
    count = x.shape[0] if not m[1] or len(x.shape) == 1 else x.shape[1]
    low, high = y.tensor.min().item(), y.tensor.max().item()
    codes = [f"{y.code} - {low}"] if low > 0 and high - low < count else []
    codes += [f"nn.Embedding({high + 1}, {x.shape[1]})"] if not m[1] and low >= 0 else []
    return [
        f"{y}, its values go from {low} to {high}; {x}: {count} {'classes' if m[1] else 'rows'}, numbered 0 to "
        f"{count - 1}.",
        fits(codes),
    ]


@explains(
    r"(?:to have (\d+) channels, but got (\d+) channels)|normalized_shape=|running_mean should contain (\d+)"
    r"|input.size\(-1\) must be equal to input_size. Expected \d+, got (\d+)"
)
def _features(s: Scene, m: re.Match) -> Lines:
    x, layer = s.need("input", 0), s.layer
    groups = m.groups() if "mat1" not in m.string else (None,) * 4
    size = int(groups[1] or groups[2] or groups[3] or x.shape[-1])
    takes = int(re.findall(r"\(+(?:in_features=)?(\d+)", repr(layer))[0])
    codes = [f"{x.code}.movedim(-1, 1)"] if groups[0] and x.shape[-1] == takes else []
    if isinstance(layer, nn.Linear):
        codes += [f"{x.code}.flatten(1)"] if len(x.shape) > 2 and math.prod(x.shape[1:]) == takes else []
        codes += [f"{x.code}.T"] if len(x.shape) == 2 and x.shape[0] == takes else []
    if len(getattr(layer, "normalized_shape", (1,))) == 1:
        codes.append("nn." + re.sub(r"(\(+(?:in_features=)?)\d+", rf"\g<1>{size}", repr(layer), count=1))
    return [f"{x}; {s.layer_name} is {layer}: it takes {takes} features (channels), given are {size}.", fits(codes)]


@explains(r"target dtype to be Long|type Long but found|dtype int32/int64 for index|'indices' to have one")
def _class_indices(s: Scene, m: re.Match) -> Lines:
    y = next((t for name in ("target", "indices", "index") if (t := s.arg(name, 1))), None) or s.operands()[0]
    # Where whole numbers were made floats in this very expression, the way back is to leave that out.
    floated = re.fullmatch(r"(.+?)\.(?:float\(\)|double\(\)|half\(\)|to\(torch\.(?:b?float\d+)\))", y.name)
    inner = None if floated is None else s.value(ast.parse(floated[1], mode="eval").body)
    whole = isinstance(inner, Tensor) and not inner.is_floating_point()
    return [f"{y}: class indices must be int64.", fits([floated[1] if floated and whole else f"{y.code}.long()"])]


# {x}: the first tensor, {n}: its code, {y}: the target or index, {e}, {t}: the expression, {g}: what was caught
NOTES = {
    r"grad can be implicitly created": "{x}: only a scalar has one gradient.\nTry: `{n}.sum().backward()`",
    r"nly Tensors of floating point": "{x}: whole numbers have no derivative.\nTry: `{n}.float()`, or write 1.0 for 1",
    r"Can't call numpy\(\) on Tensor": "{x}, and numpy cannot follow gradients.\nTry: `{n}.detach().cpu().numpy()`",
    r"should be between 0 and 1": "{x}: this loss takes probabilities.\nTry: `torch.sigmoid({n})`",
    r"with (\d+) elements cannot be converted to Sc": "{x}: {g} numbers.\nTry: `{n}.sum().item()`, or `{n}.tolist()`",
    r"Boolean value of Tensor with more than": "{x}: it has no single truth value.\nTry: `{t}.all()`, or `{t}.any()`",
    r"could not infer output dtype|not implemented for '(?:Long|Int)'": "{x}: whole numbers.\nTry: `{n}.float()`",
    r"result type \w+ can't be cast to the desired": "{x}: in place it keeps its data type.\nTry: `{n}.float()`",
    r"not compiled with CUDA": "This PyTorch has no CUDA.\nTry: `'cuda' if torch.cuda.is_available() else 'cpu'`",
}
