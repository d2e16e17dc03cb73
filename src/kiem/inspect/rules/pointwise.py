"""Derivatives of what acts on each element by itself: arithmetic, elementary functions, choices."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from kiem.inspect.rules.table import Call, rule

XY = {"self": "x", "0": "y"}
AB = {"self": "a", "other": "b", "0": "y"}


def number_as_tensor(value: Tensor | float, like: Tensor) -> Tensor:
    """A number as a tensor, so that both are treated alike."""
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=like.dtype, device=like.device)


# -- arithmetic --------------------------------------------------------------------------------------------------------


@rule("add", forward="y = a + α · b", symbols=AB | {"alpha": "α"}, pointwise=True, self="g", other="α · g")
def add(c: Call, g: Tensor):
    return {"self": g, "other": g * c.get("alpha", 1)}


@rule("sub", forward="y = a − α · b", symbols=AB | {"alpha": "α"}, pointwise=True, self="g", other="−α · g")
def sub(c: Call, g: Tensor):
    return {"self": g, "other": -g * c.get("alpha", 1)}


@rule("rsub", forward="y = b − α · a", symbols=AB | {"alpha": "α"}, pointwise=True, self="−α · g", other="g")
def rsub(c: Call, g: Tensor):
    return {"self": -g * c.get("alpha", 1), "other": g}


@rule("mul", forward="y = a · b", symbols=AB, pointwise=True, self="g · b", other="g · a")
def mul(c: Call, g: Tensor):
    return {"self": g * c["other"], "other": g * c["self"]}


@rule("div.Tensor", "div.Scalar", forward="y = a / b", symbols=AB, pointwise=True, self="g / b", other="−g · a / b²")
def div(c: Call, g: Tensor):
    return {"self": g / c["other"], "other": -g * c["self"] / (c["other"] * c["other"])}


@rule(
    "div.Tensor_mode",
    "div.Scalar_mode",
    forward="y = a / b; with r: a / b rounded, r how",
    symbols=AB | {"rounding_mode": "r"},
    pointwise=True,
    kink="rounded: constant but for jumps, so 0",
    self="g / b; with r: 0",
    other="−g · a / b²; with r: 0",
)
def div_mode(c: Call, g: Tensor):
    return div(c, g if c["rounding_mode"] is None else torch.zeros_like(g))


@rule("pow.Tensor_Scalar", forward="y = x^p", symbols=XY | {"exponent": "p"}, pointwise=True, self="g · p · x^(p − 1)")
def pow_number(c: Call, g: Tensor):
    x, p = c["self"], c["exponent"]
    return {"self": torch.zeros_like(g) if p == 0 else g * p * x ** (p - 1)}


@rule(
    "pow.Tensor_Tensor",
    "pow.Scalar",
    forward="y = a^p",
    symbols={"self": "a", "exponent": "p", "0": "y"},
    pointwise=True,
    kink="for the exponent, where a = 0 and p ≥ 0: 0",
    self="g · p · a^(p − 1)",
    exponent="g · y · ln(a)",
)
def pow_tensor(c: Call, g: Tensor):
    a, p = number_as_tensor(c["self"], g), c["exponent"]
    zero = torch.zeros_like(g)
    return {
        "self": torch.where(p == 0, zero, g * p * a ** (p - 1)),
        "exponent": torch.where((a == 0) & (p.real >= 0), zero, g * c.y * a.log()),
    }


@rule(
    "addcmul",
    forward="y = x + c · a · b",
    symbols={"self": "x", "tensor1": "a", "tensor2": "b", "value": "c", "0": "y"},
    pointwise=True,
    self="g",
    tensor1="g · c · b",
    tensor2="g · c · a",
)
def addcmul(c: Call, g: Tensor):
    v = c.get("value", 1)
    return {"self": g, "tensor1": g * v * c["tensor2"], "tensor2": g * v * c["tensor1"]}


@rule(
    "addcdiv",
    forward="y = x + c · a / b",
    symbols={"self": "x", "tensor1": "a", "tensor2": "b", "value": "c", "0": "y"},
    pointwise=True,
    self="g",
    tensor1="g · c / b",
    tensor2="−g · c · a / b²",
)
def addcdiv(c: Call, g: Tensor):
    v, a, b = c.get("value", 1), c["tensor1"], c["tensor2"]
    return {"self": g, "tensor1": g * v / b, "tensor2": -g * v * a / (b * b)}


@rule(
    "lerp",
    forward="y = a + w · (b − a)",
    symbols={"self": "a", "end": "b", "weight": "w", "0": "y"},
    pointwise=True,
    self="g · (1 − w)",
    end="g · w",
    weight="g · (b − a)",
)
def lerp(c: Call, g: Tensor):
    w = c["weight"]
    return {"self": g * (1 - w), "end": g * w, "weight": g * (c["end"] - c["self"])}


@rule(
    "fmod",
    "remainder",
    forward="y = a − n · b, n a whole number",
    symbols=AB,
    pointwise=True,
    self="g",
    other="−g · n",
    kink="where n jumps",
)
def remainder(c: Call, g: Tensor):
    return {"self": g, "other": -g * ((c["self"] - c.y) / c["other"]).round()}


@rule(
    "atan2",
    forward="y = angle of (b, a)",
    symbols=AB,
    pointwise=True,
    self="g · b / (a² + b²)",
    other="−g · a / (a² + b²)",
)
def atan2(c: Call, g: Tensor):
    a, b = c["self"], c["other"]
    return {"self": g * b / (a * a + b * b), "other": -g * a / (a * a + b * b)}


@rule("hypot", forward="y = √(a² + b²)", symbols=AB, pointwise=True, self="g · a / y", other="g · b / y")
def hypot(c: Call, g: Tensor):
    return {"self": g * c["self"] / c.y, "other": g * c["other"] / c.y}


@rule(
    "logaddexp",
    forward="y = ln(exp(a) + exp(b))",
    symbols=AB,
    pointwise=True,
    self="g · exp(a − y)",
    other="g · exp(b − y)",
)
def logaddexp(c: Call, g: Tensor):
    return {"self": g * (c["self"] - c.y).exp(), "other": g * (c["other"] - c.y).exp()}


@rule(
    "xlogy",
    forward="y = a · ln(b)",
    symbols=AB,
    pointwise=True,
    self="g · ln(b)",
    other="g · a / b",
    kink="at a = 0 and b ≤ 0: 0",
)
def xlogy(c: Call, g: Tensor):
    a, b = number_as_tensor(c["self"], g), number_as_tensor(c["other"], g)
    return {"self": torch.where((a == 0) & (b <= 0), 0.0, g * b.log()), "other": g * a / b}


# -- functions of one number -------------------------------------------------------------------------------------------


def function(
    op: str,
    forward: str,
    derivative: str,
    factor: Callable[[Tensor, Tensor], Tensor],
    kink: str = "",
    holomorphic: bool = True,
) -> None:
    """A row for y = f(x); factor(x, y) = f'(x)."""

    def vjp(c: Call, g: Tensor):
        return {"self": g * factor(c["self"], c.y)}

    rule(
        op,
        forward=f"y = {forward}",
        symbols=XY,
        kink=kink,
        pointwise=True,
        holomorphic=holomorphic,
        self=derivative,
    )(vjp)


for row in (
    ("neg", "−x", "−g", lambda x, y: -1),
    ("exp", "exp(x)", "g · y", lambda x, y: y),
    ("exp2", "2^x", "g · y · ln(2)", lambda x, y: y * math.log(2)),
    ("expm1", "exp(x) − 1", "g · (y + 1)", lambda x, y: y + 1),
    ("log", "ln(x)", "g / x", lambda x, y: 1 / x),
    ("log2", "ln(x) / ln(2)", "g / (x · ln(2))", lambda x, y: 1 / (x * math.log(2))),
    ("log10", "ln(x) / ln(10)", "g / (x · ln(10))", lambda x, y: 1 / (x * math.log(10))),
    ("log1p", "ln(1 + x)", "g / (1 + x)", lambda x, y: 1 / (1 + x)),
    ("sqrt", "√x", "g / (2 · y)", lambda x, y: 1 / (2 * y)),
    ("rsqrt", "1 / √x", "−g · y³ / 2", lambda x, y: -(y**3) / 2),
    ("reciprocal", "1 / x", "−g · y²", lambda x, y: -y * y),
    ("square", "x²", "g · 2 · x", lambda x, y: 2 * x),
    ("sin", "sin(x)", "g · cos(x)", lambda x, y: x.cos()),
    ("cos", "cos(x)", "−g · sin(x)", lambda x, y: -x.sin()),
    ("tan", "tan(x)", "g · (1 + y²)", lambda x, y: 1 + y * y),
    ("asin", "arcsin(x)", "g / √(1 − x²)", lambda x, y: (1 - x * x).rsqrt()),
    ("acos", "arccos(x)", "−g / √(1 − x²)", lambda x, y: -(1 - x * x).rsqrt()),
    ("atan", "arctan(x)", "g / (1 + x²)", lambda x, y: 1 / (1 + x * x)),
    ("sinh", "sinh(x)", "g · cosh(x)", lambda x, y: x.cosh()),
    ("cosh", "cosh(x)", "g · sinh(x)", lambda x, y: x.sinh()),
    ("tanh", "tanh(x)", "g · (1 − y²)", lambda x, y: 1 - y * y),
    ("asinh", "arsinh(x)", "g / √(x² + 1)", lambda x, y: (x * x + 1).rsqrt()),
    ("acosh", "arcosh(x)", "g / (√(x − 1) · √(x + 1))", lambda x, y: (x - 1).rsqrt() * (x + 1).rsqrt()),
    ("atanh", "artanh(x)", "g / (1 − x²)", lambda x, y: 1 / (1 - x * x)),
    ("erf", "erf(x)", "g · 2 / √π · exp(−x²)", lambda x, y: 2 / math.sqrt(math.pi) * (-x * x).exp()),
    ("erfc", "1 − erf(x)", "−g · 2 / √π · exp(−x²)", lambda x, y: -2 / math.sqrt(math.pi) * (-x * x).exp()),
    ("erfinv", "erf⁻¹(x)", "g · √π / 2 · exp(y²)", lambda x, y: math.sqrt(math.pi) / 2 * (y * y).exp()),
    ("lgamma", "ln Γ(x)", "g · ψ(x)", lambda x, y: torch.digamma(x)),
    ("sigmoid", "σ(x) = 1 / (1 + exp(−x))", "g · y · (1 − y)", lambda x, y: y * (1 - y)),
    ("abs", "|x|", "g · sign(x)", lambda x, y: x.sgn(), "at x = 0: 0", False),
    ("relu", "x if x > 0, else 0", "g if x > 0, else 0", lambda x, y: (x > 0).to(x.dtype), "at x = 0: 0"),
    ("silu", "x · σ(x)", "g · σ(x) · (1 + x · (1 − σ(x)))", lambda x, y: x.sigmoid() * (1 + x * (1 - x.sigmoid()))),
    ("mish", "x · t, t = tanh(ln(1 + exp(x)))", "g · (t + x · σ(x) · (1 − t²))", lambda x, y: mish(x)),
    ("hardswish", "x · clip(x + 3, 0, 6) / 6", "g · (2 · x + 3) / 6 if −3 < x < 3; g if x ≥ 3; else 0",
     lambda x, y: torch.where(x >= 3, 1.0, torch.where(x > -3, (2 * x + 3) / 6, 0.0)), "at x = −3 and 3"),
    ("hardsigmoid", "clip(x + 3, 0, 6) / 6", "g / 6 if −3 < x < 3, else 0",
     lambda x, y: ((x > -3) & (x < 3)).to(x.dtype) / 6, "at x = −3 and 3: 0"),
    ("nan_to_num", "x where finite", "g if x is finite, else 0", lambda x, y: x.isfinite().to(x.dtype)),
    ("frac", "x − whole part of x", "g", lambda x, y: 1, "at whole numbers"),
    ("positive", "x", "g", lambda x, y: 1),
    ("_neg_view", "−x", "−g", lambda x, y: -1),
):  # fmt: skip
    function(*row)

for name, text in (
    ("sign", "sign(x)"),
    ("floor", "x rounded down"),
    ("ceil", "x rounded up"),
    ("round", "x rounded"),
    ("trunc", "x rounded to zero"),
):
    function(name, text, "0", lambda x, y: torch.zeros_like(x), "where y jumps")


def mish(x: Tensor) -> Tensor:
    """d/dx of x · tanh(softplus(x))."""
    t = torch.log1p(x.exp()).tanh()
    return t + x * x.sigmoid() * (1 - t * t)


@rule(
    "logit",
    forward="y = ln(x / (1 − x)), x within ε and 1 − ε",
    symbols=XY | {"eps": "ε"},
    pointwise=True,
    self="g / (x · (1 − x)); with ε: g / (x · (1 − x)) if ε ≤ x ≤ 1 − ε, else 0",
    kink="at ε and 1 − ε: g / (x · (1 − x))",
)
def logit(c: Call, g: Tensor):
    x, eps = c["self"], c["eps"]
    slope = 1 / (x * (1 - x))
    return {"self": g * (slope if eps is None else torch.where((x >= eps) & (x <= 1 - eps), slope, 0.0))}


# -- choices -----------------------------------------------------------------------------------------------------------


@rule(
    "clamp",
    forward="y = x within l and h, else the bound",
    symbols=XY | {"min": "l", "max": "h"},
    pointwise=True,
    self="g if l ≤ x ≤ h, else 0",
    min="g if x < l < h, else 0",
    max="g if x > h, else 0",
    kink="at a bound: g for x; where l > h, y = h: g for h",
)
def clamp(c: Call, g: Tensor):
    x, zero = c["self"], torch.zeros_like(g)
    low, high = number_as_tensor(c.get("min", -math.inf), g), number_as_tensor(c.get("max", math.inf), g)
    return {
        "self": torch.where((x >= low) & (x <= high), g, zero),
        "min": torch.where((x < low) & (low < high), g, zero),
        "max": torch.where((x > high) | (high < low), g, zero),
    }


@rule(
    "clamp_min",
    forward="y = x if x ≥ l, else l",
    symbols=XY | {"min": "l"},
    pointwise=True,
    self="g if x ≥ l, else 0",
    min="g if x < l, else 0",
    kink="at x = l: g for x",
)
def clamp_min(c: Call, g: Tensor):
    above = c["self"] >= c["min"]
    return {"self": torch.where(above, g, 0.0), "min": torch.where(above, 0.0, g)}


@rule(
    "clamp_max",
    forward="y = x if x ≤ h, else h",
    symbols=XY | {"max": "h"},
    pointwise=True,
    self="g if x ≤ h, else 0",
    max="g if x > h, else 0",
    kink="at x = h: g for x",
)
def clamp_max(c: Call, g: Tensor):
    below = c["self"] <= c["max"]
    return {"self": torch.where(below, g, 0.0), "max": torch.where(below, 0.0, g)}


@rule(
    "maximum",
    forward="y = the larger of a and b",
    symbols=AB,
    pointwise=True,
    self="g if a > b, else 0",
    other="g if b > a, else 0",
    kink="where a = b: g / 2 for each",
)
def maximum(c: Call, g: Tensor):
    a, b = c["self"], c["other"]
    half = torch.where(a == b, g / 2, 0.0)
    return {"self": torch.where(a > b, g, half), "other": torch.where(b > a, g, half)}


@rule(
    "minimum",
    forward="y = the smaller of a and b",
    symbols=AB,
    pointwise=True,
    self="g if a < b, else 0",
    other="g if b < a, else 0",
    kink="where a = b: g / 2 for each",
)
def minimum(c: Call, g: Tensor):
    a, b = c["self"], c["other"]
    half = torch.where(a == b, g / 2, 0.0)
    return {"self": torch.where(a < b, g, half), "other": torch.where(b < a, g, half)}


@rule(
    "where",
    forward="y = a if the condition holds, else b",
    symbols=AB | {"condition": "k"},
    pointwise=True,
    self="g if k, else 0",
    other="0 if k, else g",
)
def where(c: Call, g: Tensor):
    return {"self": torch.where(c["condition"].bool(), g, 0.0), "other": torch.where(c["condition"].bool(), 0.0, g)}


@rule(
    "masked_fill",
    forward="y = v if masked, else x",
    symbols=XY | {"mask": "m", "value": "v"},
    pointwise=True,
    self="0 if m, else g",
    value="g if m, else 0",
)
def masked_fill(c: Call, g: Tensor):
    mask = c["mask"].bool()
    return {"self": torch.where(mask, 0.0, g), "value": torch.where(mask, g, 0.0)}
