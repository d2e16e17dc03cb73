"""The bias of a linear layer gets the mean over the batch where the sum is due."""

import torch
from torch import nn


class LinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(x, weight, bias):
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, _ = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx, grad):  # defined
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        return grad @ weight, rows.T @ x.reshape(-1, x.shape[-1]), rows.mean(0)


class Linear(nn.Linear):
    def forward(self, x):
        return LinearFunction.apply(x, self.weight, self.bias)  # wrong: LinearFunction


torch.manual_seed(0)
model = nn.Sequential(Linear(10, 24), nn.Tanh(), nn.Linear(24, 2))
x = torch.randn(3, 7, 10)
loss = model(x).logsumexp(-1).mean()
loss.backward()
print(loss.item())
