"""The derivative of attention: y = P V with P = softmax(s · Q Kᵀ + M), for all fused forms of it.

Shapes: B batch, H heads, T queries, S keys, K head size. With G P's gradient: dV = Pᵀ G, and through P = softmax(X)
dX = P · (G Vᵀ − Σ G · Y), dQ = s · dX K, dK = s · dXᵀ Q (Dao et al. 2022, arXiv:2205.14135, appendix B).
"""

import torch
from torch import Tensor

from kiem.inspect.rules.table import Call, rule


def weights(c: Call, q: Tensor, k: Tensor, scale: float) -> Tensor:
    """P (B, H, T, S): 0 where a query may not look; a query that may look nowhere has a row of zeros."""
    scores = scale * (q @ k.mT)
    if c.get("is_causal", False):
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~allowed, -torch.inf)
    mask = c.get("attn_mask", c["attn_bias"])
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    top = scores.amax(-1, keepdim=True)
    e = (scores - torch.where(top.isfinite(), top, 0.0)).exp()
    return e / e.sum(-1, keepdim=True).clamp(min=torch.finfo(e.dtype).tiny)


def repeated(t: Tensor, heads: int) -> Tensor:
    """Each key-value head as often as queries share it."""
    return t if t.ndim < 4 or t.shape[-3] == heads else t.repeat_interleave(heads // t.shape[-3], -3)


def gathered(g: Tensor, like: Tensor) -> Tensor:
    """The sum over the queries that shared a head."""
    if like.ndim < 4 or g.shape[-3] == like.shape[-3]:
        return g
    return g.unflatten(-3, (like.shape[-3], -1)).sum(-3)


def attention(c: Call, g: Tensor):
    """KeyError with dropout: the operation does not show which weights it dropped."""
    q, heads = c["query"], c["query"].shape[-3] if c["query"].ndim > 2 else 1
    k, v = repeated(c["key"], heads), repeated(c["value"], heads)
    if c.get("dropout_p", 0.0):
        raise KeyError("no closed form with dropout")
    scale = c.get("scale", q.shape[-1] ** -0.5)
    p = weights(c, q, k, scale)
    gp = g @ v.mT
    gx = p * (gp - (g * c.y).sum(-1, keepdim=True))  # Σ G Vᵀ · P = Σ G · Y
    return {
        "query": scale * (gx @ k),
        "key": gathered(scale * (gx.mT @ q), c["key"]),
        "value": gathered(p.mT @ g, c["value"]),
        "attn_mask": gx,
        "attn_bias": gx,
    }


# s is `scale`, or 1 / √K where none is given: no factor to leave out.
SYMBOLS = {"query": "Q", "key": "K", "value": "V", "0": "Y"}
SCORES = "P · (G Vᵀ − Σ G · Y)"
DERIVATIVES = {"query": f"s · X̄ K, X̄ = {SCORES}", "key": f"s · X̄ᵀ Q, X̄ = {SCORES}", "value": "Pᵀ G"}


def attends(*names: str, scores: str, symbols: dict[str, str], derivatives: dict[str, str]) -> None:
    """A row for fused attention of these scores."""
    rule(
        *names,
        forward=f"Y = P V, P = softmax({scores})",
        symbols=SYMBOLS | symbols,
        kink="",
        pointwise=False,
        every=False,
        holomorphic=True,
        **DERIVATIVES,
        **derivatives,
    )(attention)


for mask, names in (
    ("attn_mask", ["_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_attention_math",
                   "scaled_dot_product_attention"]),
    ("attn_bias", ["_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
                   "_scaled_dot_product_fused_attention_overrideable"]),
):  # fmt: skip
    attends(*names, scores="s · Q Kᵀ + M", symbols={mask: "M"}, derivatives={mask: SCORES})
attends("_scaled_dot_product_flash_attention", scores="s · Q Kᵀ", symbols={}, derivatives={})
