"""Two rounds of messages on a graph: gather by edge, attention by scatter, index_add, maximum with ties."""

import torch
from torch import nn


class Round(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.message = nn.Linear(2 * dim, dim)
        self.score = nn.Linear(2 * dim, 1)
        self.update = nn.Linear(3 * dim, dim)

    def forward(self, nodes, source, target):
        pair = torch.cat((nodes[source], nodes[target]), dim=1)
        message = torch.relu(self.message(pair))
        weight = self.score(pair).squeeze(1).exp()
        total = torch.zeros(len(nodes)).scatter_add_(0, target, weight)
        weight = weight / total[target]
        mean = torch.zeros_like(nodes).index_add(0, target, weight[:, None] * message)
        index = target[:, None].expand_as(message)
        peak = torch.zeros_like(nodes).scatter_reduce(0, index, message, "amax")
        return nodes + torch.tanh(self.update(torch.cat((nodes, mean, peak), dim=1)))


torch.manual_seed(0)
source = torch.tensor([0, 1, 2, 3, 4, 5, 0, 2, 4, 1, 3, 5])
target = torch.tensor([1, 2, 3, 4, 5, 0, 2, 4, 0, 0, 0, 3])
enter, rounds, leave = nn.Linear(3, 8), nn.ModuleList([Round(8), Round(8)]), nn.Linear(8, 2)
nodes = enter(torch.randn(6, 3))
for step in rounds:
    nodes = step(nodes, source, target)
loss = nn.functional.cross_entropy(leave(nodes), torch.tensor([0, 1, 0, 1, 1, 0]))
loss.backward()
print(loss.item())
