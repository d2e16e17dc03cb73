"""The form of a row: an operation, its formula, and the derivative for each input, written from the mathematics.

A row computes what autograd should have computed, from the operation's inputs, outputs and the gradient g of the loss with
respect to the outputs. It uses no autograd and no backward kernel of torch, so that the two can disagree.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Call:
    """One run of an operation. `inputs`: tensors by argument name (`self`, `other`, `mat1`; members of a list argument are
    `tensors[0]`, `tensors[1]`, ...); `attributes`: the other arguments by name, defaults filled in; `outputs`: its tensors."""

    inputs: dict[str, Tensor]
    attributes: dict[str, Any]
    outputs: tuple[Tensor, ...]


# (call, gradient of each output or None) -> gradient by input name. Shapes are those of the inputs.
Vjp = Callable[[Call, tuple[Tensor | None, ...]], dict[str, Tensor]]


@dataclass(frozen=True, slots=True)
class Rule:
    """`forward`: the formula, as `y = a · b`; `derivatives`: per argument the vector-Jacobian product, as `g · b`; for a list
    argument under its bare name. `symbols`: what the letters of the formulas stand for: argument name -> letter, `0` -> output 0.
    `kink`: where the derivative has a choice, in words; empty if nowhere.."""

    ops: tuple[str, ...]
    forward: str
    derivatives: dict[str, str]
    vjp: Vjp
    symbols: dict[str, str]
    kink: str = ""


RULES: dict[str, Rule] = {}


def rule(*ops: str, forward: str, symbols: dict[str, str], kink: str = "", **derivatives: str) -> Callable[[Vjp], Vjp]:
    """Register a row for the operations named (`mul.Tensor`, or `mul` for every overload; the in-place form `mul_` is the same row)."""

    def register(vjp: Vjp) -> Vjp:
        for op in ops:
            if op in RULES:
                raise ValueError(f"two rows for {op}")
            RULES[op] = Rule(ops, forward, {k.removesuffix("_"): v for k, v in derivatives.items()}, vjp, symbols, kink)
        return vjp

    return register


def find(name: str) -> Rule | None:
    """The row for `aten.mul.Tensor` or `aten.mul_.Tensor`; None: no closed form."""
    parts = name.split(".")
    if len(parts) < 2 or parts[0] != "aten":
        return None
    base, overload = parts[1], ".".join(parts[2:])
    for op in (base, base[:-1] if base.endswith("_") else base):
        for key in (f"{op}.{overload}", op):
            if key in RULES:
                return RULES[key]
    return None


def unbroadcast(gradient: Tensor, like: Tensor) -> Tensor:
    """Sum the gradient over what broadcasting repeated, to the shape of `like`."""
    return gradient.sum_to_size(like.shape) if gradient.shape != like.shape else gradient
