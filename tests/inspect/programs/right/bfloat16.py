"""A transformer layer wholly in bfloat16."""

import torch
from torch import nn

torch.manual_seed(0)
embed = nn.Embedding(32, 32, dtype=torch.bfloat16)
nn.init.normal_(embed.weight, std=0.2)
layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, norm_first=True, dtype=torch.bfloat16)
tokens = torch.randint(32, (2, 10))
h = layer(embed(tokens))
logits = nn.functional.linear(h, embed.weight).float()
loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
loss.backward()
print(loss.item())
