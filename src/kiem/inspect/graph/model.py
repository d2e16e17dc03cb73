"""The graph of what ran: operations, tensors, backward calls. explain, verify and the page read nothing else.

A graph is a list of passes: a forward and the backward call that ends it, each owning its operations, values and
backward calls. Ids (`index`) are given once and never again: to fold a loop is to drop passes. A `Value` is one tensor
at one version of its memory: an operation that changes memory in place makes new values. A `Storage` is the memory that
values share. An `Op` is one operation below autograd (`aten.mul.Tensor`), which is what an autograd node
differentiates, or one call of a custom `autograd.Function`. A `BackwardCall` is one run of the engine: its steps are
the autograd nodes in the order in which they ran, each with the gradients that came in and went out."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Iterator, ValuesView
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Source:
    """A line of the user's program."""

    file: str
    line: int
    function: str
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class Stats:
    """Of a tensor's finite elements: norm (Euclidean), mean, smallest, largest; and how many are not finite."""

    norm: float
    mean: float
    minimum: float
    maximum: float
    nonfinite: int


@dataclass(frozen=True, slots=True)
class Ref:
    """Stands for a value in the arguments of an operation."""

    value: int


@dataclass(slots=True)
class Value:
    index: int
    shape: tuple[int, ...]  # of a nested tensor: how many tensors it holds
    dtype: torch.dtype
    device: str
    strides: tuple[int, ...]
    offset: int  # elements into the storage
    storage: int
    version: int  # in-place changes of the storage before this value
    requires_grad: bool
    is_leaf: bool
    layout: str = "strided"  # or sparse_coo, sparse_csr, jagged, ...
    held: int | None = None  # elements, where the shape does not say it
    is_parameter: bool = False
    name: str | None = None
    producer: int | None = None  # the op that made it; None: it came from outside
    output: int = 0  # which output of the producer
    output_nr: int | None = None  # which gradient of the producer's node is its own; None: none was sent to it
    base: int | None = None  # the value it is a view of
    stats: Stats | None = None
    data: Any = None  # nested lists when small
    hooks: tuple[str, ...] = ()  # where the tensor's hooks are defined, FILE:LINE

    @property
    def numel(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def nbytes(self) -> int:
        """Bytes of the elements; those of a view belong to its base."""
        return (self.numel if self.held is None else self.held) * self.dtype.itemsize

    @property
    def rank(self) -> str:
        """scalar, vector, matrix or n-D."""
        return {0: "scalar", 1: "vector", 2: "matrix"}.get(len(self.shape), f"{len(self.shape)}-D")

    def describe(self) -> str:
        """`float32[2, 3]`, the way a shape is written everywhere."""
        return f"{str(self.dtype).removeprefix('torch.')}{list(self.shape)}"


@dataclass(slots=True)
class Op:
    index: int
    name: str  # aten.mul.Tensor, or the name of the custom Function
    kind: str  # op, function (custom autograd.Function) or compiled
    inputs: tuple[tuple[str, int], ...]  # argument name, value; in autograd's order
    outputs: tuple[int, ...]
    attributes: dict[str, Any]  # arguments that are not tensors, by name
    source: Source
    module: str = ""  # path of the innermost nn.Module, from the name of the outermost
    module_class: str = ""
    parent: int | None = None  # the custom Function in which it ran
    region: str = ""  # checkpoint, recomputed, optimizer
    packed: bool = False  # what its backward saves went through saved-tensor hooks
    grad_enabled: bool = True
    mutates: tuple[int, ...] = ()  # values that it changed in place, after the change
    base: int | None = None  # of what it changed, when that is a view: the whole tensor before the change
    random: bool = False
    rng_state: torch.Tensor | None = None  # the generator's, just before
    node: str = ""  # autograd's name of its backward; empty: nothing to differentiate
    sequence: int | None = None
    unit: float = 0.0  # it rounds the factors of its products to this, relative, whatever its types
    edges: tuple[tuple, ...] = ()  # where the gradient of each input goes: ("leaf", value) or (sequence, output)
    error: str = ""  # it raised this
    backward_source: Source | None = None  # of a custom Function: where its backward is defined
    call: tuple[Any, tuple, dict] | None = None  # the callable and its arguments, tensors as Ref
    saved: tuple[int, ...] = ()  # values that it saved for backward
    end: int | None = None  # of a custom Function: the id that the next operation had when it returned

    @property
    def label(self) -> str:
        """The short name: `mul` of `aten.mul.Tensor`."""
        return self.name.split(".")[1] if self.name.count(".") >= 2 else self.name


@dataclass(slots=True)
class Gradient:
    """A gradient that passed an edge. `sketch`: its elements if few, else sums over the indices (of the last
    dimension, if that is long) that are equal modulo 64; linear, so that contributions can be added without the
    tensors."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    stats: Stats
    sketch: torch.Tensor  # float64
    data: Any = None


@dataclass(slots=True)
class Step:
    """One autograd node that ran. `into[i]` is the gradient of its output i, `out[i]` that of its input i."""

    op: int | None  # None: a leaf, or a node that no recorded operation made
    node: str
    key: tuple  # ("leaf", value) or (sequence,)
    leaf: int | None
    into: tuple[Gradient | None, ...]
    out: tuple[Gradient | None, ...]
    edges: tuple[tuple | None, ...]  # per input: ("leaf", value) or (sequence, output)
    kernels: list[str] = field(default_factory=list)  # operations that ran inside it
    changed_by_hook: bool = False


@dataclass(slots=True)
class BackwardCall:
    index: int
    source: Source
    after_op: int  # ops before this index had run
    roots: tuple[int, ...]  # values
    root_keys: tuple[tuple, ...] = ()
    steps: list[Step] = field(default_factory=list)
    nested: bool = False  # inside another one: a reentrant checkpoint
    after_value: int = 0  # values before this index were known
    retained: bool = False  # the graph may be run through again
    transformed: bool = False  # by torch.func, which computes on tensors of its own
    partial: bool = False  # asked for the gradients of some inputs only
    leaf_grads: dict[int, Gradient] = field(default_factory=dict)  # what this call added to `.grad`, by value
    handed: list[Step] = field(default_factory=list)  # what autograd.grad gave: `key`, the edge to the tensor `leaf`


@dataclass(slots=True)
class Storage:
    index: int
    nbytes: int
    version: int = 0


@dataclass(slots=True)
class Repeat:
    """Operations `first` to `last` ran `times` times, with the same lines and shapes; only one pass is kept."""

    first: int
    last: int
    times: int


@dataclass(slots=True)
class Failure:
    """The exception that ended the program."""

    kind: str
    message: str
    source: Source | None
    explanation: str = ""


@dataclass(slots=True)
class Pass:
    """Everything up to the end of an outermost backward call, in order: a forward, that call, and those inside it.
    `first_op`: the id of its first operation; the others follow without gaps."""

    first_op: int = 0
    ops: list[Op] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    backwards: list[BackwardCall] = field(default_factory=list)

    def sizes(self) -> tuple[int, int, int]:
        """How many operations, values and backward calls."""
        return len(self.ops), len(self.values), len(self.backwards)

    def signature(self) -> int:
        """The same number for passes that did the same operations at the same lines."""
        return hash(tuple((op.name, op.source, op.module, op.region, len(op.outputs)) for op in self.ops))

    def shapes(self) -> int:
        """The same number for passes whose gradients flow through the same shapes and types."""
        return hash(tuple((v.shape, v.dtype) for v in self.values if v.requires_grad))


@dataclass(slots=True)
class Dropped:
    """Ids of what left the graph, each with that of its twin in the passes that stay; None: it has none."""

    ops: dict[int, int | None]
    values: dict[int, int | None]
    backwards: dict[int, int | None]

    def value(self, id: int) -> int:
        """The value that stands for this one now: its twin, or itself."""
        twin = self.values.get(id)
        return id if twin is None else twin

    def backward(self, id: int) -> int:
        """The backward call that stands for this one now: its twin, or itself."""
        twin = self.backwards.get(id)
        return id if twin is None else twin


class Graph:
    """`passes`: the last one is under way. `storages`: by index."""

    def __init__(self) -> None:
        self.passes: list[Pass] = [Pass()]
        self.storages: dict[int, Storage] = {}
        self.repeats: list[Repeat] = []
        self.notes: list[str] = []
        self.unrecorded: list[str] = []  # those of the notes that say of gradients that they were not seen
        self.failure: Failure | None = None
        self.next_op = self.next_value = self.next_backward = 0  # ids
        self._ops: dict[int, Op] = {}
        self._values: dict[int, Value] = {}
        self._backwards: dict[int, BackwardCall] = {}

    @property
    def ops(self) -> ValuesView[Op]:
        """All operations in order."""
        return self._ops.values()

    @property
    def values(self) -> ValuesView[Value]:
        """All values in order."""
        return self._values.values()

    @property
    def backwards(self) -> list[BackwardCall]:
        """All backward calls in order."""
        return list(self._backwards.values())

    def op(self, id: int) -> Op:
        """The operation of this id (`Op.index`): an id, never a position. Raises KeyError if it left the graph."""
        return self._ops[id]

    def value(self, id: int) -> Value:
        """The value of this id (`Value.index`). Raises KeyError if it left the graph."""
        return self._values[id]

    def backward(self, id: int) -> BackwardCall:
        """The backward call of this id (`BackwardCall.index`). Raises KeyError if it left the graph."""
        return self._backwards[id]

    def __contains__(self, op: int) -> bool:
        """Whether the operation of this id is (still) in the graph."""
        return op in self._ops

    def add_op(self, op: Op) -> Op:
        """Append an operation; its id is `next_op`."""
        self.passes[-1].ops.append(op)
        self._ops[op.index] = op
        self.next_op = op.index + 1
        return op

    def add_value(self, value: Value) -> Value:
        """Append a value; its id is `next_value`."""
        self.passes[-1].values.append(value)
        self._values[value.index] = value
        self.next_value = value.index + 1
        return value

    def add_backward(self, call: BackwardCall) -> BackwardCall:
        """Append a backward call; its id is `next_backward`."""
        self.passes[-1].backwards.append(call)
        self._backwards[call.index] = call
        self.next_backward = call.index + 1
        return call

    def end_pass(self) -> Pass:
        """The pass that was under way, which ends; another one begins."""
        self.passes.append(Pass(self.next_op))
        return self.passes[-2]

    def drop(self, passes: list[Pass], twins: list[Pass]) -> Dropped:
        """Take passes out of the graph. `twins`: those that stay and that they repeat, of the same sizes; [] if they
        repeat none."""
        gone = {id(p) for p in passes}
        self.passes = [p for p in self.passes if id(p) not in gone]
        kinds = ("ops", "values", "backwards")
        ops, values, calls = (dict(itertools.zip_longest(_ids(passes, k), _ids(twins, k))) for k in kinds)
        for known, left in ((self._ops, ops), (self._values, values), (self._backwards, calls)):
            for index in left:
                del known[index]
        return Dropped(ops, values, calls)

    def ops_between(self, first: int, until: int | None = None) -> Iterator[Op]:
        """Operations whose id is at least `first` and below `until`, in order."""
        for number in range(max(bisect.bisect(self.passes, first, key=lambda p: p.first_op) - 1, 0), len(self.passes)):
            one = self.passes[number]
            for op in itertools.islice(one.ops, max(first - one.first_op, 0), None):
                if until is not None and op.index >= until:
                    return
                yield op

    def inside(self, op: Op) -> Iterator[Op]:
        """The operations that ran inside a custom Function."""
        family = {op.index}
        for other in self.ops_between(op.index + 1, op.end):
            if other.parent in family:
                family.add(other.index)
                yield other

    def saved_by(self) -> dict[int, list[int]]:
        """Of each value the operations that saved it for backward."""
        found: dict[int, list[int]] = {}
        for op in self.ops:
            for value in op.saved:
                found.setdefault(value, []).append(op.index)
        return found

    def saved_bytes(self, op: Op) -> int:
        """Bytes that an operation saved for backward."""
        return sum(self._values[v].nbytes for v in op.saved if v in self._values)

    def leaves(self) -> Iterator[Value]:
        """Values that gradients are asked for: parameters and other leaves with requires_grad."""
        return (v for v in self.values if v.is_leaf and v.requires_grad)

    def find(self, name: str) -> Value | None:
        """The last value of this name: of leaves that ask for a gradient, else of what came from outside, else of
        all."""
        named = [v for v in self.values if v.name == name]
        leaves = [v for v in named if v.is_leaf and v.requires_grad] or [v for v in named if v.producer is None]
        found = leaves or named
        return found[-1] if found else None

    def title(self, value: int) -> str:
        """What to call a value: its name, else `%12`."""
        return self.value(value).name or f"%{value}"


def _ids(passes: list[Pass], kind: str) -> Iterator[int]:
    return (found.index for one in passes for found in getattr(one, kind))


def plain(value: Any) -> Any:
    """An attribute as JSON: numbers, texts, lists; anything else as its text, cut at 200 characters."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [plain(v) for v in value[:32]]
    if isinstance(value, Ref):
        return f"%{value.value}"
    if dataclasses.is_dataclass(value):
        return str(value)[:200]
    return str(value).removeprefix("torch.")[:200]
