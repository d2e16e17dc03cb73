"""The families of the ecosystem that Kiem's architecture contains: one table per family, read both ways.

A family says which values of ModelConfig it stands for, what its config.json calls them, and what its weights are called.
Rotary positions need no permutation: Kiem turns the two halves of a head against each other, as transformers does.

Biases: a family may have a bias where the ModelConfig has none (GPT-2 always has one on its queries). It is then zero, which
is the same function.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from kiem.config.model import ModelConfig
from kiem.errors import ConfigError


@dataclass(frozen=True)
class Weight:
    """One module of a family: Kiem's modules (more than one: fused along the outputs) and the Hugging Face module.

    `{i}` is the layer. `bias` is True, False, or the config.json key that says whether there is one. `transposed`: the
    matrix is stored (in, out), as GPT-2's Conv1D does. `when` is a ModelConfig test on the module's presence.
    """

    kiem: tuple[str, ...]
    hf: str
    bias: bool | str = False
    transposed: bool = False
    untied: bool = False


@dataclass(frozen=True)
class Family:
    """A model family: `fixed` values of ModelConfig, `keys` (ModelConfig field -> config.json key), and the weight table."""

    name: str
    architecture: str
    fixed: Mapping[str, Any]
    keys: Mapping[str, str]
    required: Mapping[str, Any]
    weights: tuple[Weight, ...]
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True)
class Entry:
    """One Hugging Face tensor: Kiem's parameters (in order, fused along the outputs) that it holds."""

    hf: str
    kiem: tuple[str, ...]
    transposed: bool


_ROPE_WEIGHTS = (
    Weight(("tok_emb",), "model.embed_tokens"),
    Weight(("blocks.{i}.norm1",), "model.layers.{i}.input_layernorm"),
    Weight(("blocks.{i}.attn.q",), "model.layers.{i}.self_attn.q_proj", "attention_bias"),
    Weight(("blocks.{i}.attn.k",), "model.layers.{i}.self_attn.k_proj", "attention_bias"),
    Weight(("blocks.{i}.attn.v",), "model.layers.{i}.self_attn.v_proj", "attention_bias"),
    Weight(("blocks.{i}.attn.out",), "model.layers.{i}.self_attn.o_proj", "attention_bias"),
    Weight(("blocks.{i}.norm2",), "model.layers.{i}.post_attention_layernorm"),
    Weight(("blocks.{i}.mlp.gate",), "model.layers.{i}.mlp.gate_proj", "mlp_bias"),
    Weight(("blocks.{i}.mlp.up",), "model.layers.{i}.mlp.up_proj", "mlp_bias"),
    Weight(("blocks.{i}.mlp.down",), "model.layers.{i}.mlp.down_proj", "mlp_bias"),
    Weight(("final_norm",), "model.norm"),
    Weight(("head",), "lm_head", untied=True),
)

_QK_NORM_WEIGHTS = (
    Weight(("blocks.{i}.attn.q_norm",), "model.layers.{i}.self_attn.q_norm"),
    Weight(("blocks.{i}.attn.k_norm",), "model.layers.{i}.self_attn.k_norm"),
)

_GPT2_WEIGHTS = (
    Weight(("tok_emb",), "transformer.wte"),
    Weight(("pos_emb",), "transformer.wpe"),
    Weight(("blocks.{i}.norm1",), "transformer.h.{i}.ln_1", bias=True),
    Weight(("blocks.{i}.attn.q", "blocks.{i}.attn.k", "blocks.{i}.attn.v"), "transformer.h.{i}.attn.c_attn", True, True),
    Weight(("blocks.{i}.attn.out",), "transformer.h.{i}.attn.c_proj", True, True),
    Weight(("blocks.{i}.norm2",), "transformer.h.{i}.ln_2", bias=True),
    Weight(("blocks.{i}.mlp.up",), "transformer.h.{i}.mlp.c_fc", True, True),
    Weight(("blocks.{i}.mlp.down",), "transformer.h.{i}.mlp.c_proj", True, True),
    Weight(("final_norm",), "transformer.ln_f", bias=True),
    Weight(("head",), "lm_head", untied=True),
)

_ROPE_KEYS = {
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
    "emb_dim": "hidden_size",
    "n_heads": "num_attention_heads",
    "n_layers": "num_hidden_layers",
    "hidden_dim": "intermediate_size",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}

_GPT2_KEYS = {
    "vocab_size": "vocab_size",
    "context_length": "n_positions",
    "emb_dim": "n_embd",
    "n_heads": "n_head",
    "n_layers": "n_layer",
    "hidden_dim": "n_inner",
    "norm_eps": "layer_norm_epsilon",
    "tie_embeddings": "tie_word_embeddings",
}

_ROPE_FIXED = {"norm": "rmsnorm", "activation": "swiglu", "position": "rope"}

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(
            name="gpt2",
            architecture="GPT2LMHeadModel",
            fixed={"norm": "layernorm", "activation": ("gelu_tanh", "gelu"), "position": "learned", "qk_norm": False},
            keys=_GPT2_KEYS,
            required={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
            weights=_GPT2_WEIGHTS,
            ignored=(".attn.bias", ".attn.masked_bias"),  # the causal mask, kept as a buffer in old files
        ),
        Family(
            name="llama",
            architecture="LlamaForCausalLM",
            fixed={**_ROPE_FIXED, "qk_norm": False},
            keys=_ROPE_KEYS,
            required={"hidden_act": "silu"},
            weights=_ROPE_WEIGHTS,
            ignored=(".rotary_emb.inv_freq",),
        ),
        Family(
            name="qwen3",
            architecture="Qwen3ForCausalLM",
            fixed={**_ROPE_FIXED, "qk_norm": True, "bias": False},
            keys=_ROPE_KEYS,
            required={"hidden_act": "silu", "use_sliding_window": False},
            weights=_ROPE_WEIGHTS + _QK_NORM_WEIGHTS,
            ignored=(".rotary_emb.inv_freq",),
        ),
    )
}
