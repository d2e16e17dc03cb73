"""Weighted sums of a gradient over slices: a wrong factor shows in them where the roundings of single elements, which
average out, would hide it. The weight of an element is its reference over the square of about what rounding moves it by
(the weights that make the sum sharpest where roundings are independent)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

SHARED = 2.0  # units: roundings of a scalar inside that all elements of a slice share
LEAST = 8  # elements of a slice: fewer are judged one by one


@dataclass(frozen=True, slots=True)
class Found:
    """`wrong`: whether a sum is further from the reference's than rounding explains; the worst one, `expected` and
    `got`, its error in units and its bound; `sharpness`: the smallest relative error that would have shown."""

    wrong: bool
    sharpness: float
    expected: float = 0.0
    got: float = 0.0
    units: float = 0.0
    bound: float = 0.0


@dataclass(slots=True)
class Slices:
    """Of one gradient. `squares`: per kind of slice the mean square by which one rounding of everything moves each
    sum, in units of the rounding."""

    squares: list[Tensor] = field(default_factory=list)

    def add(self, reference: Tensor, change: Tensor, weight: float) -> None:
        """Note how a sample of noise moved the reference; `weight`: of its square in the mean."""
        sums = [weight * s.square() for s in _sums(_weights(reference), change)]
        self.squares = [a + b for a, b in zip(self.squares, sums, strict=True)] if self.squares else sums

    def scale(self, factor: float) -> None:
        """Count in units that are smaller by this factor."""
        self.squares = [square * factor**2 for square in self.squares]

    def judge(
        self, got: Tensor, reference: Tensor, moved: Tensor, around: Tensor, unit: float, bound: float
    ) -> Found | None:
        """Compare the sums. `moved`, `around`: how far one rounding moves each element, by itself and with what is
        usual around it. None if there is no slice of so many elements."""
        weights, size = _weights(reference), reference.abs()
        alone = _sums(None, (weights.abs() * (around + size)).square())
        shared = _sums(None, weights.abs() * moved.nan_to_num(nan=0.0, posinf=0.0))
        best, worst = math.inf, None
        kinds = zip(_sums(weights, got), _sums(weights, reference), alone, shared, self.squares, strict=True)
        for mine, due, one, all_, square in kinds:
            per = bound * (square.sqrt() + one.sqrt()) + SHARED * all_
            allowed = unit * per
            known = due > 0
            if not bool(known.any()):
                continue
            best = min(best, float(torch.where(known, allowed / due, math.inf).min()))
            over = torch.where(known, (mine - due).abs() / allowed.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
            at = int(over.argmax())
            if worst is None or float(over.reshape(-1)[at]) > worst[0]:
                scale = unit * float(due.reshape(-1)[at])
                worst = (
                    float(over.reshape(-1)[at]), float(due.reshape(-1)[at]), float(mine.reshape(-1)[at]),
                    float((mine - due).abs().reshape(-1)[at]) / scale, float(allowed.reshape(-1)[at]) / scale,
                )  # fmt: skip
        if worst is None:
            return None
        furthest, *rest = worst
        return Found(not furthest <= 1, best, *rest)


def _weights(reference: Tensor) -> Tensor:
    size = reference.abs()
    usual = size.square().mean().sqrt() if size.numel() else size.new_zeros(())
    return reference / (size + usual).square().clamp_min(torch.finfo(torch.float64).tiny)


def _sums(weights: Tensor | None, values: Tensor) -> list[Tensor]:
    """Over all of a tensor, and over all but one dimension, for each that leaves enough to sum."""
    if weights is not None:
        values = (weights.conj() * values).real if values.is_complex() else weights * values
    return [values.sum(over) if over else values for over in _dimensions(values)]


def _dimensions(tensor: Tensor) -> Iterator[tuple[int, ...]]:
    every = tuple(range(tensor.dim()))
    if tensor.numel() >= LEAST:
        yield every
    for kept in every:
        if 1 < tensor.shape[kept] <= tensor.numel() // LEAST:
            yield tuple(d for d in every if d != kept)
