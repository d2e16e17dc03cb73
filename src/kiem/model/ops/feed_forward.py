"""The end of a feed-forward, down(activation(...)), that keeps less for backward.

Shapes: N positions, F hidden, D embedding.

Autograd keeps the input of every operation: for SwiGLU silu's input, silu's output, the up projection, and their
product, 4 tensors of (N, F), by far the largest of a block. All follow from gate and up at the price of one pass over
memory, so only those two (for GELU one of two) are kept, and the rest is made again in backward.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def gelu_linear_plain(h_NF: Tensor, weight_DF: Tensor, bias_D: Tensor | None, approximate: str) -> Tensor:
    """The reference: gelu(h) @ weight.T + bias, all in one data type."""
    return F.linear(F.gelu(h_NF, approximate=approximate), weight_DF, bias_D)


def swiglu_linear_plain(gate_NF: Tensor, up_NF: Tensor, weight_DF: Tensor, bias_D: Tensor | None) -> Tensor:
    """The reference: (silu(gate) * up) @ weight.T + bias, all in one data type."""
    return F.linear(F.silu(gate_NF) * up_NF, weight_DF, bias_D)


def gelu_linear(h_NF: Tensor, weight_DF: Tensor, bias_D: Tensor | None, approximate: str) -> Tensor:
    """gelu_linear_plain that keeps h and not gelu(h), in the data type of h. approximate: 'tanh' or 'none'.

    Any number of leading axes; weight and bias in any float type."""
    return _GeluLinear.apply(h_NF, *_cast(h_NF.dtype, weight_DF, bias_D), approximate)


def swiglu_linear(gate_NF: Tensor, up_NF: Tensor, weight_DF: Tensor, bias_D: Tensor | None) -> Tensor:
    """swiglu_linear_plain that keeps gate and up and nothing else, in their data type. Any number of leading axes;
    weight and bias in any float type."""
    return _SwigluLinear.apply(gate_NF, up_NF, *_cast(up_NF.dtype, weight_DF, bias_D))


def _cast(dtype: torch.dtype, weight_DF: Tensor, bias_D: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return weight_DF.to(dtype), None if bias_D is None else bias_D.to(dtype)


def _linear_backward(ctx, grad_ND: Tensor, a_NF: Tensor) -> tuple[Tensor, Tensor | None]:
    """Gradients of weight and bias; `a` is what the weight multiplied."""
    flat_ND, flat_NF = grad_ND.flatten(0, -2), a_NF.flatten(0, -2)
    return flat_ND.T @ flat_NF, flat_ND.sum(0) if ctx.has_bias else None


class _GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h_NF, weight_DF, bias_D, approximate):
        ctx.save_for_backward(h_NF, weight_DF)
        ctx.has_bias, ctx.approximate = bias_D is not None, approximate
        return gelu_linear_plain(h_NF, weight_DF, bias_D, approximate)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_ND):
        h_NF, weight_DF = ctx.saved_tensors
        grad_w, grad_b = _linear_backward(ctx, grad_ND, F.gelu(h_NF, approximate=ctx.approximate))
        grad_h = torch.ops.aten.gelu_backward(grad_ND @ weight_DF, h_NF, approximate=ctx.approximate)
        return grad_h, grad_w, grad_b, None


class _SwigluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_NF, up_NF, weight_DF, bias_D):
        ctx.save_for_backward(gate_NF, up_NF, weight_DF)
        ctx.has_bias = bias_D is not None
        return F.linear(F.silu(gate_NF).mul_(up_NF), weight_DF, bias_D)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_ND):
        gate_NF, up_NF, weight_DF = ctx.saved_tensors
        silu_NF = F.silu(gate_NF)
        grad_NF = grad_ND @ weight_DF
        grad_w, grad_b = _linear_backward(ctx, grad_ND, silu_NF * up_NF)
        grad_up = silu_NF.mul_(grad_NF)
        grad_gate = torch.ops.aten.silu_backward(grad_NF.mul_(up_NF), gate_NF)
        return grad_gate, grad_up, grad_w, grad_b
