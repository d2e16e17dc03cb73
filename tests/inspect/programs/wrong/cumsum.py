"""A cumulative sum whose backward runs in the same direction."""

import torch
from torch import nn


class CumSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.cumsum(1)

    @staticmethod
    def backward(ctx, grad):  # defined
        return grad.cumsum(1)


torch.manual_seed(0)
hazard = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 12), nn.Softplus())
x = torch.randn(8, 4)
survival = torch.exp(-CumSum.apply(0.1 * hazard(x)))  # wrong: CumSum
target = torch.linspace(1, 0, 12).expand(8, 12)
loss = (survival - target).square().mean()
loss.backward()
print(loss.item())
