"""The chain rule from a loss to a leaf: the steps on the way, the derivative at each, and what adds up where ways meet.

A place is where a gradient arrives: `("leaf", value)`, or `(number of a node, its output)`. Formulas are evaluated in
float64 on the values that the graph kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from kiem.errors import KiemError
from kiem.inspect.explain.numbering import Ran, numbered, numbers_text
from kiem.inspect.graph.model import BackwardCall, Gradient, Graph, Op, Source, Step, Value
from kiem.inspect.rules import Call, Rule, find, formula, local_derivative, substituted

# Error of a sum of contributions, relative to the largest norm among them; of other types 8 units of precision.
BOUNDS = {torch.float32: 1e-6, torch.complex64: 1e-6, torch.float64: 1e-12, torch.complex128: 1e-12}
NO_FORMULA = "no closed form: the numbers are autograd's"


class NoPath(KiemError):
    """A backward call brings this tensor no gradient. The message says why."""


@dataclass(slots=True)
class Link:
    """From an operation to one of its inputs that leads on. `letter`: the input's in the formulas. `formula`: of the
    gradient that leaves, `numbers`: with numbers if every letter is a scalar, `local`: dy/dx of each element if the
    operation is pointwise and small. `to`: the next step, as its index in Chain.steps; None: the leaf."""

    argument: str
    letter: str
    value: int | None
    title: str
    formula: str
    numbers: str | None
    local: Any
    leaves: Gradient
    to: int | None


@dataclass(slots=True)
class ChainStep:
    """One operation on the way. `letters`: (shape, name) of what a letter of the formulas stands for."""

    op: int | None
    label: str
    node: str
    module: str
    source: Source | None
    forward: str
    letters: dict[str, tuple[tuple[int, ...], str]]
    arrives: tuple[Gradient | None, ...]  # of each output
    note: str
    links: list[Link] = field(default_factory=list)


@dataclass(slots=True)
class Join:
    """A place where contributions, as (step, link), meet. `error`: of their sum; None: `note` says why."""

    title: str
    contributions: list[tuple[int, int]]
    arrived: Gradient | None
    error: float | None = None
    bound: float = 0.0
    ok: bool | None = None
    total: Any = None  # the sum, when small
    note: str = ""


@dataclass
class Chain:
    """`steps` in the order in which they ran. `joins`: the leaf's is the last. `paths`: how many. `seed`: the gradient
    that backward was given, if a scalar. `product`: it times the sum over all paths of the products of local
    derivatives, if all are scalars. `error`: of the sum of the contributions to the leaf."""

    leaf: int
    title: str
    tensor: str
    loss: str
    source: Source
    steps: list[ChainStep]
    joins: list[Join]
    paths: int
    seed: float | None
    product: float | None
    gradient: Gradient | None
    error: float | None
    notes: list[str]

    @property
    def ok(self) -> bool:
        """Whether contributions add up to what arrived, wherever they can be compared."""
        return all(join.ok is not False for join in self.joins)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: sources as FILE:LINE, gradients as norm, shape and (small) value, NaN and inf as text."""
        return _plain(self) | {"ok": self.ok}


def chain_rule(graph: Graph, call: BackwardCall, leaf: int) -> Chain:
    """The chain rule from the loss of a backward call to a value: a leaf, or a result on the way. Raises NoPath."""
    return _Way(graph, call, leaf).chain()


class _Way:
    def __init__(self, graph: Graph, call: BackwardCall, leaf: int):
        self.graph, self.call, self.leaf = graph, call, leaf
        known = graph.value(leaf)
        seen = [pair for op in graph.ops for pair in zip(op.edges, (v for _, v in op.inputs), strict=False)]
        seen = [(edge, v) for edge, v in [*zip(call.root_keys, call.roots, strict=False), *seen] if edge]
        self.values: dict[tuple, int] = {}
        for edge, value in seen:
            if edge not in self.values or graph.value(self.values[edge]).name is None:
                self.values[edge] = edge[1] if edge[0] == "leaf" else value
        own = ("leaf", leaf) if known.producer is None else (graph.op(known.producer).sequence, max(known.output, 0))
        places = dict.fromkeys([*(edge for edge, value in seen if value == leaf), own])
        self.target = next((p for p in places if p in call.root_keys or on_the_way(call, p)), next(iter(places)))
        self.number = {step.key[0]: i for i, step in enumerate(call.steps) if step.leaf is None}
        self.way = on_the_way(call, self.target)
        self.index = {position: i for i, position in enumerate(self.way)}
        self.sent: dict[tuple, list[tuple[int, int]]] = {}

    def chain(self) -> Chain:
        graph, call = self.graph, self.call
        if not self.way and self.target not in call.root_keys:
            raise NoPath(f"{graph.title(self.leaf)}: the backward call at {call.source} brings it no gradient: "
                         f"{_why_not(graph, call, self.leaf, self.target)}")  # fmt: skip
        steps = [self._step(number, call.steps[position]) for number, position in enumerate(self.way)]
        joins = [self._join(place, [steps[i].links[j].leaves for i, j in sent])
                 for place, sent in sorted(self.sent.items(), key=lambda item: item[0] == self.target)
                 if place == self.target or len(sent) > 1 or self._hooked(place)]  # fmt: skip
        begin = (self.number.get(key[0]) for key in call.root_keys if key)
        roots = {self.index[position] for position in begin if position in self.index}
        alone = len(roots) == 1 and not self.sent.keys() & set(call.root_keys)
        seed = next((scalar(g) for g in steps[min(roots)].arrives if g is not None), None) if alone else None
        numbers = all(None not in (scalar(k.local), scalar(k.leaves)) for step in steps for k in step.links)
        straight = seed is not None and numbers and not any(self._hooked(place) for place in self.sent)
        ways, products = through(steps), through(steps, scalars=True) if straight else []
        return Chain(
            self.leaf, graph.title(self.leaf), graph.value(self.leaf).describe(),
            " and ".join(graph.title(v) for v in call.roots) or "loss", call.source, steps, joins,
            sum(ways[i] for i in roots) + (self.target in call.root_keys), seed,
            seed * products[min(roots)] if straight else None,
            self._arrived(self.target), joins[-1].error if joins else None, list(self._notes()),
        )  # fmt: skip

    def _notes(self) -> Iterator[str]:
        graph, call = self.graph, self.call
        every = numbered(graph)
        shown = next((one for one in every if one.call is call), Ran(call, 1))
        if shown.times > 1:
            yield f"backward {numbers_text([shown])} ran the same operations: pass {shown.number} is shown"
        others = sum(one.times for one in every if not one.call.partial and self.leaf in one.call.leaf_grads)
        if others > 1 and not call.partial:
            yield f"{others} backward passes gave it a gradient: this is the gradient of pass {shown.number} alone"

    def _step(self, number: int, step: Step) -> ChainStep:
        op = None if step.op is None else self.graph.op(step.op)
        node = step.node.removeprefix("torch::autograd::")
        row = find(op.name) if op is not None and op.kind == "op" else None
        call = None if op is None else call_of(self.graph, op)
        notes = [] if row else [NO_FORMULA]
        if node == "CopySlices":
            notes.append("it changed a view in place: inside the view the formula holds, outside the gradient passes")
        if step.changed_by_hook:
            notes.append("a hook changed the gradient that arrived")
        found = ChainStep(step.op, op.label if op else node, node, op.module if op else "", op.source if op else None,
                          formula(row, call) if row and call else "", {}, step.into, "; ".join(notes))  # fmt: skip
        for name, read in op.inputs if op and row else ():
            letter = row.symbols.get(name.split("[")[0]) if row else None
            if letter:
                found.letters[letter] = (self.graph.value(read).shape, called(self.graph, read))
        for position, argument, value in arguments(self.graph, step):
            edge, out = step.edges[position], step.out[position]
            if out is None or edge is None or (edge != self.target and self.number.get(edge[0]) not in self.index):
                continue
            self.sent.setdefault(edge, []).append((number, len(found.links)))
            to = None if edge == self.target else self.index[self.number[edge[0]]]
            value = self.values.get(edge) if value is None else value
            title = "" if value is None else self.graph.title(value)
            link = Link(argument, "", value, title, "", None, None, out, to)
            _differentiate(link, row, call, step)
            found.links.append(link)
        return found

    def _arrived(self, place: tuple) -> Gradient | None:
        if place[0] == "leaf" or place[0] not in self.number:
            return self.call.leaf_grads.get(place[1] if place[0] == "leaf" else self.leaf)
        into = self.call.steps[self.number[place[0]]].into
        return into[place[1]] if place[1] < len(into) else None

    def _hooked(self, place: tuple) -> bool:
        return any(s.changed_by_hook and place in (s.key, (s.key[0], *place[1:])) for s in self.call.steps)

    def _join(self, place: tuple, parts: list[Gradient]) -> Join:
        value, arrived = self.values.get(place), self._arrived(place)
        join = Join("" if value is None else self.graph.title(value), self.sent[place], arrived)
        if arrived is None:
            join.note = "what arrived was not recorded"
        elif place in self.call.root_keys:
            join.note = "backward was also called on it: what was given adds to this sum"
        elif any(g.stats.nonfinite for g in (*parts, arrived)):
            join.note = "not finite"
        elif any(g.sketch.shape != arrived.sketch.shape for g in parts):
            join.note = "of different shapes"
        else:
            join.error, join.bound, total = sum_error(parts, arrived)
            join.ok = join.error <= join.bound
            if total.numel() == math.prod(arrived.shape):
                join.total = total.reshape(arrived.shape).tolist()
            if not join.ok:
                lines = () if value is None else self.graph.value(value).hooks
                hooked = bool(lines) or self._hooked(place)
                join.ok = None if hooked else False
                who = f"the hook at {' or '.join(lines)}" if lines else "a hook" if hooked else "something unknown"
                join.note = f"{who} changed the sum"
        return join


def called(graph: Graph, v: int) -> str:
    """A tensor's name, or what made it."""
    value = graph.value(v)
    made = None if value.name or value.producer is None else graph.op(value.producer)
    return graph.title(v) if made is None else f"result of {made.label} at line {made.source.line}"


def on_the_way(call: BackwardCall, target: tuple, through_none: bool = False) -> list[int]:
    """The steps from which a gradient goes on to a place, in order. `through_none`: also where none was given."""
    found, numbers = [], set()
    for position in reversed(range(len(call.steps))):
        step = call.steps[position]
        if any(edge is not None and (out is not None or through_none) and (edge == target or edge[0] in numbers)
               for edge, out in zip(step.edges, step.out, strict=False)):  # fmt: skip
            found.append(position)
            numbers.add(step.key[0])
    return found[::-1]


def arguments(graph: Graph, step: Step) -> Iterator[tuple[int, str, int | None]]:
    """(position in `out`, argument, value) of each input of a node that has an edge, in the order of the arguments."""
    left = [i for i in range(min(len(step.edges), len(step.out))) if step.edges[i] is not None]
    op = None if step.op is None else graph.op(step.op)
    if op is not None:
        inputs = list(zip(op.inputs, op.edges, strict=False))
        if step.node.endswith("CopySlices") and left:
            yield left.pop(0), op.inputs[0][0], op.base
            inputs = inputs[1:]
        for (name, value), edge in inputs:
            match = next((i for i in left if step.edges[i] == edge), None)
            if match is not None:
                left.remove(match)
                yield match, name, value
    for position in left:
        yield position, f"input {position}", None


def through(steps: list[ChainStep], scalars: bool = False) -> list:
    """From each step, the number of ways to the leaf; `scalars`: the sum of their products of local derivatives."""
    ways: list = [0] * len(steps)
    for i in reversed(range(len(steps))):
        ways[i] = sum(
            (1 if k.to is None else ways[k.to]) * ((scalar(k.local) or 0.0) if scalars else 1) for k in steps[i].links
        )
    return ways


def sum_error(parts: list[Gradient], arrived: Gradient) -> tuple[float, float, Tensor]:
    """The error of a sum of contributions, relative to the largest norm among them; its bound, which grows with the
    roundings of more than 8 contributions; the sum, or its digest."""
    total = torch.stack([g.sketch for g in parts]).sum(0)
    scale = max(max(g.stats.norm, float(g.sketch.norm())) for g in (*parts, arrived))
    error = float((total - arrived.sketch).norm())
    bound = max(BOUNDS.get(g.dtype) or 8 * torch.finfo(g.dtype).eps for g in (*parts, arrived))
    return error / scale if scale else error, bound * max(1.0, len(parts) / 8), total


def call_of(graph: Graph, op: Op) -> Call:
    """An operation as the table of derivatives takes it, in float64; a value that was not kept has its shape only."""
    inputs = {name: _tensor(graph.value(value)) for name, value in op.inputs}
    return Call(inputs, op.attributes, tuple(_tensor(graph.value(value)) for value in op.outputs))


def _tensor(value: Value) -> Tensor:
    wide = torch.promote_types(value.dtype, torch.float64) if is_continuous(value.dtype) else value.dtype
    if value.data is None:
        return torch.empty(value.shape, dtype=wide, device="meta")
    return torch.tensor(value.data, dtype=wide).reshape(value.shape)


def _differentiate(link: Link, row: Rule | None, call: Call | None, step: Step) -> None:
    """Fill in the formula and its numbers."""
    first_only = [i for i, g in enumerate(step.into) if g is not None] == [0]  # what the table's local derivative is of
    whole = first_only and not step.node.endswith("CopySlices")
    if row is not None and call is not None:
        link.formula, link.letter = formula(row, call, link.argument), row.symbols.get(link.argument, "")
        if whole and all(x.device.type == "cpu" for x in (*call.inputs.values(), *call.outputs)):
            try:
                local = local_derivative(row, call, link.argument)
                link.local = None if local is None else local.tolist()
                g = scalar(step.into[0])
                link.numbers = None if g is None else substituted(row, call, link.argument, g)
            except (RuntimeError, ValueError, TypeError, KeyError, OverflowError):
                link.local = None  # the table has the operation, but not for this call
    arrives, sent = scalar(step.into[0]), scalar(link.leaves)
    if link.local is None and whole and arrives and sent is not None:
        link.local = sent / arrives


def scalar(of: Any) -> float | None:
    """The number that a gradient, or nested lists, of one element hold."""
    of = of.data if isinstance(of, Gradient) else of
    while isinstance(of, list) and len(of) == 1:
        of = of[0]
    return float(of) if isinstance(of, int | float) else None


def _why_not(graph: Graph, call: BackwardCall, leaf: int, target: tuple) -> str:
    value = graph.value(leaf)
    made_by = {v.index: None if v.producer is None else graph.op(v.producer) for v in graph.values}
    made = made_by[leaf]
    if not is_continuous(value.dtype):
        return f"it is {value.describe()}, and only floating-point tensors have derivatives"
    if not value.requires_grad:
        return _cut(graph, made, value) if made and made.inputs else "its requires_grad is False"
    for position in on_the_way(call, target, through_none=True):
        step = call.steps[position]
        if not call.partial and any(e and out is None for e, out in zip(step.edges, step.out, strict=False)):
            name = step.node if step.op is None else f"{graph.op(step.op).label} at {graph.op(step.op).source}"
            return f"the backward of {name} gives none"
    nested = next((c for c in graph.backwards if c.index > call.index and c.nested and on_the_way(c, target)), None)
    if nested is not None:
        return f"it goes through the backward call inside this one, number {nested.index}"
    before = list(graph.ops_between(0, call.after_op))
    flows = {leaf} | {v for op in before for (_, v), edge in zip(op.inputs, op.edges, strict=False) if edge == target}
    used = {str(op.source): None for op in before if flows & {v for _, v in op.inputs}}
    needed: set[int | None] = set(call.roots)
    cuts: dict[str, None] = {}
    for result in reversed(list(graph.values)):
        op = made_by[result.index]
        if result.index in needed:
            needed |= {result.base, *(v for _, v in (op.inputs if op else ()))}
    for result in graph.values:
        op = made_by[result.index]
        if op is None or not any(v in flows or graph.value(v).base in flows for _, v in op.inputs):
            continue
        if result.requires_grad:
            flows.add(result.index)
        elif result.index in needed:
            cuts[_cut(graph, op, result)] = None
    if cuts:
        return "; ".join(list(cuts)[:3])
    if flows & set(call.roots):
        return "autograd.grad was asked for the gradients of others only"
    if not used:
        return "no operation before it used this tensor"
    return f"it is used at {', '.join(list(used)[:3])}, but the loss does not depend on what was computed there"


def _cut(graph: Graph, op: Op, result: Value) -> str:
    if op.label == "detach":
        return f"detached at {op.source}"
    if not op.grad_enabled:
        return f"{op.label} at {op.source} ran under torch.no_grad or inference_mode"
    if not is_continuous(result.dtype):
        return f"{op.label} at {op.source} gives {result.describe()}, which has no derivative"
    if any(graph.value(v).producer is None and graph.value(v).base is not None for _, v in op.inputs):
        return f"read through .data at {op.source}"
    return f"nothing in {op.label} at {op.source} requires a gradient"


def is_continuous(dtype: torch.dtype) -> bool:
    """Whether there are derivatives in this type."""
    return dtype.is_floating_point or dtype.is_complex


def tensors(graph: Graph) -> list[dict[str, Any]]:
    """The table of all tensors, in plain types. `saved_by`: operations whose backward keeps it."""
    rows, saved_by = [], graph.saved_by()
    for value in graph.values:
        made = None if value.producer is None else graph.op(value.producer)
        copied = made is not None and made.label in ("clone", "_to_copy")
        rows.append({
            "id": value.index, "name": value.name, "rank": value.rank, "shape": list(value.shape),
            "dtype": str(value.dtype).removeprefix("torch."), "device": value.device, "strides": list(value.strides),
            "view_of": None if value.base is None else graph.title(value.base), "storage": value.storage,
            "copy_of": graph.title(made.inputs[0][1]) if made is not None and copied else None, "bytes": value.nbytes,
            "version": value.version, "requires_grad": value.requires_grad, "parameter": value.is_parameter,
            "saved_by": [f"{graph.op(i).label} at {graph.op(i).source}" for i in saved_by.get(value.index, ())],
            "made_by": None if made is None else made.label, "source": None if made is None else str(made.source),
        })  # fmt: skip
    return rows


def _plain(value: Any) -> Any:
    if isinstance(value, Gradient):
        return _plain({"shape": value.shape, "dtype": str(value.dtype).removeprefix("torch."), "norm": value.stats.norm,
                       "nonfinite": value.stats.nonfinite, "value": value.data})  # fmt: skip
    if isinstance(value, Source | complex) or (isinstance(value, float) and not math.isfinite(value)):
        return str(value)
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value
