"""Derivatives of the parts of networks: softmax, norms, embeddings, pooling, resizing.

x̂ is the input normalized, r = 1 / √(variance + ε); ⟨·⟩ the mean over what is normalized together.
"""

import torch
from torch import Tensor

from kiem.inspect.rules.table import Call, rule

XY = {"self": "x", "0": "y"}
NORM = {"input": "x", "weight": "w", "bias": "b", "0": "y"}
MEAN, MAX = 1, 2  # of the modes of bags

# -- softmax -----------------------------------------------------------------------------------------------------------


@rule("_softmax", "softmax", "_safe_softmax", forward="y = exp(x) / Σ exp(x)", symbols=XY, self="y · (g − Σ g · y)")
def softmax(c: Call, g: Tensor):
    return {"self": c.y * (g - (g * c.y).sum(c["dim"], keepdim=True))}


@rule("_log_softmax", "log_softmax", forward="y = x − ln(Σ exp(x))", symbols=XY, self="g − exp(y) · Σ g")
def log_softmax(c: Call, g: Tensor):
    return {"self": g - c.y.exp() * g.sum(c["dim"], keepdim=True)}


# -- norms -------------------------------------------------------------------------------------------------------------


def normalized(x: Tensor, g: Tensor, over: list[int], eps: float, c: Call) -> tuple[Tensor, Tensor]:
    """x̂, and the gradient of x for the gradient g of x̂: r · (g − ⟨g⟩ − x̂ · ⟨g · x̂⟩). ⟨x⟩ and r are those that
    the operation gave, if it did: its backward reads them, rounded as they are, which shows where few numbers are
    normalized."""
    saved = c.outputs[1:]
    mean = x.mean(over, keepdim=True)
    r = ((x - mean).square().mean(over, keepdim=True) + eps).rsqrt()
    if len(saved) > 1 and saved[0].numel() == saved[1].numel() == mean.numel():
        mean, r = saved[0].reshape(mean.shape).to(x.dtype), saved[1].reshape(r.shape).to(x.dtype)
    x_hat = (x - mean) * r
    part = x_hat * (g * x_hat).mean(over, keepdim=True)
    return x_hat, r * (g - c.rounded(g.mean(over, keepdim=True)) - c.rounded(part))


@rule(
    "native_layer_norm",
    forward="y = w · x̂ + b, x̂ = (x − ⟨x⟩) · r",
    symbols=NORM,
    input="r · (g·w − ⟨g·w⟩ − x̂ · ⟨g·w · x̂⟩)",
    weight="Σ g · x̂",
    bias="Σ g",
)
def layer_norm(c: Call, g: Tensor):
    x = c["input"]
    over = list(range(x.ndim - len(c["normalized_shape"]), x.ndim))
    x_hat, gx = normalized(x, g * c.get("weight", 1.0), over, c["eps"], c)
    return {"input": gx, "weight": g * x_hat, "bias": g}


@rule(
    "_fused_rms_norm",
    "rms_norm",
    forward="y = w · x · r, r = 1 / √(⟨x²⟩ + ε)",
    symbols={"input": "x", "weight": "w", "0": "y"},
    input="r · (g·w − x̂ · ⟨g·w · x̂⟩), x̂ = x · r",
    weight="Σ g · x̂",
)
def rms_norm(c: Call, g: Tensor):
    x = c["input"]
    over = list(range(x.ndim - len(c["normalized_shape"]), x.ndim))
    # Without ε the smallest step of the data type is meant, of which only the saved r still tells in another type.
    eps = torch.finfo(x.dtype).eps if c["eps"] is None else c["eps"]
    r = c.outputs[1] if c["eps"] is None and len(c.outputs) > 1 else ((x * x).mean(over, keepdim=True) + eps).rsqrt()
    x_hat, gw = x * r, g * c.get("weight", 1.0)
    return {"input": r * (gw - x_hat * (gw * x_hat).mean(over, keepdim=True)), "weight": g * x_hat}


@rule(
    "native_group_norm",
    forward="y = w · x̂ + b, normalized in groups of channels",
    symbols=NORM,
    input="r · (g·w − ⟨g·w⟩ − x̂ · ⟨g·w · x̂⟩)",
    weight="Σ g · x̂",
    bias="Σ g",
)
def group_norm(c: Call, g: Tensor):
    x, shape = c["input"], (c["N"], c["group"], -1)
    w = _by_channel(c["weight"], x) if c["weight"] is not None else 1.0
    x_hat, gx = normalized(x.reshape(shape), (g * w).reshape(shape), [2], c["eps"], c)
    return {"input": gx.reshape(x.shape), **_scale_and_shift(x_hat.reshape(x.shape), g)}


@rule(
    "native_batch_norm",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_functional",
    "_native_batch_norm_legit_no_training",
    "_batch_norm_with_update",
    "_batch_norm_no_update",
    "cudnn_batch_norm",
    "miopen_batch_norm",
    forward="y = w · x̂ + b, normalized over the batch (in training) or by the running moments",
    symbols=NORM,
    input="r · (g·w − ⟨g·w⟩ − x̂ · ⟨g·w · x̂⟩); by running moments r · g·w",
    weight="Σ g · x̂",
    bias="Σ g",
)
def batch_norm(c: Call, g: Tensor):
    x, eps = c["input"], c["eps"] if c["eps"] is not None else c["epsilon"]
    w = _by_channel(c["weight"], x) if c["weight"] is not None else 1.0
    mean, variance = c["running_mean"], c["running_var"]
    # Some overloads have no `training`: those that keep running moments up train, those without any have no other.
    training = c["training"] if c["training"] is not None else c["momentum"] is None or len(c.outputs[1]) > 0
    if training or mean is None:
        x_hat, gx = normalized(x, g * w, [0, *range(2, x.ndim)], eps, c)
    else:
        r = _by_channel((variance + eps).rsqrt(), x)
        x_hat, gx = (x - _by_channel(mean, x)) * r, g * w * r
    return {"input": gx, **_scale_and_shift(x_hat, g)}


def _by_channel(t: Tensor, x: Tensor) -> Tensor:
    return t.reshape(1, -1, *[1] * (x.ndim - 2))


def _scale_and_shift(x_hat: Tensor, g: Tensor) -> dict[str, Tensor]:
    over = [0, *range(2, g.ndim)]
    return {"weight": (g * x_hat).sum(over), "bias": g.sum(over)}


# -- embedding ---------------------------------------------------------------------------------------------------------


@rule(
    "embedding",
    forward="Y = the rows of W at the indices",
    symbols={"weight": "W", "0": "Y"},
    weight="G added at the rows, else 0",
    kink="the row at padding_idx: 0",
)
def embedding(c: Call, g: Tensor):
    w, rows = c["weight"], c["indices"].reshape(-1)
    g = g.reshape(-1, w.shape[1])
    if c.get("padding_idx", -1) >= 0:
        g = torch.where((rows == c["padding_idx"])[:, None], 0.0, g)
    if c.get("scale_grad_by_freq", False):
        g = g / rows.bincount(minlength=w.shape[0])[rows][:, None]
    return {"weight": torch.zeros_like(w).index_add(0, rows, g)}


@rule(
    "_embedding_bag",
    forward="Y = per bag the sum, mean or largest of the rows of W at its indices, weighted by s",
    symbols={"weight": "W", "per_sample_weights": "s", "0": "Y"},
    weight="G of the bag · s (/ n for the mean) added at the rows, or at the largest; else 0",
    per_sample_weights="Σ G of the bag · W[index]",
    kink="several equal: the one at the index returned; the row at padding_idx: 0",
)
def embedding_bag(c: Call, g: Tensor):
    """KeyError if the gradient is scaled by frequency, which is no derivative."""
    if c.get("scale_grad_by_freq", False):
        raise KeyError("no closed form of a scaled gradient")
    w, rows, offsets = c["weight"], c["indices"], c["offsets"]
    bag = torch.searchsorted(offsets, torch.arange(len(rows), dtype=offsets.dtype, device=g.device), right=True) - 1
    kept = (rows != c.get("padding_idx", -1)).to(g.dtype)[:, None]
    n = g.new_zeros(g.shape[0], 1).index_add(0, bag, kept)
    if c.get("mode", 0) == MAX:
        return {"weight": torch.zeros_like(w).scatter_add(0, c.outputs[3], torch.where(n > 0, g, 0.0))}
    g = g[bag] * kept / (n[bag].clamp(min=1) if c.get("mode", 0) == MEAN else 1)
    found = {"per_sample_weights": (g * w[rows]).sum(1)}
    if c["per_sample_weights"] is not None:
        g = g * c["per_sample_weights"][:, None]
    return found | {"weight": torch.zeros_like(w).index_add(0, rows, g)}


# -- pooling and resizing ----------------------------------------------------------------------------------------------


@rule(
    "max_pool2d_with_indices",
    "max_pool3d_with_indices",
    "adaptive_max_pool2d",
    "adaptive_max_pool3d",
    forward="y = the largest x of each window",
    symbols=XY,
    self="Σ g of the windows whose largest it is",
    kink="several equal: the one at the index returned",
)
def max_pool(c: Call, g: Tensor):
    x, n = c["self"], len(c.get("kernel_size", c.get("output_size", [])))
    flat = torch.zeros_like(x).flatten(-n)
    return {"self": flat.scatter_add(-1, c.outputs[1].flatten(-n), g.flatten(-n)).reshape(x.shape)}


def separable(g: Tensor, weights: list[Tensor]) -> Tensor:
    """Pooling and resizing are one matrix per axis (out, in), y = W₁ x W₂ᵀ: the gradient is W₁ᵀ g W₂."""
    for i, w in enumerate(weights):
        axis = g.ndim - len(weights) + i
        g = (g.movedim(axis, -1) @ w.to(g)).movedim(-1, axis)
    return g


@rule(
    "avg_pool2d",
    "avg_pool3d",
    forward="y = mean of each window",
    symbols=XY,
    self="Σ g / k over the windows x[i] is in",
)
def avg_pool(c: Call, g: Tensor):
    x, kernel = c["self"], c["kernel_size"]
    n = 3 if x.ndim == 5 or len(kernel) == 3 else 2
    kernel, stride, padding = (
        list(v) * (1 if len(v) == n else n) for v in (kernel, c.get("stride", []) or kernel, c.get("padding", [0]))
    )
    weights, sizes = [], []
    for k, s, p, size, out in zip(kernel, stride, padding, x.shape[-n:], g.shape[-n:], strict=True):
        start = torch.arange(out, device=g.device)[:, None] * s - p
        stop = (start + k).clamp(max=size + p)
        at = torch.arange(size, device=g.device)
        weights.append(((at >= start) & (at < stop)).to(g.dtype))
        inside = stop.clamp(max=size) - start.clamp(min=0)
        sizes.append((stop - start if c.get("count_include_pad", True) else inside)[:, 0])
    if c["divisor_override"] is not None:
        g = g / c["divisor_override"]
    else:
        for i, size in enumerate(sizes):
            g = g / size.to(g.dtype).reshape(-1, *[1] * (n - 1 - i))
    return {"self": separable(g, weights)}


@rule(
    "_adaptive_avg_pool2d",
    "_adaptive_avg_pool3d",
    forward="y = mean of each window",
    symbols=XY,
    self="Σ g / k over the windows x[i] is in",
)
def adaptive_avg_pool(c: Call, g: Tensor):
    weights = []
    for out, size in zip(c["output_size"], c["self"].shape[-len(c["output_size"]) :], strict=True):
        at, i = torch.arange(size, device=g.device), torch.arange(out, device=g.device)[:, None]
        start, stop = i * size // out, -((-(i + 1) * size) // out)
        weights.append(((at >= start) & (at < stop)).to(g.dtype) / (stop - start))
    return {"self": separable(g, weights)}


def nearest(shift: float, *ops: str) -> None:
    """Rows for y[i] = x[⌊(i + shift) · scale⌋]; the product in float32 as in torch, which decides at the borders."""

    def vjp(c: Call, g: Tensor):
        weights = []
        for out, size, scale in _resized(c, g):
            at = ((torch.arange(out, dtype=torch.float32) + shift) * torch.tensor(scale, dtype=torch.float32)).floor()
            weights.append(torch.eye(size, dtype=g.dtype)[at.long().clamp(max=size - 1)])
        return {"self": separable(g, weights)}

    rule(*ops, forward="y = the nearest x", symbols=XY, self="Σ g over the copies of x[i]")(vjp)


nearest(0.0, "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d")
nearest(0.5, "_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d")


@rule(
    "upsample_linear1d",
    "upsample_bilinear2d",
    "upsample_trilinear3d",
    forward="y = x between its neighbors, weighted by nearness",
    symbols=XY,
    self="Σ g · weight over the y that x[i] is part of",
)
def linear_resize(c: Call, g: Tensor):
    weights = []
    for out, size, scale in _resized(c, g):
        i = torch.arange(out, dtype=g.dtype, device=g.device)
        if c["align_corners"]:
            position = i * ((size - 1) / (out - 1) if out > 1 else 0.0)
        else:
            position = ((i + 0.5) * scale - 0.5).clamp(min=0)
        low = position.floor().clamp(max=size - 1)
        part = (position - low)[:, None]
        first, second = (
            torch.eye(size, dtype=g.dtype, device=g.device)[j.long()] for j in (low, (low + 1).clamp(max=size - 1))
        )
        weights.append((1 - part) * first + part * second)
    return {"self": separable(g, weights)}


def _resized(c: Call, g: Tensor):
    """Per axis: size of the output, of the input, and input steps per output step."""
    n = g.ndim - 2
    names = {1: ["scales"], 2: ["scales_h", "scales_w"], 3: ["scales_d", "scales_h", "scales_w"]}[n]
    given = c.get("scale_factors", [c[name] for name in names])
    for out, size, scale in zip(g.shape[-n:], c["self"].shape[-n:], given, strict=True):
        yield out, size, 1 / scale if scale is not None and scale > 0 else size / out
