"""A linear layer with as many rows as features; the bias sums its gradient over the wrong one."""

import torch
from torch import nn


class LinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return x @ weight.t() + bias

    @staticmethod
    def backward(ctx, grad):  # defined
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.t() @ x, grad.sum(1)


class Linear(nn.Linear):
    def forward(self, x):
        return LinearFunction.apply(x, self.weight, self.bias)  # wrong: LinearFunction


torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), Linear(32, 16), nn.ReLU(), nn.Linear(16, 1))
x = torch.randn(16, 8)
loss = model(x).square().mean()
loss.backward()
print(loss.item(), model[2].bias.grad.norm().item())
