"""Weights under Hugging Face names and back, bit for bit. (That they mean the same is tests/model/test_parity.py.)"""

import pytest
import torch

from kiem.config.model import ModelConfig
from kiem.errors import CheckpointError
from kiem.interop.hf import from_hf_state, to_hf_state
from kiem.model.transformer import Transformer

SMALL = {"vocab_size": 23, "context_length": 8, "emb_dim": 12, "n_heads": 3, "n_layers": 2}
ROPE = {"norm": "rmsnorm", "activation": "swiglu", "position": "rope", "n_kv_heads": 1, "hidden_dim": 20}
CONFIGS = {
    "gpt2": ModelConfig(**SMALL, qkv_bias=True),
    "gpt2-bare": ModelConfig(**SMALL, bias=False, tie_embeddings=False),
    "llama": ModelConfig(**SMALL, **ROPE, bias=False),
    "llama-some-biases": ModelConfig(**SMALL, **ROPE, qkv_bias=False, bias=True, tie_embeddings=False),
    "qwen3": ModelConfig(**SMALL, **ROPE, qk_norm=True, bias=False, qkv_bias=True),
}


def build(config: ModelConfig) -> Transformer:
    model = Transformer(config).initialize(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_there_and_back_bit_for_bit(name):
    model = build(CONFIGS[name])
    state = to_hf_state(model)
    assert all(tensor.is_contiguous() and tensor.dtype == torch.float32 for tensor in state.values())
    back = from_hf_state(model.config, state)
    assert back.keys() == model.state_dict().keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in model.state_dict().items())
    Transformer(model.config).load_state_dict(back)


def test_layout_of_gpt2_by_hand():
    """c_attn is (in, 3 * out): queries, then keys, then values, transposed. The head is tied, so it is not there."""
    model = build(CONFIGS["gpt2"])
    state = to_hf_state(model)
    assert "lm_head.weight" not in state and len(state) == 2 + 2 * 12 + 2
    attn = model.blocks[1].attn
    fused = state["transformer.h.1.attn.c_attn.weight"]
    assert fused.shape == (12, 36)
    assert torch.equal(fused[:, 12:24], attn.k.weight.T)
    assert torch.equal(state["transformer.h.1.attn.c_attn.bias"][24:], attn.v.bias)
    assert torch.equal(state["transformer.h.0.mlp.c_fc.weight"], model.blocks[0].mlp.up.weight.T)


def test_a_bias_that_only_the_family_has_is_zero():
    state = to_hf_state(build(CONFIGS["gpt2-bare"]))
    assert not state["transformer.h.0.attn.c_attn.bias"].any() and not state["transformer.h.0.mlp.c_proj.bias"].any()
    state = to_hf_state(build(CONFIGS["llama-some-biases"]))
    assert (
        state["model.layers.0.self_attn.q_proj.bias"].shape == (12,)
        and state["model.layers.0.self_attn.o_proj.bias"].any()
    )
    assert not state["model.layers.0.self_attn.q_proj.bias"].any()


def test_published_gpt2_files_have_no_prefix_a_mask_buffer_and_half_precision():
    model = build(CONFIGS["gpt2"])
    state = {name.removeprefix("transformer."): tensor.half() for name, tensor in to_hf_state(model).items()}
    state |= {"h.0.attn.bias": torch.ones(1, 1, 8, 8), "h.1.attn.masked_bias": torch.tensor(-1e4)}
    state["lm_head.weight"] = state["wte.weight"]
    back = from_hf_state(model.config, state)
    assert back.keys() == model.state_dict().keys()
    assert torch.equal(back["blocks.0.attn.q.weight"], model.blocks[0].attn.q.weight.half().float())


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda s: s.pop("transformer.h.1.mlp.c_fc.weight"), ["transformer.h.1.mlp.c_fc.weight", "missing"]),
        (
            lambda s: s.update({"transformer.wte.weight": torch.zeros(22, 12)}),
            ["transformer.wte.weight", "(22, 12)", "(23, 12)"],
        ),
        (
            lambda s: s.update({"transformer.h.0.attn.c_attn.weight": torch.zeros(36, 12)}),
            ["c_attn", "(36, 12)", "attn.k.weight"],
        ),
        (
            lambda s: s.update({"transformer.h.2.ln_1.weight": torch.zeros(12)}),
            ["transformer.h.2.ln_1.weight", "does not have"],
        ),
        (lambda s: s.update({"lm_head.weight": torch.zeros(23, 12)}), ["lm_head.weight", "tie_embeddings"]),
    ],
)
def test_a_state_that_does_not_fit_names_the_tensor(spoil, words):
    state = to_hf_state(build(CONFIGS["gpt2"]))
    spoil(state)
    with pytest.raises(CheckpointError) as caught:
        from_hf_state(CONFIGS["gpt2"], state)
    assert all(word in str(caught.value) for word in words)


def test_a_bias_that_the_config_lacks_must_be_zero():
    state = to_hf_state(build(CONFIGS["gpt2"]))
    without = ModelConfig(**SMALL, qkv_bias=False)
    with pytest.raises(CheckpointError, match=r"c_attn\.bias is not zero.*qkv_bias False"):
        from_hf_state(without, state)
    for i in range(2):
        state[f"transformer.h.{i}.attn.c_attn.bias"].zero_()
    assert "blocks.0.attn.q.bias" not in from_hf_state(without, state)
