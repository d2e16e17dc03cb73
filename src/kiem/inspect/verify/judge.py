"""Is a gradient right? It is held against a reference, element by element, and both against a numeric derivative.

Bounds. An algorithm that is stable errs as if each number in it had been rounded a few times. So the reference is
computed again with every input, result and arriving gradient changed by relative noise, which shows how far one
rounding moves each element: `moved`. What is allowed is that times the number of roundings: 8, and for sums of k
terms k/4 more in the type that sums are kept in. Nothing here is a setting."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kiem.inspect.graph.layouts import elements, regular
from kiem.inspect.verify.numeric import Derivative

NOISE = 2.0**-26  # relative; far above float64's rounding, far below where formulas stop being straight
REPEATS = 2
ROW = 262_139  # a prime: no dimension of a tensor falls in step with it


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


def usual_size(tensor: Tensor) -> float:
    """Of an element: the root mean square, but not that of a few huge ones (the -1e9 of a mask); 1 if all are zero."""
    flat = tensor.reshape(-1)
    size = flat[:: max(1, flat.numel() // 4096)].abs().double()
    size = size[(size > 0) & torch.isfinite(size)]
    middle = float(size.median()) if size.numel() else 0.0
    mean = float(torch.linalg.vector_norm(flat, dtype=_wide(flat)) / math.sqrt(max(flat.numel(), 1)))
    if not math.isfinite(mean) or (middle and mean > 64 * middle):
        mean = middle
    return mean or 1.0


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.complex128 if tensor.is_complex() else torch.float64


class Random:
    """Random numbers by seed, cut from one long row of them: tensors are large, and normal numbers in float64 slow."""

    _row: Tensor | None = None

    def __init__(self, seed: int):
        self._generator = torch.Generator().manual_seed(seed)

    def like(self, tensor: Tensor) -> Tensor:
        """Standard normal, in the shape, type and place of a floating or complex tensor."""
        made = torch.empty(tensor.shape, dtype=tensor.dtype)
        flat = torch.view_as_real(made).view(-1) if made.is_complex() else made.view(-1)
        for start, row in self._rows(flat.numel()):
            flat[start : start + len(row)] = row
        return made.to(tensor.device)

    def shaken(self, tensor: Tensor) -> Tensor:
        """The tensor with relative noise on each element."""
        if tensor.is_complex() or tensor.device.type != "cpu":
            return tensor * (1 + NOISE * self.like(tensor))
        flat = tensor.reshape(-1)
        made = torch.empty_like(flat)
        for start, row in self._rows(flat.numel()):
            part = flat[start : start + len(row)]
            torch.mul(part, 1 + NOISE * row, out=made[start : start + len(row)])  # what is infinite stays so
        return made.view(tensor.shape)

    def _rows(self, count: int) -> Iterator[tuple[int, Tensor]]:
        if Random._row is None:
            row = torch.randn(ROW, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
            Random._row = torch.cat((row, row))
        first = int(torch.randint(ROW, (1,), generator=self._generator))
        for start in range(0, count, ROW):
            yield start, Random._row[first : first + min(ROW, count - start)]


class Noise:
    """Laid on what operations give, as their roundings would be, forward and backward."""

    def __init__(self, random: Random):
        self._random = random

    def __call__(self, tensor: Tensor) -> Tensor:
        """The tensor, changed in place: the operation that made it must see the change in what it saved, too."""
        if regular(tensor) and tensor.requires_grad:
            tensor.register_hook(self._rounded)
        if tensor.is_floating_point() or tensor.is_complex():
            held = elements(tensor.data)
            held.copy_(self._random.shaken(held))
        return tensor

    def apart(self, tensor: Tensor) -> Tensor:
        """The tensor for one of several that read it: their gradients are rounded one by one before they are added up,
        and may cancel."""
        if not regular(tensor) or not tensor.requires_grad:
            return tensor
        alias = tensor.view_as(tensor)
        alias.register_hook(self._rounded)
        return alias

    def _rounded(self, gradient: Tensor | None) -> Tensor | None:
        return None if gradient is None else self._random.shaken(gradient)


def judge(
    result: InputVerdict,
    got: Tensor,
    reference: Tensor | None,
    moved: Tensor | None,
    unit: float,
    direction: Tensor,
    number: Derivative,
    numeric: Callable[[Tensor], Derivative],
    sides: Callable[[], tuple[Tensor, Tensor]],
    independent: bool = False,
) -> None:
    """Fill in the verdict of one gradient: `got` against `reference`, element by element, and both against the
    number. `independent`: the reference owes nothing to autograd, so where both say the same, a number that says
    something else did not settle.

    At a kink the number is no judge: elements whose reference jumps between the `sides` are left out of the
    direction, and there any value between the sides is a derivative that autograd may choose."""
    result.numeric, result.numeric_error, result.along = number.value, number.error, inner(got, direction)
    if reference is None:
        _by_number(result, got, unit, direction, number)
        return
    tiny = 8 * torch.finfo(result.dtype).tiny
    moved = _with_neighbours(moved)
    if _plainly_right(result, got, reference, moved, unit, direction, number):
        return
    allowed = unit * (moved + reference.abs())
    floor = float(moved.mean()) if moved.numel() else 0.0
    error = (got - reference).abs()
    error = torch.where(torch.isfinite(reference.abs()), error.nan_to_num(nan=math.inf), 0.0)
    ratio = torch.where(error <= tiny, 0.0, error / allowed.clamp_min(tiny * unit))
    mismatch = ratio > result.bound
    result.units = float(ratio.max()) if ratio.numel() else 0.0
    slack = 5 * float((allowed * direction.abs()).square().sum().sqrt()) * result.bound + 4 * number.error + tiny
    slack += 1e-6 * float((reference.abs() * direction.abs()).square().sum().sqrt())
    kinked = None
    if number.kink:
        kinked, between = _between(got, sides(), allowed * result.bound, 1e-3 * (floor + reference.abs().max()))
        mismatch &= ~(kinked & between)
        direction = direction * ~kinked
        number = numeric(direction)
        result.numeric, result.numeric_error, result.along = number.value, number.error, inner(got, direction)
    certified = number.low - slack <= inner(reference, direction) <= number.high + slack
    agrees = number.low - slack <= result.along <= number.high + slack
    if not certified and not (independent and not mismatch.any()):
        result.reference = ""  # the number speaks against it and decides alone
        _by_number(result, got, unit, direction, number)
        if agrees:
            result.verdict = "ok" if kinked is None else "kink"
        return
    if not mismatch.any():
        result.verdict = "ok" if kinked is None else "kink"
        return
    where = ratio.argmax()
    result.verdict, result.wrong_elements = "wrong", int(mismatch.sum())
    result.element = tuple(int(i) for i in torch.unravel_index(where, error.shape)) if error.dim() else ()
    result.expected, result.got = _number(reference.reshape(-1)[where]), _number(got.reshape(-1)[where])


def _between(got: Tensor, sides: tuple[Tensor, Tensor], slack: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """Whether the gradient of an element jumps between the sides of its kink, and whether what was got lies between
    them; of complex numbers each part."""
    if got.is_complex() or any(side.is_complex() for side in sides):
        got, *both = (torch.view_as_real(t.to(torch.complex128).resolve_conj()) for t in (got, *sides))
        kinked, between = _between(got, tuple(both), slack[..., None], size)
        return kinked.any(-1), between.all(-1)
    low, high = torch.aminmax(torch.stack(sides), dim=0)
    kinked = (high - low) > 1e-4 * (high.abs() + low.abs() + size)
    return kinked, (got >= low - slack) & (got <= high + slack)


def _by_number(result: InputVerdict, got: Tensor, unit: float, direction: Tensor, number: Derivative) -> None:
    """Only the derivative along the direction is known."""
    scale = max(abs(number.value), float((got.abs() * direction.abs()).square().sum().sqrt()))
    allowed = unit * result.bound * 5 * scale + 4 * number.error + 8 * torch.finfo(result.dtype).tiny
    if scale:
        result.units, result.bound = abs(result.along - number.value) / (unit * scale), allowed / (unit * scale)
    if not number.low - allowed <= result.along <= number.high + allowed:
        result.verdict, result.expected, result.got = "wrong", number.value, result.along
    elif number.kink:
        result.verdict = "kink"


def _with_neighbours(moved: Tensor) -> Tensor:
    """A few samples of noise can leave an element unmoved by chance: it gets what is usual in its row and in the
    tensor."""
    moved = moved.nan_to_num(nan=0.0, posinf=0.0)
    if moved.numel() == 0:
        return moved
    usual = torch.linalg.vector_norm(moved) / math.sqrt(moved.numel())
    if moved.dim() > 0:
        usual = usual + torch.linalg.vector_norm(moved, dim=-1, keepdim=True) / math.sqrt(moved.shape[-1])
    return moved.add_(usual)


def _plainly_right(
    result: InputVerdict,
    got: Tensor,
    reference: Tensor,
    moved: Tensor,
    unit: float,
    direction: Tensor,
    number: Derivative,
) -> bool:
    """The same as `judge` for what is right, finite and smooth, in one pass over parts that fit a cache."""
    if number.kink or got.is_complex() or reference.is_complex():
        return False
    tiny = 8 * torch.finfo(result.dtype).tiny
    parts = [t.reshape(-1).split(ROW) for t in (got, reference, moved, direction)]
    worst = slack = along = 0.0
    for part, ref, move, way in zip(*parts, strict=True) if got.numel() else ():
        size = ref.abs()
        allowed = (move + size).mul_(unit)
        ratio = (part - ref).abs_().sub_(tiny).clamp_min_(0.0).div_(allowed.clamp_min(tiny * unit))
        worst = max(worst, float(ratio.max()))
        slack += float((allowed * way).square_().sum())
        along += float((size * way).square_().sum())
        if not worst <= result.bound:
            return False
    slack = 5 * math.sqrt(slack) * result.bound + 4 * number.error + tiny + 1e-6 * math.sqrt(along)
    result.units = worst
    return number.low - slack <= result.along <= number.high + slack


def inner(a: Tensor, b: Tensor) -> float:
    """The derivative along b, of a gradient a."""
    if a.is_complex() or b.is_complex():
        return float((a.conj() * b).real.sum())
    return float(torch.dot(a.reshape(-1).double(), b.reshape(-1).double()))


def _number(tensor: Tensor) -> Any:
    number = tensor.item()
    return number if not isinstance(number, complex) else f"{number:.9g}"
