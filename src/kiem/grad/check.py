"""One operation: is what autograd gave the derivative? Three answers are held against each other.

(a) what the backward of the program gave, on its own data, in its own type;
(b) the numeric derivative along a random direction, in float64 (numeric.py): it knows nothing but the forward operation;
(c) an independent rule, in float64: our table, or, for a custom Function, torch's derivatives of the operations inside it. It is
    believed only after (b) agrees with it, and then shows which element is wrong.

Bounds. An algorithm that is stable errs as if each number in it had been rounded a few times. So the rule is computed again with
every input, result and arriving gradient changed by relative noise, which shows how far one rounding moves each element:
`moved`. What is allowed is that times the number of roundings: 8, and for sums of k terms k/4 more in the type that sums are
kept in. Nothing here is a setting.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kiem.grad import rules
from kiem.grad.graph import Graph, Op, Step
from kiem.grad.numeric import Derivative, derivative
from kiem.grad.replay import CannotReplay, Replay, Tensors, widen

NOISE = 2.0**-26  # relative; far above float64's rounding, far below where formulas stop being straight
REPEATS = 2
# Arguments of which an operation reads one triangle: its gradient is only meant along such directions.
STRUCTURE = {
    ("linalg_cholesky_ex", "self"): "symmetric", ("cholesky", "self"): "symmetric", ("_linalg_eigh", "A"): "symmetric",
    ("cholesky_solve", "input2"): "triangular", ("cholesky_inverse", "self"): "triangular",
    ("linalg_solve_triangular", "self"): "triangular", ("triangular_solve", "A"): "triangular",
}  # fmt: skip


@dataclass(slots=True)
class InputVerdict:
    """Of one input. `units`: the largest error in units of the precision of the type; `bound` in the same units."""

    argument: str
    value: int
    verdict: str  # ok, wrong, kink
    dtype: torch.dtype
    along: float = 0.0  # (a) along the random direction
    numeric: float = 0.0  # (b)
    numeric_error: float = 0.0
    reference: str = ""  # where (c) comes from
    units: float = 0.0
    bound: float = 0.0
    element: tuple[int, ...] | None = None  # the worst
    expected: float | None = None
    got: float | None = None
    wrong_elements: int = 0
    shape: tuple[int, ...] = ()


@dataclass(slots=True)
class Verdict:
    """Of one operation: ok, wrong, kink (right where there is a derivative), zero (no gradient arrived), unchecked."""

    op: int
    verdict: str
    text: str = ""
    inputs: list[InputVerdict] = field(default_factory=list)
    closed_form: bool = False
    backward: int = 0


class Function:
    """A recorded operation as a function of its inputs, by value."""

    def __init__(self, graph: Graph, op: Op, recorded: Tensors, on_base: bool, wide: bool = True):
        self.graph, self.op, self.recorded, self.on_base = graph, op, recorded, on_base
        self.ops = [op] if op.kind == "op" else list(inside(graph, op))
        self.changes = any(o.mutates for o in self.ops)
        if op.kind != "op" and not self.ops:
            raise CannotReplay("nothing of its inside was recorded")
        self._replay = Replay(graph, self.ops, recorded, cut=False, wide=wide)

    def __call__(self, given: Tensors, noise=None) -> list[Tensor]:
        given = {v: t.clone() for v, t in given.items()} if self.changes else dict(given)
        if self.on_base:
            whole, view = self.graph.values[self.op.base], self.graph.values[self.op.inputs[0][1]]
            base = given[self.op.base]
            given[self.op.inputs[0][1]] = base.as_strided(view.shape, view.strides, view.offset - whole.offset)
            self._replay.run(given, None)
            return [base]
        tensors = self._replay.run(given, noise)
        return [self._output(v, tensors) for v in self.op.outputs]

    def _output(self, value: int, tensors: Tensors) -> Tensor:
        """An output; one that is there for torch's backward only and is not given again, as zeros."""
        known = self.graph.values[value]
        if value not in tensors and not (known.dtype.is_floating_point or known.dtype.is_complex):
            return torch.zeros(known.shape, dtype=known.dtype)
        return self._replay.find(value, tensors)


def inside(graph: Graph, op: Op):
    """The operations that ran inside a custom Function."""
    family = {op.index}
    for other in graph.ops[op.index + 1 :]:
        if other.parent in family:
            family.add(other.index)
            yield other


def check(graph: Graph, op: Op, step: Step, recorded: Tensors, into: tuple, out: tuple) -> Verdict:
    """Hold one node of a backward call against mathematics. `into`, `out`: its real gradients."""
    try:
        return _Check(graph, op, step, recorded, into, out).verdict()
    except CannotReplay as reason:
        return Verdict(op.index, "unchecked", f"could not be run again: {reason}", closed_form=rules.find(op.name) is not None)


class _Check:
    def __init__(self, graph, op, step, recorded, into, out):
        self.graph, self.op, self.recorded = graph, op, recorded
        self.on_base = step.node.endswith("CopySlices") and op.base is not None
        self.rule = None if self.on_base or op.kind != "op" else rules.find(op.name)
        self.generator = torch.Generator().manual_seed(op.index)
        self.got, self.names = self._gradients(step, out)
        if not self.got:
            raise CannotReplay("its gradients could not be matched with its inputs")
        self.inputs: Tensors = {}
        for _, value in [*op.inputs, *([("base", op.base)] if self.on_base else [])]:
            if value not in recorded:
                raise CannotReplay("its inputs were not kept")
            self.inputs[value] = widen(recorded[value])
        self.wide = True
        self.function = Function(graph, op, recorded, self.on_base)
        with torch.no_grad():
            try:
                self.outputs = self.function(self.inputs)
            except (RuntimeError, NotImplementedError):  # no kernel for float64
                self.wide = False
                self.inputs = {v: recorded[v].clone() for v in self.inputs}
                self.function = Function(graph, op, recorded, self.on_base, wide=False)
                self.outputs = self.function(self.inputs)
        self.cotangents = [
            None if g is None or not (y.is_floating_point() or y.is_complex()) else widen(g).to(y.device)
            for y, g in zip(self.outputs, [*into, *[None] * len(self.outputs)], strict=False)
        ]
        self._reproduces()

    def _gradients(self, step: Step, out: tuple) -> tuple[dict[int, Tensor | None], dict[int, str]]:
        """The gradient of each input value; of a value that comes in twice, the sum."""
        positions = list(self.op.inputs)
        if self.on_base:
            positions = [("self", self.op.base), *positions[1:]]
        edges, used = list(self.op.edges), set()
        got: dict[int, Tensor | None] = {}
        names: dict[int, str] = {}
        partial = self.graph.backwards[-1].partial
        for number, (edge, grad) in enumerate(zip(step.edges, out, strict=False)):
            if edge is None:
                continue
            if self.on_base and number == 0:
                match = 0
            else:
                match = next((j for j, e in enumerate(edges) if e == edge and j not in used), None)
            if match is None or (grad is None and partial):
                continue  # autograd.grad asks only for what leads to its inputs
            used.add(match)
            name, value = positions[match]
            names[value] = f"{names[value]}, {name}" if value in names else name
            grad = None if grad is None else widen(grad)
            got[value] = grad if got.get(value) is None else got[value] if grad is None else got[value] + grad
        return got, names

    def _reproduces(self) -> None:
        """Running it again must give what it gave, or what follows would be about another function."""
        for value, output in zip(self.op.outputs, self.outputs, strict=False):
            stats = None if self.on_base else self.graph.values[value].stats
            if stats is None or not output.is_floating_point() or stats.nonfinite:
                continue
            norm = float(torch.linalg.vector_norm(output.detach()))
            allowed = (self._unit() * (64 + output.numel() ** 0.5)) * max(norm, stats.norm)
            if not abs(norm - stats.norm) <= allowed + 1e-30:
                raise CannotReplay(f"run again it gives a result of norm {norm:.6g}, the program had {stats.norm:.6g}")

    def _unit(self) -> float:
        """The coarsest precision in which it computed."""
        family = self.function.ops if self.op.kind != "op" else [self.op]
        types = {self.graph.values[v].dtype for o in [self.op, *family] for v in (*o.outputs, *(v for _, v in o.inputs))}
        return max((torch.finfo(t).eps for t in types if t.is_floating_point or t.is_complex), default=2**-52)

    # -- (b) -----------------------------------------------------------------------------------------------------------

    def direction(self, value: int) -> Tensor:
        """Random, of the size of what it is added to, and of its structure where the operation reads only part of it."""
        x = self.inputs[value]
        scale = float(x.abs().square().mean().sqrt()) if x.numel() else 1.0
        random = torch.randn(x.shape, dtype=x.dtype, generator=self.generator).to(x.device)
        random *= scale if scale > 0 and math.isfinite(scale) else 1.0
        structure = STRUCTURE.get((self.op.label, self.names.get(value, "")))
        if structure == "symmetric":
            return (random + random.mT.conj()) / 2
        if structure == "triangular":
            return random.triu() if self.op.attributes.get("upper") else random.tril()
        return random

    def numeric(self, directions: Tensors) -> Derivative:
        """The derivative of Σ g·y along directions of some inputs."""

        def phi(e: float) -> tuple[float, float]:
            moved = self.inputs | {v: self.inputs[v] + e * d for v, d in directions.items()}
            terms = [
                (g.conj() * widen(y)).real for g, y in zip(self.cotangents, self.function(moved), strict=True) if g is not None
            ]
            return sum(float(t.sum()) for t in terms), sum(float(t.abs().sum()) for t in terms)

        with torch.no_grad():
            return derivative(phi) if self.wide else derivative(phi, step=2.0**-3, unit=self._unit() / 2, tries=2)

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
            inputs = {v: self._shake(t) for v, t in inputs.items()}
            cotangents = [None if g is None else self._shake(g) for g in cotangents]
        if self.rule is not None:
            return self._by_rule(inputs, cotangents, moved, noise)
        if not self.wide:
            raise NotImplementedError("no float64")
        leaves = {
            v: t.clone().requires_grad_() if v in self.got and (t.is_floating_point() or t.is_complex()) else t
            for v, t in inputs.items()
        }
        with torch.enable_grad():
            outputs = self.function(leaves, self._shake_saved if noise else None)
            pairs = [(y, g) for y, g in zip(outputs, cotangents, strict=True) if g is not None and y.requires_grad]
            wanted = [v for v in self.got if leaves[v].requires_grad]
            if not pairs:
                return {v: torch.zeros_like(self.inputs[v]) for v in self.got}
            grads = torch.autograd.grad([y for y, _ in pairs], [leaves[v] for v in wanted], [g for _, g in pairs],
                                        allow_unused=True)
        return {v: torch.zeros_like(leaves[v]) if g is None else g for v, g in zip(wanted, grads, strict=True)}

    def _by_rule(self, inputs: Tensors, cotangents: list, moved: bool, noise: bool) -> dict[int, Tensor]:
        with torch.no_grad():
            outputs = self.function(inputs) if moved and self.wide else self.outputs
            inputs, outputs = {v: widen(x) for v, x in inputs.items()}, [widen(y) for y in outputs]
            if noise:
                outputs = [self._shake(y) for y in outputs]
            call = rules.Call({n: inputs[v] for n, v in self.op.inputs}, self.op.attributes, tuple(outputs))
            by_name = self.rule.vjp(call, tuple(cotangents))
        found: dict[int, Tensor] = {}
        for name, value in self.op.inputs:
            if value in self.got and by_name.get(name) is not None:
                found[value] = found[value] + by_name[name] if value in found else by_name[name]
        return {v: found.get(v, torch.zeros_like(self.inputs[v])) for v in self.got}

    def _shake(self, tensor: Tensor) -> Tensor:
        if not (tensor.is_floating_point() or tensor.is_complex()):
            return tensor
        noise = torch.randn(tensor.shape, dtype=torch.float64, generator=self.generator).to(tensor.device)
        return widen(tensor) * (1 + NOISE * noise)

    def _shake_saved(self, tensor: Tensor) -> Tensor:
        """As a rounding would: the operation that made it must see the change in what it saved, too."""
        if tensor.is_floating_point():
            tensor.data.copy_(self._shake(tensor.data))
        return tensor

    # -- verdicts ------------------------------------------------------------------------------------------------------

    def verdict(self) -> Verdict:
        op = self.op
        closed = self.rule is not None
        if all(g is None or not g.any() for g in self.cotangents):
            wrong = [v for v, g in self.got.items() if g is not None and bool(g.any())]
            if not wrong:
                return Verdict(op.index, "zero", "the gradient that arrived is zero", closed_form=closed)
        try:
            reference = self.references(noise=False)
        except (RuntimeError, NotImplementedError, KeyError) as reason:
            reference = {}
            if self.rule is not None:
                self.rule = None
                return self.verdict()
            if self.op.kind == "op" and self.wide:
                raise CannotReplay(str(reason).splitlines()[0][:120]) from None
        moved = self._moved(reference) if reference else {}
        results = [self._one(value, reference.get(value), moved.get(value)) for value in self.got]
        kinds = {r.verdict for r in results}
        worst = "wrong" if "wrong" in kinds else "kink" if "kink" in kinds else "ok"
        return Verdict(op.index, worst, "", results, closed)

    def _moved(self, reference: dict[int, Tensor]) -> dict[int, Tensor]:
        squares = {v: torch.zeros_like(r, dtype=torch.float64) for v, r in reference.items()}
        for _ in range(REPEATS):
            for value, other in self.references(noise=True).items():
                squares[value] += ((other - reference[value]).abs() / NOISE) ** 2
        return {v: (s / REPEATS).sqrt() for v, s in squares.items()}

    def _roundings(self, value: int, unit: float) -> float:
        shapes = [t.shape for t in (*self.inputs.values(), *self.outputs)]
        numel = max(self.inputs[value].numel(), 1)
        if self.op.label == "convolution":  # a weight's gradient sums over all places of all examples
            shapes.append((self.outputs[0].numel() // max(self.outputs[0].shape[1], 1),))
        terms = max([1, *(size for shape in shapes for size in shape), *(math.prod(s) // numel for s in shapes)])
        accumulated = min(unit, 2.0**-23) / unit
        return 8 + terms / 4 * accumulated

    def _one(self, value: int, reference: Tensor | None, moved: Tensor | None) -> InputVerdict:
        result = InputVerdict(self.names[value], value, "ok", self.graph.values[value].dtype, shape=tuple(self.inputs[value].shape))
        if reference is not None:
            inside = "the operations inside, by torch" if self.op.kind != "op" else "torch, in float64"
            result.reference = "rule" if self.rule is not None else inside
        unit = self._unit()
        result.bound = self._roundings(value, unit)
        direction = self.direction(value)
        number = self.numeric({value: direction})
        got = self.got[value]
        judge(result, torch.zeros_like(direction) if got is None else got, reference, moved, unit, direction, number,
              lambda there: self.numeric({value: there}), lambda: self._sides(value))
        if got is None:
            result.got = None
        return result


def judge(result: InputVerdict, got: Tensor, reference: Tensor | None, moved: Tensor | None, unit: float, direction: Tensor,
          number: Derivative, numeric: Callable[[Tensor], Derivative], sides: Callable[[], tuple[Tensor, Tensor]]) -> None:
    """Fill in the verdict of one gradient: `got` against `reference`, element by element, and both against the number.

    At a kink the number is no judge: elements whose reference jumps between the `sides` are left out of the direction, and there
    any value between the sides is a derivative that autograd may choose."""
    result.numeric, result.numeric_error, result.along = number.value, number.error, inner(got, direction)
    tiny = 8 * torch.finfo(result.dtype).tiny
    if reference is None:
        scale = max(abs(number.value), float((got.abs() * direction.abs()).square().sum().sqrt()))
        allowed = unit * result.bound * 5 * scale + 4 * number.error + tiny
        result.units = abs(result.along - number.value) / (unit * scale) if scale else 0.0
        if not number.low - allowed <= result.along <= number.high + allowed:
            result.verdict, result.expected, result.got = "wrong", number.value, result.along
        elif number.kink:
            result.verdict = "kink"
        return
    moved = moved.nan_to_num(nan=0.0, posinf=0.0)
    floor = float(moved.square().mean().sqrt()) if moved.numel() else 0.0
    allowed = unit * (moved + reference.abs() + floor)
    error = (got - reference).abs()
    error = torch.where(torch.isfinite(reference.abs()), error.nan_to_num(nan=math.inf), 0.0)
    ratio = torch.where(error <= tiny, 0.0, error / allowed.clamp_min(tiny * unit))
    mismatch = ratio > result.bound
    result.units = float(ratio.max()) if ratio.numel() else 0.0
    slack = 5 * float((allowed * direction.abs()).square().sum().sqrt()) * result.bound + 4 * number.error + tiny
    slack += 1e-6 * float((reference.abs() * direction.abs()).square().sum().sqrt())
    kinked = None
    if number.kink:
        low, high = torch.aminmax(torch.stack(sides()), dim=0)
        kinked = (high - low) > 1e-4 * (high.abs() + low.abs() + 1e-3 * (floor + reference.abs().max()))
        between = (got >= low - allowed * result.bound) & (got <= high + allowed * result.bound)
        mismatch &= ~(kinked & between)
        direction = direction * ~kinked
        number = numeric(direction)
        result.numeric, result.numeric_error, result.along = number.value, number.error, inner(got, direction)
    certified = number.low - slack <= inner(reference, direction) <= number.high + slack
    agrees = number.low - slack <= result.along <= number.high + slack
    if (certified and not mismatch.any()) or (not certified and agrees):
        result.verdict = "ok" if kinked is None else "kink"
        if not certified:
            result.reference = ""  # autograd and the number agree: the reference is what differs
        return
    where = ratio.argmax() if mismatch.any() else error.argmax()
    result.verdict, result.wrong_elements = "wrong", int(mismatch.sum())
    result.element = tuple(int(i) for i in torch.unravel_index(where, error.shape)) if error.dim() else ()
    result.expected, result.got = _number(reference.reshape(-1)[where]), _number(got.reshape(-1)[where])


def inner(a: Tensor, b: Tensor) -> float:
    """The derivative along b, of a gradient a."""
    return float((a.conj() * b).real.sum())


def _number(tensor: Tensor) -> Any:
    number = tensor.item()
    return number.real if isinstance(number, complex) else number


def as_dict(verdict: Verdict) -> dict:
    """For JSON."""
    values = dataclasses.asdict(verdict)
    for entry in values["inputs"]:
        entry["dtype"] = str(entry["dtype"]).removeprefix("torch.")
        for key in ("along", "numeric", "numeric_error", "units", "expected", "got"):
            if isinstance(entry[key], float) and not math.isfinite(entry[key]):
                entry[key] = str(entry[key])
    return values
