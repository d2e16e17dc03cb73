"""Configurations as other projects write them, in Kiem's keys: which project it is, then one table each.

Hugging Face's config.json is read in families.py; here are nanoGPT (config files, GPTConfig) and the dictionaries of
LLMs-from-scratch. Keys that leave open which model they belong to are refused, as guessing builds another one.
"""

from collections.abc import Mapping
from typing import Any

from kiem.config.families import FAMILIES, Translation, family_named, rope_scaling, translate_hf

# Keys that no GPT-2 has, with the fields that say what they mean: without these they name no model.
_ARCHITECTURE = ("norm", "activation", "position")
_OPEN_KEYS: dict[str, tuple[str, ...]] = {
    "intermediate_size": _ARCHITECTURE,
    "num_key_value_heads": _ARCHITECTURE,
    "n_query_groups": _ARCHITECTURE,
    "n_kv_head": _ARCHITECTURE,
    "n_kv_groups": _ARCHITECTURE,
    "rms_norm_eps": ("norm",),
    "rope_theta": ("position",),
}
_OF_LLAMA = {"rms_norm_eps", "num_key_value_heads", "rope_theta", "rope_parameters", "mlp_bias", "hidden_act"}
_OF_GPT2 = {"n_positions", "n_ctx", "layer_norm_epsilon", "n_inner", "activation_function"}
_OF_NANOGPT = {"n_layer", "n_head", "n_embd"}
_HF_CLASSES = {
    "GPT2Config": "gpt2",
    "LlamaConfig": "llama",
    "MistralConfig": "mistral",
    "Qwen2Config": "qwen2",
    "Qwen3Config": "qwen3",
}


def translate(values: Mapping[str, Any], form: str = "") -> Translation | None:
    """A configuration of another project in Kiem's keys; None when its keys are Kiem's or other names of them.

    values: the keys at one level. form: the class that they were written as a call or definition of, or "assignments".
    """
    keys = {str(key) for key in values}
    named = _HF_CLASSES.get(form) or family_named(values)
    if named is not None:
        return translate_hf(values, named)
    if keys >= set(_ARCHITECTURE):
        return None
    if form == "GPTConfig" or ("block_size" in keys and keys & _OF_NANOGPT and not keys & set(_OPEN_KEYS)):
        return _nanogpt(values, form)
    if form == "assignments" and keys & (_OF_NANOGPT | {"block_size"}) and not keys & set(_OPEN_KEYS):
        return _nanogpt(values, form)
    if "hidden_size" in keys and keys & _OF_LLAMA and not keys & (_OF_GPT2 | _OF_NANOGPT):
        return translate_hf(values, "llama")
    if "n_embd" in keys and keys & _OF_GPT2 and not keys & (_OF_LLAMA | set(_OPEN_KEYS)):
        return translate_hf(values, "gpt2")
    if "n_kv_groups" in keys and "emb_dim" in keys:
        return _from_scratch(values)
    return _open(values)


def _open(values: Mapping[str, Any]) -> Translation | None:
    """The refusal of keys that do not say which model is meant; None when all are plain."""
    missing: dict[str, list[str]] = {}
    for key, fields in _OPEN_KEYS.items():
        if key in values:
            for field in fields:
                if field not in values:
                    missing.setdefault(field, []).append(key)
    if not missing:
        return None
    keys = sorted({key for named in missing.values() for key in named})
    llama = {"norm": "rmsnorm", "activation": "swiglu", "position": "rope"}
    example = ", ".join(f"{field}: {llama[field]}" for field in missing)
    return Translation(
        "",
        problems=[
            f"{', '.join(keys)} belong{'s' if len(keys) == 1 else ''} to model families other than GPT-2, and "
            f"nothing says which: give {', '.join(missing)} (a Llama has {example}), or model_type "
            f"({', '.join(FAMILIES)})"
        ],
    )


# nanoGPT (github.com/karpathy/nanoGPT): model.py's GPTConfig, and the assignments of train.py and config/*.py.

_NANOGPT_MODEL = {
    "block_size": "context_length",
    "vocab_size": "vocab_size",
    "n_layer": "n_layers",
    "n_head": "n_heads",
    "n_embd": "emb_dim",
    "dropout": "drop_rate",
}
_NANOGPT_SIZES = {"block_size": 1024, "n_layer": 12, "n_head": 12, "n_embd": 768}
_NANOGPT_TRAIN = {
    "weight_decay": "train.weight_decay",
    "beta1": "train.beta1",
    "beta2": "train.beta2",
    "grad_clip": "train.max_grad_norm",
    "learning_rate": "train.lr",
    "compile": "train.compile",
    "dtype": "train.precision",
    "eval_interval": "train.eval_every",
    "device": "device",
    "seed": "seed",
}
_NANOGPT_COUNTS = {  # with their defaults in train.py
    "batch_size": 12,
    "gradient_accumulation_steps": 40,
    "max_iters": 600_000,
    "eval_iters": 200,
    "warmup_iters": 2_000,
    "lr_decay_iters": 600_000,
}
_NANOGPT_IRRELEVANT = {
    "out_dir",
    "log_interval",
    "always_save_checkpoint",
    "wandb_log",
    "wandb_project",
    "wandb_run_name",
    "dataset",
    "backend",
    "eval_only",
}


def _nanogpt(values: Mapping[str, Any], form: str) -> Translation:
    """nanoGPT's names; its `bias` is that of every layer, norms and q, k, v too (model.py: True, train.py: False)."""
    found = Translation("a nanoGPT configuration")
    defaults = _NANOGPT_SIZES if form in ("GPTConfig", "assignments") else {}
    for key, name in _NANOGPT_MODEL.items():
        if key in values or key in defaults:
            found.values[f"model.{name}"] = (values.get(key, defaults.get(key)), key)
    bias = values.get("bias", form != "assignments")
    found.values |= {f"model.{name}": (bias, "bias") for name in ("qkv_bias", "bias", "norm_bias")}
    for key, path in _NANOGPT_TRAIN.items():
        if key in values:
            found.values[path] = (values[key], key)
    if any(key in values for key in (*_NANOGPT_COUNTS, "learning_rate")):
        _nanogpt_training(values, found)
    if values.get("init_from", "scratch") != "scratch":
        found.problems.append("init_from: Kiem trains from scratch here: remove it, or write init_from = 'scratch'")
    known = {*_NANOGPT_MODEL, *_NANOGPT_TRAIN, *_NANOGPT_COUNTS, *_NANOGPT_IRRELEVANT}
    unknown = [str(key) for key in values if key not in known | {"bias", "min_lr", "decay_lr", "init_from"}]
    if unknown:
        found.problems.append(f"{', '.join(unknown[:5])[:120]}: not a nanoGPT key: remove it")
    return found


def _nanogpt_training(values: Mapping[str, Any], found: Translation) -> None:
    """Iterations and sequences as tokens: AdamW, a warm-up, and a cosine down to min_lr."""
    counts = {key: values.get(key, default) for key, default in _NANOGPT_COUNTS.items()}
    block = values.get("block_size", _NANOGPT_SIZES["block_size"])
    for key, value in [*counts.items(), ("block_size", block)]:
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**40:
            found.problems.append(f"{key} is not a count")
            return
    micro = counts["batch_size"] * block
    batch = micro * counts["gradient_accumulation_steps"]
    tokens, warmup = batch * counts["max_iters"], batch * counts["warmup_iters"]
    found.values |= {
        "train.optimizer": ("adamw", "learning_rate"),
        "train.micro_batch_tokens": (micro, "batch_size"),
        "train.batch_tokens": (batch, "gradient_accumulation_steps"),
        "train.tokens": (tokens, "max_iters"),
        "train.warmup_tokens": (min(tokens, warmup), "warmup_iters"),
    }
    if "eval_interval" in values or "eval_iters" in values:
        found.values["train.eval_tokens"] = (micro * counts["eval_iters"], "eval_iters")
    if values.get("decay_lr", True) is not True:
        found.values |= {"train.cooldown": ("none", "decay_lr"), "train.warmup_tokens": (0, "decay_lr")}
        return
    decay = batch * (values.get("lr_decay_iters", counts["max_iters"]))
    if decay != tokens:
        found.problems.append(
            f"lr_decay_iters {counts['lr_decay_iters']} is not max_iters {counts['max_iters']}: Kiem's cosine ends "
            "when training ends: make them equal"
        )
    peak, least = values.get("learning_rate", 6e-4), values.get("min_lr", 6e-5)
    found.values |= {
        "train.cooldown": ("cosine", "lr_decay_iters"),
        "train.cooldown_tokens": (max(0, tokens - warmup), "lr_decay_iters"),
    }
    if all(isinstance(rate, int | float) for rate in (peak, least)) and 0 <= least <= peak and 0 < peak < 1e6:
        found.values["train.final_lr_fraction"] = (least / peak, "min_lr")
    else:
        found.problems.append("min_lr is not between 0 and learning_rate")


# LLMs-from-scratch (github.com/rasbt/LLMs-from-scratch): the Llama and Qwen3 dictionaries, in Kiem's names but four.


def _from_scratch(values: Mapping[str, Any]) -> Translation:
    found = Translation("a Llama or Qwen3 of LLMs-from-scratch")
    qwen3 = bool(values.get("qk_norm", False))
    fixed = {"norm": "rmsnorm", "activation": "swiglu", "position": "rope", "qkv_bias": False, "bias": False}
    fixed["norm_eps"] = 1e-6 if qwen3 else 1e-5
    found.values |= {f"model.{name}": (value, "n_kv_groups") for name, value in fixed.items()}
    for key, value in values.items():
        if key == "rope_freq":
            if isinstance(value, Mapping):
                scaled, problems = rope_scaling({"rope_type": "llama3", **value})
                found.values |= {f"model.{name}": (item, key) for name, item in scaled.items()}
                found.problems += [f"rope_freq: {problem}" for problem in problems]
            elif value is not None:
                found.problems.append("rope_freq: it takes a group of keys or None")
        elif key == "dtype":
            found.values["train.precision"] = (value, key)
        else:
            name = {"n_kv_groups": "n_kv_heads"}.get(str(key), str(key))
            found.values[f"model.{name}"] = (value, str(key))
    return found
