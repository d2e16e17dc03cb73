"""Is a gradient right? It is held against a reference, element by element, and both against a numeric derivative.

Bounds. An algorithm that is stable errs as if each number in it had been rounded a few times. So the reference is computed again
with every input, result and arriving gradient changed by relative noise, which shows how far one rounding moves each element:
`moved`. What is allowed is that times the number of roundings: 8, and for sums of k terms k/4 more in the type that sums are
kept in. Nothing here is a setting.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kiem.grad.numeric import Derivative

NOISE = 2.0**-26  # relative; far above float64's rounding, far below where formulas stop being straight
REPEATS = 2


@dataclass(slots=True)
class InputVerdict:
    """Of one input. `units`: the largest error in units of the precision of the type; `bound` in the same units."""

    argument: str
    value: int
    verdict: str  # ok, wrong, kink
    dtype: torch.dtype
    along: float = 0.0  # (a) along the random direction
    numeric: float = 0.0  # (b)
    numeric_error: float = 0.0
    reference: str = ""  # where (c) comes from
    units: float = 0.0
    bound: float = 0.0
    element: tuple[int, ...] | None = None  # the worst
    expected: float | None = None
    got: float | None = None
    wrong_elements: int = 0
    shape: tuple[int, ...] = ()


class Random:
    """Random numbers by seed, cut from one long row of them: tensors are large, and normal numbers in float64 slow."""

    _row: Tensor | None = None

    def __init__(self, seed: int):
        self._generator = torch.Generator().manual_seed(seed)

    def like(self, tensor: Tensor) -> Tensor:
        """Standard normal, in the shape, type and place of a floating or complex tensor."""
        if Random._row is None:
            Random._row = torch.randn(1_000_003, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        count = tensor.numel() * (2 if tensor.is_complex() else 1)
        start = int(torch.randint(len(Random._row), (1,), generator=self._generator))
        row = Random._row.roll(-start)[: min(count, len(Random._row))]
        if count > len(row):
            row = row.repeat(-(-count // len(row)))[:count]
        if tensor.is_complex():
            return torch.view_as_complex(row.clone().view(*tensor.shape, 2)).to(tensor)
        return row.clone().view(tensor.shape).to(tensor)


def judge(result: InputVerdict, got: Tensor, reference: Tensor | None, moved: Tensor | None, unit: float, direction: Tensor,
          number: Derivative, numeric: Callable[[Tensor], Derivative], sides: Callable[[], tuple[Tensor, Tensor]]) -> None:
    """Fill in the verdict of one gradient: `got` against `reference`, element by element, and both against the number.

    At a kink the number is no judge: elements whose reference jumps between the `sides` are left out of the direction, and there
    any value between the sides is a derivative that autograd may choose."""
    result.numeric, result.numeric_error, result.along = number.value, number.error, inner(got, direction)
    tiny = 8 * torch.finfo(result.dtype).tiny
    if reference is None:
        scale = max(abs(number.value), float((got.abs() * direction.abs()).square().sum().sqrt()))
        allowed = unit * result.bound * 5 * scale + 4 * number.error + tiny
        result.units = abs(result.along - number.value) / (unit * scale) if scale else 0.0
        if not number.low - allowed <= result.along <= number.high + allowed:
            result.verdict, result.expected, result.got = "wrong", number.value, result.along
        elif number.kink:
            result.verdict = "kink"
        return
    moved = moved.nan_to_num(nan=0.0, posinf=0.0)
    floor = float(moved.square().mean().sqrt()) if moved.numel() else 0.0
    allowed = unit * (moved + reference.abs() + floor)
    error = (got - reference).abs()
    error = torch.where(torch.isfinite(reference.abs()), error.nan_to_num(nan=math.inf), 0.0)
    ratio = torch.where(error <= tiny, 0.0, error / allowed.clamp_min(tiny * unit))
    mismatch = ratio > result.bound
    result.units = float(ratio.max()) if ratio.numel() else 0.0
    slack = 5 * float((allowed * direction.abs()).square().sum().sqrt()) * result.bound + 4 * number.error + tiny
    slack += 1e-6 * float((reference.abs() * direction.abs()).square().sum().sqrt())
    kinked = None
    if number.kink:
        low, high = torch.aminmax(torch.stack(sides()), dim=0)
        kinked = (high - low) > 1e-4 * (high.abs() + low.abs() + 1e-3 * (floor + reference.abs().max()))
        between = (got >= low - allowed * result.bound) & (got <= high + allowed * result.bound)
        mismatch &= ~(kinked & between)
        direction = direction * ~kinked
        number = numeric(direction)
        result.numeric, result.numeric_error, result.along = number.value, number.error, inner(got, direction)
    certified = number.low - slack <= inner(reference, direction) <= number.high + slack
    agrees = number.low - slack <= result.along <= number.high + slack
    if (certified and not mismatch.any()) or (not certified and agrees):
        result.verdict = "ok" if kinked is None else "kink"
        if not certified:
            result.reference = ""  # autograd and the number agree: the reference is what differs
        return
    where = ratio.argmax() if mismatch.any() else error.argmax()
    result.verdict, result.wrong_elements = "wrong", int(mismatch.sum())
    result.element = tuple(int(i) for i in torch.unravel_index(where, error.shape)) if error.dim() else ()
    result.expected, result.got = _number(reference.reshape(-1)[where]), _number(got.reshape(-1)[where])


def inner(a: Tensor, b: Tensor) -> float:
    """The derivative along b, of a gradient a."""
    if a.is_complex() or b.is_complex():
        return float((a.conj() * b).real.sum())
    return float(torch.dot(a.reshape(-1).double(), b.reshape(-1).double()))


def _number(tensor: Tensor) -> Any:
    number = tensor.item()
    return number.real if isinstance(number, complex) else number
