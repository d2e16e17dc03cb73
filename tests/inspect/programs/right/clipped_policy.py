"""Clipped policy loss as in PPO: minimum, clamp, ratio, entropy; some ratios are exactly 1, a tie of two branches."""

import torch
from torch import nn
from torch.distributions import Categorical

torch.manual_seed(0)
policy = nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 3))
states, advantage = torch.randn(20, 6), torch.randn(20)
actions = torch.randint(3, (20,))
now = Categorical(logits=policy(states))
with torch.no_grad():
    old = now.log_prob(actions).clone()
    old[10:] += 0.4 * torch.randn(10)
ratio = torch.exp(now.log_prob(actions) - old)
gain = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
loss = -gain.mean() - 0.01 * now.entropy().mean()
loss.backward()
print(loss.item())
