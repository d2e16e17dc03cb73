"""What verification found, in the terminal and as JSON."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kiem.files import plain
from kiem.format import integer_text, printable
from kiem.inspect.explain.backward_errors import changes_after
from kiem.inspect.graph.model import Graph, Op, Source
from kiem.inspect.verify.operation import InputVerdict, Verdict
from kiem.inspect.verify.verifier import Result

MOST_ROWS = 30  # of parameters, before they are folded by module
ORDER = ("wrong", "nonfinite", "coarse", "unchecked", "hook", "kink", "ok", "zero")  # how bad, in a row of several
NUMBERS = ("runs", "gradients", "error", "bound")
MOST_UNITS = 1e12  # beyond it, units say nothing
COARSE = 1e3  # units: a bound of a number without an element-wise reference is not a matter of rounding
_PACKAGES = re.compile(r"[^\s(,'\"]*[\\/](?:site|dist)-packages[\\/]")
_UNRECORDED = re.compile(r"(.+): made by no recorded operation; not checked by itself")
HEADLINES = {"right": "bold green", "wrong": "bold red", "incomplete": "bold yellow"}
STYLES = {"nonfinite": "bold red", "coarse": "yellow", "wrong": "bold red", "unchecked": "yellow", "ok": "green"}


def print_result(graph: Graph, result: Result, console: Console) -> None:
    """The headline, the first wrong operation, tables of operations and of parameters, and what was not checked."""
    write = _Writer(console)
    write.line(headline(graph, result), HEADLINES[result.verdict])
    if result.wrong:
        _first_wrong(graph, result, write)
    elif result.wrong_parameters:
        _wrong_parameter(graph, result, result.wrong_parameters[0], write)
    _operations(graph, result, write)
    _parameters(graph, result, write)
    _remarks(graph, result, write)


def headline(graph: Graph, result: Result) -> str:
    """One sentence: is every gradient right?"""
    checked = [v for v in result.verdicts if v.verdict in ("ok", "kink", "wrong")]
    leaves = {v.value for _, v in result.parameters}
    what = f"{_count(len(checked), 'operation')}, {_count(len(leaves), 'parameter')} end to end"
    if result.wrong:
        op = graph.op(result.wrong[0].op)
        others = len({v.op for v in result.wrong}) - 1
        more = f", and {_count(others, 'other operation')}" if others else ""
        if result.wrong[0].verdict == "nonfinite":
            return f"Not finite: {result.wrong[0].text or op.label}{more}. Checked: {what}."
        return f"Wrong: the gradient of {op.label} at {_place(op.source)}{more}. Checked: {what}."
    if any(v.verdict == "nonfinite" for v in result.wrong_parameters):
        titles = {graph.title(v.value) for v in result.wrong_parameters if v.verdict == "nonfinite"}
        return f"Not finite: the gradient of {_list(sorted(titles))}. Checked: {what}."
    if result.wrong_parameters:
        titles = {graph.title(v.value) for v in result.wrong_parameters}
        return f"Wrong: the whole gradient of {_list(sorted(titles))}; no single operation. Checked: {what}."
    if not checked:
        return _nothing(graph)
    if result.verdict == "incomplete":
        return (
            f"Incomplete: {', '.join(_not_checked(graph, result))}. Nothing wrong was found in {what}{_sharp(checked)}"
        )
    return f"Every gradient is right: {what}{_sharp(checked)}"


def _nothing(graph: Graph) -> str:
    """Why no gradient was checked."""
    failure = graph.failure
    if failure is not None:
        at = f" at {_place(failure.source)}" if failure.source else ""
        before = "before backward()" if not graph.backwards else "in backward()"
        return f"Nothing could be checked: the program failed {before} ({failure.kind}{at})."
    if all(call.transformed for call in graph.backwards):
        return (
            "Nothing could be checked: no backward call ran. Gradients by torch.func and in forward mode are recorded, "
            "not verified."
        )
    return "Nothing could be checked: no backward call reached an operation that can be."


def _sharp(checked: list[Verdict]) -> str:
    """How large the errors were, and how large one must be to be found."""
    inputs = [i for v in checked for i in v.inputs]
    worst = max((i for i in inputs if math.isfinite(i.units) and not _coarse(i)), key=lambda i: i.units, default=None)
    ulp = "0 ulp" if worst is None else f"{_units(worst.units)} ulp ({_dtype(worst)})"
    missed = max((i.sharpness for i in inputs), default=0.0)
    found = f"; an error of {missed:.1%} in any gradient would have shown" if missed > 1e-3 else ""
    return f"; largest rounding error: {ulp}{found}."


def _not_checked(graph: Graph, result: Result) -> list[str]:
    """What was not checked and why, in short, the program's failure first."""
    kinds = Counter(gap.kind for gap in result.gaps)
    skipped = sum(v.verdict == "unchecked" for v in result.verdicts)
    verdicts = [v.verdict for v in result.verdicts] + [v.verdict for _, v in result.parameters]
    coarse = verdicts.count("coarse")
    found = []
    if graph.failure is not None:
        at = f" at {_place(graph.failure.source)}" if graph.failure.source else ""
        found.append(f"the program failed ({graph.failure.kind}{at}), and what comes after was not checked")
    found += [f"{_count(skipped, 'operation')} not checked ({_reason(graph, result)})"] if skipped else []
    found += [f"{_count(coarse, 'gradient')} checked too coarsely to tell"] if coarse else []
    found += [f"{_count(kinds['node'], 'kind')} of backward nodes not recorded"] if kinds["node"] else []
    found += ["gradients by torch.func are not verified"] if kinds["transform"] else []
    found += ["not everything was recorded"] if kinds["unrecorded"] else []
    found += ["steps of a loop were left out to save time"] if kinds["repeat"] else []
    if not result.parameters:
        found.append("no parameter checked end to end")
    elif kinds["end to end"]:
        found.append(f"{_count(kinds['end to end'], 'backward call')} not checked end to end")
    return found or ["not everything was checked"]


def _reason(graph: Graph, result: Result) -> str:
    """Of the first operation that was not checked."""
    first = next(v for v in result.verdicts if v.verdict == "unchecked")
    op = graph.op(first.op)
    return _short(f"{op.label} at {op.source}: {first.text}")


def result_dict(graph: Graph, result: Result) -> dict[str, Any]:
    """For JSON. Numbers that are not finite are text (files.plain); a verdict is one of ORDER.

    `verdict` (right, wrong, incomplete), `ok` (true, false, null), `headline`, `seconds` (of checking), `counts`
    (operations by verdict), `notes`, and
    `operations`: per operation and backward call `op, backward, name, label, kind, module, source, backward_source,
    verdict, text, closed_form, checked_by, inputs`; `first_wrong` is the index of one of them, or null;
    `parameters`: per leaf and backward call, `backward` and the keys of an input.
    An input: `argument, value, name, verdict, dtype, shape, reference`; `along` and `numeric` (± `numeric_error`),
    autograd's and the numeric derivative along a random direction; `units` and `bound`, the largest error and what
    rounding explains, in units of the coarsest precision that it was computed in; `element`, the worst, with `expected`
    and `got` (null: backward returned None); `wrong_elements`, how many.
    """
    operations = []
    for verdict in result.verdicts:
        op = graph.op(verdict.op)
        operations.append({
            "op": verdict.op, "backward": verdict.backward, "name": op.name, "label": op.label, "kind": op.kind,
            "module": op.module, "source": str(op.source),
            "backward_source": str(op.backward_source) if op.backward_source else None, "verdict": verdict.verdict,
            "text": verdict.text, "closed_form": verdict.closed_form, "checked_by": _checked_by(verdict),
            "inputs": [_input_dict(graph, i) for i in verdict.inputs],
        })  # fmt: skip
    return {
        "verdict": result.verdict,
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
    return plain(made | {"dtype": _dtype(verdict), "name": graph.title(verdict.value)})


# -- what is wrong -----------------------------------------------------------------------------------------------------


def _first_wrong(graph: Graph, result: Result, write: _Writer) -> None:
    verdict = result.wrong[0]
    op = graph.op(verdict.op)
    where = f"{op.label} in {op.module} ({op.module_class})" if op.module else op.label
    rows = [("called at", _place(op.source)), ("", op.source.text)]
    if op.backward_source:
        rows.append(("backward at", _place(op.backward_source)))
    if verdict.text:
        rows.append(("why", verdict.text))
    rows += _changed_since(graph, verdict)
    wrong = [i for i in verdict.inputs if i.verdict == "wrong"]
    for one in wrong[:3]:
        rows += _wrong_input(graph, one)
    if len(wrong) > 3:
        rows.append(("", f"{len(wrong) - 3} more arguments are wrong"))
    others = {v.op: graph.op(v.op) for v in result.wrong if v.op != verdict.op}.values()
    places = Counter(f"{op.label} at {_place(op.source)}" for op in others)
    rows += [("also wrong", f"{place}{_times(count)}") for place, count in list(places.items())[:5]]
    if len(places) > 5:
        rows.append(("", f"and {len(places) - 5} more"))
    if op.kind == "function":
        rows.append(
            (
                "if intended",
                "(straight-through estimator, reversed gradient): set surrogate_gradient = True in the class",
            )
        )
    elif op.kind == "compiled":
        rows.append(("inside", "run with --eager to check the operations inside"))
    write.line(f"\nFirst wrong operation in backward order: {where}")
    write.fields(rows)


def _wrong_parameter(graph: Graph, result: Result, verdict: InputVerdict, write: _Writer) -> None:
    write.line(
        "\nEach operation that was checked is right by itself, but this gradient as a whole is not: something between "
        "them changed it."
    )
    call = next((call for call, v in result.parameters if v is verdict), None)
    write.fields(_wrong_input(graph, verdict) + _suspects(graph, result, verdict, call))


def _suspects(graph: Graph, result: Result, verdict: InputVerdict, call: int | None) -> list[tuple[str, str]]:
    """The lines on the way that may have changed a gradient: hooks, what was not checked, changes through .data."""
    rows = [("hook", line) for line in graph.value(verdict.value).hooks]
    for backward in graph.backwards:
        changed = (s.op for s in backward.steps if s.changed_by_hook and s.op is not None and backward.index == call)
        rows += [("changed at", f"{graph.op(i).label} at {_place(graph.op(i).source)}") for i in changed]
    for v in result.verdicts:
        if v.backward == call and v.verdict in ("unchecked", "coarse", "hook"):
            op = graph.op(v.op)
            rows.append(("not checked", _short(f"{op.label} at {op.source}: {v.text}")))
    rows += [("see", _short(note)) for note in result.notes if "changed in place through .data" in note]
    rows = list(dict.fromkeys(rows))
    return rows[:6] or [("look for", "a tensor hook, a change through .data, or a saved tensor that was replaced")]


def _changed_since(graph: Graph, verdict: Verdict) -> list[tuple[str, str]]:
    """What an operation had saved for its backward, if it was changed in place before that ran."""
    after = next((call.after_op for call in graph.backwards if call.index == verdict.backward), None)
    op = graph.op(verdict.op)
    if after is None or op.kind != "op":
        return []
    found: dict[Source, tuple[str, Op]] = {}
    for value, other in changes_after(graph, op, after):
        if other.region != "optimizer" and other.source != op.source:
            found.setdefault(other.source, (value.name or value.describe(), other))
    return [
        ("changed", f"{name} at {_place(other.source)}, after this operation and before its backward: "
         f"{other.source.text.strip()}")
        for name, other in found.values()
    ][:3]  # fmt: skip


def _wrong_input(graph: Graph, wrong: InputVerdict) -> list[tuple[str, str]]:
    title, dtype = graph.title(wrong.value), _dtype(wrong)
    named = f" ({title})" if title not in (wrong.argument, f"%{wrong.value}") else ""
    share = f", {integer_text(wrong.wrong_elements)} of {integer_text(math.prod(wrong.shape))} elements wrong"
    at = "" if wrong.element is None else f"[{', '.join(map(str, wrong.element))}] "
    argument = f"`{wrong.argument}`{named}" if wrong.argument != title else title
    rows = [("input", f"{argument}, {dtype}{list(wrong.shape)}{share if wrong.wrong_elements else ''}")]
    number = f"{_exact(wrong.numeric)} ± {wrong.numeric_error:.1g}"
    if wrong.element is not None and wrong.wrong_elements:
        rows.append(("element", f"{at}{_instead(wrong)}"))
        rows.append(("direction", f"numeric derivative {number}, autograd {_exact(wrong.along)}"))
    else:
        rows += [("got", "None, which means zero")] if wrong.got is None else []
        rows.append(("direction", f"numeric derivative {number}, autograd {_exact(wrong.along)}"))
    if _measurable(wrong):
        error, bound = _error_and_bound(wrong)
        of = "" if _relative(wrong) else " ulp"
        rows.append(("error", f"{error}{of}; rounding explains at most {bound}{of}"))
    return rows


# -- tables ------------------------------------------------------------------------------------------------------------


def _operations(graph: Graph, result: Result, write: _Writer) -> None:
    rows: dict[tuple[str, str], list[Verdict]] = {}
    for verdict in result.verdicts:
        rows.setdefault((graph.op(verdict.op).label, _checked_by(verdict)), []).append(verdict)
    ordered = sorted(rows.items(), key=lambda row: (_rank(row[1]), row[0]))
    write.table(
        "\nOperations: largest error and its bound, in ulp (multiples of the data type's epsilon)",
        ("operation", "runs", "error", "bound", "verdict", "checked by"),
        [(label, integer_text(len(verdicts)), *_worst(i for v in verdicts for i in v.inputs), _mixed(verdicts), by)
         for (label, by), verdicts in ordered],
    )  # fmt: skip


def _parameters(graph: Graph, result: Result, write: _Writer) -> None:
    what, rows = "parameter", _by_value(graph, result)
    if len(rows) > MOST_ROWS:
        what, rows = "parameters of", {}
        for _, verdict in result.parameters:
            rows.setdefault(graph.title(verdict.value), []).append(verdict)
    depth = max((len(_parts(title)) for title in rows), default=1) - 1
    while len(rows) > MOST_ROWS and depth > 0:
        folded: dict[str, list[InputVerdict]] = {}
        for title, verdicts in rows.items():
            folded.setdefault("".join(_parts(title)[:depth]), []).extend(verdicts)
        rows, depth = folded, depth - 1
    write.table(
        "\nParameters end to end: largest error and its bound, in ulp",
        (what, "gradients", "error", "bound", "verdict"),
        [(title, integer_text(len(verdicts)), *_worst(verdicts), _mixed(verdicts))
         for title, verdicts in sorted(rows.items(), key=lambda row: _rank(row[1]) > 0)],
    )  # fmt: skip


def _by_value(graph: Graph, result: Result) -> dict[str, list[InputVerdict]]:
    """A row for each leaf; several of one name are numbered."""
    rows: dict[str, list[InputVerdict]] = {}
    of: dict[int, str] = {}
    for _, verdict in result.parameters:
        if verdict.value not in of:
            title, number = graph.title(verdict.value), 1
            while (name := title if number == 1 else f"{title}#{number}") in rows:
                number += 1
            of[verdict.value] = name
        rows.setdefault(of[verdict.value], []).append(verdict)
    return rows


def _parts(title: str) -> list[str]:
    """A name by levels: `net`, `.0`, `.weight`; `params`, `["0.weight"]`."""
    return re.findall(r"\[[^\]]*\]|\.?[^.\[]+|.", title)


def _remarks(graph: Graph, result: Result, write: _Writer) -> None:
    def place(verdict: Verdict) -> str:
        return f"{graph.op(verdict.op).label} at {_place(graph.op(verdict.op).source)}"

    kinks = Counter(place(v) for v in result.verdicts if v.verdict == "kink")
    skipped = Counter(f"{place(v)}: {v.text}" for v in result.verdicts if v.verdict == "unchecked")
    if kinks or skipped or result.notes:
        write.line("")
    for what, count in kinks.most_common(10):
        write.line(
            f"not differentiable here: {what}{_times(count)}: input at a tie or corner; autograd's subgradient is valid"
        )
    for what, count in skipped.most_common(20):
        write.line(f"not checked: {_short(what)}{_times(count)}", "yellow")
    for counter, shown, what in ((kinks, 10, "not differentiable:"), (skipped, 20, "not checked:")):
        if len(counter) > shown:
            write.line(f"{what} {len(counter) - shown} more places")
    for note in _joined(result.notes):
        write.line(f"note: {_short(note)}", "yellow")


def _joined(notes: list[str]) -> list[str]:
    """Notes on nodes that nothing recorded made, as one: in the place of the first."""
    nodes = [found[1] for note in notes if (found := _UNRECORDED.fullmatch(note))]
    if len(nodes) < 2:
        return notes
    one = f"{len(nodes)} kinds of backward nodes belong to no recorded operation and were not checked by themselves: "
    first = next(i for i, note in enumerate(notes) if _UNRECORDED.fullmatch(note))
    rest = [note for note in notes[first:] if not _UNRECORDED.fullmatch(note)]
    return [*notes[:first], one + _list(nodes), *rest]


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
    if worst is None:
        return "-", "-"
    error, bound = _error_and_bound(worst)
    return (error, bound) if _measurable(worst) else (_instead(worst, 3), bound)


def _error_and_bound(verdict: InputVerdict) -> tuple[str, str]:
    """In units of precision, or relative to the number where only that was compared and the bound is far from what
    rounding explains."""
    unit = _relative(verdict)
    if unit:
        return f"{verdict.units * unit:.1g} relative", f"{verdict.bound * unit:.1g} relative"
    return _units(verdict.units), _units(verdict.bound)


def _coarse(verdict: InputVerdict) -> bool:
    return not verdict.reference and verdict.bound > COARSE


def _relative(verdict: InputVerdict) -> float:
    """A unit as a part of the number along the direction; 0 if units are to be shown."""
    known = _coarse(verdict) and verdict.units and math.isfinite(verdict.units) and verdict.numeric
    return abs((verdict.along - verdict.numeric) / verdict.numeric) / verdict.units if known else 0.0


def _measurable(verdict: InputVerdict) -> bool:
    """Whether its error in units says something: not where the right value is 0."""
    if None in (verdict.expected, verdict.got) or verdict.verdict != "wrong":
        return True
    return bool(verdict.expected) and verdict.units <= MOST_UNITS


def _instead(verdict: InputVerdict, digits: int = 9) -> str:
    return f"expected {_exact(verdict.expected, digits)}, got {_exact(verdict.got, digits)}"


def _rank(verdicts: Iterable[Any]) -> int:
    return min(ORDER.index(v.verdict) for v in verdicts)


def _mixed(verdicts: list[Any]) -> str:
    counts = Counter(v.verdict for v in verdicts)
    return ", ".join(v if len(counts) == 1 else f"{counts[v]} {v}" for v in ORDER if v in counts)


# -- writing -----------------------------------------------------------------------------------------------------------


class _Writer:
    """Foreign text for a console of any width and encoding: it can neither move the cursor nor be markup."""

    def __init__(self, console: Console):
        self.console = console

    def safe(self, text: str, style: str = "") -> Text:
        """As it can be printed."""
        text, options = printable(text.replace("\r", "\\r")), self.console.options
        if options.ascii_only:
            text = text.replace("±", "+-").encode(options.encoding, "backslashreplace").decode(options.encoding)
        return Text(text, style=style)

    def line(self, text: str, style: str = "") -> None:
        """One paragraph."""
        self.console.print(self.safe(text, style))

    def fields(self, rows: list[tuple[str, str]]) -> None:
        """Names and what they have, wrapped beside the name."""
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_column(no_wrap=True)
        grid.add_column(overflow="fold")
        for name, text in rows:
            grid.add_row(f"  {name}", self.safe(text))
        self.console.print(grid)

    def table(self, title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
        """Nothing where there are no rows."""
        if not rows:
            return
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        for name in columns:
            table.add_column(name, justify="right" if name in NUMBERS else "left", overflow="fold")
        for row in rows:
            styles = [STYLES.get(text.split(",")[0].split(" ")[-1], "") if name == "verdict" else ""
                      for name, text in zip(columns, row, strict=True)]  # fmt: skip
            table.add_row(*(self.safe(text, style) for text, style in zip(row, styles, strict=True)))
        self.line(title, "bold")
        self.console.print(table)


def _dtype(verdict: InputVerdict) -> str:
    return str(verdict.dtype).removeprefix("torch.")


def _place(source: Source) -> str:
    return _short(str(source))


def _short(text: str) -> str:
    """Files of installed packages without the folder that all of these are in."""
    return _PACKAGES.sub("", text)


def _units(x: float) -> str:
    if not math.isfinite(x):
        return "inf"
    return f"{x:.2g}" if x < 1000 else f"{x:.1e}"


def _exact(x: float | str | None, digits: int = 9) -> str:
    return str(x) if x is None or isinstance(x, str) else f"{x:.{digits}g}"  # a complex number is text


def _count(n: int, what: str) -> str:
    return f"{integer_text(n)} {what}" + ("" if n == 1 else "s")


def _times(count: int) -> str:
    return f" ({count} times)" if count > 1 else ""


def _list(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
