"""The families of the ecosystem that Kiem's architecture contains: what their weights are called, and export.

What a family is, and how its config.json is read, stands in config/families.py. Rotary positions need no permutation:
Kiem turns the two halves of a head against each other, as transformers does.

Biases: a family may have a bias where the ModelConfig has none (GPT-2 always has one on its queries). It is then zero,
which is the same function.
"""

from dataclasses import dataclass, replace
from typing import Any

from kiem.config.families import FAMILIES, GELU, GPT2_DROPOUT, Family
from kiem.config.model import ModelConfig
from kiem.errors import ConfigError


@dataclass(frozen=True)
class Weight:
    """One module of a family: Kiem's modules (more than one: fused along the outputs) and the Hugging Face module.

    `{i}` is the layer. `bias` is True, False, or the config.json key that says whether there is one. `transposed`: the
    matrix is stored (in, out), as GPT-2's Conv1D does. `untied`: only there when the head is not the token embedding.
    """

    kiem: tuple[str, ...]
    hf: str
    bias: bool | str = False
    transposed: bool = False
    untied: bool = False


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
    Weight(
        ("blocks.{i}.attn.q", "blocks.{i}.attn.k", "blocks.{i}.attn.v"),
        "transformer.h.{i}.attn.c_attn",
        True,
        transposed=True,
    ),
    Weight(("blocks.{i}.attn.out",), "transformer.h.{i}.attn.c_proj", True, True),
    Weight(("blocks.{i}.norm2",), "transformer.h.{i}.ln_2", bias=True),
    Weight(("blocks.{i}.mlp.up",), "transformer.h.{i}.mlp.c_fc", True, True),
    Weight(("blocks.{i}.mlp.down",), "transformer.h.{i}.mlp.c_proj", True, True),
    Weight(("final_norm",), "transformer.ln_f", bias=True),
    Weight(("head",), "lm_head", untied=True),
)

_QWEN2_WEIGHTS = tuple(
    replace(weight, bias=weight.hf.endswith(("q_proj", "k_proj", "v_proj"))) for weight in _ROPE_WEIGHTS
)

WEIGHTS: dict[str, tuple[Weight, ...]] = {
    "gpt2": _GPT2_WEIGHTS,
    "qwen2": _QWEN2_WEIGHTS,
    "llama": _ROPE_WEIGHTS,
    "mistral": _ROPE_WEIGHTS,
    "qwen3": _ROPE_WEIGHTS + _QK_NORM_WEIGHTS,
}
# Endings of tensor names that hold no weight: the causal mask, kept as a buffer in old files, and rotary frequencies.
NO_WEIGHT: dict[str, tuple[str, ...]] = {"gpt2": (".attn.bias", ".attn.masked_bias")}
NO_WEIGHT |= {name: (".rotary_emb.inv_freq",) for name in WEIGHTS if name not in NO_WEIGHT}


def misfits(family: Family, config: ModelConfig) -> list[str]:
    """What keeps a ModelConfig out of a family, one text a reason; empty when it belongs to it."""
    reasons = []
    for field, wanted in family.fixed.items():
        given = getattr(config, field)
        allowed = wanted if isinstance(wanted, tuple) else (wanted,)
        if given not in allowed:
            reasons.append(f"{field} {' or '.join(map(str, allowed))}, not {given}")
    if family.name == "gpt2":
        if config.n_kv_heads != config.n_heads:
            reasons.append(f"n_kv_heads equal to n_heads {config.n_heads}, not {config.n_kv_heads}")
        if config.head_dim * config.n_heads != config.emb_dim:
            reasons.append(f"head_dim {config.emb_dim} / {config.n_heads} (emb_dim / n_heads), not {config.head_dim}")
    elif family.name == "llama" and config.emb_dim % config.n_heads:
        reasons.append(f"emb_dim divisible by n_heads {config.n_heads}, not {config.emb_dim}")
    return reasons


def family_of(config: ModelConfig) -> str | None:
    """The name of the family that a config is exported as; None when no model class of the ecosystem computes it."""
    return next((name for name, f in FAMILIES.items() if f.written and not misfits(f, config)), None)


def require_family(config: ModelConfig) -> Family:
    """The family of a config. ConfigError that says what each family would need when there is none."""
    name = family_of(config)
    if name is not None:
        return FAMILIES[name]
    needs = "\n".join(f"  {f.name} needs {'; '.join(misfits(f, config))}" for f in FAMILIES.values() if f.written)
    raise ConfigError(f"no other software runs this model; to match a family it knows:\n{needs}")


def to_hf_config(config: ModelConfig) -> dict[str, Any]:
    """The config.json of a model, without token ids. ConfigError when it is in no family."""
    family = require_family(config)
    hf: dict[str, Any] = {"model_type": family.name, "architectures": [family.architecture]}
    hf.update((key, getattr(config, field)) for field, key in family.keys.items())
    hf.update(family.required)
    if family.name == "gpt2":
        hf["activation_function"] = GELU[config.activation]
        hf.update((key, config.drop_rate) for key in GPT2_DROPOUT)
        return hf
    if family.name != "qwen2":
        hf["attention_bias"] = config.qkv_bias or config.bias
    if family.name == "llama":
        hf["mlp_bias"] = config.bias
    if family.name.startswith("qwen"):
        hf["use_sliding_window"] = False
    scaling = _rope_scaling(config)
    hf["rope_theta"] = config.rope_base  # where transformers before 5 and other readers look
    hf["rope_parameters"] = {"rope_theta": config.rope_base} | (scaling or {"rope_type": "default"})
    if scaling:
        hf["rope_scaling"] = scaling
    return hf


def _rope_scaling(config: ModelConfig) -> dict[str, Any]:
    """The `rope_scaling` group of a config.json; empty without scaling."""
    if config.rope_scaling == "none":
        return {}
    scaling = {"rope_type": config.rope_scaling, "factor": config.rope_factor}
    if config.rope_scaling == "linear":
        return scaling
    return scaling | {
        "low_freq_factor": config.rope_low_freq_factor,
        "high_freq_factor": config.rope_high_freq_factor,
        "original_max_position_embeddings": config.rope_original_context_length,
    }
