"""Rotary positions; backward turns the same way as forward."""

import torch
from torch import nn


def rotate(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return rotate(x, cos, sin)

    @staticmethod
    def backward(ctx, grad):  # defined
        cos, sin = ctx.saved_tensors
        return rotate(grad, cos, sin), None, None


class Attention(nn.Module):
    def __init__(self, dim, length):
        super().__init__()
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim, bias=False)
        angle = torch.arange(length)[:, None] * 10000.0 ** (-torch.arange(0, dim, 2) / dim)
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())

    def forward(self, x):
        q = Rotary.apply(self.q_proj(x), self.cos, self.sin)  # wrong: Rotary
        k = Rotary.apply(self.k_proj(x), self.cos, self.sin)  # wrong: Rotary
        return nn.functional.scaled_dot_product_attention(q, k, self.v_proj(x), is_causal=True)


torch.manual_seed(0)
model = Attention(dim=16, length=12)
x = torch.randn(2, 12, 16)
loss = model(x).square().mean()
loss.backward()
print(loss.item(), model.q_proj.weight.grad.norm().item())
