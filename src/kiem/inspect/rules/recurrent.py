"""Derivatives of fused recurrent operations: a layer of an LSTM in one direction, one step of it, one step of a GRU.

Shapes: T time, B batch, I input size, H hidden size. The gates lie behind each other in the weights: i, f, c̃, o in an
LSTM (Hochreiter and Schmidhuber 1997), r, u, n in a GRU (Cho et al. 2014, arXiv:1406.1078, with r inside the product).
"""

import torch
from torch import Tensor

from kiem.inspect.rules.table import Call, rule

LSTM = 2  # of the modes of a layer: plain recurrent layers and the GRU are others


def lstm_gates(z: Tensor) -> tuple[Tensor, ...]:
    """i, f, c̃, o."""
    i, f, new, o = z.chunk(4, -1)
    return i.sigmoid(), f.sigmoid(), new.tanh(), o.sigmoid()


def lstm_step(gh: Tensor, gc: Tensor, cell: Tensor, gates: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """∂z and ∂c of the cell before the step, from those of h and the cell after it."""
    i, f, new, o = gates
    top = (f * cell + i * new).tanh()
    gc = gc + gh * o * (1 - top * top)
    parts = gc * new * i * (1 - i), gc * cell * f * (1 - f), gc * i * (1 - new * new), gh * top * o * (1 - o)
    return torch.cat(parts, -1), gc * f


@rule(
    "mkldnn_rnn_layer",
    forward="i, f, o = σ(z), c̃ = tanh(z), z = W x + U h + b; c ← f · c + i · c̃; y = h ← o · tanh(c)",
    symbols={
        "input": "x",
        "weight0": "W",
        "weight1": "U",
        "weight2": "b",
        "weight3": "b",
        "hx_": "h",
        "cx_": "c",
        "0": "y",
    },
    every=True,
    input="Wᵀ ∂z, back through time: ∂c ← f · ∂c + ∂h · o · (1 − tanh²(c))",
    weight0="Σ ∂z xᵀ over time",
    weight1="Σ ∂z hᵀ over time",
    weight2="Σ ∂z over time",
    weight3="Σ ∂z over time",
    hx_="Uᵀ ∂z of the first step, ∂z from ∂o, ∂c · c̃, ∂c · c, ∂c · i times the slopes of σ and tanh",
    cx_="f · ∂c of the first step",
)
def lstm_layer(c: Call, gradients: tuple) -> dict[str, Tensor]:
    """KeyError for another mode, or when the workspace has a gradient."""
    if c["mode"] != LSTM or c["batch_sizes"] or any(g is not None for g in gradients[3:]):
        raise KeyError("no closed form of this layer")
    x_TBI, w, u = c["input"], c["weight0"], c["weight1"]
    bias = c["weight2"] + c["weight3"] if c["has_biases"] else torch.zeros_like(w[:, 0])
    h, cell = (c[name].reshape(x_TBI.shape[1], -1) for name in ("hx_", "cx_"))
    order = list(range(x_TBI.shape[0]))
    if c["reverse"]:
        order.reverse()
    steps = []
    for t in order:
        i, f, new, o = lstm_gates(x_TBI[t] @ w.mT + h @ u.mT + bias)
        steps.append((t, h, cell, (i, f, new, o)))
        cell = f * cell + i * new
        h = o * cell.tanh()
    gy, gh, gc = (None if g is None else g.reshape(-1, *h.shape) for g in gradients[:3])
    gh, gc = (torch.zeros_like(h) if g is None else g[0] for g in (gh, gc))
    found = {"input": torch.zeros_like(x_TBI), "weight0": torch.zeros_like(w), "weight1": torch.zeros_like(u)}
    gb = torch.zeros_like(bias)
    for t, before, cell, gates in reversed(steps):
        gz, gc = lstm_step(gh if gy is None else gh + gy[t], gc, cell, gates)
        found["input"][t] = gz @ w
        found["weight0"] += gz.mT @ x_TBI[t]
        found["weight1"] += gz.mT @ before
        gb = gb + gz.sum(0)
        gh = gz @ u
    return found | {"weight2": gb, "weight3": gb, "hx_": gh.reshape(c["hx_"].shape), "cx_": gc.reshape(c["cx_"].shape)}


CELL = {"input_gates": "a", "hidden_gates": "b", "input_bias": "d", "hidden_bias": "e"}


@rule(
    "_thnn_fused_lstm_cell",
    forward="y₀ = o · tanh(y₁), y₁ = f · c + i · c̃; i, f, o = σ(z), c̃ = tanh(z), z = a + d + b + e",
    symbols=CELL | {"cx": "c", "0": "y₀", "1": "y₁"},
    every=True,
    input_gates="∂z, from ∂c · c̃, ∂c · c, ∂c · i, g₀ · tanh(y₁) times the slopes; ∂c = g₁ + g₀ · o · (1 − tanh²(y₁))",
    hidden_gates="∂z",
    cx="∂c · f",
    input_bias="Σ ∂z",
    hidden_bias="Σ ∂z",
)
def lstm_cell(c: Call, gradients: tuple) -> dict[str, Tensor]:
    """KeyError when the workspace has a gradient."""
    if gradients[2] is not None:
        raise KeyError("no closed form for the workspace")
    gh, gc = (torch.zeros_like(c["cx"]) if g is None else g for g in gradients[:2])
    z = c["input_gates"] + c.get("input_bias", 0) + c["hidden_gates"] + c.get("hidden_bias", 0)
    gz, before = lstm_step(gh, gc, c["cx"], lstm_gates(z))
    return {"cx": before} | dict.fromkeys(("input_gates", "hidden_gates", "input_bias", "hidden_bias"), gz)


@rule(
    "_thnn_fused_gru_cell",
    forward="y = n + u · (h − n), n = tanh(a + d + r · (b + e)); r, u = σ(a + d + b + e)",
    symbols=CELL | {"hx": "h", "0": "y"},
    input_gates="∂r = ∂n · (b + e) · r · (1 − r), ∂u = g · (h − n) · u · (1 − u), ∂n = g · (1 − u) · (1 − n²)",
    hidden_gates="∂r, ∂u, ∂n · r",
    hx="g · u",
    input_bias="Σ ∂r, ∂u, ∂n",
    hidden_bias="Σ ∂r, ∂u, ∂n · r",
)
def gru_cell(c: Call, g: Tensor) -> dict[str, Tensor]:
    h = c["hx"]
    a_r, a_u, a_n = (c["input_gates"] + c.get("input_bias", 0)).chunk(3, -1)
    b_r, b_u, b_n = (c["hidden_gates"] + c.get("hidden_bias", 0)).chunk(3, -1)
    r, u = (a_r + b_r).sigmoid(), (a_u + b_u).sigmoid()
    n = (a_n + r * b_n).tanh()
    gn = g * (1 - u) * (1 - n * n)
    gu = g * (h - n) * u * (1 - u)
    gr = gn * b_n * r * (1 - r)
    inner, outer = torch.cat([gr, gu, gn], -1), torch.cat([gr, gu, gn * r], -1)
    return {
        "input_gates": inner,
        "hidden_gates": outer,
        "hx": g * u,
        "input_bias": inner,
        "hidden_bias": outer,
    }
