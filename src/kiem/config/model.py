"""The model configuration: what a GPT is, in the field's standard names.

The first seven keys are those of the GPT-2 configuration as it is usually written down (`GPT_CONFIG_124M`). The others
have defaults that give exactly GPT-2, so that those seven keys alone build it. A family (gpt2, llama, qwen3, ...) is a
set of values of these fields (config/families.py), not a class.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Norm = Literal["layernorm", "rmsnorm"]
Activation = Literal["gelu_tanh", "gelu", "swiglu"]
Position = Literal["learned", "rope"]
RopeScaling = Literal["none", "linear", "llama3"]


# The default of a field that is derived: None until it is. The field is typed as what it then is, as that is what all
# code behind the configuration works with.
DERIVED: Any = None


class Config(BaseModel):
    """Frozen, and closed: an unknown key is an error. Null stands for a default that is derived."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _null_is_derived(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        derived = {name for name, field in cls.model_fields.items() if field.default is None}
        return {name: value for name, value in values.items() if value is not None or name not in derived}


class ModelConfig(Config):
    """A decoder-only transformer."""

    vocab_size: int = Field(
        DERIVED, ge=2, le=4_000_000, description="rows of the token embedding; default and minimum: the tokenizer's"
    )
    context_length: int = Field(ge=2, le=4_194_304, description="maximum number of tokens the model sees at once")
    emb_dim: int = Field(ge=1, le=65_536, description="width of the residual stream")
    n_heads: int = Field(
        ge=1, le=1_024, description="attention heads; emb_dim is divisible by it unless head_dim is set"
    )
    n_layers: int = Field(ge=1, le=1_024, description="transformer blocks, the depth")
    drop_rate: float = Field(
        0.0, ge=0.0, lt=1.0, description="dropout on embeddings, attention weights and residual branches"
    )
    qkv_bias: bool = Field(False, description="bias on the query, key and value projections")

    hidden_dim: int = Field(
        DERIVED, ge=1, le=1_048_576, description="hidden width of the feed-forward; default 4 * emb_dim"
    )
    n_kv_heads: int = Field(DERIVED, ge=1, le=1_024, description="key and value heads (grouped-query); default n_heads")
    head_dim: int = Field(DERIVED, ge=1, le=1_024, description="width of one head; default emb_dim / n_heads")
    norm: Norm = Field("layernorm", description="normalization before each branch and at the end")
    norm_eps: float = Field(1e-5, gt=0.0, le=0.1, description="epsilon of the norms, added to the variance")
    norm_bias: bool = Field(DERIVED, description="bias of the norms; default true with layernorm, rmsnorm has none")
    activation: Activation = Field("gelu_tanh", description="swiglu has a gate matrix beside the up matrix")
    position: Position = Field("learned", description="learned position embeddings, or rotary (RoPE)")
    rope_base: float = Field(
        DERIVED, gt=1.0, le=1e9, description="base of the rotary frequencies; default 10000 with rope"
    )
    rope_scaling: RopeScaling = Field(
        "none", description="linear: positions / rope_factor; llama3: only long wavelengths are stretched, smoothly"
    )
    rope_factor: float = Field(
        DERIVED, ge=1.0, le=1e6, description="factor by which rope_scaling stretches wavelengths"
    )
    rope_original_context_length: int = Field(
        DERIVED, ge=1, le=4_194_304, description="context that llama3's scaling starts from; default context_length"
    )
    rope_low_freq_factor: float = Field(
        DERIVED,
        gt=0.0,
        le=1e6,
        description="llama3: wavelengths above original context / this are stretched; default 1",
    )
    rope_high_freq_factor: float = Field(
        DERIVED, gt=0.0, le=1e6, description="llama3: wavelengths below original context / this stay; default 4"
    )
    qk_norm: bool = Field(False, description="RMSNorm on each head's queries and keys, before RoPE")
    bias: bool = Field(True, description="bias on the output and feed-forward projections")
    tie_embeddings: bool = Field(True, description="the output head is the token embedding")

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: Any) -> Any:
        """Write the defaults that follow from other fields, so that a parsed config has no gaps but vocab_size."""
        return values | derived(values) if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _fits(self) -> "ModelConfig":
        if problems := [*_head_problems(self), *_rope_problems(self)]:
            raise ValueError("; ".join(problems))
        return self


def derived(values: dict[str, Any]) -> dict[str, Any]:
    """The fields that follow from those given, where they are not given; values that are wrong derive nothing."""
    given: dict[str, Any] = {name: value for name, value in values.items() if value is not None}
    emb_dim: Any = given.get("emb_dim")
    n_heads: Any = given.get("n_heads")
    norm = given.get("norm", "layernorm")
    found: dict[str, Any] = {"norm_bias": norm == "layernorm"}
    if _positive(emb_dim):
        found["hidden_dim"] = 4 * emb_dim
    if _positive(n_heads):
        found["n_kv_heads"] = n_heads
    if _positive(emb_dim) and _positive(n_heads) and emb_dim % n_heads == 0:
        found["head_dim"] = emb_dim // n_heads
    if given.get("position") == "rope":
        found["rope_base"] = 10_000.0
    if given.get("rope_scaling") == "llama3":
        found |= {"rope_low_freq_factor": 1.0, "rope_high_freq_factor": 4.0}
        found["rope_original_context_length"] = given.get("context_length")
    return {name: value for name, value in found.items() if name not in given and value is not None}


def _positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _head_problems(model: ModelConfig) -> list[str]:
    problems = []
    if model.head_dim is None:
        near = [d for d in range(1, model.emb_dim + 1) if model.emb_dim % d == 0]
        near = sorted(sorted(near, key=lambda d: abs(d - model.n_heads))[:3])
        problems.append(
            f"emb_dim {model.emb_dim} is not divisible by n_heads {model.n_heads}: use n_heads "
            f"{' or '.join(map(str, near))}, or set head_dim"
        )
    if model.n_kv_heads is not None and model.n_heads % model.n_kv_heads:
        problems.append(f"n_heads {model.n_heads} is not divisible by n_kv_heads {model.n_kv_heads}")
    if model.norm == "rmsnorm" and model.norm_bias:
        problems.append("norm_bias has no effect with norm 'rmsnorm', which has none: remove it")
    return problems


_SCALED = {  # rope_scaling -> the fields that it uses
    "none": (),
    "linear": ("rope_factor",),
    "llama3": ("rope_factor", "rope_original_context_length", "rope_low_freq_factor", "rope_high_freq_factor"),
}


def _rope_problems(model: ModelConfig) -> list[str]:
    problems, used = [], _SCALED[model.rope_scaling]
    if model.position == "rope" and model.head_dim is not None and model.head_dim % 2:
        problems.append(f"head_dim {model.head_dim} is odd, and rotary embeddings rotate pairs: use an even head_dim")
    if model.position == "learned" and model.rope_base is not None:
        problems.append("rope_base has no effect with position 'learned': remove it, or set position: rope")
    if model.position == "learned" and used:
        problems.append("rope_scaling has no effect with position 'learned': remove it, or set position: rope")
    for name in _SCALED["llama3"]:
        if name not in used and getattr(model, name) is not None:
            problems.append(f"{name} has no effect with rope_scaling '{model.rope_scaling}': remove it")
    if used and model.rope_factor is None:
        problems.append(f"rope_scaling '{model.rope_scaling}' needs rope_factor: give it, such as rope_factor: 8.0")
    if model.rope_scaling == "llama3" and not model.rope_low_freq_factor < model.rope_high_freq_factor:
        problems.append(
            f"rope_low_freq_factor {model.rope_low_freq_factor:g} is not below rope_high_freq_factor "
            f"{model.rope_high_freq_factor:g}: make it lower"
        )
    return problems
