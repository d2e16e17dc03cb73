"""Mixed precision on the CPU: float32 weights, bfloat16 products."""

import torch
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(24, 48), nn.GELU(), nn.LayerNorm(48), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 6))
x = torch.randn(16, 24)
y = torch.randint(6, (16,))
with torch.autocast("cpu", dtype=torch.bfloat16):
    logits = model(x)
    loss = nn.functional.cross_entropy(logits.float(), y)
loss.backward()
print(loss.item(), model[0].weight.grad.dtype)
