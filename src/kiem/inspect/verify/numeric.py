"""Derivatives by number, in float64: central differences, extrapolated twice (Richardson 1911), with an estimate of
their error.

Along a direction v, phi(e) = f(x + e v) is a function of one number. Its central difference at steps h, h/2, h/4 has
an error in h², h⁴, ...; two extrapolations leave h⁶. The difference between the last two is the estimate of the
error. Where the one-sided differences tend to different limits, f has a kink along v, and a derivative may lie
anywhere between them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

UNIT = 2.0**-53
NEAR = 2.0**-22  # a step that few steps of a function are met by, and that leaves half of the digits


@dataclass(frozen=True, slots=True)
class Derivative:
    """`value` ± `error`; `low` and `high`: the one-sided derivatives, apart at a kink."""

    value: float
    error: float
    low: float
    high: float
    asymmetry: float = 0.0  # how far apart they seem, kink or not

    @property
    def kink(self) -> bool:
        """Whether the one-sided derivatives differ."""
        return math.isfinite(self.error) and self.high - self.low > 2 * self.error


def derivative(
    phi: Callable[[float], float], size: float, step: float = 2.0**-7, unit: float = UNIT, tries: int = 5
) -> Derivative:
    """d phi / d e at 0. `size`: the sum of the magnitudes of the terms of phi(0), which bounds its rounding by
    `unit`."""
    middle = phi(0.0)
    best: Derivative | None = None
    for attempt in range(tries):
        up, down, half = phi(step), phi(-step), phi(step / 2)
        if attempt == 0 and _straight(up - middle, down - middle, half - middle, 16 * unit * size):
            value = (up - down) / (2 * step)
            return Derivative(value, 16 * unit * size / step, value, value)
        one = _at_step(phi, middle, (up, down, half), step, 8 * unit * size / step)
        if best is None or not math.isfinite(best.error) or _better(one, best):
            best = one
        scale = abs(one.value) + size * 1e-3
        if one is best and one.error <= 1e-8 * scale and (one.kink or one.asymmetry <= 1e-4 * scale):
            break
        step /= 2**5
    assert best is not None  # tries > 0
    return best


def noisy_derivative(phi: Callable[[float], float], reaches: tuple[float, ...] = (0.5, 0.125, 0.03125)) -> Derivative:
    """d phi / d e at 0 of a function that rounds coarsely: the slope of polynomials fitted to 33 points. How far the
    points scatter about the fit is the rounding; how far the slopes of fits of degree 3 and 5 are apart is what is left
    of the curvature. Of the reaches the one with the least error."""
    best: Derivative | None = None
    for reach in reaches:
        places = [reach * math.sin(math.pi * k / 33) for k in range(-16, 17)]
        values = [phi(e) for e in places]
        one = _fitted(places, values, reach)
        if best is None or one.error < best.error:
            best = one
    assert best is not None
    return best


def _fitted(places: list[float], values: list[float], reach: float) -> Derivative:
    if not all(map(math.isfinite, values)):
        return Derivative(math.nan, math.inf, -math.inf, math.inf)
    slope, scatter = _slope(places, values, reach, 5)
    error = scatter + abs(slope - _slope(places, values, reach, 3)[0])
    sides = []
    for half in (slice(0, len(places) // 2 + 1), slice(len(places) // 2, None)):
        side, spread = _slope(places[half], values[half], reach, 3)
        sides.append((side, spread + abs(side - _slope(places[half], values[half], reach, 2)[0])))
    (left, one), (right, other) = sides
    if abs(left - right) > 4 * max(one + other, error):
        return Derivative(slope, max(one, other), min(left, right), max(left, right), abs(left - right))
    return Derivative(slope, error, slope, slope, abs(left - right))


def _slope(places: list[float], values: list[float], reach: float, degree: int) -> tuple[float, float]:
    """Of a polynomial fitted to points, at 0, with its standard error by how the points scatter."""
    import numpy

    matrix = numpy.vander(numpy.array(places) / reach, degree + 1, increasing=True)
    fit, *_ = numpy.linalg.lstsq(matrix, numpy.array(values), rcond=None)
    rest = numpy.array(values) - matrix @ fit
    variance = float(rest @ rest) / (len(places) - degree - 1)
    share = float(numpy.linalg.inv(matrix.T @ matrix)[1, 1])
    return float(fit[1]) / reach, math.sqrt(variance * share) / reach


def _straight(up: float, down: float, half: float, rounding: float) -> bool:
    """Whether a function is linear, as far as three of its points tell."""
    return abs(up + down) <= rounding and abs(up - 2 * half) <= 2 * rounding


def _better(one: Derivative, best: Derivative) -> bool:
    """A smaller error; but a large asymmetry that is not yet a kink only says that the step was too wide."""
    if one.kink != best.kink:
        if not one.kink:  # a wide step saw a kink further off
            return max(one.asymmetry, one.error) < best.asymmetry / 4
        return best.asymmetry > 4 * one.error
    return one.error + 0.1 * (0.0 if one.kink else one.asymmetry) < best.error + 0.1 * (
        0.0 if best.kink else best.asymmetry
    )


def _at_step(phi, middle: float, known: tuple[float, float, float], step: float, rounding: float) -> Derivative:
    points = [(known[0], known[1]), (known[2], phi(-step / 2)), (phi(step / 4), phi(-step / 4))]
    plus = [(up - middle) * 2**i / step for i, (up, _) in enumerate(points)]
    minus = [(middle - down) * 2**i / step for i, (_, down) in enumerate(points)]
    central = [(p + m) / 2 for p, m in zip(plus, minus, strict=True)]
    first = [(4 * central[i + 1] - central[i]) / 3 for i in range(2)]
    value = (16 * first[1] - first[0]) / 15
    if not math.isfinite(value):
        return Derivative(math.nan, math.inf, -math.inf, math.inf)
    error = abs(value - first[1]) + rounding
    # One-sided differences have an error in h, h², ...: two extrapolations.
    sides = []
    for side in (plus, minus):
        once = [2 * side[i + 1] - side[i] for i in range(2)]
        sides.append(((4 * once[1] - once[0]) / 3, abs(once[1] - once[0])))
    settled = max(s[1] for s in sides) + 8 * rounding
    low, high = min(sides[0][0], sides[1][0]), max(sides[0][0], sides[1][0])
    asymmetry = high - low
    if asymmetry <= 4 * settled:
        low = high = value
    else:
        error = min(error, settled)
    return Derivative(value, error, low, high, asymmetry)
