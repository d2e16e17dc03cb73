"""A perceptron with ReLU, some of whose inputs are exactly zero: half of the first layer sits at its kink."""

import torch
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.LeakyReLU(0.1), nn.Linear(32, 3))
with torch.no_grad():
    model[0].weight[:16] = 0
    model[0].bias.zero_()
x = torch.randn(20, 8)
x[:4] = 0
loss = nn.functional.cross_entropy(model(x), torch.randint(3, (20,)))
loss.backward()
print(loss.item())
