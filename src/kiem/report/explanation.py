"""A recorded program in words and formulas, for the terminal: operations, tensors, backward calls, the chain rule."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.text import Text

from kiem.format import bytes_text, integer_text, number_text, printable
from kiem.grad.chain import Chain, ChainStep, Link, arguments, scalar, tensors
from kiem.grad.graph import BackwardCall, Gradient, Graph, Step

MOST_PATHS = 16  # that are listed one by one
MOST_STEPS = 24  # that are shown one by one, unless all are asked for
MOST_LINES = 120  # operations, tensors
MOST_NUMBERS = 6  # of a tensor that are written out


# -- the chain rule ----------------------------------------------------------------------------------------------------


def paths(chain: Chain) -> list[list[tuple[ChainStep, Link]]]:
    """Each path from the loss to the leaf, none if there are more than 16."""
    if chain.paths > MOST_PATHS:
        return []
    entered = {link.to for step in chain.steps for link in step.links}
    found, open_paths = [], [(i, []) for i in range(len(chain.steps) - 1, -1, -1) if i not in entered]
    while open_paths:
        step, so_far = open_paths.pop()
        for link in reversed(chain.steps[step].links):
            path = [*so_far, (chain.steps[step], link)]
            if link.to is None:
                found.insert(0, path)
            else:
                open_paths.append((link.to, path))
    return found


def path_names(chain: Chain, path: list[tuple[ChainStep, Link]]) -> list[str]:
    """The names along a path: the loss, operations, the leaf. An argument in brackets tells parallel ways apart."""
    inner = [f"{s.label}({k.argument})" if sum(o.to == k.to for o in s.links) > 1 else s.label for s, k in path]
    return [chain.loss, *inner, chain.title]


def equations(chain: Chain) -> list[str]:
    """Each path of scalars as a product of derivatives, `dL/dw = dL/da · da/dw = -1.0889 · 1.1 = -1.1978`; their sum.
    Values that have no name in the program are passed over."""
    if chain.product is None:
        return []
    lines, values = [], []
    for path in paths(chain):
        factors: list[tuple[str, float]] = []
        before, factor, value = "L", chain.seed, chain.seed
        for _, link in path:
            factor, value = factor * scalar(link.local), value * scalar(link.local)
            if not link.title.startswith("%") or link is path[-1][1]:
                factors.append((f"d{before}/d{link.title}", factor))
                before, factor = link.title, 1.0
        names, numbers = " · ".join(n for n, _ in factors), [number(x) for _, x in factors]
        written = " · ".join(f"({n})" if i and n.startswith("-") else n for i, n in enumerate(numbers))
        head = f"dL/d{chain.title}" if len(factors) > 1 else ""
        sides = [s for s in (head, names, written, number(value) if len(factors) > 1 else "") if s]
        lines.append(" = ".join(sides))
        values.append(value)
    if len(values) > 1:
        total = " + ".join(f"({number(v)})" if i and v < 0 else number(v) for i, v in enumerate(values))
        lines.append(f"dL/d{chain.title} over all paths = {total} = {number(chain.product)}")
    return lines or [f"dL/d{chain.title} over all {integer_text(chain.paths)} paths = {number(chain.product)}"]


def modules(chain: Chain) -> list[dict[str, Any]]:
    """The steps folded by module: runs of steps in one block, where their gradients go, what arrives and leaves."""
    runs = [list(run) for _, run in groupby(range(len(chain.steps)), lambda i: block(chain.steps[i].module))]
    of = {i: number_ for number_, run in enumerate(runs) for i in run}
    folded = []
    for number_, run in enumerate(runs):
        links = [k for i in run for k in chain.steps[i].links]
        to = sorted({of[k.to] for k in links if k.to is not None} - {number_})
        arrives = next((g.stats.norm for g in chain.steps[run[0]].arrives if g is not None), math.nan)
        folded.append({"module": block(chain.steps[run[0]].module), "first": run[0], "last": run[-1], "to": to,
                       "arrives": arrives, "leaves": chain.steps[run[-1]].links[-1].leaves.stats.norm,
                       "leaf": any(k.to is None for k in links)})  # fmt: skip
    return folded


def document(chain: Chain) -> dict[str, Any]:
    """The chain rule for JSON, with its paths, equations and modules."""
    folded = [{k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in m.items()}
              for m in modules(chain)]  # fmt: skip
    return chain.as_dict() | {"path_names": [path_names(chain, p) for p in paths(chain)],
                              "equations": equations(chain), "modules": folded}  # fmt: skip


def block(module: str) -> str:
    """The module that steps are folded to: the path up to its first number, `model.h.3` of `model.h.3.attn.c_proj`."""
    parts = module.split(".")
    numbered = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts))
    return ".".join(parts[: numbered + 1])


def shapes(step: ChainStep, link: Link) -> str:
    """Of a product of matrices the shapes, as `(128×768) = (128×3072)(3072×768)`; empty if the formula is none."""
    factors = link.formula.split(" · ")[-1].lstrip("−").split(" ")
    arrived = next((g.shape for g in step.arrives if g is not None), ())
    known = {"G": arrived, "g": arrived} | {letter: shape for letter, (shape, _) in step.letters.items()}
    if len(factors) < 2 or any(f.rstrip("ᵀ") not in known for f in factors):
        return ""
    written, before = [], None
    for factor in factors:
        shape = list(known[factor.rstrip("ᵀ")])
        if len(shape) > 2 and step.label == "linear":
            shape = [math.prod(shape[:-1]), shape[-1]]  # all rows of the batch are one matrix
        shape = [*shape, 1] if len(shape) == 1 else shape
        if factor.endswith("ᵀ"):
            shape[-2:] = shape[:-3:-1]
        if len(shape) < 2 or (before is not None and before != shape[-2]):
            return ""
        before = shape[-1]
        written.append(_shape(shape))
    return f"{_shape(link.leaves.shape)} = {''.join(written)}"


def print_chain(chain: Chain, console: Console, everything: bool = False) -> None:
    """The chain rule from the loss to a leaf. `everything`: each step of a long one, instead of modules."""
    say = _Say(console)
    say(f"dL/d{chain.title}", f"   {chain.tensor}, L = {chain.loss}, backward at {chain.source}", style="bold")
    for note in chain.notes:
        say("", f"note: {note}")
    listed = paths(chain)
    say("", f"{integer_text(chain.paths)} path{'s' if chain.paths != 1 else ''} from the loss, "
            f"{integer_text(len(chain.steps))} steps backward")  # fmt: skip
    short_enough = everything or len(chain.steps) <= MOST_STEPS
    for path in listed if short_enough else ():
        say("", "  " + " ← ".join(path_names(chain, path)))
    if short_enough:
        shown = list(range(len(chain.steps)))
    else:
        _print_modules(chain, say)
        shown = _last_steps(chain)
        say("", "the last steps, into the leaf:")
    for i in shown:
        _print_step(i, chain.steps[i], say)
    for join in chain.joins:
        last = join is chain.joins[-1]
        if last or short_enough or join.ok is not True:
            _print_join(chain, join, say)
    if not short_enough and len(chain.joins) > 1:
        good = [j for j in chain.joins[:-1] if j.ok]
        if good:
            worst = max(good, key=lambda j: j.error / j.bound)
            say("", f"joins before it that add up: {len(good)}; largest relative error {worst.error:.1e}, "
                    f"bound {worst.bound:.0e}")  # fmt: skip
    for line in equations(chain):
        say(line, "", style="bold")
    if chain.gradient is not None:
        say("", f"gradient of this call: {gradient_text(chain.gradient)}")


def _last_steps(chain: Chain) -> list[int]:
    """The steps that send to the leaf; before one that only changes the shape, what sends to it."""
    found, ends = set(), {None}
    while ends:
        new = {i for i, step in enumerate(chain.steps) if any(k.to in ends for k in step.links)} - found
        found |= new
        ends = {i for i in new if chain.steps[i].label in ("t", "transpose", "view", "expand", "permute", "_to_copy")}
    return sorted(found)


def _print_modules(chain: Chain, say: _Say) -> None:
    for folded in modules(chain):
        count = folded["last"] - folded["first"] + 1
        source = chain.steps[folded["first"]].source
        name = folded["module"] or (source.function if source else "") or "outside of modules"
        into = " → the leaf" if folded["leaf"] else ""
        say(f"  {name}", f" … {count} step{'s' if count > 1 else ''}, norm {number(folded['arrives'])} arrives, "
                         f"{number(folded['leaves'])} leaves{into}  {source or ''}")  # fmt: skip


def _print_step(i: int, step: ChainStep, say: _Say) -> None:
    module = f"  in {step.module}" if step.module else ""
    say(f"{i + 1}  {step.label}", f"{module}  {step.source or ''}", style="cyan")
    if step.forward:
        given = ", ".join(f"{letter} = {name}" for letter, (_, name) in step.letters.items())
        say("", f"     {step.forward}" + (f"   with {given}" if given else ""))
    if step.note:
        say("", f"     {step.note}")
    arrives = ", ".join(gradient_text(g) for g in step.arrives if g is not None)
    say("", f"     arrives {arrives}")
    for link in step.links:
        parts = [p for p in (link.formula, link.numbers if link.numbers != link.formula else "") if p]
        letter = link.title if link.numbers is not None else link.letter or link.title or link.argument
        say("", "     " + " = ".join([f"dL/d{letter}", *parts]) + (f"   {s}" if (s := shapes(step, link)) else ""))
        local = f"local {values_text(link.local)}, " if link.local is not None else ""
        say("", f"       {local}leaves {gradient_text(link.leaves)} to {link.title or link.argument}")


def _print_join(chain: Chain, join: Any, say: _Say) -> None:
    count = len(join.contributions)
    say(f"{join.title or 'a result'}", f": {count} contribution{'s' if count != 1 else ''}", style="green")
    for i, j in join.contributions[:12]:
        step = chain.steps[i]
        sent = step.links[j]
        say("", f"     {gradient_text(sent.leaves)}  from {step.label}({sent.argument})  {step.source or ''}")
    if count > 12:
        say("", f"     … {count - 12} more")
    total = f"sum {values_text(join.total)}, " if join.total is not None and count > 1 else ""
    arrived = f"arrived {gradient_text(join.arrived)}" if join.arrived is not None else ""
    if join.ok:
        checked = f": relative error {join.error:.1e}, bound {join.bound:.0e}: adds up"
    elif join.error is not None:
        checked = f": relative error {join.error:.1e}, bound {join.bound:.0e}: {join.note}"
    else:
        checked = f": {join.note}"
    say("", f"     {total}{arrived}{checked}", style="" if join.ok is not False else "bold red")


# -- the program -------------------------------------------------------------------------------------------------------


def totals(graph: Graph) -> dict[str, int]:
    """Numbers of a program. `saved_bytes`: of the memory that backward keeps, each storage once, without that of
    parameters and other leaves that ask for a gradient."""
    leaves = {v.storage: v.numel for v in graph.values if v.is_parameter or (v.is_leaf and v.requires_grad)}
    saved = {v.storage for v in graph.values if v.saved_by} - leaves.keys()
    return {
        "operations": len(graph.ops), "tensors": len(graph.values), "leaves": len(leaves),
        "leaf_elements": sum(leaves.values()), "backward_calls": len(graph.backwards),
        "saved_bytes": sum(graph.storages[s].nbytes for s in saved),
    }  # fmt: skip


def print_summary(graph: Graph, console: Console) -> None:
    """What the program did, in a few lines."""
    say, numbers = _Say(console), totals(graph)
    say("recorded program", f": {_count(numbers['operations'], 'operation')}, {_count(numbers['tensors'], 'tensor')}, "
        f"{integer_text(numbers['leaves'])} parameters and other leaves that ask for a gradient "
        f"({_count(numbers['leaf_elements'], 'element')})")  # fmt: skip
    say("", f"saved for backward: {bytes_text(numbers['saved_bytes'])} (each storage once, without parameters)")
    for call in graph.backwards:
        inside = ", inside another one" if call.nested else ""
        kind = "autograd.grad" if call.partial else "backward"
        of = " and ".join(graph.title(v) for v in call.roots) or "?"
        say(f"{kind} {call.index}", f" of {of}{inside}: {_count(len(call.steps), 'step')}, "
            f"{_count(len(call.leaf_grads), 'gradient')}  {call.source}")  # fmt: skip
        for value, gradient in list(call.leaf_grads.items())[:12]:
            say("", f"  dL/d{graph.title(value)} = {gradient_text(gradient)}")
        if len(call.leaf_grads) > 12:
            say("", f"  … {len(call.leaf_grads) - 12} more")
    for repeat in graph.repeats:
        first, last = graph.ops[repeat.first], graph.ops[repeat.last]
        say("folded", f": operations {repeat.first} to {repeat.last} ran {repeat.times} times, shown once  "
                      f"{first.source} to {last.source}")  # fmt: skip
    for note in graph.notes:
        say("note", f": {note}")
    if graph.failure is not None:
        say(f"{graph.failure.kind}", f": {graph.failure.message}  {graph.failure.source or ''}", style="bold red")
        if graph.failure.explanation:
            say("", graph.failure.explanation)


def print_operations(graph: Graph, console: Console, everything: bool = False) -> None:
    """Each operation in the order in which it ran; runs in one module folded if there are many."""
    say = _Say(console)
    if everything or len(graph.ops) <= MOST_LINES:
        for op in graph.ops:
            made = ", ".join(f"{graph.title(v)} {graph.values[v].describe()}" for v in op.outputs)
            given = ", ".join(graph.title(v) for _, v in op.inputs)
            marks = [op.region, "random" if op.random else "", "in place" if op.mutates else "", op.module,
                     "" if op.grad_enabled else "no_grad"]  # fmt: skip
            marks = ", ".join(mark for mark in marks if mark)
            say(f"{op.index:>4}  {op.label}", f"({given}) → {made or 'nothing'}  {marks}  {op.source}")
        return
    for module, run in groupby(graph.ops, lambda op: block(op.module)):
        ops = list(run)
        name = module or "outside of modules"
        say(f"{ops[0].index:>4}  {name}", f" … {_count(len(ops), 'operation')}  {ops[0].source}")


def print_tensors(graph: Graph, console: Console, everything: bool = False) -> None:
    """The table of all tensors, then what is saved for backward."""
    say, rows = _Say(console), tensors(graph)
    shown = rows if everything or len(rows) <= MOST_LINES else [r for r in rows if r["name"]][:MOST_LINES]
    for row in shown:
        shape = "×".join(map(str, row["shape"])) or "1 element"
        facts = [f"{row['rank']} {shape} {row['dtype']} on {row['device']}", f"strides {tuple(row['strides'])}",
                 bytes_text(row["bytes"])]  # fmt: skip
        facts += ["parameter"] if row["parameter"] else ["requires grad"] if row["requires_grad"] else []
        facts += [f"version {row['version']}"] if row["version"] else []
        facts += [f"view of {row['view_of']}"] if row["view_of"] else []
        facts += [f"copy of {row['copy_of']}"] if row["copy_of"] else []
        say(row["name"] or f"%{row['id']}", f"  {', '.join(facts)}")
        origin = f"made by {row['made_by']} at {row['source']}" if row["made_by"] else "from outside"
        saved = f"; saved for backward by {', '.join(row['saved_by'])}" if row["saved_by"] else ""
        say("", f"     {origin}{saved}")
    if len(shown) < len(rows):
        say("", f"… {len(rows) - len(shown)} more")
    say("", f"saved for backward: {bytes_text(totals(graph)['saved_bytes'])} (each storage once, without parameters)")


def print_backward(graph: Graph, call: BackwardCall, console: Console, everything: bool = False) -> None:
    """Each step of a backward call in the order in which it ran: what arrived, what left to which input. Of a long one
    the first steps, unless everything is asked for."""
    say = _Say(console)
    of = " and ".join(graph.title(v) for v in call.roots)
    say(f"backward {call.index}", f" of {of}  {call.source}", style="bold")
    shown = call.steps if everything else call.steps[:MOST_LINES]
    for i, step in enumerate(shown):
        arrives = ", ".join(gradient_text(g) for g in step.into if g is not None) or "nothing"
        for line in _backward_lines(graph, step, i, arrives):
            say(*line)
    if len(shown) < len(call.steps):
        say("", f"… {len(call.steps) - len(shown)} more steps")


def _backward_lines(graph: Graph, step: Step, i: int, arrives: str) -> Iterator[tuple[str, str]]:
    hooked = "  (changed by a hook)" if step.changed_by_hook else ""
    if step.leaf is not None:
        yield f"{i + 1:>4}  {graph.title(step.leaf)}", f": gradient {arrives}{hooked}"
        return
    op = None if step.op is None else graph.ops[step.op]
    label = op.label if op else step.node.removeprefix("torch::autograd::")
    yield f"{i + 1:>4}  {label}", f": {arrives} arrives{hooked}  {op.module if op else ''}  {op.source if op else ''}"
    for position, argument, value in arguments(graph, step):
        sent = step.out[position]
        if sent is not None:
            yield "", f"       {gradient_text(sent)} to {argument if value is None else graph.title(value)}"


# -- words -------------------------------------------------------------------------------------------------------------


def number(x: float) -> str:
    """Four decimals; fewer if those are zeros: 0.0750, 1.1."""
    short = f"{x:.6g}"
    exact = math.isfinite(x) and "e" not in short and len(short.partition(".")[2]) <= 3
    return short if exact else number_text(float(x))


def values_text(values: Any) -> str:
    """Nested lists of numbers on one line, cut after a few."""
    if not isinstance(values, list):
        return number(values) if isinstance(values, int | float) else str(values)
    flat = values_of(values)
    if len(flat) > MOST_NUMBERS:
        return f"[{', '.join(values_text(v) for v in flat[:MOST_NUMBERS])}, … {len(flat)} numbers]"
    return number(flat[0]) if len(flat) == 1 and isinstance(flat[0], int | float) else \
        f"[{', '.join(values_text(v) for v in values)}]"  # fmt: skip


def values_of(values: Any) -> list:
    """The elements of nested lists."""
    return [x for v in values for x in values_of(v)] if isinstance(values, list) else [values]


def gradient_text(gradient: Gradient) -> str:
    """A gradient's value when it is small, else its shape and norm."""
    bad = f", {gradient.stats.nonfinite} not finite" if gradient.stats.nonfinite else ""
    if gradient.data is not None and len(values_of(gradient.data)) <= MOST_NUMBERS:
        return values_text(gradient.data)
    return f"{_shape(gradient.shape)} of norm {number(gradient.stats.norm)}{bad}"


def _shape(shape: Any) -> str:
    return f"({'×'.join(map(str, shape))})"


def _count(n: int, what: str) -> str:
    return f"{integer_text(n)} {what}{'s' if n != 1 else ''}"


class _Say:
    """Prints lines of foreign text: no markup, no control characters, nothing that the console's encoding lacks."""

    def __init__(self, console: Console):
        self._console = console

    def __call__(self, head: str, rest: str, style: str = "") -> None:
        indent = 0 if head else len(rest) - len(rest.lstrip())
        text = Text()
        text.append(self._safe(head), style=style or "bold")
        text.append(self._safe(rest.strip() if indent else rest.rstrip()), style=style if not head else None)
        for line in text.wrap(self._console, max(self._console.width - indent, 20), overflow="fold"):
            line.rstrip()
            self._console.print(Text(" " * indent) + line, soft_wrap=True)

    def _safe(self, part: str) -> str:
        part, encoding = printable(part), self._console.options.encoding
        ascii_only = self._console.options.ascii_only
        return part.encode(encoding, "backslashreplace").decode(encoding) if ascii_only else part
