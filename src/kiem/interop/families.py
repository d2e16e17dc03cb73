"""The families of the ecosystem that Kiem's architecture contains: one table per family, read both ways.

A family says which values of ModelConfig it stands for, and what its config.json and its weights call things.
Rotary positions need no permutation: Kiem turns the two halves of a head against each other, as transformers does.

Biases: a family may have a bias where the ModelConfig has none (GPT-2 always has one on its queries). It is then zero,
which is the same function.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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


@dataclass(frozen=True)
class Family:
    """A model family.

    fixed: values that its ModelConfig has (a tuple: one of these). keys: ModelConfig field -> config.json key.
    defaults: config.json values when a file leaves them out. required: config.json values; others are another model.
    ignored: endings of tensor names that hold no weight.
    """

    name: str
    architecture: str
    fixed: Mapping[str, Any]
    keys: Mapping[str, str]
    defaults: Mapping[str, Any]
    required: Mapping[str, Any]
    weights: tuple[Weight, ...]
    ignored: tuple[str, ...] = ()


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

_ROPE_DEFAULTS = {"num_key_value_heads": None, "head_dim": None, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
_ROPE_FIXED = {"norm": "rmsnorm", "activation": "swiglu", "position": "rope"}

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(
            name="gpt2",
            architecture="GPT2LMHeadModel",
            fixed={"norm": "layernorm", "activation": ("gelu_tanh", "gelu"), "position": "learned", "qk_norm": False},
            keys=_GPT2_KEYS,
            defaults={"n_inner": None, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True},
            required={
                "scale_attn_weights": True,
                "scale_attn_by_inverse_layer_idx": False,
                "add_cross_attention": False,
            },
            weights=_GPT2_WEIGHTS,
            ignored=(".attn.bias", ".attn.masked_bias"),  # the causal mask, kept as a buffer in old files
        ),
        Family(
            name="llama",
            architecture="LlamaForCausalLM",
            fixed={**_ROPE_FIXED, "qk_norm": False},
            keys=_ROPE_KEYS,
            defaults=_ROPE_DEFAULTS,
            required={"hidden_act": "silu", "attention_dropout": 0.0},
            weights=_ROPE_WEIGHTS,
            ignored=(".rotary_emb.inv_freq",),
        ),
        Family(
            name="qwen3",
            architecture="Qwen3ForCausalLM",
            fixed={**_ROPE_FIXED, "qk_norm": True, "bias": False},
            keys=_ROPE_KEYS,
            defaults=_ROPE_DEFAULTS,
            required={"hidden_act": "silu", "attention_dropout": 0.0, "use_sliding_window": False},
            weights=_ROPE_WEIGHTS + _QK_NORM_WEIGHTS,
            ignored=(".rotary_emb.inv_freq",),
        ),
    )
}

_GELU = {"gelu_tanh": "gelu_new", "gelu": "gelu"}
_GELU_READ = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
_GPT2_DROPOUT = ("embd_pdrop", "attn_pdrop", "resid_pdrop")


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
    """ "gpt2", "llama" or "qwen3", or None when no model class of the ecosystem computes what this config does."""
    return next((name for name, family in FAMILIES.items() if not misfits(family, config)), None)


def require_family(config: ModelConfig) -> Family:
    """The family of a config. ConfigError that says what each family would need when there is none."""
    name = family_of(config)
    if name is not None:
        return FAMILIES[name]
    needs = "\n".join(f"  {family.name} needs {'; '.join(misfits(family, config))}" for family in FAMILIES.values())
    raise ConfigError(f"this model is in no family that other software runs; to be in one:\n{needs}")


def to_hf_config(config: ModelConfig) -> dict[str, Any]:
    """The config.json of a model, without token ids. ConfigError when it is in no family."""
    family = require_family(config)
    hf = {"model_type": family.name, "architectures": [family.architecture]}
    hf.update((key, getattr(config, field)) for field, key in family.keys.items())
    hf.update(family.required)
    if family.name == "gpt2":
        hf["activation_function"] = _GELU[config.activation]
        hf.update((key, config.drop_rate) for key in _GPT2_DROPOUT)
        return hf
    hf["attention_bias"] = config.qkv_bias or config.bias
    if family.name == "llama":
        hf["mlp_bias"] = config.bias
    hf["rope_theta"] = config.rope_base  # where transformers before 5 and other readers look
    hf["rope_parameters"] = {"rope_type": "default", "rope_theta": config.rope_base}
    return hf


def from_hf_config(hf: Mapping[str, Any]) -> ModelConfig:
    """The ModelConfig of a config.json. ConfigError with every problem when Kiem does not compute that model."""
    family = FAMILIES.get(hf.get("model_type"))
    if family is None:
        raise ConfigError(f"model_type {hf.get('model_type')!r}: Kiem reads {', '.join(FAMILIES)}")
    problems = []
    values = {field: allowed for field, allowed in family.fixed.items() if not isinstance(allowed, tuple)}
    for field, key in family.keys.items():
        if key not in hf and key not in family.defaults:
            problems.append(f"{key} is missing")
        values[field] = hf.get(key, family.defaults.get(key))
    for key, wanted in family.required.items():
        if hf.get(key, wanted) != wanted:
            problems.append(f"{key} {hf[key]!r}: Kiem computes {wanted!r} only")
    values.update(_gpt2_values(hf, problems) if family.name == "gpt2" else _rope_values(hf, family, problems))
    if not problems:
        try:
            return ModelConfig(**values)
        except ValueError as error:
            problems += [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
    raise ConfigError(f"config.json of a {family.name} model that Kiem cannot take: " + "; ".join(problems))


def _gpt2_values(hf: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    function = hf.get("activation_function", "gelu_new")
    if function not in _GELU_READ:
        problems.append(f"activation_function {function!r}: Kiem computes {', '.join(_GELU_READ)}")
    rates = {hf.get(key, 0.1) for key in _GPT2_DROPOUT}
    if len(rates) > 1:
        problems.append(f"{', '.join(_GPT2_DROPOUT)} differ: Kiem has one drop_rate, make them equal")
    return {"activation": _GELU_READ.get(function), "drop_rate": float(max(rates)), "qkv_bias": True, "bias": True}


def _rope_values(hf: Mapping[str, Any], family: Family, problems: list[str]) -> dict[str, Any]:
    """Rotary base and biases. transformers 5 writes rope_parameters, older files rope_theta and rope_scaling."""
    rope = hf.get("rope_parameters") or {**(hf.get("rope_scaling") or {}), "rope_theta": hf.get("rope_theta", 10_000.0)}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default" or rope.get("partial_rotary_factor", hf.get("partial_rotary_factor", 1)) != 1:
        problems.append(f"rotary positions of type {kind!r}, {dict(rope)}: Kiem computes the default type only")
    attention, mlp = bool(hf.get("attention_bias")), bool(hf.get("mlp_bias"))
    bias = family.fixed.get("bias", attention or mlp)
    return {"rope_base": float(rope.get("rope_theta", 10_000.0)), "qkv_bias": attention, "bias": bias}
