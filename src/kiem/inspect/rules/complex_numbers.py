"""Derivatives of what makes complex numbers, takes them apart, or transforms them.

z = x + i · y; the gradient of z is ∂L/∂x + i · ∂L/∂y. Re, Im: real and imaginary part.
"""

import torch
from torch import Tensor

from kiem.inspect.rules.table import Call, rule

ZY = {"self": "z", "0": "y"}


@rule("_conj", "conj", "_conj_physical", "conj_physical", forward="y = conj(z)", symbols=ZY, pointwise=True,
      holomorphic=False, self="conj(g)")  # fmt: skip
def conjugate(c: Call, g: Tensor):
    return {"self": g.conj()}


@rule("real", forward="y = Re z", symbols=ZY, pointwise=True, holomorphic=False, self="g")
def real(c: Call, g: Tensor):
    return {"self": g}


@rule("imag", forward="y = Im z", symbols=ZY, pointwise=True, holomorphic=False, self="i · g")
def imaginary(c: Call, g: Tensor):
    return {"self": 1j * g}


@rule("view_as_real", forward="y = (Re z, Im z)", symbols=ZY, holomorphic=False, self="g₀ + i · g₁")
def view_as_real(c: Call, g: Tensor):
    return {"self": torch.complex(g[..., 0], g[..., 1])}


@rule("view_as_complex", forward="y = z₀ + i · z₁", symbols=ZY, holomorphic=False, self="(Re g, Im g)")
def view_as_complex(c: Call, g: Tensor):
    return {"self": torch.stack([g.real, g.imag], -1)}


@rule(
    "complex",
    forward="y = a + i · b",
    symbols={"real": "a", "imag": "b", "0": "y"},
    pointwise=True,
    holomorphic=False,
    real="Re g",
    imag="Im g",
)
def complex_of(c: Call, g: Tensor):
    return {"real": g.real, "imag": g.imag}


@rule(
    "polar",
    forward="y = r · exp(i · a)",
    symbols={"abs": "r", "angle": "a", "0": "y"},
    pointwise=True,
    holomorphic=False,
    abs="Re(g · exp(−i · a))",
    angle="Im(g · exp(−i · a)) · r",
)
def polar(c: Call, g: Tensor):
    turned = g * torch.polar(torch.ones_like(c["angle"]), -c["angle"])
    return {"abs": turned.real, "angle": turned.imag * c["abs"]}


@rule(
    "angle",
    forward="y = the angle of z",
    symbols=ZY,
    pointwise=True,
    holomorphic=False,
    self="i · g · z / |z|²; 0 for a real z",
    kink="at z = 0: 0",
)
def angle(c: Call, g: Tensor):
    z = c["self"]
    return {"self": torch.where(z == 0, 0.0, 1j * g * z / (z * z.conj()).real) if z.is_complex() else g * 0}


@rule(
    "sgn",
    forward="y = z / |z|",
    symbols=ZY,
    pointwise=True,
    holomorphic=False,
    self="(g − Re(g · conj(y)) · y) / |z|",
    kink="at z = 0: 0",
)
def sgn(c: Call, g: Tensor):
    across = g - (g * c.y.conj()).real * c.y
    return {"self": torch.where(c["self"] == 0, 0.0, across / c["self"].abs())}


# -- discrete Fourier transforms ---------------------------------------------------------------------------------------


@rule("_fft_c2c", forward="y = F z, F the transform", symbols=ZY, self="F g")
def fft(c: Call, g: Tensor):
    """F is symmetric."""
    return {"self": torch.ops.aten._fft_c2c(g, c["dim"], c["normalization"], c["forward"])}


@rule("_fft_r2c", forward="y = F z, of a real z the first half of it", symbols=ZY, self="F g, 0 for the other half")
def fft_of_real(c: Call, g: Tensor):
    missing = c["self"].shape[c["dim"][-1]] - g.shape[c["dim"][-1]]
    if missing:
        other = list(g.shape)
        other[c["dim"][-1]] = missing
        g = torch.cat([g, g.new_zeros(other)], c["dim"][-1])
    return {"self": torch.ops.aten._fft_c2c(g, c["dim"], c["normalization"], True)}


@rule(
    "_fft_c2r",
    forward="y = F⁻¹ of z and of its other half, conj(z) backwards",
    symbols=ZY,
    holomorphic=False,
    self="F g, twice where z stands for both halves",
)
def fft_to_real(c: Call, g: Tensor):
    dim, n = c["dim"], c["last_dim_size"]
    found = torch.ops.aten._fft_r2c(g, dim, c["normalization"], True)
    found.narrow(dim[-1], 1, (n - 1) // 2).mul_(2)
    return {"self": found}
