"""Errors of backward calls in plain words: the tensor that links two graphs, what was changed in place, what cut the
graph, what a custom Function gave back. Where a program was recorded, its graph says which and where."""

from __future__ import annotations

import ast
import linecache
import re
from collections.abc import Callable, Iterable
from contextlib import suppress

import torch
from torch import Tensor

from kiem.inspect.explain.scene import Lines, Scene, Seen, fits
from kiem.inspect.graph.model import BackwardCall, Graph, Op, Source, Value

RULES: dict[str, Callable[[Scene, re.Match[str]], Lines]] = {}  # by pattern of the message
NO_DERIVATIVE = "which has no derivative"
SMALL_NAMES = re.compile(r"(w|W|b|B|weights?|bias(es)?|theta|params?|[Ww]\d+|[Bb]\d+)$")  # of parameters, by custom
CREATION = re.compile(r"requires_grad\s*=\s*True|requires_grad_\(\)")


def explains(pattern: str) -> Callable:  # messages that contain the pattern
    return lambda function: RULES.setdefault(pattern, function)


# -- what a backward call would go through -----------------------------------------------------------------------------


def ahead(graph: Graph, call: BackwardCall) -> list[Op]:
    """The operations from whose nodes a backward call gets its gradients, in the order in which they ran."""
    made = {op.sequence: op for op in graph.ops_between(0, call.after_op)
            if op.sequence is not None and any(graph.value(v).requires_grad for v in op.outputs)}  # fmt: skip
    waiting, found = [key[0] for key in call.root_keys if key], {}
    while waiting:
        number = waiting.pop()
        op = made.get(number)
        if op is None and (changing := made.get(number - 1)) is not None and changing.mutates:
            op = changing  # of a view: CopySlices is numbered after it
        if op is not None and op.index not in found:
            found[op.index] = op
            waiting += [edge[0] for edge in op.edges if edge and edge[0] != "leaf"]
    return [found[i] for i in sorted(found)]


def changes_after(graph: Graph, op: Op, before: int) -> list[tuple[Value, Op]]:
    """What an operation read or gave that was changed in place later, before an operation: (value, what changed it)."""
    kept = {graph.value(v).storage: graph.value(v) for v in (*(v for _, v in op.inputs), *op.outputs)}
    return [
        (kept[graph.value(v).storage], other)
        for other in graph.ops_between(op.index + 1, before)
        for v in other.mutates
        if graph.value(v).storage in kept and graph.value(v).numel
    ]


def where(source: Source) -> str:
    """`line 7`, in messages that name the file already."""
    return f"line {source.line}"


# -- a graph that was gone through already -----------------------------------------------------------------------------


@explains(r"Trying to backward through the graph a second time|backward through the graph a second time")
def _twice(s: Scene, m: re.Match) -> Lines:
    freed = "The first backward call freed what the graph had saved."
    call = s.graph.backwards[-1] if s.graph and s.graph.backwards else None
    operands = s.operands()
    loss = operands[0].code if operands and operands[0].dtype else "loss"
    if s.graph is None or call is None:
        return [freed, f"Compute {loss} again before each backward call, or keep its graph in the first: "
                f"`{loss}.backward(retain_graph=True)`"]  # fmt: skip
    reached = ahead(s.graph, call)
    earlier = [c for c in s.graph.backwards if c is not call and not c.retained]
    gone = {step.op: c for c in earlier for step in c.steps if step.op is not None}
    old = [op for op in reached if op.index in gone]
    if not old:
        return freed
    first = gone[old[-1].index]
    roots = {key[0] for key in call.root_keys}
    if any(op.sequence in roots for op in old):
        return _same_loss(s.graph, call, first, loss, reached)
    links = _links(s.graph, reached, gone, first)
    return _linked(s.graph, call, first, links) if links else freed


def _same_loss(graph: Graph, call: BackwardCall, first: BackwardCall, loss: str, reached: list[Op]) -> Lines:
    lines = sorted({op.source.line for op in reached})
    span = f"line {lines[0]}" if len(lines) == 1 else f"lines {lines[0]} to {lines[-1]}"
    if call.source == first.source:
        return [
            f"This backward call runs again and again, but the forward pass ({span}) ran once, outside the loop; the "
            "first backward call freed what it had saved.",
            f"Move {span} into the loop, before {loss}.backward(): each step needs a forward pass of its own.",
        ]
    return [
        f"The backward call at {where(first.source)} went through the graph of {loss} ({span}) and freed what it had "
        "saved.",
        f"Compute {loss} again before this call, or keep its graph at {where(first.source)}: "
        f"`{loss}.backward(retain_graph=True)`",
    ]


def _links(
    graph: Graph, reached: list[Op], gone: dict[int, BackwardCall], first: BackwardCall
) -> list[tuple[Value, Op, Op]]:
    """(tensor, what made it, what reads it) where what ran after an earlier backward call goes on from what ran before
    it, on the way to what that call freed."""
    made = {op.sequence: op for op in reached}
    freed: set[int] = set()  # operations from which the way leads through freed ones
    found: dict[int, tuple[Value, Op, Op]] = {}
    for op in reached:
        makers = [None if not edge else made.get(edge[0]) for edge in op.edges]
        if op.index in gone or any(maker is not None and maker.index in freed for maker in makers):
            freed.add(op.index)
        for (_, v), maker in zip(op.inputs, makers, strict=False):
            if maker is not None and maker.index in freed and maker.index < first.after_op <= op.index:
                found.setdefault(v, (graph.value(v), maker, op))
    return list(found.values())


def _linked(graph: Graph, call: BackwardCall, first: BackwardCall, links: list[tuple[Value, Op, Op]]) -> Lines:
    _, maker, reader = links[0]
    names = list(dict.fromkeys(v.name for v, _, _ in links if v.name and v.name.isidentifier()))
    names = names or _carried(maker.source) or ["the tensor"]
    known = names != ["the tensor"]
    both, verb, it = " and ".join(names[:3]), *(("links", "it is") if len(names) == 1 else ("link", "they are"))
    made, read = where(maker.source), where(reader.source)
    if call.source == first.source:
        again = graph.ops_between(first.after_op, call.after_op)
        if any(op.source == maker.source and op.label == maker.label for op in again):
            cut = f"tuple(part.detach() for part in {names[0]})" if len(links) > len(names) else f"{names[0]}.detach()"
            parts = [f"{name} = {name}.detach()" for name in names[:3]] if len(names) > 1 else [f"{names[0]} = {cut}"]
            assign = f": `{'; '.join(parts)}`" if known else " by .detach()"
            return [
                f"{both}, made at {made} in the step before, {verb} this step to the graph of that step, which its "
                f"backward call freed; {it} read again at {read}.",
                f"Let gradients stop there, at the end of each step{assign}",
            ]
        return [
            f"{both}: computed once, at {made}, outside the loop, and read at {read} in every step; the first backward "
            "call freed what had been saved for it.",
            f"Move {made} into the loop: each step needs a forward pass of its own.",
        ]
    values = {value.index for value, _, _ in links}
    before = graph.ops_between(maker.index + 1, first.after_op)
    use = next((op for op in before if op.edges and any(v in values for _, v in op.inputs)), None)
    place = where(use.source) if use is not None else f"the way to {where(first.source)}"
    code = f": `{', '.join(f'{name}.detach()' for name in names[:3])}`" if known else ", by .detach()"
    return [
        f"Two losses use {both}, made at {made}; the backward call at {where(first.source)} went through the graph of "
        f"{both} and freed what it had saved.",
        f"If the first loss must not train what made {both} (as a GAN's discriminator), detach at {place}{code}",
        f"If both must: one backward call for the sum of the losses, or retain_graph=True at {where(first.source)}.",
    ]


def _carried(source: Source) -> list[str]:
    """What the statement at a line both reads and sets: the state of `out, self.h = self.gru(x, self.h)`."""
    with suppress(SyntaxError, ValueError):
        for node in ast.walk(ast.parse("".join(linecache.getlines(source.file)))):
            if isinstance(node, ast.Assign) and node.lineno <= source.line <= (node.end_lineno or node.lineno):
                given = {ast.unparse(part) for part in ast.walk(node.value)}
                inside = [part for target in node.targets for part in ast.walk(target)]
                kinds = ast.Name | ast.Attribute
                return [text for part in inside if isinstance(part, kinds) and (text := ast.unparse(part)) in given
                        and text != "self"]  # fmt: skip
    return []


# -- changed in place --------------------------------------------------------------------------------------------------


@explains(r"modified by an inplace operation: \[\S+ \[(.*?)\]\], which is output \d+ of (\w+), is at version (\d+)")
def _modified(s: Scene, m: re.Match) -> Lines:
    shape = tuple(int(size) for size in re.findall(r"\d+", m[1]))
    general = f"Backward needs the output of {m[2]} ({list(shape)}) as it was, but it was changed in place."
    call = s.graph.backwards[-1] if s.graph and s.graph.backwards else None
    if s.graph is not None and call is not None:
        found = [(op, value, other) for op in ahead(s.graph, call)
                 for value, other in changes_after(s.graph, op, call.after_op)
                 if sorted(value.shape) == sorted(shape)]  # fmt: skip
        # The operation that torch names has it as its output: among several that read it, that one.
        plain = m[2].removesuffix("Backward0").lower()
        found.sort(key=lambda triple: triple[0].label.replace("_", "") != plain)
        if found:
            return _changed(s.graph, call, *found[0], general)
    names = [n for n, v in s.frame.f_locals.items() if isinstance(v, Tensor) and v._version == int(m[3]) and v.grad_fn]
    changed = rf"\b({'|'.join(names)})(\s*[-+*/]=|\[.*\]\s*[-+*/]?=[^=]|\.\w*[a-z0-9]_\()"
    place = s.last_line(changed) if names else ""
    return [
        general,
        "Changed at" + place if place else "",
        "Make a new tensor there: `x = x + y` instead of `x += y` or `x.add_(y)`; or change `x.clone()`.",
    ]


def _changed(graph: Graph, call: BackwardCall, op: Op, value: Value, other: Op, general: str) -> Lines:
    name = value.name or graph.title(op.inputs[0][1]) if value.name or op.inputs else "the tensor"
    code = linecache.getline(other.source.file, other.source.line).strip()
    place = f"{where(other.source)}: {code[:100]}"
    if other.region == "optimizer" or value.is_parameter:
        step = re.search(r"[\w.\[\]]+\.step\(", code)
        what = f"{step[0]})" if step else where(other.source)
        return [
            f"{name} was changed in place by {what} at {place}",
            f"It was read at {where(op.source)} ({op.label}) before, and backward needs it as it was then.",
            f"Move {what} after this backward call, or run the forward pass from {where(op.source)} on again after it.",
        ]
    return [
        f"{general[: general.index(',')]}: {value.describe()}, made or read by {op.label} at {where(op.source)}.",
        f"It was changed in place at {place}",
        _instead(code, name),
    ]


def _instead(code: str, name: str) -> str:
    """How to write a change in place without one."""
    if found := re.fullmatch(r"(\w+)\s*([-+*/@]|\*\*|//)=\s*(.+?)(\s*#.*)?", code):
        right = found[3] if re.fullmatch(r"[\w.]+(\([^()]*\))?", found[3]) else f"({found[3]})"
        return f"Make a new tensor there: `{found[1]} = {found[1]} {found[2]} {right}`"
    if found := re.fullmatch(r"(\w+)\.(\w*[a-z0-9])_\((.*)\)(\s*#.*)?", code):
        method = {"zero": "zeros_like", "fill": "full_like"}.get(found[2])
        new = f"torch.{method}({', '.join(filter(None, [found[1], found[3]]))})" if method else \
            f"{found[1]}.{found[2]}({found[3]})"  # fmt: skip
        return f"Make a new tensor there: `{found[1]} = {new}`"
    if found := re.fullmatch(r"(\w+)\[.*\]\s*[-+*/]?=[^=].*", code):
        return f"Change a copy there: put `{found[1]} = {found[1]}.clone()` before it"
    return ("Make a new tensor there: an operation without the trailing underscore, a module with inplace=False, or "
            "change a copy made by .clone()")  # fmt: skip


@explains(r"leaf Variable that requires grad is being used in an in")
def _leaf_in_place(s: Scene, m: re.Match) -> Lines:
    found = [x for x in s.operands() if x.tensor is not None and x.tensor.requires_grad]
    name = f"{found[0]}" if found else "the tensor"
    return [
        f"{name}: it is a leaf with requires_grad=True, and autograd cannot follow a change of it in place.",
        f"Try: `with torch.no_grad(): {s.statement}`",
    ]


# -- no graph ----------------------------------------------------------------------------------------------------------


@explains(r"element 0 of tensors does not require grad")
def _no_grad(s: Scene, m: re.Match) -> Lines:
    operands = s.operands()
    x = operands[0] if operands else Seen("the loss")
    made = s.last_line(rf"^\s*{re.escape(x.name)}\s*[-+*/]?=[^=]") if x.name.isidentifier() else ""
    lines = [f"{x}, and no gradient can be asked of it.", "It was made at" + made if made else ""]
    graph = s.graph
    if graph is not None and graph.backwards and graph.backwards[-1].roots:
        above = _above(graph, graph.backwards[-1].roots)
        cuts = [(op, v) for op in reversed(above) for v in op.outputs if _cuts(graph, op, v)]
        if cuts:
            return lines[:1] + _cut_words(graph, *cuts[0])
        leaves = {graph.value(v).name: v for op in above for _, v in op.inputs if _could_train(graph, graph.value(v))}
        names = [name for name in leaves if name]
    else:
        names = [
            name for name, v in s.frame.f_locals.items()
            if isinstance(v, Tensor) and v.is_floating_point() and v.is_leaf and not v.requires_grad and name != x.name
        ]  # fmt: skip
    if copied := _copied(s):
        return [lines[0], copied]
    lines[0] = f"{x}, and no tensor that it was computed from has requires_grad=True."
    wanted = _to_train(s, names)
    if wanted:
        codes = " and ".join(f"`{name}.requires_grad_()`" for name in wanted)
        lines.append(f"Before {x.name} is computed: {codes}")
    elif names:
        lines.append(f"Give those that are to be trained requires_grad=True before: one or more of "
                     f"{', '.join(names[:6])}")  # fmt: skip
    return lines


def _above(graph: Graph, roots: Iterable[int]) -> list[Op]:
    """The operations that made values, whether with gradient or without, in order."""
    waiting, found = list(roots), {}
    while waiting:
        value = graph.value(waiting.pop())
        op = None if value.producer is None else graph.op(value.producer)
        if op is not None and op.index not in found:
            found[op.index] = op
            waiting += [v for _, v in op.inputs]
        elif op is None and value.base is not None:
            waiting.append(value.base)
    return [found[i] for i in sorted(found)]


def _cuts(graph: Graph, op: Op, output: int) -> bool:
    """Whether gradients end at an operation: it reads a tensor that has one and gives one without."""
    return not graph.value(output).requires_grad and any(
        graph.value(v).requires_grad or _base_requires(graph, v) for _, v in op.inputs
    )


def _base_requires(graph: Graph, value: int) -> bool:
    base = graph.value(value).base
    return base is not None and graph.value(value).producer is None and graph.value(base).requires_grad


def _cut_words(graph: Graph, op: Op, output: int) -> list[str]:
    given, value, place = op.inputs[0][1], graph.value(output), f"{op.source}: {op.source.text.strip()[:100]}"
    named = graph.value(given)
    before = f"{named.name} ({named.describe()})" if named.name else f"the {named.describe()} that it is given"
    if op.label == "detach":
        return [f"The graph ends at {place}", f"detach gives a tensor without a graph: leave `.detach()` out there, or "
                f"compute the loss from {before}."]  # fmt: skip
    if not op.grad_enabled:
        return [f"The graph ends at {place}", "It ran under torch.no_grad() or inference_mode(): move it out of the "
                "block."]  # fmt: skip
    if not (value.dtype.is_floating_point or value.dtype.is_complex):
        loss = ", such as `F.cross_entropy(scores, labels)`" if op.label in ("argmax", "max", "topk") else ""
        return [f"The graph ends at {place}", f"{op.label} gives {value.describe()}, {NO_DERIVATIVE}: compute the loss "
                f"from {before}{loss}."]  # fmt: skip
    return [f"The graph ends at {place}", f"{op.label} passes no gradient on: compute the loss from {before}."]


def _could_train(graph: Graph, value: Value) -> bool:
    """Whether it is a leaf: from outside, or made of no other tensor."""
    made = value.producer is not None and bool(graph.op(value.producer).inputs)
    return not made and value.dtype.is_floating_point and not value.requires_grad


def _copied(s: Scene) -> str:
    """Where numbers were taken out of tensors and made into one again, in the lines above."""
    taken = re.compile(r"\.(numpy|item|tolist)\(\)")
    with suppress(SyntaxError, ValueError):
        nodes = [
            n for n in ast.walk(ast.parse("".join(linecache.getlines(s.file)))) if getattr(n, "lineno", 0) <= s.line
        ]
        numbers = {
            ast.unparse(target)
            for n in nodes
            if isinstance(n, ast.Assign | ast.AugAssign) and taken.search(ast.unparse(n.value))
            for target in (n.targets if isinstance(n, ast.Assign) else [n.target])
        }
        for n in nodes:
            text = ast.unparse(n) if isinstance(n, ast.Call) else ""
            if not isinstance(n, ast.Call) or not re.match(
                r"torch\.(tensor|from_numpy|as_tensor|Tensor|FloatTensor)\(", text
            ):
                continue
            given = {ast.unparse(part) for arg in n.args for part in ast.walk(arg)}
            inner = s.value(n.args[0]) if n.args else None
            if taken.search(text) or given & numbers or (isinstance(inner, Tensor) and inner.requires_grad):
                return (f"{s.file}:{n.lineno}: {text[:100]} makes a new tensor from numbers: the graph ends there. "
                        "Compute with torch on the tensor itself.")  # fmt: skip
    return ""


def _to_train(s: Scene, names: list[str]) -> list[str]:
    """Which of some tensors a program means to train: those whose .grad it reads, or that an optimizer is given, or
    that are called like weights; all, if there is one."""
    if len(names) < 2:
        return names
    read, given = set(), set()
    with suppress(SyntaxError, ValueError):
        for node in ast.walk(ast.parse("".join(linecache.getlines(s.file)))):
            if isinstance(node, ast.Attribute) and node.attr == "grad" and isinstance(node.value, ast.Name):
                read.add(node.value.id)
            if isinstance(node, ast.Call) and "optim" in ast.unparse(node.func):
                given |= {part.id for arg in node.args for part in ast.walk(arg) if isinstance(part, ast.Name)}
    for wanted in (read, given, {name for name in names if SMALL_NAMES.match(name)}):
        if found := [name for name in names if name in wanted]:
            return found
    return []


# -- what a backward call, or a Function's backward, was given ---------------------------------------------------------


@explains(r"Mismatch in shape: grad_output\[\d+\] has a shape of torch.Size\((.*?)\) and output\[\d+\] has a shape of "
          r"torch.Size\((.*?)\)")  # fmt: skip
def _gradient_shape(s: Scene, m: re.Match) -> Lines:
    given, wanted = ([int(n) for n in re.findall(r"\d+", part)] for part in (m[1], m[2]))
    operands = s.operands()
    y = next((x for x in operands if list(x.shape) == wanted), operands[0] if operands else Seen("the output"))
    g = next((x for x in operands if list(x.shape) == given and x is not y), None)
    codes = [f"{y.code}.backward(torch.ones_like({y.code}))"]
    if g is not None and torch.Size(given).numel() == torch.Size(wanted).numel():
        codes.insert(0, f"{g.code}.reshape({', '.join(map(str, wanted))})")
    elif g is not None and _expands(given, wanted):
        codes.insert(0, f"{g.code}.expand_as({y.code})")
    got = f"{g}" if g is not None else f"it is {given}"
    return [f"{y}: its gradient, which backward is given, must have the same shape; here {got}.",
            fits(codes)]  # fmt: skip


def _expands(given: list[int], wanted: list[int]) -> bool:
    with suppress(RuntimeError):
        torch.empty(given, device="meta").expand(wanted)
        return True
    return False


def _function(s: Scene, name: str) -> Op | None:
    ops = reversed(list(s.graph.ops)) if s.graph is not None else ()
    return next((op for op in ops if op.kind == "function" and op.label in (name, name.removesuffix("Backward"))), None)


def _forward_arguments(op: Op | None) -> list[str]:
    """The names of what a Function's forward takes, without ctx."""
    if op is None or op.call is None:
        return []
    code = op.call[0].forward.__code__
    names = list(code.co_varnames[: code.co_argcount])
    return names[1:] if names and names[0] == "ctx" else names


@explains(r"function (\w+) returned an incorrect number of gradients \(expected (\d+), got (\d+)\)")
def _gradient_count(s: Scene, m: re.Match) -> Lines:
    op, name = _function(s, m[1]), m[1].removesuffix("Backward")
    names = _forward_arguments(op)
    at = f" ({op.backward_source})" if op is not None and op.backward_source else ""
    takes = f"{name}.forward takes {', '.join(names)}" if names else f"{name}.forward takes {m[2]} inputs"
    shape = f": `return {', '.join(f'grad_{n}' for n in names)}`" if names else ""
    return [
        f"{takes}; {name}.backward{at} returned {m[3]}.",
        f"Return {m[2]} values, a gradient for each input in this order{shape}; None for an input without gradient.",
    ]


@explains(
    r"[Ff]unction (\w+) returned an invalid gradient at index (\d+) - got (\[.*?\]) but expected .* with (\[.*?\])"
)
def _function_gradient(s: Scene, m: re.Match) -> Lines:
    op, name = _function(s, m[1]), m[1].removesuffix("Backward")
    names, index = _forward_arguments(op), int(m[2])
    argument = names[index] if index < len(names) else f"input {index}"
    at = f" ({op.backward_source})" if op is not None and op.backward_source else ""
    wanted = [int(n) for n in re.findall(r"\d+", m[4])]
    given = [int(n) for n in re.findall(r"\d+", m[3])]
    sums = [f".sum_to_size({', '.join(map(str, wanted))})"] if _expands(wanted, given) else []
    return [
        f"{name}.backward{at} returned a gradient of shape {given} for {argument}, which has shape {wanted}: a "
        "gradient has the shape of its input.",
        f"forward repeated {argument} along some dimensions; the gradient is the sum over them: append `{sums[0]}`"
        if sums
        else f"Give value {index + 1} of what backward returns the shape {wanted}.",
    ]
