"""Causal self-attention with grouped queries, rotary positions, and packed documents.

Shapes: B batch, T time (queries), S time (keys), D embedding, H heads, G key-value heads, K head size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kiem.config.model import ModelConfig
from kiem.model.cache import Cache
from kiem.model.layers import Linear, RMSNorm
from kiem.model.ops.rotary import rotate


def rotary_frequencies(config: ModelConfig, device: torch.device) -> Tensor:
    """Radians per position of each pair of a head, (K/2,) in float32: base^(-2i/K) (Su et al. 2021, arXiv:2104.09864).

    config.rope_scaling stretches them to a context that is rope_factor times as long. linear: all of them (Chen et al.
    2023, arXiv:2306.15595). llama3: wavelengths above original context / rope_low_freq_factor, none below original
    context / rope_high_freq_factor, and between them a mixture (Llama 3.1, arXiv:2407.21783).
    """
    # The reciprocal is rounded as transformers rounds it: another rounding moves logits by 5e-4 at position 131,072.
    index_K = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device)
    frequency_K = 1.0 / config.rope_base ** (index_K / config.head_dim)
    if config.rope_scaling == "none":
        return frequency_K
    stretched_K = frequency_K / config.rope_factor
    if config.rope_scaling == "linear":
        return stretched_K
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    turns_K = config.rope_original_context_length / (2 * torch.pi / frequency_K)  # within the original context
    kept_K = ((turns_K - low) / (high - low)).clamp(0, 1)
    return (1 - kept_K) * stretched_K + kept_K * frequency_K


def rotary_tables(positions_BT: Tensor, config: ModelConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of position * frequency, each (B, T, 1, K/2). Angles in float32."""
    angle_BTK = positions_BT[:, :, None].float() * rotary_frequencies(config, positions_BT.device)
    return angle_BTK.cos()[:, :, None].to(dtype), angle_BTK.sin()[:, :, None].to(dtype)


def document_mask(docs_BT: Tensor, dtype: torch.dtype) -> Tensor | None:
    """(B, 1, T, T), 0 where a query may look (the same document, not later) and -inf elsewhere; None when every row is
    one document. Made once for all layers: of a boolean mask attention would make these numbers in each."""
    if bool((docs_BT == docs_BT[:, :1]).all()):
        return None
    same_BTT = docs_BT[:, :, None] == docs_BT[:, None, :]
    mask_BTT = torch.zeros(same_BTT.shape, dtype=dtype, device=docs_BT.device)
    return mask_BTT.masked_fill_(~same_BTT.tril_(), -torch.inf)[:, None]


def cache_mask(cache: Cache, n_queries: int) -> Tensor | None:
    """(B, 1, T, S), True where a query may look: valid slots not later than its own. None when that is plain causal."""
    valid_BS = cache.valid_BS[:, : cache.length]
    if bool(valid_BS.all()) and (n_queries == 1 or n_queries == cache.length):
        return None
    slots_S = torch.arange(cache.length, device=valid_BS.device)
    causal_TS = slots_S[None, :] <= slots_S[-n_queries:, None]
    # A padded query sees itself, so that no row of the softmax is empty; nobody reads its output.
    own_TS = slots_S[None, :] == slots_S[-n_queries:, None]
    return ((causal_TS & valid_BS[:, None, :]) | own_TS)[:, None]


class Attention(nn.Module):
    """softmax(q k^T / sqrt(K)) v over the positions a query may see."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        D, K, bias = config.emb_dim, config.head_dim, config.qkv_bias
        self.layer, self.n_heads, self.n_kv_heads, self.head_dim = layer, config.n_heads, config.n_kv_heads, K
        self.drop_rate = config.drop_rate
        self.q = Linear(D, config.n_heads * K, bias=bias)
        self.k = Linear(D, config.n_kv_heads * K, bias=bias)
        self.v = Linear(D, config.n_kv_heads * K, bias=bias)
        self.out = Linear(config.n_heads * K, D, bias=config.bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(K, config.norm_eps)
            self.k_norm = RMSNorm(K, config.norm_eps)
        self.qk_norm = config.qk_norm

    def forward(
        self, x_BTD: Tensor, rotary: tuple[Tensor, Tensor] | None, mask: Tensor | None, cache: Cache | None
    ) -> Tensor:
        B, T, _ = x_BTD.shape
        q_BTHK = self.q(x_BTD).view(B, T, self.n_heads, self.head_dim)
        k_BTGK = self.k(x_BTD).view(B, T, self.n_kv_heads, self.head_dim)
        v_BTGK = self.v(x_BTD).view(B, T, self.n_kv_heads, self.head_dim)
        if self.qk_norm:
            q_BTHK, k_BTGK = self.q_norm(q_BTHK), self.k_norm(k_BTGK)
        if rotary is not None:
            q_BTHK, k_BTGK = rotate(q_BTHK, *rotary), rotate(k_BTGK, *rotary)
        q_BHTK, k_BGSK, v_BGSK = (h.transpose(1, 2) for h in (q_BTHK, k_BTGK, v_BTGK))
        if cache is not None:
            k_BGSK, v_BGSK = cache.extend(self.layer, k_BGSK, v_BGSK)
        o_BHTK = F.scaled_dot_product_attention(
            q_BHTK,
            k_BGSK,
            v_BGSK,
            attn_mask=mask,
            dropout_p=self.drop_rate if self.training else 0.0,
            is_causal=mask is None and T > 1,
            enable_gqa=self.n_kv_heads != self.n_heads,
        )
        return self.out(o_BHTK.transpose(1, 2).reshape(B, T, self.n_heads * self.head_dim))
