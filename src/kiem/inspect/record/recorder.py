"""Record what a PyTorch program does, as one graph, while it runs unchanged.

A TorchDispatchMode sees every operation below autograd. Autograd numbers its nodes as it makes them, one per
operation, just before the operation reaches us: the number ties an operation to its node, whatever becomes of the
tensor objects in between (values.py tells tensors apart). Hooks on the nodes of each backward call see the gradients.
Three entry points of torch are wrapped while recording and put back after: `autograd.Function.apply`,
`autograd._engine_run_backward`, and the global forward hooks of nn.Module. To look never ends the user's program."""

from __future__ import annotations

import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Protocol

import torch
from torch._C import _len_torch_dispatch_stack
from torch.utils._python_dispatch import TorchDispatchMode, _pop_mode, _push_mode

from kiem.inspect.graph.model import Failure, Graph, Op, Ref, Source, small_data, statistics
from kiem.inspect.graph.schema import Signature, arrived, generator_state, run, signature
from kiem.inspect.record import source
from kiem.inspect.record.backward import BackwardHooks
from kiem.inspect.record.functions import wrap_functions
from kiem.inspect.record.kept import Kept
from kiem.inspect.record.passes import Folder
from kiem.inspect.record.threads import Local, Numbers
from kiem.inspect.record.values import ValueTable
from kiem.inspect.verify.branches import MANY_VALUED
from kiem.inspect.verify.precision import unit_of
from kiem.inspect.verify.replay import flatten

MAX_OPS = 200_000
KEEP_BYTES = 224 << 20
WITHOUT_GRADIENT = 16  # operations without gradient that are kept of one place in a step


class Observer(Protocol):
    """Looks on while the program runs, with the real tensors at hand."""

    def node_ran(self, recorder: Recorder, step, op: Op | None, node, into: tuple, out: tuple) -> None:
        """A backward node has run; its saved tensors are still there."""

    def backward_ended(self, recorder: Recorder, call) -> None:
        """An outermost backward call is over."""

    def folded(self, start: tuple[int, int, int], counts: tuple[int, int, int]) -> None:
        """Operations, values and backward calls from `start` on repeated the `counts` before them and left the
        graph."""

    def dropped(self, start: tuple[int, int, int]) -> bool:
        """Whether what came from `start` on may leave the graph; it does then."""


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
        self.local = Local()
        self.lock = threading.RLock()  # around what changes the graph, never around what runs operations
        self.numbers = Numbers()
        self.by_sequence: dict[int, list[int]] = {}  # what a thread calls a node -> operations that may have made it
        self.kept = Kept(keep)
        self.table = ValueTable(self.graph, self.modules, self.numbers)
        self.backward = BackwardHooks(self)
        self.folder = Folder(self)
        self._undo: list = []
        self._without_gradient: Counter[tuple] = Counter()  # in this step, by place
        self._unkept: Counter[str] = Counter()

    # -- entering and leaving ------------------------------------------------------------------------------------------

    def __enter__(self) -> Recorder:
        self.modules.__enter__()
        self._undo = [wrap_functions(self), self.backward.wrap_engine(), self.backward.watch_optimizers(), _unwarned()]
        return super().__enter__()

    def __exit__(self, kind, error, trace) -> None:
        super().__exit__(kind, error, trace)
        for undo in reversed(self._undo):
            undo()
        self.modules.__exit__()
        for line, count in self.folder.dropped.items():
            self.graph.notes.append(f"{count:,} more steps up to {line} ran, each unlike the others: not kept.")
        if self._unkept:
            (line, _), count = self._unkept.most_common(1)[0], self._unkept.total()
            self.graph.notes.append(
                f"{count:,} more operations without gradient ran at the same lines, most of them at {line}: not kept."
            )
        if error is not None:
            self.graph.failure = Failure(type(error).__name__, str(error), source.traceback_source(error, self.lines))

    # -- operations ----------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            self.note("What is captured in a CUDA graph cannot be looked at: it is not recorded.")
            return run(func, args, kwargs)
        if self.local.paused or len(self.graph.ops) >= MAX_OPS or not isinstance(func, torch._ops.OpOverload):
            return run(func, args, kwargs)  # among them the higher-order operations, whose inside reaches us by itself
        sign = signature(func)
        if sign.asks:
            return run(func, args, kwargs)
        if self.backward.running and not torch.is_grad_enabled() and not self._inside_function():
            self.backward.kernels.append(str(func))
            return self._unrecorded(func, args, kwargs, [t for _, t in sign.written(args, kwargs)])
        return self._record(func, sign, args, kwargs)

    def _record(self, func, sign: Signature, args: tuple, kwargs: dict):
        number = torch._C._autograd._get_sequence_nr()
        frame, region = self.lines.find(sys._getframe(2))
        if region == "backward" and not self.backward.running:
            return run(func, args, kwargs)  # the 1 that a backward call begins with
        place = (number, id(frame), frame.f_lasti if frame else 0)
        last = self.local.last
        if sign.detaches and last[:3] == place and (kept := self.table.seen(args[0])) in last[3]:
            out = run(func, args, kwargs)  # autograd keeps a result of the operation before
            self.table.show(out, kept)
            return out
        written = [t for _, t in sign.written(args, kwargs)]
        if self._one_of_many(func, frame, region, written):
            return self._unrecorded(func, args, kwargs, written)
        op = None
        with self.lock, self.looking(str(func), frame):
            op = self._operation(func, sign, args, kwargs, frame, region)
            self.graph.add_op(op)
            self._before_write(written)
        try:
            out = run(func, args, kwargs)
        except Exception as error:
            if op is not None:
                op.error = str(error)
            raise
        if op is not None:
            with self.lock, self.looking(str(func), frame):
                arrived(sign, args, kwargs, out)
                if op.edges and number > 0:
                    op.sequence = self.numbers.number(number - 1)
                    self.by_sequence.setdefault(number - 1, []).append(op.index)
                op.mutates = tuple(self._after_write(written, op.index))
                if op.random:  # a mask that it wrote
                    for value, tensor in zip(op.mutates, written, strict=True):
                        self.kept.add(self.graph.value(value), tensor)
                op.outputs = tuple(self._outputs(out, op, dict(zip(map(id, written), op.mutates, strict=True))))
                self.local.last = (*place, op.outputs)
                if op.index + 1 == MAX_OPS:
                    self.graph.notes.append(f"Recording ended after {MAX_OPS:,} operations.")
        return out

    def _unrecorded(self, func, args: tuple, kwargs: dict, written: list[torch.Tensor]):
        with self.lock:
            self._before_write(written)
        out = run(func, args, kwargs)
        with self.lock:
            self._after_write(written, None)
        return out

    def _one_of_many(self, func, frame: FrameType | None, region: str, written: list[torch.Tensor]) -> bool:
        """Whether so many operations without gradient ran at this place (an evaluation, text that is generated) that
        this one need not be kept. What changes a parameter is."""
        if torch.is_grad_enabled() or frame is None or region or self.local.parents or self.backward.running:
            return False
        if any(isinstance(tensor, torch.nn.Parameter) for tensor in written):
            return False
        place = frame.f_code, frame.f_lasti, func, self.modules.current[0]
        self._without_gradient[place] += 1
        if self._without_gradient[place] <= WITHOUT_GRADIENT:
            return False
        self._unkept[str(source.at(frame))] += 1
        return True

    def step_ended(self) -> None:
        """An outermost backward call is over."""
        self._without_gradient.clear()
        self.folder.step_ended()

    def _operation(self, func, sign: Signature, args: tuple, kwargs: dict, frame, region: str) -> Op:
        """What is known of an operation before it runs."""
        self.table.name_locals(frame)
        # What a list of numbers is copied from is no tensor of the program.
        tensors = [] if sign.makes else sign.tensors(args, kwargs)
        inputs = tuple((name, self.table.of(t)) for name, t in tensors)
        edges = ()
        if torch.is_grad_enabled() and any(t.requires_grad for _, t in tensors):
            edges = tuple(self.table.edge(t, v) for (_, t), (_, v) in zip(tensors, inputs, strict=True))
        if torch.is_grad_enabled() or self.local.parents:
            self.keep_inputs(tensors, inputs)
        path, kind = self.modules.current
        parent = self.local.parents[-1] if self.local.parents else None
        again, packed = source.saving(None if parent is None else self.graph.op(parent))
        op = Op(
            index=self.graph.next_op, name="torch.tensor.default" if sign.makes else str(func), kind="op",
            inputs=inputs, outputs=(),
            attributes=sign.attributes(args, kwargs), source=self._place(frame), module=path, module_class=kind,
            parent=parent, region=again or region, packed=packed, grad_enabled=torch.is_grad_enabled(),
            edges=edges, call=None if sign.makes else (func, self.template(args), self.template(kwargs)),
        )  # fmt: skip
        if self.backward.running:
            op.region = "backward" if sign.detaches and self._in_custom_backward() else "recomputed"
        if tensors:
            op.unit = unit_of(op.label, {t.dtype for _, t in tensors}, tensors[0][1].device.type)
        if sign.random and op.attributes.get("dropout_p", op.attributes.get("dropout", 1.0)) != 0.0:
            op.random, op.rng_state = True, generator_state(tensors, kwargs)
        written = sign.written(args, kwargs)
        if edges and written and written[0][1]._is_view():
            op.base = self.table.of(written[0][1]._base)
            self.kept.add(self.graph.value(op.base), written[0][1]._base)
        return op

    def _place(self, frame: FrameType | None) -> Source:
        """The line that a frame executes; in a thread of autograd's own, that of the backward call."""
        return self.backward.current.source if frame is None and self.backward.running else source.at(frame)

    def _inside_function(self) -> bool:
        """Whether a custom Function that backward calls, and that is differentiated again, computes its forward."""
        return any(self.graph.op(p).edges for p in self.local.parents[self.local.floor :])

    def _in_custom_backward(self) -> bool:
        """Whether the backward of a custom Function computes, not the forward of a checkpoint again."""
        nodes = self.local.nodes[-1:]
        custom = any(isinstance(node, torch.autograd.function.BackwardCFunction) for node in nodes)
        return custom and not source.inside(sys._getframe(1), "checkpoint")

    @contextmanager
    def looking(self, what: str, where: FrameType | Source | None) -> Iterator[None]:
        """Within it, what fails is ours: it is noted, and the program goes on."""
        try:
            yield
        except Exception as error:
            self.failed(what, where if isinstance(where, Source) else source.at(where), error)

    def failed(self, what: str, where: Source, error: Exception) -> None:
        """Note what could not be recorded."""
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        self.note(f"{what} at {where} could not be recorded: {reason}")

    def note(self, note: str) -> None:
        """Say something once."""
        if note not in self.graph.notes:
            self.graph.notes.append(note)

    def _outputs(self, out: Any, op: Op, written: dict[int, int]) -> Iterator[int]:
        inputs = {self.graph.value(v).storage: v for _, v in reversed(op.inputs)}
        for i, tensor in enumerate(flatten(out)):
            if id(tensor) in written:
                yield written[id(tensor)]
                continue
            value = self.table.new(tensor, op.index, i)
            value.base = inputs.get(value.storage)
            known = value.base is not None and value.base not in self.table.stale
            if known and self.graph.value(value.base).numel == value.numel:
                value.stats = self.graph.value(value.base).stats
            yield value.index
            if value.stats is None:
                value.stats = statistics(tensor)
            value.data = small_data(tensor)
            if op.random or op.label in MANY_VALUED:
                self.kept.add(value, tensor)

    def template(self, args: Any) -> Any:
        """The arguments with Ref in place of each tensor."""
        if isinstance(args, torch.Tensor):
            return Ref(self.table.of(args))
        if isinstance(args, list | tuple):
            return type(args)(self.template(a) for a in args) if type(args) in (list, tuple) else args
        if isinstance(args, dict):
            return {k: self.template(v) for k, v in args.items()}
        return args

    # -- in place ------------------------------------------------------------------------------------------------------

    def _before_write(self, tensors: list[torch.Tensor]) -> None:
        """What is kept of the memory that is about to change is copied first."""
        for tensor in tensors:
            self.kept.before_write(self.table.storage_of(tensor).index)

    def _after_write(self, tensors: list[torch.Tensor], op: int | None) -> list[int]:
        values = []
        for tensor in tensors:
            storage = self.table.storage_of(tensor)
            storage.version += 1
            if op is None:
                self.table.writer[storage.index] = (None, None)
                continue
            value = self.table.new(tensor, op, 0)
            value.name = self.modules.name_of(tensor)
            self.table.describe(value, tensor)
            self.table.writer[storage.index] = (op, value.index)
            values.append(value.index)
        return values

    # -- evidence ------------------------------------------------------------------------------------------------------

    def keep_inputs(self, tensors: list[tuple[str, torch.Tensor]], inputs: tuple[tuple[str, int], ...]) -> None:
        """Hold what operations read: verification runs them again."""
        if self.kept.limit != 0:
            for (_, tensor), (_, value) in zip(tensors, inputs, strict=True):
                self.kept.add(self.graph.value(value), tensor)

    def release_done(self, done: set[int]) -> None:
        """Let go of the inputs of operations whose backward has run; what others of this step still need stays."""
        waiting = [op for op in self.graph.ops_between(self.folder.start) if op.edges and op.index not in done]
        self.kept.keep_only({v for op in waiting for _, v in op.inputs} | {op.base for op in waiting})

    def pause(self) -> _Pause:
        """Within it, nothing is recorded."""
        return _Pause(self)

    def forget(self, start: tuple[int, int, int], by: int | None) -> None:
        """What came from `start` on (operations, values, backward calls) is no longer in the graph. Its values are now
        those `by` earlier, or None: unknown."""
        ops, values, calls = start
        self.table.forget(values, by)
        self.by_sequence = {n: kept for n, made in self.by_sequence.items() if (kept := [i for i in made if i < ops])}
        self.kept.keep_only({v for v in self.kept.tensors if v < values})
        self.backward.evidence = [e for e in self.backward.evidence if e[0].index < calls]
        self.local.last = ()


class CompiledRecorder(Recorder):
    """Leaves compiled functions compiled: each is one operation, with its inputs and outputs (torch's own switch for
    it)."""

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Whether torch.compile may go on under this mode."""
        return True


def _unwarned() -> Callable[[], None]:
    """torch.compile warns of the hooks by which modules are known here: until the returned function is called not."""
    warnings.filterwarnings("ignore", r"Using `torch\.compile\(module\)` when there are global hooks on modules")
    ours = warnings.filters[0]

    def undo() -> None:
        if ours in warnings.filters:
            warnings.filters.remove(ours)

    return undo


class _Pause:
    """All modes of this thread are off: what is then run is ours. Classes of tensors keep their own behaviour."""

    def __init__(self, recorder: Recorder):
        self._recorder = recorder
        self._modes: list[TorchDispatchMode] = []

    def __enter__(self) -> None:
        self._recorder.local.paused += 1
        self._modes = [_pop_mode() for _ in range(_len_torch_dispatch_stack())]

    def __exit__(self, *_) -> None:
        for mode in reversed(self._modes):
            _push_mode(mode)
        self._recorder.local.paused -= 1
