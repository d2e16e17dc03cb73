"""Contrastive scores with a learned temperature, whose gradient is forgotten."""

import torch
from torch import nn
from torch.nn import functional as F


class ScaledSimilarity(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b, temperature):
        ctx.save_for_backward(a, b, temperature)
        return a @ b.T / temperature

    @staticmethod
    def backward(ctx, grad):  # defined
        a, b, temperature = ctx.saved_tensors
        return grad @ b / temperature, grad.T @ a / temperature, torch.zeros_like(temperature)


class CLIP(nn.Module):
    def __init__(self):
        super().__init__()
        self.image = nn.Linear(20, 8)
        self.text = nn.Linear(12, 8)
        self.temperature = nn.Parameter(torch.tensor(0.5))

    def forward(self, images, texts):
        a, b = F.normalize(self.image(images), dim=1), F.normalize(self.text(texts), dim=1)
        return ScaledSimilarity.apply(a, b, self.temperature)  # wrong: ScaledSimilarity


torch.manual_seed(0)
model = CLIP()
logits = model(torch.randn(10, 20), torch.randn(10, 12))
pairs = torch.arange(10)
loss = (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2
loss.backward()
print(loss.item(), model.temperature.grad.item())
