"""Derivatives by number: the true value lies within the error that is stated."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kiem.inspect.verify.numeric import UNIT, derivative


def at(f, x, size=None):
    """The derivative of f at x. The size of a function of one term is that of its value."""
    return derivative(lambda e: f(x + e), abs(f(x)) + abs(x) if size is None else size)


@pytest.mark.parametrize(("f", "slope", "x"), [
    (math.exp, math.exp, 0.5),
    (math.sin, math.cos, 1.0),
    (lambda x: x**5, lambda x: 5 * x**4, -1.3),
    (math.tanh, lambda x: 1 - math.tanh(x) ** 2, 2.0),
    (math.log, lambda x: 1 / x, 0.3),
    (math.sqrt, lambda x: 0.5 / math.sqrt(x), 0.02),
    (lambda x: 1 / (1 + math.exp(-40 * x)), lambda x: 10.0, 0.0),
])  # fmt: skip
def test_smooth_functions(f, slope, x):
    d = at(f, x)
    assert abs(d.value - slope(x)) <= d.error and d.error < 1e-8 * (1 + abs(slope(x)))
    assert not d.kink and d.low <= slope(x) + d.error and d.high >= slope(x) - d.error


def test_straight_and_constant():
    line = at(lambda x: 3 * x - 1, 0.7)
    assert abs(line.value - 3) <= line.error < 1e-9 and not line.kink
    flat = at(lambda x: 4.0, 0.7)
    assert flat.value == 0 and not flat.kink and flat.error < 1e-9


@pytest.mark.parametrize(("f", "low", "high"), [
    (abs, -1, 1),
    (lambda x: max(x, 0.0), 0, 1),
    (lambda x: max(x, 0.1 * x) + math.sin(x), 1.1, 2),
    (lambda x: -abs(x) + 3 * x, 2, 4),
])  # fmt: skip
def test_at_a_kink_the_sides_are_told_apart(f, low, high):
    d = at(f, 0.0, size=1.0)
    assert d.kink and d.low == pytest.approx(low, abs=1e-5) and d.high == pytest.approx(high, abs=1e-5)
    assert low - 1e-6 <= d.value <= high + 1e-6


@pytest.mark.parametrize("distance", [1e-1, 1e-2, 1e-3, 1e-4, 1e-6])
@pytest.mark.parametrize("f", [abs, lambda x: max(x, 0.0)])
def test_near_a_kink_the_step_becomes_small_or_the_sides_hold_the_truth(f, distance):
    for x in (distance, -distance):
        slope = (f(2 * x) - f(x)) / x
        d = at(f, x, size=1.0)
        assert d.low - d.error <= slope <= d.high + d.error


def test_many_kinks_within_the_step():
    """A sum of rectifiers, of which some switch within any step: what is claimed is still true."""
    points = [i * i * 1e-4 * (-1) ** i + 1e-5 for i in range(200)]
    d = derivative(lambda e: sum(max(p + e, 0.0) for p in points), sum(map(abs, points)))
    slope = sum(p > 0 for p in points)
    assert d.low - d.error <= slope <= d.high + d.error


def test_where_the_function_is_not_defined():
    def log(x):
        return math.log(x) if x > 0 else math.nan

    d = at(log, 1e-3, size=8.0)  # the first steps reach beyond 0
    assert abs(d.value - 1e3) <= d.error and math.isfinite(d.error)
    never = derivative(lambda e: math.nan, 1.0)
    assert math.isnan(never.value) and never.error == math.inf and not never.kink
    infinite = derivative(lambda e: math.inf, 1.0)
    assert infinite.error == math.inf


@given(st.integers(-30, 30), st.integers(-6, 0), st.floats(-3, 3))
def test_scales(power, width, x):
    """10^p · sin(x + 10^w e): rounding and curvature of any size."""
    scale, width = 10.0**power, 10.0**width
    d = derivative(lambda e: scale * math.sin(x + e * width), scale * (1 + abs(x)))
    assert abs(d.value - scale * width * math.cos(x)) <= d.error
    assert d.error <= 1e-7 * scale and not d.kink


@given(st.lists(st.floats(-2, 2), min_size=1, max_size=6), st.floats(-1.5, 1.5))
def test_polynomials(coefficients, x):
    def f(y):
        return sum(c * y**i for i, c in enumerate(coefficients))

    size = sum(abs(c) * max(abs(x), 1.0) ** i for i, c in enumerate(coefficients))
    slope = sum(i * c * x ** (i - 1) for i, c in enumerate(coefficients) if i)
    d = derivative(lambda e: f(x + e), size + abs(x))
    assert abs(d.value - slope) <= d.error + 4 * UNIT * size


@given(st.floats(-1, 1), st.integers(-24, -10))
def test_coarse_arithmetic_is_within_its_own_rounding(x, bits):
    """A function computed with a unit of 2^bits: the error grows with it and still holds the truth."""
    unit = 2.0**bits

    def rounded(e):
        value = math.sin(x + e)
        return round(value / unit) * unit

    d = derivative(rounded, 1.0, unit=unit)
    assert d.low - d.error <= math.cos(x) <= d.high + d.error
