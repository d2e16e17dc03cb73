"""A standalone program that shows the wrong derivative of one operation, to paste into a bug report.

It needs torch and what the operation's own source imports. The user's script is read, never imported, as importing runs
it. A program is run here first, in a process of its own and an empty folder: handed out is one that shows the error.
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

import torch
from torch import Tensor

from kiem.format import printable
from kiem.grad.carry import INLINE, CannotWrite, Code, exact, expression, like
from kiem.grad.check import Verdict, inside
from kiem.grad.graph import SMALL, Graph, Op

SECONDS, BUDGET = 60, 150  # for one run of a program; no further run begins after
SAID = "The gradient is wrong."


def minimal_program(
    graph: Graph, op: Op, verdict: Verdict, inputs: dict[int, Tensor], into: tuple[Tensor | None, ...]
) -> str:
    """A program that shows the first wrong gradient of `verdict`, or says in its first lines why it cannot be shown.

    inputs: what the operation read, by value; into: the gradient that arrived at each output; both as the program had.
    """
    try:
        return _shown(_Case(graph, op, verdict, inputs, into))
    except Exception as reason:  # whatever the user's source holds, verification has more to say
        return _comment(f"No standalone program for {op.label} at {op.source}: {reason}.")


def _shown(case: _Case) -> str:
    outcomes: list[tuple[str, str]] = []
    ended = time.monotonic() + BUDGET
    for way in ["float64", "narrow"] if case.random else ["own", "float64", "narrow"]:
        for seed, write in case.numbers():
            program = case.program(way, seed, write)
            outcomes.append((_try(program), program))
            if outcomes[-1][0] == "shown":
                return program
            if time.monotonic() > ended:
                break
        if "right" in dict(outcomes) or time.monotonic() > ended:
            break
    outcome, program = next((o for o in outcomes if o[0] == "right"), outcomes[0])
    return case.apology(outcome) + program


def _try(program: str) -> str:
    """`shown`, `right`, or how it failed."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "program.py")
        with open(path, "w", encoding="utf-8") as file:
            file.write(program)
        try:
            done = subprocess.run([sys.executable, path], cwd=folder, capture_output=True, timeout=SECONDS, check=False,
                                  stdin=subprocess.DEVNULL)  # fmt: skip
        except subprocess.TimeoutExpired:
            return f"it ran longer than {SECONDS} s"
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
        return [t for t in (made if isinstance(made, (tuple, list)) else [made]) if isinstance(t, torch.Tensor)]

    def terms(direction, step):
        """Of a central difference along the direction: one for each element of the outputs."""
        def beside(h):
            return outputs([wide(t) + h * direction if i == wrong else wide(t) for i, t in enumerate(inputs)])
        up, down = beside(step), beside(-step)
        return torch.cat([(wide(g).conj() * (u - d)).real.double().reshape(-1) / (2 * step)
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
        parts = (got.conj() * direction).real.double()
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
STALE = (
    "THIS PROGRAM DOES NOT SHOW THE ERROR: called alone, the gradient is right. Likely cause: a tensor that backward "
    "uses changed after forward.{} Keep it with ctx.save_for_backward, which raises when it was changed, and do not "
    "change it through .data or in a buffer that is used again."
)


class _Case:
    def __init__(self, graph: Graph, op: Op, verdict: Verdict, inputs: dict[int, Tensor], into: tuple):
        self.graph, self.op, self.into = graph, op, into
        wrong = next((i for i in verdict.inputs if i.verdict == "wrong"), None)
        if wrong is None:
            raise CannotWrite("no input of it has a wrong gradient")
        self.wrong, self.family = wrong, [op, *inside(graph, op)]
        self.random = any(o.random for o in self.family)
        self.on_base = op.base is not None and wrong.value == op.base
        titles = dict(reversed([(v, n) for n, v in op.inputs]))
        if self.on_base:  # it changed a view: what has a gradient is the whole
            titles = {op.base: "base", **{v: n for v, n in titles.items() if v != op.inputs[0][1]}}
        if any(v not in inputs for v in titles):
            raise CannotWrite("what it read was not kept")
        self.tensors = {v: inputs[v] for v in titles}
        self.names = {v: re.sub(r"\W", "_", name).strip("_") or "value" for v, name in titles.items()}
        self.code = Code()
        self.operation = self._operation()

    def _operation(self) -> str:
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
            whole, view = self.graph.values[op.base], self.graph.values[op.inputs[0][1]]
            place = f"{view.shape}, {view.strides}, {view.offset - whole.offset}"
            before = f"    view = {names[op.base]}.as_strided({place})\n"
            names, after = names | {view.index: "view"}, f"\n    return {names[op.base]}"
        given = [expression(a, names, self.code.bring) for a in args]
        given += [f"{k}={expression(a, names, self.code.bring)}" for k, a in kwargs.items()]
        call = f"    {'' if after else 'return '}{function}({', '.join(given)})"
        return f"def operation({', '.join(self.names.values())}):\n{before}{call}{after}\n"

    def numbers(self) -> Iterator[tuple[int, Callable[[Tensor], str]]]:
        """Seeds and ways to write tensors: large ones as random numbers, and if that shows nothing, as they are."""
        tensors = [*self.tensors.values(), *(g for g in self.into if g is not None)]
        integers = sum(t.nbytes for t in tensors if not t.is_floating_point())

        def write(t: Tensor) -> str:
            whole = t.numel() <= SMALL or (not t.is_floating_point() and integers <= INLINE // 4)
            return exact(t) if whole or bool((t == t.reshape(-1)[0]).all()) else like(t)

        yield from ((seed, write) for seed in (1, 2))
        if sum(t.nbytes for t in tensors) <= INLINE:
            yield 1, exact

    def program(self, way: str, seed: int, write: Callable[[Tensor], str]) -> str:
        """way: autograd in the tensors' `own` types and numbers in float64; both in `float64`; both `narrow`."""
        op, wrong, values = self.op, self.wrong, list(self.tensors)
        narrow = way == "narrow"
        types_ = {self.graph.values[v].dtype for o in self.family for v in (*o.outputs, *(v for _, v in o.inputs))}
        coarse = max((t for t in types_ if t.is_floating_point or t.is_complex), key=lambda t: torch.finfo(t).eps)
        trained = {v for (_, v), edge in zip(op.inputs, op.edges, strict=False) if edge} | {wrong.value}
        element = wrong.element if wrong.element is not None else (0,) * self.tensors[wrong.value].dim()
        harness = HARNESS.format(
            seed=seed, inputs="\n        ".join(f"{write(t)},  # {self.names[v]}" for v, t in self.tensors.items()),
            arriving=", ".join("None" if g is None else write(g) for g in self.into), wrong=values.index(wrong.value),
            differentiable=[i for i, v in enumerate(values) if v in trained], element=element, coarse=coarse, said=SAID,
            wide="return t" if narrow else WIDE, passed="t.clone()" if any(o.mutates for o in self.family) else "t",
            before="    inputs = [wide(t) for t in inputs]\n" if way == "float64" else "", bound=f"{wrong.bound:.6g}",
            title=f"{self.names[wrong.value]}{list(element) or ''}", step="2**-3" if narrow else "2**-9",
            rounding=f"2**6 * torch.finfo({coarse}).eps" if narrow else "2**-40",
        )  # fmt: skip
        imports = [*self.code.imports, *(["from base64 import b64decode"] if "b64decode(" in harness else [])]
        imports = sorted({"import torch", *imports}, key=lambda line: ("__future__" not in line, line))
        defined = f" Its backward: {op.backward_source}." if op.backward_source else ""
        head = _comment(
            f"The gradient of {op.label} with respect to {wrong.argument} is wrong. Called at {op.source}.{defined}\n"
            f"Compared with a numeric derivative; exit code 1 while it is wrong. torch {torch.__version__}."
        )
        return head + "\n\n\n".join(["\n".join(imports), *self.code.items, self.operation]) + harness

    def apology(self, outcome: str) -> str:
        """Why the program does not show the error."""
        if outcome != "right":
            return _comment(f"THIS PROGRAM COULD NOT BE RUN ALONE: {outcome}")
        graph, op = self.graph, self.op
        memory = {graph.values[v].storage for o in self.family for v in (*o.outputs, *(v for _, v in o.inputs))}
        for other in graph.ops[op.index + 1 :]:
            changed = [v for v in other.mutates if graph.values[v].storage in memory and other not in self.family]
            if changed:
                what = f"{other.label} at {other.source} changed memory that it uses ({graph.title(changed[0])})"
                return _comment(STALE.format(f" {what}."))
        return _comment(STALE.format(""))
