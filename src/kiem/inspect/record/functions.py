"""Calls of a custom autograd.Function: one operation whose inside is recorded as its children."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from kiem.inspect.graph.model import Op, Source
from kiem.inspect.record import source
from kiem.inspect.record.backward import compiling
from kiem.inspect.verify.replay import flatten

if TYPE_CHECKING:
    from kiem.inspect.record.recorder import Recorder


def wrap_functions(recorder: Recorder) -> Callable[[], None]:
    """Record every `Function.apply` until the returned function is called."""
    original = torch.autograd.Function.__dict__["apply"]

    def apply(cls, *args, **kwargs):
        elsewhere = recorder.local.paused or compiling() or not source.records_here(recorder)
        if elsewhere or torch._C._are_functorch_transforms_active():
            return original.__func__(cls, *args, **kwargs)
        return _recorded(recorder, cls, original.__func__, args, kwargs)

    torch.autograd.Function.apply = classmethod(apply)

    def undo() -> None:
        torch.autograd.Function.apply = original

    return undo


def _recorded(recorder: Recorder, cls, apply, args: tuple, kwargs: dict):
    frame, region = recorder.lines.find(sys._getframe(2))
    op, tensors = None, []
    with recorder.pause(), recorder.lock, recorder.looking(cls.__name__, frame):
        recorder.table.name_locals(frame)
        op, tensors = _operation(recorder, cls, args, kwargs, frame, region)
        recorder.graph.add_op(op)
        versions = [recorder.table.storage_of(t).version for t in tensors]
    if op is None:
        return apply(cls, *args, **kwargs)
    recorder.local.parents.append(op.index)
    try:
        out = apply(cls, *args, **kwargs)
    except Exception as error:
        op.error = str(error)
        raise
    finally:
        recorder.local.parents.pop()
    with recorder.pause(), recorder.lock, recorder.looking(cls.__name__, frame):
        changed = [
            v
            for t, (_, v), n in zip(tensors, op.inputs, versions, strict=True)
            if recorder.table.storage_of(t).version != n
        ]
        op.mutates = tuple(changed)
        op.outputs = tuple(_outputs(recorder, op, out))
        for tensor in flatten(out):
            if tensor.grad_fn is not None and type(tensor.grad_fn).__name__.endswith("Backward"):
                number = tensor.grad_fn._sequence_nr()
                op.sequence, op.node = recorder.numbers.number(number), tensor.grad_fn.name()
                recorder.by_sequence.setdefault(number, []).insert(0, op.index)
                break
    return out


def _operation(recorder: Recorder, cls, args: tuple, kwargs: dict, frame, region: str) -> tuple[Op, list[torch.Tensor]]:
    """What is known of a call before it runs, and its tensors."""
    # torch.compile's, and torch.cond, scan and their like, which it compiles.
    compiled = cls.__module__.startswith(("torch._functorch", "torch._higher_order_ops"))
    registered = _registered(cls)
    names = [f"input{i}" for i in range(len(args))] if compiled else _argument_names(cls, registered, len(args))
    named = [(name, a) for name, a in zip(names, args, strict=True) if isinstance(a, torch.Tensor)]
    inputs = tuple((name, recorder.table.of(t)) for name, t in named)
    edges = tuple(recorder.table.edge(t, v) for (_, t), (_, v) in zip(named, inputs, strict=True))
    recorder.keep_inputs(named, inputs)
    path, kind = recorder.modules.current
    parent = recorder.local.parents[-1] if recorder.local.parents else None
    again, packed = source.saving(None if parent is None else recorder.graph.op(parent))
    op = Op(
        index=recorder.graph.next_op, name=registered["op"]._schema.name if registered else cls.__name__,
        kind="compiled" if compiled else "function", inputs=inputs, outputs=(),
        attributes={n: a for n, a in zip(names, args, strict=True) if not isinstance(a, torch.Tensor)},
        source=source.at(frame), module=path, module_class=kind, parent=parent,
        region="recomputed" if recorder.backward.running else again or region, packed=packed,
        grad_enabled=torch.is_grad_enabled(), edges=edges if torch.is_grad_enabled() and any(edges) else (),
        backward_source=None if compiled else _defined(registered["info"]._backward_fn if registered else cls.backward),
        call=(cls, recorder.template(args), recorder.template(kwargs)),
    )  # fmt: skip
    return op, [t for _, t in named]


def _registered(cls) -> dict[str, Any]:
    """Of the Function that torch.library makes of an operation with `register_autograd`: the operation and what was
    registered; else nothing."""
    if not cls.__name__.startswith("GeneratedBackwardFor"):
        return {}
    known = inspect.getclosurevars(cls.forward).nonlocals
    return known if {"op", "info"} <= set(known) else {}


def _outputs(recorder: Recorder, op: Op, out):
    for i, tensor in enumerate(flatten(out)):
        inner = recorder.table.seen(tensor)
        value = recorder.table.new(tensor, op.index, i)
        if inner is not None:
            made = recorder.graph.value(inner)
            value.stats, value.data, value.base = made.stats, made.data, made.base
        else:
            recorder.table.describe(value, tensor)
        yield value.index


def _argument_names(cls, registered: dict[str, Any], count: int) -> list[str]:
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


def _readable(code) -> bool:
    try:
        inspect.getsourcelines(code)
    except (OSError, TypeError):
        return False
    return True


def _decorators(code, line: int) -> int:
    """Lines from the first decorator to `def`."""
    try:
        lines, _ = inspect.getsourcelines(code)
    except (OSError, TypeError):
        return 0
    return next((i for i, text in enumerate(lines) if text.lstrip().startswith(("def ", "async def "))), 0)
