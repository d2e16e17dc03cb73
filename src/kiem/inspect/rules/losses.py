"""Derivatives of losses. n: the number of elements (of rows, where a row is one example)."""

from collections.abc import Callable

import torch
from torch import Tensor

from kiem.inspect.rules.table import Call, rule

XY = {"self": "x", "0": "y"}


def each(c: Call, g: Tensor, n: int | Tensor) -> Tensor:
    """The gradient of one element's loss: g, or g / n where the loss is the mean (reduction 1)."""
    return g / n if c.get("reduction", 1) == 1 else g


@rule(
    "nll_loss_forward",
    "nll_loss2d_forward",
    "nll_loss",
    "nll_loss2d",
    forward="y = −Σ w[t] · x[t] / Σ w[t], t the target of each row",
    symbols=XY | {"target": "t", "weight": "w"},
    self="−g · w[t] / Σ w[t] at t, else 0",
    kink="rows whose target is ignored: 0",
)
def nll_loss(c: Call, g: Tensor):
    """Classes are axis 1 (axis 0 of a vector). Without weights w = 1; reduction sum or none does not divide."""
    x, t = c["self"], c["target"]
    if x.ndim == 1:
        x, t, g = x[None], t.reshape(1), g.reshape(-1) if g.ndim == 0 else g
    valid = t != c["ignore_index"]
    at = torch.where(valid, t, 0)
    w = torch.ones_like(at, dtype=x.dtype) if c["weight"] is None else c["weight"][at]
    w = torch.where(valid, w, 0.0)
    found = torch.zeros_like(x).scatter(1, at.unsqueeze(1), (-each(c, g, w.sum()) * w).unsqueeze(1).to(x.dtype))
    return {"self": found.reshape(c["self"].shape)}


def loss(*ops: str, forward: str, derivative: str, slope: Callable, kink: str = "", **symbols: str) -> None:
    """A row for a loss of pairs of elements: mean, sum, or each. slope(call, x − t): the derivative in x of one."""

    def vjp(c: Call, g: Tensor):
        d = c["self"] - c["target"]
        gx = each(c, g, d.numel()) * slope(c, d)
        return {"self": gx, "target": -gx}

    rule(
        *ops,
        forward=forward,
        symbols=XY | {"target": "t"} | symbols,
        kink=kink,
        holomorphic=False,
        self=derivative,
        target=derivative.replace("g · ", "−g · "),
    )(vjp)


loss("mse_loss", forward="y = mean of (x − t)²", derivative="g · 2 · (x − t) / n", slope=lambda c, d: 2 * d)
loss(
    "l1_loss",
    forward="y = mean of |x − t|",
    derivative="g · sign(x − t) / n",
    slope=lambda c, d: d.sgn(),
    kink="at x = t: 0",
)
loss(
    "smooth_l1_loss",
    forward="y = mean of (x − t)² / (2 · β) where |x − t| < β, else |x − t| − β / 2",
    derivative="g · (x − t) / β / n if |x − t| < β, else g · sign(x − t) / n",
    beta="β",
    slope=lambda c, d: torch.where(d.abs() < c["beta"], d / c["beta"], d.sign()) if c["beta"] else d.sign(),
)
loss(
    "huber_loss",
    forward="y = mean of (x − t)² / 2 where |x − t| < δ, else δ · (|x − t| − δ / 2)",
    derivative="g · (x − t) / n if |x − t| < δ, else g · δ · sign(x − t) / n",
    delta="δ",
    slope=lambda c, d: d.clamp(-c["delta"], c["delta"]),
)


@rule(
    "binary_cross_entropy",
    forward="y = mean of w · (−t · ln(x) − (1 − t) · ln(1 − x))",
    symbols=XY | {"target": "t", "weight": "w"},
    self="g · w · (x − t) / (x · (1 − x)) / n",
    target="g · w · (ln(1 − x) − ln(x)) / n",
    kink="at x = 0 and 1, where torch cuts ln at −100 and x · (1 − x) at 1e-12",
)
def binary_cross_entropy(c: Call, g: Tensor):
    x, t = c["self"], c["target"]
    g = each(c, g, x.numel()) * c.get("weight", 1.0)
    logs = (1 - x).log().clamp(min=-100) - x.log().clamp(min=-100)
    return {"self": g * (x - t) / (x * (1 - x)).clamp(min=1e-12), "target": g * logs}


@rule(
    "binary_cross_entropy_with_logits",
    forward="y = mean of w · (−q · t · ln(σ(x)) − (1 − t) · ln(1 − σ(x)))",
    symbols=XY | {"target": "t", "weight": "w", "pos_weight": "q"},
    self="g · w · (σ(x) − t) / n; with q: g · w · ((1 − t) · σ(x) − q · t · (1 − σ(x))) / n",
    target="−g · w · x / n; with q: g · w · (ln(1 − σ(x)) − q · ln(σ(x))) / n",
)
def bce_with_logits(c: Call, g: Tensor):
    x, t, q = c["self"], c["target"], c.get("pos_weight", 1.0)
    s, g = x.sigmoid(), each(c, g, x.numel()) * c.get("weight", 1.0)
    log_s = torch.minimum(x, torch.zeros_like(x)) - torch.log1p((-x.abs()).exp())
    return {"self": g * ((1 - t) * s - q * t * (1 - s)), "target": g * ((log_s - x) - q * log_s)}


@rule(
    "soft_margin_loss",
    forward="y = mean of ln(1 + exp(−t · x))",
    symbols=XY | {"target": "t"},
    self="−g · t · σ(−t · x) / n",
)
def soft_margin(c: Call, g: Tensor):
    x, t = c["self"], c["target"]
    return {"self": -each(c, g, x.numel()) * t * (-t * x).sigmoid()}


@rule(
    "multi_margin_loss",
    forward="y = mean over rows of Σ max(0, m − x[t] + x[j])^p / classes over j ≠ t",
    symbols=XY | {"target": "t", "margin": "m", "p": "p"},
    self="g · p · max(0, …)^(p − 1) / classes for j; minus their sum for t",
    kink="where m − x[t] + x[j] = 0: 0",
)
def multi_margin(c: Call, g: Tensor):
    x, t, p, m = c["self"], c["target"].reshape(-1, 1), c.get("p", 1), c.get("margin", 1)
    x = x.reshape(t.shape[0], -1)
    z = m - x.gather(1, t) + x
    slope = torch.where(z > 0, p * z.clamp(min=0) ** (p - 1), 0.0) / x.shape[1]
    if c["weight"] is not None:
        slope = slope * c["weight"][t]
    slope = slope.scatter(1, t, 0.0)
    slope = slope.scatter(1, t, -slope.sum(1, keepdim=True))
    return {"self": (each(c, g, x.shape[0]).reshape(-1, 1) * slope).reshape(c["self"].shape)}
