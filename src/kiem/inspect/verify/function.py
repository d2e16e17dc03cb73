"""A recorded operation, or a custom Function with all that it ran, as a function of its inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from kiem.inspect.graph.layouts import elements, with_elements
from kiem.inspect.graph.model import Graph, Op
from kiem.inspect.graph.schema import flatten
from kiem.inspect.verify.replay import CannotReplay, Replay, Tensors, is_torchs, leading_to, with_tensors


def differentiable(tensor: Tensor) -> bool:
    """Whether its elements can have a derivative."""
    return tensor.is_floating_point() or tensor.is_complex()


class Function:
    """A recorded operation as a function of its inputs, by value: its operations again, in float64 if `wide`.
    `called`: the custom Function itself is called again, in its own types: for what is compiled, or computes where
    nobody looks on."""

    def __init__(self, graph: Graph, op: Op, recorded: Tensors, on_base: bool, wide: bool = True, called: bool = False):
        self.graph, self.op, self.recorded, self.on_base, self.called = graph, op, recorded, on_base, called
        self.ops = [op] if op.kind == "op" else leading_to(graph, graph.inside(op), op.outputs)
        self.changes = any(o.mutates for o in self.ops)
        if op.kind != "op" and not called and not self.ops:
            raise CannotReplay("nothing of its inside was recorded")
        self._replay = Replay(graph, self.ops, recorded, cut=False, wide=wide)

    @property
    def hidden(self) -> bool:
        """Whether a kernel that is not torch's own computes inside."""
        return any(o.kind == "op" and not is_torchs(o) for o in self.ops)

    def __call__(self, given: Tensors, noise=None) -> list[Tensor]:
        """The elements of its outputs, from those of its inputs (layouts.py)."""
        return [elements(y) for y in self.outputs(given, noise)]

    def outputs(self, given: Tensors, noise=None) -> list[Tensor]:
        """Its outputs as they are laid out, from the elements of its inputs."""
        given = {v: with_elements(self.recorded[v], t) for v, t in given.items()}
        given = {v: t.clone() for v, t in given.items()} if self.changes or self.called else dict(given)
        if self.called:
            assert self.op.call is not None  # or it would not be called
            function, args, _ = self.op.call
            return list(flatten(function.apply(*with_tensors(args, self.recorded | given, wide=False))))
        if self.on_base:
            assert self.op.base is not None
            whole, view = self.graph.value(self.op.base), self.graph.value(self.op.inputs[0][1])
            base = self._in_order(given[self.op.base], whole.strides)
            given[self.op.inputs[0][1]] = base.as_strided(view.shape, view.strides, view.offset - whole.offset)
            self._replay.run(given, None)
            return [base]
        tensors = self._replay.run(given, noise)
        return [self._output(v, tensors) for v in self.op.outputs]

    @staticmethod
    def _in_order(base: Tensor, strides: tuple[int, ...]) -> Tensor:
        """A tensor in the program's order in memory: what was computed from its elements may have another."""
        if base.stride() == strides:
            return base
        return torch.empty_strided(base.shape, strides, dtype=base.dtype, device=base.device).copy_(base)

    def _output(self, value: int, tensors: Tensors) -> Tensor:
        """An output; one that is there for torch's backward only and is not given again, as zeros."""
        known = self.graph.value(value)
        if value not in tensors and not (known.dtype.is_floating_point or known.dtype.is_complex):
            return torch.zeros(known.shape, dtype=known.dtype)
        return self._replay.find(value, tensors)
