"""A layer used at every step keeps one buffer for backward, which the next step overwrites."""

import torch
from torch import nn


class Tanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, buffer):
        torch.tanh(x, out=buffer)
        ctx.buffer = buffer
        return buffer.clone()

    @staticmethod
    def backward(ctx, grad):  # defined
        return grad * (1 - ctx.buffer**2), None


class Recurrent(nn.Module):
    def __init__(self, inputs, hidden):
        super().__init__()
        self.cell = nn.Linear(inputs + hidden, hidden)
        self.hidden = hidden

    def forward(self, x):
        h = x.new_zeros(x.shape[0], self.hidden)
        buffer = torch.empty_like(h)
        for step in range(x.shape[1]):
            h = Tanh.apply(self.cell(torch.cat((x[:, step], h), dim=1)), buffer)  # wrong: Tanh
        return h


torch.manual_seed(0)
model = Recurrent(inputs=6, hidden=12)
x = torch.randn(5, 4, 6)
loss = model(x).sum(1).square().mean()
loss.backward()
print(loss.item())
