"""Where a whole gradient goes wrong though each operation is right by itself: the recorded gradients on the way are
held, one after the other, against those of the program run again in float64."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from kiem.inspect.graph.model import BackwardCall, Gradient, Graph, Step
from kiem.inspect.graph.stats import gradient
from kiem.inspect.verify.replay import CannotReplay, Replay, Tensors

ROUNDINGS = 256.0  # of a gradient on the way, relative to its norm


def where_it_arises(
    replay: Replay, call: BackwardCall, tensors: Tensors, roots: list, cotangents: list, unit: float
) -> str:
    """The first gradient in backward order that differs, in words: at which operation it arrived, and from where; empty
    if none of the recorded ones does. `tensors`: what the replay gave, with a graph."""
    graph = replay.graph
    seen = list(_seen(replay, call, tensors))
    if not seen:
        return ""
    due = torch.autograd.grad(roots, [tensor for _, _, tensor in seen], cotangents, allow_unused=True)
    for (step, position, tensor), grad in zip(seen, due, strict=True):
        got = step.into[position]
        if got is None:
            continue
        other = gradient(torch.zeros_like(tensor) if grad is None else grad.detach())
        if _differs(got, other, unit):
            assert step.op is not None  # or it would not be among those seen
            op = graph.op(step.op)
            senders = list(dict.fromkeys(_senders(graph, call, step, position)))
            sent = f", sent by {' and '.join(senders[:3])}" if senders else ""
            return (
                f"the first gradient that differs is the one of the result of {op.label} at {op.source}{sent}: what "
                "changed it (a hook, .data, .detach(), a change in place) is between these lines"
            )
    return ""


def _seen(replay: Replay, call: BackwardCall, tensors: Tensors) -> Iterator[tuple[Step, int, torch.Tensor]]:
    """Steps at which a gradient arrived, the position, and what it is the gradient of, in float64: of memory that
    nothing writes to later."""
    graph, there = replay.graph, {op.index for op in replay.ops}
    written = {graph.value(v).storage for op in replay.ops for v in op.mutates}
    for step in call.steps:
        for value in graph.op(step.op).outputs if step.op in there and step.op is not None else ():
            known = graph.value(value)
            position = known.output_nr or 0
            if known.storage in written or position >= len(step.into):
                continue
            with contextlib.suppress(CannotReplay):
                tensor = replay.find(value, tensors)
                if tensor.requires_grad:
                    yield step, position, tensor


def _differs(got: Gradient, due: Gradient, unit: float) -> bool:
    if got.sketch.shape != due.sketch.shape or got.stats.nonfinite or due.stats.nonfinite:
        return False
    off = float((got.sketch - due.sketch).abs().max()) if got.sketch.numel() else 0.0
    return off > ROUNDINGS * unit * max(got.stats.norm, due.stats.norm)


def _senders(graph: Graph, call: BackwardCall, step: Step, position: int) -> Iterator[str]:
    for other in call.steps:
        if (step.key[0], position) in other.edges and other.op is not None:
            op = graph.op(other.op)
            yield f"{op.label} at {op.source}"
