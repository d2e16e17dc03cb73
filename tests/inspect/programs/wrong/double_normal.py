"""The normal distribution in double precision; its density has the constant of another convention."""

import math

import torch


class NormalCDF(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return 0.5 * (1 + torch.erf(x / math.sqrt(2)))

    @staticmethod
    def backward(ctx, grad):  # defined
        (x,) = ctx.saved_tensors
        return grad * torch.exp(-x * x / 2) / math.sqrt(math.pi)


torch.manual_seed(0)
dtype = torch.float64
spot = torch.linspace(80, 120, 9, dtype=dtype, requires_grad=True)
volatility = torch.tensor(0.2, dtype=dtype, requires_grad=True)
strike, years = 100.0, 0.5
d1 = (torch.log(spot / strike) + 0.5 * volatility**2 * years) / (volatility * years**0.5)
d2 = d1 - volatility * years**0.5
first = NormalCDF.apply(d1)  # wrong: NormalCDF
second = NormalCDF.apply(d2)  # wrong: NormalCDF
price = spot * first - strike * second
price.sum().backward()
print(price.tolist(), spot.grad.tolist(), volatility.grad.item())
