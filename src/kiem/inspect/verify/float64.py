"""Operations that torch has no float64 kernel for or refuses to compute a rounding off, written out from simpler ones,
and those that write to a given tensor, as functions.

Shapes: T time, B batch, I input size, H hidden size or heads, S positions, E features."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import _maybe_get_opdef

LSTM = 2  # among the modes of `mkldnn_rnn_layer`


def lstm_layer(
    x_TBI, w_ih, w_hh, b_ih, b_hh, h, c, reverse, batch_sizes, mode, hidden, layers, biases, both, first, train
) -> tuple[Tensor, ...]:
    """One layer, one direction (Hochreiter and Schmidhuber 1997). Raises NotImplementedError for others."""
    if mode != LSTM or batch_sizes:
        raise NotImplementedError("a fused recurrent layer that is no LSTM, or packed, has no float64")
    bias = b_ih + b_hh if biases else 0
    before_h, before_c = h.shape, c.shape
    h, c = h.reshape(x_TBI.shape[1], -1), c.reshape(x_TBI.shape[1], -1)
    outputs = []
    for x in reversed(x_TBI) if reverse else x_TBI:
        i, f, new, o = (x @ w_ih.mT + h @ w_hh.mT + bias).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * new.tanh()
        h = o.sigmoid() * c.tanh()
        outputs.append(h)
    return torch.stack(outputs[::-1] if reverse else outputs), h.reshape(before_h), c.reshape(before_c)


def attention(query, key, value, bias=None, causal=False, scale=None) -> tuple[Tensor, Tensor]:
    """softmax(Q Kᵀ · scale + bias) V and the logarithms of the sums, (B, H, S, E) each; heads of keys are repeated."""
    if key.shape[1] != query.shape[1]:
        key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        scores = scores + bias
    if causal:
        scores = scores.masked_fill(scores.new_ones(scores.shape[-2:]).tril() == 0, float("-inf"))
    return scores.softmax(-1) @ value, scores.logsumexp(-1)


def binary_cross_entropy(x, target, weight=None, reduction=1) -> tuple[Tensor]:
    """Of what may be a rounding beside 0 or 1."""
    return (torch.ops.aten.binary_cross_entropy(x.clamp(0, 1), target.clamp(0, 1), weight, reduction),)


def grouped_mm(a, b, offs=None, bias=None, out_dtype=None) -> tuple[Tensor]:
    """Products of matrices of groups: rows of `a`, columns of `b` or both are cut at `offs`; where neither is, both are
    stacks."""
    if bias is not None:
        raise NotImplementedError("grouped products with a bias")
    if offs is None:
        return (a @ b,)
    cuts = [0, *offs.tolist()]
    groups = [slice(*ends) for ends in itertools.pairwise(cuts)]
    if a.dim() == 2 and b.dim() == 2:
        return (torch.stack([a[:, part] @ b[part] for part in groups]),)
    if a.dim() == 2:
        rest = a.new_zeros(len(a) - cuts[-1], b.shape[-1])  # what is beyond the last group belongs to none
        return (torch.cat([*(a[part] @ matrix for part, matrix in zip(groups, b, strict=True)), rest]),)
    return (torch.cat([matrix @ b[:, part] for part, matrix in zip(groups, a, strict=True)], 1),)


# The arguments of each are those of its schema; dropout is none, or the operation is random and not run again.
WRITTEN_OUT: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "mkldnn_rnn_layer": lstm_layer, "binary_cross_entropy": binary_cross_entropy,
    "_grouped_mm": grouped_mm,
    "_scaled_dot_product_flash_attention": lambda q, k, v, dropout_p=0.0, is_causal=False, return_debug_mask=False, *,
    scale=None: attention(q, k, v, None, is_causal, scale),
    "_scaled_dot_product_efficient_attention": lambda q, k, v, attn_bias=None, compute_log_sumexp=False, dropout_p=0.0,
    is_causal=False, *, scale=None: attention(q, k, v, attn_bias, is_causal, scale),
    "_scaled_dot_product_cudnn_attention": lambda q, k, v, attn_bias=None, compute_log_sumexp=False, dropout_p=0.0,
    is_causal=False, return_debug_mask=False, *, scale=None: attention(q, k, v, attn_bias, is_causal, scale),
}  # fmt: skip


def implementation(func: Any) -> Any:
    """What computes an operation: of one that `torch.library.custom_op` made the function that it was made of, whose
    derivative owes nothing to what was registered for it."""
    if func.namespace in ("aten", "prims"):
        return func
    made = _maybe_get_opdef(func)
    return func if made is None else made._init_fn


@functools.lru_cache(maxsize=256)
def without_out(func: Any) -> tuple[Any, frozenset[str]]:
    """Of an operation that writes its result to given tensors (`mm.out`): the one that returns it, and the names of
    what was given. Raises NotImplementedError if there is none."""
    given = frozenset(a.name for a in func._schema.arguments if a.is_out)
    if not given:
        return func, given
    wanted = [(a.name, str(a.type)) for a in func._schema.arguments if not a.is_out]
    packet = func.overloadpacket
    for other in map(packet.__getattr__, packet.overloads()):
        if [(a.name, str(a.type)) for a in other._schema.arguments] == wanted:
            return other, given
    raise NotImplementedError(f"{func} has no form that returns its result")
