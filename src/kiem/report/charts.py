"""Which curves a report draws, from the columns of a run, thinned to what a page can show."""

import math
from array import array
from bisect import bisect_left
from collections.abc import Sequence

from kiem.format import plural
from kiem.report.read import Run, as_number, thin
from kiem.report.svg import Chart, Line
from kiem.runs.metrics import Smoothed

BUCKETS = 300
ORDERS_FOR_LOG_Y = 30.0


def charts_of(run: Run) -> list[tuple[Chart, str]]:
    """(chart, its description in words), without those that have nothing to show."""
    window = run.smoothing_steps
    held_out = _held_out(run)
    charts = [
        _chart(
            "loss",
            "Loss",
            "nats per token",
            [
                _line(run, "training, each step", "raw", run.steps["loss"]),
                _line(
                    run, f"training, smoothed over about {plural(window, 'step')}", "main", run.smoothed, extremes=False
                ),
                held_out,
            ],
        ),
        _chart(
            "rate",
            "Learning rate",
            "at each step",
            [
                _line(run, "AdamW", "main", run.steps["lr"], extremes=False),
                _line(run, "Muon (matrices)", "second", run.steps["matrix_lr"], extremes=False),
            ],
            from_zero=True,
        ),
        _chart("gradient", "Gradient norm", "L2, before clipping", _raw_and_smoothed(run, "grad_norm"), spread=True),
        _chart("speed", "Speed", "tokens/s", _raw_and_smoothed(run, "tokens_per_second"), from_zero=True),
        _chart(
            "share",
            "Utilization",
            "% of this machine's peak matmul throughput",
            _raw_and_smoothed(run, "matmul_share", 100.0),
            from_zero=True,
        ),
    ]
    return [(chart, describe(chart)) for chart in charts if chart is not None]


def describe(chart: Chart) -> str:
    """The chart in words, for those who do not see it."""
    said = [
        f"{line.name}: from {line.ys[0]:.4g} at step {line.steps[0]:,} to {line.ys[-1]:.4g} at step "
        f"{line.steps[-1]:,}, lowest {min(line.ys):.4g}, highest {max(line.ys):.4g}"
        for line in chart.lines
    ]
    return f"{chart.title} in {chart.unit}. " + "; ".join(said) + "."


def _chart(name: str, title: str, unit: str, lines: list[Line | None], spread: bool = False, from_zero: bool = False):
    kept = tuple(line for line in lines if line is not None)
    if not kept:
        return None
    ys = [y for line in kept for y in line.ys if y > 0]
    log_y = spread and len(ys) > 1 and max(ys) / min(ys) > ORDERS_FOR_LOG_Y
    return Chart(name, title, unit + (", logarithmic" if log_y else ""), kept, log_y, from_zero)


def _line(run: Run, name: str, look: str, ys: array, extremes: bool = True) -> Line | None:
    kept = thin(run.steps["step"], BUCKETS, [ys], extremes)
    if not kept:
        return None
    xs: dict[str, Sequence[float]] = {
        "tokens": [run.steps["tokens"][i] for i in kept],
        "time": [run.seconds[i] for i in kept],
    }
    return Line(name, look, [int(run.steps["step"][i]) for i in kept], xs, [ys[i] for i in kept])


def _raw_and_smoothed(run: Run, column: str, scale: float = 1.0) -> list[Line | None]:
    values = array("d", (scale * y for y in run.steps[column]))
    smooth = Smoothed(run.smoothing_steps)
    means = array("d", (smooth.update(y) for y in values))
    return [
        _line(run, "each step", "raw", values),
        _line(run, f"smoothed over about {plural(run.smoothing_steps, 'step')}", "main", means, extremes=False),
    ]


def _held_out(run: Run) -> Line | None:
    """Evaluations lie at the training time of the step they follow; one before the first step lies at 0."""
    rows = [(as_number(e.get("step")), as_number(e.get("tokens")), as_number(e.get("loss"))) for e in run.curve_evals]
    rows = [row for row in rows if all(math.isfinite(x) for x in row)]
    if not rows:
        return None
    times = []
    for step, _, _ in rows:
        index = bisect_left(run.steps["step"], step)
        times.append(0.0 if step <= 0 or not len(run) else run.seconds[min(index, len(run) - 1)])
    steps, tokens, losses = zip(*rows, strict=True)
    return Line("held-out", "second", [int(s) for s in steps], {"tokens": tokens, "time": times}, losses, dots=True)
