"""RMSNorm without the second term of its gradient."""

import torch
from torch import nn


class RMSNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        rrms = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, rrms)
        return x * rrms * weight

    @staticmethod
    def backward(ctx, grad):  # defined
        x, weight, rrms = ctx.saved_tensors
        grad_weight = (grad * x * rrms).flatten(0, -2).sum(0)
        return grad * weight * rrms, grad_weight, None


class RMSNorm(nn.Module):
    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        return RMSNormFunction.apply(x, self.weight, self.eps)  # wrong: RMSNormFunction


torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 32), RMSNorm(32), nn.Linear(32, 8))
x = torch.randn(2, 7, 8)
loss = nn.functional.mse_loss(model(x), x)
loss.backward()
print(loss.item())
