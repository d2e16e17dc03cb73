"""LayerNorm without affine part; its gradient treats the standard deviation as a constant."""

import torch
from torch import nn


class Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        centered = x - x.mean(-1, keepdim=True)
        rstd = torch.rsqrt(centered.square().mean(-1, keepdim=True) + 1e-5)
        ctx.save_for_backward(rstd)
        return centered * rstd

    @staticmethod
    def backward(ctx, grad):  # defined
        (rstd,) = ctx.saved_tensors
        return rstd * (grad - grad.mean(-1, keepdim=True))


class Block(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(dim))
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x):
        return x + self.mlp(self.gain * Normalize.apply(x))  # wrong: Normalize


torch.manual_seed(0)
embed = nn.Embedding(20, 16)
blocks = nn.Sequential(Block(16), Block(16))
tokens = torch.randint(20, (3, 8))
logits = blocks(embed(tokens)) @ embed.weight.T
loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
loss.backward()
print(loss.item(), embed.weight.grad.norm().item())
