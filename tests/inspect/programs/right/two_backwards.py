"""Two losses over one graph: retain_graph, then a second backward that adds to the same gradients."""

import torch
from torch import nn

torch.manual_seed(0)
trunk = nn.Sequential(nn.Linear(5, 12), nn.SiLU())
heads = nn.ModuleList([nn.Linear(12, 3), nn.Linear(12, 1)])
x = torch.randn(9, 5)
h = trunk(x)
kind = nn.functional.cross_entropy(heads[0](h), torch.randint(3, (9,)))
size = nn.functional.smooth_l1_loss(heads[1](h), x.sum(1, keepdim=True))
kind.backward(retain_graph=True)
first = trunk[0].weight.grad.clone()
size.backward()
print(kind.item(), size.item(), first.norm().item(), trunk[0].weight.grad.norm().item())
