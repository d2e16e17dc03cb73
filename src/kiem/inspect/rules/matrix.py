"""Derivatives of products of matrices and vectors, convolutions, and what is solved with matrices.

In the formulas capital letters are matrices (batches of them in bmm), G the gradient of the output.
"""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kiem.inspect.rules.table import Call, rule

# -- products ----------------------------------------------------------------------------------------------------------


@rule("mm", "bmm", forward="Y = A B", symbols={"self": "A", "mat2": "B", "0": "Y"}, self="G Bᵀ", mat2="Aᵀ G")
def mm(c: Call, g: Tensor):
    return {"self": g @ c["mat2"].mT, "mat2": c["self"].mT @ g}


@rule(
    "addmm",
    "baddbmm",
    "addbmm",
    forward="Y = β · C + α · A B",
    symbols={"self": "C", "mat1": "A", "mat2": "B", "batch1": "A", "batch2": "B", "beta": "β", "alpha": "α", "0": "Y"},
    self="β · G",
    mat1="α · G Bᵀ",
    mat2="α · Aᵀ G",
    batch1="α · G Bᵀ",
    batch2="α · Aᵀ G",
)
def addmm(c: Call, g: Tensor):
    left, right = ("mat1", "mat2") if "mat1" in c.inputs else ("batch1", "batch2")
    alpha, beta = c.get("alpha", 1), c.get("beta", 1)
    return {"self": beta * g, left: alpha * (g @ c[right].mT), right: alpha * (c[left].mT @ g)}


@rule("dot", forward="y = Σ a · b", symbols={"self": "a", "tensor": "b", "0": "y"}, self="g · b", tensor="g · a")
def dot(c: Call, g: Tensor):
    return {"self": g * c["tensor"], "tensor": g * c["self"]}


@rule(
    "vdot",
    forward="y = Σ conj(a) · b",
    symbols={"self": "a", "other": "b", "0": "y"},
    holomorphic=False,
    self="conj(g) · b",
    other="g · a",
)
def vdot(c: Call, g: Tensor):
    return {"self": g.conj() * c["other"], "other": g * c["self"]}


@rule("mv", forward="y = A b", symbols={"self": "A", "vec": "b", "0": "y"}, self="g bᵀ", vec="Aᵀ g")
def mv(c: Call, g: Tensor):
    return {"self": g[:, None] * c["vec"], "vec": c["self"].mT @ g}


@rule(
    "addmv",
    forward="y = β · c + α · A b",
    symbols={"self": "c", "mat": "A", "vec": "b", "beta": "β", "alpha": "α", "0": "y"},
    self="β · g",
    mat="α · g bᵀ",
    vec="α · Aᵀ g",
)
def addmv(c: Call, g: Tensor):
    alpha = c.get("alpha", 1)
    return {"self": c.get("beta", 1) * g, "mat": alpha * g[:, None] * c["vec"], "vec": alpha * (c["mat"].mT @ g)}


@rule(
    "addr",
    forward="Y = β · C + α · a bᵀ",
    symbols={"self": "C", "vec1": "a", "vec2": "b", "beta": "β", "alpha": "α", "0": "Y"},
    self="β · G",
    vec1="α · G b",
    vec2="α · Gᵀ a",
)
def addr(c: Call, g: Tensor):
    alpha = c.get("alpha", 1)
    return {"self": c.get("beta", 1) * g, "vec1": alpha * (g @ c["vec2"]), "vec2": alpha * (g.mT @ c["vec1"])}


@rule(
    "linear",
    forward="Y = X Wᵀ + b",
    symbols={"input": "X", "weight": "W", "bias": "b", "0": "Y"},
    input="G W",
    weight="Gᵀ X",
    bias="Σ G",
)
def linear(c: Call, g: Tensor):
    x, w = c["input"], c["weight"]
    if w.ndim == 1:
        g, w = g[..., None], w[None]
    rows = g.reshape(-1, g.shape[-1])
    weight = rows.mT @ x.reshape(-1, x.shape[-1])
    return {"input": g @ w, "weight": weight.reshape(c["weight"].shape), "bias": rows.sum(0)}


@rule("matmul", forward="Y = A B", symbols={"self": "A", "other": "B", "0": "Y"}, self="G Bᵀ", other="Aᵀ G")
def matmul(c: Call, g: Tensor):
    a, b = c["self"], c["other"]
    if a.ndim == 1:
        a, g = a[None], g.unsqueeze(-2 if b.ndim > 1 else -1)
    if b.ndim == 1:
        b, g = b[:, None], g.unsqueeze(-1)
    left, right = g @ b.mT, a.mT @ g
    if c["self"].ndim == 1:
        left = left.reshape(-1, left.shape[-1]).sum(0)
    if c["other"].ndim == 1:
        right = right.reshape(-1, right.shape[-2]).sum(0)
    return {"self": left, "other": right}


@rule(
    "_trilinear",
    forward="y = Σ a · b · c over the axes summed",
    symbols={"i1": "a", "i2": "b", "i3": "c", "0": "y"},
    i1="Σ g · b · c",
    i2="Σ g · a · c",
    i3="Σ g · a · b",
)
def trilinear(c: Call, g: Tensor):
    parts = {}
    for name in ("1", "2", "3"):
        t = c[f"i{name}"]
        for d in sorted(c[f"expand{name}"]):
            t = t.unsqueeze(d)
        parts[name] = t
    for d in sorted(c["sumdim"]):
        g = g.unsqueeze(d)
    found = {}
    for name in parts:
        product = g
        for other in parts:
            product = product * parts[other] if other != name else product
        found[f"i{name}"] = product.sum_to_size(parts[name].shape).reshape(c[f"i{name}"].shape)
    return found


# -- convolution -------------------------------------------------------------------------------------------------------


@rule(
    "convolution",
    "_convolution",
    forward="Y[n,o,p] = Σ W[o,c,k] · X[n,c,s·p + d·k] + b[o]",
    symbols={"input": "X", "weight": "W", "bias": "b", "0": "Y"},
    input="Σ W[o,c,k] · G[n,o,p] over o and s·p + d·k = i",
    weight="Σ G[n,o,p] · X[n,c,s·p + d·k] over n and p",
    bias="Σ G over n and p",
)
def convolution(c: Call, g: Tensor):
    """For one position of the kernel it is a matrix product of the channels. s stride, d dilation, X padded."""
    x, w, groups = c["input"], c["weight"], c["groups"]
    n_axes = x.ndim - 2
    stride, padding, dilation = (
        list(c[k]) * (1 if len(c[k]) == n_axes else n_axes) for k in ("stride", "padding", "dilation")
    )
    pads = [p for size in reversed(padding) for p in (size, size)]
    found = {"bias": g.sum([0, *range(2, g.ndim)])}
    # Transposed, input and output change places: the small side is scattered into the large one.
    large, small = (F.pad(g, pads), x) if c["transposed"] else (F.pad(x, pads), g)
    large, small = _grouped(large, groups), _grouped(small, groups)
    kernel = w.reshape(groups, w.shape[0] // groups, *w.shape[1:])
    kernel_grad, sum_over = torch.zeros_like(kernel), torch.zeros_like(small if c["transposed"] else large)
    for k in itertools.product(*(range(size) for size in w.shape[2:])):
        windows = [
            slice(d * i, d * i + s * (out - 1) + 1, s)
            for d, i, s, out in zip(dilation, k, stride, small.shape[3:], strict=True)
        ]
        where: tuple = (..., *windows)
        at: tuple = (slice(None), slice(None), slice(None), *k)
        part = large[where]
        kernel_grad[at] = torch.einsum("ngo...,ngc...->goc", small, part)
        if c["transposed"]:
            sum_over += torch.einsum("goc,ngc...->ngo...", kernel[at], part)
        else:
            sum_over[where] += torch.einsum("goc,ngo...->ngc...", kernel[at], small)
    sum_over = sum_over.flatten(1, 2)
    if not c["transposed"]:
        inside: tuple = (..., *(slice(p, p + n) for p, n in zip(padding, x.shape[2:], strict=True)))
        sum_over = sum_over[inside]
    return found | {"input": sum_over, "weight": kernel_grad.reshape(w.shape)}


def _grouped(t: Tensor, groups: int) -> Tensor:
    return t.reshape(t.shape[0], groups, t.shape[1] // groups, *t.shape[2:])


# -- linear algebra ----------------------------------------------------------------------------------------------------


@rule("linalg_inv_ex", forward="Y = A⁻¹", symbols={"A": "A", "0": "Y"}, A="−Yᵀ G Yᵀ")
def inverse(c: Call, g: Tensor):
    return {"A": -c.y.mT @ g @ c.y.mT}


@rule("_linalg_det", forward="y = det A", symbols={"A": "A", "0": "y"}, A="g · y · A⁻ᵀ")
def determinant(c: Call, g: Tensor):
    return {"A": (g * c.y)[..., None, None] * torch.linalg.inv(c["A"]).mT}


@rule(
    "_linalg_slogdet",
    forward="y₀, y₁ = sign, ln |det A|",
    symbols={"A": "A", "0": "y"},
    every=True,
    holomorphic=False,
    A="g₁ · A⁻ᵀ; complex A: (g₁ + i · the imaginary part of g₀ · conj(y₀)) · conj(A⁻ᵀ)",
)
def log_determinant(c: Call, gradients: tuple):
    sign, logarithm, *rest = gradients
    if any(g is not None for g in rest):
        raise KeyError("no closed form for the factors")
    g = torch.zeros_like(c.outputs[1]) if logarithm is None else logarithm
    if sign is not None and sign.is_complex():
        g = torch.complex(g, (sign * c.y.conj()).imag)
    return {"A": g[..., None, None] * torch.linalg.inv(c["A"]).mH}


@rule("_linalg_solve_ex", forward="A Y = B", symbols={"A": "A", "B": "B", "0": "Y"}, A="−A⁻ᵀ G Yᵀ", B="A⁻ᵀ G")
def solve(c: Call, g: Tensor):
    a, y = c["A"], c.y
    vector = c["B"].ndim == 1 or (c["B"].ndim == a.ndim - 1 and c["B"].shape == a.shape[:-1])
    g, y = (g[..., None], y[..., None]) if vector else (g, y)
    if not c.get("left", True):
        b = torch.linalg.solve(a.mT, g, left=False)
        return {"A": -y.mT @ b, "B": b}
    b = torch.linalg.solve(a.mT, g)
    return {"A": -b @ y.mT, "B": b[..., 0] if vector else b}


@rule(
    "linalg_cholesky_ex",
    forward="Y Yᵀ = A, Y lower triangular",
    symbols={"self": "A", "0": "Y"},
    holomorphic=False,
    self="Y⁻ᵀ P Y⁻¹ made symmetric, P = lower half of Yᵀ G, its diagonal halved",
)
def cholesky(c: Call, g: Tensor):
    """Murray 2016, arXiv:1602.07527. Of complex numbers every transpose is conjugated."""
    y = c.y.mH if c.get("upper", False) else c.y
    p = (y.mH @ (g.mH if c.get("upper", False) else g)).tril()
    p = p - torch.diag_embed(p.diagonal(dim1=-2, dim2=-1)) / 2
    inverse = torch.linalg.inv(y)
    s = inverse.mH @ p @ inverse
    return {"self": (s + s.mH) / 2}


@rule("linalg_cross", forward="y = a × b", symbols={"self": "a", "other": "b", "0": "y"}, self="b × g", other="g × a")
def cross(c: Call, g: Tensor):
    a, b = torch.broadcast_tensors(c["self"], c["other"])
    dim = c.get("dim", -1)
    return {"self": torch.linalg.cross(b, g, dim=dim), "other": torch.linalg.cross(g, a, dim=dim)}


@rule(
    "_cdist_forward",
    forward="y[i,j] = |aᵢ − bⱼ|, the norm of order p",
    symbols={"x1": "a", "x2": "b", "p": "p", "0": "y"},
    x1="Σ g · d · |d|^(p − 2) / y^(p − 1) over j, d = aᵢ − bⱼ",
    x2="the same with −g, over i",
    kink="at y = 0: 0",
)
def cdist(c: Call, g: Tensor):
    d, p, y = c["x1"][..., :, None, :] - c["x2"][..., None, :, :], c["p"], c.y[..., None]
    if math.isinf(p):
        slope = d.sign() * (d.abs() == y)
    else:
        slope = torch.zeros_like(d) if p == 0 else d.sign() * (d.abs() / y) ** (p - 1)
    slope = g[..., None] * torch.where(y == 0, 0.0, slope)
    return {"x1": slope.sum(-2), "x2": -slope.sum(-3)}


@rule(
    "_euclidean_dist",
    forward="y[i,j] = √(aᵢ·aᵢ + bⱼ·bⱼ − 2 aᵢ·bⱼ)",
    symbols={"x1": "a", "x2": "b", "0": "y"},
    x1="Σ g · (aᵢ − bⱼ) / y over j",
    x2="Σ g · (bⱼ − aᵢ) / y over i",
    kink="at y = 0: 0",
)
def euclidean_distance(c: Call, g: Tensor):
    a, b = c["x1"], c["x2"]
    squares = c.rounded(a.square().sum(-1, keepdim=True)) + c.rounded(b.square().sum(-1, keepdim=True)).mT
    y = (squares - 2 * c.rounded(a @ b.mT)).clamp_min(0).sqrt()
    ratio = torch.where(y == 0, 0.0, g / y)
    return {
        "x1": c.rounded(a * ratio.sum(-1, keepdim=True)) - c.rounded(ratio @ b),
        "x2": c.rounded(b * ratio.sum(-2).unsqueeze(-1)) - c.rounded(ratio.mT @ a),
    }
