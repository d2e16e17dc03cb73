"""Embedding and output layer share one weight in one function; backward returns the share of the output layer only."""

import torch
from torch import nn


class TiedBigram(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ids, weight):
        ctx.save_for_backward(ids, weight)
        return weight[ids] @ weight.T

    @staticmethod
    def backward(ctx, grad):  # defined
        ids, weight = ctx.saved_tensors
        hidden = weight[ids].flatten(0, 1)
        return None, grad.flatten(0, 1).T @ hidden


class Bigram(nn.Module):
    def __init__(self, vocab, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(vocab, dim) * 0.2)

    def forward(self, ids):
        return TiedBigram.apply(ids, self.weight)  # wrong: TiedBigram


torch.manual_seed(0)
model = Bigram(vocab=40, dim=16)
ids = torch.randint(40, (4, 11))
loss = nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
loss.backward()
print(loss.item())
