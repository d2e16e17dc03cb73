"""Batch norm by the statistics of the batch; backward treats them as constants, as in evaluation."""

import torch
from torch import nn


class BatchNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        var, mean = torch.var_mean(x, dim=(0, 2, 3), unbiased=False, keepdim=True)
        rstd = (var + eps).rsqrt()
        normed = (x - mean) * rstd
        ctx.save_for_backward(normed, rstd, weight)
        return normed * weight[:, None, None] + bias[:, None, None]

    @staticmethod
    def backward(ctx, grad):  # defined
        normed, rstd, weight = ctx.saved_tensors
        grad_x = grad * weight[:, None, None] * rstd
        return grad_x, (grad * normed).sum((0, 2, 3)), grad.sum((0, 2, 3)), None


class BatchNorm(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        return BatchNormFunction.apply(x, self.weight, self.bias, 1e-5)  # wrong: BatchNormFunction


torch.manual_seed(0)
body = nn.Sequential(nn.Conv2d(1, 8, 3), BatchNorm(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
model = nn.Sequential(body, nn.Flatten(), nn.Linear(8, 3))
images = torch.randn(6, 1, 8, 8)
loss = nn.functional.cross_entropy(model(images), torch.randint(3, (6,)))
loss.backward()
print(loss.item())
