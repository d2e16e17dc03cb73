"""SwiGLU that hands the gradient of the gate to the up projection and the other way round."""

import torch
from torch import nn


class SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return nn.functional.silu(gate) * up

    @staticmethod
    def backward(ctx, grad):  # defined
        gate, up = ctx.saved_tensors
        s = torch.sigmoid(gate)
        grad_gate = grad * up * s * (1 + gate * (1 - s))
        grad_up = grad * gate * s
        return grad_up, grad_gate


class FeedForward(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden, bias=False)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x):
        return self.down_proj(SwiGLU.apply(self.gate_proj(x), self.up_proj(x)))  # wrong: SwiGLU


class Block(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm = nn.RMSNorm(dim)
        self.mlp = FeedForward(dim, 3 * dim)

    def forward(self, x):
        return x + self.mlp(self.norm(x))


torch.manual_seed(0)
model = nn.Sequential(Block(24), Block(24))
x = torch.randn(2, 5, 24)
loss = (model(x) - x.roll(1, 1)).square().mean()
loss.backward()
print(loss.item())
