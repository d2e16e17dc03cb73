"""What verification found, in the terminal and as JSON."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kiem.format import integer_text, printable
from kiem.grad.check import InputVerdict, Verdict
from kiem.grad.graph import Graph
from kiem.grad.verify import Result

MOST_ROWS = 30  # of parameters, before they are folded by module
ORDER = ("wrong", "unchecked", "kink", "ok", "zero")  # what a row of several verdicts is called: the first that occurs


def print_result(graph: Graph, result: Result, console: Console) -> None:
    """The headline, the first wrong operation, and the tables of operations, of parameters, and of what was not checked."""
    write = _Writer(console)
    write.line(headline(graph, result), "bold green" if result.ok else "bold red")
    if result.wrong:
        _first_wrong(graph, result, write)
    elif result.wrong_parameters:
        _wrong_parameter(graph, result.wrong_parameters[0], write)
    write.table(_operations(graph, result))
    if result.parameters:
        write.table(_parameters(graph, result))
    _remarks(graph, result, write)


def headline(graph: Graph, result: Result) -> str:
    """One sentence: is every gradient right?"""
    checked = [v for v in result.verdicts if v.verdict in ("ok", "kink", "wrong")]
    leaves = {v.value for _, v in result.parameters}
    what = f"{_count(len(checked), 'operation')}, {_count(len(leaves), 'parameter')} end to end"
    if result.wrong:
        op = graph.ops[result.wrong[0].op]
        others = len({v.op for v in result.wrong}) - 1
        more = f", and {_count(others, 'other operation')}" if others else ""
        return f"Wrong: the gradient of {op.label} at {op.source}{more}. Checked: {what}."
    if result.wrong_parameters:
        titles = {graph.title(v.value) for v in result.wrong_parameters}
        return f"Wrong: the whole gradient of {_list(sorted(titles))}; no single operation. Checked: {what}."
    if not checked:
        return "Nothing was checked: no backward call reached an operation that could be."
    worst = max((i.units for v in checked for i in v.inputs if math.isfinite(i.units)), default=0.0)
    return f"Every gradient is right: {what}; the largest error is {_units(worst)} units of precision."


def result_dict(graph: Graph, result: Result) -> dict[str, Any]:
    """For JSON. Numbers that are not finite are null; a verdict is one of ok, wrong, kink, zero, unchecked.

    ok: bool. headline: text. seconds: of checking. counts: operations by verdict.
    operations: per operation and backward call {op, backward, name, label, kind, module, source, backward_source, verdict, text,
    closed_form, checked_by, inputs}; parameters: per leaf and backward call {backward, name, ...}. `inputs` and `parameters` have
    {argument, value, name, verdict, dtype, shape, along, numeric, numeric_error, reference, units, bound, element, expected, got,
    wrong_elements}: along and numeric are autograd's and the numeric derivative along a random direction, units and bound are in
    units of the precision of dtype, element is the worst. first_wrong: index into operations, or null. notes: texts.
    """
    operations = []
    for verdict in result.verdicts:
        op = graph.ops[verdict.op]
        operations.append({
            "op": verdict.op, "backward": verdict.backward, "name": op.name, "label": op.label, "kind": op.kind,
            "module": op.module, "source": str(op.source),
            "backward_source": str(op.backward_source) if op.backward_source else None, "verdict": verdict.verdict,
            "text": verdict.text, "closed_form": verdict.closed_form, "checked_by": _checked_by(verdict),
            "inputs": [_input_dict(graph, i) for i in verdict.inputs],
        })  # fmt: skip
    return {
        "ok": result.ok,
        "headline": headline(graph, result),
        "seconds": result.seconds,
        "counts": dict(Counter(v.verdict for v in result.verdicts)),
        "first_wrong": next((i for i, v in enumerate(result.verdicts) if v.verdict == "wrong"), None),
        "operations": operations,
        "parameters": [{"backward": call, **_input_dict(graph, v)} for call, v in result.parameters],
        "notes": list(result.notes),
    }


def _input_dict(graph: Graph, verdict: InputVerdict) -> dict[str, Any]:
    made = {field.name: getattr(verdict, field.name) for field in dataclasses.fields(verdict)}
    made = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in made.items()}
    made["dtype"] = str(verdict.dtype).removeprefix("torch.")
    made["shape"] = list(verdict.shape)
    made["element"] = None if verdict.element is None else list(verdict.element)
    made["name"] = graph.title(verdict.value)
    return made


# -- what is wrong -----------------------------------------------------------------------------------------------------


def _first_wrong(graph: Graph, result: Result, write: _Writer) -> None:
    verdict = result.wrong[0]
    op = graph.ops[verdict.op]
    write.line("")
    where = f"{op.label} in {op.module} ({op.module_class})" if op.module else op.label
    write.line(f"The first wrong operation on the way back from the loss: {where}")
    write.field("called at", str(op.source))
    write.field("", op.source.text)
    if op.backward_source:
        write.field("backward at", str(op.backward_source))
    for number, wrong in enumerate(i for i in verdict.inputs if i.verdict == "wrong"):
        if number == 3:
            write.field("", "further arguments are wrong, too: see --json")
            break
        _wrong_input(graph, wrong, write)
    others = list(dict.fromkeys(v.op for v in result.wrong if v.op != verdict.op))
    for index in others[:5]:
        write.field("also wrong", f"{graph.ops[index].label} at {graph.ops[index].source}")
    if len(others) > 5:
        write.field("", f"and {len(others) - 5} more")


def _wrong_parameter(graph: Graph, verdict: InputVerdict, write: _Writer) -> None:
    write.line("")
    write.line("Each operation by itself is right, but this whole gradient is not: something between them changed it,")
    write.line("such as a hook, a change through .data, or a part of the way that was not recorded.")
    _wrong_input(graph, verdict, write)


def _wrong_input(graph: Graph, wrong: InputVerdict, write: _Writer) -> None:
    title = graph.title(wrong.value)
    named = f" ({title})" if title not in (wrong.argument, f"%{wrong.value}") else ""
    kind = f"{str(wrong.dtype).removeprefix('torch.')}{list(wrong.shape)}"
    share = f", {integer_text(wrong.wrong_elements)} of {integer_text(math.prod(wrong.shape))} elements wrong"
    write.field("argument", f"{wrong.argument}{named}, {kind}{share if wrong.wrong_elements else ''}")
    if wrong.element is not None:
        write.field("at element", f"{list(wrong.element)}: expected {_exact(wrong.expected)}, got {_exact(wrong.got)}")
    elif wrong.got is None:
        write.field("got", "None, where there is a gradient")
    write.field(
        "numerically",
        f"along a random direction {_exact(wrong.numeric)} +- {wrong.numeric_error:.1g}, by autograd {_exact(wrong.along)}",
    )
    unit = str(wrong.dtype).removeprefix("torch.")
    write.field("error", f"{_units(wrong.units)} units of the precision of {unit}; at most {_units(wrong.bound)} is rounding")


# -- tables ------------------------------------------------------------------------------------------------------------


def _operations(graph: Graph, result: Result) -> Table:
    rows: dict[tuple[str, str], list[Verdict]] = {}
    for verdict in result.verdicts:
        op = graph.ops[verdict.op]
        rows.setdefault((op.label, _checked_by(verdict)), []).append(verdict)
    table = _table("operations, worst error in units of precision", "operation", "runs", "error", "bound", "verdict", "checked by")
    for (label, by), verdicts in sorted(rows.items(), key=lambda row: (_rank(v.verdict for v in row[1]), row[0])):
        error, bound = _worst(i for v in verdicts for i in v.inputs)
        table.add_row(Text(_safe(label)), integer_text(len(verdicts)), error, bound, _mixed(verdicts), by)
    return table


def _parameters(graph: Graph, result: Result) -> Table:
    rows: dict[str, list[InputVerdict]] = {}
    for _, verdict in result.parameters:
        rows.setdefault(graph.title(verdict.value), []).append(verdict)
    what = "parameter"
    depth = max((title.count(".") for title in rows), default=0)
    while len(rows) > MOST_ROWS and depth > 0:
        what = "parameters of"
        folded: dict[str, list[InputVerdict]] = {}
        for title, verdicts in rows.items():
            folded.setdefault(".".join(title.split(".")[:depth]), []).extend(verdicts)
        rows, depth = folded, depth - 1
    table = _table("parameters end to end, worst error in units of precision", what, "gradients", "error", "bound", "verdict")
    for title, verdicts in rows.items():
        table.add_row(Text(_safe(title)), integer_text(len(verdicts)), *_worst(verdicts), _mixed(verdicts))
    return table


def _remarks(graph: Graph, result: Result, write: _Writer) -> None:
    kinks = [v for v in result.verdicts if v.verdict == "kink"]
    for place, count in Counter(f"{graph.ops[v.op].label} at {graph.ops[v.op].source}" for v in kinks).most_common(10):
        write.line(f"kink: {place}{_times(count)} met a point without a derivative; autograd's choice lies between the sides")
    skipped = Counter((graph.ops[v.op].label, str(graph.ops[v.op].source), v.text) for v in result.verdicts if v.verdict == "unchecked")
    for (label, source, text), count in skipped.most_common(20):
        write.line(f"not checked: {label} at {source}{_times(count)}: {text}", "yellow")
    if len(skipped) > 20:
        write.line(f"not checked: {len(skipped) - 20} more places", "yellow")
    for note in result.notes:
        write.line(f"note: {note}", "yellow")


def _checked_by(verdict: Verdict) -> str:
    """By what the element-wise reference came, where there was one; the number is always beside it."""
    if verdict.verdict in ("zero", "unchecked"):
        return "-"
    references = {i.reference for i in verdict.inputs}
    if "rule" in references:
        return "rule"
    if any(r.startswith("the operations inside") for r in references):
        return "operations inside"
    return "torch, no closed form" if any(references) else "number, no closed form"


def _worst(verdicts: Iterable[InputVerdict]) -> tuple[str, str]:
    """Error and bound of the one that comes nearest to its bound, or is furthest beyond."""
    worst = max(verdicts, key=lambda v: (v.verdict == "wrong", v.units / v.bound if v.bound else v.units), default=None)
    return ("-", "-") if worst is None else (_units(worst.units), _units(worst.bound))


def _rank(verdicts: Iterable[str]) -> int:
    return min(ORDER.index(v) for v in verdicts)


def _mixed(verdicts: list[Any]) -> Text:
    counts = Counter(v.verdict for v in verdicts)
    parts = [v if len(counts) == 1 else f"{counts[v]} {v}" for v in ORDER if v in counts]
    style = {"wrong": "bold red", "unchecked": "yellow", "ok": "green"}.get(ORDER[_rank(counts)], "")
    return Text(", ".join(parts), style=style)


# -- writing -----------------------------------------------------------------------------------------------------------


class _Writer:
    """Lines for a console of any width and encoding: foreign text can neither move the cursor nor be markup."""

    def __init__(self, console: Console):
        self.console = console

    def line(self, text: str, style: str = "") -> None:
        self.console.print(Text(_safe(text), style=style), soft_wrap=False)

    def field(self, name: str, text: str) -> None:
        self.line(f"  {name:<12}{text}")

    def table(self, table: Table) -> None:
        if table.row_count:
            self.console.print(table)


def _table(title: str, first: str, *others: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name, justify="right" if name in ("runs", "gradients", "error", "bound") else "left", overflow="fold")
    return table


def _safe(text: str) -> str:
    return printable(text).replace("\n", "\\n")


def _units(x: float) -> str:
    if not math.isfinite(x):
        return "inf"
    return f"{x:.2g}" if x < 1000 else f"{x:.1e}"


def _exact(x: float | None) -> str:
    return "None" if x is None else f"{x:.9g}"


def _count(n: int, what: str) -> str:
    return f"{integer_text(n)} {what}" + ("" if n == 1 else "s")


def _times(count: int) -> str:
    return f" ({count} times)" if count > 1 else ""


def _list(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
