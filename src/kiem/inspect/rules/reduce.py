"""Derivatives of what makes fewer numbers of many: sums, moments, extremes, norms; and of running sums and products."""

import math

import torch
from torch import Tensor

from kiem.inspect.rules.table import Call, rule

XY = {"self": "x", "0": "y"}


def axes(c: Call) -> list[int]:
    """The axes reduced: none given means all."""
    ndim, dim = c["self"].ndim, c["dim"]
    if dim is None or dim == [] or dim == ():
        return list(range(ndim))
    return [d % ndim if ndim else 0 for d in (dim if isinstance(dim, list | tuple) else [dim])] if ndim else []


def spread(t: Tensor, c: Call) -> Tensor:
    """What was reduced, with its axes back, so that it broadcasts against the input."""
    if not c.get("keepdim", False):
        for d in sorted(axes(c)):
            t = t.unsqueeze(d)
    return t


def count(c: Call) -> int:
    """How many numbers make one."""
    return math.prod(c["self"].shape[d] for d in axes(c))


def full(t: Tensor, c: Call) -> Tensor:
    """Broadcast to the shape of the input."""
    return t.expand(c["self"].shape)


def shared(t: Tensor, c: Call, y: Tensor) -> Tensor:
    """Spread over the elements equal to y, in equal parts."""
    chosen = (c["self"] == y).to(t.dtype)
    return t * chosen / (chosen.sum(axes(c), keepdim=True) if chosen.ndim else chosen)


@rule("sum", forward="y = Σ x", symbols=XY, self="g")
def total(c: Call, g: Tensor):
    return {"self": full(spread(g, c), c)}


@rule("mean", forward="y = Σ x / n", symbols=XY, self="g / n")
def mean(c: Call, g: Tensor):
    return {"self": full(spread(g, c), c) / count(c)}


@rule(
    "amax",
    "amin",
    "max.default",
    "min.default",
    "median.default",
    forward="y = the extreme (or middle) x",
    symbols=XY,
    self="g for the element that is y, else 0",
    kink="several equal y: equal parts of g",
)
def extreme(c: Call, g: Tensor):
    return {"self": shared(full(spread(g, c), c), c, spread(c.y, c))}


@rule(
    "aminmax",
    forward="y₀, y₁ = smallest, largest x",
    symbols=XY,
    every=True,
    self="g₀ for the element that is y₀, g₁ for that which is y₁, else 0",
    kink="several equal: equal parts",
)
def aminmax(c: Call, gradients: tuple):
    parts = [
        shared(full(spread(g, c), c), c, spread(y, c))
        for g, y in zip(gradients, c.outputs, strict=True)
        if g is not None
    ]
    return {"self": sum(parts)}


@rule(
    "max.dim",
    "min.dim",
    "median.dim",
    "kthvalue",
    "mode",
    forward="y = x[i], i the index of the one taken",
    symbols=XY,
    self="g at i, else 0",
    kink="several equal: the one at the index returned",
)
def chosen(c: Call, g: Tensor):
    index = spread(c.outputs[1], c)
    dim = axes(c)[0] if c["self"].ndim else 0
    return {"self": torch.zeros_like(c["self"]).scatter(dim, index, spread(g, c).to(c["self"].dtype))}


@rule("sort", "topk", forward="y = x[i], i the order", symbols=XY, self="g moved back to i")
def sort(c: Call, g: Tensor):
    dim = -1 if c["dim"] is None else c["dim"]
    return {"self": torch.zeros_like(c["self"]).scatter(dim, c.outputs[1], g)}


# -- moments -----------------------------------------------------------------------------------------------------------


def correction(c: Call) -> float:
    """Subtracted from n in the variance: 1 unless given."""
    if c["unbiased"] is not None:
        return float(c["unbiased"])
    return 1 if c["correction"] is None else c["correction"]


def centered(c: Call) -> Tensor:
    """x − mean."""
    return c["self"] - c["self"].mean(axes(c), keepdim=True) if c["self"].ndim else c["self"] * 0


# The k of the formulas is the correction, 1 unless the call says otherwise.
@rule("var", forward="y = Σ (x − x̄)² / (n − k)", symbols=XY, self="g · 2 · (x − x̄) / (n − k)", holomorphic=False)
def var(c: Call, g: Tensor):
    return {"self": spread(g, c) * 2 * centered(c) / (count(c) - correction(c))}


@rule(
    "std",
    forward="y = √(Σ (x − x̄)² / (n − k))",
    symbols=XY,
    self="g · (x − x̄) / (y · (n − k))",
    kink="y = 0: 0",
    holomorphic=False,
)
def std(c: Call, g: Tensor):
    scaled = spread(torch.where(c.y == 0, 0.0, g / c.y), c)
    return {"self": scaled * centered(c) / (count(c) - correction(c))}


@rule(
    "var_mean",
    forward="y₀, y₁ = variance, mean of x",
    symbols=XY,
    every=True,
    holomorphic=False,
    self="g₀ · 2 · (x − x̄) / (n − k) + g₁ / n",
)
def var_mean(c: Call, gradients: tuple):
    return {"self": _with_mean(c, var, gradients)}


@rule(
    "std_mean",
    forward="y₀, y₁ = standard deviation, mean of x",
    symbols=XY,
    every=True,
    holomorphic=False,
    self="g₀ · (x − x̄) / (y₀ · (n − k)) + g₁ / n",
)
def std_mean(c: Call, gradients: tuple):
    return {"self": _with_mean(c, std, gradients)}


def _with_mean(c: Call, spread_of, gradients: tuple) -> Tensor:
    found = torch.zeros_like(c["self"])
    if gradients[0] is not None:
        found = found + spread_of(c, gradients[0])["self"]
    return found if gradients[1] is None else found + mean(c, gradients[1])["self"]


# -- products, exponentials, norms -------------------------------------------------------------------------------------


def others(x: Tensor, dim: int) -> Tensor:
    """At each element the product of all others along dim: right where some are 0."""
    one = torch.ones_like(x.narrow(dim, 0, 1))
    n = x.shape[dim]
    left = torch.cat([one, x.narrow(dim, 0, n - 1)], dim).cumprod(dim)
    right = torch.cat([x.narrow(dim, 1, n - 1), one], dim).flip(dim).cumprod(dim).flip(dim)
    return left * right


@rule("prod", forward="y = Π x", symbols=XY, self="g · product of all other x")
def prod(c: Call, g: Tensor):
    x = c["self"]
    if x.numel() == 0:
        return {"self": torch.zeros_like(x)}
    if c["dim"] is None:
        return {"self": g * others(x.reshape(-1), 0).reshape(x.shape)}
    return {"self": spread(g, c) * (others(x, axes(c)[0]) if x.ndim else torch.ones_like(x))}


@rule("cumsum", forward="yᵢ = Σ xⱼ over j ≤ i", symbols=XY, self="Σ gⱼ over j ≥ i")
def cumsum(c: Call, g: Tensor):
    return {"self": g.flip(c["dim"]).cumsum(c["dim"]).flip(c["dim"]) if g.ndim else g}


@rule("cumprod", forward="yᵢ = Π xⱼ over j ≤ i", symbols=XY, self="Σ gⱼ · (yⱼ without xᵢ) over j ≥ i")
def cumprod(c: Call, g: Tensor):
    x, dim = c["self"], c["dim"]
    if x.ndim == 0 or x.numel() == 0:
        return {"self": g}
    found = torch.empty_like(x)
    for i in range(x.shape[dim]):
        without = x.index_fill(dim, torch.tensor([i], device=x.device), 1.0).cumprod(dim)
        after = x.shape[dim] - i
        found.select(dim, i).copy_((g * without).narrow(dim, i, after).sum(dim))
    return {"self": found}


@rule("logsumexp", forward="y = ln(Σ exp(x))", symbols=XY, self="g · exp(x − y)")
def logsumexp(c: Call, g: Tensor):
    return {"self": spread(g, c) * (c["self"] - spread(c.y, c)).exp()}


@rule("logcumsumexp", forward="yᵢ = ln(Σ exp(xⱼ)) over j ≤ i", symbols=XY, self="Σ gⱼ · exp(xᵢ − yⱼ) over j ≥ i")
def logcumsumexp(c: Call, g: Tensor):
    if g.ndim == 0:
        return {"self": g}
    x, y = c["self"].movedim(c["dim"], -1), c.y.movedim(c["dim"], -1)
    ratio = (x[..., :, None] - y[..., None, :]).exp().triu()
    return {"self": (ratio * g.movedim(c["dim"], -1)[..., None, :]).sum(-1).movedim(-1, c["dim"])}


@rule(
    "linalg_vector_norm",
    "norm",
    forward="y = (Σ |x|^p)^(1/p)",
    symbols=XY,
    self="g · x · |x|^(p − 2) / y^(p − 1)",
    kink="at y = 0: 0; p = 0: 0; p = ∞: equal parts of g to the largest |x|",
    holomorphic=False,
)
def norm(c: Call, g: Tensor):
    x, p = c["self"], c["ord"] if c["ord"] is not None else c.get("p", 2)
    y, g = spread(c.y, c), spread(g, c)
    if math.isinf(p):
        chosen = (x.abs() == y).to(g.dtype)
        return {"self": g * x.sgn() * chosen / (chosen.sum(axes(c), keepdim=True) if x.ndim else chosen)}
    if p == 0:
        return {"self": torch.zeros_like(x)}
    slope = x.sgn() if p == 1 else x / y if p == 2 else x.sgn() * (x.abs() / y) ** (p - 1)
    return {"self": g * torch.where(y == 0, 0.0, slope)}


@rule("trace", forward="y = Σ xᵢᵢ", symbols=XY, self="g on the diagonal, else 0")
def trace(c: Call, g: Tensor):
    return {"self": g * torch.eye(*c["self"].shape, dtype=g.dtype, device=g.device)}
