"""Run recorded operations again, in float64, from the tensors that were recorded.

The dtype of every floating tensor and argument becomes float64, so that what is left of rounding is far below the
types of the program. Random operations give what they gave; integer and boolean results are those of the recording,
so that a comparison near zero cannot fall the other way."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from kiem.inspect.graph.layouts import WITHOUT_FLOAT64
from kiem.inspect.graph.model import Graph, Op, Ref, Value
from kiem.inspect.verify.branches import as_it_was, cut_at_rank, taken_as_it_was
from kiem.inspect.verify.directions import STRUCTURE, taken
from kiem.inspect.verify.float64 import WRITTEN_OUT, implementation, without_out
from kiem.inspect.verify.judge import Noise
from kiem.inspect.verify.ties import CHOOSING, REDUCING

# Their backward looks for the elements that equal the result: noise on the result would leave none.
COMPARING = CHOOSING | REDUCING | {"linalg_vector_norm", "multilabel_margin_loss_forward"}  # which gives a mask

OVERWRITING = {"fill_", "zero_", "copy_"}

# Backward operations of norms: which arguments are the mean and the reciprocal deviation of the input.
NORMS_BACKWARD = {
    "native_batch_norm_backward": (5, 6), "native_layer_norm_backward": (3, 4), "native_group_norm_backward": (2, 3),
}  # fmt: skip

Tensors = dict[int, torch.Tensor]  # by value


class CannotReplay(Exception):
    """Says why an operation cannot be run again."""


def widen(tensor: torch.Tensor) -> torch.Tensor:
    """float64 or complex128, on the CPU if its device has none; integers as they are."""
    if tensor.device.type in WITHOUT_FLOAT64:
        tensor = tensor.cpu()
    if tensor.is_complex():
        return tensor.to(torch.complex128)
    return tensor.double() if tensor.is_floating_point() else tensor


def with_tensors(value: Any, tensors: Tensors, wide: bool) -> Any:
    """Arguments with the tensors in place of each Ref, and float64 in place of float types if `wide`."""
    if isinstance(value, Ref):
        if value.value not in tensors:
            raise CannotReplay(f"its input %{value.value} was not kept")
        return tensors[value.value]
    if isinstance(value, torch.dtype) and wide:
        return torch.complex128 if value.is_complex else torch.float64 if value.is_floating_point else value
    if isinstance(value, torch.device) and wide and value.type in WITHOUT_FLOAT64:
        return torch.device("cpu")
    if isinstance(value, list | tuple):
        return type(value)(with_tensors(v, tensors, wide) for v in value)
    if isinstance(value, dict):
        return {k: with_tensors(v, tensors, wide) for k, v in value.items()}
    return value


def run_op(op: Op, tensors: Tensors, recorded: Tensors, wide: bool = True) -> tuple[torch.Tensor | None, ...]:
    """One operation on float64 inputs, or if not `wide` in its own types. `recorded`: what the program's own tensors
    were."""
    assert op.call is not None  # those without are not run again (leading_to)
    func, args, kwargs = op.call
    if op.random:
        return _random(op, tensors, recorded)
    if op.label.startswith(("empty", "new_empty")) and op.outputs[0] in recorded:  # since written to by what nobody saw
        held = recorded[op.outputs[0]]
        return ((widen(held) if wide else held).clone(),)
    args, kwargs = with_tensors(args, tensors, wide), with_tensors(kwargs, tensors, wide)
    if op.label == "detach":
        return (args[0].view_as(args[0]),)
    if wide and op.label in ("_softmax", "_log_softmax"):
        args = (*args[:2], False)
    kwargs.pop("non_blocking", None)  # what is read next must be there
    if op.label == "copy_":
        args = args[:2]
    if wide and op.label in NORMS_BACKWARD:
        args = _with_statistics(op, args, recorded)
    if op.label == "_cudnn_rnn":  # its buffer holds copies of the weights as they were
        args = (*args[:3], None, *args[4:])
    if wide and op.label in WRITTEN_OUT:
        func = WRITTEN_OUT[op.label]
    elif op.mutates:
        func, written = without_out(func)
        kwargs = {name: value for name, value in kwargs.items() if name not in written}
    elif wide:
        func = implementation(func)
    if op.label == "as_strided":
        args = _with_its_memory(op, args, recorded)
    if wide and op.label == "linalg_pinv":
        kwargs = cut_at_rank(op, args[0], kwargs, recorded)
    out = taken_as_it_was(op, args, recorded) if wide else None
    out = func(*args, **kwargs) if out is None else out
    outputs = tuple(out) if isinstance(out, list | tuple) else (out,)
    if wide:
        _computes_widely(op, outputs)
        outputs = as_it_was(op, outputs, recorded)
    if op.mutates and not any(isinstance(o, torch.Tensor) for o in outputs):
        outputs = tuple(tensors[v] for v in _written(op))
    return tuple(
        (widen(o) if wide else o) if o.is_floating_point() or o.is_complex() else recorded.get(v, o)
        for v, o in zip(op.outputs, (o for o in outputs if isinstance(o, torch.Tensor)), strict=False)
    )


def is_torchs(op: Op) -> bool:
    """Whether it is one of torch's own operations, not one that somebody registered."""
    return op.call is None or op.call[0].namespace in ("aten", "prims")


def _computes_widely(op: Op, outputs: tuple) -> None:
    """Of an operation that is not torch's own. Raises CannotReplay if it computes in a type that is narrower, whatever
    it is given: there, small steps are lost."""
    floats = [o.dtype for o in outputs if isinstance(o, torch.Tensor) and (o.is_floating_point() or o.is_complex())]
    if not is_torchs(op) and any(dtype not in (torch.float64, torch.complex128) for dtype in floats):
        raise CannotReplay(f"given float64 it computes in {floats[0]}".replace("torch.", ""))


def _with_its_memory(op: Op, args: tuple, recorded: Tensors) -> tuple:
    """The arguments of `as_strided`, which sees memory beside the tensor that it is given: that memory too, with the
    tensor in its place. What was never kept of it is not there."""
    x, size, stride, offset, *_ = *args, None
    had = recorded[op.inputs[0][1]]
    place = tuple(had.shape), had.stride(), had.storage_offset()
    offset = place[2] if offset is None else offset
    memory = had.new_empty(0).set_(had.untyped_storage())
    if memory.numel() == had.numel() or had.numel() == 0:
        return args
    memory = memory.to(x.dtype).clone()
    memory.as_strided(*place).copy_(x)
    return memory, size, stride, offset


def _with_statistics(op: Op, args: tuple, recorded: Tensors) -> tuple:
    """The backward of a norm with the mean and deviation of the input that it is given: the derivative that torch has
    for it counts them as functions of the input, though it hands them over."""
    mean, rstd = NORMS_BACKWARD[op.label]
    x = args[1].detach()
    if op.label == "native_batch_norm_backward":
        if not args[7]:
            return args
        over = [d for d in range(x.dim()) if d != 1]
    elif op.label == "native_layer_norm_backward":
        over = list(range(x.dim() - len(args[2]), x.dim()))
    else:
        x, over = x.reshape(args[5], args[8], -1), [2]

    def moments(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return y.mean(over), y.var(over, correction=0)

    given = dict(op.inputs)
    before = widen(recorded[given["input"]]).reshape(x.shape)
    was = widen(recorded[given["save_invstd" if "save_invstd" in given else "rstd"]])
    eps = was.square().reciprocal() - moments(before)[1].view(was.shape)
    center, spread = (m.view(args[mean].shape) for m in moments(x))
    changed = list(args)
    changed[mean], changed[rstd] = center, (spread + eps).rsqrt()
    return tuple(changed)


def _written(op: Op) -> list[int]:
    """Values, before the change, of the arguments that an in-place operation changed."""
    from kiem.inspect.graph.schema import signature

    assert op.call is not None
    writes = signature(op.call[0]).writes
    return [v for name, v in op.inputs if name.split("[")[0] in writes]


def _random(op: Op, tensors: Tensors, recorded: Tensors) -> tuple[torch.Tensor | None, ...]:
    if op.label == "native_dropout":
        share, kept = op.attributes["p"], recorded.get(op.outputs[1])
        if kept is None:
            raise CannotReplay("its mask was not kept")
        scale = 1.0 if op.attributes.get("train") is False else 0.0 if share >= 1 else 1 / (1 - share)
        return tensors[dict(op.inputs)["input"]] * kept.double() * scale, kept
    if (op.edges or op.parent is not None) and op.label in ("_standard_gamma", "_sample_dirichlet"):
        raise CannotReplay("its gradient goes through the sample, which is not drawn again")
    if op.label in ("rrelu_with_noise", "rrelu_with_noise_"):
        x, slope = tensors[dict(op.inputs)["self"]], _slope(op, tensors, recorded)
        return (x.mul_(slope) if op.label.endswith("_") else x * slope,)
    missing = [v for v in op.outputs if v not in recorded]
    if missing or any(part in op.label for part in ("dropout", "rrelu", "scaled_dot_product", "_rnn")):
        raise CannotReplay("it is random and gives no mask to run it again with")
    made = tuple(widen(recorded[v]) for v in op.outputs)
    for value, new in zip(_written(op), made, strict=False):
        with torch.no_grad():
            tensors[value].copy_(new)
        made = tuple(tensors[value] for value in _written(op))
    return made


def _slope(op: Op, tensors: Tensors, recorded: Tensors) -> torch.Tensor:
    """Of a randomized leaky ReLU, by element: in training it is what it wrote to its `noise`."""
    x = tensors[dict(op.inputs)["self"]]
    if not op.attributes.get("training", False):
        return torch.where(
            x > 0, 1.0, -torch.rrelu(-torch.ones_like(x), op.attributes["lower"], op.attributes["upper"])
        )
    drawn = [recorded[v] for v in op.mutates if v in recorded and v not in op.outputs]
    if not drawn:
        raise CannotReplay("its slopes were not kept")
    return drawn[0].to(x.dtype)


def changes_what_has_a_gradient(graph: Graph, op: Op) -> bool:
    """Whether an operation under no_grad changes what others made that have a gradient: its numbers count, and for the
    gradient it is not there (the clamp of `cosine_similarity`)."""
    written = _written(op) if op.mutates and op.kind == "op" and not op.grad_enabled and op.call is not None else ()
    makers = (graph.value(v).producer for v in written)
    return any(maker is not None and graph.op(maker).edges for maker in makers)


def leading_to(graph: Graph, ops: Iterable[Op], values: Iterable[int]) -> list[Op]:
    """Those of the operations that the values depend on: what wrote memory that a needed operation read."""
    values = list(values)
    storages = {graph.value(v).storage for v in values}
    families: set[int] = set()
    chosen: list[Op] = []
    for op in reversed(list(ops)):
        made = {graph.value(v).storage for v in (*op.outputs, *op.mutates)}
        if op.error or op.call is None or not (made & storages or op.index in families or op.parent in families):
            continue
        if op.kind != "op" or op.parent is not None:
            families.add(op.index if op.kind != "op" or op.parent is None else op.parent)
        chosen.append(op)
        storages |= {graph.value(v).storage for _, v in op.inputs}
    return list(_without_idle_views(graph, chosen, values))[::-1]


def _without_idle_views(graph: Graph, backwards: list[Op], values: Iterable[int]) -> Iterator[Op]:
    """Of operations, the last first, leave out those that only show memory in a way that none of the others looks
    at."""
    read: set[int | None] = set(values)
    for op in backwards:
        views = all(graph.value(v).base is not None for v in op.outputs)
        if op.kind == "op" and op.parent is None and not op.mutates and views and read.isdisjoint(op.outputs):
            continue
        for _, v in op.inputs:
            read |= {v, graph.value(v).base}  # through which it may be found
        yield op


def _seen_at(value: Value) -> tuple:
    return value.version, value.shape, value.offset


class _Apart(dict):
    """Tensors as one operation reads them: those that others read too, or that it reads twice, as `noise` has them."""

    def __init__(self, tensors: Tensors, graph: Graph, uses: Counter[int], noise: Noise):
        super().__init__(tensors)
        self._graph, self._uses, self._noise = graph, uses, noise

    def __getitem__(self, value: int) -> torch.Tensor:
        tensor = super().__getitem__(value)
        return self._noise.apart(tensor, self._graph.value(value).dtype) if self._uses[value] > 1 else tensor


class Replay:
    """Operations of a graph as a function of some of their inputs, in float64."""

    def __init__(self, graph: Graph, ops: Iterable[Op], recorded: Tensors, cut: bool, wide: bool = True):
        self.wide = wide
        self.graph = graph
        self.ops = list(ops)
        self.recorded = recorded
        self.cut = cut
        self._indices = {op.index for op in self.ops}
        self._frozen: Tensors = {}  # what a detach gave: a constant
        self._beside: Tensors = {}  # what an argument holds beside what is taken of it, a constant as well
        self._uses = Counter(value for op in self.ops for _, value in op.inputs)

    @functools.cached_property
    def _viewed(self) -> dict[int, int]:
        """Of each storage the first operation that made a view of it."""
        found: dict[int, int] = {}
        for v in self.graph.values:
            if v.base is not None and v.output >= 0 and v.producer is not None:
                found.setdefault(v.storage, v.producer)
        return found

    def run(self, given: Tensors, noise: Noise | None = None) -> Tensors:
        """All values, from those `given`; others come from the recording. `noise` is laid on each result."""
        tensors: Tensors = dict(given)
        for op in self.ops:
            for name, value in op.inputs:
                if value not in tensors:
                    overwritten = name == "self" and op.label in OVERWRITING and value not in self.recorded
                    tensors[value] = self._blank(value) if overwritten else self._find(value, tensors)
            for value in _written(op) if op.mutates and op.kind == "op" else ():
                if self._alone(value, op.index):
                    # Nobody sees this memory through a view: a copy keeps what autograd has saved of it.
                    tensors[value] = tensors[value].clone()
            if op.label == "detach" and self.cut and op.parent is None and op.region != "backward":
                if op.outputs[0] not in self._frozen:
                    self._frozen[op.outputs[0]] = tensors[op.inputs[0][1]].detach().clone()
                outputs: tuple[torch.Tensor | None, ...] = (self._frozen[op.outputs[0]].clone(),)
            elif op.kind == "op":
                seen = tensors if noise is None or op.mutates else _Apart(tensors, self.graph, self._uses, noise)
                seen = self._as_taken(op, seen) if self.cut and noise is None and not torch.is_grad_enabled() else seen
                # Under no_grad a change in place counts for nothing; in a Function's forward it is derived.
                derived = op.grad_enabled or op.parent is not None or not op.mutates
                with torch.set_grad_enabled(torch.is_grad_enabled() and derived):
                    outputs = run_op(op, seen, self.recorded, self.wide)
            else:
                continue  # its children follow, and its outputs are found through them
            for value, output in zip(op.outputs, outputs, strict=False):
                if isinstance(output, torch.Tensor) and value not in given:
                    if noise is not None and self.graph.value(value).base is None:
                        kept = op.label.rstrip("_") in COMPARING
                        output = (noise.backward if kept else noise)(output, self.graph.value(value).dtype)
                    tensors[value] = self._laid_out(value, output) if op.label in WRITTEN_OUT else output
        return tensors

    def _laid_out(self, index: int, output: torch.Tensor) -> torch.Tensor:
        """What was written out, in the order in memory of the program's own result: a `view` of it may need that."""
        value = self.graph.value(index)
        if value.base is not None or output.shape != value.shape or output.stride() == value.strides:
            return output
        return torch.empty_strided(value.shape, value.strides, dtype=output.dtype, device=output.device).copy_(output)

    def _as_taken(self, op: Op, tensors: Tensors) -> Tensors:
        """Arguments for a derivative by number: a matrix of which one triangle is read counts as symmetric."""
        changed = {v: taken(op, name, tensors[v]) for name, v in op.inputs if (op.label, name) in STRUCTURE}
        return tensors | {v: x + self._beside.setdefault(v, tensors[v] - x) for v, x in changed.items()}

    def _blank(self, index: int) -> torch.Tensor:
        """In place of a tensor of which nothing is left to read."""
        value = self.graph.value(index)
        blank = torch.zeros(value.shape, dtype=value.dtype, device=value.device)
        return widen(blank) if self.wide else blank

    def _alone(self, value: int, op: int) -> bool:
        """Whether there was no view of this memory yet."""
        return self._viewed.get(self.graph.value(value).storage, op) >= op

    def _find(self, index: int, tensors: Tensors) -> torch.Tensor:
        """A value that no operation of this replay made: seen through an alias, handed out by a custom Function, or
        from outside."""
        value = self.graph.value(index)
        producer = None if value.producer is None else self.graph.op(value.producer)
        if producer is not None and producer.kind != "op":
            earlier = (self.graph.value(i) for i in tensors if i < index)
            alike = [o.index for o in earlier if o.storage == value.storage and _seen_at(o) == _seen_at(value)]
            if alike:
                return tensors[max(alike)]
        elif producer is not None and producer.index in self._indices and value.output < 0 and value.base is not None:
            writer = next((v for v in producer.mutates if self._alone(v, producer.index)), None)
            if writer in tensors and tensors[writer].shape == value.shape:
                return tensors[writer]
            if self.graph.value(value.base).shape == value.shape:
                return self.find(value.base, tensors)
        if index not in self.recorded:
            raise CannotReplay(f"its input %{index} was not kept")
        found = self.recorded[index]
        return (widen(found) if self.wide else found).clone()

    def find(self, index: int, tensors: Tensors) -> torch.Tensor:
        """A value after `run`."""
        return tensors[index] if index in tensors else self._find(index, tensors)
