"""A gate in an LSTM-like cell; its sigmoid has a gradient of the wrong sign."""

import torch
from torch import nn


class Sigmoid(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        y = 1 / (1 + torch.exp(-x))
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, grad):  # defined
        (y,) = ctx.saved_tensors
        return grad * y * (y - 1)


class Cell(nn.Module):
    def __init__(self, inputs, hidden):
        super().__init__()
        self.gate = nn.Linear(inputs + hidden, hidden)
        self.candidate = nn.Linear(inputs + hidden, hidden)

    def forward(self, x, h):
        joined = torch.cat((x, h), dim=-1)
        z = Sigmoid.apply(self.gate(joined))  # wrong: Sigmoid
        return (1 - z) * h + z * torch.tanh(self.candidate(joined))


torch.manual_seed(0)
cell = Cell(4, 10)
sequence = torch.randn(5, 6, 4)
h = torch.zeros(6, 10)
for x in sequence:
    h = cell(x, h)
loss = h.square().sum(1).mean()
loss.backward()
print(loss.item())
