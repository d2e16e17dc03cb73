"""Softmax in a block of a block; its gradient lacks the sum over the row."""

import torch
from torch import nn


class Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores):
        probs = torch.softmax(scores, dim=-1)
        ctx.save_for_backward(probs)
        return probs

    @staticmethod
    def backward(ctx, grad):  # defined
        (probs,) = ctx.saved_tensors
        return grad * probs


class Attention(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        probs = Softmax.apply(q @ k.transpose(1, 2) / q.shape[-1] ** 0.5)  # wrong: Softmax
        return self.out(probs @ v)


class Block(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.attention = Attention(dim)

    def forward(self, x):
        return x + self.attention(self.norm(x))


class Encoder(nn.Module):
    def __init__(self, dim, classes):
        super().__init__()
        self.block = Block(dim)
        self.head = nn.Linear(dim, classes)

    def forward(self, x):
        return self.head(self.block(x).mean(1))


torch.manual_seed(0)
model = Encoder(dim=32, classes=5)
x = torch.randn(4, 10, 32)
loss = nn.functional.cross_entropy(model(x), torch.randint(5, (4,)))
loss.backward()
print(loss.item())
