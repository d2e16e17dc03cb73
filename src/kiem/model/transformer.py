"""The decoder-only transformer: tokens -> embeddings -> blocks -> logits, or their loss.

Shapes: B batch, T time, D embedding, V vocabulary, L layers.
"""

from collections.abc import Callable
from typing import overload

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kiem.config.model import ModelConfig
from kiem.model.attention import Attention, cache_mask, document_mask, rotary_tables
from kiem.model.cache import Cache
from kiem.model.layers import Embedding, FeedForward, Linear, fusible, make_norm
from kiem.model.ops import cross_entropy


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
    """A language model. Build it, then `initialize(seed)` or load weights: until then they are undefined.

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
        tied = config.tie_embeddings
        self.head = Linear(config.emb_dim, config.vocab_size, bias=False, device="meta" if tied else None)
        self.tie()
        if tied:  # one tensor has one name in a state dict: that of the embedding
            self.register_state_dict_post_hook(_one_name)
            self.register_load_state_dict_pre_hook(_both_names)
            self.register_load_state_dict_post_hook(_tie)

    def tie(self) -> "Transformer":
        """Make the head's weight the token embedding's, if config.tie_embeddings. Returns self.

        To be called after either was replaced (loading a state dict and moving the model do so by themselves).
        """
        if self.config.tie_embeddings:
            self.head.weight = self.tok_emb.weight
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Transformer":
        """What `to`, `cuda` and `to_empty` do: where they make new parameters, tied ones stay one."""
        super()._apply(fn, recurse)
        return self.tie()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.tok_emb.weight.device

    @overload
    def forward(
        self,
        tokens_BT: Tensor,
        *,
        positions_BT: Tensor | None = None,
        docs_BT: Tensor | None = None,
        targets_BT: None = None,
        cache: Cache | None = None,
        valid_BT: Tensor | None = None,
        last: int | None = None,
        per_token: bool = False,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        tokens_BT: Tensor,
        *,
        positions_BT: Tensor | None = None,
        docs_BT: Tensor | None = None,
        targets_BT: Tensor,
        cache: Cache | None = None,
        valid_BT: Tensor | None = None,
        last: int | None = None,
        per_token: bool = False,
    ) -> tuple[Tensor, Tensor]: ...

    def forward(
        self,
        tokens_BT: Tensor,
        *,
        positions_BT: Tensor | None = None,
        docs_BT: Tensor | None = None,
        targets_BT: Tensor | None = None,
        cache: Cache | None = None,
        valid_BT: Tensor | None = None,
        last: int | None = None,
        per_token: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """logits_BTV in float32, what each position says of the next token; with targets the loss instead.

        tokens_BT: int64. positions_BT: int64, default 0..T-1 (after the cache's length). docs_BT: attention stays
        inside equal numbers; None lets every token see all before it. cache: is extended by these tokens; then valid_BT
        says which of them are real (default all) and docs_BT is not used. last: only the last so many positions are
        given to the head, and the result (and targets_BT) have as many; default all T.

        targets_BT: int64, -100 where there is none. Gives (nats, n_valid), float32 and int64: the sum of the
        cross-entropy in nats over the valid targets and their number, both scalars, so that sums over micro-batches and
        ranks can be divided once. per_token: nats_BT of every position instead of their sum, 0 without a target; these
        are negative log-probabilities, differentiable each (scoring, preference).

        All use of the model is one call of this: hooks, DDP, FSDP2 and torch.compile see it whole.
        """
        x_BTD = self._blocks(tokens_BT, positions_BT, docs_BT, cache, valid_BT)
        if last is not None:
            x_BTD = x_BTD[:, -last:]
        if targets_BT is None:
            return cross_entropy.at_least_float32(self.head(x_BTD))
        nats = self._nats(x_BTD.flatten(0, 1), targets_BT.flatten(), per_token)
        return nats.view(targets_BT.shape) if per_token else nats, (targets_BT != cross_entropy.IGNORE).sum()

    def _nats(self, x_ND: Tensor, targets_N: Tensor, per_token: bool) -> Tensor:
        """Cross-entropy through the head's own call; fused, so that no logits are kept, where that is possible."""
        loss_of = cross_entropy.linear_cross_entropy
        if fusible(self.head) and not per_token:
            return self.head(x_ND, lambda x_ND, weight_VD, _: loss_of(x_ND, weight_VD, targets_N))
        nats_N = cross_entropy.cross_entropy_of(self.head, x_ND, targets_N, self.config.vocab_size)
        return nats_N if per_token else nats_N.sum()

    def _blocks(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor | None,
        docs_BT: Tensor | None,
        cache: Cache | None,
        valid_BT: Tensor | None,
    ) -> Tensor:
        """x_BTD after the last norm, in compute_dtype."""
        past = 0 if cache is None else cache.length
        if positions_BT is None:
            positions_BT = torch.arange(past, past + tokens_BT.shape[1], device=tokens_BT.device).expand_as(tokens_BT)
        x_BTD = self.tok_emb(tokens_BT)
        rotary = None
        if self.config.position == "learned":
            x_BTD = x_BTD + self.pos_emb(positions_BT)
        else:
            rotary = rotary_tables(positions_BT, self.config, self.compute_dtype)
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

    @torch.no_grad()
    def initialize(self, seed: int, scheme: str = "gpt2") -> "Transformer":
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


# Of a tied head, as hooks (functions of the module, so that a model can be copied and pickled).


def _one_name(model: nn.Module, state: dict[str, Tensor], prefix: str, _: object) -> None:
    state.pop(f"{prefix}head.weight", None)


def _both_names(model: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    if f"{prefix}tok_emb.weight" in state:
        state[f"{prefix}head.weight"] = state[f"{prefix}tok_emb.weight"]


def _tie(model: nn.Module, _: object) -> None:
    assert isinstance(model, Transformer)
    model.tie()
