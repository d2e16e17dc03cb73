"""A selective state-space block: short convolution, a scan that writes into a buffer step by step, a cumulative sum."""

import torch
from torch import nn
from torch.nn import functional as F


class StateSpace(nn.Module):
    def __init__(self, dim, state):
        super().__init__()
        self.enter = nn.Linear(dim, 2 * dim)
        self.conv = nn.Conv1d(dim, dim, 3, padding=2, groups=dim)
        self.select = nn.Linear(dim, 2 * state)
        self.rate = nn.Linear(dim, dim)
        self.log_decay = nn.Parameter(torch.arange(1, state + 1).repeat(dim, 1).log())
        self.skip = nn.Parameter(torch.ones(dim))
        self.leave = nn.Linear(dim, dim)

    def forward(self, x):
        x, gate = self.enter(x).chunk(2, dim=-1)
        x = F.silu(self.conv(x.mT)[..., : x.shape[1]].mT)
        read, write = self.select(x).chunk(2, dim=-1)
        rate = F.softplus(self.rate(x))
        decay = torch.exp(-rate[..., None] * self.log_decay.exp())
        drive = (rate * x)[..., None] * write[:, :, None]
        h = x.new_zeros(x.shape[0], x.shape[2], read.shape[-1])
        y = torch.empty_like(x)
        for t in range(x.shape[1]):
            h = decay[:, t] * h + drive[:, t]
            y[:, t] = (h * read[:, t, None]).sum(-1)
        y += x * self.skip
        return self.leave(y * F.silu(gate))


torch.manual_seed(0)
embed, block, head = nn.Embedding(12, 8), StateSpace(8, 4), nn.Linear(8, 12)
tokens = torch.randint(12, (2, 9))
x = embed(tokens)
logits = head(x + block(x))
losses = F.cross_entropy(logits[:, :-1].mT, tokens[:, 1:], reduction="none")
loss = (losses.cumsum(1) / torch.arange(1, 9)).mean()
loss.backward()
print(loss.item())
