"""A large weight decay term; one element of 40,000, the one at the edge of two tiles, gets its gradient twice."""

import torch
from torch import nn


class TiledSquare(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return 0.5 * x * x

    @staticmethod
    def backward(ctx, grad):  # defined
        (x,) = ctx.saved_tensors
        flat, g = x.reshape(-1), grad.reshape(-1)
        out = torch.zeros_like(flat)
        tile = (len(flat) + 1) // 2
        out[:tile] += g[:tile] * flat[:tile]
        out[tile - 1 :] += g[tile - 1 :] * flat[tile - 1 :]
        return out.view_as(x)


torch.manual_seed(0)
layer = nn.Linear(200, 200)
x = torch.randn(8, 200)
penalty = TiledSquare.apply(layer.weight).sum()  # wrong: TiledSquare
loss = layer(x).square().mean() + 0.1 * penalty
loss.backward()
print(loss.item(), layer.weight.grad.norm().item())
