"""How coarsely an operation computes, where its data types do not say so."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

UNITS = {"tf32": 2.0**-10, "bf16": 2.0**-8}  # of the factors of products in float32, by torch's setting
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "linear", "addmv", "mv", "_addmm_activation", "mkldnn_linear"}
CONVOLUTIONS = {"convolution", "_convolution", "cudnn_convolution", "mkldnn_convolution", "cudnn_convolution_transpose"}
RECURRENT = {"_cudnn_rnn", "mkldnn_rnn_layer"}
# Of which torch's backward in float64 has a constant rounded to float32 (1/6; 1e-12).
FLOAT32_CONSTANTS = {"hardsigmoid", "binary_cross_entropy"}
# These place what they read by positions that they compute in the type itself (float32 for coarser ones).
POSITIONS = ("upsample", "_upsample", "grid_sampler")


# On an accelerator these sum in the type itself, one element after the other.
ATOMIC = {"index_add", "scatter_add", "index_put", "gather", "index_select", "index"}


def unit_of(label: str, dtypes: set[torch.dtype], device: str) -> float:
    """How coarsely an operation on such types computes beyond what they say; 0: not at all."""
    if torch.float64 in dtypes and label.rstrip("_") in FLOAT32_CONSTANTS:
        return 2.0**-24
    return unit_of_products(label, device) if torch.float32 in dtypes else 0.0


def roundings_of_positions(label: str, sizes: tuple[int, ...]) -> float:
    """Of an operation that reads between the elements of a tensor of these sizes: a position is rounded relative to
    its own size, and that much a weight between neighbors is off."""
    return float(max(sizes, default=0)) if label.startswith(POSITIONS) else 0.0


def roundings(
    label: str, unit: float, inputs: Sequence[torch.Size], outputs: Sequence[torch.Size], of: torch.Tensor
) -> float:
    """How many roundings an element of the gradient of an input may be off by: those of a stable algorithm, and what
    sums of as many terms as the shapes allow round in the type that they are kept in."""
    shapes, numel = [*inputs, *outputs], max(of.numel(), 1)
    if label == "convolution":  # a weight's gradient sums over all places of all examples
        shapes.append(torch.Size((outputs[0].numel() // max(outputs[0][1], 1),)))
    terms = max([1, *(size for shape in shapes for size in shape), *(math.prod(s) // numel for s in shapes)])
    accumulated = min(unit, 2.0**-23) / unit
    if label.rstrip("_") in ATOMIC and of.device.type != "cpu":
        accumulated = 1.0
    return 8 + terms / 4 * accumulated + roundings_of_positions(label, tuple(s for shape in inputs for s in shape[2:]))


def unit_of_products(label: str, device: str) -> float:
    """Of an operation on float32 tensors: the unit in which its factors are rounded if torch may do that (NVIDIA's
    TF32, which convolutions use unless told otherwise, and bfloat16), else 0."""
    kind = "matmul" if label in PRODUCTS else "conv" if label in CONVOLUTIONS else "rnn" if label in RECURRENT else ""
    if not kind or device not in ("cuda", "cpu"):
        return 0.0
    backends = torch.backends
    if device == "cpu":
        setting = getattr(backends.mkldnn, kind, None)
    else:
        setting = backends.cuda.matmul if kind == "matmul" else getattr(backends.cudnn, kind, None)
    return UNITS.get(getattr(setting, "fp32_precision", ""), 0.0)
