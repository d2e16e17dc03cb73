"""Three steps of AdamW, each over the gradients of two micro-batches, clipped, with a schedule."""

import torch
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3)
accumulate = 2
for step in range(3):
    total = 0.0
    for _ in range(accumulate):
        x = torch.randn(8, 10)
        loss = nn.functional.mse_loss(model(x), x[:, :1] * x[:, 1:2]) / accumulate
        loss.backward()
        total += loss.item()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    print(step, total)
