"""What the parts of a recorder share: the graph that fills, the tensors held for verification, what belongs to each
thread, and the numbers of autograd's nodes. None of the parts knows the recorder."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from types import FrameType, TracebackType
from typing import Any, NamedTuple, Protocol

import torch
from torch._C import _len_torch_dispatch_stack
from torch.utils._python_dispatch import TorchDispatchMode, _pop_mode, _push_mode

from kiem.inspect.graph.layouts import filled
from kiem.inspect.graph.model import BackwardCall, Dropped, Graph, Op, Pass, Source, Step, Value
from kiem.inspect.record import source

KEEP_BYTES = 224 << 20
BITS = 40
LOW = (1 << BITS) - 1
MADE_BY = "kiem: the operation whose derivative it is"  # among the metadata of an autograd node

Gradients = tuple[torch.Tensor | None, ...]


class Evidence(NamedTuple):
    """A backward node that ran, with its real gradients, held for a later verification."""

    call: BackwardCall
    step: Step
    op: Op | None
    into: Gradients
    out: Gradients


class Observer(Protocol):
    """Looks on while the program runs, with the real tensors at hand."""

    def node_ran(
        self, state: RecordState, step: Step, op: Op | None, node: Any, into: Gradients, out: Gradients
    ) -> None:
        """A backward node has run; its saved tensors are still there."""

    def handed_out(self, state: RecordState, call: BackwardCall, step: Step, gradient: torch.Tensor) -> None:
        """An outermost call of autograd.grad gives this gradient back (BackwardCall.handed)."""

    def backward_ended(self, state: RecordState, call: BackwardCall) -> None:
        """An outermost backward call is over."""

    def folded(self, dropped: Dropped) -> None:
        """Passes that repeated those before them left the graph."""

    def may_leave(self, passes: list[Pass]) -> bool:
        """Whether passes that are like no other may leave the graph; they do then."""


class RecordState:
    """`library`: path prefixes whose lines are not the user's. `keep`: bytes of inputs and gradients that may be held
    for a later verification (None: no bound)."""

    def __init__(self, library: tuple[str, ...] = (), observer: Observer | None = None, keep: int | None = KEEP_BYTES):
        self.graph = Graph()
        self.lines = source.Lines(library)
        self.observer = observer
        self.kept = Kept(keep)
        self.evidence: list[Evidence] = []
        self.local = Local()
        self.numbers = Numbers()
        self.lock = threading.RLock()  # around what changes the graph, never around what runs operations
        self.by_sequence: dict[int, list[int]] = {}  # what a thread calls a node -> operations that may have made it
        self.calls: list[BackwardCall] = []  # backward calls that are under way, the outermost first

    # -- where the program is ------------------------------------------------------------------------------------------

    @property
    def running(self) -> bool:
        """Whether a backward call is under way."""
        return bool(self.calls)

    @property
    def paused(self) -> bool:
        """Whether this thread computes for a recorder, not for the program."""
        return _ours.depth > 0

    def records_here(self) -> bool:
        """Whether the operations of this thread reach the recorder."""
        stack = range(_len_torch_dispatch_stack())
        return any(getattr(torch._C._get_dispatch_stack_at(i), "state", None) is self for i in stack)

    @property
    def parent(self) -> Op | None:
        """The custom Function that is running."""
        found = [self.graph.op(p) for p in self.local.parents[-1:] if p in self.graph]
        return found[0] if found else None

    def inside_function(self) -> bool:
        """Whether a custom Function that backward calls, and that is differentiated again, computes its forward."""
        return any(self.graph.op(p).edges for p in self.local.parents[self.local.floor :] if p in self.graph)

    # -- to look never ends the program --------------------------------------------------------------------------------

    def pause(self) -> Pause:
        """Within it, nothing is recorded."""
        return Pause()

    def looking(self, what: str, where: FrameType | Source | None) -> _Looking:
        """Within it, nothing is recorded, and what fails is ours: it is noted, and the program goes on."""
        return _Looking(self, what, where)

    def failed(self, what: str, where: Source, error: Exception) -> None:
        """Note what could not be recorded."""
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        self.note(f"{what} at {where} could not be recorded: {reason}", lost=True)

    def note(self, note: str, lost: bool = False) -> None:
        """Say something once. `lost`: gradients may have gone by unseen."""
        if note not in self.graph.notes:
            self.graph.notes.append(note)
            if lost:
                self.graph.unrecorded.append(note)

    # -- evidence ------------------------------------------------------------------------------------------------------

    def keep_inputs(self, tensors: Iterable[tuple[str, torch.Tensor]], inputs: Iterable[tuple[str, int]]) -> None:
        """Hold what operations read: verification runs them again."""
        if self.kept.limit != 0:
            for (_, tensor), (_, value) in zip(tensors, inputs, strict=True):
                self.kept.add(self.graph.value(value), tensor)

    def keep_gradients(self, evidence: Evidence) -> None:
        """Hold the gradients of a node."""
        if self.kept.limit == 0:
            return
        if self.kept.claim(sum(g.numel() * g.itemsize for g in (*evidence.into, *evidence.out) if g is not None)):
            self.evidence.append(evidence)
        else:
            self.evidence.clear()

    def release_done(self, done: set[int]) -> None:
        """Let go of the inputs of operations whose backward has run; what others of this pass still need stays."""
        waiting = [op for op in self.graph.passes[-1].ops if op.edges and op.index not in done]
        needed = {v for op in waiting for _, v in op.inputs}
        self.kept.keep_only(needed | {op.base for op in waiting if op.base is not None})

    def forget(self, dropped: Dropped) -> None:
        """Let go of what was held for passes that left the graph."""
        left = ((number, [i for i in made if i not in dropped.ops]) for number, made in self.by_sequence.items())
        self.by_sequence = {number: made for number, made in left if made}
        self.kept.keep_only(self.kept.tensors.keys() - dropped.values.keys())
        self.evidence = [e for e in self.evidence if e.call.index not in dropped.backwards]
        self.local.last = ()


def compiling() -> bool:
    """Whether torch.compile is tracing: it runs operations, and backward calls, on tensors without elements."""
    return torch._guards.TracingContext.try_get() is not None or torch.compiler.is_compiling()


class Kept:
    """What operations read, by value, up to `limit` bytes (None: no limit), by reference, copied only before it is
    changed; parameters are held by the program anyway and do not count. Once there was too much, nothing is held any
    more and `complete` is False: a later verification is not possible."""

    def __init__(self, limit: int | None):
        self.tensors: dict[int, torch.Tensor] = {}
        self.limit = limit
        self.complete = True
        self._bytes = 0
        self._by_storage: dict[int, set[int]] = {}

    def add(self, value: Value, tensor: torch.Tensor) -> None:
        """Hold a tensor as it is now."""
        if value.index in self.tensors or not self.claim(0 if isinstance(tensor, torch.nn.Parameter) else value.nbytes):
            return
        with torch.no_grad():
            self.tensors[value.index] = filled(tensor.detach())
        self._by_storage.setdefault(value.storage, set()).add(value.index)

    def claim(self, nbytes: int) -> bool:
        """Whether so many further bytes may be held."""
        self._bytes += nbytes
        if self.limit is not None and self._bytes > self.limit:
            self.drop()
            self.limit, self.complete = 0, False
        return self.limit != 0

    def before_write(self, storage: int) -> None:
        """This memory is about to change: what is held of it is copied."""
        for index in self._by_storage.pop(storage, ()):
            self.tensors[index] = self.tensors[index].clone()

    def keep_only(self, values: set[int]) -> None:
        """Let go of everything else."""
        self.tensors = {v: t for v, t in self.tensors.items() if v in values}
        self._by_storage = {s: left for s, held in self._by_storage.items() if (left := held & values)}

    def drop(self) -> None:
        """Let go of everything."""
        self.tensors.clear()
        self._by_storage.clear()


class Local(threading.local):
    """Of a recorder, in the thread that asks: autograd runs backward in a thread of its own for each device."""

    def __init__(self) -> None:
        self.parents: list[int] = []  # custom Functions that are running
        self.floor = 0  # how many of them ran before the backward call that is under way
        self.last: tuple[Any, ...] = ()  # the operation before: its number, its place, its outputs
        self.kernels: list[list[str]] = []  # of the backward nodes that are running
        self.nodes: list[Any] = []  # they themselves


class Numbers:
    """Numbers of autograd nodes that are unique among threads; autograd counts those of each thread from 0."""

    def __init__(self) -> None:
        self._threads: dict[int, int] = {}

    def number(self, sequence: int) -> int:
        """Of a node of this thread."""
        return self._threads.setdefault(threading.get_ident(), len(self._threads)) << BITS | sequence


class _Ours(threading.local):
    depth = 0  # of blocks in which this thread computes for a recorder: no recorder records that, nor an outer one


_ours = _Ours()


class Pause:
    """All modes of this thread are off: what is then run is ours. Classes of tensors keep their own behavior."""

    __slots__ = ("_modes",)

    def __enter__(self) -> None:
        _ours.depth += 1
        count = _len_torch_dispatch_stack()
        self._modes: list[TorchDispatchMode] = [_pop_mode() for _ in range(count)] if count else []

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        for mode in reversed(self._modes):
            _push_mode(mode)
        _ours.depth -= 1
        return None


class _Looking(Pause):
    __slots__ = ("_state", "_what", "_where")

    def __init__(self, state: RecordState, what: str, where: FrameType | Source | None):
        self._state, self._what, self._where = state, what, where

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        super().__exit__(kind, error, trace)
        if error is None or not isinstance(error, Exception):
            return None
        where = self._where if isinstance(self._where, Source) else source.at(self._where)
        self._state.failed(self._what, where, error)
        return True
