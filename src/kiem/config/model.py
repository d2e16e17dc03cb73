"""The model configuration: what a GPT is, in the field's standard names.

The first seven keys are those of the GPT-2 configuration as it is usually written down (`GPT_CONFIG_124M`). The
others have
defaults that give exactly GPT-2, so that those seven keys alone build it. A family (gpt2, llama, qwen3) is a set of
values of these fields (config/presets.py), not a class.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Norm = Literal["layernorm", "rmsnorm"]
Activation = Literal["gelu_tanh", "gelu", "swiglu"]
Position = Literal["learned", "rope"]


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

    vocab_size: int = Field(ge=2, le=4_000_000, description="entries of the token embedding, at least the tokenizer's")
    context_length: int = Field(ge=2, le=4_194_304, description="most tokens the model sees at once")
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
        DERIVED, ge=1, le=1_048_576, description="width inside the feed-forward; default 4 * emb_dim"
    )
    n_kv_heads: int = Field(DERIVED, ge=1, le=1_024, description="key and value heads (grouped-query); default n_heads")
    head_dim: int = Field(DERIVED, ge=1, le=1_024, description="width of one head; default emb_dim / n_heads")
    norm: Norm = Field("layernorm", description="normalisation before each branch and at the end")
    norm_eps: float = Field(1e-5, gt=0.0, le=0.1, description="added to the variance inside the norm")
    activation: Activation = Field("gelu_tanh", description="swiglu has a gate matrix beside the up matrix")
    position: Position = Field("learned", description="learned position embeddings, or rotary (RoPE)")
    rope_base: float = Field(
        DERIVED, gt=1.0, le=1e9, description="base of the rotary frequencies; default 10000 with rope"
    )
    qk_norm: bool = Field(False, description="RMSNorm on each head's queries and keys, before RoPE")
    bias: bool = Field(True, description="bias on the output and feed-forward projections")
    tie_embeddings: bool = Field(True, description="the output head is the token embedding")

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: Any) -> Any:
        """Write the defaults that follow from other fields, so that a parsed config has no gaps."""
        if not isinstance(values, dict):
            return values
        values = dict(values)
        emb_dim, n_heads = values.get("emb_dim"), values.get("n_heads")
        whole = lambda x: isinstance(x, int) and not isinstance(x, bool) and x > 0  # noqa: E731
        if values.get("hidden_dim") is None and whole(emb_dim):
            values["hidden_dim"] = 4 * emb_dim
        if values.get("n_kv_heads") is None and whole(n_heads):
            values["n_kv_heads"] = n_heads
        if values.get("head_dim") is None and whole(emb_dim) and whole(n_heads) and emb_dim % n_heads == 0:
            values["head_dim"] = emb_dim // n_heads
        if values.get("rope_base") is None and values.get("position") == "rope":
            values["rope_base"] = 10_000.0
        return values

    @model_validator(mode="after")
    def _fits(self) -> "ModelConfig":
        problems = []
        if self.head_dim is None:
            near = [d for d in range(1, self.emb_dim + 1) if self.emb_dim % d == 0]
            near = sorted(sorted(near, key=lambda d: abs(d - self.n_heads))[:3])
            problems.append(
                f"emb_dim {self.emb_dim} is not divisible by n_heads {self.n_heads}: use n_heads "
                f"{' or '.join(map(str, near))}, or set head_dim"
            )
        if self.n_kv_heads is not None and self.n_heads % self.n_kv_heads:
            problems.append(f"n_heads {self.n_heads} is not divisible by n_kv_heads {self.n_kv_heads}")
        if self.position == "rope" and self.head_dim is not None and self.head_dim % 2:
            problems.append(f"head_dim {self.head_dim} is odd: rotary positions turn pairs, use an even head_dim")
        if self.position == "learned" and self.rope_base is not None:
            problems.append("rope_base has no effect with position 'learned': remove it, or set position: rope")
        if problems:
            raise ValueError("; ".join(problems))
        return self
