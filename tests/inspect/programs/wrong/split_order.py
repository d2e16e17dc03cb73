"""One projection to queries, keys and values; backward joins their gradients in the wrong order."""

import torch
from torch import nn


class ProjectQKV(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        q, k, v = (x @ weight.T).chunk(3, dim=-1)
        return q.contiguous(), k.contiguous(), v.contiguous()

    @staticmethod
    def backward(ctx, grad_q, grad_k, grad_v):  # defined
        x, weight = ctx.saved_tensors
        grad = torch.cat((grad_q, grad_v, grad_k), dim=-1)
        return grad @ weight, grad.flatten(0, -2).T @ x.flatten(0, -2)


class Attention(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3 * dim, dim) * dim**-0.5)

    def forward(self, x):
        q, k, v = ProjectQKV.apply(x, self.weight)  # wrong: ProjectQKV
        return x + nn.functional.scaled_dot_product_attention(q, k, v)


torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 16), Attention(16), Attention(16))
x = torch.randn(3, 7, 6)
loss = model(x).square().mean()
loss.backward()
print(loss.item())
