"""A character model: embedding, two layers of LSTM, output layer, clipped gradients."""

import torch
from torch import nn


class CharModel(nn.Module):
    def __init__(self, vocab, dim):
        super().__init__()
        self.embed = nn.Embedding(vocab, dim)
        self.lstm = nn.LSTM(dim, dim, num_layers=2, batch_first=True, dropout=0.1)
        self.head = nn.Linear(dim, vocab)

    def forward(self, ids, state=None):
        h, state = self.lstm(self.embed(ids), state)
        return self.head(h), state


torch.manual_seed(0)
text = "it was the best of times, it was the worst of times"
alphabet = sorted(set(text))
ids = torch.tensor([alphabet.index(c) for c in text])[None]
model = CharModel(len(alphabet), 24)
logits, _ = model(ids[:, :-1])
loss = nn.functional.cross_entropy(logits[0], ids[0, 1:])
loss.backward()
nn.utils.clip_grad_norm_(model.parameters(), 1.0)
print(loss.item())
