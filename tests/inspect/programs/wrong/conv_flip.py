"""A convolution whose gradient to the image uses the kernel unflipped."""

import torch
from torch import nn
from torch.nn import functional as F


class Conv3x3(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, padding=1)

    @staticmethod
    def backward(ctx, grad):  # defined
        x, weight = ctx.saved_tensors
        grad_x = F.conv2d(grad, weight.transpose(0, 1), padding=1)
        grad_weight = F.conv2d(x.transpose(0, 1), grad.transpose(0, 1), padding=1).transpose(0, 1)
        return grad_x, grad_weight


class Conv(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, 3, 3) * (9 * inputs) ** -0.5)

    def forward(self, x):
        return Conv3x3.apply(x, self.weight)  # wrong: Conv3x3


torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), Conv(6, 4), nn.Flatten(), nn.Linear(4 * 64, 10))
images = torch.randn(4, 3, 8, 8)
loss = F.cross_entropy(model(images), torch.randint(10, (4,)))
loss.backward()
print(loss.item())
