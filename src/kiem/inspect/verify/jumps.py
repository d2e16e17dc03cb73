"""Gradients that jump: where a position in a grid falls into one cell or the next, within a few roundings of what it is
computed from, an operation may have been on either side.

What changes smoothly is no jump, however fast: a sample of the reference a few roundings off is held against one on the
same way, a thousand times nearer. What the nearer one says by a straight line is taken off the other; a jump is what is
left."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from kiem.inspect.verify.judge import ROUNDINGS, Evidence, InputVerdict, Random, usual_size, with_neighbors

JUMPS = 8  # samples of inputs around a wrong element at a time
NEARER = 2.0**-10

Near = Callable[[], tuple[Tensor, Tensor]]  # the reference a few roundings off, and NEARER on the same way


def few_roundings(x: Tensor, unit: float, random: Random) -> Tensor:
    """What moves x by a few roundings of numbers of its own and of its usual size."""
    return 4 * unit * (x.abs() + usual_size(x)) * random.like(x)


def forgive_jumps(result: InputVerdict, given: Evidence, near: Near) -> None:
    """Takes a wrong verdict back if every wrong element is one where the reference jumps within a few roundings of the
    inputs, and lies between what it gives there, and all others are right together as well. To an element several may
    have jumped: samples are drawn as long as each few more bring some more elements between."""
    assert given.reference is not None and given.moved is not None  # without, nothing is known of single elements
    reference = given.reference
    allowed = given.unit * (with_neighbors(given.moved.clone()) + reference.abs()) * result.bound
    slack = allowed[..., None] if given.got.is_complex() or reference.is_complex() else allowed
    got, low = _real(given.got), _real(reference)
    start, high, right = low, low, (got - low).abs() <= slack
    outside = int((~right).sum())
    if not outside:
        return  # a sum over a slice, or the number, says that it is wrong: that is no jump of an element
    while outside:
        for _ in range(JUMPS):
            there, nearer = near()
            sample = _jumped(start, _real(there), _real(nearer), slack)
            low, high = torch.minimum(low, sample), torch.maximum(high, sample)
        jumps = (high - low > slack) & (got >= low - slack) & (got <= high + slack)
        before, outside = outside, int((~(right | jumps)).sum())
        if outside == before:
            return
    if given.slices is not None:
        jumped = ~right | (high - low > slack / ROUNDINGS)  # by however little
        there = jumped.any(-1) if jumped.dim() > reference.dim() else jumped
        rest = torch.where(there, reference, given.got)
        around = with_neighbors(given.moved.clone())
        found = given.slices.judge(rest, reference, given.moved, around, given.unit, given.roundings)
        if found is not None and found.wrong:
            return
    result.wrong_elements, result.element, result.expected, result.got = 0, None, None, None
    # What lies between the sides of a jump can hide an error as large as the jump.
    hidden, whole = float(torch.linalg.vector_norm((high - low) * ~right)), float(torch.linalg.vector_norm(start))
    result.sharpness = max(result.sharpness, hidden / whole if whole else math.inf)
    result.verdict = "coarse" if result.sharpness > given.coarsest else "kink"


def _jumped(start: Tensor, near: Tensor, nearer: Tensor, slack: Tensor) -> Tensor:
    """A sample without what changed smoothly; where the nearer one jumped as well, that one."""
    smooth = (nearer - start) / NEARER
    straight = smooth.abs() <= 4 * (near - start).abs() + slack
    return torch.where(straight, near - smooth, nearer)


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
