"""Parameters and FLOPs of a model by arithmetic, from its configuration alone. No torch.

Letters: D embedding, H query heads, G key and value heads, K head size, F hidden, T time.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from kiem.config.model import ModelConfig

Shape = tuple[int, ...]


def parameter_shapes(model: ModelConfig) -> dict[str, Shape]:
    """Shape of every trainable parameter by its name in the built model. A tied head is the token embedding."""
    shapes: dict[str, Shape] = {"tok_emb.weight": (model.vocab_size, model.emb_dim)}
    if model.position == "learned":
        shapes["pos_emb.weight"] = (model.context_length, model.emb_dim)
    block = dict(_block_shapes(model))
    for i in range(model.n_layers):
        shapes.update({f"blocks.{i}.{name}": shape for name, shape in block.items()})
    shapes.update(_norm_shapes("final_norm", model.emb_dim, model.norm_bias))
    if not model.tie_embeddings:
        shapes["head.weight"] = (model.vocab_size, model.emb_dim)
    return shapes


def _block_shapes(model: ModelConfig) -> Iterator[tuple[str, Shape]]:
    D, H, G, K, F = model.emb_dim, model.n_heads, model.n_kv_heads, model.head_dim, model.hidden_dim
    yield from _norm_shapes("norm1", D, model.norm_bias)
    for name, width in (("attn.q", H * K), ("attn.k", G * K), ("attn.v", G * K)):
        yield from _linear_shapes(name, width, D, model.qkv_bias)
    yield from _linear_shapes("attn.out", D, H * K, model.bias)
    if model.qk_norm:
        yield from _norm_shapes("attn.q_norm", K, bias=False)
        yield from _norm_shapes("attn.k_norm", K, bias=False)
    yield from _norm_shapes("norm2", D, model.norm_bias)
    for name in ("mlp.gate", "mlp.up") if model.activation == "swiglu" else ("mlp.up",):
        yield from _linear_shapes(name, F, D, model.bias)
    yield from _linear_shapes("mlp.down", D, F, model.bias)


def _linear_shapes(name: str, out: int, into: int, bias: bool) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (out, into)
    if bias:
        yield f"{name}.bias", (out,)


def _norm_shapes(name: str, width: int, bias: bool) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (width,)
    if bias:
        yield f"{name}.bias", (width,)


def parameters(model: ModelConfig) -> dict[str, int]:
    """Number of trainable parameters by name; a tied head is counted once, as the token embedding."""
    return {name: prod(shape) for name, shape in parameter_shapes(model).items()}


def total_parameters(model: ModelConfig) -> int:
    """All trainable parameters. GPT-2 small: 124,439,808."""
    return sum(parameters(model).values())


def parameters_by_module(model: ModelConfig) -> dict[str, int]:
    """Number of parameters by module, blocks taken together (`blocks.*.attn.q`); the values add up to the total."""
    totals: dict[str, int] = {}
    for name, count in parameters(model).items():
        module = name.rsplit(".", 1)[0]
        if module.startswith("blocks."):
            module = "blocks.*." + module.split(".", 2)[2]
        totals[module] = totals.get(module, 0) + count
    return totals


@dataclass(frozen=True)
class Flops:
    """Floating-point operations per trained token; a multiply and an add are two."""

    forward_matrix: int
    forward_attention: int
    backward_matrix: int
    backward_attention: int

    @property
    def forward(self) -> int:
        return self.forward_matrix + self.forward_attention

    @property
    def backward(self) -> int:
        return self.backward_matrix + self.backward_attention

    @property
    def total(self) -> int:
        return self.forward + self.backward


def flops_per_token(model: ModelConfig, context_length: int | None = None) -> Flops:
    """Model FLOPs per token of training at rows of `context_length` tokens (default: the model's).

    Matrix products: 2 per weight of a matrix that a token is multiplied with, forward, and twice that backward (for the
    input and for the weight): the 6N of PaLM appendix B (arXiv:2204.02311) and of nanoGPT's estimate_mfu.
    The output head counts, tied or not; look-ups (token and position embeddings) are no products and count nothing.

    Attention: scores and their product with the values are 2*H*K each per pair of query and key. Causal attention is
    counted as it is computed: a token at position t sees t+1 keys, (T+1)/2 on average. PaLM and nanoGPT count all T,
    about twice as many. Norms, activations, softmax, the optimizer, and what is computed a second time (activation
    checkpointing, scores inside fused attention) do not count: these are FLOPs of the model, not of one way to run it.
    """
    length = min(context_length or model.context_length, model.context_length)
    matrices = sum(
        prod(shape) for name, shape in parameter_shapes(model).items() if len(shape) == 2 and name.startswith("blocks.")
    )
    matrix = 2 * (matrices + model.vocab_size * model.emb_dim)
    attention = model.n_layers * 2 * model.n_heads * model.head_dim * (length + 1)
    return Flops(matrix, attention, 2 * matrix, 2 * attention)
