"""Derivatives of what moves, copies, picks or places elements: the gradient moves back the way the element came."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kiem.inspect.rules.table import Call, rule

XY = {"self": "x", "0": "y"}

# -- the same elements in another shape --------------------------------------------------------------------------------


@rule(
    "view",
    "_unsafe_view",
    "reshape",
    "_reshape_alias",
    "unsqueeze",
    "squeeze",
    "flatten",
    "unflatten",
    forward="y = x in another shape",
    symbols=XY,
    self="g in the shape of x",
)
def reshaped(c: Call, g: Tensor):
    return {"self": g.reshape(c["self"].shape)}


@rule(
    "clone",
    "contiguous",
    "alias",
    "_to_copy",
    "to",
    "lift_fresh",
    "resolve_conj",
    "resolve_neg",
    forward="y = x",
    symbols=XY,
    pointwise=True,
    self="g",
)
def same(c: Call, g: Tensor):
    return {"self": g}


@rule("expand", forward="y = x repeated along axes of size 1", symbols=XY, self="Σ g over the repeats")
def expand(c: Call, g: Tensor):
    return {"self": g}


@rule("t", "numpy_T", forward="Y = Xᵀ", symbols={"self": "X", "0": "Y"}, self="Gᵀ")
def t(c: Call, g: Tensor):
    return {"self": g.permute(list(range(g.ndim - 1, -1, -1)))}


@rule("transpose", forward="y = x with two axes exchanged", symbols=XY, self="g with them exchanged back")
def transpose(c: Call, g: Tensor):
    return {"self": g.transpose(c["dim0"], c["dim1"])}


@rule("permute", forward="y = x with its axes in another order", symbols=XY, self="g with its axes put back")
def permute(c: Call, g: Tensor):
    back = [0] * g.ndim
    for to, origin in enumerate(c["dims"]):
        back[origin] = to
    return {"self": g.permute(back)}


# -- a part, several parts, parts put together -------------------------------------------------------------------------


def placed(c: Call, *parts: tuple[Callable, Tensor]) -> dict[str, Tensor]:
    """Zeros of the input's shape with gradients added where pick(input) shows."""
    found = torch.zeros_like(c["self"])
    for pick, g in parts:
        pick(found).add_(g)
    return {"self": found}


@rule("select", forward="y = x[i]", symbols=XY | {"index": "i"}, self="g at i, else 0")
def select(c: Call, g: Tensor):
    return placed(c, (lambda x: x.select(c["dim"], c["index"]), g))


@rule("slice", forward="y = x[from:to:step]", symbols=XY, self="g at the slice, else 0")
def sliced(c: Call, g: Tensor):
    dim, step = c.get("dim", 0), c.get("step", 1)
    start = min(max(_wrapped(c.get("start", 0), c["self"].shape[dim]), 0), c["self"].shape[dim])
    index = torch.arange(start, start + g.shape[dim] * step, step, device=g.device)
    return {"self": torch.zeros_like(c["self"]).index_add(dim, index, g.to(c["self"].dtype))}


def _wrapped(position: int, size: int) -> int:
    return position + size if position < 0 else position


@rule("narrow", forward="y = x[start:start + length]", symbols=XY, self="g there, else 0")
def narrow(c: Call, g: Tensor):
    return placed(c, (lambda x: x.narrow(c["dim"], _wrapped(c["start"], x.shape[c["dim"]]), c["length"]), g))


@rule("diagonal", "diagonal_copy", forward="y = the diagonal of x", symbols=XY, self="g on the diagonal, else 0")
def diagonal(c: Call, g: Tensor):
    return placed(c, (lambda x: x.diagonal(c.get("offset", 0), c.get("dim1", 0), c.get("dim2", 1)), g))


@rule("diag_embed", forward="y = x on the diagonal, else 0", symbols=XY, self="the diagonal of g")
def diag_embed(c: Call, g: Tensor):
    return {"self": g.diagonal(c.get("offset", 0), c.get("dim1", -2), c.get("dim2", -1))}


@rule(
    "split",
    "unsafe_split",
    "split_with_sizes",
    "unsafe_split_with_sizes",
    "chunk",
    forward="y₀, y₁, … = x cut along an axis",
    symbols=XY,
    every=True,
    self="g₀, g₁, … put together",
)
def split(c: Call, gradients: tuple):
    return {"self": torch.cat(_filled(c, gradients), c.get("dim", 0))}


@rule("unbind", forward="y₀, y₁, … = x[0], x[1], …", symbols=XY, every=True, self="g₀, g₁, … stacked")
def unbind(c: Call, gradients: tuple):
    return {"self": torch.stack(_filled(c, gradients), c.get("dim", 0))}


def _filled(c: Call, gradients: tuple) -> list[Tensor]:
    return [torch.zeros_like(y) if g is None else g for g, y in zip(gradients, c.outputs, strict=True)]


@rule("cat", forward="y = x₀, x₁, … one after the other", symbols={"0": "y"}, tensors="the part of g that is xᵢ's")
def cat(c: Call, g: Tensor):
    found, start, dim = {}, 0, c.get("dim", 0)
    for i, part in enumerate(c.members("tensors")):
        if part is not None and part.shape == (0,):  # torch lets an empty vector stand beside any shape
            found[f"tensors[{i}]"] = torch.zeros_like(part)
        elif part is not None:
            found[f"tensors[{i}]"] = g.narrow(dim, start, part.shape[dim])
            start += part.shape[dim]
    return found


@rule("stack", forward="y = x₀, x₁, … along a new axis", symbols={"0": "y"}, tensors="g[i] along it")
def stack(c: Call, g: Tensor):
    return {f"tensors[{i}]": g.select(c.get("dim", 0), i) for i in range(len(c.members("tensors")))}


# -- moved, padded, in windows -----------------------------------------------------------------------------------------


@rule(
    "tril", forward="Y = X on and below the diagonal, else 0", symbols={"self": "X", "0": "Y"}, self="G there, else 0"
)
def tril(c: Call, g: Tensor):
    return {"self": g.tril(c.get("diagonal", 0))}


@rule(
    "triu", forward="Y = X on and above the diagonal, else 0", symbols={"self": "X", "0": "Y"}, self="G there, else 0"
)
def triu(c: Call, g: Tensor):
    return {"self": g.triu(c.get("diagonal", 0))}


@rule("roll", forward="y = x shifted round", symbols=XY, self="g shifted back")
def roll(c: Call, g: Tensor):
    shifts = c["shifts"]
    back = [-s for s in shifts] if isinstance(shifts, list | tuple) else -shifts
    return {"self": g.roll(back, c.get("dims", ())) if c.get("dims", ()) else g.reshape(-1).roll(back).reshape(g.shape)}


@rule("flip", forward="y = x backwards", symbols=XY, self="g backwards")
def flip(c: Call, g: Tensor):
    return {"self": g.flip(c["dims"])}


@rule("rot90", forward="y = x turned", symbols=XY, self="g turned back")
def rot90(c: Call, g: Tensor):
    return {"self": g.rot90(-c.get("k", 1), c.get("dims", [0, 1]))}


def moved(*ops: str, forward: str, derivative: str, move: Callable[[Call, Tensor], Tensor]) -> None:
    """A row for an operation that copies elements: moving the numbers 0, 1, 2, … shows which went where."""

    def vjp(c: Call, g: Tensor):
        x = c["self"]
        where = torch.arange(x.numel(), dtype=torch.float64, device=x.device).reshape(x.shape)
        where = move(c, where).long().reshape(-1)
        return {"self": torch.zeros_like(x.reshape(-1)).index_add(0, where, g.reshape(-1).to(x.dtype)).reshape(x.shape)}

    rule(*ops, forward=forward, symbols=XY, self=derivative)(vjp)


moved("repeat", forward="y = x repeated", derivative="Σ g over the repeats", move=lambda c, x: x.repeat(c["repeats"]))
moved(
    "unfold",
    forward="y = windows of x",
    derivative="Σ g over the windows that x[i] is in",
    move=lambda c, x: x.unfold(c["dimension"], c["size"], c["step"]),
)
moved(
    "pixel_shuffle",
    forward="y = channels of x laid out in space",
    derivative="g laid out in channels",
    move=lambda c, x: F.pixel_shuffle(x, c["upscale_factor"]),
)
moved(
    "pixel_unshuffle",
    forward="y = space of x laid out in channels",
    derivative="g laid out in space",
    move=lambda c, x: F.pixel_unshuffle(x, c["downscale_factor"]),
)
moved(
    "channel_shuffle",
    forward="y = x with its channels in another order",
    derivative="g in the old order",
    move=lambda c, x: torch.channel_shuffle(x, c["groups"]),
)


def padded(mode: str) -> Callable[[Call, Tensor], Tensor]:
    """How the elements of x stand after a padding of this mode."""

    def move(c: Call, x: Tensor) -> Tensor:
        return F.pad(x[None] if x.ndim < len(c["padding"]) // 2 + 2 else x, c["padding"], mode)

    return move


for kind, mode in (("reflection", "reflect"), ("replication", "replicate")):
    moved(
        *(f"{kind}_pad{n}d" for n in (1, 2, 3)),
        forward=f"y = x with its border padded by {kind}",
        derivative="Σ g over the copies",
        move=padded(mode),
    )


@rule("constant_pad_nd", forward="y = x with constants around it", symbols=XY, self="g without the border")
def constant_pad(c: Call, g: Tensor):
    return {"self": F.pad(g, [-p for p in c["pad"]])}


@rule("im2col", forward="y = the windows of x as columns", symbols=XY, self="Σ g over the windows that x[i] is in")
def im2col(c: Call, g: Tensor):
    return {"self": F.fold(g, c["self"].shape[-2:], c["kernel_size"], c["dilation"], c["padding"], c["stride"])}


@rule("col2im", forward="y = Σ of the columns x, each at its window", symbols=XY, self="the windows of g as columns")
def col2im(c: Call, g: Tensor):
    return {"self": F.unfold(g, c["kernel_size"], c["dilation"], c["padding"], c["stride"])}


# -- overwritten -------------------------------------------------------------------------------------------------------


@rule("copy", forward="y = s", symbols=XY | {"src": "s"}, self="0", src="g")
def copy(c: Call, g: Tensor):
    return {"self": torch.zeros_like(c["self"]), "src": g}


@rule("fill", forward="y = v everywhere", symbols=XY | {"value": "v"}, self="0", value="Σ g")
def fill(c: Call, g: Tensor):
    return {"self": torch.zeros_like(c["self"]), "value": g.sum()}


@rule(
    "zero",
    "normal_",
    "uniform_",
    "bernoulli_",
    "exponential_",
    "log_normal_",
    "cauchy_",
    "geometric_",
    "random_",
    forward="y = numbers that do not depend on x",
    symbols=XY,
    self="0",
)
def overwritten(c: Call, g: Tensor):
    return {"self": torch.zeros_like(c["self"])}
