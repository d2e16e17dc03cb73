"""Attention whose backward forgets 1/sqrt(head size) on the way to queries and keys."""

import torch
from torch import nn


class Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v):
        p = torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, dim=-1)
        ctx.save_for_backward(q, k, v, p)
        return p @ v

    @staticmethod
    def backward(ctx, grad):  # defined
        q, k, v, p = ctx.saved_tensors
        grad_p = grad @ v.mT
        grad_s = p * (grad_p - (grad_p * p).sum(-1, keepdim=True))
        return grad_s @ k, grad_s.mT @ q, p.mT @ grad


class Layer(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(dim, dim) for _ in range(3))

    def split(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x):
        q, k, v = self.split(self.query(x)), self.split(self.key(x)), self.split(self.value(x))
        y = Attention.apply(q, k, v)  # wrong: Attention
        return x + y.transpose(1, 2).flatten(2)


torch.manual_seed(1)
layer = Layer(dim=32, heads=2)
x = torch.randn(3, 9, 32)
target = torch.randn(3, 9, 32)
loss = ((layer(x) - target) ** 2).mean()
loss.backward()
print(loss.item(), layer.query.weight.grad.norm().item())
