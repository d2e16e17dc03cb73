"""Record what a PyTorch program does, as one graph, while it runs unchanged.

A TorchDispatchMode sees every operation below autograd. Autograd numbers its nodes as it makes them, one per
operation, just before the operation reaches us: the number ties an operation to its node, whatever becomes of the
tensor objects in between (values.py tells tensors apart). Hooks on the nodes of each backward call see the gradients.
Three entry points of torch are wrapped while recording and put back after: what `autograd.Function.apply` calls,
`autograd._engine_run_backward`, and the global forward hooks of nn.Module. To look never ends the user's program."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kiem.inspect.graph.model import Failure, Op, Source
from kiem.inspect.graph.schema import Signature, arrived, flatten, generator_state, run, signature
from kiem.inspect.graph.stats import small_data, statistics
from kiem.inspect.record import source
from kiem.inspect.record.backward import BackwardHooks
from kiem.inspect.record.functions import FunctionCalls
from kiem.inspect.record.passes import Folder
from kiem.inspect.record.state import KEEP_BYTES, Observer, Pause, RecordState
from kiem.inspect.record.values import ValueTable
from kiem.inspect.verify.branches import MANY_VALUED
from kiem.inspect.verify.precision import unit_of

MAX_OPS = 200_000
WITHOUT_GRADIENT = 16  # operations without gradient that are kept of one place in a pass


class Recorder(TorchDispatchMode):
    """`with Recorder() as recorder: ...` fills `recorder.graph`. `library`: path prefixes whose lines are not the
    user's. `observer` looks on. `keep`: bytes of inputs and gradients that may be held for a later verification
    (None: no bound)."""

    supports_higher_order_operators = True

    def __init__(self, library: tuple[str, ...] = (), observer: Observer | None = None, keep: int | None = KEEP_BYTES):
        super().__init__()
        self.state = state = RecordState(library, observer, keep)
        self.graph = state.graph
        self.modules = source.ModulePaths(state.lines, state.records_here)
        self.table = ValueTable(state, self.modules)
        self._functions = FunctionCalls(state, self.table, self.modules)
        self._backward = BackwardHooks(state, self.table, self._pass_ended)
        self._folder = Folder(state, self.table)
        self._undo: list[Callable[[], None]] = []
        self._without_gradient: Counter[tuple] = Counter()  # in this pass, by place
        self._unkept: Counter[str] = Counter()

    # -- entering and leaving ------------------------------------------------------------------------------------------

    def __enter__(self) -> Recorder:
        self.modules.__enter__()
        self._undo = [
            self._functions.wrap(), self._backward.wrap_engine(), self._backward.watch_optimizers(), _unwarned(),
        ]  # fmt: skip
        return super().__enter__()

    def __exit__(self, kind, error, trace) -> None:
        super().__exit__(kind, error, trace)
        for undo in reversed(self._undo):
            undo()
        self.modules.__exit__()
        graph = self.graph
        for place, count in self._folder.dropped.items():
            graph.notes.append(f"{count:,} more steps up to {place} ran, each unlike the others: not kept.")
        if self._unkept:
            (line, _), count = self._unkept.most_common(1)[0], self._unkept.total()
            graph.notes.append(
                f"{count:,} more operations without gradient ran at the same lines, most of them at {line}: not kept."
            )
        if error is not None:
            where = source.traceback_source(error, self.state.lines)
            graph.failure = Failure(type(error).__name__, str(error), where)

    def pause(self) -> Pause:
        """Within it, nothing is recorded."""
        return self.state.pause()

    def _pass_ended(self) -> None:
        """An outermost backward call is over."""
        self._without_gradient.clear()
        self.table.note_gradients()
        self._folder.pass_ended()

    # -- operations ----------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            self.state.note("What is captured in a CUDA graph cannot be looked at: it is not recorded.", lost=True)
            return run(func, args, kwargs)
        if self.state.paused or len(self.graph.ops) >= MAX_OPS or not isinstance(func, torch._ops.OpOverload):
            return run(func, args, kwargs)  # among them the higher-order operations, whose inside reaches us by itself
        sign = signature(func)
        if sign.asks:
            return run(func, args, kwargs)
        if self.state.running and not torch.is_grad_enabled() and not self.state.inside_function():
            for kernels in self.state.local.kernels[-1:]:
                kernels.append(str(func))
            return self._unrecorded(func, args, kwargs, [t for _, t in sign.written(args, kwargs)])
        return self._record(func, sign, args, kwargs)

    def _record(self, func, sign: Signature, args: tuple, kwargs: dict):
        number = torch._C._autograd._get_sequence_nr()
        frame, region = self.state.lines.find(sys._getframe(2))
        if region == "backward" and not self.state.running:
            return run(func, args, kwargs)  # the 1 that a backward call begins with
        place = (number, id(frame), frame.f_lasti if frame else 0)
        last = self.state.local.last
        kept = self.table.seen(args[0]) if sign.detaches and last[:3] == place else None
        if kept is not None and kept in last[3]:
            out = run(func, args, kwargs)  # autograd keeps a result of the operation before
            self.table.show(out, kept)
            return out
        written = [t for _, t in sign.written(args, kwargs)]
        if self._one_of_many(func, frame, region, written):
            return self._unrecorded(func, args, kwargs, written)
        op = None
        with self.state.lock, self.state.looking(str(func), frame):
            op = self._operation(func, sign, args, kwargs, frame, region)
            self.graph.add_op(op)
            self._before_write(written)
        try:
            out = run(func, args, kwargs)
        except Exception as error:
            if op is not None:
                op.error = str(error)
            raise
        if op is not None and op.index in self.graph:  # a backward call inside it may have ended a pass and folded it
            with self.state.lock, self.state.looking(str(func), frame):
                arrived(sign, args, kwargs, out)
                if op.edges and number > 0:
                    op.sequence = self.state.numbers.number(number - 1)
                    self.state.by_sequence.setdefault(number - 1, []).append(op.index)
                op.mutates = tuple(self._after_write(written, op.index))
                if op.random:  # a mask that it wrote
                    for value, tensor in zip(op.mutates, written, strict=True):
                        self.state.kept.add(self.graph.value(value), tensor)
                op.outputs = tuple(self._outputs(out, op, dict(zip(map(id, written), op.mutates, strict=True))))
                self.state.local.last = (*place, op.outputs)
                if len(self.graph.ops) == MAX_OPS:
                    self.state.note(f"Recording ended after {MAX_OPS:,} operations.", lost=True)
        return out

    def _unrecorded(self, func, args: tuple, kwargs: dict, written: list[torch.Tensor]):
        with self.state.lock:
            self._before_write(written)
        out = run(func, args, kwargs)
        with self.state.lock:
            self._after_write(written, None)
        return out

    def _one_of_many(self, func, frame: FrameType | None, region: str, written: list[torch.Tensor]) -> bool:
        """Whether so many operations without gradient ran at this place (an evaluation, text that is generated) that
        this one need not be kept. What changes a parameter is."""
        if torch.is_grad_enabled() or frame is None or region or self.state.local.parents or self.state.running:
            return False
        if any(isinstance(tensor, torch.nn.Parameter) for tensor in written):
            return False
        place = frame.f_code, frame.f_lasti, func, self.modules.current[0]
        self._without_gradient[place] += 1
        if self._without_gradient[place] <= WITHOUT_GRADIENT:
            return False
        self._unkept[str(source.at(frame))] += 1
        return True

    def _operation(self, func, sign: Signature, args: tuple, kwargs: dict, frame, region: str) -> Op:
        """What is known of an operation before it runs."""
        self.table.name_locals(frame)
        # What a list of numbers is copied from is no tensor of the program.
        tensors = [] if sign.makes else sign.tensors(args, kwargs)
        inputs = tuple((name, self.table.of(t)) for name, t in tensors)
        edges: tuple[tuple, ...] = ()
        if torch.is_grad_enabled() and any(t.requires_grad for _, t in tensors):
            edges = tuple(self.table.edge(t, v) for (_, t), (_, v) in zip(tensors, inputs, strict=True))
        if torch.is_grad_enabled() or self.state.local.parents:
            self.state.keep_inputs(tensors, inputs)
        path, kind = self.modules.current
        parent = self.state.parent
        again, packed = source.saving(parent)
        op = Op(
            index=self.graph.next_op, name="torch.tensor.default" if sign.makes else str(func), kind="op",
            inputs=inputs, outputs=(),
            attributes=sign.attributes(args, kwargs), source=self._place(frame), module=path, module_class=kind,
            parent=None if parent is None else parent.index, region=again or region, packed=packed,
            grad_enabled=torch.is_grad_enabled(), edges=edges,
            call=None if sign.makes else (func, self.table.template(args), self.table.template(kwargs)),
        )  # fmt: skip
        if self.state.running:
            op.region = "backward" if sign.detaches and self._in_custom_backward() else "recomputed"
        if tensors:
            op.unit = unit_of(op.label, {t.dtype for _, t in tensors}, tensors[0][1].device.type)
        if sign.random and op.attributes.get("dropout_p", op.attributes.get("dropout", 1.0)) != 0.0:
            op.random, op.rng_state = True, generator_state(tensors, kwargs)
        written = sign.written(args, kwargs)
        if edges and written and (base := written[0][1]._base) is not None:  # of a view
            op.base = self.table.of(base)
            self.state.kept.add(self.graph.value(op.base), base)
        return op

    def _place(self, frame: FrameType | None) -> Source:
        """The line that a frame executes; in a thread of autograd's own, that of the backward call."""
        return self.state.calls[-1].source if frame is None and self.state.running else source.at(frame)

    def _in_custom_backward(self) -> bool:
        """Whether the backward of a custom Function computes, not the forward of a checkpoint again."""
        nodes = self.state.local.nodes[-1:]
        custom = any(isinstance(node, torch.autograd.function.BackwardCFunction) for node in nodes)
        return custom and not source.inside(sys._getframe(1), "checkpoint")

    def _outputs(self, out: Any, op: Op, written: dict[int, int]) -> Iterator[int]:
        inputs = {self.graph.value(v).storage: v for _, v in reversed(op.inputs)}
        for i, tensor in enumerate(flatten(out)):
            if id(tensor) in written:
                yield written[id(tensor)]
                continue
            value = self.table.new(tensor, op.index, i)
            value.base = inputs.get(value.storage)
            base = None if value.base is None or value.base in self.table.stale else self.graph.value(value.base)
            if base is not None and base.numel == value.numel and op.label != "as_strided":
                value.stats = base.stats
            yield value.index
            if value.stats is None:
                value.stats = statistics(tensor)
            value.data = small_data(tensor)
            if op.random or op.label in MANY_VALUED:
                self.state.kept.add(value, tensor)

    # -- in place ------------------------------------------------------------------------------------------------------

    def _before_write(self, tensors: list[torch.Tensor]) -> None:
        """What is kept of the memory that is about to change is copied first."""
        for tensor in tensors:
            self.state.kept.before_write(self.table.storage_of(tensor).index)

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
        filters: Any = warnings.filters
        if ours in filters:
            filters.remove(ours)

    return undo
