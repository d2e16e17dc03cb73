"""The form of a row: an operation, its formula, and the derivative for each input, written from the mathematics.

A row computes what autograd should have computed, from the operation's inputs, outputs and the gradient g of the loss
with respect to the outputs. It uses no autograd and no backward kernel of torch, so that the two can disagree.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True, slots=True)
class Call:
    """One run of an operation. `inputs`: tensors by argument name (`self`, `other`, `mat1`; members of a list argument
    are `tensors[0]`, `tensors[1]`, ...), before what it changes in place; `attributes`: the other arguments by name,
    defaults filled in; `outputs`: its tensors."""

    inputs: dict[str, Tensor]
    attributes: dict[str, Any]
    outputs: tuple[Tensor, ...]
    rounded: Callable[[Tensor], Tensor] = _as_it_is  # laid on what a row subtracts, which the operation rounds first

    def __getitem__(self, name: str) -> Any:
        """The argument of this name: a tensor, a number, None."""
        return self.inputs[name] if name in self.inputs else self.attributes.get(name)

    def get(self, name: str, default: Any) -> Any:
        """The argument of this name; `default` if it is not there or None."""
        value = self[name]
        return default if value is None else value

    def members(self, name: str) -> list[Tensor | None]:
        """A list of tensors; None where the list has none, as in `x[:, i]`."""
        found = {int(k[len(name) + 1 : -1]): t for k, t in self.inputs.items() if k.startswith(f"{name}[")}
        return [found.get(i) for i in range(max(found, default=-1) + 1)]

    @property
    def y(self) -> Tensor:
        """The first output."""
        return self.outputs[0]


# (call, gradient of each output or None) -> gradient by input name, in the input's shape. No entry: zero.
# KeyError: no closed form for this call.
Vjp = Callable[[Call, tuple[Tensor | None, ...]], dict[str, Tensor]]


@dataclass(frozen=True, slots=True)
class Rule:
    """`forward`: the formula, as `y = a · b`; `derivatives`: per argument the vector-Jacobian product, as `g · b`, of a
    list under its bare name. Of a broadcast argument the sum over what repeated it is understood. After
    `; with q: ` stands what holds instead if q is given; `formula` chooses.
    `symbols`: what the letters of the formulas stand for: argument name -> letter, `0` -> output 0.
    `kink`: where the derivative has a choice, in words; empty if nowhere.
    `pointwise`: y[i] depends on no x[j] but x[i].
    `holomorphic`: of complex numbers the formulas hold with all but g conjugated."""

    ops: tuple[str, ...]
    forward: str
    derivatives: dict[str, str]
    vjp: Vjp
    symbols: dict[str, str]
    kink: str = ""
    pointwise: bool = False
    holomorphic: bool = True


RULES: dict[str, Rule] = {}


def rule(
    *ops: str,
    forward: str,
    symbols: dict[str, str],
    kink: str = "",
    pointwise: bool = False,
    every: bool = False,
    holomorphic: bool = True,
    **derivatives: str,
) -> Callable[[Callable], Callable]:
    """Register a row for the operations named (`mul.Tensor`, or `mul` for every overload and the in-place `mul_`).

    The function decorated is given the call and the gradient of output 0 (`every`: those of all outputs, some None).
    What it returns is summed over broadcast axes; entries for what is no floating-point tensor are dropped.
    The gradient of a complex z is ∂L/∂x + i · ∂L/∂y. A holomorphic row gives g · f'(z) with g conjugated before and the
    result after, g · conj(f'(z)); any other sees to complex numbers itself.
    """

    def register(function: Callable) -> Callable:
        @functools.wraps(function)
        def vjp(call: Call, gradients: tuple[Tensor | None, ...]) -> dict[str, Tensor]:
            if all(g is None for g in gradients):
                return {}
            if not every and any(g is not None for g in gradients[1:]):
                raise KeyError("no closed form for outputs other than the first")
            turn = torch.conj_physical if holomorphic else _as_it_is
            turned = tuple(None if g is None else turn(g) for g in gradients)
            found = function(call, turned if every else turned[0])
            return {
                name: fitted(turn(g), call.inputs[name])
                for name, g in found.items()
                if name in call.inputs and (call.inputs[name].is_floating_point() or call.inputs[name].is_complex())
            }

        for op in ops:
            if op in RULES:
                raise ValueError(f"two rows for {op}")
            RULES[op] = Rule(ops, forward, derivatives, vjp, symbols, kink, pointwise, holomorphic)
        return function

    return register


def find(name: str) -> Rule | None:
    """The row for `aten.mul.Tensor` or `aten.mul_.Tensor`; None: no closed form."""
    key = find_key(name)
    return RULES[key] if key else None


def find_key(name: str) -> str | None:
    """Under which name RULES has it."""
    parts = name.split(".")
    if len(parts) < 2 or parts[0] != "aten":
        return None
    base, overload = parts[1], ".".join(parts[2:])
    for op in (base, base[:-1] if base.endswith("_") else base):
        for key in (f"{op}.{overload}", op):
            if key in RULES:
                return key
    return None


def fitted(gradient: Tensor, like: Tensor) -> Tensor:
    """The gradient in the shape, type and place of `like`: summed over what broadcasting repeated, and real for a real
    number that met complex ones."""
    if gradient.shape != like.shape:
        gradient = gradient.sum_to_size(like.shape)
    if gradient.is_complex() and not like.is_complex():
        gradient = gradient.real
    return gradient.to(like.device, like.dtype)


# -- for people --------------------------------------------------------------------------------------------------------

_WORD = re.compile(r"[A-Za-zΑ-Ωα-ωϕ]+[₀-₉]*")
_READABLE = {
    "exp",
    "ln",
    "sin",
    "cos",
    "tan",
    "sinh",
    "cosh",
    "tanh",
    "sign",
    "σ",
    "Φ",
    "φ",
    "π",
    "ψ",
    "if",
    "else",
    "and",
    "or",
}


def formula(rule: Rule, call: Call, argument: str | None = None) -> str:
    """The formula of the derivative for an argument, or of the operation, as it reads for this call: factors that are 1
    and arguments that are not given left out, and the n of a mean where nothing is averaged."""
    text = rule.forward if argument is None else rule.derivatives.get(_bare(argument), "")
    for name, letter in rule.symbols.items():
        plain, given, other = text.partition(f"; with {letter}: ")
        text = other if given and call[name] is not None else plain
    present = {letter for name, letter in rule.symbols.items() if name in call.inputs or name.isdigit()}
    for name, letter in rule.symbols.items():
        if letter in present:
            continue
        if call[name] is None:
            text = re.sub(rf" \+ {letter}(?=$|[ ,)])", "", text)
        if call[name] is None or (_scalar(call[name]) == 1 and name in call.attributes):
            text = text.replace(f"{letter} · ", "").replace(f"·{letter}", "")
    if call["reduction"] in (0, 2):
        text = text.replace("mean of ", "Σ " if call["reduction"] == 2 else "").replace(" / n", "")
    if argument is not None and _scalar(call["self"]) is not None:
        text = text.replace(" / n", "")
    if argument is not None and rule.holomorphic and _is_complex(call):
        turned = set(_WORD.findall(text)) & set(rule.symbols.values())
        return f"{text}, all but g conjugated" if turned else text
    return text


def local_derivative(rule: Rule, call: Call, argument: str) -> Tensor | None:
    """dy/dx of each element, in the argument's shape. None unless the operation is pointwise or both are scalars, and
    for complex numbers."""
    x = call.inputs.get(argument)
    if x is None or not call.outputs or _is_complex(call):
        return None
    y = call.outputs[0]
    if not (x.numel() == y.numel() == 1 or (rule.pointwise and x.shape == y.shape)):
        return None
    gradients = (torch.ones_like(y), *(None for _ in call.outputs[1:]))
    return rule.vjp(call, gradients).get(argument)


def substituted(rule: Rule, call: Call, argument: str, g: Tensor | float | None = None) -> str | None:
    """The derivative's formula with numbers, as `0.9183 · (1 − 0.9183)`; None unless every letter in it is a scalar.
    g: the gradient that arrives; None writes dy/dx without it."""
    text = formula(rule, call, argument)
    if _scalar(_argument(call, argument)) is None:
        return None
    if g is None:
        text = re.sub(r"\bg · ", "", text)
    numbers: dict[str, float] = {}
    letters = {letter: name for name, letter in rule.symbols.items()} | {"g": ""}
    for word in set(_WORD.findall(text)):
        if word in letters:
            value = (1.0 if g is None else g) if word == "g" else _argument(call, letters[word])
            number = _scalar(value)
            if number is None:
                return None
            numbers[word] = number
        elif word not in _READABLE:
            return None
    if not text or any(mark in text for mark in "ᵀ[]"):
        return None

    def write(match: re.Match) -> str:
        if match[0] not in numbers:
            return match[0]
        number = f"{numbers[match[0]]:.4g}".replace("-", "−")
        before, after = text[: match.start()].rstrip()[-1:], text[match.end() :][:1]
        bare = not number.startswith("−") or not (before in tuple("·/−+√^|") or after in tuple("²³^"))
        return number if bare else f"({number})"

    return _WORD.sub(write, text)


def _is_complex(call: Call) -> bool:
    return any(t.is_complex() for t in (*call.inputs.values(), *call.outputs))


def _bare(argument: str) -> str:
    return argument.split("[")[0]


def _argument(call: Call, name: str) -> Any:
    return call.outputs[int(name)] if name.isdigit() else call[name]


def _scalar(value: Any) -> float | None:
    if isinstance(value, Tensor):
        return float(value) if value.numel() == 1 and not value.is_complex() else None
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
