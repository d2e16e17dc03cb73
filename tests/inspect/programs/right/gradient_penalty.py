"""The critic of a Wasserstein GAN: the gradient to the input is itself part of the loss."""

import torch
from torch import nn

torch.manual_seed(0)
critic = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 16), nn.Softplus(), nn.Linear(16, 1))
real, fake = torch.randn(8, 4) + 1, torch.randn(8, 4)
mix = torch.rand(8, 1)
between = (mix * real + (1 - mix) * fake).requires_grad_()
scores = critic(between)
(slope,) = torch.autograd.grad(scores.sum(), between, create_graph=True)
penalty = ((slope.norm(2, dim=1) - 1) ** 2).mean()
loss = critic(fake).mean() - critic(real).mean() + 10 * penalty
loss.backward()
print(loss.item(), penalty.item())
