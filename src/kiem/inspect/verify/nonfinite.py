"""Where a NaN or an infinity comes from: the first operation that made it of what was finite, forward or backward."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from kiem.inspect.graph.model import BackwardCall, Gradient, Graph, Op, Value
from kiem.inspect.verify.operation import Verdict
from kiem.inspect.verify.replay import Tensors


def nonfinite(of: Gradient | Value | None) -> bool:
    """Whether a gradient or value had elements that are not finite."""
    return of is not None and of.stats is not None and of.stats.nonfinite > 0


def forward_verdict(graph: Graph, call: BackwardCall, values: list[int], held: Tensors, what: str) -> Verdict:
    """On values that are not finite: the operation that made them so, or the tensor from outside that was."""
    kind = "NaN" if any(_has_nan(graph, v, held) for v in values) else "infinite"
    op, outside = origin(graph, values, held, nan=kind == "NaN")
    if op is None:
        last = graph.value(values[0]).producer
        text = (
            f"{what} is {kind}, as {graph.title(outside)} already was" if outside is not None else f"{what} is {kind}"
        )
        return Verdict(-1 if last is None else last, "nonfinite", text, backward=call.index)
    return Verdict(
        op.index, "nonfinite", f"{what} is {kind}: {op.label} at {op.source} made it so", backward=call.index
    )


def backward_text(graph: Graph, op: Op, call: BackwardCall, held: Tensors) -> str:
    """Why an operation may have made a gradient that is not finite of a finite one."""
    bad = [v for v in (*(v for _, v in op.inputs), *op.outputs) if nonfinite(graph.value(v))]
    text = f"the backward of {op.label} at {op.source} makes NaN or infinity of a finite gradient"
    if not bad:
        return text
    made, outside = origin(graph, bad, held, nan=any(_has_nan(graph, v, held) for v in bad))
    kind = "NaN" if any(_has_nan(graph, v, held) for v in bad) else "infinite"
    if made is op:
        return f"{text}: its result is {kind} in places, and 0 times that is NaN"
    if made is not None:
        return f"{text}: it works with numbers that are {kind} since {made.label} at {made.source}"
    return text if outside is None else f"{text}: {graph.title(outside)} is {kind} in places"


def origin(graph: Graph, values: Iterable[int], held: Tensors, nan: bool) -> tuple[Op | None, int | None]:
    """Of what values depend on: the first operation that gave what is not finite (NaN, if `nan`) of inputs that were,
    else a value from outside that was not."""

    def bad(value: int) -> bool:
        return nonfinite(graph.value(value)) and (not nan or _has_nan(graph, value, held))

    first: Op | None = None
    outside: int | None = None
    for value in _before(graph, values):
        known = graph.value(value)
        if not bad(value):
            continue
        if known.producer is None:
            outside = value if known.base is None else outside
            continue
        op = graph.op(known.producer)
        if "empty" in op.label:
            continue  # memory in which nothing was written yet
        fresh = not any(bad(v) for _, v in op.inputs)
        if fresh and (first is None or op.index < first.index):
            first = op
    return first, outside


def _before(graph: Graph, values: Iterable[int]) -> Iterator[int]:
    waiting, been = list(values), set(values)
    while waiting:
        value = waiting.pop()
        yield value
        known = graph.value(value)
        sources = [] if known.producer is None else [v for _, v in graph.op(known.producer).inputs]
        for other in (*sources, *([] if known.base is None else [known.base])):
            if other not in been:
                been.add(other)
                waiting.append(other)


def _has_nan(graph: Graph, value: int, held: Tensors) -> bool:
    """Of a value that is not finite; where nobody knows, it is taken for NaN."""
    if value in held:
        return bool(torch.isnan(held[value]).any())
    data = graph.value(value).data
    return data is None or any(isinstance(x, float) and math.isnan(x) for x in _numbers(data))


def _numbers(data: Any) -> Iterator[Any]:
    if isinstance(data, list):
        for part in data:
            yield from _numbers(part)
    else:
        yield data
