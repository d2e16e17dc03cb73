"""The graph of what ran: operations, tensors, backward calls. explain, verify and the page read nothing else.

A `Value` is one tensor at one version of its memory: an operation that changes memory in place makes new values. A
`Storage` is the memory that values share. An `Op` is one operation below autograd (`aten.mul.Tensor`), which is what
an autograd node differentiates, or one call of a custom `autograd.Function`. A `BackwardCall` is one run of the
engine: its steps are the autograd nodes in the order in which they ran, each with the gradients that came in and went
out."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from kiem.inspect.graph.layouts import readable, regular, shape_of, sums_modulo, written_out

SMALL = 64  # a tensor of at most so many elements is kept whole, of a larger one only its statistics


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
    saved_by: list[int] = field(default_factory=list)  # ops whose backward keeps it
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
    retained: bool = False  # the graph may be run through again
    transformed: bool = False  # by torch.func, which computes on tensors of its own
    partial: bool = False  # asked for the gradients of some inputs only
    leaf_grads: dict[int, Gradient] = field(default_factory=dict)  # what this call added to `.grad`, by value


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


@dataclass
class Graph:
    ops: list[Op] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    storages: dict[int, Storage] = field(default_factory=dict)  # by index
    backwards: list[BackwardCall] = field(default_factory=list)
    repeats: list[Repeat] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    failure: Failure | None = None

    def op(self, id: int) -> Op:
        """The operation of this id (`Op.index`): an id, never a position."""
        return self.ops[id]

    def value(self, id: int) -> Value:
        """The value of this id (`Value.index`): an id, never a position."""
        return self.values[id]

    def backward(self, id: int) -> BackwardCall:
        """The backward call of this id (`BackwardCall.index`): an id, never a position."""
        return self.backwards[id]

    def add_op(self, op: Op) -> Op:
        """Append an operation; its id is the next one, `next_op`."""
        self.ops.append(op)
        return op

    def add_value(self, value: Value) -> Value:
        """Append a value; its id is the next one, `next_value`."""
        self.values.append(value)
        return value

    def add_backward(self, call: BackwardCall) -> BackwardCall:
        """Append a backward call; its id is the next one, `next_backward`."""
        self.backwards.append(call)
        return call

    @property
    def next_op(self) -> int:
        """The id of the next operation."""
        return len(self.ops)

    @property
    def next_value(self) -> int:
        """The id of the next value."""
        return len(self.values)

    @property
    def next_backward(self) -> int:
        """The id of the next backward call."""
        return len(self.backwards)

    def ops_between(self, first: int, until: int | None = None) -> Iterator[Op]:
        """Operations whose id is at least `first` and below `until`, in order."""
        return iter(self.ops[first:until])

    def leaves(self) -> Iterator[Value]:
        """Values that gradients are asked for: parameters and other leaves with requires_grad."""
        return (v for v in self.values if v.is_leaf and v.requires_grad)

    def find(self, name: str) -> Value | None:
        """The last value of this name: of leaves that ask for a gradient, else of what came from outside, else of
        all."""
        named = [v for v in self.values if v.name == name]
        leaves = [v for v in named if v.is_leaf and v.requires_grad] or [v for v in named if v.producer is None]
        return (leaves or named or [None])[-1]

    def title(self, value: int) -> str:
        """What to call a value: its name, else `%12`."""
        return self.values[value].name or f"%{value}"


def gradient(tensor: torch.Tensor, stats: Stats) -> Gradient:
    """The record of a gradient."""
    return Gradient(shape_of(tensor), tensor.dtype, stats, sketch(tensor), small_data(tensor))


def sketch(tensor: torch.Tensor) -> torch.Tensor:
    """float64 (at most 64,): a linear digest, see `Gradient`."""
    if not regular(tensor) and not tensor.is_nested and tensor.numel() > SMALL and not tensor.is_complex():
        return sums_modulo(tensor, SMALL).cpu()
    values = readable(tensor)
    if values is None:
        return torch.zeros(0, dtype=torch.float64)
    if not regular(tensor) and not tensor.is_nested:
        values = written_out(tensor.detach())
    if values.is_complex():
        values = torch.view_as_real(values.resolve_conj())
    if values.numel() <= SMALL:
        return values.reshape(-1).double().cpu()
    kind = torch.float32 if values.dtype.itemsize < 4 else None
    if values.dim() > 1 and values.shape[-1] >= SMALL:  # rows first, whatever the strides: no copy
        flat = values.sum(tuple(range(values.dim() - 1)), dtype=kind)
    else:
        flat = values.reshape(-1)
    whole = flat.numel() // SMALL * SMALL
    digest = flat[:whole].view(-1, SMALL).sum(0, dtype=kind).double()
    digest[: flat.numel() - whole] += flat[whole:].double()
    return digest.cpu()


def small_data(tensor: torch.Tensor) -> Any:
    """Nested lists of the elements when they are few."""
    values = None if is_lazy(tensor) or tensor.is_nested or tensor.numel() > SMALL else readable(tensor)
    if values is not None and not regular(tensor):
        values = written_out(tensor.detach())
    with contextlib.suppress(RuntimeError):
        return None if values is None else values.cpu().tolist()
    return None


def statistics(tensor: torch.Tensor) -> Stats:
    """Statistics of any tensor with a number type; zeros for an empty one, and for one that cannot be looked at."""
    values = readable(tensor)
    try:
        return Stats(0.0, 0.0, 0.0, 0.0, 0) if values is None or values.numel() == 0 else _statistics(values)
    except RuntimeError:  # inside of functorch's transforms some have no memory: to look never ends a program
        return Stats(0.0, 0.0, 0.0, 0.0, 0)


def _statistics(values: torch.Tensor) -> Stats:
    if values.is_complex():
        values = torch.view_as_real(values.resolve_conj())
    if not values.is_contiguous() and _dense(values):
        values = values.as_strided((values.numel(),), (1,))  # the order does not matter, its memory does
    if not values.is_floating_point() or values.dtype.itemsize < 4:
        values = values.float() if values.dtype.itemsize < 8 else values.double()
    low, high, norm, mean = _numbers(*torch.aminmax(values), _norm(values), values.mean())
    if norm - norm == 0.0 and high - low == high - low:
        return Stats(norm, mean, low, high, 0)
    finite = values[torch.isfinite(values)]
    bad = values.numel() - finite.numel()
    if finite.numel() == 0:
        return Stats(0.0, 0.0, 0.0, 0.0, bad)
    norm = torch.linalg.vector_norm(finite.double()).item()
    return Stats(norm, finite.mean().item(), finite.min().item(), finite.max().item(), bad)


def _numbers(*scalars: torch.Tensor) -> list[float]:
    """Their values; of those on an accelerator with one wait for it."""
    if scalars[0].device.type == "cpu":
        return [scalar.item() for scalar in scalars]
    return torch.stack([scalar.double() for scalar in scalars]).tolist()


def _norm(values: torch.Tensor) -> torch.Tensor:
    """Euclidean; of a large tensor by parts, as torch's sum of squares in float32 is off by 0.2 % at 40M elements."""
    if values.numel() < 1 << 16 or not values.is_contiguous():
        return torch.linalg.vector_norm(values, dtype=torch.float64)
    flat, part = values.reshape(-1), 4096
    whole = flat.numel() // part * part
    parts = torch.linalg.vector_norm(flat[:whole].view(-1, part), dim=1).double()
    rest = torch.linalg.vector_norm(flat[whole:].double())
    return torch.hypot(torch.linalg.vector_norm(parts), rest)


def _dense(tensor: torch.Tensor) -> bool:
    """Whether the elements fill their memory without gaps and overlaps, in whatever order."""
    expected = 1
    for stride, size in sorted((st, n) for st, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1):
        if stride != expected:
            return False
        expected *= size
    return True


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
