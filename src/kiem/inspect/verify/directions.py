"""Along which directions an operation is moved to take its derivative by number."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor

from kiem.inspect.graph.model import Op
from kiem.inspect.verify.judge import Random, usual_size
from kiem.inspect.verify.numeric import Derivative

# Arguments of which an operation reads one triangle, or which are logarithms of probabilities that sum to 1: their
# gradient is only meant along such directions.
STRUCTURE = {
    ("_ctc_loss", "log_probs"): "normalized",
    ("linalg_cholesky_ex", "self"): "symmetric", ("cholesky", "self"): "symmetric", ("_linalg_eigh", "A"): "symmetric",
    ("cholesky_solve", "input2"): "triangular", ("cholesky_inverse", "self"): "triangular",
    ("linalg_solve_triangular", "self"): "triangular", ("triangular_solve", "A"): "triangular",
    ("linalg_pinv", "self"): "hermitian",
}  # fmt: skip


def direction(op: Op, argument: str, x: Tensor, random: Random) -> Tensor:
    """Random, of the size of what it is added to, and of its structure where the operation reads only part of it."""
    along = random.like(x)
    along *= usual_size(x)
    return meant_part(op, argument, x, along)


def meant_part(op: Op, argument: str, x: Tensor, along: Tensor) -> Tensor:
    """The part of a direction along which the operation's gradient is meant."""
    if STRUCTURE.get((op.label, argument)) == "normalized":
        return along - (x.exp() * along).sum(-1, keepdim=True)
    return without_padding(op, argument, structured(op, argument, along))


def along_gradient(op: Op, argument: str, x: Tensor, gradient: Tensor, parts: bool) -> list[Tensor]:
    """Along a gradient, of the size of what it is added to: a wrong factor of it shows there as nowhere else. With
    `parts` along halves of its rows, too, cut by a bit of their number, so that a row that is wrong is in one of each
    two. None along a gradient that is zero or not finite."""
    size = gradient.abs().max() if gradient.numel() else gradient.sum()
    if not bool(torch.isfinite(size)) or not bool(size > 0):
        return []
    along = (gradient * (usual_size(x) / usual_size(gradient))).to(x.dtype)
    ways = [along]
    rows = x.shape[0] if x.dim() else 1
    for bit in range(min((rows - 1).bit_length(), 3) if parts else 0):
        chosen = (torch.arange(rows, device=x.device) >> bit) % 2
        for half in (chosen, 1 - chosen):
            ways.append(along * half.view(-1, *[1] * (x.dim() - 1)).to(x.dtype))
    return [meant_part(op, argument, x, way) for way in ways if bool(way.any())]


def structured(op: Op, argument: str, tensor: Tensor) -> Tensor:
    """The part of a direction, or of a gradient, that has the structure which the operation takes for granted."""
    structure = STRUCTURE.get((op.label, argument))
    if structure == "symmetric" or (structure == "hermitian" and op.attributes.get("hermitian")):
        return (tensor + tensor.mT.conj()) / 2
    if structure == "triangular":
        part = tensor.triu() if op.attributes.get("upper") else tensor.tril()
        if tensor.is_complex() and op.label.startswith("cholesky"):  # LAPACK takes a real diagonal
            part.diagonal(dim1=-2, dim2=-1).imag.zero_()
        return part
    return tensor


def taken(op: Op, argument: str, x: Tensor) -> Tensor:
    """An argument as the operation takes it: its gradient is that of the operation of this, whatever else it holds."""
    return x.log_softmax(-1) if STRUCTURE[op.label, argument] == "normalized" else structured(op, argument, x)


def without_padding(op: Op, argument: str, direction: Tensor) -> Tensor:
    """An embedding reads the row of its padding, but by definition passes no gradient to it."""
    padding = op.attributes.get("padding_idx", -1)
    if op.label in ("embedding", "_embedding_bag") and argument.startswith("weight") and padding >= 0:
        direction[padding] = 0
    return direction


def numbers(ways: list[Tensor], numeric: Callable[[Tensor], Derivative]) -> list[tuple[Tensor, Derivative]]:
    """Directions and the derivative along each, without those along which the operation takes no input."""
    found = []
    for way in ways:
        with suppress(RuntimeError):
            found.append((way, numeric(way)))
    return found
