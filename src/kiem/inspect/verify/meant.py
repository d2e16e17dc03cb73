"""Gradients that are not meant to be the derivative: a program says so, or a hook of a module changes them."""

from __future__ import annotations

from typing import Any

import torch

from kiem.inspect.graph.model import Op, Step
from kiem.inspect.record.state import Pause


def surrogate(op: Op) -> bool:
    """Whether a custom Function says, by its attribute `surrogate_gradient = True`, that its backward is meant to be
    something else than its derivative (straight-through estimators, reversed gradients)."""
    return op.kind == "function" and op.call is not None and getattr(op.call[0], "surrogate_gradient", False) is True


def module_hook(op: Op, step: Step) -> str:
    """What to say of a node that torch puts around a module with backward hooks, where one of them changed a gradient
    (the node itself passes on what arrives); empty for any other."""
    if op.kind != "function" or op.name != "BackwardHookFunction":
        return ""
    passed = zip(step.into, step.out, strict=False)
    same = all(
        a is b or (a is not None and b is not None and torch.equal(a.sketch, b.sketch) and a.stats == b.stats)
        for a, b in passed
    )
    return "" if same else f"a backward hook of the module changes the gradient ({op.module or op.source})"


def without_hooks(op: Op, node: Any, into: tuple) -> tuple | None:
    """What a node of torch's own gives by itself, without the hooks on it (`grad_fn.register_hook`, and the module's
    `register_backward_hook` by it), which have changed what the program got. None if it cannot be run again, or may
    give something else each time."""
    custom = isinstance(node, torch.autograd.function.BackwardCFunction)
    if op.kind != "op" or op.packed or op.node == "CopySlices" or custom:
        return None
    try:
        with Pause(), torch.no_grad():
            again = node(*into)
    except Exception:
        return None  # what it had saved is gone
    return again if isinstance(again, tuple) else (again,)
