"""Label smoothing in forward, hard labels in backward."""

import torch
from torch import nn


class SmoothedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, smoothing):
        log_probs = torch.log_softmax(logits, dim=-1)
        ctx.save_for_backward(log_probs, targets)
        hard = -log_probs.gather(-1, targets.unsqueeze(-1)).mean()
        return (1 - smoothing) * hard - smoothing * log_probs.mean()

    @staticmethod
    def backward(ctx, grad):  # defined
        log_probs, targets = ctx.saved_tensors
        onehot = nn.functional.one_hot(targets, log_probs.shape[-1])
        return grad * (log_probs.exp() - onehot) / len(targets), None, None


torch.manual_seed(0)
model = nn.Sequential(nn.Flatten(), nn.Linear(36, 24), nn.ReLU(), nn.Linear(24, 10))
images = torch.rand(16, 1, 6, 6)
labels = torch.randint(10, (16,))
loss = SmoothedCrossEntropy.apply(model(images), labels, 0.1)  # wrong: SmoothedCrossEntropy
loss.backward()
print(loss.item())
