"""The report in the terminal: the loss curve in braille dots, and tables. Plain ASCII where there is no more."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from kiem.format import UNKNOWN, count_text, integer_text, is_number, number_text, percent_text, plural, printable
from kiem.report.facts import facts, headline, plan_rows

CURVE_ROWS, MOST_CURVE_COLUMNS = 10, 100
SAMPLE_LINES = 10
# Bit of the dot in column x (0..1), row y (0..3, from the top) of a braille cell (Unicode block U+2800).
BRAILLE_BITS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))


def render_terminal(report: dict[str, Any]) -> "TerminalReport":
    """A rich renderable of a report (report/summary.py): print it with a rich console of any width."""
    return TerminalReport(report)


class TerminalReport:
    """Draws itself for the console's width and encoding."""

    def __init__(self, report: dict[str, Any]) -> None:
        self.report = report

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        report = self.report
        yield Text(_safe(f"{report['name']}: {headline(report)}", options), style="bold")
        yield Text()
        yield from self._curve(options)
        yield _results(report)
        if any(of["planned"] is not None for of in report["planned"].values()):
            yield _plan(report["planned"])
        if report["python_samples"]:
            yield _python(report["python_samples"])
        yield from self._sample(options)
        for problem in report["problems"]:
            yield Text(_safe(f"note: {problem}", options), style="yellow")

    def _curve(self, options: ConsoleOptions) -> RenderResult:
        curve = self.report["curve"]
        points = [(x, y) for x, y in zip(curve["tokens"], curve["train_loss"], strict=True) if is_number(y)]
        if len(points) < 2:
            return
        held_out = [
            (e["tokens"], e["loss"])
            for e in self.report["evaluations"]
            if isinstance(e["tokens"], int) and isinstance(e["loss"], float)
        ]
        width = min(options.max_width, MOST_CURVE_COLUMNS) - 9
        if width < 16:
            return
        for line in plot(points, held_out, width, CURVE_ROWS, options.ascii_only):
            yield Text(line, no_wrap=True, overflow="crop")
        marks = ", o held-out loss" if held_out else ""
        window = self.report["smoothing_steps"]
        caption = (
            f"nats per token: training loss, smoothed over about {plural(window, 'step')}{marks}; x-axis: tokens\n"
        )
        yield Text(caption, style="dim")

    def _sample(self, options: ConsoleOptions) -> RenderResult:
        if not self.report["samples"]:
            return
        last = self.report["samples"][-1]
        yield Text(f"sample at step {integer_text(last['step'])}", style="bold")
        lines = printable(f"{last['prompt']}{last['text']}").expandtabs(4).rstrip().split("\n")
        for line in lines[:SAMPLE_LINES]:
            yield Text(_safe("  " + line, options), no_wrap=True, overflow="crop")
        if len(lines) > SAMPLE_LINES:
            yield Text(f"  ... {plural(len(lines) - SAMPLE_LINES, 'more line')} in report.html", style="dim")


def _results(report: dict[str, Any]) -> Table:
    table = Table(title="results", title_justify="left", box=box.SIMPLE, show_header=False)
    table.add_column("what", overflow="fold")
    table.add_column("value", justify="right", overflow="fold")
    for what, value in facts(report):
        if not value.startswith(UNKNOWN + " ") and value != UNKNOWN:
            table.add_row(what, value)
    return table


def _plan(planned: dict[str, dict[str, Any]]) -> Table:
    table = Table(title="plan against measured", title_justify="left", box=box.SIMPLE)
    table.add_column("", overflow="fold")
    for name in ("planned", "measured", "planned / measured"):
        table.add_column(name, justify="right", overflow="fold")
    for row in plan_rows(planned):
        table.add_row(*row)
    return table


def _python(rates: list[dict[str, Any]]) -> Table:
    table = Table(title="samples that Python's own parser accepts", title_justify="left", box=box.SIMPLE)
    for name in ("step", "accepted", "of", "share"):
        table.add_column(name, justify="right", overflow="fold")
    for rate in (rates[0], rates[-1])[: len(rates)]:
        table.add_row(
            integer_text(rate["step"]), str(rate["accepted"]), str(rate["judged"]), percent_text(rate["accepted_share"])
        )
    return table


def plot(
    line: Sequence[tuple[float, float]], dots: Sequence[tuple[float, float]], columns: int, rows: int, ascii_only: bool
) -> list[str]:
    """A curve as `rows` lines of text: y labels (8 characters), then `columns` cells of 2x4 braille dots, or of `*`.

    `line` is joined from point to point, `dots` are single cells marked `o`. Points are (x, y), finite, x not falling.
    """
    xs, ys = [x for x, _ in (*line, *dots)], [y for _, y in (*line, *dots)]
    left, right, low, high = min(xs), max(xs), min(ys), max(ys)
    across, down = (1, 1) if ascii_only else (2, 4)
    wide, tall = columns * across - 1, rows * down - 1
    to_x = lambda x: round((x - left) / (right - left) * wide) if right > left else 0  # noqa: E731
    to_y = lambda y: round((high - y) / (high - low) * tall) if high > low else tall  # noqa: E731
    cells = [[0] * columns for _ in range(rows)]
    at = [(to_x(x), to_y(y)) for x, y in line]
    for (x0, y0), (x1, y1) in pairwise(at):
        for k in range(steps := max(abs(x1 - x0), abs(y1 - y0), 1) + 1):
            part = k / (steps - 1) if steps > 1 else 0.0
            x, y = round(x0 + part * (x1 - x0)), round(y0 + part * (y1 - y0))
            cells[y // down][x // across] |= BRAILLE_BITS[x % across][y % down]
    marked = {(to_x(x) // across, to_y(y) // down) for x, y in dots}
    lines = []
    for row, bits in enumerate(cells):
        body = "".join("o" if (column, row) in marked else _cell(b, ascii_only) for column, b in enumerate(bits))
        label = number_text(high - (high - low) * row / (rows - 1), 2) if row in (0, rows - 1) else ""
        lines.append(f"{label:>7} {body}".rstrip())
    axis = f"{count_text(left)}{count_text(right):>{columns - len(count_text(left))}}"
    return [*lines, " " * 8 + axis]


def _cell(bits: int, ascii_only: bool) -> str:
    if not bits:
        return " "
    return "*" if ascii_only else chr(0x2800 + bits)


def _safe(text: str, options: ConsoleOptions) -> str:
    """Foreign text for this console: no control characters, and no character that its encoding lacks."""
    text = printable(text)
    return text.encode(options.encoding, "backslashreplace").decode(options.encoding) if options.ascii_only else text
