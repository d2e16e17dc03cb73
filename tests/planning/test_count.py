"""Counting by arithmetic: known totals, sums by hand, and the built model."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kiem.config.model import ModelConfig
from kiem.planning.count import flops_per_token, parameter_shapes, parameters, parameters_by_module, total_parameters

GPT2 = {"vocab_size": 50257, "context_length": 1024, "emb_dim": 768, "n_heads": 12, "n_layers": 12}
MODERN = {"norm": "rmsnorm", "activation": "swiglu", "position": "rope", "qk_norm": True, "bias": False}


@pytest.mark.parametrize(
    ("fields", "total"),
    [
        ({}, 124_412_160),
        ({"qkv_bias": True}, 124_439_808),
        ({"tie_embeddings": False}, 163_009_536),
        ({"emb_dim": 1024, "n_heads": 16, "n_layers": 24, "qkv_bias": True}, 354_823_168),
        ({"emb_dim": 1280, "n_heads": 20, "n_layers": 36, "qkv_bias": True}, 774_030_080),
        ({"emb_dim": 1600, "n_heads": 25, "n_layers": 48, "qkv_bias": True}, 1_557_611_200),
    ],
)
def test_gpt2_totals_as_published(fields, total):
    assert total_parameters(ModelConfig(**{**GPT2, **fields})) == total


def test_qwen3_06b_as_published():
    model = ModelConfig(
        vocab_size=151_936,
        context_length=40_960,
        emb_dim=1024,
        n_heads=16,
        n_kv_heads=8,
        head_dim=128,
        n_layers=28,
        hidden_dim=3072,
        **MODERN,
    )
    assert total_parameters(model) == 596_049_920


def test_modules_by_hand():
    model = ModelConfig(
        vocab_size=11,
        context_length=7,
        emb_dim=8,
        n_heads=4,
        n_kv_heads=2,
        head_dim=6,
        n_layers=3,
        hidden_dim=10,
        tie_embeddings=False,
        **MODERN,
    )
    assert parameters_by_module(model) == {
        "tok_emb": 11 * 8,
        "blocks.*.norm1": 3 * 8,
        "blocks.*.attn.q": 3 * 8 * 24,
        "blocks.*.attn.k": 3 * 8 * 12,
        "blocks.*.attn.v": 3 * 8 * 12,
        "blocks.*.attn.out": 3 * 24 * 8,
        "blocks.*.attn.q_norm": 3 * 6,
        "blocks.*.attn.k_norm": 3 * 6,
        "blocks.*.norm2": 3 * 8,
        "blocks.*.mlp.gate": 3 * 80,
        "blocks.*.mlp.up": 3 * 80,
        "blocks.*.mlp.down": 3 * 80,
        "final_norm": 8,
        "head": 11 * 8,
    }
    assert parameters(model)["blocks.2.attn.q.weight"] == 8 * 24
    assert parameter_shapes(model)["blocks.0.attn.out.weight"] == (8, 24)


def test_flops_by_hand():
    model = ModelConfig(vocab_size=10, context_length=4, emb_dim=2, n_heads=1, n_layers=1)
    # Matrices: q, k, v, out 4 * 2x2; up and down 2 * 2x8; head 10x2: 68 weights.
    # Attention: queries 0..3 see 1, 2, 3, 4 keys: 10 pairs in 4 tokens, each 2*2 for the score and 2*2 for the value.
    flops = flops_per_token(model, 4)
    assert (flops.forward_matrix, flops.forward_attention) == (2 * 68, 10 * 8 // 4)
    assert (flops.backward_matrix, flops.backward_attention) == (4 * 68, 2 * 20)
    assert flops.forward + flops.backward == flops.total == 3 * (136 + 20)


def test_flops_of_gpt2_beside_the_formula_of_nanogpt():
    model = ModelConfig(**GPT2)
    flops = flops_per_token(model, 1024)
    matrices = 6 * (50257 * 768 + 12 * 12 * 768 * 768)
    assert flops.forward_matrix + flops.backward_matrix == matrices
    full = 12 * 12 * 12 * 64 * 1024  # nanoGPT: 12 * L * H * Q * T, every key for every query
    causal = flops.forward_attention + flops.backward_attention
    assert causal == full // 2 + full // 2048  # half of it, and the diagonal


def test_flops_are_per_token_at_the_rows_length():
    model = ModelConfig(**GPT2)
    assert flops_per_token(model, 512).forward_matrix == flops_per_token(model, 1024).forward_matrix
    assert flops_per_token(model, 511).forward_attention * 1025 == flops_per_token(model, 1024).forward_attention * 512
    assert flops_per_token(model) == flops_per_token(model, 1024)


@st.composite
def models(draw):
    """Small models of every combination of fields."""
    n_kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    heads, rope = n_kv_heads * group, draw(st.booleans())
    head_dim = 2 * draw(st.integers(1, 4)) if rope else draw(st.integers(1, 8))
    return ModelConfig(
        vocab_size=draw(st.integers(2, 300)),
        context_length=draw(st.integers(2, 64)),
        emb_dim=draw(st.integers(1, 40)),
        n_heads=heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        n_layers=draw(st.integers(1, 3)),
        hidden_dim=draw(st.integers(1, 50)),
        qkv_bias=draw(st.booleans()),
        bias=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
        tie_embeddings=draw(st.booleans()),
        position="rope" if rope else "learned",
        **draw(
            st.sampled_from([{"norm": "rmsnorm"}, {"norm": "layernorm"}, {"norm": "layernorm", "norm_bias": False}])
        ),
        drop_rate=draw(st.sampled_from([0.0, 0.1])),
        activation=draw(st.sampled_from(["gelu", "gelu_tanh", "swiglu"])),
    )


@settings(max_examples=60, deadline=None)
@given(models())
def test_names_and_shapes_are_those_of_the_built_model(model):
    import torch

    from kiem.model.transformer import Transformer

    with torch.device("meta"):
        built = Transformer(model)
    assert parameter_shapes(model) == {name: tuple(p.shape) for name, p in built.named_parameters()}
    assert (
        total_parameters(model)
        == sum(p.numel() for p in built.parameters())
        == sum(parameters_by_module(model).values())
    )
