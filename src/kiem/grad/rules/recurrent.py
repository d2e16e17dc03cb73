"""The derivative of a fused recurrent layer: one layer of an LSTM, one direction (Hochreiter and Schmidhuber 1997).

Shapes: T time, B batch, I input size, H hidden size. The four gates lie behind each other in the weights: i, f, c̃, o.
"""

import torch
from torch import Tensor

from kiem.grad.rules.table import Call, rule

LSTM = 2  # of the modes of this operation: plain recurrent layers and the GRU are others


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
    """No entry for another mode, or when the workspace has a gradient."""
    if c["mode"] != LSTM or c["batch_sizes"] or any(g is not None for g in gradients[3:]):
        return {}
    x_TBI, w, u = c["input"], c["weight0"], c["weight1"]
    bias = c["weight2"] + c["weight3"] if c["has_biases"] else torch.zeros_like(w[:, 0])
    h, cell = (c[name].reshape(x_TBI.shape[1], -1) for name in ("hx_", "cx_"))
    order = list(range(x_TBI.shape[0]))
    if c["reverse"]:
        order.reverse()
    steps = []
    for t in order:
        i, f, new, o = (x_TBI[t] @ w.mT + h @ u.mT + bias).chunk(4, -1)
        i, f, new, o = i.sigmoid(), f.sigmoid(), new.tanh(), o.sigmoid()
        steps.append((t, h, cell, i, f, new, o))
        cell = f * cell + i * new
        h = o * cell.tanh()
    gy, gh, gc = (None if g is None else g.reshape(-1, *h.shape) for g in gradients[:3])
    gh, gc = (torch.zeros_like(h) if g is None else g[0] for g in (gh, gc))
    found = {"input": torch.zeros_like(x_TBI), "weight0": torch.zeros_like(w), "weight1": torch.zeros_like(u)}
    gb = torch.zeros_like(bias)
    for t, before, cell, i, f, new, o in reversed(steps):
        gh = gh if gy is None else gh + gy[t]
        top = (f * cell + i * new).tanh()
        gc = gc + gh * o * (1 - top * top)
        gz = torch.cat(
            [gc * new * i * (1 - i), gc * cell * f * (1 - f), gc * i * (1 - new * new), gh * top * o * (1 - o)], -1
        )
        found["input"][t] = gz @ w
        found["weight0"] += gz.mT @ x_TBI[t]
        found["weight1"] += gz.mT @ before
        gb = gb + gz.sum(0)
        gh, gc = gz @ u, gc * f
    return found | {"weight2": gb, "weight3": gb, "hx_": gh.reshape(c["hx_"].shape), "cx_": gc.reshape(c["cx_"].shape)}
