"""The parts of a block that mix no positions: linear, norms, feed-forward.

Shapes: B batch, T time, D embedding, F hidden.

Weights are float32 masters. A layer casts its weight to the data type of its input, so that the compute type of the
whole model is decided in one place (transformer.py) and the optimiser always updates float32.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kiem.config.model import ModelConfig
from kiem.model.ops.feed_forward import gelu_linear, swiglu_linear


class Linear(nn.Linear):
    """y = x @ weight.T + bias in the data type of x; weight is (out, in)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, *self.cast(x.dtype))

    def cast(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Weight and bias in a data type."""
        return self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype)


class LayerNorm(nn.Module):
    """Ba et al. 2016, arXiv:1607.06450, over the last axis."""

    def __init__(self, size: int, eps: float, bias: bool = True):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.layer_norm(x, (x.shape[-1],), self.weight.to(x.dtype), bias, self.eps)


class RMSNorm(nn.Module):
    """Zhang and Sennrich 2019, arXiv:1910.07467, over the last axis."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)


def make_norm(config: ModelConfig) -> nn.Module:
    """The norm of the residual stream."""
    if config.norm == "rmsnorm":
        return RMSNorm(config.emb_dim, config.norm_eps)
    return LayerNorm(config.emb_dim, config.norm_eps)


class FeedForward(nn.Module):
    """Position-wise: down(gelu(up(x))), or SwiGLU down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        D, F_, bias = config.emb_dim, config.hidden_dim, config.bias
        self.activation = config.activation
        if config.activation == "swiglu":
            self.gate = Linear(D, F_, bias=bias)
        self.up = Linear(D, F_, bias=bias)
        self.down = Linear(F_, D, bias=bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        weight, bias = self.down.cast(x_BTD.dtype)
        if self.activation == "swiglu":
            return swiglu_linear(self.gate(x_BTD), self.up(x_BTD), weight, bias)
        return gelu_linear(self.up(x_BTD), weight, bias, "tanh" if self.activation == "gelu_tanh" else "none")
