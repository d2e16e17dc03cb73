"""Derivatives of activation functions that have settings, and of dropout. Those without stand in pointwise.py."""

import math

import torch
from torch import Tensor

from kiem.inspect.rules.table import Call, rule

XY = {"self": "x", "0": "y"}
ROOT_2_PI = math.sqrt(2 / math.pi)


@rule(
    "gelu",
    forward="y = x · Φ(x), Φ the normal distribution (or its tanh approximation)",
    symbols=XY,
    pointwise=True,
    self="g · (Φ(x) + x · φ(x))",
)
def gelu(c: Call, g: Tensor):
    x = c["self"]
    if c.get("approximate", "none") == "tanh":
        t = (ROOT_2_PI * (x + 0.044715 * x**3)).tanh()
        return {"self": g * (0.5 * (1 + t) + 0.5 * x * (1 - t * t) * ROOT_2_PI * (1 + 3 * 0.044715 * x * x))}
    return {"self": g * (0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * (-x * x / 2).exp() / math.sqrt(2 * math.pi))}


@rule(
    "softplus",
    forward="y = ln(1 + exp(β · x)) / β if β · x ≤ t, else x",
    symbols=XY | {"beta": "β", "threshold": "t"},
    pointwise=True,
    self="g · σ(β · x) if β · x ≤ t, else g",
    kink="where β · x = t",
)
def softplus(c: Call, g: Tensor):
    z = c["self"] * c.get("beta", 1)
    return {"self": torch.where(z > c.get("threshold", 20), g, g * z.sigmoid())}


@rule("log_sigmoid_forward", forward="y = ln(σ(x))", symbols=XY, pointwise=True, self="g · (1 − σ(x))")
def log_sigmoid(c: Call, g: Tensor):
    return {"self": g * (-c["self"]).sigmoid()}


@rule(
    "leaky_relu",
    forward="y = x if x > 0, else s · x",
    symbols=XY | {"negative_slope": "s"},
    pointwise=True,
    self="g if x > 0, else g · s",
    kink="at x = 0: s",
)
def leaky_relu(c: Call, g: Tensor):
    return {"self": torch.where(c["self"] > 0, g, g * c.get("negative_slope", 0.01))}


@rule(
    "_prelu_kernel",
    forward="y = x if x > 0, else w · x",
    symbols=XY | {"weight": "w"},
    pointwise=True,
    self="g if x > 0, else g · w",
    weight="0 if x > 0, else g · x",
    kink="at x = 0: w",
)
def prelu(c: Call, g: Tensor):
    x = c["self"]
    return {"self": torch.where(x > 0, g, g * c["weight"]), "weight": torch.where(x > 0, 0.0, g * x)}


@rule(
    "elu",
    forward="y = λ · x if x > 0, else λ · α · (exp(κ · x) − 1)",
    symbols=XY | {"alpha": "α", "scale": "λ", "input_scale": "κ"},
    pointwise=True,
    self="λ · g if x > 0, else λ · g · α · κ · exp(κ · x)",
    kink="with α ≠ 1, at x = 0: α",
)
def elu(c: Call, g: Tensor):
    x, alpha, scale, inner = c["self"], c.get("alpha", 1), c.get("scale", 1), c.get("input_scale", 1)
    return {"self": g * torch.where(x > 0, scale, scale * alpha * inner * (x * inner).exp())}


@rule(
    "celu",
    forward="y = x if x > 0, else α · (exp(x / α) − 1)",
    symbols=XY | {"alpha": "α"},
    pointwise=True,
    self="g if x > 0, else g · exp(x / α)",
)
def celu(c: Call, g: Tensor):
    x, alpha = c["self"], c.get("alpha", 1)
    return {"self": torch.where(x > 0, g, g * (x / alpha).exp())}


@rule(
    "hardtanh",
    forward="y = x within its bounds, else the bound",
    symbols=XY | {"min_val": "l", "max_val": "h"},
    pointwise=True,
    self="g if l < x < h, else 0",
    kink="at a bound: 0",
)
def hardtanh(c: Call, g: Tensor):
    x = c["self"]
    return {"self": torch.where((x > c.get("min_val", -1)) & (x < c.get("max_val", 1)), g, 0.0)}


@rule(
    "softshrink",
    "hardshrink",
    forward="y = 0 if |x| ≤ λ; else x, or x moved by λ to 0",
    symbols=XY | {"lambd": "λ"},
    pointwise=True,
    self="g if |x| > λ, else 0",
    kink="at |x| = λ: 0",
)
def shrink(c: Call, g: Tensor):
    return {"self": torch.where(c["self"].abs() > c.get("lambd", 0.5), g, 0.0)}


@rule(
    "threshold",
    forward="y = x if x > t, else a value",
    symbols=XY | {"threshold": "t"},
    pointwise=True,
    self="g if x > t, else 0",
    kink="at x = t: 0",
)
def threshold(c: Call, g: Tensor):
    return {"self": torch.where(c["self"] > c["threshold"], g, 0.0)}


@rule(
    "glu",
    forward="y = a · σ(b), a and b the halves of x",
    symbols=XY,
    self="g · σ(b) for a; g · a · σ(b) · (1 − σ(b)) for b",
)
def glu(c: Call, g: Tensor):
    a, b = c["self"].chunk(2, c.get("dim", -1))
    s = b.sigmoid()
    return {"self": torch.cat([g * s, g * a * s * (1 - s)], c.get("dim", -1))}


@rule(
    "native_dropout",
    forward="y = x · m / (1 − p), m = 0 with probability p, else 1",
    symbols={"input": "x", "p": "p", "0": "y", "1": "m"},
    pointwise=True,
    input="g · m / (1 − p)",
)
def native_dropout(c: Call, g: Tensor):
    if c["train"] is False:
        return {"input": g}
    return {"input": torch.zeros_like(g) if c["p"] == 1 else g * c.outputs[1].to(g.dtype) / (1 - c["p"])}
