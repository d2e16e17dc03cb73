"""Configs of the ecosystem's families, read both ways."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kiem.config.families import FAMILIES, from_hf_config
from kiem.config.model import ModelConfig
from kiem.errors import ConfigError
from kiem.interop.families import family_of, to_hf_config

GPT2 = {"vocab_size": 50257, "context_length": 1024, "emb_dim": 768, "n_heads": 12, "n_layers": 12, "qkv_bias": True}
QWEN3 = {
    "vocab_size": 4096,
    "context_length": 256,
    "emb_dim": 192,
    "n_heads": 4,
    "n_layers": 3,
    "n_kv_heads": 2,
    "hidden_dim": 512,
    "norm": "rmsnorm",
    "activation": "swiglu",
    "position": "rope",
    "qk_norm": True,
    "bias": False,
}
LLAMA = QWEN3 | {"qk_norm": False}


def test_families_of_configs():
    assert family_of(ModelConfig(**GPT2)) == "gpt2"
    assert family_of(ModelConfig(**LLAMA)) == "llama"
    assert family_of(ModelConfig(**QWEN3)) == "qwen3"


@pytest.mark.parametrize(
    "change",
    [
        {"position": "rope"},
        {"norm": "rmsnorm"},
        {"activation": "swiglu"},
        {"n_kv_heads": 4},
        {"head_dim": 32},
        {"qk_norm": True},
    ],
)
def test_gpt2_with_a_part_of_another_family_is_in_none(change):
    config = ModelConfig(**GPT2 | change)
    assert family_of(config) is None
    with pytest.raises(ConfigError) as caught:
        to_hf_config(config)
    text = str(caught.value)
    assert all(f"{name} needs" in text for name, family in FAMILIES.items() if family.written)
    assert next(iter(change)) in text and str(next(iter(change.values()))) in text


def test_the_published_gpt2_config():
    """The keys and values of openai-community/gpt2's config.json that describe the architecture."""
    published = {
        "activation_function": "gelu_new",
        "architectures": ["GPT2LMHeadModel"],
        "attn_pdrop": 0.1,
        "bos_token_id": 50256,
        "embd_pdrop": 0.1,
        "eos_token_id": 50256,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05,
        "model_type": "gpt2",
        "n_ctx": 1024,
        "n_embd": 768,
        "n_head": 12,
        "n_layer": 12,
        "n_positions": 1024,
        "resid_pdrop": 0.1,
        "summary_activation": None,
        "summary_first_dropout": 0.1,
        "summary_proj_to_labels": True,
        "vocab_size": 50257,
    }
    assert from_hf_config(published) == ModelConfig(**GPT2, drop_rate=0.1)
    written = to_hf_config(ModelConfig(**GPT2, drop_rate=0.1))
    assert all(written[key] == published[key] for key in written.keys() & published.keys())


def test_a_published_qwen3_config():
    """Qwen/Qwen3-0.6B, as transformers 4 wrote it."""
    published = {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 1024,
        "initializer_range": 0.02,
        "intermediate_size": 3072,
        "max_position_embeddings": 40960,
        "max_window_layers": 28,
        "model_type": "qwen3",
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    }
    config = from_hf_config(published)
    assert (config.n_kv_heads, config.head_dim, config.rope_base, config.norm_eps) == (8, 128, 1e6, 1e-6)
    assert family_of(config) == "qwen3" and config.tie_embeddings
    written = to_hf_config(config)
    assert all(written[key] == published[key] for key in written.keys() & published.keys())


configs = st.one_of(
    st.builds(
        lambda eps, tie, act, drop: ModelConfig(
            **GPT2, norm_eps=eps, tie_embeddings=tie, activation=act, drop_rate=drop
        ),
        st.sampled_from([1e-5, 1e-3]),
        st.booleans(),
        st.sampled_from(["gelu", "gelu_tanh"]),
        st.sampled_from([0.0, 0.1]),
    ),
    st.builds(
        lambda bias, tie, base, groups, head: ModelConfig(
            **LLAMA
            | {
                "bias": bias,
                "qkv_bias": bias,
                "tie_embeddings": tie,
                "rope_base": base,
                "n_kv_heads": groups,
                "head_dim": head,
            }
        ),
        st.booleans(),
        st.booleans(),
        st.sampled_from([1e4, 5e5]),
        st.sampled_from([1, 2, 4]),
        st.sampled_from([16, 48, 64]),
    ),
    st.builds(
        lambda tie, heads: ModelConfig(**LLAMA | {"qkv_bias": True, "tie_embeddings": tie, "n_kv_heads": heads}),
        st.booleans(),
        st.sampled_from([1, 2]),
    ),
    st.builds(
        lambda base, scaling, factor: ModelConfig(
            **base | {"rope_scaling": scaling, "rope_factor": factor, "rope_base": 5e5}
        ),
        st.sampled_from([LLAMA, LLAMA | {"qkv_bias": True}, QWEN3]),
        st.sampled_from(["linear", "llama3"]),
        st.sampled_from([1.0, 8.0, 32.0]),
    ),
    st.builds(
        lambda bias, tie: ModelConfig(**QWEN3 | {"qkv_bias": bias, "tie_embeddings": tie}), st.booleans(), st.booleans()
    ),
)


@settings(max_examples=40, deadline=None)
@given(config=configs)
def test_there_and_back_through_transformers_own_config(config):
    transformers = pytest.importorskip("transformers")
    written = to_hf_config(config)
    theirs = transformers.AutoConfig.for_model(**written, bos_token_id=0, eos_token_id=0)
    assert from_hf_config(written) == from_hf_config(theirs.to_dict()) == config


@pytest.mark.parametrize(
    ("family", "change", "words"),
    [
        ("gpt2", {"model_type": "bloom"}, ["bloom", "gpt2, qwen2, llama, mistral, qwen3"]),
        ("gpt2", {"activation_function": "relu"}, ["relu", "gelu_new"]),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, ["scale_attn_by_inverse_layer_idx"]),
        ("gpt2", {"attn_pdrop": 0.3}, ["attn_pdrop", "drop_rate"]),
        ("gpt2", {"n_head": 5}, ["emb_dim 768", "n_heads 5"]),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, ["yarn"]),
        ("llama", {"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, ["dynamic"]),
        ("llama", {"rope_parameters": None, "rope_scaling": {"type": "linear", "facto": 2.0}}, ["facto", "linear"]),
        ("llama", {"rope_parameters": None, "rope_scaling": {"rope_type": "llama3"}}, ["rope_factor"]),
        ("llama", {"rope_parameters": None, "rope_scaling": "llama3"}, ["rope_scaling", "group of keys"]),
        ("llama", {"partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
        ("llama", {"logits_soft_cap": 30.0}, ["logits_soft_cap"]),
        ("llama", {"hidden_act": "gelu"}, ["hidden_act", "silu"]),
        ("llama", {"attention_dropout": 0.1}, ["attention_dropout"]),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 100}, ["sliding_window 100", "context_length=100"]),
        ("llama", {"model_type": "mistral", "sliding_window": 200}, ["sliding_window 200", "256"]),
        ("llama", {"model_type": "mistral", "sliding_window": "many"}, ["sliding_window", "many"]),
        ("llama", {"model_type": "mistral", "attention_bias": True}, ["attention_bias", "mistral"]),
        ("qwen3", {"vocab_size": "many"}, ["vocab_size"]),
    ],
)
def test_what_kiem_does_not_compute_is_refused(family, change, words):
    hf = to_hf_config(ModelConfig(**{"gpt2": GPT2, "llama": LLAMA, "qwen3": QWEN3}[family])) | change
    with pytest.raises(ConfigError) as caught:
        from_hf_config(hf)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("change", [{"sliding_window": None}, {"sliding_window": 256}, {}])
def test_a_window_that_holds_the_context_is_none(change):
    """Mistral without a window, or with one that is as long as the context, is a Llama."""
    hf = to_hf_config(ModelConfig(**LLAMA)) | {"model_type": "mistral"}
    assert from_hf_config(hf | change) == ModelConfig(**LLAMA)


def test_all_problems_at_once():
    hf = to_hf_config(ModelConfig(**LLAMA)) | {"hidden_act": "relu", "attention_dropout": 0.5}
    del hf["hidden_size"], hf["vocab_size"]
    with pytest.raises(ConfigError) as caught:
        from_hf_config(hf)
    assert all(word in str(caught.value) for word in ["hidden_act", "attention_dropout", "hidden_size", "vocab_size"])
