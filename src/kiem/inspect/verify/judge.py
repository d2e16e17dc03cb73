"""Is a gradient right? It is held against a reference, element by element, and both against a numeric derivative.

Bounds. An algorithm that is stable errs as if each number in it had been rounded a few times. So the reference is
computed again with every input, result and arriving gradient changed by relative noise, which shows how far one
rounding moves each element: `moved`. What is allowed is that times the number of roundings: 8, and for sums of k
terms k/4 more in the type that sums are kept in. Nothing here is a setting.

Sharpness. Roundings of single elements average out over a row or a tensor, a wrong factor does not: in coarse types
sums over slices are compared as well (slices.py), and where there is only the number, it is taken along the gradient
itself, too. Of each gradient it is known which relative error would have shown (`sharpness`); where that is more than
a fifth the verdict is `coarse`, as nothing was found but nothing can be said."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kiem.inspect.graph.layouts import elements, regular
from kiem.inspect.verify.numeric import Derivative
from kiem.inspect.verify.slices import Slices

NOISE = 2.0**-26  # relative; far above float64's rounding, far below where formulas stop being straight
COARSEST = 0.2  # relative error of a whole gradient that must show
ROUNDINGS = 8.0  # of a stable algorithm
OUTLIER = 64.0  # times what is usual
SETTLED = 1e-6  # relative error of a number that is beyond doubt
FINE = 2.0**-12  # types of a unit below need no sums over slices: no wrong factor hides in their bounds
DOUBLE = 2.0**-46  # some roundings of float64, in which references are computed
ROW = 262_139  # a prime: no dimension of a tensor falls in step with it


@dataclass(slots=True)
class InputVerdict:
    """Of one input. `units`: the largest error in units of the precision of the type; `bound` in the same units."""

    argument: str
    value: int
    verdict: str  # ok, kink, wrong, nonfinite, coarse
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
    nonfinite: int = 0  # elements of what the program got
    sharpness: float = 0.0  # the smallest relative error of the whole that would have shown


def repeats(unit: float) -> int:
    """Samples of noise: more where sums over slices are judged by them."""
    return 2 if unit <= FINE else 4


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

    def shaken(self, tensor: Tensor, size: float = NOISE) -> Tensor:
        """The tensor with relative noise on each element."""
        if tensor.is_complex() or tensor.device.type != "cpu":
            return tensor * (1 + size * self.like(tensor))
        flat = tensor.reshape(-1)
        made = torch.empty_like(flat)
        for start, row in self._rows(flat.numel()):
            part = flat[start : start + len(row)]
            torch.mul(part, 1 + size * row, out=made[start : start + len(row)])  # what is infinite stays so
        return made.view(tensor.shape)

    def _rows(self, count: int) -> Iterator[tuple[int, Tensor]]:
        if Random._row is None:
            row = torch.randn(ROW, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
            Random._row = torch.cat((row, row))
        first = int(torch.randint(ROW, (1,), generator=self._generator))
        for start in range(0, count, ROW):
            yield start, Random._row[first : first + min(ROW, count - start)]


class Noise:
    """Laid on what operations give, as their roundings would be, forward and backward. `shares`: of it that a number
    of each data type gets, 1 if not said."""

    def __init__(self, random: Random, shares: Mapping[torch.dtype, float] | None = None):
        self._random, self._shares = random, shares or {}

    def size(self, dtype: torch.dtype) -> float:
        """Of the noise on a number that is of this type in the program."""
        return NOISE * self._shares.get(dtype, 1.0)

    def __call__(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """The tensor, changed in place: the operation that made it must see the change in what it saved, too."""
        # Of a view changed in place torch makes the node when it is asked for; register_hook alone crashes.
        if regular(tensor) and tensor.requires_grad and (tensor.grad_fn is not None or tensor.is_leaf):
            tensor.register_hook(functools.partial(self._rounded, self.size(dtype)))
        if tensor.is_floating_point() or tensor.is_complex():
            held = elements(tensor.data)
            held.copy_(self._random.shaken(held, self.size(dtype)))
        return tensor

    def backward(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """The tensor as it is, only its gradient rounded."""
        if regular(tensor) and tensor.requires_grad and tensor.grad_fn is not None:
            tensor.register_hook(functools.partial(self._rounded, self.size(dtype)))
        return tensor

    def apart(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """The tensor for one of several that read it: their gradients are rounded one by one before they are added up,
        and may cancel."""
        if not regular(tensor) or not tensor.requires_grad:
            return tensor
        alias = tensor.view_as(tensor)
        alias.register_hook(functools.partial(self._rounded, self.size(dtype)))
        return alias

    def _rounded(self, size: float, gradient: Tensor | None) -> Tensor | None:
        return None if gradient is None else self._random.shaken(gradient, size)


@dataclass(slots=True)
class Evidence:
    """On one gradient: what the program got, in float64; a reference with how far one rounding moves each of its
    elements (None: there is none); the number along a direction, and how to take it along others.

    `sides`: the reference a little to both sides of the input. `independent`: the reference owes nothing to autograd,
    so where both say the same, a number that says something else did not settle. `own`: it is the backward that is on
    trial, in float64, and worth what a number says of it. `slices`: sums over slices, of coarse types. `more`: numbers
    along further random directions; `others`: along the gradient itself. `roundings`: on the way, of sums over slices.
    `coarsest`: the relative error of the whole that must show. `size`: of the terms whose derivative the number is.
    `arrived`: something arrived that was not finite, so that what is not finite of `got` is no fault of it. `nearer`: a
    number along a direction by much smaller steps, as functions that have steps themselves (a rounding) need.
    `arriving`: how far one rounding of nothing but the gradients that arrived moves each element."""

    got: Tensor
    reference: Tensor | None
    moved: Tensor | None
    unit: float
    direction: Tensor
    number: Derivative
    numeric: Callable[[Tensor], Derivative]
    sides: Callable[[], tuple[Tensor, Tensor]]
    independent: bool = False
    own: bool = False
    slices: Slices | None = None
    more: Callable[[], Sequence[tuple[Tensor, Derivative]]] = tuple
    others: Callable[[], Sequence[tuple[Tensor, Derivative]]] = tuple
    roundings: float = ROUNDINGS
    coarsest: float = COARSEST
    size: float = 0.0
    arrived: bool = False
    nearer: Callable[[Tensor], Derivative] | None = None
    arriving: Callable[[], Tensor] | None = None


def judge(result: InputVerdict, given: Evidence) -> None:
    """Fill in the verdict of one gradient: against the reference, element by element, and both against the number.

    At a kink the number is no judge: elements whose reference jumps between the sides are left out of the direction,
    and there any value between the sides is a derivative that autograd may choose."""
    result.numeric, result.numeric_error = given.number.value, given.number.error
    result.along = inner(given.got, given.direction)
    if _plainly_right(result, given):
        return
    finite = torch.isfinite(given.got.abs())
    if given.reference is None:
        _by_number(result, _where(given, finite))
    else:
        known = torch.isfinite(given.reference.abs())
        _by_reference(result, _where(given, finite & known))
        if bool((apart := finite & ~known).any()) and result.verdict != "wrong":
            _without_reference(result, _where(given, apart))
    if not given.arrived and not bool(finite.all()):
        _note_nonfinite(result, given, ~finite)


def _note_nonfinite(result: InputVerdict, given: Evidence, bad: Tensor) -> None:
    """A gradient that is NaN or infinite where the reference is finite is a verdict; where neither is finite, it
    depends on whether it reaches a leaf (verifier.py)."""
    first = bad
    result.nonfinite = int(bad.sum())
    if given.reference is not None and bool((alone := bad & torch.isfinite(given.reference.abs())).any()):
        result.verdict, result.wrong_elements, first = "nonfinite", int(alone.sum()), alone
    where = first.reshape(-1).to(torch.uint8).argmax()
    result.element = tuple(int(i) for i in torch.unravel_index(where, bad.shape)) if bad.dim() else ()
    result.got = _number(given.got.reshape(-1)[where])
    result.expected = None if given.reference is None else _number(given.reference.reshape(-1)[where])


def _where(given: Evidence, kept: Tensor) -> Evidence:
    """The evidence on some elements, 0 in place of the others."""
    if bool(kept.all()):
        return given
    direction = given.direction * kept
    return dataclasses.replace(
        given,
        got=torch.where(kept, given.got, 0.0),
        reference=None if given.reference is None else torch.where(kept, given.reference, 0.0),
        moved=None if given.moved is None else torch.where(kept, given.moved, 0.0),
        direction=direction,
        number=given.numeric(direction),
        sides=lambda: _kept(kept, *given.sides()),
        slices=None,
    )


def _kept(kept: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    return torch.where(kept, left, 0.0), torch.where(kept, right, 0.0)


def _without_reference(result: InputVerdict, given: Evidence) -> None:
    """Elements at which the reference is not finite and what the program got is: the number alone speaks of them."""
    verdict, given = result.verdict, dataclasses.replace(given, reference=None, more=tuple, others=tuple)
    own = dataclasses.replace(result)
    own.along = inner(given.got, given.direction)
    _by_number(own, given)
    if own.verdict == "wrong" or not math.isfinite(given.number.error):
        result.verdict = "wrong" if own.verdict == "wrong" else "coarse"
        result.units, result.bound, result.expected, result.got = own.units, own.bound, own.expected, own.got
        result.numeric, result.numeric_error, result.along = given.number.value, given.number.error, own.along
        result.reference = ""
    else:
        result.verdict = "kink" if own.verdict == "kink" else verdict


def _by_reference(result: InputVerdict, given: Evidence) -> None:
    got, reference, unit, direction, number = given.got, given.reference, given.unit, given.direction, given.number
    assert reference is not None and given.moved is not None  # judge() sends the others to _by_number
    tiny = 8 * torch.finfo(result.dtype).tiny
    moved = with_neighbors(given.moved)
    allowed = unit * (moved + reference.abs())
    floor = float(moved.mean()) if moved.numel() else 0.0
    error, bound = (got - reference).abs(), result.bound
    ratio = torch.where(error <= tiny, 0.0, error / allowed.clamp_min(tiny * unit))
    mismatch = ratio > bound
    result.units = float(ratio.max()) if ratio.numel() else 0.0
    slack = 5 * float((allowed * direction.abs()).square().sum().sqrt()) * bound + 4 * number.error + tiny
    slack += 1e-6 * float((reference.abs() * direction.abs()).square().sum().sqrt())
    kinked = None
    if number.kink:
        kinked, between = _between(got, given.sides(), allowed * bound, 1e-3 * (floor + reference.abs().max()))
        mismatch &= ~(kinked & between)
        direction = direction * ~kinked
        number = given.numeric(direction)
    result.numeric, result.numeric_error, result.along = number.value, number.error, inner(got, direction)
    right = "ok" if kinked is None else "kink"
    # Both were computed in float64: the rounding of the type is no excuse for a reference.
    exact = tiny + 1e-6 * float((reference.abs() * direction.abs()).square().sum().sqrt())
    exact += DOUBLE / unit * float((allowed * direction.abs()).square().sum().sqrt())
    certified = _certified(reference, direction, number, min(slack, exact + 4 * number.error))
    settled = True
    if not certified and given.nearer is not None:
        nearer = given.nearer(direction)
        certified = _certified(reference, direction, nearer, exact + 4 * nearer.error)
        apart = max(nearer.low - number.high, number.low - nearer.high)
        settled = certified or not apart > 4 * (number.error + nearer.error) + exact
    if not certified and settled and (not given.independent or mismatch.any() or _settled(number)):
        result.reference = ""  # the number speaks against it and decides alone
        found = _by_number(result, dataclasses.replace(given, direction=direction, number=number))
        if found is not None:
            way, number = found
            slack = 5 * float((allowed * way.abs()).square().sum().sqrt()) * bound + 4 * number.error + tiny
            if number.low - slack <= result.along <= number.high + slack:  # it may be rounding, as the reference moves
                result.sharpness = slack / max(abs(number.value), tiny)
                result.verdict = right if result.sharpness <= given.coarsest else "coarse"
        elif result.verdict != "coarse":
            result.verdict = right
        return
    sliced = given.slices.judge(got, reference, given.moved, moved, unit, given.roundings) if given.slices else None
    result.sharpness = _sharpness(given, moved, allowed, bound)
    if sliced is not None:
        result.sharpness = min(result.sharpness, sliced.sharpness)
    if given.own and 4 * number.error > COARSEST * abs(number.value) and result.along != 0.0:
        result.verdict, result.sharpness = "coarse", 4 * number.error / max(abs(number.value), tiny)
    elif mismatch.any():
        where = ratio.argmax()
        result.wrong_elements = int(mismatch.sum())
        result.element = tuple(int(i) for i in torch.unravel_index(where, error.shape)) if error.dim() else ()
        result.expected, result.got = _number(reference.reshape(-1)[where]), _number(got.reshape(-1)[where])
        result.verdict = "wrong"
    elif sliced is not None and sliced.wrong and kinked is None:
        result.verdict, result.expected, result.got = "wrong", sliced.expected, sliced.got
        result.units, result.bound = sliced.units, sliced.bound
    else:
        # Where it has steps, or corners that its reference does not show, no number says anything.
        vague = number.high - number.low > COARSEST * max(abs(number.high), abs(number.low))
        known = (certified or settled) and (given.independent or not vague)
        result.verdict = right if known and result.sharpness <= given.coarsest else "coarse"


def _certified(reference: Tensor, direction: Tensor, number: Derivative, slack: float) -> bool:
    return number.low - slack <= inner(reference, direction) <= number.high + slack


def _settled(number: Derivative) -> bool:
    """Whether a number is beyond doubt: along a straight line, or nearly, or where steps of all widths agree."""
    return number.error + number.asymmetry <= SETTLED * abs(number.value)


def _between(got: Tensor, sides: tuple[Tensor, Tensor], slack: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """Whether the gradient of an element jumps between the sides of its kink, and whether what was got lies between
    them; of complex numbers each part."""
    if got.is_complex() or any(side.is_complex() for side in sides):
        got, left, right = (torch.view_as_real(t.to(torch.complex128).resolve_conj()) for t in (got, *sides))
        kinked, between = _between(got, (left, right), slack[..., None], size)
        return kinked.any(-1), between.all(-1)
    low, high = torch.aminmax(torch.stack(sides), dim=0)
    kinked = (high - low) > 1e-4 * (high.abs() + low.abs() + size)
    return kinked, (got >= low - slack) & (got <= high + slack)


def _sharpness(given: Evidence, moved: Tensor, allowed: Tensor, bound: float) -> float:
    """The smallest relative error of all elements that one of them would have shown."""
    assert given.reference is not None
    size = given.reference.abs()
    if size.numel() == 0 or _cancels(given, size, moved):
        return 0.0
    return bound / float((size / allowed.clamp_min(torch.finfo(torch.float64).tiny)).max())


def _cancels(given: Evidence, size: Tensor, moved: Tensor) -> bool:
    """Whether terms cancel down to their roundings: there the gradient is zero as far as its type can say, and that is
    what was checked. A steep function is moved by as much, but not because of what arrives."""
    few = ROUNDINGS if given.unit <= FINE else 1.0
    if not bool((size <= few * given.unit * moved).all()):
        return False
    if given.arriving is None or float(size.max()) <= NOISE**2 * float(moved.max()):
        return True
    return bool((size <= few * given.unit * with_neighbors(given.arriving())).all())


def _by_number(result: InputVerdict, given: Evidence) -> tuple[Tensor, Derivative] | None:
    """Only derivatives along directions are known. The direction that says that it is wrong, with its number.

    Along random directions an error of any form shows; along the gradient itself a wrong factor, and nothing that is
    missing: such directions make no check sharper. Roundings are independent of the directions: over several random
    ones their mean square is known better than along one."""
    unit, got, bound = given.unit, given.got, result.bound
    usual = float(got.abs().square().mean().sqrt()) if got.numel() else 0.0
    worst = -1.0
    zero = nothing = True  # as the gradient, so every number, to a thousandth of its terms; every number, and it
    tried = [(given.direction, given.number, True), *((way, number, True) for way, number in given.more())]
    squares: list[tuple[float, float, float]] = []  # along each random direction: what is off, its size, what is vague
    for direction, number, random in (*tried, *((way, number, False) for way, number in given.others())):
        if not math.isfinite(number.error):
            continue  # it did not settle
        along, size = inner(got, direction), got.abs() * direction.abs()
        scale = max(abs(number.value), float(size.square().sum().sqrt()))
        spread = 5 * float(((got.abs() + usual) * direction.abs()).square().sum().sqrt()) + float(size.sum())
        vague = 4 * number.error + 8 * torch.finfo(result.dtype).tiny
        allowed = unit * bound * min(5 * scale, spread) + vague
        off = max(number.low - along, along - number.high, 0.0)
        zero &= along == 0.0 and allowed <= 1e-3 * given.size
        nothing &= along == 0.0 and number.value == 0.0
        if random:
            squares.append((off**2, scale**2, (vague + number.high - number.low) ** 2))
        right = off <= allowed
        near = math.inf if not right else abs(along - number.value) / allowed if math.isfinite(allowed) else 0.0
        if near > worst and (scale or not right):
            worst, result.numeric, result.numeric_error, result.along = near, number.value, number.error, along
            if scale:
                result.units, result.bound = abs(along - number.value) / (unit * scale), allowed / (unit * scale)
        if not right:
            result.verdict, result.expected, result.got = "wrong", number.value, along
            return direction, number
    if not squares:
        result.verdict, result.sharpness = "coarse", math.inf
        return None
    off, scale, vague = (math.sqrt(math.fsum(column) / len(squares)) for column in zip(*squares, strict=True))
    tail = 5.0 if len(squares) == 1 else math.sqrt(1 + 5 * math.sqrt(2 / len(squares)))  # five deviations
    allowed = unit * bound * tail * scale + vague
    if off > allowed:
        result.verdict, result.expected, result.got = "wrong", result.numeric, result.along
        result.units, result.bound = off / (unit * scale), allowed / (unit * scale)
        return given.direction, given.number
    result.sharpness = 0.0 if nothing or (zero and usual == 0.0) else allowed / scale
    result.verdict = "coarse" if result.sharpness > given.coarsest else "kink" if given.number.kink else "ok"
    return None


def with_neighbors(moved: Tensor) -> Tensor:
    """A few samples of noise can leave an element unmoved by chance: it gets what is usual in its row and in the
    tensor. A few that noise throws from one branch to the other say nothing of the rest."""
    moved = moved.nan_to_num(nan=0.0, posinf=0.0)
    if moved.numel() == 0:
        return moved
    usual = torch.linalg.vector_norm(moved) / math.sqrt(moved.numel())
    flat = moved.reshape(-1)
    some = flat[:: max(1, flat.numel() // 4096)].sort().values
    rest = some[: some.numel() - math.ceil(some.numel() / 100)]  # a softmax has few large numbers, but not so few
    if rest.numel() and bool(rest[-1] > 0):
        usual = torch.minimum(usual, OUTLIER * torch.linalg.vector_norm(rest) / math.sqrt(rest.numel()))
    if moved.dim() > 0:
        row = torch.linalg.vector_norm(moved, dim=-1, keepdim=True) / math.sqrt(moved.shape[-1])
        usual = usual + torch.minimum(row, OUTLIER * usual)
    return moved.add_(usual)


def _plainly_right(result: InputVerdict, given: Evidence) -> bool:
    """The same as `judge` for what is right, finite, smooth and of a fine type, in one pass over parts that fit a
    cache."""
    got, reference, unit, number = given.got, given.reference, given.unit, given.number
    if (
        reference is None
        or given.moved is None
        or number.kink
        or given.slices
        or given.own
        or got.is_complex()
        or reference.is_complex()
    ):
        return False
    tiny = 8 * torch.finfo(result.dtype).tiny
    moved = with_neighbors(given.moved)
    parts = [t.reshape(-1).split(ROW) for t in (got, reference, moved, given.direction)]
    worst = slack = along = due = 0.0
    for part, ref, move, way in zip(*parts, strict=True) if got.numel() else ():
        size = ref.abs()
        allowed = (move + size).mul_(unit)
        ratio = (part - ref).abs_().sub_(tiny).clamp_min_(0.0).div_(allowed.clamp_min(tiny * unit))
        here = float(ratio.max())
        slack += float((allowed * way).square_().sum())
        along += float((size * way).square_().sum())
        due += inner(ref, way)
        if not here <= result.bound:  # or it is not finite
            return False
        worst = max(worst, here)
    sharpness = 0.0 if along == 0.0 else result.bound * math.sqrt(slack / along)
    exact = 4 * number.error + tiny + 1e-6 * math.sqrt(along) + DOUBLE / unit * math.sqrt(slack)
    slack = 5 * math.sqrt(slack) * result.bound + exact
    if not sharpness <= given.coarsest or not number.low - exact <= due <= number.high + exact:
        return False
    result.units, result.sharpness = worst, sharpness
    return number.low - slack <= result.along <= number.high + slack


def inner(a: Tensor, b: Tensor) -> float:
    """The derivative along b, of a gradient a."""
    if a.is_complex() or b.is_complex():
        return float((a.conj() * b).real.sum())
    return float(torch.dot(a.reshape(-1).double(), b.reshape(-1).double()))


def _number(tensor: Tensor) -> Any:
    number = tensor.item()
    return number if not isinstance(number, complex) else f"{number:.9g}"
