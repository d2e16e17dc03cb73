"""Binary cross-entropy from logits; backward forgets the weight of the positives."""

import torch
from torch import nn
from torch.nn import functional as F


class WeightedBCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, pos_weight):
        ctx.save_for_backward(logits, targets)
        return F.binary_cross_entropy_with_logits(logits, targets, pos_weight=pos_weight)

    @staticmethod
    def backward(ctx, grad):  # defined
        logits, targets = ctx.saved_tensors
        return grad * (torch.sigmoid(logits) - targets) / logits.numel(), None, None


torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 16), nn.SiLU(), nn.Linear(16, 4))
x = torch.randn(20, 6)
targets = (torch.rand(20, 4) < 0.2).to(x.dtype)
pos_weight = torch.full((4,), 4.0)
loss = WeightedBCE.apply(model(x), targets, pos_weight)  # wrong: WeightedBCE
loss.backward()
print(loss.item())
