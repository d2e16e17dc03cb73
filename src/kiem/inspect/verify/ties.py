"""Operations that choose among numbers, as a maximum does: where several are equal, autograd may take any of them, or
parts of each that sum to the gradient that arrived.

Noise must not decide between equal numbers, so none is laid on what is chosen from: what is chosen passes on without
rounding, and the gradient changes only with the choice."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from kiem.inspect.graph.model import Op
from kiem.inspect.verify.judge import InputVerdict, inner, usual_size
from kiem.inspect.verify.numeric import Derivative

CHOOSING = frozenset({
    "amax", "amin", "aminmax", "max", "min", "maximum", "minimum", "fmax", "fmin", "median", "nanmedian", "kthvalue",
    "mode", "sort", "topk", "cummax", "cummin", "max_pool2d_with_indices", "max_pool3d_with_indices",
    "adaptive_max_pool2d", "adaptive_max_pool3d", "fractional_max_pool2d", "fractional_max_pool3d",
})  # fmt: skip
REDUCING = frozenset({"index_reduce", "scatter_reduce"})  # by an argument
NORMS = frozenset({"linalg_vector_norm", "norm", "_cdist_forward"})  # those of infinite order


def chooses(op: Op) -> bool:
    """Whether an operation passes on one of the numbers that it is given, or the size of one."""
    label = op.label.rstrip("_")
    if label in REDUCING:
        return op.attributes.get("reduce") in ("amax", "amin")
    return label in CHOOSING or _infinite_norm(op)


def _infinite_norm(op: Op) -> bool:
    order = op.attributes.get("p", op.attributes.get("ord"))
    return op.label in NORMS and isinstance(order, float | int) and math.isinf(order)


def compares_as_given(op: Op, inputs: Iterable[Tensor]) -> bool:
    """Whether it chooses among the numbers as they are given: no rounding of its own can turn the choice."""
    return chooses(op) and op.label != "_cdist_forward" and not any(x.is_complex() for x in inputs)


def alike(op: Op, x: Tensor, size: float) -> Tensor:
    """A direction of this size along which equal numbers move alike (of a norm, those of equal size), so that no tie is
    broken, and others do not."""
    if _infinite_norm(op):
        return x.sgn() * size * torch.cos(7 * x.abs() / size + 1)
    return size * torch.cos(7 * x / size + 1)


def judge_together(
    op: Op,
    results: Sequence[InputVerdict],
    inputs: dict[int, Tensor],
    got: dict[int, Tensor | None],
    off: dict[int, Tensor],
    numeric: Callable[[dict[int, Tensor]], Derivative],
) -> None:
    """Call kinks wrong if along directions that break no tie the gradients of all inputs are not the derivative: there,
    all that may be chosen give the same. `off`: by how much one rounding moves each of their elements."""
    if not any(r.verdict == "kink" for r in results) or not compares_as_given(op, inputs.values()):
        return
    held = [(r, g) for r in results if (g := got[r.value]) is not None and r.value in off]
    size = max((usual_size(inputs[r.value]) for r, _ in held), default=1.0)
    ways = {r.value: alike(op, inputs[r.value], size) for r, _ in held}
    number = numeric(ways)
    along = sum(inner(g, ways[r.value]) for r, g in held)
    rounded = sum(float((r.bound * off[r.value] * ways[r.value]).square().sum()) for r, _ in held)
    slack = 5 * math.sqrt(rounded) + 4 * number.error
    if not math.isfinite(slack) or number.low - slack <= along <= number.high + slack:
        return
    for result in results:
        if result.verdict == "kink":
            result.verdict, result.expected, result.got = "wrong", number.value, along
            result.numeric, result.numeric_error, result.along = number.value, number.error, along
