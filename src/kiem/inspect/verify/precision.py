"""How coarsely an operation computes, where its data types do not say so."""

from __future__ import annotations

import torch

UNITS = {"tf32": 2.0**-10, "bf16": 2.0**-8}  # of the factors of products in float32, by torch's setting
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "linear", "addmv", "mv", "_addmm_activation", "mkldnn_linear"}
CONVOLUTIONS = {"convolution", "_convolution", "cudnn_convolution", "mkldnn_convolution", "cudnn_convolution_transpose"}
RECURRENT = {"_cudnn_rnn", "mkldnn_rnn_layer"}


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
