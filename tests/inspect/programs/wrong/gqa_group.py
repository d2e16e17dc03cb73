"""Grouped-query attention; keys and values get the gradient of the first query head of their group only."""

import torch
from torch import nn


class GroupedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v):
        group = q.shape[1] // k.shape[1]
        k_all, v_all = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        p = torch.softmax(q @ k_all.mT * q.shape[-1] ** -0.5, dim=-1)
        ctx.save_for_backward(q, k_all, v_all, p)
        ctx.group = group
        return p @ v_all

    @staticmethod
    def backward(ctx, grad):  # defined
        q, k, v, p = ctx.saved_tensors
        grad_p = grad @ v.mT
        grad_s = p * (grad_p - (grad_p * p).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
        grad_k, grad_v = grad_s.mT @ q, p.mT @ grad
        return grad_s @ k, grad_k[:, :: ctx.group], grad_v[:, :: ctx.group]


class Attention(nn.Module):
    def __init__(self, dim, heads, kv_heads):
        super().__init__()
        self.head_dim = dim // heads
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(dim, kv_heads * self.head_dim, bias=False)

    def forward(self, x):
        split = (-1, self.head_dim)
        q = self.q_proj(x).unflatten(-1, split).transpose(1, 2)
        k = self.k_proj(x).unflatten(-1, split).transpose(1, 2)
        v = self.v_proj(x).unflatten(-1, split).transpose(1, 2)
        out = GroupedAttention.apply(q, k, v)  # wrong: GroupedAttention
        return out.transpose(1, 2).flatten(2)


torch.manual_seed(0)
model = Attention(dim=32, heads=8, kv_heads=2)
x = torch.randn(2, 7, 32)
loss = (model(x) - x).square().mean()
loss.backward()
print(loss.item(), model.k_proj.weight.grad.norm().item())
