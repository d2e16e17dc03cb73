"""A cube whose backward reads its input as flat memory, which a transposed input is not."""

import torch
from torch import nn


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, grad):  # defined
        (x,) = ctx.saved_tensors
        flat = x.as_strided((x.numel(),), (1,))
        return 3 * flat.view(x.shape) ** 2 * grad


class Mixer(nn.Module):
    def __init__(self, tokens, channels):
        super().__init__()
        self.over_tokens = nn.Linear(tokens, tokens)
        self.over_channels = nn.Linear(channels, channels)

    def forward(self, x):
        h = self.over_channels(x).transpose(1, 2)
        return x + self.over_tokens(Cube.apply(h)).transpose(1, 2)  # wrong: Cube


torch.manual_seed(0)
model = Mixer(tokens=6, channels=10)
x = torch.randn(3, 6, 10)
loss = model(x).square().mean()
loss.backward()
print(loss.item())
