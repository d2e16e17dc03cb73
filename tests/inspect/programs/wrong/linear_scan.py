"""A linear recurrence h[t] = a[t] h[t-1] + b[t]; the gradient of a uses h[t] for h[t-1]."""

import torch
from torch import nn


class Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b):
        h = torch.empty_like(b)
        state = torch.zeros_like(b[:, 0])
        for t in range(b.shape[1]):
            state = a[:, t] * state + b[:, t]
            h[:, t] = state
        ctx.save_for_backward(a, h)
        return h

    @staticmethod
    def backward(ctx, grad):  # defined
        a, h = ctx.saved_tensors
        grad_b = torch.empty_like(grad)
        carry = torch.zeros_like(grad[:, 0])
        for t in reversed(range(grad.shape[1])):
            carry = grad[:, t] + carry
            grad_b[:, t] = carry
            carry = carry * a[:, t]
        return grad_b * h, grad_b


class Recurrence(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.decay = nn.Linear(dim, dim)
        self.input = nn.Linear(dim, dim)

    def forward(self, x):
        a = torch.sigmoid(self.decay(x))
        return Scan.apply(a, (1 - a) * self.input(x))  # wrong: Scan


torch.manual_seed(0)
model = nn.Sequential(Recurrence(8), nn.Linear(8, 1))
x = torch.randn(4, 10, 8)
loss = (model(x).squeeze(-1) - x[..., 0].cumsum(1)).square().mean()
loss.backward()
print(loss.item())
