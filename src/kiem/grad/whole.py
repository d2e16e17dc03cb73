"""The whole way from the loss to each leaf, in float64: the gradient that the program got, against mathematics end to
end."""

from __future__ import annotations

import time

import torch

from kiem.grad.graph import BackwardCall, Graph
from kiem.grad.judge import NOISE, REPEATS, InputVerdict, Random, inner, judge
from kiem.grad.numeric import derivative
from kiem.grad.replay import CannotReplay, Replay, Tensors, leading_to, widen

SECONDS = 20.0  # for numeric derivatives of single leaves; all of them together are always differentiated


def whole_verdicts(
    graph: Graph, call: BackwardCall, recorded: Tensors, leaves: Tensors, roots: dict[tuple, torch.Tensor]
) -> tuple[list[InputVerdict], list[str]]:
    """A verdict for each leaf that got a gradient in this call, and notes on what was not checked. `roots`: the
    gradient with which the call began, by key."""
    if not leaves:
        return [], []
    reached = [step.op for step in call.steps if step.op is not None]
    try:
        return _Whole(graph, call, recorded, leaves, roots, min(reached, default=0)).verdicts()
    except (CannotReplay, RuntimeError, NotImplementedError) as reason:
        text = str(reason).splitlines()[0][:160]
        return [], [f"End to end not checked for the backward call at {call.source}: {text}"]


class _Whole:
    def __init__(self, graph, call, recorded, leaves, roots, start):
        self.graph, self.call, self.got = graph, call, leaves
        # What ran under no_grad is a constant.
        ran = (op for op in graph.ops[start : call.after_op] if op.grad_enabled or op.parent is not None)
        self.ops = leading_to(graph, ran, call.roots)
        self.replay = Replay(graph, self.ops, recorded, cut=True)
        self.shown: dict[int, int] = {}  # value that an operation read -> the leaf that it shows
        for op in self.ops:
            for (_, value), edge in zip(op.inputs, op.edges, strict=False):
                if edge and edge[0] == "leaf":
                    self.shown[value] = edge[1]
        self.base = {v: widen(recorded[v]) for v, leaf in self.shown.items() if leaf in leaves and v in recorded}
        first = {leaf: v for v, leaf in reversed(self.shown.items()) if v in self.base}
        self.leaves = {leaf: self.base[v] for leaf, v in first.items()}
        if not self.leaves:
            raise CannotReplay("what the leaves held was not kept")
        self.changes = any(op.mutates for op in self.ops)
        self.cotangents = self._cotangents(roots)
        self.random = Random(call.index)
        types = {graph.values[v].dtype for op in self.ops for v in op.outputs}
        self.unit = max((torch.finfo(t).eps for t in types if t.is_floating_point), default=2.0**-52)
        self._reproduces()

    def _cotangents(self, roots) -> list[torch.Tensor]:
        found = []
        for key in self.call.root_keys:
            if key not in roots:
                raise CannotReplay("the gradient that it began with is not known")
            found.append(widen(roots[key]))
        return found

    def value(self, moves: Tensors, noise=None) -> list[torch.Tensor]:
        """The roots as a function of what is added to the leaves, wherever each is read (it may have changed in
        between)."""
        given = {v: x if (leaf := self.shown[v]) not in moves else x + moves[leaf] for v, x in self.base.items()}
        if self.changes:
            given = {v: x.clone() for v, x in given.items()}
        if noise is not None:
            given = {v: self._shake(x) for v, x in given.items()}
        tensors = self.replay.run(given, noise)
        return [self.replay.find(v, tensors) for v in self.call.roots]

    def _reproduces(self) -> None:
        with torch.no_grad():
            self.outputs = outputs = self.value({})
        for value, output in zip(self.call.roots, outputs, strict=True):
            stats = self.graph.values[value].stats
            norm = float(torch.linalg.vector_norm(output))
            if not abs(norm - stats.norm) <= self.unit * (1e4 + len(self.ops)) * max(norm, stats.norm):
                raise CannotReplay(f"run again in float64 the loss is {norm:.6g}, in the program {stats.norm:.6g}")

    def _sides(self, leaf: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradient a little to both sides of what the leaf holds."""
        beside = 2.0**-20 * self._direction(self.leaves[leaf])
        return self.gradients(at={leaf: beside})[leaf], self.gradients(at={leaf: -beside})[leaf]

    def gradients(self, noise=None, at: Tensors | None = None) -> Tensors:
        """By torch, through the operations inside every custom Function, in float64."""
        moves = {
            leaf: (at[leaf].clone() if at and leaf in at else torch.zeros_like(x)).requires_grad_()
            for leaf, x in self.leaves.items()
        }
        with torch.enable_grad():
            grads = torch.autograd.grad(
                self.value(moves, noise), list(moves.values()), self.cotangents, allow_unused=True
            )
        return {
            leaf: torch.zeros_like(self.leaves[leaf]) if g is None else g for leaf, g in zip(moves, grads, strict=True)
        }

    def _shake(self, x: torch.Tensor) -> torch.Tensor:
        return x * (1 + NOISE * self.random.like(x))

    def _shake_saved(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point():
            tensor.data.copy_(self.random.shaken(tensor.data))
        return tensor

    def numeric(self, directions: Tensors):
        """The derivative of the loss along directions of leaves."""

        def phi(e: float) -> float:
            outputs = self.value({leaf: e * d for leaf, d in directions.items()})
            return sum(inner(c, y) for c, y in zip(self.cotangents, outputs, strict=True))

        with torch.no_grad():
            size = sum(float((c * y).abs().sum()) for c, y in zip(self.cotangents, self.outputs, strict=True))
            return derivative(phi, size, step=2.0**-10)

    def verdicts(self) -> tuple[list[InputVerdict], list[str]]:
        """Each leaf; first all of them along one direction, then each alone as long as there is time."""
        reference = self.gradients()
        squares = {leaf: torch.zeros_like(x) for leaf, x in reference.items()}
        for _ in range(REPEATS):
            for leaf, other in self.gradients(self._shake_saved).items():
                squares[leaf] += ((other - reference[leaf]) / NOISE).square() / REPEATS
        directions = {leaf: self._direction(x) for leaf, x in self.leaves.items()}
        joint = self.numeric(directions)
        total = sum(inner(reference[leaf], d) for leaf, d in directions.items())
        slack = 1e-6 * sum(abs(inner(reference[leaf], d)) for leaf, d in directions.items()) + 4 * joint.error
        certified = joint.low - slack <= total <= joint.high + slack
        terms = max((size for op in self.ops for v in op.outputs for size in self.graph.values[v].shape), default=1)
        hooked = {step.leaf for step in self.call.steps if step.changed_by_hook}
        results, notes, began = [], [], time.perf_counter()
        for leaf in self.leaves:
            value = self.graph.values[leaf]
            name = self.graph.title(leaf)
            result = InputVerdict(name, leaf, "ok", value.dtype, shape=value.shape, reference="end to end, in float64")
            result.bound = 8 + 4 * terms**0.5
            moved = squares[leaf].sqrt()
            single = time.perf_counter() - began < SECONDS
            number = self.numeric({leaf: directions[leaf]}) if single else joint
            along = directions[leaf]
            if not single:  # the joint derivative, less what the reference says of the others
                shift = total - inner(reference[leaf], along)
                number = type(joint)(joint.value - shift, joint.error, joint.low - shift, joint.high - shift)
            judge(
                result,
                widen(self.got[leaf]),
                reference[leaf],
                moved,
                self.unit,
                along,
                number,
                lambda there, leaf=leaf: self.numeric({leaf: there}),
                lambda leaf=leaf: self._sides(leaf),
            )
            if leaf in hooked:
                result.verdict = "hook"
                notes.append(f"{name}: a hook changes its gradient ({', '.join(value.hooks) or 'of a node'})")
            results.append(result)
        if not certified and not any(r.verdict == "wrong" for r in results):
            notes.append(
                "End to end, the numeric derivative did not settle; elements were compared with torch in float64 only."
            )
        notes += self._cut()
        return results, notes

    def _direction(self, x: torch.Tensor) -> torch.Tensor:
        scale = float(x.square().mean().sqrt()) if x.numel() else 1.0
        return self.random.like(x) * (scale or 1.0)

    def _cut(self) -> list[str]:
        """Leaves that also reach the loss where no gradient flows: a choice, so said and not judged."""
        storages = {self.graph.values[leaf].storage: leaf for leaf in self.leaves}
        notes = []
        for op in self.ops:
            if op.label == "detach" and op.parent is None and self.graph.values[op.inputs[0][1]].storage in storages:
                leaf = storages[self.graph.values[op.inputs[0][1]].storage]
                notes.append(f"{self.graph.title(leaf)} is also used without gradient: detached at {op.source}")
        return notes
