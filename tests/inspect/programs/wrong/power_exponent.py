"""Generalized-mean pooling with a learned exponent, whose gradient lacks the logarithm."""

import torch
from torch import nn


class Power(torch.autograd.Function):
    @staticmethod
    def forward(x, exponent):
        return x**exponent

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs, output)

    @staticmethod
    def backward(ctx, grad):  # defined
        x, exponent, y = ctx.saved_tensors
        return grad * exponent * x ** (exponent - 1), (grad * y).sum()


class GeMPool(nn.Module):
    def __init__(self):
        super().__init__()
        self.p = nn.Parameter(torch.tensor(3.0))

    def forward(self, x):
        return Power.apply(x.clamp_min(1e-3), self.p).mean((2, 3)) ** (1 / self.p)  # wrong: Power


torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(1, 5, 3), nn.Softplus(), GeMPool(), nn.Linear(5, 2))
images = torch.rand(6, 1, 7, 7)
loss = nn.functional.cross_entropy(model(images), torch.tensor([0, 1, 0, 1, 1, 0]))
loss.backward()
print(loss.item(), model[2].p.grad.item())
