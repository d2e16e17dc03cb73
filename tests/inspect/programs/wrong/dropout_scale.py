"""Dropout that scales by 1/(1-p) in forward only."""

import torch
from torch import nn


class DropoutFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, p):
        keep = torch.rand(x.shape, device=x.device) >= p
        ctx.save_for_backward(keep)
        return x * keep / (1 - p)

    @staticmethod
    def backward(ctx, grad):  # defined
        (keep,) = ctx.saved_tensors
        return grad * keep, None


class Dropout(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        return DropoutFunction.apply(x, self.p) if self.training else x  # wrong: DropoutFunction


torch.manual_seed(0)
model = nn.Sequential(nn.Linear(10, 40), nn.ReLU(), Dropout(0.3), nn.Linear(40, 1))
x = torch.randn(16, 10)
loss = nn.functional.mse_loss(model(x), x.sum(1, keepdim=True))
loss.backward()
print(loss.item())
