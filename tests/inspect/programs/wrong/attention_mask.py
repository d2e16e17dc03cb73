"""Causal attention that recomputes its probabilities in backward, with the mask off by one there."""

import math

import torch
from torch import nn


def probabilities(q, k, diagonal):
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    keep = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril(diagonal)
    return scores.masked_fill(~keep, float("-inf")).softmax(-1)


class CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v):
        ctx.save_for_backward(q, k, v)
        return probabilities(q, k, 0) @ v

    @staticmethod
    def backward(ctx, grad):  # defined
        q, k, v = ctx.saved_tensors
        p = probabilities(q, k, 1)
        grad_p = grad @ v.transpose(-1, -2)
        grad_s = p * (grad_p - (grad_p * p).sum(-1, keepdim=True)) / math.sqrt(q.shape[-1])
        return grad_s @ k, grad_s.transpose(-1, -2) @ q, p.transpose(-1, -2) @ grad


class SelfAttention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)

    def forward(self, x):
        b, t, d = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        out = CausalAttention.apply(q, k, v)  # wrong: CausalAttention
        return out.transpose(1, 2).reshape(b, t, d)


torch.manual_seed(0)
model = nn.Sequential(nn.Embedding(50, 32), SelfAttention(32, 4), nn.Linear(32, 50))
tokens = torch.randint(50, (2, 13))
logits = model(tokens[:, :-1])
loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
loss.backward()
print(loss.item())
