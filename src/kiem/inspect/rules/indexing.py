"""Derivatives of what picks or places elements by index or mask: the gradient goes back where the element came from."""

import torch
from torch import Tensor

from kiem.inspect.rules.table import Call, rule

XY = {"self": "x", "0": "y"}


@rule("index", "_unsafe_index", forward="y = x[indices]", symbols=XY, self="g added at the indices, else 0")
def index(c: Call, g: Tensor):
    return {"self": torch.ops.aten.index_put(torch.zeros_like(c["self"]), c.members("indices"), g, True)}


@rule("index_select", forward="y = x[index] along an axis", symbols=XY, self="g added at the index, else 0")
def index_select(c: Call, g: Tensor):
    return {"self": torch.zeros_like(c["self"]).index_add(c["dim"], c["index"], g)}


@rule("gather", forward="y[i] = x[index[i]]", symbols=XY, self="g[i] added at index[i], else 0")
def gather(c: Call, g: Tensor):
    return {"self": torch.zeros_like(c["self"]).scatter_add(c["dim"], c["index"], g)}


@rule("masked_select", forward="y = the x where masked", symbols=XY, self="g back in its places, else 0")
def masked_select(c: Call, g: Tensor):
    mask = c["mask"].expand(torch.broadcast_shapes(c["self"].shape, c["mask"].shape))
    return {"self": torch.zeros(mask.shape, dtype=g.dtype, device=g.device).masked_scatter(mask, g)}


@rule(
    "scatter.src",
    "scatter.value",
    forward="y = x, but y[index[i]] = s[i]",
    symbols=XY | {"src": "s"},
    self="g, 0 at the index",
    src="g[index[i]]",
    kink="an index given twice: g for each",
)
def scatter(c: Call, g: Tensor):
    found = {"self": g.scatter(c["dim"], c["index"], 0.0)}
    return found | ({"src": g.gather(c["dim"], c["index"])} if "src" in c.inputs else {})


@rule("scatter_add", forward="y = x, and y[index[i]] += s[i]", symbols=XY | {"src": "s"}, self="g", src="g[index[i]]")
def scatter_add(c: Call, g: Tensor):
    return {"self": g, "src": g.gather(c["dim"], c["index"])}


@rule(
    "scatter_reduce",
    forward="y[j] = sum, mean or extreme of x[j] and the s[i] with index[i] = j",
    symbols=XY | {"src": "s"},
    self="g (sum), g / n (mean), equal parts to those that are y (extreme)",
    src="g[index[i]] (sum), / n (mean), equal parts to those that are y (extreme)",
)
def scatter_reduce(c: Call, g: Tensor):
    dim, at, x, src, kind = c["dim"], c["index"], c["self"], c["src"], c["reduce"]
    if kind == "prod":
        raise KeyError("no closed form of a product")
    own = torch.ones_like(x) if c.get("include_self", True) else torch.ones_like(x).scatter(dim, at, 0.0)
    if kind in ("sum", "mean"):
        mine, theirs = own, torch.ones_like(src)
    else:
        mine, theirs = own * (x == c.y), (src == c.y.gather(dim, at)).to(g.dtype)
    parts = mine.scatter_add(dim, at, theirs) if kind != "sum" else torch.ones_like(x)
    g = g / parts.clamp(min=1)
    return {"self": g * mine, "src": g.gather(dim, at) * theirs}


@rule(
    "index_put",
    "_index_put_impl",
    "_unsafe_index_put",
    forward="y = x, but y[indices] = v (or += v)",
    symbols=XY | {"values": "v"},
    self="g, 0 at the indices (g if added)",
    values="g[indices]",
)
def index_put(c: Call, g: Tensor):
    at, zero = c.members("indices"), torch.zeros((), dtype=g.dtype, device=g.device)
    kept = g if c.get("accumulate", False) else torch.ops.aten.index_put(g, at, zero)
    return {"self": kept, "values": torch.ops.aten.index(g, at)}


@rule(
    "index_add",
    forward="y = x, and y[index] += α · s",
    symbols=XY | {"source": "s", "alpha": "α"},
    self="g",
    source="α · g[index]",
)
def index_add(c: Call, g: Tensor):
    return {"self": g, "source": c.get("alpha", 1) * g.index_select(c["dim"], c["index"]).reshape(c["source"].shape)}


@rule(
    "index_copy",
    forward="y = x, but y[index] = s",
    symbols=XY | {"source": "s"},
    self="g, 0 at the index",
    source="g[index]",
)
def index_copy(c: Call, g: Tensor):
    part = g.index_select(c["dim"], c["index"]).reshape(c["source"].shape)
    return {"self": g.index_fill(c["dim"], c["index"], 0.0), "source": part}


@rule(
    "index_fill",
    forward="y = x, but y[index] = v",
    symbols=XY | {"value": "v"},
    self="g, 0 at the index",
    value="Σ g[index]",
)
def index_fill(c: Call, g: Tensor):
    return {
        "self": g.index_fill(c["dim"], c["index"], 0.0),
        "value": g.index_select(c["dim"], c["index"].unique()).sum(),
    }


@rule(
    "masked_scatter",
    forward="y = x, but where masked the next element of s",
    symbols=XY | {"source": "s"},
    self="0 where masked, else g",
    source="g where masked, in order; 0 for what is left over",
)
def masked_scatter(c: Call, g: Tensor):
    mask, source = c["mask"].expand(g.shape), c["source"]
    taken = g[mask]
    rest = torch.zeros(source.numel() - taken.numel(), dtype=g.dtype, device=g.device)
    return {"self": g.masked_fill(mask, 0.0), "source": torch.cat([taken, rest]).reshape(source.shape)}
