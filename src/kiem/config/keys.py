"""Every configuration key: where it lives, what it takes, other names for it, and the nearest to a misspelled one."""

import difflib
import types
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from kiem.config.model import ModelConfig
from kiem.config.run import RunConfig, Source

SECTIONS = ("model", "data", "train")

# Names in use elsewhere whose meaning is exactly ours. Giving both names of one key is an error.
ALIASES = {
    "model": {
        "n_embd": "emb_dim",
        "d_model": "emb_dim",
        "hidden_size": "emb_dim",
        "n_layer": "n_layers",
        "num_layers": "n_layers",
        "num_hidden_layers": "n_layers",
        "n_head": "n_heads",
        "num_heads": "n_heads",
        "num_attention_heads": "n_heads",
        "n_kv_head": "n_kv_heads",
        "num_key_value_heads": "n_kv_heads",
        "n_query_groups": "n_kv_heads",
        "n_kv_groups": "n_kv_heads",
        "block_size": "context_length",
        "n_ctx": "context_length",
        "n_positions": "context_length",
        "max_position_embeddings": "context_length",
        "max_seq_len": "context_length",
        "intermediate_size": "hidden_dim",
        "n_inner": "hidden_dim",
        "rms_norm_eps": "norm_eps",
        "layer_norm_epsilon": "norm_eps",
        "layer_norm_eps": "norm_eps",
        "dropout": "drop_rate",
        "rope_theta": "rope_base",
        "tie_word_embeddings": "tie_embeddings",
    },
    "data": {},
    "train": {
        "learning_rate": "lr",
        "max_lr": "lr",
        "grad_clip": "max_grad_norm",
        "adam_beta1": "beta1",
        "adam_beta2": "beta2",
        "gradient_checkpointing": "activation_checkpointing",
    },
}

# Names in use elsewhere that mean nearly, but not exactly, one of ours: what to write instead.
NEAR_ALIASES = {
    "attention_bias": "it covers the output projection too: write model.qkv_bias and model.bias (all others)",
    "batch_size": "a batch is counted in tokens: write train.batch_tokens = sequences * context length",
    "micro_batch_size": "a batch is counted in tokens: write train.micro_batch_tokens = sequences * context length",
    "gradient_accumulation_steps": "write train.micro_batch_tokens = train.batch_tokens / accumulation steps",
    "max_iters": "length is counted in tokens: write train.tokens = steps * train.batch_tokens",
    "max_steps": "length is counted in tokens: write train.tokens = steps * train.batch_tokens",
    "epochs": "length is counted in tokens: write train.tokens = epochs * the tokens that kiem prepare counts",
    "warmup_steps": "length is counted in tokens: write train.warmup_tokens = steps * train.batch_tokens",
    "warmup_iters": "length is counted in tokens: write train.warmup_tokens = steps * train.batch_tokens",
    "min_lr": "write train.final_lr_fraction = lowest / peak learning rate",
    "dtype": "write train.precision: auto, float32 or bfloat16",
    "torch_dtype": "write train.precision: auto, float32 or bfloat16",
    "activation_function": "write model.activation: gelu_tanh, gelu or swiglu",
    "hidden_act": "write model.activation: gelu_tanh, gelu or swiglu",
}


@dataclass(frozen=True)
class Key:
    """One key: its dotted path, the type of its value, the words that say which values are allowed, and its kind.

    kind: "identity" or "execution" (config/run.py); None for a section whose keys are of both kinds.
    """

    path: str
    type: Literal["int", "float", "bool", "text", "list", "section"]
    optional: bool
    allowed: str
    description: str
    kind: Literal["identity", "execution"] | None


@cache
def schema() -> dict[str, Key]:
    """Every key of a run configuration by its dotted path, sections included, in the order of the schema."""
    found: dict[str, Key] = {}
    _collect(RunConfig, "", found)
    return found


def kind(path: str) -> Literal["identity", "execution"]:
    """What changing a key does to a run: "identity", it is another run; "execution", it is the same run otherwise.

    path: dotted, of a value (not of a section). Raises KeyError for an unknown key.
    """
    found = schema()[path].kind
    if found is None:
        raise KeyError(path)
    return found


@cache
def execution_keys() -> frozenset[str]:
    """The dotted paths of all values that may change when a run is resumed."""
    return frozenset(path for path, key in schema().items() if key.type != "section" and key.kind == "execution")


@cache
def identity_keys() -> frozenset[str]:
    """The dotted paths of all values that make a run the run it is. train.tokens is one, as the schedule depends on it;
    making a run longer is an operation of its own."""
    return frozenset(path for path, key in schema().items() if key.type != "section" and key.kind == "identity")


@cache
def source_keys() -> dict[str, Key]:
    """The keys of one entry of data.sources."""
    found: dict[str, Key] = {}
    _collect(Source, "", found)
    return found


@cache
def model_names() -> frozenset[str]:
    """Every name by which a model key can be given."""
    return frozenset(ModelConfig.model_fields) | frozenset(ALIASES["model"])


def canonical(section: str, name: str) -> str:
    """The name of a key in its section, where other names in use elsewhere are known too."""
    return ALIASES.get(section, {}).get(name, name)


def find(name: str) -> list[str]:
    """The dotted paths that a name given without or with its section can mean: none, one, or (ambiguous) several."""
    section, _, last = name.rpartition(".")
    if section:
        path = f"{section}.{canonical(section, last)}"
        return [path] if path in schema() else []
    if name in schema():
        return [name]
    return [path for part in SECTIONS if (path := f"{part}.{canonical(part, name)}") in schema()]


def nearest(name: str, section: str = "") -> tuple[str, str | None]:
    """A sentence that helps with an unknown key, and the path of the key that it names (None when it names none)."""
    last = name.rpartition(".")[2]
    if last in NEAR_ALIASES:
        return NEAR_ALIASES[last], None
    if last == section and section in SECTIONS:
        return f"put its keys directly under {section}", None
    if found := find(last):
        return f"did you mean {' or '.join(found)}?", found[0]
    close = _closest(last, [path.rpartition(".")[2] for path in schema() if path.rpartition(".")[0] == section])
    if close:
        path = f"{section}.{close}" if section else close
        return f"did you mean {path}?", path
    names = [path.rpartition(".")[2] for path in schema()]
    close = _closest(last, [*names, *(alias for part in ALIASES.values() for alias in part)])
    if close:
        path = find(close)[0]
        return f"did you mean {path}?", path
    siblings = [path.rpartition(".")[2] for path in schema() if path.rpartition(".")[0] == section]
    return f"the keys {'of ' + section if section else 'here'} are {', '.join(siblings)}", None


def nearest_source_key(name: str) -> str:
    """A sentence that helps with an unknown key of a source."""
    close = _closest(name, source_keys())
    return f"did you mean {close}?" if close else f"the keys of a source are {', '.join(source_keys())}"


def _closest(name: str, names: Iterable[str]) -> str | None:
    if len(name) > 60:
        return None
    close = difflib.get_close_matches(name.lower(), list(names), n=1, cutoff=0.6)
    return close[0] if close else None


def _collect(schema: type[BaseModel], prefix: str, found: dict[str, Key], section_kind: Any = None) -> None:
    for name, field in schema.model_fields.items():
        inner, optional = _without_none(field.annotation)
        type_, path = _type(inner), prefix + name
        extra = field.json_schema_extra
        kind = extra.get("kind", section_kind) if isinstance(extra, dict) else section_kind
        found[path] = Key(
            path, type_, optional or field.default is None, _allowed(type_, inner, field), field.description or "", kind
        )
        if type_ == "section":
            _collect(inner, f"{path}.", found, kind)


def _without_none(annotation: Any) -> tuple[Any, bool]:
    if get_origin(annotation) in (Union, types.UnionType):
        inner = [part for part in get_args(annotation) if part is not type(None)]
        return inner[0], True
    return annotation, False


def _type(annotation: Any) -> Literal["int", "float", "bool", "text", "list", "section"]:
    if get_origin(annotation) is list:
        return "list"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    types_: dict[Any, Literal["int", "float", "bool"]] = {int: "int", float: "float", bool: "bool"}
    return types_.get(annotation, "text")


def _allowed(type_: str, annotation: Any, field: FieldInfo) -> str:
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(map(str, get_args(annotation)))
    if type_ in ("int", "float"):
        return ("a whole number" if type_ == "int" else "a number") + _range(field)
    return {"bool": "true or false", "list": "a list", "section": "a group of keys"}.get(type_, _text(field))


def _text(field: FieldInfo) -> str:
    for pattern in filter(None, (getattr(part, "pattern", None) for part in field.metadata)):
        if "cuda" in pattern:
            return "one of auto, cpu, cuda, cuda:0, cuda:1, ..."
        return "whole numbers, separated by commas"
    return "text that is not empty"


def _range(field: FieldInfo) -> str:
    words = []
    for name, word in (("ge", "at least"), ("gt", "above"), ("le", "at most"), ("lt", "below")):
        for part in field.metadata:
            if getattr(part, name, None) is not None:
                words.append(f"{word} {_number(getattr(part, name))}")
    return " " + " and ".join(words) if words else ""


def _number(value: float) -> str:
    return f"{value:_}" if isinstance(value, int) and value < 10**10 else f"{value:g}"
