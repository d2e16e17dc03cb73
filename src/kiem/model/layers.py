"""The parts of a block that mix no positions: linear, embedding, norms, feed-forward.

Shapes: B batch, T time, D embedding, F hidden.

Weights are float32 masters. A layer casts its weight to the data type of its input, so that the compute type of the
whole model is decided in one place (transformer.py) and the optimizer always updates float32.

Every layer is called, and none reads another one's weight. Where a layer and what stands before or after it are one
operation that keeps less for backward (model/ops), the operation goes into the call, `layer(x, op=...)`, if the layer
is `fusible`. Anything else is called as layers are called everywhere, so that this works unchanged:

- a replaced layer (LoRA's sum, a quantized layer): it gets x and gives y, in training, evaluation and generation;
- a hook, also those of FSDP2 and tensor parallelism: it sees the layer's true input and output;
- a parametrized weight: `op` gets `layer.weight`, whatever computes it;
- DDP and FSDP2: parameters are used inside their module's call and nowhere else;
- torch.compile: what is fusible does not change from call to call, so there is one graph.
"""

from collections.abc import Callable
from functools import partial
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kiem.config.model import ModelConfig
from kiem.model.ops.feed_forward import gelu_linear, swiglu_linear

Op = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # (x, weight, bias) -> y


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight.T + bias in the data type of x."""
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


class Linear(nn.Linear):
    """y = op(x, weight, bias), by default x @ weight.T + bias in the data type of x; weight is (out, in).

    Another op is one from model/ops that this layer is a part of; it gets the master weight and casts it itself.
    """

    def forward(self, x: Tensor, op: Op = linear) -> Tensor:
        return op(x, self.weight, self.bias)


def fusible(layer: nn.Module) -> TypeGuard[Linear]:
    """Whether a layer may be called with an `op`: it is a Linear of this file that nobody replaced or watches."""
    watched = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    return isinstance(layer, Linear) and type(layer).forward is Linear.forward and not watched


class Embedding(nn.Embedding):
    """A table (entries, D), read by row. Undefined until it is filled: Transformer.initialize."""

    def reset_parameters(self) -> None:
        pass


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
    return LayerNorm(config.emb_dim, config.norm_eps, config.norm_bias)


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
        if self.activation == "swiglu":
            gate_BTF, up_BTF = self.gate(x_BTD), self.up(x_BTD)
            if fusible(self.down):
                return self.down(up_BTF, partial(swiglu_linear, gate_BTF))
            return self.down(F.silu(gate_BTF) * up_BTF)
        up_BTF, approximate = self.up(x_BTD), "tanh" if self.activation == "gelu_tanh" else "none"
        if fusible(self.down):
            return self.down(up_BTF, partial(gelu_linear, approximate=approximate))
        return self.down(F.gelu(up_BTF, approximate=approximate))
