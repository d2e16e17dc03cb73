"""Calls of a custom autograd.Function: one operation whose inside is recorded as its children."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from types import CodeType, FrameType
from typing import Any

import torch

from kiem.inspect.graph.model import Op, Source
from kiem.inspect.graph.schema import flatten
from kiem.inspect.record import source
from kiem.inspect.record.source import ModulePaths
from kiem.inspect.record.state import RecordState, compiling
from kiem.inspect.record.values import ValueTable


class FunctionCalls:
    """Records every call of a custom Function. `Function.apply` itself is left alone, as a program may have taken it
    (`square = Square.apply`) before recording began; what it calls is wrapped."""

    def __init__(self, state: RecordState, table: ValueTable, modules: ModulePaths):
        self._state, self._table, self._modules = state, table, modules

    def wrap(self) -> Callable[[], None]:
        """Record calls until the returned function is called."""
        below: Any = torch.autograd.function._SingleLevelFunction
        before = below.__dict__.get("apply")  # of a recorder around this one

        def apply(cls, *args, **kwargs):
            plain = before.__func__ if before is not None else _call
            elsewhere = self._state.paused or compiling() or not self._state.records_here()
            if elsewhere or torch._C._are_functorch_transforms_active():
                return plain(cls, *args, **kwargs)
            return self._recorded(cls, plain, args, kwargs)

        below.apply = classmethod(apply)

        def undo() -> None:
            if before is None:
                del below.apply
            else:
                below.apply = before

        return undo

    def _recorded(self, cls, apply, args: tuple, kwargs: dict):
        state, table = self._state, self._table
        frame, region = state.lines.find(sys._getframe(2))
        op: Op | None = None
        tensors: list[torch.Tensor] = []
        with state.lock, state.looking(cls.__name__, frame):
            table.name_locals(frame)
            op, tensors = self._operation(cls, args, kwargs, frame, region)
            state.graph.add_op(op)
            versions = [table.storage_of(t).version for t in tensors]
        if op is None:
            return apply(cls, *args, **kwargs)
        state.local.parents.append(op.index)
        try:
            out = apply(cls, *args, **kwargs)
        except Exception as error:
            op.error = str(error)
            raise
        finally:
            state.local.parents.pop()
            op.end = state.graph.next_op
        if op.index not in state.graph:
            return out  # a backward call inside it ended a pass that was folded
        with state.lock, state.looking(cls.__name__, frame):
            known = zip(tensors, op.inputs, versions, strict=True)
            op.mutates = tuple(v for t, (_, v), n in known if table.storage_of(t).version != n)
            op.outputs = tuple(self._outputs(op, out))
            self._note_node(op, out)
        return out

    def _note_node(self, op: Op, out: Any) -> None:
        """Which node of autograd it made."""
        for tensor in flatten(out):
            if tensor.grad_fn is not None and type(tensor.grad_fn).__name__.endswith("Backward"):
                number = tensor.grad_fn._sequence_nr()
                op.sequence, op.node = self._state.numbers.number(number), tensor.grad_fn.name()
                self._state.by_sequence.setdefault(number, []).insert(0, op.index)
                return

    def _operation(
        self, cls, args: tuple, kwargs: dict, frame: FrameType | None, region: str
    ) -> tuple[Op, list[torch.Tensor]]:
        """What is known of a call before it runs, and its tensors."""
        state, table = self._state, self._table
        # torch.compile's, and torch.cond, scan and their like, which it compiles.
        compiled = cls.__module__.startswith(("torch._functorch", "torch._higher_order_ops"))
        registered = _registered(cls)
        names = [f"input{i}" for i in range(len(args))] if compiled else _argument_names(cls, registered, len(args))
        named = [(name, a) for name, a in zip(names, args, strict=True) if isinstance(a, torch.Tensor)]
        inputs = tuple((name, table.of(t)) for name, t in named)
        edges = tuple(table.edge(t, v) for (_, t), (_, v) in zip(named, inputs, strict=True))
        state.keep_inputs(named, inputs)
        path, kind = self._modules.current
        parent = state.parent
        again, packed = source.saving(parent)
        backward = registered["info"]._backward_fn if registered else cls.backward
        op = Op(
            index=state.graph.next_op, name=registered["op"]._schema.name if registered else cls.__name__,
            kind="compiled" if compiled else "function", inputs=inputs, outputs=(),
            attributes={n: a for n, a in zip(names, args, strict=True) if not isinstance(a, torch.Tensor)},
            source=source.at(frame), module=path, module_class=kind, parent=None if parent is None else parent.index,
            region="recomputed" if state.running else again or region, packed=packed,
            grad_enabled=torch.is_grad_enabled(), edges=edges if torch.is_grad_enabled() and any(edges) else (),
            backward_source=None if compiled else _defined(backward),
            call=(cls, table.template(args), table.template(kwargs)),
        )  # fmt: skip
        return op, [t for _, t in named]

    def _outputs(self, op: Op, out: Any) -> Iterator[int]:
        for i, tensor in enumerate(flatten(out)):
            inner = self._table.seen(tensor)
            value = self._table.new(tensor, op.index, i)
            if inner is not None and op.kind != "compiled":  # whose kernels write to what was seen before
                value.base = self._state.graph.value(inner).base
            self._table.describe(value, tensor)  # anew: a kernel or numpy may have written what nobody saw
            yield value.index


def _call(cls, *args, **kwargs):
    """torch's own apply, below the wrapped one."""
    return super(torch.autograd.function._SingleLevelFunction, cls).apply(*args, **kwargs)


def _registered(cls) -> Mapping[str, Any]:
    """Of the Function that torch.library makes of an operation with `register_autograd`: the operation and what was
    registered; else nothing."""
    if not cls.__name__.startswith("GeneratedBackwardFor"):
        return {}
    known = inspect.getclosurevars(cls.forward).nonlocals
    return known if {"op", "info"} <= set(known) else {}


def _argument_names(cls, registered: Mapping[str, Any], count: int) -> list[str]:
    if registered:
        positional = [a.name for a in registered["op"]._schema.arguments if not a.kwarg_only]
        return [*positional[: count - 1], "metadata"]
    try:
        parameters = list(inspect.signature(cls.forward).parameters.values())
    except (TypeError, ValueError):
        return [f"argument{i}" for i in range(count)]
    if cls.setup_context is torch.autograd.function._SingleLevelFunction.setup_context:
        parameters = parameters[1:]  # the context
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    rest = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), "argument")
    names += [f"{rest}[{i}]" for i in range(max(count - len(names), 0))]
    return names[:count]


def _defined(backward) -> Source | None:
    code = getattr(inspect.unwrap(getattr(backward, "__func__", backward)), "__code__", None)
    if code is None:
        return None
    _, line = inspect.getsourcelines(code) if _readable(code) else (None, code.co_firstlineno)
    return source.source_of(code.co_filename, line + _decorators(code, line), code.co_qualname)


def _readable(code: CodeType) -> bool:
    try:
        inspect.getsourcelines(code)
    except (OSError, TypeError):
        return False
    return True


def _decorators(code: CodeType, line: int) -> int:
    """Lines from the first decorator to `def`."""
    try:
        lines, _ = inspect.getsourcelines(code)
    except (OSError, TypeError):
        return 0
    return next((i for i, text in enumerate(lines) if text.lstrip().startswith(("def ", "async def "))), 0)
