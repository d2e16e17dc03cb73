"""The chain rule from a loss to a tensor, in words and formulas for the terminal."""

from __future__ import annotations

import math
from itertools import groupby
from typing import Any

from rich.console import Console

from kiem.format import integer_text
from kiem.inspect.explain.chain import Chain, ChainStep, Link, scalar
from kiem.inspect.show.terminal import Say, block, gradient_text, number, shape_text, values_text

MOST_PATHS = 16  # that are listed one by one
MOST_STEPS = 24  # that are shown one by one, unless all are asked for


def paths(chain: Chain) -> list[list[tuple[ChainStep, Link]]]:
    """Each path from the loss to the leaf, none if there are more than 16."""
    if chain.paths > MOST_PATHS:
        return []
    entered = {link.to for step in chain.steps for link in step.links}
    found: list[list[tuple[ChainStep, Link]]] = []
    open_paths: list[tuple[int, list[tuple[ChainStep, Link]]]] = [
        (i, []) for i in range(len(chain.steps) - 1, -1, -1) if i not in entered
    ]
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
    lines: list[str] = []
    values: list[float] = []
    for path in paths(chain):
        factors: list[tuple[str, float]] = []
        before, factor, value = "L", chain.seed or 0.0, chain.seed or 0.0
        for _, link in path:
            local = scalar(link.local) or 0.0
            factor, value = factor * local, value * local
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
        written.append(shape_text(shape))
    return f"{shape_text(link.leaves.shape)} = {''.join(written)}"


def print_chain(chain: Chain, console: Console, everything: bool = False) -> None:
    """The chain rule from the loss to a leaf. `everything`: each step of a long one, instead of modules."""
    say = Say(console)
    say(f"dL/d{chain.title}", f"   {chain.tensor}, L = {chain.loss}, backward at {chain.source}", style="bold")
    for note in chain.notes:
        say("", f"note: {note}")
    listed = paths(chain)
    say("", f"{integer_text(chain.paths)} path{'s' if chain.paths != 1 else ''} from the loss, "
            f"{integer_text(len(chain.steps))} backward node{'s' if len(chain.steps) != 1 else ''}")  # fmt: skip
    short_enough = everything or len(chain.steps) <= MOST_STEPS
    for path in listed if short_enough else ():
        say("", "  " + " ← ".join(path_names(chain, path)))
    if short_enough:
        shown = list(range(len(chain.steps)))
    else:
        _print_modules(chain, say)
        shown = _last_steps(chain)
        say("", "the last nodes before the leaf:")
    for i in shown:
        _print_step(i, chain.steps[i], say)
    for join in chain.joins:
        last = join is chain.joins[-1]
        if last or short_enough or join.ok is not True:
            _print_join(chain, join, say)
    if not short_enough and len(chain.joins) > 1:
        good = [j for j in chain.joins[:-1] if j.ok]
        if good:
            worst = max(good, key=lambda j: (j.error or 0.0) / j.bound)
            say("", f"sums at earlier merges match: {len(good)}; largest relative error {worst.error:.1e}, "
                    f"bound {worst.bound:.0e}")  # fmt: skip
    for line in equations(chain):
        say(line, "", style="bold")
    if chain.gradient is not None:
        say("", f"gradient of this backward pass: {gradient_text(chain.gradient)}")


def _last_steps(chain: Chain) -> list[int]:
    """The steps that send to the leaf; before one that only changes the shape, what sends to it."""
    found: set[int] = set()
    ends: set[int | None] = {None}
    while ends:
        new = {i for i, step in enumerate(chain.steps) if any(k.to in ends for k in step.links)} - found
        found |= new
        ends = {i for i in new if chain.steps[i].label in ("t", "transpose", "view", "expand", "permute", "_to_copy")}
    return sorted(found)


def _print_modules(chain: Chain, say: Say) -> None:
    for folded in modules(chain):
        count = folded["last"] - folded["first"] + 1
        source = chain.steps[folded["first"]].source
        name = folded["module"] or (source.function if source else "") or "outside of modules"
        into = " → the leaf" if folded["leaf"] else ""
        say(f"  {name}", f" … {count} node{'s' if count > 1 else ''}, incoming norm {number(folded['arrives'])}, "
                         f"passed on {number(folded['leaves'])}{into}  {source or ''}")  # fmt: skip


def _print_step(i: int, step: ChainStep, say: Say) -> None:
    module = f"  in {step.module}" if step.module else ""
    say(f"{i + 1}  {step.label}", f"{module}  {step.source or ''}", style="cyan")
    if step.forward:
        given = ", ".join(f"{letter} = {name}" for letter, (_, name) in step.letters.items())
        say("", f"     {step.forward}" + (f"   where {given}" if given else ""))
    if step.note:
        say("", f"     {step.note}")
    arrives = ", ".join(gradient_text(g) for g in step.arrives if g is not None)
    say("", f"     incoming gradient {arrives}")
    for link in step.links:
        parts = [p for p in (link.formula, link.numbers if link.numbers != link.formula else "") if p]
        letter = link.title if link.numbers is not None else link.letter or link.title or link.argument
        say("", "     " + " = ".join([f"dL/d{letter}", *parts]) + (f"   {s}" if (s := shapes(step, link)) else ""))
        local = f"local derivative {values_text(link.local)}, " if link.local is not None else ""
        say("", f"       {local}gradient passed to {link.title or link.argument}: {gradient_text(link.leaves)}")


def _print_join(chain: Chain, join: Any, say: Say) -> None:
    count = len(join.contributions)
    say(f"{join.title or 'a result'}", f": {count} contribution{'s' if count != 1 else ''}", style="green")
    for i, j in join.contributions[:12]:
        step = chain.steps[i]
        sent = step.links[j]
        say("", f"     {gradient_text(sent.leaves)}  from {step.label}({sent.argument})  {step.source or ''}")
    if count > 12:
        say("", f"     … {count - 12} more")
    total = f"sum {values_text(join.total)}, " if join.total is not None and count > 1 else ""
    arrived = f"autograd {gradient_text(join.arrived)}" if join.arrived is not None else ""
    if join.ok:
        checked = f": relative error {join.error:.1e}, bound {join.bound:.0e}: matches"
    elif join.error is not None:
        checked = f": relative error {join.error:.1e}, bound {join.bound:.0e}: {join.note}"
    else:
        checked = f": {join.note}"
    say("", f"     {total}{arrived}{checked}", style="" if join.ok is not False else "bold red")
