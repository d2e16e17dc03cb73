"""The model families that Kiem builds, and how their published configurations (config.json) are read.

A family is a set of values of ModelConfig: one table each, read here, written in interop/. What a table does not name
is either irrelevant to the architecture, by name, or refused: a model is built exactly or not at all.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from kiem.config.model import ModelConfig
from kiem.errors import ConfigError


@dataclass(frozen=True)
class Family:
    """A model family.

    fixed: values that its ModelConfig has (a tuple: one of these). keys: ModelConfig field -> config.json key.
    defaults: config.json values when a file leaves them out. required: config.json values; others are another model.
    written: whether models are exported as this family (a family within another one is only read).
    """

    name: str
    architecture: str
    fixed: Mapping[str, Any]
    keys: Mapping[str, str]
    defaults: Mapping[str, Any]
    required: Mapping[str, Any]
    written: bool = True


@dataclass
class Translation:
    """A configuration of another project in Kiem's keys.

    values: dotted path -> (value, the key that it was given as). window: the key and the size of a sliding attention
    window, which is the same as none while the context is no longer. problems: each a sentence.
    """

    what: str
    values: dict[str, tuple[Any, str]] = field(default_factory=dict)
    window: tuple[str, int] | None = None
    problems: list[str] = field(default_factory=list)


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
_ROPE_REQUIRED = {"hidden_act": "silu", "attention_dropout": 0.0}

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
        ),
        Family(
            name="qwen2",
            architecture="Qwen2ForCausalLM",
            fixed={**_ROPE_FIXED, "qk_norm": False, "qkv_bias": True, "bias": False},
            keys=_ROPE_KEYS,
            defaults=_ROPE_DEFAULTS,
            required=_ROPE_REQUIRED,
        ),
        Family(
            name="llama",
            architecture="LlamaForCausalLM",
            fixed={**_ROPE_FIXED, "qk_norm": False},
            keys=_ROPE_KEYS,
            defaults=_ROPE_DEFAULTS,
            required=_ROPE_REQUIRED,
        ),
        Family(
            name="mistral",
            architecture="MistralForCausalLM",
            fixed={**_ROPE_FIXED, "qk_norm": False, "qkv_bias": False, "bias": False},
            keys=_ROPE_KEYS,
            defaults={**_ROPE_DEFAULTS, "num_key_value_heads": 8},
            required=_ROPE_REQUIRED,
            written=False,
        ),
        Family(
            name="qwen3",
            architecture="Qwen3ForCausalLM",
            fixed={**_ROPE_FIXED, "qk_norm": True, "bias": False},
            keys=_ROPE_KEYS,
            defaults=_ROPE_DEFAULTS,
            required=_ROPE_REQUIRED,
        ),
    )
}

GELU = {"gelu_tanh": "gelu_new", "gelu": "gelu"}
GPT2_DROPOUT = ("embd_pdrop", "attn_pdrop", "resid_pdrop")
_GELU_READ = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}

# config.json keys that say nothing about the architecture: names, files, generation, training, numerics of one program.
_EVERYWHERE = """
    architectures model_type transformers_version torch_dtype dtype use_cache initializer_range return_dict
    output_hidden_states output_attentions torchscript use_bfloat16 tf_legacy_loss pruned_heads tie_encoder_decoder
    chunk_size_feed_forward is_encoder_decoder is_decoder cross_attention_hidden_size finetuning_task id2label label2id
    problem_type prefix tokenizer_class task_specific_params attn_implementation auto_map gradient_checkpointing
    quantization_config transformers.js_config is_llama_config unsloth_version unsloth_fixed
"""
_GENERATION = """
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p
    typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences output_scores return_dict_in_generate remove_invalid_values exponential_decay_length_penalty
    suppress_tokens begin_suppress_tokens
"""
_OF_SINGLE_FAMILIES = "n_ctx reorder_and_upcast_attn pretraining_tp max_window_layers"
_IRRELEVANT = frozenset(f"{_EVERYWHERE} {_GENERATION} {_OF_SINGLE_FAMILIES}".split())
_READ_APART = {
    "gpt2": {"activation_function", *GPT2_DROPOUT},
    "rope": {
        "attention_bias",
        "mlp_bias",
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "partial_rotary_factor",
        "original_max_position_embeddings",
        "sliding_window",
        "use_sliding_window",
        "layer_types",
    },
}


def family_named(hf: Mapping[str, Any]) -> str | None:
    """The family that a config.json names by its model_type or architecture, built by Kiem or not; None if neither."""
    if hf.get("model_type") is not None:
        return _shown(hf["model_type"]).strip('"')
    listed = hf.get("architectures")
    for name in listed if isinstance(listed, list) else []:
        return next((f.name for f in FAMILIES.values() if f.architecture == name), _shown(name).strip('"'))
    return None


def translate_hf(hf: Mapping[str, Any], name: str | None = None) -> Translation:
    """A config.json in Kiem's keys, with every reason why its model is not one that Kiem builds. name: the family."""
    name = name or family_named(hf)
    family = FAMILIES.get(name or "")
    if family is None:
        return Translation(f"a {name} model", problems=[f"model_type {name!r}: Kiem builds {', '.join(FAMILIES)}"])
    found = Translation(f"a {family.name} model")
    for path, allowed in family.fixed.items():
        if not isinstance(allowed, tuple):
            found.values[f"model.{path}"] = (allowed, "model_type")
    for path, key in family.keys.items():
        if key not in hf and key not in family.defaults:
            found.problems.append(f"{key} is missing")
        elif (value := hf.get(key, family.defaults.get(key))) is not None:
            found.values[f"model.{path}"] = (value, key)
    for key, wanted in family.required.items():
        if hf.get(key, wanted) != wanted:
            found.problems.append(f"{key} {_shown(hf[key])}: Kiem computes {_shown(wanted)} only")
    (_read_gpt2 if family.name == "gpt2" else _read_rope)(hf, family, found)
    _unknown_keys(hf, family, found)
    return found


def from_hf_config(hf: Mapping[str, Any]) -> ModelConfig:
    """The ModelConfig of a config.json. ConfigError with every problem when Kiem does not compute that model."""
    found = translate_hf(hf)
    if not found.problems:
        try:
            config = ModelConfig(**{path.partition(".")[2]: value for path, (value, _) in found.values.items()})
            if not (reason := window_problem(found, config.context_length)):
                return config
            found.problems.append(reason)
        except ValidationError as error:
            found.problems += [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
    raise ConfigError(f"config.json of {found.what} that Kiem cannot build: " + "; ".join(found.problems))


def window_problem(found: Translation, context_length: Any) -> str | None:
    """Why a sliding window makes it another model; None while the window holds the whole context."""
    if found.window is None or not isinstance(context_length, int) or context_length <= found.window[1]:
        return None
    key, size = found.window
    return (
        f"{key} {size} is less than the context of {context_length} tokens, and Kiem has no sliding-window attention: "
        f"set context_length={size}, up to which it is the same model"
    )


def _unknown_keys(hf: Mapping[str, Any], family: Family, found: Translation) -> None:
    """A key that is in no table and is not off may make it another model."""
    known = _IRRELEVANT | set(family.keys.values()) | set(family.required)
    known |= _READ_APART.get(family.name, _READ_APART["rope"])
    unknown = [
        str(key)
        for key, value in hf.items()
        if key not in known
        and not str(key).startswith(("_", "summary_"))
        and not str(key).endswith(("_token_id", "_token"))
        and value not in (None, False, {}, [], "")
    ]
    if unknown:
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        found.problems.append(
            f"{', '.join(key[:60] for key in unknown[:5])}{more}: not known of {found.what}: remove the keys that "
            "do not change the model"
        )


def _read_gpt2(hf: Mapping[str, Any], family: Family, found: Translation) -> None:
    function = hf.get("activation_function", "gelu_new")
    if isinstance(function, str) and function in _GELU_READ:
        found.values["model.activation"] = (_GELU_READ[function], "activation_function")
    else:
        found.problems.append(f"activation_function {_shown(function)}: Kiem computes {', '.join(_GELU_READ)}")
    rates = [hf.get(key, 0.1) for key in GPT2_DROPOUT]
    if any(rate != rates[0] for rate in rates):
        found.problems.append(f"{', '.join(GPT2_DROPOUT)} differ: Kiem has one drop_rate, make them equal")
    found.values["model.drop_rate"] = (rates[0], GPT2_DROPOUT[0])
    found.values |= {"model.qkv_bias": (True, "model_type"), "model.bias": (True, "model_type")}


def _read_rope(hf: Mapping[str, Any], family: Family, found: Translation) -> None:
    attention, mlp = bool(hf.get("attention_bias")), bool(hf.get("mlp_bias"))
    for path, value, key in (("qkv_bias", attention, "attention_bias"), ("bias", attention or mlp, "mlp_bias")):
        if path not in family.fixed:
            found.values[f"model.{path}"] = (value, key)
    refused = {"mistral": ("attention_bias", "mlp_bias"), "qwen2": ("mlp_bias",), "qwen3": ("mlp_bias",)}
    found.problems += [f"{key}: a {family.name} model has none" for key in refused.get(family.name, ()) if hf.get(key)]
    _read_rotary(hf, found)
    uses_window = family.name == "mistral" or (family.name.startswith("qwen") and hf.get("use_sliding_window", False))
    size = hf.get("sliding_window", 4096) if uses_window else None
    if isinstance(size, int) and not isinstance(size, bool) and 0 < size < 2**40:
        key = "sliding_window" if family.name == "mistral" else "use_sliding_window with sliding_window"
        found.window = (key, size)
    elif size is not None:
        found.problems.append(f"sliding_window {_shown(size)}: it takes a whole number or null")


def _read_rotary(hf: Mapping[str, Any], found: Translation) -> None:
    """Rotary base and scaling. transformers 5 writes rope_parameters, older files rope_theta and rope_scaling."""
    key = "rope_parameters" if hf.get("rope_parameters") else "rope_scaling"
    given = hf.get(key) or {}
    if not isinstance(given, Mapping):
        found.problems.append(f"{key} {_shown(given)}: it takes a group of keys or null")
        return
    base = given.get("rope_theta", hf.get("rope_theta", 10_000.0))
    found.values["model.rope_base"] = (base, "rope_theta")
    values, problems = rope_scaling(given, hf.get("original_max_position_embeddings"))
    found.values |= {f"model.{name}": (value, key) for name, value in values.items()}
    found.problems += [f"{key}: {problem}" for problem in problems]
    partial = given.get("partial_rotary_factor", hf.get("partial_rotary_factor"))
    if partial not in (None, 1):
        found.problems.append(
            f"partial_rotary_factor {_shown(partial)}: Kiem applies rotary embeddings to whole heads only"
        )


_SCALING_KEYS = {
    "factor": "rope_factor",
    "low_freq_factor": "rope_low_freq_factor",
    "high_freq_factor": "rope_high_freq_factor",
    "original_max_position_embeddings": "rope_original_context_length",
    "original_context_length": "rope_original_context_length",
}


def rope_scaling(given: Mapping[str, Any], original: Any = None) -> tuple[dict[str, Any], list[str]]:
    """The ModelConfig fields of a `rope_scaling` group as config.json files have it, and the problems with it."""
    kind = given.get("rope_type", given.get("type", "default"))
    if kind == "default":
        return {}, []
    if not isinstance(kind, str) or kind not in ("linear", "llama3"):
        return {}, [f"rope_type {_shown(kind)}: Kiem computes default, linear and llama3"]
    values: dict[str, Any] = {"rope_scaling": kind}
    values |= {_SCALING_KEYS[key]: value for key, value in given.items() if key in _SCALING_KEYS and value is not None}
    if kind == "linear":
        values = {name: value for name, value in values.items() if name in ("rope_scaling", "rope_factor")}
    elif original is not None:
        values.setdefault("rope_original_context_length", original)
    unknown = set(given) - set(_SCALING_KEYS) - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    return values, [f"{', '.join(sorted(map(str, unknown)))[:60]}: not known of {kind}"] if unknown else []


def _shown(value: Any) -> str:
    from kiem.config.formats import describe

    return describe(value).removeprefix("text ")
