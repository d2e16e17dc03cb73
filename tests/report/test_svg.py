"""Axes, ticks and paths by hand."""

import math
import re
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kiem.report.read import thin
from kiem.report.svg import HEIGHT, WIDTH, Axis, Chart, Line, _path, render_chart, ticks, time_ticks, y_axis


@pytest.mark.parametrize(
    ("axis", "expected"),
    [
        (Axis(0, 10), [0, 2, 4, 6, 8, 10]),
        (Axis(2.9, 8.3), [4, 6, 8]),
        (Axis(-1, 1), [-1, -0.5, 0, 0.5, 1]),
        (Axis(1, 1e6, True), [1, 100, 1e4, 1e6]),
        (Axis(3, 70, True), [5, 10, 20, 50]),
        (Axis(4.1, 4.4, True), [4.1, 4.4]),
    ],
)
def test_ticks(axis, expected):
    assert ticks(axis) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("axis", "expected"),
    [
        (Axis(0, 240), [0, 60, 120, 180, 240]),
        (Axis(0, 90_000), [0, 28_800, 57_600, 86_400]),
        (Axis(0.5, 4000, True), [1, 10, 60, 600, 3600]),
    ],
)
def test_time_ticks(axis, expected):
    assert time_ticks(axis) == pytest.approx(expected)


@given(st.floats(-1e12, 1e12, allow_subnormal=False), st.floats(1e-6, 1e12))
def test_ticks_lie_inside_and_are_few(low, width):
    high = low + width
    if high - low < 1e-9 * abs(low) or high <= low:
        return
    found = ticks(Axis(low, high))
    slack = 1e-6 * (high - low)
    assert 1 <= len(found) <= 7 and all(low - slack <= x <= high + slack for x in found)


@given(st.floats(1e-9, 1e9), st.floats(1.01, 1e12))
def test_log_ticks_lie_inside_and_are_few(low, factor):
    for found in (ticks(Axis(low, low * factor, True)), time_ticks(Axis(low, low * factor, True))):
        assert 2 <= len(found) <= 13
        assert all(low * (1 - 1e-6) <= x <= low * factor * (1 + 1e-6) for x in found)


def test_a_path_by_hand():
    assert _path([(0.0, 0.0), (0.5, 10.0), (1.0, 5.55)]) == "M0 0l500 10 500 -4.4"
    assert _path([(0.25, 1.0)]) == "M250 1"


POINT = st.tuples(st.floats(0, 1, allow_subnormal=False), st.floats(0, HEIGHT, allow_subnormal=False))


@given(st.lists(POINT, min_size=1, max_size=300))
def test_a_path_does_not_drift(points):
    numbers = [float(n) for n in re.findall(r"-?[\d.]+(?:e-?\d+)?", _path(points))]
    x, y = sum(numbers[0::2]), sum(numbers[1::2])
    assert abs(x - WIDTH * points[-1][0]) < 0.06 and abs(y - points[-1][1]) < 0.06


def chart(ys, **options):
    xs = [float(n + 1) for n in range(len(ys))]
    line = Line("a", "main", range(1, len(ys) + 1), {"tokens": xs, "time": xs}, ys)
    return Chart("c", "Title <b>", "unit", (line,), **options)


@pytest.mark.parametrize("ys", [[1.0], [0.0, 0.0], [2.0, 2.0, 2.0], [-1.0, 1.0], [1e-30, 1e30], [5e-324, 1.0]])
@pytest.mark.parametrize("options", [{}, {"from_zero": True}, {"log_y": True}])
def test_any_values_are_drawn_inside(ys, options):
    text = render_chart(chart(ys, **options), "words <i>")
    assert "Title &lt;b&gt;" in text and "words &lt;i&gt;" in text
    assert text.count('class="mode') == 4
    axis = y_axis(chart(ys, **options))
    assert axis.low < axis.high
    assert all(-1e-9 <= axis.at(y) <= 1 + 1e-9 for y in ys if y > 0 or not axis.log)
    assert not re.search(r"nan|inf\b", text)


def test_thin_keeps_short_columns_whole_and_spikes_of_long_ones():
    xs = array("d", range(10_000))
    ys = array("d", (math.nan if n == 5 else 1.0 for n in range(10_000)))
    ys[6543] = 99.0
    kept = thin(xs, 100, [ys])
    assert 6543 in kept and 5 not in kept and len(kept) < 320 and kept == sorted(set(kept))
    assert 0 in kept and kept[1] <= 2  # the first steps are there for a logarithmic axis
    assert thin(xs[:10], 100, [ys[:10]]) == [0, 1, 2, 3, 4, 6, 7, 8, 9]
    assert thin(xs, 100, [ys], extremes=False)[-1] == 9999
