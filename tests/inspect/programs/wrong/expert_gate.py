"""A mixture of experts; its combination returns no gradient for the gates, so the router learns nothing."""

import torch
from torch import nn


class Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out, rows, gates):
        ctx.save_for_backward(rows, gates)
        combined = out.new_zeros(int(rows.max()) + 1, out.shape[1])
        return combined.index_add_(0, rows, out * gates[:, None])

    @staticmethod
    def backward(ctx, grad):  # defined
        rows, gates = ctx.saved_tensors
        return grad[rows] * gates[:, None], None, None


class Experts(nn.Module):
    def __init__(self, dim, count, top):
        super().__init__()
        self.top = top
        self.router = nn.Linear(dim, count, bias=False)
        self.experts = nn.ModuleList(nn.Linear(dim, dim) for _ in range(count))

    def forward(self, x):
        gates, chosen = self.router(x).softmax(-1).topk(self.top)
        outs, rows, weights = [], [], []
        for i, expert in enumerate(self.experts):
            row, slot = (chosen == i).nonzero(as_tuple=True)
            outs.append(torch.relu(expert(x[row])))
            rows.append(row)
            weights.append(gates[row, slot])
        return x + Combine.apply(torch.cat(outs), torch.cat(rows), torch.cat(weights))  # wrong: Combine


torch.manual_seed(0)
model = Experts(dim=12, count=4, top=2)
x = torch.randn(18, 12)
loss = model(x).square().mean()
loss.backward()
print(loss.item(), model.router.weight.grad)
