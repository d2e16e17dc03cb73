"""A model in bfloat16; the gradient of its SiLU lacks a term."""

import torch
from torch import nn


class SiLUFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx, grad):  # defined
        (x,) = ctx.saved_tensors
        return grad * x.sigmoid()


class SiLU(nn.Module):
    def forward(self, x):
        return SiLUFunction.apply(x)  # wrong: SiLUFunction


torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 48), SiLU(), nn.Linear(48, 16), SiLU(), nn.Linear(16, 4)).to(torch.bfloat16)
x = torch.randn(12, 16, dtype=torch.bfloat16)
loss = nn.functional.cross_entropy(model(x).float(), torch.randint(4, (12,)))
loss.backward()
print(loss.item())
