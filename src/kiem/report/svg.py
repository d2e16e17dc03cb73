"""Line charts as SVG, drawn here so that they read without JavaScript.

The y axis is in pixels, the x axis in percent of the width: a chart fits a phone and a desk with text of one size. Each
chart is drawn for every x axis of MODES (tokens or time, linear or logarithmic); the page's style shows one of them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from kiem.format import seconds_text

MODES = (("tokens", "linear"), ("tokens", "log"), ("time", "linear"), ("time", "log"))
HEIGHT, TOP, BOTTOM = 220, 8, 26
WIDTH = 1000  # of the stretched coordinate system inside
SECOND_STEPS = (
    0.001,
    0.01,
    0.1,
    0.5,
    1,
    2,
    5,
    10,
    15,
    30,
    60,
    120,
    300,
    600,
    900,
    1800,
    3600,
    7200,
    14_400,
    28_800,
    43_200,
    86_400,
    172_800,
    432_000,
    864_000,
    1_728_000,
    4_320_000,
    8_640_000,
)
LOG_SECONDS = (0.001, 0.01, 0.1, 1, 10, 60, 600, 3600, 36_000, 86_400, 864_000, 8_640_000)


@dataclass(frozen=True)
class Line:
    """Finite values `ys` at `xs` ("tokens", "time" in seconds), both thinned already. `look`: its class in page.css."""

    name: str
    look: str
    steps: Sequence[int]
    xs: dict[str, Sequence[float]]
    ys: Sequence[float]
    dots: bool = False


@dataclass(frozen=True)
class Chart:
    """A chart: `unit` of its y axis; `log_y` for values over several orders of magnitude; `from_zero` for rates."""

    name: str
    title: str
    unit: str
    lines: tuple[Line, ...]
    log_y: bool = False
    from_zero: bool = False


@dataclass(frozen=True)
class Axis:
    """A map from [low, high] to 0..1."""

    low: float
    high: float
    log: bool = False

    def at(self, x: float) -> float:
        if self.log:
            return (math.log(x) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return (x - self.low) / (self.high - self.low)


def x_axis(chart: Chart, quantity: str, scale: str) -> Axis:
    """The axis over all lines of the chart; a logarithmic one begins at the first positive value."""
    xs = [x for line in chart.lines for x in line.xs[quantity] if scale == "linear" or x > 0]
    low, high = (min(xs), max(xs)) if xs else (1.0, 2.0)
    if scale == "linear":
        low = min(low, 0.0)
    return Axis(low, high if high > low else low * 2 or 1.0, scale == "log")


def y_axis(chart: Chart) -> Axis:
    """The axis over all lines with a little room; a flat line lies in the middle."""
    ys = [y for line in chart.lines for y in line.ys if not chart.log_y or y > 0]
    low, high = (min(ys), max(ys)) if ys else (0.0, 1.0)
    if chart.log_y and low > 0:
        return Axis(low / 1.1, high * 1.1, True)
    if chart.from_zero:
        low = min(low, 0.0)
    room = 0.04 * (high - low) or 0.1 * abs(high) or 1.0
    return Axis(low if chart.from_zero else low - room, high + room)


def ticks(axis: Axis, most: int = 5) -> list[float]:
    """About `most` round numbers inside the axis: 1, 2 or 5 times a power of ten, or on a log axis its powers."""
    if axis.log:
        first, last = math.ceil(math.log10(axis.low) - 1e-9), math.floor(math.log10(axis.high) + 1e-9)
        powers = [10.0**e for e in range(first, last + 1)]
        if len(powers) >= 2:
            return powers[:: math.ceil(len(powers) / most)]
        fine = [m * 10.0**e for e in range(first - 1, last + 1) for m in (1, 2, 5)]
        fine = [x for x in fine if axis.low <= x <= axis.high]
        return fine if len(fine) >= 2 else [axis.low, axis.high]
    raw = (axis.high - axis.low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))
    first, last = math.ceil(axis.low / step - 1e-9), math.floor(axis.high / step + 1e-9)
    return [k * step for k in range(first, last + 1)]


def time_ticks(axis: Axis, most: int = 5) -> list[float]:
    """Ticks in seconds that read well as minutes, hours and days."""
    if axis.log:
        inside = [s for s in LOG_SECONDS if axis.low <= s <= axis.high]
        return inside if len(inside) >= 2 else [axis.low, axis.high]
    step = next((s for s in SECOND_STEPS if (axis.high - axis.low) / s <= most), None)
    if step is None:
        return ticks(axis, most)
    return [k * step for k in range(math.ceil(axis.low / step), math.floor(axis.high / step + 1e-9) + 1)]


def render_chart(chart: Chart, description: str) -> str:
    """A figure: title, legend, y axis, plot. `description` says in words what the curve shows."""
    y = y_axis(chart)
    legend = "".join(_legend(line) for line in chart.lines)
    grid, labels = [], []
    for value in ticks(y):
        py = TOP + (1 - y.at(value)) * HEIGHT
        grid.append(f'<line class="grid" x1="0" x2="100%" y1="{py:.1f}" y2="{py:.1f}"/>')
        labels.append(f'<text x="46" y="{py + 4:.1f}" text-anchor="end">{escape(_label(value))}</text>')
    total = TOP + HEIGHT + BOTTOM
    modes = "".join(_mode(chart, quantity, scale, y) for quantity, scale in MODES)
    name = escape(chart.name)
    return (
        f'<figure class="chart" id="chart-{name}"><figcaption>{escape(chart.title)} '
        f'<small>{escape(chart.unit)}</small></figcaption><ul class="legend">{legend}</ul><div class="axes">'
        f'<svg class="y" width="52" height="{total}" aria-hidden="true">{"".join(labels)}</svg>'
        f'<svg class="plot" width="100%" height="{total}" role="img" tabindex="0" data-chart="{name}" '
        f'aria-labelledby="title-{name} desc-{name}"><title id="title-{name}">{escape(chart.title)}</title>'
        f'<desc id="desc-{name}">{escape(description)}</desc>{"".join(grid)}{modes}'
        f'<line class="cursor" y1="{TOP}" y2="{TOP + HEIGHT}"/></svg></div></figure>'
    )


def chart_data(chart: Chart) -> dict:
    """What the page's script needs to show values: axes per mode, and the lines."""
    axes = {f"{q}-{s}": [(a := x_axis(chart, q, s)).low, a.high] for q, s in MODES}
    lines = [
        {
            "name": line.name,
            "step": list(line.steps),
            "tokens": [round(x) for x in line.xs["tokens"]],
            "time": [float(f"{x:.6g}") for x in line.xs["time"]],
            "y": [float(f"{y:.6g}") for y in line.ys],
        }
        for line in chart.lines
    ]
    return {"axes": axes, "unit": chart.unit, "lines": lines}


def _mode(chart: Chart, quantity: str, scale: str, y: Axis) -> str:
    """Everything of the chart that depends on the x axis."""
    x = x_axis(chart, quantity, scale)
    write = _label if quantity == "tokens" else _seconds_label
    parts = []
    for value in (time_ticks if quantity == "time" else ticks)(x):
        at = 100 * x.at(value)
        anchor = "start" if at < 4 else "end" if at > 96 else "middle"
        label, foot = escape(write(value)), TOP + HEIGHT
        parts.append(
            f'<line class="tick" x1="{at:.2f}%" x2="{at:.2f}%" y1="{foot}" y2="{foot + 5}"/>'
            f'<text x="{at:.2f}%" y="{foot + 20}" text-anchor="{anchor}">{label}</text>'
        )
    paths, dots = [], []
    for line in chart.lines:
        points = [
            (x.at(px), (1 - y.at(py)) * HEIGHT)
            for px, py in zip(line.xs[quantity], line.ys, strict=True)
            if (px > 0 or not x.log) and (py > 0 or not y.log)
        ]
        if line.dots:
            dots += [
                f'<circle class="{line.look}" cx="{100 * px:.2f}%" cy="{TOP + py:.1f}" r="3.5"/>' for px, py in points
            ]
        if points:
            paths.append(f'<path class="{line.look}" d="{_path(points)}"/>')
    return (
        f'<g class="mode {quantity}-{scale}">{"".join(parts)}<svg x="0" y="{TOP}" width="100%" height="{HEIGHT}" '
        f'viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none">{"".join(paths)}</svg>{"".join(dots)}</g>'
    )


def _path(points: Sequence[tuple[float, float]]) -> str:
    """Relative moves in tenths of a unit, without drift: each is taken from the rounded place before it."""
    at = [(round(10 * WIDTH * x), round(10 * y)) for x, y in points]
    moves = [f"{(x1 - x0) / 10:g} {(y1 - y0) / 10:g}" for (x0, y0), (x1, y1) in pairwise(at)]
    return f"M{at[0][0] / 10:g} {at[0][1] / 10:g}" + ("l" + " ".join(moves) if moves else "")


def _legend(line: Line) -> str:
    return f'<li class="{line.look}{" dots" if line.dots else ""}"><span></span>{escape(line.name)}</li>'


def _seconds_label(value: float) -> str:
    return f"{value:g} s" if value < 60 else seconds_text(value)


def _label(value: float) -> str:
    """A round number in short, without the zeros that a measured one would keep."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}" if value == 0 or abs(value) >= 1e-4 else f"{value:.1e}"
