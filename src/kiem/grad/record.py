"""Record what a PyTorch program does, as one graph, while it runs unchanged.

A TorchDispatchMode sees every operation below autograd. Autograd numbers its nodes as it makes them, one per
operation, just before the operation reaches us: the number ties an operation to its node, whatever becomes of the
tensor objects in between. Tensors are told apart by the memory that they show (storage, offset, shape, strides) and
its version. Hooks on the nodes of each backward call see the gradients. Three entry points of torch are wrapped while
recording and put back after: `autograd.Function.apply`, `autograd._engine_run_backward`, and the global forward hooks
of nn.Module. """

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from kiem.grad import source
from kiem.grad.backward import BackwardHooks, hook_lines
from kiem.grad.custom import wrap_functions
from kiem.grad.fold import Folder
from kiem.grad.graph import Failure, Graph, Op, Ref, Storage, Value, regular, shape_of, small_data, statistics
from kiem.grad.kept import Kept
from kiem.grad.replay import flatten
from kiem.grad.schema import Signature, generator_state, signature

MAX_OPS = 200_000
KEEP_BYTES = 224 << 20


class Observer(Protocol):
    """Looks on while the program runs, with the real tensors at hand."""

    def node_ran(self, recorder: Recorder, step, op: Op | None, node, into: tuple, out: tuple) -> None:
        """A backward node has run; its saved tensors are still there."""

    def backward_ended(self, recorder: Recorder, call) -> None:
        """An outermost backward call is over."""

    def folded(self, start: tuple[int, int, int], counts: tuple[int, int, int]) -> None:
        """Operations, values and backward calls from `start` on repeated the `counts` before them and left the
        graph."""


@dataclass(slots=True)
class _Seen:
    """A tensor object (or a place in memory) and the value that it shows at this version of its storage."""

    reference: weakref.ref | None
    value: int
    version: int


class Recorder(TorchDispatchMode):
    """`with Recorder() as recorder: ...` fills `recorder.graph`. `library`: path prefixes whose lines are not the
    user's. `observer` looks on. `keep`: bytes of inputs and gradients that may be held for a later verification
    (None: no bound)."""

    supports_higher_order_operators = True

    def __init__(self, library: tuple[str, ...] = (), observer: Observer | None = None, keep: int | None = KEEP_BYTES):
        super().__init__()
        self.graph = Graph()
        self.lines = source.Lines(library)
        self.modules = source.ModulePaths(self.lines, self)
        self.observer = observer
        self.paused = 0
        self.parents: list[int] = []  # custom Functions that are running
        self.by_sequence: dict[int, list[int]] = {}  # number of an autograd node -> operations that may have made it
        self.kept = Kept(keep)
        self._storages: dict[int, tuple[StorageWeakRef, Storage]] = {}
        self._objects: dict[int, _Seen] = {}
        self._places: dict[tuple, _Seen] = {}
        self._leaves: dict[int, tuple[weakref.ref, int]] = {}
        self._writer: dict[int, tuple[int | None, int | None]] = {}  # storage -> the op and value that changed it last
        self._last: tuple[Any, ...] = ()
        self._named: set[tuple[int, int]] = set()
        self.backward = BackwardHooks(self)
        self.folder = Folder(self)
        self._undo: list = []

    # -- entering and leaving ------------------------------------------------------------------------------------------

    def __enter__(self) -> Recorder:
        self.modules.__enter__()
        self._undo = [wrap_functions(self), self.backward.wrap_engine()]
        return super().__enter__()

    def __exit__(self, kind, error, trace) -> None:
        super().__exit__(kind, error, trace)
        for undo in reversed(self._undo):
            undo()
        self.modules.__exit__()
        if error is not None:
            self.graph.failure = Failure(
                type(error).__name__, str(error), source.traceback_source(error, self.lines)
            )

    # -- operations ----------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.paused or len(self.graph.ops) >= MAX_OPS or not isinstance(func, torch._ops.OpOverload):
            return func(*args, **kwargs)  # among them the higher-order operations, whose inside reaches us by itself
        sign = signature(func)
        if self.backward.running and not torch.is_grad_enabled():
            self.backward.kernels.append(str(func))
            written = [t for _, t in sign.written(args, kwargs)]
            self._before_write(written)
            out = func(*args, **kwargs)
            self._after_write(written, None)
            return out
        return self._record(func, sign, args, kwargs)

    def _record(self, func, sign: Signature, args: tuple, kwargs: dict):
        number = torch._C._autograd._get_sequence_nr()
        frame, region = self.lines.find(sys._getframe(2))
        if region == "backward" and not self.backward.running:
            return func(*args, **kwargs)  # the 1 that a backward call begins with
        place = (number, id(frame), frame.f_lasti if frame else 0)
        if sign.detaches and self._last[:3] == place and self.seen(args[0]) == self._last[3] is not None:
            out = func(*args, **kwargs)  # autograd keeps the result of the operation before
            self._show(out, self._last[3])
            return out
        self.name_locals(frame)
        # What a list of numbers is copied from is no tensor of the program.
        tensors = [] if sign.makes else sign.tensors(args, kwargs)
        inputs = tuple((name, self.value_of(t)) for name, t in tensors)
        differentiable = torch.is_grad_enabled() and any(t.requires_grad for _, t in tensors)
        edges = tuple(self.edge(t, v) for (_, t), (_, v) in zip(tensors, inputs, strict=True)) if differentiable else ()
        self.keep_inputs(tensors, inputs)
        path, kind = self.modules.current
        parent = self.parents[-1] if self.parents else None
        again, packed = source.saving(None if parent is None else self.graph.ops[parent])
        op = Op(
            index=len(self.graph.ops), name="torch.tensor.default" if sign.makes else str(func), kind="op",
            inputs=inputs, outputs=(),
            attributes=sign.attributes(args, kwargs), source=source.at(frame), module=path, module_class=kind,
            parent=parent, region=again or region, packed=packed, grad_enabled=torch.is_grad_enabled(),
            edges=edges, call=None if sign.makes else (func, self.template(args), self.template(kwargs)),
        )  # fmt: skip
        if self.backward.running:
            op.region = "recomputed"
        if sign.random and op.attributes.get("dropout_p", 1.0) != 0.0:
            op.random, op.rng_state = True, generator_state(tensors, kwargs)
        written = sign.written(args, kwargs)
        if differentiable and written and written[0][1]._is_view():
            op.base = self.value_of(written[0][1]._base)
            self.kept.add(self.graph.values[op.base], written[0][1]._base)
        self._before_write([t for _, t in written])
        self.graph.ops.append(op)
        try:
            out = func(*args, **kwargs)
        except Exception as error:
            op.error = str(error)
            raise
        if differentiable and number > 0:
            op.sequence = number - 1
            self.by_sequence.setdefault(number - 1, []).append(op.index)
        op.mutates = tuple(self._after_write([t for _, t in written], op.index))
        op.outputs = tuple(self._outputs(out, op, dict(zip(map(id, (t for _, t in written)), op.mutates, strict=True))))
        self._last = (*place, op.outputs[0] if op.outputs else None)
        if op.index + 1 == MAX_OPS:
            self.graph.notes.append(f"Recording ended after {MAX_OPS:,} operations.")
        return out

    def _outputs(self, out: Any, op: Op, written: dict[int, int]) -> Iterator[int]:
        inputs = {self.graph.values[v].storage: v for _, v in reversed(op.inputs)}
        for i, tensor in enumerate(flatten(out)):
            if id(tensor) in written:
                yield written[id(tensor)]
                continue
            value = self.new_value(tensor, op.index, i)
            value.base = inputs.get(value.storage)
            if value.base is not None and self.graph.values[value.base].numel == value.numel:
                value.stats = self.graph.values[value.base].stats
            yield value.index
            if value.stats is None:
                value.stats = statistics(tensor)
            value.data = small_data(tensor)
            if op.random:
                self.kept.add(value, tensor)

    def template(self, args: Any) -> Any:
        """The arguments with Ref in place of each tensor."""
        if isinstance(args, torch.Tensor):
            return Ref(self.value_of(args))
        if isinstance(args, list | tuple):
            return type(args)(self.template(a) for a in args) if type(args) in (list, tuple) else args
        if isinstance(args, dict):
            return {k: self.template(v) for k, v in args.items()}
        return args

    # -- values --------------------------------------------------------------------------------------------------------

    def storage_of(self, tensor: torch.Tensor) -> Storage:
        """The record of the memory of a tensor. A weak reference keeps its address from being used anew."""
        try:
            memory = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):  # sparse and such
            self.graph.storages.append(Storage(len(self.graph.storages), 0))
            return self.graph.storages[-1]
        known = self._storages.get(memory._cdata)
        if known is None:
            known = StorageWeakRef(memory), Storage(len(self.graph.storages), memory.nbytes())
            self.graph.storages.append(known[1])
            self._storages[memory._cdata] = known
        return known[1]

    def seen(self, tensor: torch.Tensor) -> int | None:
        """The value that a tensor object shows now, if it was seen before."""
        known = self._objects.get(id(tensor))
        if known is None or known.reference() is not tensor:
            return None
        storage = self.graph.storages[self.graph.values[known.value].storage]
        return known.value if known.version == storage.version else None

    def value_of(self, tensor: torch.Tensor) -> int:
        """The value that a tensor shows; made if it was never seen: it came from outside, or through another alias."""
        index = self.seen(tensor)
        if index is None:
            index = self._other_value(tensor)
        if tensor.is_leaf and (name := self.modules.name_of(tensor)) is not None:
            self.graph.values[index].name = name  # parameters carry their path, whatever variable also shows them
        return index

    def _other_value(self, tensor: torch.Tensor) -> int:
        storage = self.storage_of(tensor)
        known = self._places.get(_place(tensor, storage.index))
        apart = known is not None and self.graph.values[known.value].requires_grad and not tensor.requires_grad
        if known is not None and known.version == storage.version and not apart:
            self._show(tensor, known.value)
            return known.value
        writer, written = self._writer.get(storage.index, (None, None))
        if apart:  # `.data`: the same memory, from which no gradient flows
            writer, written = None, known.value
        elif known is not None:
            written = known.value  # the same place before it was changed through another tensor
        value = self.new_value(tensor, writer, -1 if writer is not None else 0)
        value.base = written
        self.describe(value, tensor)
        return value.index

    def describe(self, value: Value, tensor: torch.Tensor) -> None:
        """Note what the tensor holds: whole when small, else its statistics."""
        value.stats, value.data = statistics(tensor), small_data(tensor)
        value.hooks = hook_lines(tensor)

    def new_value(self, tensor: torch.Tensor, producer: int | None, output: int) -> Value:
        """A new value for what the tensor holds now."""
        storage = self.storage_of(tensor)
        strided = regular(tensor)
        value = Value(
            index=len(self.graph.values), shape=shape_of(tensor), dtype=tensor.dtype, device=str(tensor.device),
            strides=tuple(tensor.stride()) if strided else (), offset=tensor.storage_offset() if strided else 0,
            storage=storage.index, version=storage.version, requires_grad=tensor.requires_grad,
            is_leaf=tensor.is_leaf and producer is None, is_parameter=isinstance(tensor, torch.nn.Parameter),
            producer=producer, output=output,
        )  # fmt: skip
        self.graph.values.append(value)
        self._show(tensor, value.index)
        return value

    def _show(self, tensor: torch.Tensor, value: int) -> None:
        storage = self.graph.storages[self.graph.values[value].storage]
        self._objects[id(tensor)] = _Seen(weakref.ref(tensor), value, storage.version)
        self._places[_place(tensor, storage.index)] = _Seen(None, value, storage.version)

    def edge(self, tensor: torch.Tensor, value: int) -> tuple:
        """Where autograd sends the gradient of this tensor: ("leaf", value), (number of a node, its output), or ()."""
        if not tensor.requires_grad:
            return ()
        self.graph.values[value].requires_grad = True
        if tensor.grad_fn is None:
            return ("leaf", self.leaf_value(tensor, value))
        made = self.graph.values[value].producer
        if made is not None and self.graph.ops[made].label == "detach":
            # Autograd took the result apart to save it and puts it back where it belongs: no gradient is cut off.
            op = self.graph.ops[made]
            op.name, op.call = "aten.alias.default", (torch.ops.aten.alias.default, *op.call[1:])
        return (tensor.grad_fn._sequence_nr(), tensor.output_nr)

    def leaf_value(self, tensor: torch.Tensor, value: int | None = None) -> int:
        """The first value of a leaf, whatever changed it since."""
        if value is None:
            value = self.value_of(tensor)
        known = self._leaves.get(id(tensor))
        if known is None or known[0]() is not tensor:
            self._leaves[id(tensor)] = known = (weakref.ref(tensor), value)
            leaf = self.graph.values[value]
            leaf.is_leaf, leaf.requires_grad = True, tensor.requires_grad
        return known[1]

    def find_leaf(self, tensor: torch.Tensor) -> int | None:
        """The value of a leaf that took part, None if it did not."""
        known = self._leaves.get(id(tensor))
        return known[1] if known is not None and known[0]() is tensor else None

    # -- in place ------------------------------------------------------------------------------------------------------

    def _before_write(self, tensors: list[torch.Tensor]) -> None:
        """What is kept of the memory that is about to change is copied first."""
        for tensor in tensors:
            self.kept.before_write(self.storage_of(tensor).index)

    def _after_write(self, tensors: list[torch.Tensor], op: int | None) -> list[int]:
        values = []
        for tensor in tensors:
            storage = self.storage_of(tensor)
            storage.version += 1
            if op is None:
                self._writer[storage.index] = (None, None)
                continue
            value = self.new_value(tensor, op, 0)
            value.name = self.modules.name_of(tensor)
            self.describe(value, tensor)
            self._writer[storage.index] = (op, value.index)
            values.append(value.index)
        return values

    # -- evidence ------------------------------------------------------------------------------------------------------

    def keep_inputs(self, tensors: list[tuple[str, torch.Tensor]], inputs: tuple[tuple[str, int], ...]) -> None:
        """Hold what operations read: verification runs them again."""
        if self.kept.limit != 0:
            for (_, tensor), (_, value) in zip(tensors, inputs, strict=True):
                self.kept.add(self.graph.values[value], tensor)

    def release_done(self, done: set[int]) -> None:
        """Let go of the inputs of operations whose backward has run; what others of this step still need stays."""
        waiting = [op for op in self.graph.ops[self.folder.start :] if op.edges and op.index not in done]
        self.kept.keep_only({v for op in waiting for _, v in op.inputs} | {op.base for op in waiting})

    # -- names ---------------------------------------------------------------------------------------------------------

    def name_locals(self, frame) -> None:
        """Give values the names that the variables of the user's frame have for them."""
        if frame is None or (id(frame), frame.f_lineno) in self._named:
            return
        self._named = {(id(frame), frame.f_lineno)}
        for name, tensor in list(frame.f_locals.items()):
            if isinstance(tensor, torch.Tensor) and not name.startswith("__"):
                index = self.seen(tensor)
                if index is not None and self.graph.values[index].name is None:
                    self.graph.values[index].name = name

    def pause(self) -> _Pause:
        """Within it, nothing is recorded."""
        return _Pause(self)

    def forget(self, ops: int, values: int, by: int) -> None:
        """Operations from `ops` on were folded away; values from `values` on are now those `by` earlier."""
        for known in [*self._objects.values(), *self._places.values()]:
            if known.value >= values:
                known.value -= by
        self._objects = {i: known for i, known in self._objects.items() if known.reference() is not None}
        self._leaves = {i: (t, v - by if v >= values else v) for i, (t, v) in self._leaves.items() if t() is not None}
        self.by_sequence = {n: kept for n, made in self.by_sequence.items() if (kept := [i for i in made if i < ops])}
        self._writer = {s: (None, None) if (v or 0) >= values else (o, v) for s, (o, v) in self._writer.items()}
        self.kept.keep_only({v for v in self.kept.tensors if v < values})
        self.backward.evidence = [e for e in self.backward.evidence if e[0].index < len(self.graph.backwards)]


class CompiledRecorder(Recorder):
    """Leaves compiled functions compiled: each is one operation, with its inputs and outputs (torch's own switch for
    it)."""

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Whether torch.compile may go on under this mode."""
        return True


class _Pause:
    def __init__(self, recorder: Recorder):
        self._recorder = recorder
        self._guard: Any = None

    def __enter__(self) -> None:
        self._recorder.paused += 1
        self._guard = torch._C._DisableTorchDispatch()

    def __exit__(self, *_) -> None:
        self._guard = None
        self._recorder.paused -= 1


def _place(tensor: torch.Tensor, storage: int) -> tuple:
    if not regular(tensor):
        return (storage, id(tensor))
    return (storage, tensor.storage_offset(), tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype)
