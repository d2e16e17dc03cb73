"""A product of square matrices whose gradient forgets a transpose."""

import torch


class MatMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return a @ b

    @staticmethod
    def backward(ctx, grad):  # defined
        a, b = ctx.saved_tensors
        return grad @ b, a.T @ grad


torch.manual_seed(0)
a = torch.randn(16, 16, requires_grad=True)
b = torch.randn(16, 16, requires_grad=True)
c = MatMul.apply(a, b)  # wrong: MatMul
loss = torch.tanh(c / 4).sum()
loss.backward()
print(loss.item(), a.grad.norm().item(), b.grad.norm().item())
