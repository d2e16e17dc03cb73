"""The dial: everything follows from a depth, by the numbered rules."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kiem.config.model import ModelConfig
from kiem.config.presets import PRESETS, default_model, depth_for, multiplied_parameters, resolve, tokenizer_vocab_size
from kiem.config.run import DataConfig, RunConfig, TrainConfig
from kiem.errors import ConfigError
from kiem.planning.count import total_parameters

SMALL = ModelConfig(vocab_size=100, context_length=32, emb_dim=32, n_heads=2, n_layers=2)


def test_published_sizes():
    sizes = {name: total_parameters(model) for name, model in PRESETS.items()}
    # As in transformers' GPT2LMHeadModel for openai-community/gpt2, -medium, -large, -xl
    assert sizes == {
        "gpt2-124m": 124_439_808,
        "gpt2-355m": 354_823_168,
        "gpt2-774m": 774_030_080,
        "gpt2-1558m": 1_557_611_200,
    }


@given(st.integers(1, 40))
def test_any_depth_resolves_and_is_complete(depth):
    config = RunConfig(depth=depth)
    resolved = resolve(config, tokenizer_vocab_size(config))
    train = resolved.train
    assert resolved.model.emb_dim == 64 * ((depth + 1) // 2) and resolved.model.n_layers == depth
    assert [name for name, value in train.model_dump().items() if value is None] == ["skip_batches"]
    assert (
        train.batch_tokens % train.micro_batch_tokens == train.micro_batch_tokens % resolved.model.context_length == 0
    )
    assert train.tokens % train.batch_tokens == 0
    assert resolve(resolved, tokenizer_vocab_size(config)) == resolved


def test_sizes_grow_with_depth():
    runs = [resolve(RunConfig(depth=d), 4096) for d in range(2, 30)]
    for field in ("tokens", "batch_tokens"):
        values = [getattr(r.train, field) for r in runs]
        assert values == sorted(values)
    assert [r.train.lr for r in runs] == sorted((r.train.lr for r in runs), reverse=True)


@given(st.integers(1, 6), st.integers(2_000, 10**9))
def test_any_length_resolves(depth, tokens):
    config = RunConfig(depth=depth, train=TrainConfig(tokens=tokens))
    resolved = resolve(config, 4096)
    assert 0 <= resolved.train.tokens - tokens < resolved.train.batch_tokens
    assert resolved.train.tokens % resolved.train.batch_tokens == 0


def test_multiplied_parameters_by_hand():
    # q, k, v, out: 4 * 32x32; up, down: 2 * 32x128; two layers; head 100x32
    assert multiplied_parameters(SMALL) == 2 * (4 * 32 * 32 + 2 * 32 * 128) + 100 * 32


def test_given_values_stay():
    train = TrainConfig(tokens=64_000, batch_tokens=640, micro_batch_tokens=64, lr=1e-3, warmup_tokens=0, eval_every=7)
    resolved = resolve(RunConfig(model=SMALL, train=train), 100).train
    assert (resolved.lr, resolved.warmup_tokens, resolved.eval_every, resolved.micro_batch_tokens) == (1e-3, 0, 7, 64)


@pytest.mark.parametrize(("train", "words"), [
    (TrainConfig(batch_tokens=100, tokens=1000), "not a multiple of context_length 32: use 96"),
    (TrainConfig(batch_tokens=10, tokens=1000), "batch_tokens 10 is not a multiple of context_length 32: use 32"),
    (TrainConfig(batch_tokens=100, micro_batch_tokens=10), "batch_tokens 100 is not .*micro_batch_tokens 10 is not"),
    (TrainConfig(batch_tokens=1000), r"^train.batch_tokens 1000 is not a multiple of context_length 32: use 992$"),
    (TrainConfig(tokens=10), "less than one batch"),
    (TrainConfig(tokens=10_000, warmup_tokens=20_000), "more than train.tokens"),
])  # fmt: skip
def test_what_does_not_fit_is_said(train, words):
    with pytest.raises(ConfigError, match=re.compile(words, re.DOTALL)):
        resolve(RunConfig(model=SMALL, train=train), 100)


def test_vocabulary_smaller_than_the_tokenizers():
    with pytest.raises(ConfigError, match=r"model.vocab_size is 100 and the tokenizer has 300 tokens"):
        resolve(RunConfig(model=SMALL), 300)


def test_tokenizer_size_follows():
    assert tokenizer_vocab_size(RunConfig(depth=4)) == 1024
    assert tokenizer_vocab_size(RunConfig(model=SMALL)) == 100
    assert tokenizer_vocab_size(RunConfig(data=DataConfig(tokenizer_vocab_size=777))) == 777


def test_default_family_is_qwen3():
    from kiem.interop.families import family_of

    assert family_of(default_model(4, 4096)) == "qwen3"
    assert {family_of(m) for m in PRESETS.values()} == {"gpt2"}


@given(st.floats(1e10, 1e22), st.floats(1.0, 100.0))
def test_more_time_never_gives_a_shallower_model(flops, factor):
    assert 2 <= depth_for(flops) <= depth_for(flops * factor)
