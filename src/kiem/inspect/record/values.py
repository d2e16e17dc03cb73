"""Which tensor object shows which value: tensors are told apart by the memory that they show (storage, offset, shape,
strides) and its version."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parameter import is_lazy

from kiem.inspect.graph.layouts import held_by, regular, shape_of
from kiem.inspect.graph.model import Dropped, Ref, Storage, Value
from kiem.inspect.graph.stats import small_data, statistics
from kiem.inspect.record.source import ModulePaths, hook_lines, variables
from kiem.inspect.record.state import LOW, MADE_BY, RecordState


@dataclass(slots=True)
class _Seen:
    """A tensor object (or a place in memory) and the value that it shows at this version of its storage."""

    reference: Callable[[], object]
    value: int
    version: int


class ValueTable:
    """Finds the value of a tensor, makes it if there is none, and keeps its name."""

    def __init__(self, state: RecordState, modules: ModulePaths):
        self.graph = state.graph
        self._numbers = state.numbers
        self._count = 0  # of storages
        self.stale: set[int] = set()  # values that stand for those of later passes of a loop: their statistics are not
        self._modules = modules
        self._storages: dict[int, tuple[StorageWeakRef, Storage]] = {}
        self._objects: dict[int, _Seen] = {}
        self._places: dict[tuple, _Seen] = {}
        self._leaves: dict[int, tuple[weakref.ref, int]] = {}
        self._gradients: dict[int, int] = {}  # of what is in a leaf's `.grad` after a backward call: the leaf's value
        self.writer: dict[int, tuple[int | None, int | None]] = {}  # storage -> the op and value that changed it last
        self._named: set[tuple[int, int]] = set()

    def storage_of(self, tensor: torch.Tensor) -> Storage:
        """The record of the memory of a tensor. A weak reference keeps its address from being used anew."""
        try:
            memory = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):  # sparse and such
            return self._new_storage(0)
        known = self._storages.get(memory._cdata)
        if known is None:
            known = StorageWeakRef(memory), self._new_storage(memory.nbytes())
            self._storages[memory._cdata] = known
        return known[1]

    def _new_storage(self, nbytes: int) -> Storage:
        self._count += 1
        storage = self.graph.storages[self._count] = Storage(self._count, nbytes)
        return storage

    def seen(self, tensor: torch.Tensor) -> int | None:
        """The value that a tensor object shows now, if it was seen before."""
        known = self._objects.get(id(tensor))
        if known is None or known.reference() is not tensor:
            return None
        storage = self.graph.storages[self.graph.value(known.value).storage]
        return known.value if known.version == storage.version else None

    def of(self, tensor: torch.Tensor) -> int:
        """The value that a tensor shows; made if it was never seen: it came from outside, or through another alias."""
        index = self.seen(tensor)
        if index is None:
            index = self._other_value(tensor)
        if tensor.is_leaf and (name := self._modules.name_of(tensor)) is not None:
            self.graph.value(index).name = name  # parameters carry their path, whatever variable also shows them
        return index

    def _other_value(self, tensor: torch.Tensor) -> int:
        storage = self.storage_of(tensor)
        known = self._places.get(_place(tensor, storage.index))
        apart = known is not None and self.graph.value(known.value).requires_grad and not tensor.requires_grad
        if known is not None and known.version == storage.version and not apart:
            self.show(tensor, known.value)
            return known.value
        writer, written = self.writer.get(storage.index, (None, None))
        if known is not None:  # the same place before it was changed through another tensor, or
            writer, written = None if apart else writer, known.value  # `.data`, from which no gradient flows
        value = self.new(tensor, writer, -1 if writer is not None else 0)
        value.base = written
        self.describe(value, tensor)
        leaf = self._gradients.get(id(tensor))
        if leaf is not None and value.producer is None and (name := self.graph.value(leaf).name):
            value.name = f"{name}.grad"
        return value.index

    def describe(self, value: Value, tensor: torch.Tensor) -> None:
        """Note what the tensor holds: whole when small, else its statistics."""
        value.stats, value.data = statistics(tensor), small_data(tensor)
        value.hooks = hook_lines(tensor)

    def new(self, tensor: torch.Tensor, producer: int | None, output: int) -> Value:
        """A new value for what the tensor holds now."""
        storage = self.storage_of(tensor)
        strided = regular(tensor)
        held = None if strided or is_lazy(tensor) else held_by(tensor.detach())
        value = Value(
            index=self.graph.next_value, shape=shape_of(tensor), dtype=tensor.dtype, device=str(tensor.device),
            strides=tuple(tensor.stride()) if strided else (), offset=int(tensor.storage_offset()) if strided else 0,
            storage=storage.index, version=storage.version, requires_grad=tensor.requires_grad,
            is_leaf=tensor.is_leaf and producer is None, is_parameter=isinstance(tensor, torch.nn.Parameter),
            producer=producer, output=output, layout=str(tensor.layout).removeprefix("torch."), held=held,
        )  # fmt: skip
        self.graph.add_value(value)
        self.show(tensor, value.index)
        return value

    def show(self, tensor: torch.Tensor, value: int) -> None:
        """Note that a tensor shows a value now."""
        storage = self.graph.storages[self.graph.value(value).storage]
        self._objects[id(tensor)] = _Seen(weakref.ref(tensor), value, storage.version)
        self._places[_place(tensor, storage.index)] = _Seen(_nothing, value, storage.version)

    def template(self, args: Any) -> Any:
        """The arguments with Ref in place of each tensor."""
        if isinstance(args, torch.Tensor):
            return Ref(self.of(args))
        if isinstance(args, list | tuple):
            return type(args)(self.template(a) for a in args) if type(args) in (list, tuple) else args
        if isinstance(args, dict):
            return {k: self.template(v) for k, v in args.items()}
        return args

    def edge(self, tensor: torch.Tensor, value: int) -> tuple:
        """Where autograd sends the gradient of this tensor: ("leaf", value), (number of a node, its output), or ()."""
        if not tensor.requires_grad:
            return ()
        self.graph.value(value).requires_grad = True
        if tensor._backward_hooks:
            self.graph.value(value).hooks = hook_lines(tensor)
        if tensor.grad_fn is None:
            return ("leaf", self.leaf(tensor, value))
        made = self.graph.value(value).producer
        op = None if made is None else self.graph.op(made)
        if op is not None and op.call is not None and op.label == "detach":
            # Autograd took the result apart to save it and puts it back where it belongs: no gradient is cut off.
            op.name, op.call = "aten.alias.default", (torch.ops.aten.alias.default, *op.call[1:])
        sequence, metadata = tensor.grad_fn._sequence_nr(), cast(dict, tensor.grad_fn.metadata)
        shown: Value | None = self.graph.value(value)
        if op is not None and op.mutates and op.sequence is not None and op.sequence & LOW == sequence + 1:
            op.sequence -= 1  # between its node and itself autograd cloned what it changes, to keep that
        while op is not None and shown is not None:
            if op.sequence is not None and op.sequence & LOW == sequence:
                metadata[MADE_BY] = op  # whatever other threads call their nodes
                shown.output_nr = tensor.output_nr
                return (op.sequence, tensor.output_nr)
            shown = None if shown.base is None else self.graph.value(shown.base)
            op = None if shown is None or shown.producer is None else self.graph.op(shown.producer)
        return (self._numbers.number(sequence), tensor.output_nr)

    def leaf(self, tensor: torch.Tensor, value: int | None = None) -> int:
        """The first value of a leaf, whatever changed it since."""
        if value is None:
            value = self.of(tensor)
        known = self._leaves.get(id(tensor))
        if known is None or known[0]() is not tensor:
            self._leaves[id(tensor)] = known = (weakref.ref(tensor), value)
            leaf = self.graph.value(value)
            leaf.is_leaf, leaf.requires_grad = True, tensor.requires_grad
        return known[1]

    def find_leaf(self, tensor: torch.Tensor) -> int | None:
        """The value of a leaf that took part, None if it did not."""
        known = self._leaves.get(id(tensor))
        return known[1] if known is not None and known[0]() is tensor else None

    def note_gradients(self) -> None:
        """Remember which tensors are the gradients of leaves now, to name them if the program reads them."""
        alive = ((reference(), value) for reference, value in self._leaves.values())
        held = ((leaf.grad, value) for leaf, value in alive if leaf is not None)
        self._gradients = {id(gradient): value for gradient, value in held if gradient is not None}

    def name_locals(self, frame) -> None:
        """Give values the names that the variables of the user's frame have for them."""
        if frame is None or (id(frame), frame.f_lineno) in self._named:
            return
        self._named = {(id(frame), frame.f_lineno)}
        own, held = variables(frame)
        # A loop's variable names all parameters of a list alike: there the entry's name is the better one.
        for name, tensor, leaf in (*((*h, True) for h in held), *((*v, False) for v in (*own, *held))):
            value = None if (index := self.seen(tensor)) is None else self.graph.value(index)
            if value is not None and value.name is None and (not leaf or (value.is_leaf and value.requires_grad)):
                value.name = name

    def forget(self, dropped: Dropped) -> None:
        """Values that left the graph are now their twins, or unknown. What no longer lives is let go of."""
        gone = dropped.values
        self.stale.difference_update(gone)
        for known in (*self._objects.values(), *self._places.values()):
            if (twin := gone.get(known.value)) is not None:
                known.value = twin
                self.stale.add(twin)
        self._objects = {
            i: known for i, known in self._objects.items() if known.reference() is not None and known.value not in gone
        }
        leaves = ((i, t, gone.get(v, v)) for i, (t, v) in self._leaves.items() if t() is not None)
        self._leaves = {i: (t, v) for i, t, v in leaves if v is not None}
        self._gradients = {i: now for i, v in self._gradients.items() if (now := gone.get(v, v)) is not None}
        self._storages = {i: known for i, known in self._storages.items() if not known[0].expired()}
        living = {known[1].index for known in self._storages.values()}
        self._places = {p: known for p, known in self._places.items() if p[0] in living and known.value not in gone}
        self.writer = {s: (None, None) if v in gone else (o, v) for s, (o, v) in self.writer.items() if s in living}
        used = living | {value.storage for value in self.graph.values}
        self.graph.storages = {i: storage for i, storage in self.graph.storages.items() if i in used}


def _nothing() -> None:
    return None


def _place(tensor: torch.Tensor, storage: int) -> tuple:
    if not regular(tensor):
        return (storage, id(tensor))
    return (storage, tensor.storage_offset(), tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype)
