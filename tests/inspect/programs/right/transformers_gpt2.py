"""GPT-2 of the transformers library, two small layers."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel

torch.manual_seed(0)
config = GPT2Config(vocab_size=96, n_positions=16, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
model = GPT2LMHeadModel(config)
tokens = torch.randint(96, (2, 12))
loss = model(input_ids=tokens, labels=tokens).loss
loss.backward()
print(loss.item())
