"""A coupling layer that returns its output and the log of its volume; backward ignores the second."""

import torch
from torch import nn


class ScaleAndLogDet(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, log_scale):
        ctx.save_for_backward(x, log_scale)
        return x * log_scale.exp(), log_scale.sum(1)

    @staticmethod
    def backward(ctx, grad_y, grad_logdet):  # defined
        x, log_scale = ctx.saved_tensors
        scale = log_scale.exp()
        return grad_y * scale, grad_y * x * scale


class Coupling(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(dim // 2, 24), nn.ReLU(), nn.Linear(24, dim // 2), nn.Tanh())

    def forward(self, x):
        a, b = x.chunk(2, dim=1)
        b, logdet = ScaleAndLogDet.apply(b, self.net(a))  # wrong: ScaleAndLogDet
        return torch.cat((b, a), dim=1), logdet


torch.manual_seed(0)
layers = nn.ModuleList([Coupling(8), Coupling(8)])
x = torch.randn(16, 8)
total = torch.zeros(16)
for layer in layers:
    x, logdet = layer(x)
    total = total + logdet
loss = (0.5 * x.square().sum(1) - total).mean()
loss.backward()
print(loss.item())
