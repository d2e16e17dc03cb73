"""A mixture of experts: top-2 routing, gather and index_add, a loss for balance; one expert gets no token."""

import torch
from torch import nn
from torch.nn import functional as F


class MixtureOfExperts(nn.Module):
    def __init__(self, dim, experts, top):
        super().__init__()
        self.top = top
        self.gate = nn.Linear(dim, experts)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, 2 * dim), nn.SiLU(), nn.Linear(2 * dim, dim)) for _ in range(experts)
        )
        with torch.no_grad():
            self.gate.bias[-1] = -20

    def forward(self, x):
        shape = x.shape
        x = x.reshape(-1, shape[-1])
        probs = self.gate(x).softmax(dim=-1)
        weights, chosen = torch.topk(probs, self.top, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            row, slot = torch.where(chosen == i)
            y.index_add_(0, row, expert(x[row]) * weights[row, slot, None])
        load = F.one_hot(chosen, len(self.experts)).sum(1).to(x.dtype).mean(0)
        return y.view(shape), (load * probs.mean(0)).sum() * len(self.experts)


torch.manual_seed(0)
embed = nn.Embedding(30, 16)
layer = MixtureOfExperts(16, experts=5, top=2)
tokens = torch.randint(30, (3, 9))
x = embed(tokens)
y, balance = layer(x)
loss = F.cross_entropy(((x + y) @ embed.weight.T)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()) + 0.01 * balance
loss.backward()
print(loss.item(), balance.item())
