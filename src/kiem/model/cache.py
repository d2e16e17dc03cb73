"""Keys and values of the past, so that generation computes each token once.

Shapes: L layers, B batch, H key-value heads, S slots, K head size.
"""

import torch
from torch import Tensor

from kiem.config.model import ModelConfig


class Cache:
    """Room for `length` positions of `batch` sequences; all rows advance together.

    `valid_BS` says which slots hold a token of the row (rows padded on the left begin later); attention sees only
    those.
    """

    def __init__(self, config: ModelConfig, batch: int, length: int, device=None, dtype=torch.float32):
        shape = (config.n_layers, 2, batch, config.n_kv_heads, length, config.head_dim)
        self.kv_L2BHSK = torch.zeros(shape, device=device, dtype=dtype)
        self.valid_BS = torch.zeros(batch, length, dtype=torch.bool, device=device)
        self.length = 0

    def advance(self, valid_BT: Tensor) -> None:
        """Take in T further slots. Called once a forward pass, before the layers."""
        stop = self.length + valid_BT.shape[1]
        if stop > self.valid_BS.shape[1]:
            raise ValueError(f"the cache has {self.valid_BS.shape[1]} slots and {stop} are needed")
        self.valid_BS[:, self.length : stop] = valid_BT
        self.length = stop

    def extend(self, layer: int, k_BHTK: Tensor, v_BHTK: Tensor) -> tuple[Tensor, Tensor]:
        """Store the newest keys and values of one layer; return all of them so far, (B, H, length, K) each."""
        start = self.length - k_BHTK.shape[2]
        kv_2BHSK = self.kv_L2BHSK[layer]
        kv_2BHSK[0, :, :, start : self.length] = k_BHTK
        kv_2BHSK[1, :, :, start : self.length] = v_BHTK
        return kv_2BHSK[0, :, :, : self.length], kv_2BHSK[1, :, :, : self.length]

    def keep(self, rows: Tensor) -> None:
        """Keep only these rows (of the sequences that are not finished)."""
        self.kv_L2BHSK = self.kv_L2BHSK[:, :, rows]
        self.valid_BS = self.valid_BS[rows]
