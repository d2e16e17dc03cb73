"""A permutation of channels; backward applies it again where the inverse is due."""

import torch
from torch import nn


class Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, order):
        ctx.save_for_backward(order)
        return x[:, order]

    @staticmethod
    def backward(ctx, grad):  # defined
        (order,) = ctx.saved_tensors
        return grad[:, order], None


class Coupling(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(dim // 2, 16), nn.Tanh(), nn.Linear(16, dim // 2))
        self.register_buffer("order", torch.randperm(dim))

    def forward(self, x):
        a, b = Permute.apply(x, self.order).chunk(2, dim=1)  # wrong: Permute
        return torch.cat((a, b + self.net(a)), dim=1)


torch.manual_seed(0)
flow = nn.Sequential(Coupling(10), Coupling(10), Coupling(10))
x = torch.randn(16, 10)
loss = 0.5 * (flow(x) - torch.arange(10)).square().sum(1).mean()
loss.backward()
print(loss.item())
