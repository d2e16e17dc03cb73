"""Ways of computing one model, compared (model_checks/compare.py), for the terminal and as JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from kiem.files import plain
from kiem.format import count_text, number_text, printable, seconds_text

if TYPE_CHECKING:
    from kiem.model_checks.compare import Comparison, Comparisons

_EXPLAINED = (
    "reference: float64, no fused path. A way that builds on one that is wrong may agree with that one "
    "instead. A unit is the precision of the data type, times the number and what a rounding everywhere does to it. "
    "The bound is 8 units and those of the longest sum, of {terms:,} terms."
)
STYLES = {"ok": "green", "wrong": "bold red", "skipped": "dim"}


class ComparisonReport:
    """A rich renderable: the table, what is wrong in detail, what was skipped and why, notes."""

    def __init__(self, result: Comparisons) -> None:
        self.result = result

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        result = self.result
        yield Text(
            f"the same weights and batch in other ways: {count_text(result.parameters)} parameters, "
            f"{count_text(result.tokens)} tokens, {seconds_text(result.seconds)}",
            style="bold",
        )
        yield _table(result)
        for row in result.rows:
            if row.verdict != "ok":
                yield Text(_sentence(row), style="red" if row.verdict == "wrong" else "")
        yield Text(_EXPLAINED.format(terms=result.terms), style="dim")
        for note in result.notes:
            yield Text(f"note: {note}", style="dim")


def comparison_dict(result: Comparisons) -> dict[str, Any]:
    """For JSON: every field of the result; numbers that are not finite as text (files.plain)."""
    return plain({
        "ok": result.ok,
        "reference_loss": result.loss,
        "parameters": result.parameters,
        "tokens": result.tokens,
        "longest_sum_terms": result.terms,
        "seconds": result.seconds,
        "notes": list(result.notes),
        "ways": [_row_dict(row) for row in result.rows],
    })  # fmt: skip


def _row_dict(row: Comparison) -> dict[str, Any]:
    names = (
        "name",
        "change",
        "base",
        "against",
        "verdict",
        "reason",
        "loss",
        "expected_loss",
        "loss_units",
        "units",
        "bound",
        "parameter",
        "expected",
        "got",
        "wrong_parameters",
        "seconds",
    )
    return {
        **{name: getattr(row, name) for name in names},
        "dtype": _type(row),
        "element": row.element,
    }


def _type(row: Comparison) -> str:
    return str(row.dtype).removeprefix("torch.")


def _table(result: Comparisons) -> Table:
    table = Table(title="differences in units", title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for name in ("way", "against", "loss", "gradient", "bound", "verdict", "time"):
        table.add_column(name, justify="left" if name in ("way", "against", "verdict") else "right", overflow="fold")
    for row in result.rows:
        measured = row.verdict != "skipped" and row.parameter != ""
        numbers = [_units(row.loss_units), _units(row.units), _units(row.bound)] if measured else ["-"] * 3
        took = "-" if row.verdict == "skipped" else seconds_text(row.seconds)
        table.add_row(row.name, row.against or "-", *numbers, Text(row.verdict, style=STYLES[row.verdict]), took)
    return table


def _units(x: float) -> str:
    return number_text(x, 3 if 0 < x < 1 else 1)


def _sentence(row: Comparison) -> str:
    """What is wrong, or why it was skipped."""
    what = f"{row.name} ({row.change}): {row.verdict}"
    if row.reason:
        return printable(f"{what}: {row.reason}")
    parts = []
    if row.loss_units > row.bound:
        parts.append(f"loss {row.loss:.9g}, {row.against} {row.expected_loss:.9g}")
    if row.wrong_parameters:
        more = f", and {len(row.wrong_parameters) - 1} more parameters" if len(row.wrong_parameters) > 1 else ""
        got = "no gradient" if row.got is None else f"{row.got:.6g}"
        place = f"{row.parameter}{list(row.element or ())}"
        parts.append(f"gradient of {place}: {got}, {row.against} {row.expected:.6g}{more}")
    return printable(f"{what}: {'; '.join(parts)}")
