"""Activation checkpointing, of both kinds, with dropout inside."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class Block(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Dropout(0.1), nn.Linear(4 * dim, dim))

    def forward(self, x):
        return x + self.mlp(self.norm(x))


class Model(nn.Module):
    def __init__(self, dim=16):
        super().__init__()
        self.enter = nn.Linear(6, dim)
        self.blocks = nn.ModuleList(Block(dim) for _ in range(4))
        self.leave = nn.Linear(dim, 2)

    def forward(self, x):
        x = self.enter(x)
        for i, block in enumerate(self.blocks):
            x = checkpoint(block, x, use_reentrant=i % 2 == 0)
        return self.leave(x)


torch.manual_seed(0)
model = Model()
x = torch.randn(12, 6)
loss = nn.functional.cross_entropy(model(x), torch.randint(2, (12,)))
loss.backward()
print(loss.item())
