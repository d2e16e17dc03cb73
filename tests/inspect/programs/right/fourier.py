"""A spectral layer: real Fourier transform, product with complex weights, back; and a loss on the magnitudes."""

import torch
from torch import nn


class SpectralConv(nn.Module):
    def __init__(self, channels, modes):
        super().__init__()
        self.modes = modes
        self.real = nn.Parameter(torch.randn(channels, channels, modes) / channels)
        self.imag = nn.Parameter(torch.randn(channels, channels, modes) / channels)

    def forward(self, x):
        spectrum = torch.fft.rfft(x)
        weight = torch.complex(self.real, self.imag)
        low = torch.einsum("bik,iok->bok", spectrum[..., : self.modes], weight)
        padded = torch.zeros_like(spectrum)
        padded[..., : self.modes] = low
        return torch.fft.irfft(padded, n=x.shape[-1])


torch.manual_seed(0)
lift, spectral, point = nn.Conv1d(1, 4, 1), SpectralConv(4, 5), nn.Conv1d(4, 4, 1)
x = torch.randn(3, 1, 16)
h = lift(x)
h = torch.nn.functional.gelu(spectral(h) + point(h)).mean(1)
magnitude = torch.fft.rfft(h, norm="ortho").abs()
loss = (magnitude - 0.5).square().mean() + (h - x[:, 0]).square().mean()
loss.backward()
print(loss.item())
