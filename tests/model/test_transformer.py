"""Every field of the config does something, and the model is built as the config says."""

import math

import pytest
import torch

from kiem.config.model import ModelConfig
from kiem.model.transformer import Transformer

GPT2 = dict(vocab_size=50, context_length=16, emb_dim=24, n_heads=4, n_layers=2)
QWEN3 = GPT2 | dict(
    norm="rmsnorm", position="rope", qk_norm=True, activation="swiglu", bias=False, tie_embeddings=False, n_kv_heads=2
)
TOKENS = torch.randint(0, 50, (2, 16), generator=torch.Generator().manual_seed(0))


def build(fields):
    return Transformer(ModelConfig(**fields)).initialize(3)


def shapes(model):
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


@pytest.mark.parametrize(("base", "field", "value"), [
    (GPT2, "vocab_size", 51), (GPT2, "context_length", 17), (GPT2, "emb_dim", 28), (GPT2, "n_layers", 3),
    (GPT2, "qkv_bias", True), (GPT2, "hidden_dim", 50),
    (GPT2, "n_kv_heads", 2), (GPT2, "head_dim", 8), (GPT2, "norm", "rmsnorm"), (GPT2, "norm_bias", False),
    (GPT2, "activation", "swiglu"), (GPT2, "position", "rope"), (GPT2, "qk_norm", True), (GPT2, "bias", False),
    (GPT2, "tie_embeddings", False),
])  # fmt: skip
def test_fields_that_change_the_parameters(base, field, value):
    assert shapes(build(base)) != shapes(build(base | {field: value}))


@pytest.mark.parametrize(("base", "field", "value"), [
    (GPT2, "n_heads", 2), (GPT2, "norm_eps", 1e-2), (GPT2, "activation", "gelu"), (QWEN3, "rope_base", 100.0),
])  # fmt: skip
def test_fields_that_change_the_numbers(base, field, value):
    one, two = build(base).eval(), build(base | {field: value}).eval()
    two.load_state_dict(one.state_dict())
    # Positions tell nothing through branches that are near zero: make them count.
    for model in (one, two):
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(5.0)
    difference = (one(TOKENS) - two(TOKENS)).abs().max().item()
    assert difference > 1e-6 * one(TOKENS).abs().max().item()


def test_dropout_in_training_only():
    model = build(GPT2 | {"drop_rate": 0.5})
    assert torch.equal(model.eval()(TOKENS), build(GPT2).eval()(TOKENS))
    torch.manual_seed(0)
    first = model.train()(TOKENS)
    assert not torch.equal(first, model(TOKENS))


def test_gpt_config_124m_has_the_known_count():
    """The chapter's seven keys, tied: 124,412,160; with the bias 124,439,808; untied 163,009,536."""
    config = ModelConfig(
        vocab_size=50257, context_length=1024, emb_dim=768, n_heads=12, n_layers=12, drop_rate=0.1, qkv_bias=False
    )
    for changes, count in (
        ({}, 124_412_160),
        ({"qkv_bias": True}, 124_439_808),
        ({"tie_embeddings": False}, 163_009_536),
    ):
        with torch.device("meta"):
            model = Transformer(config.model_copy(update=changes))
        assert sum(p.numel() for p in model.parameters()) == count


def test_initial_weights_gpt2():
    model = build(GPT2 | {"vocab_size": 5000, "emb_dim": 128, "n_layers": 8})
    std = lambda name: dict(model.named_parameters())[name].std().item()  # noqa: E731
    assert std("tok_emb.weight") == pytest.approx(0.02, rel=0.05)
    assert std("blocks.3.mlp.up.weight") == pytest.approx(0.02, rel=0.05)
    assert std("blocks.3.mlp.down.weight") == pytest.approx(0.02 / math.sqrt(16), rel=0.05)


def test_zero_output_begins_as_the_identity():
    model = Transformer(ModelConfig(**QWEN3)).initialize(0, "zero_output")
    features = []
    model.final_norm.register_forward_hook(lambda module, given, x_BTD: features.append(x_BTD))
    assert not model(TOKENS).any()
    assert torch.equal(features[0], model.final_norm(model.tok_emb(TOKENS)))


def test_same_seed_same_weights():
    for a, b in zip(build(QWEN3).parameters(), build(QWEN3).parameters(), strict=True):
        assert torch.equal(a, b)
    different = Transformer(ModelConfig(**QWEN3)).initialize(4)
    assert not torch.equal(different.tok_emb.weight, build(QWEN3).tok_emb.weight)


def test_no_position_sees_a_later_one():
    for fields in (GPT2, QWEN3):
        model = build(fields).eval()
        other = TOKENS.clone()
        other[:, 9] = (other[:, 9] + 1) % 50
        a, b = model(TOKENS), model(other)
        assert torch.equal(a[:, :9], b[:, :9])
        assert not torch.equal(a[:, 9:], b[:, 9:])


def test_bfloat16_is_near_float32():
    model = build(QWEN3).eval()
    exact = model(TOKENS)
    model.compute_dtype = torch.bfloat16
    # Two blocks, each a chain of about ten roundings to bfloat16
    assert (model(TOKENS) - exact).norm() < 20 * torch.finfo(torch.bfloat16).eps * exact.norm()


# What torch.compile does to tensors and Functions that are not its own:
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_blocks_give_the_same_numbers():
    model = build(QWEN3)
    exact = model(TOKENS)
    for block in model.blocks:
        block.compile(backend="aot_eager")
    torch.testing.assert_close(model(TOKENS), exact, rtol=1e-5, atol=1e-6)
