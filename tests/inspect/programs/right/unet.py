"""One step of a diffusion model: a U-Net with time embedding, group norm, attention, down- and upsampling."""

import torch
from torch import nn
from torch.nn import functional as F


class ResBlock(nn.Module):
    def __init__(self, inputs, outputs, time):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(4, inputs), nn.GroupNorm(4, outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.time = nn.Linear(time, outputs)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x, t):
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time(F.silu(t))[:, :, None, None]
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


class SelfAttention(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm = nn.GroupNorm(4, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.out = nn.Conv1d(channels, channels, 1)

    def forward(self, x):
        flat = self.norm(x).flatten(2)
        q, k, v = self.qkv(flat).chunk(3, dim=1)
        weights = torch.einsum("bci,bcj->bij", q, k).div(q.shape[1] ** 0.5).softmax(-1)
        return x + self.out(torch.einsum("bij,bcj->bci", weights, v)).view_as(x)


class UNet(nn.Module):
    def __init__(self, channels=8, time=16):
        super().__init__()
        self.time = nn.Sequential(nn.Linear(time, time), nn.SiLU(), nn.Linear(time, time))
        self.enter = nn.Conv2d(1, channels, 3, padding=1)
        self.down = ResBlock(channels, channels, time)
        self.shrink = nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1)
        self.middle = ResBlock(2 * channels, 2 * channels, time)
        self.attention = SelfAttention(2 * channels)
        self.grow = nn.ConvTranspose2d(2 * channels, channels, 2, stride=2)
        self.up = ResBlock(2 * channels, channels, time)
        self.leave = nn.Conv2d(channels, 1, 3, padding=1)

    def forward(self, x, t):
        frequency = torch.exp(-torch.arange(8) * 0.7)
        angle = t[:, None] * frequency
        t = self.time(torch.cat((angle.sin(), angle.cos()), dim=1))
        skip = self.down(self.enter(x), t)
        h = self.attention(self.middle(self.shrink(skip), t))
        h = self.grow(h) + F.interpolate(self.shrink(skip)[:, :8], scale_factor=2, mode="bilinear")
        return self.leave(self.up(torch.cat((skip, h), dim=1), t))


torch.manual_seed(0)
model = UNet()
images = torch.rand(3, 1, 8, 8)
alpha = torch.linspace(0.99, 0.9, 100).cumprod(0)
step = torch.randint(100, (3,))
noise = torch.randn_like(images)
a = alpha[step][:, None, None, None]
predicted = model(a.sqrt() * images + (1 - a).sqrt() * noise, step / 100)
loss = F.mse_loss(predicted, noise)
loss.backward()
print(loss.item())
