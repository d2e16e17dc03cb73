"""A standalone program that shows the wrong derivative of one operation, to paste into a bug report.

It needs torch and what the operation's own source imports. The user's script is read, never imported, as importing runs
it. A program is run here first, in a process of its own and an empty folder: handed out is one that shows the error, on
the device on which the operation ran, or else on the CPU. All these runs together take at most `BUDGET` seconds.

Tensors that are not strided (layouts.py) are made inside of `operation` from their elements: all else that the program
holds is strided.
"""

from __future__ import annotations

import inspect
import keyword
import os
import re
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kiem.format import printable
from kiem.inspect import rules
from kiem.inspect.graph.layouts import can_be_written_out, elements, regular, written_out
from kiem.inspect.graph.model import Graph, Op
from kiem.inspect.graph.stats import SMALL
from kiem.inspect.repro.source_text import INLINE, CannotWrite, Code, assembled, exact, expression, like, registers
from kiem.inspect.verify.operation import Verdict

BUDGET = 45  # seconds
SAID = "The gradient is wrong."


def minimal_program(
    graph: Graph, op: Op, verdict: Verdict, inputs: dict[int, Tensor], into: tuple[Tensor | None, ...]
) -> str:
    """A program that shows the first wrong gradient of `verdict`, or says in its first lines why it cannot be shown.

    inputs: what the operation read, by value; into: the gradient that arrived at each output; both as the program had.
    """
    try:
        cases = [_Case(graph, op, verdict, inputs, into)]
        if cases[0].device:
            cases.append(_Case(graph, op, verdict, inputs, into, "cpu"))
        return _shown(cases)
    except Exception as reason:  # whatever the user's source holds, verification has more to say
        return _comment(f"No standalone program for {op.label} at {op.source}: {reason}.")


@dataclass(frozen=True)
class _Run:
    """`outcome`: shown, right, or how the program failed. `drawn`: random numbers stood for large tensors."""

    case: _Case
    way: str
    drawn: bool
    program: str
    outcome: str


def _shown(cases: list[_Case]) -> str:
    runs: list[_Run] = []
    began = time.monotonic()
    for case in cases:
        for run in _runs(case, began + BUDGET):
            runs.append(run)
            if run.outcome == "shown":
                return _elsewhere(runs) + run.program
    right = [run for run in runs if run.outcome == "right"]
    if right:
        best = [run for run in right if run.case is right[0].case][-1]
        return best.case.apology(best) + best.program
    failed = {run.case.where: run.outcome for run in reversed(runs)}
    reasons = "; ".join(f"on {where}: {why}" if len(cases) > 1 else why for where, why in reversed(failed.items()))
    spent = f"({_count(runs)} took {time.monotonic() - began:.0f} s)"
    return _comment(f"THIS PROGRAM COULD NOT BE RUN ALONE {spent}: {reasons}") + runs[0].program


def _count(runs: list[_Run]) -> str:
    return "1 run" if len(runs) == 1 else f"{len(runs)} runs"


def _runs(case: _Case, until: float) -> Iterator[_Run]:
    """Ways to compute it and numbers to do it with, until one shows the error, a way is right, or the time is up."""
    for way in ["float64", "narrow"] if case.random else ["own", "float64", "narrow"]:
        outcomes: dict[bool, str] = {}
        for seed, write, drawn in case.numbers():
            left = until - time.monotonic()
            if left <= 0:
                return
            if outcomes.get(drawn, "right") != "right":
                continue  # other random numbers would fail in the same way
            program = case.program(way, seed, write)
            outcomes[drawn] = _try(program, left)
            yield _Run(case, way, drawn, program, outcomes[drawn])
        if "right" in outcomes.values():
            return


def _elsewhere(runs: list[_Run]) -> str:
    """Says where the last run showed the error, if it had to be tried elsewhere than the operation had run."""
    if runs[-1].case is runs[0].case:
        return ""
    there = next((run for run in runs if run.outcome == "right"), runs[0])
    told = "called alone, the gradient is right" if there.outcome == "right" else f"it fails alone: {there.outcome}"
    return _comment(f"Shown on the CPU; the program ran on {runs[0].case.device}, where {told.rstrip('.')}.")


def _try(program: str, seconds: float = BUDGET) -> str:
    """`shown`, `right`, or how it failed."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "program.py")
        with open(path, "w", encoding="utf-8") as file:
            file.write(program)
        try:
            done = subprocess.run([sys.executable, path], cwd=folder, capture_output=True, timeout=seconds, check=False,
                                  stdin=subprocess.DEVNULL)  # fmt: skip
        except subprocess.TimeoutExpired:
            return f"it ran longer than {seconds:.2g} s"
    if done.returncode == 0 or (done.returncode == 1 and SAID.encode() in done.stdout):
        return "shown" if done.returncode else "right"
    lines = done.stderr.decode(errors="replace").strip().splitlines()
    return lines[-1][:200] if lines else f"it ended with {done.returncode}"


def _comment(text: str) -> str:
    lines = [line for part in printable(text).splitlines() for line in textwrap.wrap(part, 96)]
    return "".join(f"# {line}\n" for line in lines)


# -- the program -------------------------------------------------------------------------------------------------------

HARNESS = '''

def check_gradient():
    torch.manual_seed({seed})
    inputs = [
        {inputs}
    ]
    arriving = [{arriving}]  # the gradient of the loss with respect to each output
    differentiable, wrong, element = {differentiable}, {wrong}, {element}

    def wide(t):
        {wide}

    def outputs(tensors):
        torch.manual_seed(0)
        made = operation(*({passed} for t in tensors))
        return [{strided} for t in (made if isinstance(made, (tuple, list)) else [made]) if isinstance(t, torch.Tensor)]

    def terms(direction, step):
        """Of a central difference along the direction: one for each element of the outputs."""
        def beside(h):
            return outputs([wide(t) + h * direction if i == wrong else wide(t) for i, t in enumerate(inputs)])
        up, down = beside(step), beside(-step)
        return torch.cat([(wide(g).conj() * (u - d)).real.{double}.reshape(-1) / (2 * step)
                          for u, d, g in zip(up, down, arriving) if g is not None])
{before}
    leaves = [t.detach().requires_grad_(i in differentiable) for i, t in enumerate(inputs)]
    made, grads = zip(*((y, g.to(y.dtype)) for y, g in zip(outputs(leaves), arriving) if g is not None))
    got = torch.autograd.grad(made, leaves[wrong], grads, allow_unused=True)[0]
    if got is None:
        print("backward returned None, which stands for zero")
    x = wide(inputs[wrong])
    got = torch.zeros_like(x) if got is None else got.to(x.dtype)
    size = x.abs().clamp_min((x.abs().square().mean().sqrt().item() or 1.0) / 100)
    one = torch.zeros_like(x)
    one[element] = size[element]
    failed = False
    for where, direction, unit in (({title!r}, one, size[element].item()),
                                   ("along a random direction", size * (x != 0) * torch.randn_like(x), 1.0)):
        with torch.no_grad():
            d1, d2, d4 = (terms(direction, {step} / n) for n in (1, 2, 4))
        first, second = (4 * d2 - d1) / 3, (4 * d4 - d2) / 3  # extrapolated (Richardson)
        parts = (got.conj() * direction).real.{double}
        expected, found = second.sum().item(), parts.sum().item()
        scale, error = (second.abs().sum() + parts.abs().sum()).item(), (second - first).sum().abs().item()
        allowed = {bound} * torch.finfo({coarse}).eps * scale + 4 * error + {rounding} * scale
        print(f"{{where}}: expected {{expected / unit:.9g}}, got {{found / unit:.9g}}, "
              f"a difference of {{abs(found - expected) / unit:.2g}}; rounding explains {{allowed / unit:.2g}}")
        failed = failed or abs(found - expected) > allowed
    print("{said}" if failed else "The gradient is right.")
    return failed


raise SystemExit(1 if check_gradient() else 0)
'''
WIDE = "return t.to(torch.promote_types(t.dtype, torch.float64)) if t.is_floating_point() or t.is_complex() else t"
ALONE = "THIS PROGRAM DOES NOT SHOW THE ERROR: called alone, the gradient is right."
STALE = "a tensor that backward uses changed after forward"
ADVICE = (
    "Keep it with ctx.save_for_backward, which raises when it was changed, and do not change it through .data or in a "
    "buffer that is used again."
)


class _Case:
    """One operation, on the devices on which it ran, or all of it at `place`."""

    def __init__(
        self, graph: Graph, op: Op, verdict: Verdict, inputs: dict[int, Tensor], into: tuple, place: str | None = None
    ):
        self.graph, self.op, self.backward, self.place = graph, op, verdict.backward, place
        wrong = next((i for i in verdict.inputs if i.verdict == "wrong"), None)
        if wrong is None:
            raise CannotWrite("no input of it has a wrong gradient")
        self.wrong, self.family = wrong, [op, *graph.inside(op)]
        self.random = any(o.random for o in self.family)
        self.on_base = op.base is not None and wrong.value == op.base
        titles = dict(reversed([(v, n) for n, v in op.inputs]))
        if self.on_base:  # it changed a view: what has a gradient is the whole
            titles = {wrong.value: "base", **{v: n for v, n in titles.items() if v != op.inputs[0][1]}}
        if any(v not in inputs for v in titles):
            raise CannotWrite("what it read was not kept")
        self.recorded = {v: inputs[v] for v in titles}
        self.tensors = {v: elements(t) for v, t in self.recorded.items()}
        self.into = tuple(None if g is None else self._arrived(g) for g in into)
        devices = {graph.value(v).device for v in (*titles, *op.outputs)} - {"cpu"}
        self.device = ", ".join(sorted(devices))
        self.where = "the CPU" if place == "cpu" or not devices else self.device
        self.names = {v: re.sub(r"\W", "_", name).strip("_") or "value" for v, name in titles.items()}
        self.code = Code(place)
        self.indices: dict[str, str] = {}
        for device in devices if place is None else ():
            if (module := registers(device)) is not None:
                self.code.imports[f"import {module}"] = None
        self.operation = self._operation()

    def _arrived(self, gradient: Tensor) -> Tensor:
        """A gradient as the harness holds it against an output: with all zeros, or as rows."""
        if gradient.layout == torch.jagged:
            return elements(gradient)
        if not can_be_written_out(gradient):
            raise CannotWrite(f"the gradient that arrives cannot be written out ({gradient.layout})")
        return written_out(gradient)

    def _index(self, tensor: Tensor) -> str:
        """The name under which the program holds what says where elements stand. Jagged tensors fit together only if
        they share theirs."""
        if tensor.nbytes > INLINE:
            raise CannotWrite("what says where the elements of its tensors stand is too large to be written out")
        return self.indices.setdefault(exact(tensor, self.place), f"places_{len(self.indices)}_")

    def _device(self, value: int) -> str:
        return self.place or self.graph.value(value).device

    def _operation(self) -> str:
        if self.op.call is None:
            raise CannotWrite("how it was called was not kept")
        op, (called, args, kwargs) = self.op, self.op.call
        known = inspect.getclosurevars(called.forward).nonlocals if hasattr(called, "forward") else {}
        if "info" in known and called.__name__.startswith("GeneratedBackwardFor"):  # made by torch.library
            called, info = known["op"], known["info"]
            args, kwargs = args[:-1], args[-1].keyword_only_args
            parts = [getattr(info, name, None) for name in ("_init_fn", "_backward_fn", "_setup_context_fn")]
            self.code.bring_registered(called._schema.name, [f for f in parts if f is not None])
        function = f"{self.code.bring(called)}.apply" if isinstance(called, type) else f"torch.ops.{called}"
        before, after, names = "", "", self.names
        for value in names:
            others = [n for v, n in names.items() if v != value]
            while names[value] in {"torch", *self.code.names, *keyword.kwlist, *others}:
                names[value] += "_"
        if self.on_base:
            whole, view = self.graph.value(self.wrong.value), self.graph.value(op.inputs[0][1])
            place = f"{view.shape}, {view.strides}, {view.offset - whole.offset}"
            before = f"    view = {names[whole.index]}.as_strided({place})\n"
            names, after = names | {view.index: "view"}, f"\n    return {names[whole.index]}"
        given = [expression(a, names, self.code.bring, self.place) for a in args]
        given += [f"{k}={expression(a, names, self.code.bring, self.place)}" for k, a in kwargs.items()]
        for value, tensor in self.recorded.items():
            if not regular(tensor):
                before += f"    {self.names[value]} = {assembled(tensor, self.names[value], self._index)}\n"
        call = f"    {'' if after else 'return '}{function}({', '.join(given)})"
        return f"def operation({', '.join(self.names.values())}):\n{before}{call}{after}\n"

    def numbers(self) -> Iterator[tuple[int, Callable[[Tensor, str], str], bool]]:
        """Seeds and ways to write tensors: large ones as random numbers (True), and if that shows nothing, as they
        are."""
        tensors = [*self.tensors.values(), *(g for g in self.into if g is not None)]
        integers = sum(t.nbytes for t in tensors if not t.is_floating_point())

        def whole(t: Tensor) -> bool:
            few = t.numel() <= SMALL or (not t.is_floating_point() and integers <= INLINE // 4)
            return few or bool((t == t.reshape(-1)[0]).all())

        if not all(map(whole, tensors)):
            yield from ((seed, lambda t, place: (exact if whole(t) else like)(t, place), True) for seed in (1, 2))
            if sum(t.nbytes for t in tensors) > INLINE:
                return
        yield 1, exact, False

    def program(self, way: str, seed: int, write: Callable[[Tensor, str], str]) -> str:
        """way: autograd in the tensors' `own` types and numbers in float64; both in `float64`; both `narrow`."""
        op, wrong, values = self.op, self.wrong, list(self.tensors)
        narrow = way == "narrow"
        types_ = {self.graph.value(v).dtype for o in self.family for v in (*o.outputs, *(v for _, v in o.inputs))}
        coarse = max((t for t in types_ if t.is_floating_point or t.is_complex), key=lambda t: torch.finfo(t).eps)
        trained = {v for (_, v), edge in zip(op.inputs, op.edges, strict=False) if edge} | {wrong.value}
        element = wrong.element if wrong.element is not None else (0,) * self.tensors[wrong.value].dim()
        laid_out = any(self.graph.value(v).held is not None for v in op.outputs)
        given = [(write(t, self._device(v)), self.names[v]) for v, t in self.tensors.items()]
        outputs = [*op.outputs, *[wrong.value] * len(self.into)]  # there may be more gradients than outputs
        arriving = [g if g is None else write(g, self._device(v)) for v, g in zip(outputs, self.into, strict=False)]
        named = self.names[wrong.value] + ("" if regular(self.recorded[wrong.value]) else ".values()")
        harness = HARNESS.format(
            seed=seed, inputs="\n        ".join(f"{made},  # {name}" for made, name in given),
            arriving=", ".join(map(str, arriving)), wrong=values.index(wrong.value),
            differentiable=[i for i, v in enumerate(values) if v in trained], element=element, coarse=coarse, said=SAID,
            wide="return t" if narrow else WIDE, passed="t.clone()" if any(o.mutates for o in self.family) else "t",
            before="    inputs = [wide(t) for t in inputs]\n" if way == "float64" else "", bound=f"{wrong.bound:.6g}",
            title=f"{named}{list(element) or ''}", step="2**-3" if narrow else "2**-9",
            strided="t.values() if t.is_nested else t.to_dense()" if laid_out else "t",
            double="double()" if self.where == "the CPU" else "cpu().double()",
            rounding=f"2**6 * torch.finfo({coarse}).eps" if narrow else "2**-40",
        )  # fmt: skip
        indices = "\n".join(f"{name} = {made}" for made, name in self.indices.items())
        parts = [*self.code.items, *([indices] if indices else []), self.operation]
        encoded = any("b64decode(" in part for part in (*parts, harness))
        imports = [*self.code.imports, *(["from base64 import b64decode"] if encoded else [])]
        imports = sorted({"import torch", *imports}, key=lambda line: ("__future__" not in line, line))
        defined = f" Its backward: {op.backward_source}." if op.backward_source else ""
        head = _comment(
            f"The gradient of {op.label} with respect to {wrong.argument} is wrong. Called at {op.source}.{defined}\n"
            f"Compared with a numeric derivative; exit code 1 while it is wrong. torch {torch.__version__}."
        )
        return head + "\n\n\n".join(["\n".join(imports), *parts]) + harness

    def apology(self, run: _Run) -> str:
        """Why the program does not show the error. Advice only where nothing else explains it: a jump of the
        derivative can deceive a number, and so can its types, its device, and other numbers."""
        changed, causes = self._changed(), []
        if self.device:
            causes.append(f"the program ran on {self.device}, this one on the CPU" if self.where != self.device
                          else f"{self.device} gives other results at other times")  # fmt: skip
        if self.op.packed:
            causes.append("what it keeps for backward went through hooks, which may have given back something else")
        if run.way == "float64" and not self.random:
            causes.append("backward computes in float64 here and did not in the program")
        if run.drawn:
            causes.append("random numbers stand for large tensors here")
        if self.wrong.element is None and not self.wrong.wrong_elements:
            causes.append("the verdict rests on one derivative by number, along a random direction, and not on an "
                          "element")  # fmt: skip
        if any((rule := rules.find(o.name)) is not None and rule.kink for o in self.family):
            causes.append("its derivative jumps at some points, near which a derivative by number can be off")
        if not causes:
            advice = f" {ADVICE}" if self.op.kind == "function" else ""
            return _comment(f"{ALONE} Likely cause: {STALE}.{changed and f' {changed}.'}{advice}")
        return _comment(f"{ALONE} Possible causes: {'; '.join([*([changed] if changed else []), *causes])}.")

    def _changed(self) -> str:
        """What changed memory of its own before its backward ran; "" if nothing is known to have."""
        graph = self.graph
        call = next((call for call in graph.backwards if call.index == self.backward), None)
        until = None if call is None else call.after_op
        memory = {graph.value(v).storage for o in self.family for v in (*o.outputs, *(v for _, v in o.inputs))}
        for other in graph.ops_between(self.op.index + 1, until):
            changed = [v for v in other.mutates if graph.value(v).storage in memory and other not in self.family]
            if changed:
                return f"{other.label} at {other.source} changed memory that it uses ({graph.title(changed[0])})"
        return ""
