"""One operation: is what autograd gave the derivative? Three answers are held against each other.

(a) what the backward of the program gave, on its own data, in its own type; (b) the numeric derivative along a random
direction, in float64 (numeric.py): it knows nothing but the forward operation; (c) an independent rule, in float64:
our table, or, for a custom Function, torch's derivatives of the operations inside it. It is
    believed only after (b) agrees with it, and then shows which element is wrong.

How far (a) may be from (c) is said in judge.py."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kiem.inspect import rules
from kiem.inspect.graph.layouts import at_elements, can_be_written_out, elements, regular, with_elements, written_out
from kiem.inspect.graph.model import BackwardCall, Graph, Op, Step
from kiem.inspect.graph.stats import statistics
from kiem.inspect.verify.directions import along_gradient, direction, numbers, structured
from kiem.inspect.verify.function import Function, differentiable
from kiem.inspect.verify.judge import FINE, NOISE, Evidence, InputVerdict, Noise, Random, inner, judge, repeats
from kiem.inspect.verify.jumps import NEARER, few_roundings, forgive_jumps
from kiem.inspect.verify.meant import module_hook, surrogate
from kiem.inspect.verify.numeric import NEAR, Derivative, derivative, noisy_derivative
from kiem.inspect.verify.precision import roundings
from kiem.inspect.verify.replay import CannotReplay, Tensors, widen
from kiem.inspect.verify.slices import Slices
from kiem.inspect.verify.ties import chooses, compares_as_given, judge_together

FEW = 32  # elements of which each is moved alone, where there is no reference
MORE = 15  # random directions more, where nothing but numbers speaks of a coarse type


@dataclass(slots=True)
class Verdict:
    """Of one operation: ok, wrong, nonfinite (a gradient is NaN or infinite), kink (right where there is a derivative),
    zero (no gradient arrived), hook (a module's hook changed it), coarse (checked, but an error of a fifth would not
    have shown), unchecked. `declared`: unchecked because the program says that its backward is no derivative.
    `opaque`: called again as a whole, as not all of its inside was seen."""

    op: int
    verdict: str
    text: str = ""
    inputs: list[InputVerdict] = field(default_factory=list)
    closed_form: bool = False
    backward: int = 0
    declared: bool = False
    opaque: bool = False


def check(graph: Graph, call: BackwardCall, op: Op, step: Step, recorded: Tensors, into: tuple, out: tuple) -> Verdict:
    """Hold one node of a backward call against mathematics. `into`, `out`: its real gradients."""
    if not any(edge is not None for edge in step.edges):
        return Verdict(op.index, "zero", "none of its inputs has a gradient")
    if changed := module_hook(op, step):
        return Verdict(op.index, "hook", changed)
    if surrogate(op):
        text = "it says that its backward is no derivative (surrogate_gradient)"
        return Verdict(op.index, "unchecked", text, declared=True)
    try:
        return _Check(graph, call, op, step, recorded, into, out).verdict()
    except CannotReplay as reason:
        return Verdict(
            op.index, "unchecked", f"could not be run again: {reason}", closed_form=rules.find(op.name) is not None
        )


class _Check:
    def __init__(self, graph, call, op, step, recorded, into, out):
        self.call = call
        self.graph, self.op, self.recorded = graph, op, recorded
        self.on_base = step.node.endswith("CopySlices") and op.base is not None
        self.rule = None if self.on_base or op.kind != "op" else rules.find(op.name)
        self.random, self.chooses = Random(op.index), chooses(op)
        if any(value not in recorded for value in self._needed()):
            raise CannotReplay("its inputs were not kept")
        self.got, self.names = self._gradients(step, out)
        if not self.got:
            raise CannotReplay("its gradients could not be matched with its inputs")
        laid_out = self._run_again(into)
        if not all(map(regular, laid_out)) or not all(map(can_be_written_out, map(recorded.get, self._needed()))):
            self.rule = None  # the table speaks of tensors that are written out

    def _needed(self) -> list[int]:
        return [v for _, v in self.op.inputs] + ([self.op.base] if self.on_base else [])

    def _run_again(self, into: tuple) -> list[Tensor]:
        """In float64 if that can be, else in its own types; what it gives, laid out, must be what it gave."""
        ways = [(True, False), (False, self.op.kind != "op")]
        for wide, called in ways[1:] if self.op.kind == "compiled" else ways:
            self.wide = wide
            try:
                self.inputs: Tensors = {
                    v: elements(widen(self.recorded[v]) if self.wide else self.recorded[v].clone())
                    for v in self._needed()
                }
                with torch.no_grad():
                    self.function = Function(self.graph, self.op, self.recorded, self.on_base, self.wide, called)
                    laid_out = self.function.outputs(self.inputs)
                    self.outputs = [elements(y) for y in laid_out]
                self._reproduces()
                if self.op.kind == "function" and not called:
                    self._faithful()
                break
            except (RuntimeError, NotImplementedError, TypeError, CannotReplay) as reason:
                failed = reason
        else:
            raise failed if isinstance(failed, CannotReplay) else CannotReplay(str(failed).splitlines()[0][:160])
        arrived = [
            None if g is None or not differentiable(y) else at_elements(widen(g).to(y.device), y)
            for y, g in zip(laid_out, self._arrived(into), strict=True)
        ]
        # Backward is linear: what is finite of what it gave owes nothing to what arrived as NaN or infinite.
        self.nonfinite_arrived = any(g is not None and not torch.isfinite(g.abs()).all() for g in arrived)
        self.cotangents = [
            torch.where(torch.isfinite(g.abs()), g, 0.0) if g is not None and self.nonfinite_arrived else g
            for g in arrived
        ]
        self.nonfinite_made = any(not torch.isfinite(y.abs()).all() for y in self.outputs if differentiable(y))
        return laid_out

    def _arrived(self, into: tuple) -> list[Tensor | None]:
        """The gradient that arrived at each output: a node numbers only those outputs that autograd differentiates."""
        if self.on_base:
            return [into[0]]
        numbers = [self.graph.value(v).output_nr for v in self.op.outputs]
        if any(gradient is not None and n not in numbers for n, gradient in enumerate(into)):
            numbers = list(range(len(numbers)))  # sent through what was not recorded
        return [None if n is None or n >= len(into) else into[n] for n in numbers]

    def _gradients(self, step: Step, out: tuple) -> tuple[dict[int, Tensor | None], dict[int, str]]:
        """The gradient of each input value; of a value that comes in twice, the sum."""
        positions = list(self.op.inputs)
        if self.on_base:
            assert self.op.base is not None
            positions = [("self", self.op.base), *positions[1:]]
        edges, used = list(self.op.edges), set()
        got: dict[int, Tensor | None] = {}
        names: dict[int, str] = {}
        for number, (edge, grad) in enumerate(zip(step.edges, out, strict=False)):
            if edge is None:
                continue
            match: int | None = 0
            if not (self.on_base and number == 0):
                match = next((j for j, e in enumerate(edges) if e == edge and j not in used), None)
            if match is None or (grad is None and self.call.partial):
                continue  # autograd.grad asks only for what leads to its inputs
            used.add(match)
            name, value = positions[match]
            names[value] = f"{names[value]}, {name}" if value in names else name
            grad = None if grad is None else at_elements(widen(grad), self.recorded[value])
            before = got.get(value)
            got[value] = grad if before is None else before if grad is None else before + grad
        return got, names

    def _reproduces(self) -> None:
        """Running it again must give what it gave, or what follows would be about another function."""
        for value, output in zip(self.op.outputs, self.outputs, strict=False):
            stats = None if self.on_base else self.graph.value(value).stats
            if stats is None or not output.is_floating_point() or stats.nonfinite:
                continue
            norm = statistics(output.detach()).norm
            allowed = (self._unit() * (64 + output.numel() ** 0.5)) * max(norm, stats.norm)
            if not abs(norm - stats.norm) <= allowed + 1e-30:
                raise CannotReplay(f"run again it gives a result of norm {norm:.6g}, the program had {stats.norm:.6g}")

    def _faithful(self) -> None:
        """A Function that computes with a kernel of its own, or in numpy, shows only part of its inside: where that may
        be so, it is called again on other inputs, and what was recorded must give what it gives."""
        values, ops, inside_ = self.graph, self.function.ops, {o.index for o in self.function.ops}
        first = min((v for o in ops for v in o.outputs), default=0)
        read = {v for o in ops for _, v in o.inputs} - set(self._needed())
        unseen = any(values.value(v).producer not in inside_ and v >= first for v in read)
        drawn = any(o.random for o in self.graph.inside(self.op))  # it would draw other numbers
        if drawn or (not unseen and not any("empty" in o.label for o in ops)):
            return
        moved = {
            v: x + 2.0**-3 * self.random.like(x) * x.abs().mean() if x.is_floating_point() else x
            for v, x in ((v, elements(self.recorded[v].clone())) for v in self._needed())
        }
        with torch.no_grad():
            called = Function(self.graph, self.op, self.recorded, self.on_base, wide=False, called=True)(moved)
            replayed = Function(self.graph, self.op, self.recorded, self.on_base, wide=False)(moved)
        for there, here, before in zip(called, replayed, self.outputs, strict=True):
            if not there.is_floating_point():
                continue
            there, here = widen(there), widen(here)
            change = torch.linalg.vector_norm(there - widen(before))
            if not torch.linalg.vector_norm(there - here) <= 0.5 * change + self._unit() * torch.linalg.vector_norm(
                there
            ):
                raise CannotReplay("part of its inside is computed where it cannot be seen")

    def _unit(self) -> float:
        """The coarsest precision in which it computed."""
        family = self.function.ops if self.op.kind != "op" else [self.op]
        types = {self.graph.value(v).dtype for o in [self.op, *family] for v in (*o.outputs, *(v for _, v in o.inputs))}
        units = [torch.finfo(t).eps for t in types if t.is_floating_point or t.is_complex]
        return max([2**-52, *units, *(o.unit for o in family)])

    # -- (b) -----------------------------------------------------------------------------------------------------------

    def direction(self, value: int) -> Tensor:
        """Random, of the size of the input."""
        return direction(self.op, self.names.get(value, ""), self.inputs[value], self.random)

    def numeric(self, directions: Tensors, nearer: bool = False) -> Derivative:
        """The derivative of Σ g·y along directions of some inputs."""

        if self._only_moves():  # linear: f(x + v) - f(x) = f(v)
            along = self._weighed(self.function(self.inputs | directions))
            return Derivative(along, 1e-14 * abs(along), along, along)

        def phi(e: float) -> float:
            moved = self.inputs | {v: torch.add(self.inputs[v], d, alpha=e) for v, d in directions.items()}
            return self._weighed([widen(y) for y in self.function(moved)])

        with torch.no_grad():
            if not self.wide and self._unit() > FINE:
                return noisy_derivative(phi)
            # What a kernel of somebody's gives as zero may be what terms of any size have canceled down to.
            least = 1.0 if self.function.hidden else 0.0
            size = self._weighed([torch.where(y == 0, least, y.abs()) for y in self.outputs], absolute=True)
            if nearer:
                return derivative(phi, size, NEAR, tries=1)
            return derivative(phi, size) if self.wide else derivative(phi, size, 2.0**-3, self._unit() / 2, tries=2)

    def _weighed(self, outputs: list[Tensor], absolute: bool = False) -> float:
        """Σ g·y, of real parts. An output that is not finite counts only where a gradient arrived for it."""
        total = 0.0
        for g, y in zip(self.cotangents, outputs, strict=True):
            if g is None:
                continue
            y = torch.where(g == 0, 0.0, y) if self.nonfinite_made else y
            total += float((g.abs() * y).sum()) if absolute else inner(g, y)
        return total

    def _more(self, value: int) -> list[tuple[Tensor, Derivative]]:
        """Numbers along more random directions, in coarse types."""
        if not self.wide or self._unit() <= FINE:
            return []
        return numbers([self.direction(value) for _ in range(MORE)], lambda way: self.numeric({value: way}))

    def _others(self, value: int, got: Tensor) -> list[tuple[Tensor, Derivative]]:
        """Numbers along the gradient itself and along parts of it, where one along a random direction is no sharp
        judge."""
        if self.wide and self._unit() <= FINE:
            return []
        x = self.inputs[value]
        ways = along_gradient(self.op, self.names.get(value, ""), x, got.to(x.device), parts=self.wide)
        return numbers(ways, lambda way: self.numeric({value: way}))

    def _by_elements(self, value: int) -> Tensor | None:
        """The gradient of an input of few elements, each moved alone; None if one of the derivatives did not settle."""
        x, unit = self.inputs[value], self._unit()
        if not self.wide or unit <= FINE or not 0 < x.numel() <= FEW or x.is_complex():
            return None
        found = torch.zeros_like(x)
        size = direction(self.op, self.names.get(value, ""), x, self.random).abs().max()
        for i in range(x.numel()):
            way = torch.zeros_like(x)
            way.view(-1)[i] = size
            number = self.numeric({value: way})
            if number.kink or not number.error <= 1e-3 * unit * abs(number.value) + 1e-12:
                return None
            found.view(-1)[i] = number.value / size
        return found

    # -- (c) -----------------------------------------------------------------------------------------------------------

    def _sides(self, value: int) -> tuple[Tensor, Tensor]:
        """The rule a little to both sides of the input."""
        beside = 2.0**-20 * self.direction(value)
        both = [self.references(False, self.inputs | {value: self.inputs[value] + s * beside})[value] for s in (1, -1)]
        return both[0], both[1]

    def references(self, noise: bool, inputs: Tensors | None = None) -> dict[int, Tensor]:
        """The gradient of each input by the rule, or by torch's derivatives of the operations inside."""
        moved = noise or inputs is not None
        inputs, cotangents = inputs or self.inputs, self.cotangents
        if noise:
            inputs = {v: self._shake(t) if v in self.got and not self.chooses else t for v, t in inputs.items()}
            cotangents = [None if g is None else self._shake(g) for g in cotangents]
        if self.rule is not None:
            return self._by_rule(inputs, cotangents, moved, noise)
        leaves = {
            v: t.clone().requires_grad_() if v in self.got and differentiable(t) else t for v, t in inputs.items()
        }
        with torch.enable_grad():
            outputs = self.function(leaves, Noise(self.random) if noise else None)
            pairs = [(y, g) for y, g in zip(outputs, cotangents, strict=True) if g is not None and y.requires_grad]
            wanted = [v for v in self.got if leaves[v].requires_grad]
            if not pairs:
                return {v: torch.zeros_like(self.inputs[v]) for v in self.got}
            grads = torch.autograd.grad(
                [y for y, _ in pairs], [leaves[v] for v in wanted], [g for _, g in pairs], allow_unused=True
            )
        return {
            v: torch.zeros_like(leaves[v]) if g is None else at_elements(g, leaves[v])
            for v, g in zip(wanted, grads, strict=True)
        }

    def _by_rule(self, inputs: Tensors, cotangents: list, moved: bool, noise: bool) -> dict[int, Tensor]:
        with torch.no_grad():
            outputs = self.function(inputs) if moved and self.wide else self.outputs
            inputs, outputs = {v: widen(x) for v, x in inputs.items()}, [widen(y) for y in outputs]
            inputs = {v: written_out(with_elements(self.recorded[v], x)) for v, x in inputs.items()}
            arguments = {n: inputs[v] for n, v in self.op.inputs}
            outputs = [self._shake(y) for y in outputs] if (shaken := noise and not self.chooses) else outputs
            if shaken and len(inputs) < len(arguments):  # one tensor is two arguments, each rounded by itself: x / x
                arguments = {n: self._shake(x) for n, x in arguments.items()}
            call = rules.Call(arguments, self.op.attributes, tuple(outputs))
            call = dataclasses.replace(call, rounded=self._shake) if noise else call
            assert self.rule is not None
            by_name = self.rule.vjp(call, tuple(cotangents))
        found: dict[int, Tensor] = {}
        for name, value in self.op.inputs:
            if value in self.got and by_name.get(name) is not None:
                grad = at_elements(by_name[name], self.recorded[value]).to(inputs[value].device)
                if noise and value in found:  # a sum whose terms may cancel
                    grad, found[value] = self._shake(grad), self._shake(found[value])
                found[value] = found[value] + grad if value in found else grad
        return {v: found.get(v, torch.zeros_like(self.inputs[v])) for v in self.got}

    def _shake(self, tensor: Tensor) -> Tensor:
        if not differentiable(tensor):
            return tensor
        return self.random.shaken(widen(tensor))

    def _only_moves(self) -> bool:
        """A view that shows no element twice: elements are moved, nothing is computed, nothing rounded."""
        if self.op.kind != "op" or self.op.mutates or self.op.random or self.op.label == "as_strided":
            return False  # as_strided may show memory that no input has
        value = self.graph.value
        return all((b := value(v).base) is not None and value(v).numel <= value(b).numel for v in self.op.outputs)

    # -- verdicts ------------------------------------------------------------------------------------------------------

    def verdict(self) -> Verdict:
        op = self.op
        closed = self.rule is not None
        if all(g is None or not g.any() for g in self.cotangents):
            wrong = [
                g
                for g in self.got.values()
                if g is not None and bool(torch.isfinite(g.abs()).logical_and(g != 0).any())
            ]
            if self.nonfinite_arrived and not wrong:
                return Verdict(op.index, "unchecked", "only NaN or infinity arrived", closed_form=closed)
            if not wrong and not any(g is not None and bool(g.isnan().any()) for g in self.got.values()):
                return Verdict(op.index, "zero", "the gradient that arrived is zero", closed_form=closed)
        try:
            # In its own types, torch's derivative would be the one that is on trial: there the number alone decides.
            reference = self.references(noise=False) if self.rule is not None or self.wide else {}
            moved, slices = self._moved(reference) if reference else ({}, {})
        except (RuntimeError, NotImplementedError, KeyError) as reason:
            reference, moved, slices = {}, {}, {}
            if self.rule is not None:
                self.rule = None
                return self.verdict()
            if self.op.kind == "op" and self.wide:
                raise CannotReplay(str(reason).splitlines()[0][:120]) from None
        results = [self._one(v, reference.get(v), moved.get(v), slices.get(v)) for v in self.got]
        if self.wide:
            off = {v: self._unit() * (moved[v] + reference[v].abs()) for v in moved}
            judge_together(op, results, self.inputs, self.got, off, self.numeric)
        kinds = {r.verdict for r in results}
        worst = next((kind for kind in ("wrong", "nonfinite", "coarse", "kink") if kind in kinds), "ok")
        return Verdict(op.index, worst, "", results, closed, opaque=self.function.called)

    def _moved(self, reference: dict[int, Tensor]) -> tuple[dict[int, Tensor], dict[int, Slices]]:
        """How far one rounding of everything moves each element, and in coarse types each sum over a slice."""
        squares = {v: torch.zeros_like(r, dtype=torch.float64) for v, r in reference.items()}
        coarse = self._unit() > FINE
        slices = {v: Slices() for v in reference} if coarse and not self._only_moves() else {}
        times = repeats(self._unit())
        for _ in range(0 if self._only_moves() else times):
            for value, other in self.references(noise=True).items():
                change = other - reference[value]
                if coarse:
                    slices[value].add(reference[value], change, 1 / (times * NOISE**2))
                change = change.abs_() if not change.is_complex() else change.abs()
                squares[value].addcmul_(change, change, value=1 / (times * NOISE**2))
        return {v: s.sqrt_() for v, s in squares.items()}, slices

    def _roundings(self, value: int, unit: float) -> float:
        inputs = list(self.inputs.values())
        shapes = [t.shape for t in inputs]
        return roundings(self.op.label, unit, shapes, [t.shape for t in self.outputs], self.inputs[value])

    def _one(self, value: int, reference: Tensor | None, moved: Tensor | None, slices: Slices | None) -> InputVerdict:
        result = InputVerdict(
            self.names[value], value, "ok", self.graph.value(value).dtype, shape=tuple(self.inputs[value].shape)
        )
        if reference is not None:
            inside = "the operations inside, by torch" if self.op.kind != "op" else "torch, in float64"
            result.reference = "rule" if self.rule is not None else inside
        elif (reference := self._by_elements(value)) is not None:
            result.reference, moved = "number, element by element", reference.abs()
        unit = self._unit()
        result.bound = self._roundings(value, unit)
        direction = self.direction(value)
        got = self.got[value]
        # Beside the structure that an operation takes for granted, a gradient may be anything.
        meant = functools.partial(structured, self.op, self.names[value])
        evidence = Evidence(
            got=torch.zeros_like(direction) if got is None else meant(got),
            reference=None if reference is None else meant(reference),
            moved=moved,
            unit=unit,
            direction=direction,
            number=self.numeric({value: direction}),
            numeric=lambda there: self.numeric({value: there}),
            nearer=(lambda there: self.numeric({value: there}, nearer=True)) if self.wide else None,
            sides=lambda: self._sides(value),
            independent=self.rule is not None,
            own=self.function.hidden,
            slices=slices,
            more=lambda: self._more(value),
            others=lambda: [] if got is None else self._others(value, torch.where(torch.isfinite(got.abs()), got, 0.0)),
            arriving=None if reference is None else lambda: self._arriving(value),
            size=self._weighed([y.abs() for y in self.outputs], absolute=True) if reference is None else 0.0,
            arrived=self.nonfinite_arrived,
        )
        judge(result, evidence)
        wrong = result.verdict == "wrong" and not (result.nonfinite or compares_as_given(self.op, self.inputs.values()))
        if wrong and reference is not None and moved is not None and got is not None:
            with suppress(RuntimeError, NotImplementedError, TypeError, ValueError, CannotReplay):
                self._doubt(result, evidence, got, reference, meant)
        if got is None:
            result.got = None
        return result

    def _doubt(
        self, result: InputVerdict, given: Evidence, got: Tensor, reference: Tensor, meant: Callable[[Tensor], Tensor]
    ) -> None:
        """A wrong verdict is taken back where a kernel rounds inside, or where the derivative jumps. Raises what the
        operation raises where it does not take other inputs."""
        assert given.moved is not None  # there is a reference
        if self.function.hidden:
            strays = self._strays(result.value, got, reference)
            given.moved = (given.moved.square() + strays.square()).sqrt()
            result.verdict, result.wrong_elements, result.element = "ok", 0, None
            result.bound = self._roundings(result.value, given.unit)  # a verdict by number had written its own there
            judge(result, given)
        if result.verdict == "wrong":
            forgive_jumps(result, given, lambda: self._near(result.value, meant))

    def _arriving(self, value: int) -> Tensor:
        """How far one rounding of the gradients that arrived moves each element of this one."""
        reference, cotangents = self.references(False)[value], self.cotangents
        squares = torch.zeros_like(reference.abs())
        try:
            for _ in range(repeats(1.0)):
                self.cotangents = [None if g is None else self._shake(g) for g in cotangents]
                squares += ((self.references(False)[value] - reference).abs() / NOISE).square() / repeats(1.0)
        finally:
            self.cotangents = cotangents
        return squares.sqrt()

    def _strays(self, value: int, got: Tensor, reference: Tensor) -> Tensor:
        """How far the program's own backward strays, in units, from where the reference goes as its inputs move by a
        rounding: what happens inside of a kernel rounds where no noise can be laid."""
        function = Function(self.graph, self.op, self.recorded, self.on_base, wide=False)
        unit, squares = self._unit(), torch.zeros_like(reference.abs())
        error = got - reference
        for _ in range(repeats(1.0)):
            own = {v: elements(self.recorded[v].clone()) for v in self._needed()}
            moving = {v for v, x in own.items() if v in self.got and differentiable(x)}
            own = {v: x * (1 + unit * self.random.like(x)) if v in moving else x for v, x in own.items()}
            there = self.references(False, self.inputs | {v: widen(own[v]) for v in moving})[value]
            leaves = {v: x.requires_grad_() if v in moving else x for v, x in own.items()}
            with torch.enable_grad():
                outputs = function(leaves)
                pairs = [(y, g) for y, g in zip(outputs, self.cotangents, strict=True) if g is not None]
                (mine,) = torch.autograd.grad(
                    [y for y, _ in pairs], [leaves[value]], [g.to(y.dtype) for y, g in pairs], allow_unused=True
                )
            if mine is not None:
                squares += ((widen(mine) - there - error).abs() / unit).square() / repeats(1.0)
        return squares.sqrt()

    def _near(self, value: int, meant: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """The reference a few roundings off, and nearer on the same way."""
        moving = [(v, x) for v, x in self.inputs.items() if v in self.got and differentiable(x)]
        ways = {v: few_roundings(x, self._unit(), self.random) for v, x in moving}

        def there(far: float) -> Tensor:
            moved = {v: self.inputs[v] + far * way for v, way in ways.items()}
            return meant(self.references(False, self.inputs | moved)[value])

        return there(1.0), there(NEARER)
