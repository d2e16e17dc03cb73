"""Statistics of tensors: what the graph keeps of those that are too large to keep."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from kiem.inspect.graph.layouts import (
    outside_transforms,
    readable,
    regular,
    shape_of,
    sums_modulo,
    unwrapped,
    written_out,
)
from kiem.inspect.graph.model import Gradient, Stats

SMALL = 64  # a tensor of at most so many elements is kept whole, of a larger one only its statistics
UNKNOWN = Stats(math.nan, math.nan, math.nan, math.nan, 0)  # of a tensor that cannot be looked at


def gradient(tensor: torch.Tensor) -> Gradient:
    """The record of a gradient. Those that vmap computes for a whole batch are one, with the batch's dimension."""
    with outside_transforms():
        tensor = unwrapped(tensor)
        return Gradient(shape_of(tensor), tensor.dtype, statistics(tensor), sketch(tensor), small_data(tensor))


def sketch(tensor: torch.Tensor) -> torch.Tensor:
    """float64 (at most 64,): a linear digest, see `Gradient`."""
    if not regular(tensor) and not tensor.is_nested and tensor.numel() > SMALL and not tensor.is_complex():
        return sums_modulo(tensor, SMALL).cpu()
    values = readable(tensor)
    if values is None:
        return torch.zeros(0, dtype=torch.float64)
    if not regular(tensor) and not tensor.is_nested:
        values = written_out(tensor.detach())
    if values.is_complex():
        values = torch.view_as_real(values.resolve_conj())
    if values.numel() <= SMALL:
        return values.reshape(-1).double().cpu()
    kind = torch.float32 if values.dtype.itemsize < 4 else None
    if values.dim() > 1 and values.shape[-1] >= SMALL:  # rows first, whatever the strides: no copy
        flat = values.sum(tuple(range(values.dim() - 1)), dtype=kind)
    else:
        flat = values.reshape(-1)
    whole = flat.numel() // SMALL * SMALL
    digest = flat[:whole].view(-1, SMALL).sum(0, dtype=kind).double()
    digest[: flat.numel() - whole] += flat[whole:].double()
    return digest.cpu()


def small_data(tensor: torch.Tensor) -> Any:
    """Nested lists of the elements when they are few."""
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return None
    values = None if is_lazy(tensor) or tensor.is_nested or tensor.numel() > SMALL else readable(tensor)
    if values is not None and not regular(tensor):
        values = written_out(tensor.detach())
    with contextlib.suppress(RuntimeError):
        return None if values is None else values.cpu().tolist()
    return None


def statistics(tensor: torch.Tensor) -> Stats:
    """Statistics of any tensor with a number type; zeros for an empty one, UNKNOWN of one that cannot be looked at."""
    with outside_transforms():
        values = readable(unwrapped(tensor))
        if values is None:
            return UNKNOWN
        try:
            return Stats(0.0, 0.0, 0.0, 0.0, 0) if values.numel() == 0 else _statistics(values)
        except RuntimeError:  # a type or a device for which torch has no such sums
            return UNKNOWN


def _statistics(values: torch.Tensor) -> Stats:
    if values.is_complex():
        values = torch.view_as_real(values.resolve_conj())
    if not values.is_contiguous() and _dense(values):
        values = values.as_strided((values.numel(),), (1,))  # the order does not matter, its memory does
    if not values.is_floating_point() or values.dtype.itemsize < 4:
        values = values.float() if values.dtype.itemsize < 8 else values.double()
    low, high, norm, mean = _numbers(*torch.aminmax(values), _norm(values), values.mean())
    if norm - norm == 0.0 and high - low == high - low:
        return Stats(norm, mean, low, high, 0)
    finite = values[torch.isfinite(values)]
    bad = values.numel() - finite.numel()
    if finite.numel() == 0:
        return Stats(0.0, 0.0, 0.0, 0.0, bad)
    norm = torch.linalg.vector_norm(finite.double()).item()
    return Stats(norm, finite.mean().item(), finite.min().item(), finite.max().item(), bad)


def _numbers(*scalars: torch.Tensor) -> list[float]:
    """Their values; of those on an accelerator with one wait for it."""
    if scalars[0].device.type == "cpu":
        return [scalar.item() for scalar in scalars]
    return torch.stack([scalar.double() for scalar in scalars]).tolist()


def _norm(values: torch.Tensor) -> torch.Tensor:
    """Euclidean; of a large tensor by parts, as torch's sum of squares in float32 is off by 0.2 % at 40M elements."""
    if values.numel() < 1 << 16 or not values.is_contiguous():
        return torch.linalg.vector_norm(values, dtype=torch.float64)
    flat, part = values.reshape(-1), 4096
    whole = flat.numel() // part * part
    parts = torch.linalg.vector_norm(flat[:whole].view(-1, part), dim=1).double()
    rest = torch.linalg.vector_norm(flat[whole:].double())
    return torch.hypot(torch.linalg.vector_norm(parts), rest)


def _dense(tensor: torch.Tensor) -> bool:
    """Whether the elements fill their memory without gaps and overlaps, in whatever order."""
    expected = 1
    for stride, size in sorted((st, n) for st, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1):
        if stride != expected:
            return False
        expected *= size
    return True
