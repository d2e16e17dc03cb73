"""A softplus in double whose gradient passes through float32."""

import torch


class Softplus(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.log1p(torch.exp(-x.abs())) + x.clamp_min(0)

    @staticmethod
    def backward(ctx, grad):  # defined
        (x,) = ctx.saved_tensors
        return grad * torch.sigmoid(x.float())


torch.manual_seed(0)
x = torch.randn(40, 3, dtype=torch.float64)
w = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
rate = Softplus.apply(x @ w)  # wrong: Softplus
counts = torch.poisson(rate.detach())
loss = (rate - counts * rate.log()).mean()
loss.backward()
print(loss.item(), w.grad.norm().item())
