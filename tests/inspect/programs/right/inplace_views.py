"""Changes in place on views, slices, masked places and diagonals of tensors that carry gradients."""

import torch
from torch import nn

torch.manual_seed(0)
weight = nn.Parameter(torch.randn(6, 6))
bias = nn.Parameter(torch.randn(6))
extra = nn.Parameter(torch.randn(4))
x = torch.randn(4, 6) @ weight
x[:, 0] += extra
x[:, 1:3] *= 2
x[1].add_(bias)
x[x < -2] = 0
top, bottom = x[:2], x[2:]
top.mul_(bias)
bottom.t()[2].mul_(extra[:2])
x.masked_fill_(torch.eye(4, 6, dtype=torch.bool), 0.5)
x.tanh_()
gram = x.T @ x / 4
gram.diagonal().add_(1.0)
gram.view(-1)[1:4].exp_()
loss = gram.square().mean() + x.sigmoid().sum()
loss.backward()
print(loss.item(), extra.grad)
