"""An operation registered with torch.library; its backward has the sign of the cosine wrong."""

import torch
from torch import nn


@torch.library.custom_op("mylib::cosine", mutates_args=())
def cosine(x: torch.Tensor) -> torch.Tensor:
    return torch.cos(x)


def setup_context(ctx, inputs, output):
    ctx.save_for_backward(inputs[0])


def backward(ctx, grad):  # defined
    (x,) = ctx.saved_tensors
    return grad * torch.sin(x)


cosine.register_autograd(backward, setup_context=setup_context)


class FourierFeatures(nn.Module):
    def __init__(self, inputs, features):
        super().__init__()
        self.frequency = nn.Linear(inputs, features)

    def forward(self, x):
        return cosine(self.frequency(x))  # wrong: cosine


torch.manual_seed(0)
model = nn.Sequential(FourierFeatures(2, 32), nn.Linear(32, 1))
x = torch.rand(25, 2)
loss = nn.functional.mse_loss(model(x), x.prod(1, keepdim=True))
loss.backward()
print(loss.item())
