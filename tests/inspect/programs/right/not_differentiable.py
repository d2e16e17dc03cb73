"""Outputs without a gradient beside ones that have it: argmax, comparisons, order, rounding, indices of a maximum."""

import torch
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 4))
x, y = torch.randn(14, 6), torch.randint(4, (14,))
logits = model(x)
best = logits.argmax(dim=1)
accuracy = (best == y).double().mean()
top, place = logits.max(dim=1)
ordered, order = logits.sort(dim=1, descending=True)
level = torch.round(4 * logits) / 4
margin = ordered[:, 0] - ordered[:, 1]
hard = logits[torch.arange(14), best].mean()
median = logits.median(dim=1).values
loss = nn.functional.cross_entropy(logits, y) + 0.1 * margin.mean() + 0.01 * top.sum() + hard + median.mean()
loss = loss + torch.where(logits > level, logits, -logits).mean()
loss.backward()
print(loss.item(), accuracy.item(), place[:3].tolist(), order[0].tolist())
