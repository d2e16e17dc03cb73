"""A variational autoencoder: a random sample on the way, and the divergence in closed form."""

import torch
from torch import nn
from torch.nn import functional as F


class VAE(nn.Module):
    def __init__(self, pixels=64, hidden=32, code=4):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(pixels, hidden), nn.ReLU())
        self.mean, self.log_var = nn.Linear(hidden, code), nn.Linear(hidden, code)
        self.decoder = nn.Sequential(nn.Linear(code, hidden), nn.ReLU(), nn.Linear(hidden, pixels))

    def forward(self, x):
        h = self.encoder(x)
        mean, log_var = self.mean(h), self.log_var(h)
        z = mean + torch.exp(0.5 * log_var) * torch.randn_like(mean)
        return self.decoder(z), mean, log_var


torch.manual_seed(0)
model = VAE()
images = (torch.rand(10, 64) < 0.3).to(torch.get_default_dtype())
logits, mean, log_var = model(images)
reconstruction = F.binary_cross_entropy_with_logits(logits, images, reduction="sum")
divergence = -0.5 * torch.sum(1 + log_var - mean.pow(2) - log_var.exp())
loss = (reconstruction + divergence) / len(images)
loss.backward()
print(loss.item())
