"""The decoder-only transformer: tokens -> embeddings -> blocks -> features -> logits.

Shapes: B batch, T time, D embedding, V vocabulary, L layers.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kiem.config.model import ModelConfig
from kiem.model.attention import Attention, cache_mask, document_mask, rotary_tables
from kiem.model.cache import Cache
from kiem.model.layers import FeedForward, Linear, make_norm


class Embedding(nn.Module):
    """A table (entries, D), read by row."""

    def __init__(self, entries: int, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(entries, size))

    def forward(self, index: Tensor) -> Tensor:
        return F.embedding(index, self.weight)


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.norm1 = make_norm(config)
        self.attn = Attention(config, layer)
        self.norm2 = make_norm(config)
        self.mlp = FeedForward(config)
        self.drop = nn.Dropout(config.drop_rate) if config.drop_rate else nn.Identity()

    def forward(self, x_BTD: Tensor, rotary, mask: Tensor | None, cache: Cache | None) -> Tensor:
        x_BTD = x_BTD + self.drop(self.attn(self.norm1(x_BTD), rotary, mask, cache))
        return x_BTD + self.drop(self.mlp(self.norm2(x_BTD)))


class Transformer(nn.Module):
    """A language model. Build it, then `initialise(seed)` or load weights: until then they are undefined.

    compute_dtype: data type of everything between the embeddings and the loss; weights stay float32.
    checkpoint_blocks: recompute each block in backward instead of keeping what is inside it.
    """

    def __init__(
        self, config: ModelConfig, compute_dtype: torch.dtype = torch.float32, checkpoint_blocks: bool = False
    ):
        super().__init__()
        self.config, self.compute_dtype, self.checkpoint_blocks = config, compute_dtype, checkpoint_blocks
        self.tok_emb = Embedding(config.vocab_size, config.emb_dim)
        if config.position == "learned":
            self.pos_emb = Embedding(config.context_length, config.emb_dim)
        self.drop = nn.Dropout(config.drop_rate) if config.drop_rate else nn.Identity()
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.final_norm = make_norm(config)
        if not config.tie_embeddings:
            self.head = Linear(config.emb_dim, config.vocab_size, bias=False)

    @property
    def head_weight(self) -> Tensor:
        """(V, D)."""
        return self.tok_emb.weight if self.config.tie_embeddings else self.head.weight

    def features(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor | None = None,
        docs_BT: Tensor | None = None,
        cache: Cache | None = None,
        valid_BT: Tensor | None = None,
    ) -> Tensor:
        """x_BTD after the last norm, in compute_dtype.

        tokens_BT: int64. positions_BT: int64, default 0..T-1 (after the cache's length). docs_BT: attention stays
        inside
        equal numbers; None lets every token see all before it. cache: is extended by these tokens; then valid_BT says
        which of them are real (default all) and docs_BT is not used.
        """
        past = 0 if cache is None else cache.length
        if positions_BT is None:
            positions_BT = torch.arange(past, past + tokens_BT.shape[1], device=tokens_BT.device).expand_as(tokens_BT)
        x_BTD = self.tok_emb(tokens_BT)
        rotary = None
        if self.config.position == "learned":
            x_BTD = x_BTD + self.pos_emb(positions_BT)
        else:
            rotary = rotary_tables(positions_BT, self.config.head_dim, self.config.rope_base, self.compute_dtype)
        x_BTD = self.drop(x_BTD.to(self.compute_dtype))
        mask = self._mask(tokens_BT, docs_BT, cache, valid_BT)
        for block in self.blocks:
            if self.checkpoint_blocks and self.training:
                x_BTD = checkpoint(block, x_BTD, rotary, mask, None, use_reentrant=False)
            else:
                x_BTD = block(x_BTD, rotary, mask, cache)
        return self.final_norm(x_BTD)

    def _mask(
        self, tokens_BT: Tensor, docs_BT: Tensor | None, cache: Cache | None, valid_BT: Tensor | None
    ) -> Tensor | None:
        if cache is None:
            return None if docs_BT is None else document_mask(docs_BT, self.compute_dtype)
        cache.advance(torch.ones_like(tokens_BT, dtype=torch.bool) if valid_BT is None else valid_BT)
        return cache_mask(cache, tokens_BT.shape[1])

    def forward(self, tokens_BT: Tensor, *args, **kwargs) -> Tensor:
        """logits_BTV in float32: what each position says of the next token. Arguments as for features()."""
        x_BTD = self.features(tokens_BT, *args, **kwargs)
        return F.linear(x_BTD, self.head_weight.to(x_BTD.dtype)).float()

    @torch.no_grad()
    def initialise(self, seed: int, scheme: str = "gpt2") -> "Transformer":
        """Fill every weight from `seed`. Norms are 1, biases 0. Returns self.

        gpt2: normal(0.02), the projections that end a residual branch normal(0.02 / sqrt(2 L)) (Radford et al. 2019).
        zero_output: matrices normal(1 / sqrt(fan in)), branch ends and an untied head 0, so that every block begins
        as the identity and the first loss is log V; embeddings normal(1), or normal(0.02) when they are also the head.
        """
        generator = torch.Generator().manual_seed(seed)
        gpt2 = scheme == "gpt2"
        for name, p in self.named_parameters():
            if p.ndim == 1:
                p.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            branch_end = name.endswith(("attn.out.weight", "mlp.down.weight"))
            if gpt2:
                std = 0.02 / (2 * self.config.n_layers) ** 0.5 if branch_end else 0.02
            elif branch_end or name == "head.weight":
                std = 0.0
            elif name.startswith(("tok_emb", "pos_emb")):
                std = 0.02 if self.config.tie_embeddings else 1.0
            else:
                std = p.shape[1] ** -0.5
            p.copy_(torch.randn(p.shape, generator=generator) * std)
        return self
