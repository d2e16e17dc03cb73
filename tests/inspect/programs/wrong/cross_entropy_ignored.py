"""Cross-entropy over the tokens that count; backward divides by all tokens, padding too."""

import torch
from torch import nn
from torch.nn import functional as F


class MaskedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, ignore_index):
        ctx.save_for_backward(logits, targets)
        ctx.ignore_index = ignore_index
        return F.cross_entropy(logits, targets, ignore_index=ignore_index)

    @staticmethod
    def backward(ctx, grad):  # defined
        logits, targets = ctx.saved_tensors
        keep = targets != ctx.ignore_index
        onehot = F.one_hot(targets.clamp_min(0), logits.shape[-1])
        grad_logits = (logits.softmax(-1) - onehot) * keep[:, None]
        return grad * grad_logits / targets.numel(), None, None


torch.manual_seed(0)
model = nn.Sequential(nn.Embedding(30, 16), nn.Linear(16, 30))
tokens = torch.randint(30, (3, 12))
targets = tokens.roll(-1, 1)
targets[:, -1] = -100
targets[1, 5:] = -100
logits = model(tokens)
loss = MaskedCrossEntropy.apply(logits.view(-1, 30), targets.view(-1), -100)  # wrong: MaskedCrossEntropy
loss.backward()
print(loss.item())
