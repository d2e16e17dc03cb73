"""The whole way from the loss to each leaf, in float64: the gradient that the program got, against mathematics end to
end."""

from __future__ import annotations

import functools
import time
from collections.abc import Set

import torch

from kiem.inspect import rules
from kiem.inspect.graph.layouts import at_elements, elements, with_elements
from kiem.inspect.graph.model import BackwardCall, Graph
from kiem.inspect.verify.arises import where_it_arises
from kiem.inspect.verify.directions import meant_part
from kiem.inspect.verify.judge import (
    FINE,
    NOISE,
    ROUNDINGS,
    Evidence,
    InputVerdict,
    Noise,
    Random,
    inner,
    judge,
    repeats,
    usual_size,
)
from kiem.inspect.verify.jumps import NEARER, few_roundings, forgive_jumps
from kiem.inspect.verify.meant import module_hook, surrogate
from kiem.inspect.verify.numeric import NEAR, Derivative, derivative
from kiem.inspect.verify.replay import CannotReplay, Replay, Tensors, changes_what_has_a_gradient, leading_to, widen
from kiem.inspect.verify.slices import Slices

SECONDS = 20.0  # for numeric derivatives of single leaves; all of them together are always differentiated


class Unchecked(Exception):
    """Says why whole gradients could not be checked."""


def whole_verdicts(
    graph: Graph,
    call: BackwardCall,
    recorded: Tensors,
    leaves: Tensors,
    roots: dict[tuple, torch.Tensor],
    opaque: Set[int] = frozenset(),
    wrong: Set[int] = frozenset(),
) -> tuple[list[InputVerdict], list[str]]:
    """A verdict for each leaf that got a gradient in this call, and notes. `roots`: the gradient with which the call
    began, by key; `opaque`: operations of which not all of the inside was seen; `wrong`: those whose own gradient is.
    Raises Unchecked with the reason if the way cannot be run again."""
    inner = {step.leaf: step.key for step in call.handed if step.leaf is not None and step.key[0] != "leaf"}
    groups = [{leaf: g for leaf, g in leaves.items() if leaf not in inner}]
    groups += [{value: leaves[value]} for value in inner if value in leaves]
    try:
        verdicts: list[InputVerdict] = []
        notes: list[str] = []
        for group in groups if call.steps else []:
            if group:
                at = {inner[v]: v for v in group if v in inner}
                whole = _Whole(graph, call, recorded, group, roots, _begin(graph, call), opaque, wrong, at)
                found, said = whole.verdicts()
                verdicts, notes = verdicts + found, notes + said
        return verdicts, notes
    except Exception as reason:
        raise Unchecked(str(reason).splitlines()[0][:160] if str(reason) else type(reason).__name__) from reason


def _begin(graph: Graph, call: BackwardCall) -> int:
    """The first operation to run again: that of the first node, or what made, since the backward call before, memory
    that later ones write into (the buffer of a circular padding)."""
    first = min((step.op for step in call.steps if step.op is not None), default=0)
    before = max((c.after_op for c in graph.backwards if c.index < call.index and c.after_op <= first), default=0)
    written = {graph.value(v).storage for op in graph.ops_between(first, call.after_op) for v in op.mutates}
    makers = (v.producer for v in graph.values if written and v.storage in written and v.producer is not None)
    return min([first, *(maker for maker in makers if maker >= before)])


def unlike_numbers(graph: Graph, leaves: Tensors) -> list[InputVerdict]:
    """Verdicts for the leaves whose gradient is NaN or infinite, where that is all that is known."""
    found = []
    for leaf, grad in leaves.items():
        bad = ~torch.isfinite(elements(grad).abs())
        if bool(bad.any()):
            value = graph.value(leaf)
            result = InputVerdict(graph.title(leaf), leaf, "nonfinite", value.dtype, shape=value.shape)
            result.nonfinite, result.got = int(bad.sum()), elements(grad)[bad][0].item()
            found.append(result)
    return found


class _Whole:
    def __init__(self, graph, call, recorded, leaves, roots, start, opaque, wrong, at):
        self.graph, self.call, self.got, self.recorded, self.at = graph, call, leaves, recorded, at
        self.wrong = not wrong.isdisjoint(step.op for step in call.steps)  # of the operations on the way
        # What ran under no_grad is a constant.
        ran = (
            op for op in graph.ops_between(start, call.after_op)
            if op.grad_enabled or op.parent is not None or changes_what_has_a_gradient(graph, op)
        )  # fmt: skip
        self.ops = leading_to(graph, ran, call.roots)
        families = {op.parent for op in self.ops}
        for op in self.ops:
            if op.kind == "compiled" or op.index in opaque or (op.kind == "function" and op.index not in families):
                raise CannotReplay(f"what happens inside {op.name} at {op.source} was not recorded")
        self.closed = all(rules.find(op.name) is not None for op in self.ops if op.kind == "op" and op.edges)
        # The reference is torch's own derivative: no witness where one of the operations is wrong.
        self.closed = self.closed and wrong.isdisjoint(op.index for op in self.ops)
        self.replay = Replay(graph, self.ops, recorded, cut=True)
        self.shown: dict[int, int] = {}  # value that an operation read -> the leaf that it shows
        for op in self.ops:
            for (_, value), edge in zip(op.inputs, op.edges, strict=False):
                if edge and (edge[0] == "leaf" or edge in at):
                    self.shown[value] = at[edge] if edge in at else edge[1]
        held = (v for v, leaf in self.shown.items() if leaf in leaves and v in recorded)
        self.base = {v: elements(widen(recorded[v])) for v in held}
        self.first = {leaf: v for v, leaf in reversed(self.shown.items()) if v in self.base}
        self.leaves = {leaf: self.base[v] for leaf, v in self.first.items()}
        if not self.leaves:
            raise CannotReplay("what the leaves held was not kept")
        self.changes = any(op.mutates for op in self.ops)
        self.cotangents = self._cotangents(roots)
        self.random = Random(call.index)
        types = {graph.value(v).dtype for op in self.ops for v in op.outputs}
        units = {t: torch.finfo(t).eps for t in types if t.is_floating_point or t.is_complex}
        self.unit = max([2.0**-52, *units.values(), *(op.unit for op in self.ops)])
        # In a program of coarse and of fine types, by how much finer than the coarsest a type is.
        mixed = self.unit > FINE and not any(op.unit for op in self.ops)
        self.shares = {t: unit / self.unit for t, unit in units.items() if unit < self.unit} if mixed else {}
        self._reproduces()

    def _cotangents(self, roots) -> list[torch.Tensor]:
        found = []
        for key in self.call.root_keys:
            if key not in roots:
                raise CannotReplay("the gradient that it began with is not known")
            found.append(elements(widen(roots[key])))
        return found

    def value(self, moves: Tensors, noise=None) -> list[torch.Tensor]:
        """The roots as a function of what is added to the leaves, wherever each is read (it may have changed in
        between)."""
        given = {v: x if (leaf := self.shown[v]) not in moves else x + moves[leaf] for v, x in self.base.items()}
        if self.changes:
            given = {v: x.clone() for v, x in given.items()}
        if noise is not None:
            sizes = {v: noise.size(self.graph.value(v).dtype) for v in given}
            given = {v: x * (1 + sizes[v] * self.random.like(x)) for v, x in given.items()}
        self.tensors = self.replay.run({v: with_elements(self.recorded[v], x) for v, x in given.items()}, noise)
        return [elements(self.replay.find(v, self.tensors)) for v in self.call.roots]

    def _reproduces(self) -> None:
        with torch.no_grad():
            self.outputs = outputs = self.value({})
        for value, output in zip(self.call.roots, outputs, strict=True):
            stats = self.graph.value(value).stats
            norm = float(torch.linalg.vector_norm(output))
            least = torch.finfo(self.graph.value(value).dtype).tiny * output.numel()  # below it all is zero
            apart, unit = abs(norm - stats.norm), self.unit * (1e4 + len(self.ops))
            if not apart <= unit * max(norm, stats.norm) + least and not apart <= unit * self._rounding(value):
                raise CannotReplay(f"run again in float64 the loss is {norm:.6g}, in the program {stats.norm:.6g}")

    def _rounding(self, root: int) -> float:
        """By how much one rounding of everything moves a root, whose terms may cancel."""
        at = self.call.roots.index(root)
        with torch.no_grad():
            changes = [self.value({}, Noise(self.random))[at] - self.outputs[at] for _ in range(2)]
        return max(float(torch.linalg.vector_norm(change)) for change in changes) / NOISE

    def _near(self, unit: float, leaf: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradient of a leaf where all leaves are a few roundings off, and nearer on the same way."""
        ways = {leaf: few_roundings(x, unit, self.random) for leaf, x in self.leaves.items()}
        there, nearer = (self.gradients(at={k: far * way for k, way in ways.items()}) for far in (1.0, NEARER))
        return there[leaf], nearer[leaf]

    def _sides(self, leaf: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradient a little to both sides of what the leaf holds."""
        beside = 2.0**-20 * self._direction(leaf)
        return self.gradients(at={leaf: beside})[leaf], self.gradients(at={leaf: -beside})[leaf]

    def gradients(self, noise=None, at: Tensors | None = None) -> Tensors:
        """By torch, through the operations inside every custom Function, in float64."""
        moves = {
            leaf: (at[leaf].clone() if at and leaf in at else torch.zeros_like(x)).requires_grad_()
            for leaf, x in self.leaves.items()
        }
        with torch.enable_grad():
            roots = [(y, c) for y, c in zip(self.value(moves, noise), self.cotangents, strict=True) if y.requires_grad]
            if not roots:
                return {leaf: torch.zeros_like(x) for leaf, x in self.leaves.items()}
            grads = torch.autograd.grad(
                [y for y, _ in roots], list(moves.values()), [c for _, c in roots], allow_unused=True
            )
        return {
            leaf: torch.zeros_like(x) if g is None else at_elements(g, x)
            for (leaf, x), g in zip(moves.items(), grads, strict=True)
        }

    def _along(self, leaf: int, direction: torch.Tensor, nearer: bool = False) -> Derivative:
        return self.numeric({leaf: direction}, nearer)

    @functools.cached_property
    def _spread(self) -> float:
        """By how much one rounding of everything moves the sum of the roots: in between, terms may cancel (1 + erf)."""
        outputs = self.value({}, Noise(self.random))
        return (
            abs(sum(inner(c, y - at) for c, y, at in zip(self.cotangents, outputs, self.outputs, strict=True))) / NOISE
        )

    def numeric(self, directions: Tensors, nearer: bool = False) -> Derivative:
        """The derivative of the loss along directions of leaves."""

        def phi(e: float) -> float:
            outputs = self.value({leaf: e * d for leaf, d in directions.items()})
            return sum(inner(c, y) for c, y in zip(self.cotangents, outputs, strict=True))

        with torch.no_grad():
            size = sum(float((c * y).abs().sum()) for c, y in zip(self.cotangents, self.outputs, strict=True))
            size = max(size, self._spread)
            return derivative(phi, size, NEAR, tries=1) if nearer else derivative(phi, size, step=2.0**-10)

    def verdicts(self) -> tuple[list[InputVerdict], list[str]]:
        """Each leaf; first all of them along one direction, then each alone as long as there is time."""
        reference = self.gradients()
        slices = {leaf: Slices() for leaf in reference} if self.unit > FINE else {}
        rounded = self._moved(reference, Noise(self.random, self.shares), repeats(self.unit), slices)
        alike = self._moved(reference, Noise(self.random), repeats(FINE), {}) if self.shares else rounded
        directions = {leaf: self._direction(leaf) for leaf in self.leaves}
        joint = self.numeric(directions)
        total = sum(inner(reference[leaf], d) for leaf, d in directions.items())
        slack = 1e-6 * sum(abs(inner(reference[leaf], d)) for leaf, d in directions.items()) + 4 * joint.error
        certified = joint.low - slack <= total <= joint.high + slack
        terms = max((size for op in self.ops for v in op.outputs for size in self.graph.value(v).shape), default=1)
        meant = self._meant()
        results, notes, began = [], [], time.perf_counter()
        for leaf, first in self.first.items():
            value = self.graph.value(leaf)
            name = self.graph.title(leaf)
            result = InputVerdict(name, leaf, "ok", value.dtype, shape=value.shape, reference="end to end, in float64")
            unit = coarsest = max(self.unit, torch.finfo(value.dtype).eps)
            result.bound, moved = self._bound(coarsest, terms), rounded[leaf]
            if value.dtype in self.shares:
                # Finer than others: of these it has what comes over its way, and the rest as of its own type.
                unit = coarsest * self.shares[value.dtype]
                bound = self._bound(unit, terms)
                moved = alike[leaf] + moved * (coarsest * result.bound / (unit * bound))
                slices[leaf].scale(coarsest / unit)
                result.bound = bound
            if unit > self.unit and self._uses(leaf) == 1:  # coarser than all that is made of it: only what arrives is
                moved *= self.unit / unit  # rounded as coarsely as the leaf is, the way there is not
            single = time.perf_counter() - began < SECONDS
            number = self.numeric({leaf: directions[leaf]}) if single else joint
            along = directions[leaf]
            if not single:  # the joint derivative, less what the reference says of the others
                shift = total - inner(reference[leaf], along)
                number = type(joint)(joint.value - shift, joint.error, joint.low - shift, joint.high - shift)
            evidence = Evidence(
                got=at_elements(widen(self.got[leaf]), self.recorded[first]),
                reference=reference[leaf],
                moved=moved,
                unit=unit,
                direction=along,
                number=number,
                numeric=functools.partial(self._along, leaf),
                nearer=functools.partial(self._along, leaf, nearer=True),
                sides=functools.partial(self._sides, leaf),
                independent=self.closed,
                slices=slices.get(leaf),
                roundings=2 * ROUNDINGS,  # forward and backward
                coarsest=1.0,  # the sign and size of the whole; each operation was held to more
            )
            judge(result, evidence)
            if result.verdict == "wrong" and not result.nonfinite:
                forgive_jumps(result, evidence, functools.partial(self._near, coarsest, leaf))
            if result.nonfinite:
                result.verdict = "nonfinite"
                notes += self._due_instead(result, leaf, name)
            if leaf in meant and not result.nonfinite:
                result.verdict = "hook"
                notes.append(f"{name}: {meant[leaf]}")
            elif value.hooks:
                notes.append(f"{name}: a hook runs on its gradient ({', '.join(value.hooks)})")
            results.append(result)
        wrong = [result for result in results if result.verdict == "wrong"]
        if wrong and not self.wrong and (place := self._arises()):
            notes.append(f"{wrong[0].argument}: {place}.")
        if not certified and not any(r.verdict == "wrong" for r in results):
            notes.append(
                "End to end, the numeric derivative did not settle; elements were compared with torch in float64 only."
            )
        return results, notes

    def _uses(self, leaf: int) -> int:
        return sum(edge == ("leaf", leaf) for op in self.ops for edge in op.edges)

    def _due_instead(self, result: InputVerdict, leaf: int, name: str) -> list[str]:
        """What the derivative is where the program got NaN or infinity: that element is moved alone. Nothing is said
        where the loss itself is not finite, or infinitely steep."""
        if result.element is None:
            return []
        way = torch.zeros_like(self.leaves[leaf])
        way[result.element] = size = usual_size(self.leaves[leaf])
        number = self.numeric({leaf: way})
        if not number.error <= 1e-3 * max(abs(number.value), abs(number.high - number.low), size):
            return []
        place = f"{name}[{', '.join(map(str, result.element))}]" if result.element else name
        if number.kink:
            due = f"{number.low / size:.6g} from one side and {number.high / size:.6g} from the other"
        else:
            result.expected = number.value / size
            due = f"{result.expected:.6g}"
        return [f"The gradient of {place} is {result.got}; moved by itself, the derivative is {due}."]

    def _arises(self) -> str:
        """Between which operations the difference arises."""
        moves = {leaf: torch.zeros_like(x).requires_grad_() for leaf, x in self.leaves.items()}
        with torch.enable_grad():
            pairs = [(y, c) for y, c in zip(self.value(moves), self.cotangents, strict=True) if y.requires_grad]
            ways = [y for y, _ in pairs], [c for _, c in pairs]
            return where_it_arises(self.replay, self.call, self.tensors, *ways, self.unit) if pairs else ""

    def _moved(self, reference: Tensors, noise: Noise, times: int, slices: dict[int, Slices]) -> Tensors:
        """How far one rounding of everything moves each element, in units of it, and the sums over `slices`."""
        squares = {leaf: torch.zeros_like(x, dtype=torch.float64) for leaf, x in reference.items()}
        for _ in range(times):
            for leaf, other in self.gradients(noise).items():
                change = other - reference[leaf]
                squares[leaf] += (change.abs() / NOISE).square() / times
                if leaf in slices:
                    slices[leaf].add(reference[leaf], change, 1 / (times * NOISE**2))
        return {leaf: square.sqrt() for leaf, square in squares.items()}

    def _bound(self, unit: float, terms: int) -> float:
        """Roundings, of sums in the type itself; where sums are kept in a finer one, what all operations round."""
        sums = 4 * terms**0.5
        return 8 + min(sums, 2 * len(self.ops) ** 0.5 + sums * min(unit, 2.0**-23) / unit)

    def _direction(self, leaf: int) -> torch.Tensor:
        x = self.leaves[leaf]
        direction = self.random.like(x) * usual_size(x)
        for op in self.ops:
            for name, value in op.inputs:
                if self.shown.get(value) == leaf:
                    direction = meant_part(op, name, x, direction)
        return direction

    def _meant(self) -> dict[int, str]:
        """Leaves whose gradient is not meant to be the derivative: a hook is on its way, or a Function that says so."""
        steps = {step.key: step for step in self.call.steps}
        found: dict[int, str] = {}
        for start in (*self.call.steps, *self.call.handed):
            op = None if start.op is None else self.graph.op(start.op)
            if start.changed_by_hook:
                of = [start.leaf] if start.leaf is not None else op.outputs if op else ()
                lines = [line for v in of for line in self.graph.value(v).hooks]
                what = f"a hook changes its gradient ({', '.join(lines) or f'on {start.node}'})"
            elif op is not None and (changed := module_hook(op, start)):
                what = changed
            elif op is not None and surrogate(op):
                what = f"{op.name} at {op.source} says that its backward is no derivative"
            else:
                continue
            if start.leaf is not None:
                found.setdefault(start.leaf, what)
            waiting, been = [start], set()
            while waiting:
                step = waiting.pop()
                for edge in step.edges:
                    if edge is not None and edge in self.at:
                        found.setdefault(self.at[edge], what)
                    if edge is not None and edge[0] == "leaf":
                        found.setdefault(edge[1], what)
                    elif edge is not None and edge[:1] not in been and edge[:1] in steps:
                        been.add(edge[:1])
                        waiting.append(steps[edge[:1]])
        return found
