"""Rotary position embedding in the half-split convention (as Llama and Qwen checkpoints use it).

Shapes: B batch, T time, H heads, K head size.
"""

import torch
from torch import Tensor


def rotate_plain(x_BTHK: Tensor, cos_BT1K: Tensor, sin_BT1K: Tensor) -> Tensor:
    """The definition: the pair (x[i], x[i + K/2]) is turned by its angle."""
    a, b = x_BTHK.chunk(2, dim=-1)
    return torch.cat((a * cos_BT1K - b * sin_BT1K, b * cos_BT1K + a * sin_BT1K), dim=-1)


rotate = rotate_plain
