"""A recorded program in words, for the terminal: what it did in a few lines, operations, tensors, backward calls."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby, islice

from rich.console import Console

from kiem.format import bytes_text, integer_text
from kiem.inspect.explain.chain import arguments, called, tensors
from kiem.inspect.explain.numbering import Ran, alike, numbered, numbers_text
from kiem.inspect.graph.model import BackwardCall, Graph, Repeat, Step
from kiem.inspect.show.terminal import Say, block, count_text, gradient_text

MOST_LINES = 120  # operations, tensors
MOST_STEPS = 24  # that are shown one by one, unless all are asked for
MOST_CALLS = 3  # backward calls that do the same, whose gradients are shown
MOST_GROUPS = 24  # backward calls that differ
MOST_LEAVES = 12  # gradients of one backward call


def totals(graph: Graph) -> dict[str, int]:
    """Numbers of a program. `saved_bytes`: of the memory that backward keeps, each storage once, without that of
    parameters and other leaves that ask for a gradient; of the step that keeps most."""
    leaves = {v.storage: v.numel for v in graph.values if v.is_parameter or (v.is_leaf and v.requires_grad)}
    saved = [{graph.value(v).storage for op in one.ops for v in op.saved} - leaves.keys() for one in graph.passes]
    return {
        "operations": len(graph.ops), "tensors": len(graph.values), "leaves": len(leaves),
        "leaf_elements": sum(leaves.values()), "backward_calls": sum(one.times for one in numbered(graph)),
        "saved_bytes": max((sum(graph.storages[s].nbytes for s in step) for step in saved), default=0),
    }  # fmt: skip


def print_summary(graph: Graph, console: Console) -> None:
    """What the program did, in a few lines."""
    say, numbers = Say(console), totals(graph)
    say("recorded program", f": {count_text(numbers['operations'], 'operation')}, "
        f"{count_text(numbers['tensors'], 'tensor')}, {count_text(numbers['leaves'], 'leaf tensor')} with "
        f"requires_grad=True ({count_text(numbers['leaf_elements'], 'element')})")  # fmt: skip
    say("", f"saved for backward: {bytes_text(numbers['saved_bytes'])} (each storage once, without parameters)")
    groups = alike(graph)
    for group in groups[:MOST_GROUPS]:
        _print_passes(graph, group, say)
    if len(groups) > MOST_GROUPS:
        say("", f"… {count_text(len(groups) - MOST_GROUPS, 'more backward call')} that differ")
    for repeat in graph.repeats:
        kept = next((g for g in groups if any(repeat.first < r.call.after_op <= repeat.last + 1 for r in g)), [])
        times = max(repeat.times, sum(one.times for one in kept))
        shown = "first shown" if len(kept) < 2 else f"first {len(kept)} shown"
        say("loop body", f" ({_lines(graph, repeat)}) ran {integer_text(times)} times; {shown}")
    for note in graph.notes:
        say("note", f": {note}")
    if graph.failure is not None:
        say(f"{graph.failure.kind}", f": {graph.failure.message}  {graph.failure.source or ''}", style="bold red")
        if graph.failure.explanation:
            say("", graph.failure.explanation)


def _print_passes(graph: Graph, group: list[Ran], say: Say) -> None:
    """Backward calls that do the same: what they are, and the gradients of the first ones."""
    call, many = group[0].call, sum(one.times for one in group) > 1
    kind = "autograd.grad," if call.partial else "backward"
    of = " and ".join(called(graph, v) for v in call.roots) or "?"
    inside = ", inside another one" if call.nested else ""
    say(f"{kind} {numbers_text(group)}", f" from {of}{inside}: {count_text(len(call.steps), 'node')}, "
        f"{count_text(len(call.leaf_grads), 'gradient')}{' each' if many else ''}  {call.source}")  # fmt: skip
    by_leaf = zip(*(one.call.leaf_grads.items() for one in group[:MOST_CALLS]), strict=False)
    for gradients in islice(by_leaf, MOST_LEAVES):
        first, *later = (gradient_text(gradient) for _, gradient in gradients)
        common = f"{first.partition(' with norm ')[0]} with norm "
        told = ", then ".join([first, *(text.removeprefix(common) for text in later)])
        say("", f"  dL/d{graph.title(gradients[0][0])} = {told}")
    if len(call.leaf_grads) > MOST_LEAVES:
        say("", f"  … {len(call.leaf_grads) - MOST_LEAVES} more")
    if len(group) > MOST_CALLS:
        say("", f"  … and of {count_text(len(group) - MOST_CALLS, 'later pass', 'later passes')}")


def _lines(graph: Graph, repeat: Repeat) -> str:
    """`lines 9 to 16 of train.py`: what a loop's body spans in the file of its backward call."""
    sources = [op.source for op in graph.ops_between(repeat.first, repeat.last + 1)]
    calls = [call.source for call in graph.backwards if repeat.first < call.after_op <= repeat.last + 1]
    file = (calls or sources)[-1].file
    numbers = [source.line for source in (*sources, *calls) if source.file == file]
    low, high = min(numbers), max(numbers)
    return f"line {low} of {file}" if low == high else f"lines {low} to {high} of {file}"


def print_hint(graph: Graph, call: BackwardCall, console: Console) -> None:
    """How to get the chain rule, where it was not shown because there are many leaves or large ones."""
    names = list(dict.fromkeys(name for v in call.leaf_grads if (name := graph.value(v).name)))
    if names:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        Say(console)("chain rule", f": add --wrt NAME, where NAME is {', '.join(names[:5])}{more}")


def print_operations(graph: Graph, console: Console, everything: bool = False) -> None:
    """Each operation in the order in which it ran; runs in one module folded if there are many."""
    say = Say(console)
    if everything or len(graph.ops) <= MOST_LINES:
        for op in graph.ops:
            made = ", ".join(f"{graph.title(v)} {graph.value(v).describe()}" for v in op.outputs)
            given = ", ".join(graph.title(v) for _, v in op.inputs)
            marks = [op.region, "random" if op.random else "", "in place" if op.mutates else "", op.module,
                     "" if op.grad_enabled else "no_grad"]  # fmt: skip
            said = ", ".join(mark for mark in marks if mark)
            say(f"{op.index:>4}  {op.label}", f"({given}) → {made or 'nothing'}  {said}  {op.source}")
        return
    for module, run in groupby(graph.ops, lambda op: block(op.module)):
        ops = list(run)
        name = module or "outside of modules"
        say(f"{ops[0].index:>4}  {name}", f" … {count_text(len(ops), 'operation')}  {ops[0].source}")


def print_tensors(graph: Graph, console: Console, everything: bool = False) -> None:
    """The table of all tensors, then what is saved for backward."""
    say, rows = Say(console), tensors(graph)
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
    say = Say(console)
    of = " and ".join(called(graph, v) for v in call.roots)
    which = numbers_text([one for one in numbered(graph) if one.call is call])
    say(f"backward {which}", f" from {of}  {call.source}", style="bold")
    shown = call.steps if everything else call.steps[:MOST_LINES]
    for i, step in enumerate(shown):
        arrives = ", ".join(gradient_text(g) for g in step.into if g is not None) or "nothing"
        for line in _backward_lines(graph, step, i, arrives):
            say(*line)
    if len(shown) < len(call.steps):
        say("", f"… {count_text(len(call.steps) - len(shown), 'more node')}")


def _backward_lines(graph: Graph, step: Step, i: int, arrives: str) -> Iterator[tuple[str, str]]:
    hooked = "  (changed by a hook)" if step.changed_by_hook else ""
    if step.leaf is not None:
        yield f"{i + 1:>4}  {graph.title(step.leaf)}", f": gradient {arrives}{hooked}"
        return
    op = None if step.op is None else graph.op(step.op)
    label = op.label if op else step.node.removeprefix("torch::autograd::")
    place = f"{op.module}  {op.source}" if op else ""
    yield f"{i + 1:>4}  {label}", f": incoming gradient {arrives}{hooked}  {place}"
    for position, argument, value in arguments(graph, step):
        sent = step.out[position]
        if sent is not None:
            yield "", f"       passes {gradient_text(sent)} to {argument if value is None else graph.title(value)}"
