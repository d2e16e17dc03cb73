"""A recorded program as one JSON document: what the page shows and `kiem explain --json` prints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kiem.files import plain
from kiem.inspect.explain.numbering import numbered, numbers_text
from kiem.inspect.graph.model import BackwardCall, Gradient, Graph, Op, Source, Stats, Value
from kiem.inspect.graph.model import plain as attribute
from kiem.inspect.rules.table import Call, find, formula
from kiem.inspect.show.summary import totals
from kiem.inspect.show.verdicts import ORDER
from kiem.inspect.verify.operation import Verdict

if TYPE_CHECKING:
    from kiem.inspect.verify.verifier import Result


UNINITIALIZED = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "empty_permuted")


def document(graph: Graph, title: str, result: Result | None = None) -> dict[str, Any]:
    """Everything of a graph, in plain types. Numbers that are not finite are texts (files.plain)."""
    failure, saved_by = graph.failure, graph.saved_by()
    return plain({
        "title": title,
        "summary": totals(graph) | {"backward_steps": sum(len(call.steps) for call in graph.backwards)},
        "notes": graph.notes,
        "failure": None if failure is None else {
            "kind": failure.kind, "message": failure.message, "source": _source(failure.source),
            "explanation": failure.explanation},
        "values": [_value(graph, v, saved_by) for v in graph.values],
        "ops": [_op(graph, op) for op in graph.ops],
        "backwards": [_backward(graph, one.call) | {"numbers": numbers_text([one])} for one in numbered(graph)],
        "repeats": [{"first": r.first, "last": r.last, "times": r.times} for r in graph.repeats],
        "verdicts": None if result is None else _verdicts(result),
    })  # fmt: skip


def _verdicts(result: Result) -> dict[str, dict[str, str]]:
    """By operation, the worst of what its backward calls were found to be."""
    worst: dict[int, Verdict] = {}
    for verdict in result.verdicts:
        known = worst.get(verdict.op)
        if known is None or ORDER.index(verdict.verdict) < ORDER.index(known.verdict):
            worst[verdict.op] = verdict
    return {str(op): {"verdict": v.verdict, "text": _told(v)} for op, v in worst.items()}


def _source(source: Source | None) -> dict[str, Any] | None:
    if source is None:
        return None
    return {"file": source.file, "line": source.line, "function": source.function, "text": source.text}


def _stats(stats: Stats | None) -> dict[str, Any] | None:
    if stats is None:
        return None
    return {"norm": stats.norm, "mean": stats.mean, "min": stats.minimum, "max": stats.maximum,
            "nonfinite": stats.nonfinite}  # fmt: skip


def _value(graph: Graph, value: Value, saved_by: dict[int, list[int]]) -> dict[str, Any]:
    # What torch.empty gives is whatever was in the memory.
    empty = value.producer is not None and graph.op(value.producer).label in UNINITIALIZED
    return {
        "id": value.index, "name": value.name, "rank": value.rank, "shape": list(value.shape),
        "dtype": str(value.dtype).removeprefix("torch."), "device": value.device, "strides": list(value.strides),
        "bytes": value.nbytes, "storage": value.storage, "version": value.version, "requires_grad": value.requires_grad,
        "leaf": value.is_leaf, "parameter": value.is_parameter, "view_of": value.base, "producer": value.producer,
        "saved_by": saved_by.get(value.index, []), "stats": None if empty else _stats(value.stats),
        "data": None if empty else value.data,
        "hooks": list(value.hooks),
    }  # fmt: skip


def _op(graph: Graph, op: Op) -> dict[str, Any]:
    row = find(op.name) if op.kind == "op" else None
    derivatives: dict[str, str] = {}
    forward = None
    if row is not None:
        # Formulas depend on which arguments were given, not on what they hold.
        call = Call(dict.fromkeys((name for name, _ in op.inputs), _PRESENT), op.attributes, ())
        forward = _formula(row, call)
        derivatives = {name: text for name, _ in op.inputs if (text := _formula(row, call, name))}
    return {
        "id": op.index, "label": op.label, "name": op.name, "kind": op.kind, "inputs": [list(i) for i in op.inputs],
        "outputs": list(op.outputs), 
        "attributes": {k: attribute(v) for k, v in op.attributes.items() if v is not None},
        "source": _source(op.source), "backward_source": _source(op.backward_source), "module": op.module,
        "module_class": op.module_class, "parent": op.parent, "region": op.region, "grad_enabled": op.grad_enabled,
        "random": op.random, "mutates": list(op.mutates), "node": op.node, "closed_form": row is not None,
        "forward_formula": forward, "derivatives": derivatives, "symbols": row.symbols if row else {},
        "saved_bytes": graph.saved_bytes(op) if op.node else 0,
        "error": op.error,
    }  # fmt: skip


_PRESENT: Any = ()  # stands for a tensor that is there; formulas only ask whether it is


def _formula(row: Any, call: Call, argument: str | None = None) -> str:
    try:
        return formula(row, call, argument)
    except (TypeError, ValueError, AttributeError):
        return row.forward if argument is None else row.derivatives.get(argument.split("[")[0], "")


def _gradient(gradient: Gradient | None) -> dict[str, Any] | None:
    if gradient is None:
        return None
    return {"shape": list(gradient.shape), "dtype": str(gradient.dtype).removeprefix("torch."),
            "data": gradient.data, **(_stats(gradient.stats) or {})}  # fmt: skip


def _backward(graph: Graph, call: BackwardCall) -> dict[str, Any]:
    index = {step.key[0] if step.leaf is None else step.key: i for i, step in enumerate(call.steps)}
    steps = []
    for step in call.steps:
        order = _by_argument(graph, step)
        targets = [None if (e := step.edges[i]) is None else index.get(e if e[0] == "leaf" else e[0]) for i in order]
        steps.append({
            "op": step.op, "node": step.node.removeprefix("torch::autograd::"), "leaf": step.leaf,
            "into": [_gradient(g) for g in step.into], "out": [_gradient(step.out[i]) for i in order],
            "targets": [None if t is None else {"step": t} for t in targets], "kernels": step.kernels,
            "changed_by_hook": step.changed_by_hook,
        })  # fmt: skip
    return {"source": _source(call.source), "roots": list(call.roots), "steps": steps, "nested": call.nested,
            "after_op": call.after_op}  # fmt: skip


def _by_argument(graph: Graph, step: Any) -> list[int]:
    """The positions of a node's gradients in the order of the operation's arguments, those without one left out."""
    positions = [i for i in range(min(len(step.edges), len(step.out))) if step.edges[i] is not None]
    if step.op is None:
        return positions
    order, left = [], list(positions)
    for edge in graph.op(step.op).edges:
        match = next((i for i in left if step.edges[i] == edge), None)
        if match is not None:
            left.remove(match)
            order.append(match)
    return order + left


def _told(verdict: Verdict) -> str:
    if verdict.text:
        return verdict.text
    worst = max(verdict.inputs, key=lambda i: i.units / max(i.bound, 1e-9), default=None)
    if worst is None:
        return verdict.verdict
    return f"{worst.argument}: error {worst.units:.3g} ulp, bound {worst.bound:.3g} ulp"
