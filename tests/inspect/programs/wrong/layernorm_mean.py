"""LayerNorm whose gradient lacks the term of the mean."""

import torch
from torch import nn


class LayerNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        mean = x.mean(-1, keepdim=True)
        rstd = (x.var(-1, unbiased=False, keepdim=True) + eps).rsqrt()
        normed = (x - mean) * rstd
        ctx.save_for_backward(normed, rstd, weight)
        return normed * weight + bias

    @staticmethod
    def backward(ctx, grad):  # defined
        normed, rstd, weight = ctx.saved_tensors
        g = grad * weight
        grad_x = rstd * (g - normed * (g * normed).mean(-1, keepdim=True))
        return grad_x, (grad * normed).sum((0, 1)), grad.sum((0, 1)), None


class LayerNorm(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x):
        return LayerNormFunction.apply(x, self.weight, self.bias, 1e-5)  # wrong: LayerNormFunction


torch.manual_seed(0)
model = nn.Sequential(nn.Linear(12, 24), LayerNorm(24), nn.GELU(), nn.Linear(24, 3))
x = torch.randn(4, 6, 12)
loss = model(x).pow(2).sum()
loss.backward()
print(loss.item())
