"""Mistakes that raise no error: a loss that is broadcast, and tensors whose gradient is cut off on the way."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress

from kiem.format import plural
from kiem.inspect.graph.model import Graph, Op, Source, Value

MOST_LINES = 6  # of one kind


def notes(graph: Graph) -> list[str]:
    """What a person may not have meant, a line each. Never raises."""
    found: dict[str, None] = {}
    with suppress(Exception):
        found |= dict.fromkeys(_broadcasts(graph))
    with suppress(Exception):
        found |= dict.fromkeys(_cuts(graph))
    return list(found)


# -- a loss that is broadcast ------------------------------------------------------------------------------------------


def _broadcasts(graph: Graph) -> Iterator[str]:
    """`[N, 1]` against `[N]` gives `[N, N]`: every output with every target."""
    lines: set[Source] = set()
    for op in graph.ops:
        pair = _pair(graph, op)
        if pair is None or op.source in lines or len(lines) == MOST_LINES:
            continue
        lines.add(op.source)
        output, target = pair
        size = output.shape[0]
        name = target.name or "the target"
        change = "squeeze(1)" if len(target.shape) == 2 else "unsqueeze(1)"
        yield (
            f"At {op.source} {output.name or 'the output'} {list(output.shape)} and {name} {list(target.shape)} are "
            f"broadcast to [{size}, {size}]: every output is compared with every target. To compare them one by one: "
            f"`{name}.{change}`" + ("" if target.name else " of the target")
        )


def _pair(graph: Graph, op: Op) -> tuple[Value, Value] | None:
    """(output, target) of a difference or a loss in which they were broadcast against each other."""
    if op.label not in ("sub", "rsub") and "loss" not in op.label:
        return None
    read = [graph.value(v) for _, v in op.inputs][:2]
    # torch's losses expand both first.
    given = [_before_expand(graph, v) if "loss" in op.label else v for v in read]
    if len(given) < 2 or given[0].requires_grad == given[1].requires_grad or not op.outputs:
        return None
    output, target = given if given[0].requires_grad else given[::-1]
    size = max(output.shape, default=0)
    shapes = {output.shape, target.shape}
    return (output, target) if size > 1 and shapes == {(size, 1), (size,)} else None


def _before_expand(graph: Graph, value: Value) -> Value:
    made = None if value.producer is None else graph.op(value.producer)
    return graph.value(made.inputs[0][1]) if made is not None and made.label == "expand" else value


# -- gradients that are cut off ----------------------------------------------------------------------------------------


def _cuts(graph: Graph) -> Iterator[str]:
    """Where a tensor with a gradient reaches a loss without it, and what gets no gradient at all because of it."""
    needed = {v for call in graph.backwards if not call.transformed for v in call.roots}
    _upstream(graph, needed)
    got = {leaf for call in graph.backwards for leaf in call.leaf_grads}
    cuts: dict[str, tuple[str, set[int]]] = {}
    for op in graph.ops:
        if op.parent is not None or op.region:
            continue
        for v, how in _cut_here(graph, op, needed):
            cuts.setdefault(str(op.source), (f"{_called(graph, v)} is {how} at {op.source}", set()))[1].add(v)
    for text, values in list(cuts.values())[:MOST_LINES]:
        above = set(values)
        _upstream(graph, above)
        lost = [graph.value(v) for v in above - got if graph.value(v).is_leaf and graph.value(v).requires_grad]
        yield text + (f"; no gradient: {_folded(lost)}" if lost else "")
    if len(cuts) > MOST_LINES:
        more = len(cuts) - MOST_LINES
        yield f"{plural(more, 'more line')} {'uses' if more == 1 else 'use'} tensors without their gradient"


def _cut_here(graph: Graph, op: Op, needed: set[int]) -> Iterator[tuple[int, str]]:
    read = graph.value(op.inputs[0][1]) if op.inputs else None
    if op.label == "detach" and read is not None and read.requires_grad and op.outputs and op.outputs[0] in needed:
        changed = _changed(graph, op)
        if not changed:
            yield read.index, "detached"
        elif not read.is_leaf:  # of a leaf, that is how a step of an optimizer is written by hand
            yield read.index, "changed in place through .data or .detach(), which autograd does not see,"
    for _, v in op.inputs:
        value = graph.value(v)
        if value.producer is None and value.base is not None and not value.requires_grad and needed & set(op.outputs):
            base = graph.value(value.base)
            if base.requires_grad and base.storage == value.storage and not op.mutates:
                yield value.base, "read as .data"


def _changed(graph: Graph, detach: Op) -> bool:
    """Whether what a detach gives is changed in place next."""
    output = detach.outputs[0]
    return any(
        output in {v for _, v in op.inputs} and op.mutates
        for op in graph.ops_between(detach.index + 1, detach.index + 9)
    )


def _upstream(graph: Graph, values: set[int]) -> None:
    """Add everything that the values were computed from."""
    waiting = list(values)
    while waiting:
        value = graph.value(waiting.pop())
        new = {v for _, v in graph.op(value.producer).inputs} if value.producer is not None else set()
        new |= {value.base} if value.base is not None else set()
        waiting += new - values
        values |= new


def _called(graph: Graph, v: int) -> str:
    value = graph.value(v)
    if value.name or value.producer is None:
        return value.name or f"a {value.describe()}"
    made = graph.op(value.producer)
    return f"the output of {made.label} ({made.source.file.rsplit('/', 1)[-1]}:{made.source.line})"


def _folded(leaves: Iterable[Value]) -> str:
    """`net.fc1` for its weight and bias."""
    names = [value.name or value.describe() for value in sorted(leaves, key=lambda value: value.index)]
    modules = list(dict.fromkeys(n.rpartition(".")[0] if n.endswith((".weight", ".bias")) else n for n in names))
    return ", ".join(modules[:5]) + (f" and {len(modules) - 5} more" if len(modules) > 5 else "")
