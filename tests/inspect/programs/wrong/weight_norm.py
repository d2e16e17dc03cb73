"""A weight-normalized linear layer whose gradient to the direction is not projected."""

import torch
from torch import nn


class WeightNormLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, direction, gain):
        length = direction.norm(dim=1, keepdim=True)
        unit = direction / length
        ctx.save_for_backward(x, unit, length, gain)
        return x @ (gain[:, None] * unit).T

    @staticmethod
    def backward(ctx, grad):  # defined
        x, unit, length, gain = ctx.saved_tensors
        grad_weight = grad.T @ x
        grad_gain = (grad_weight * unit).sum(1)
        return grad @ (gain[:, None] * unit), gain[:, None] / length * grad_weight, grad_gain


class Linear(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.direction = nn.Parameter(torch.randn(outputs, inputs))
        self.gain = nn.Parameter(torch.ones(outputs))

    def forward(self, x):
        return WeightNormLinear.apply(x, self.direction, self.gain)  # wrong: WeightNormLinear


torch.manual_seed(0)
model = nn.Sequential(Linear(8, 16), nn.Tanh(), Linear(16, 4))
x = torch.randn(12, 8)
loss = model(x).square().mean()
loss.backward()
print(loss.item())
