"""Tokens step by step: with a cache as without, in a batch as alone, past the context by the stated rule."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kiem.config.model import ModelConfig
from kiem.errors import NumericsError
from kiem.generation.decode import Decoder
from kiem.generation.sample import Sampling
from kiem.model.transformer import Transformer

CONTEXT, VOCAB = 16, 29
BASE = {"vocab_size": 33, "context_length": CONTEXT, "emb_dim": 24, "n_heads": 4, "n_layers": 2}
ROPE = {"norm": "rmsnorm", "activation": "swiglu", "position": "rope", "n_kv_heads": 2, "qk_norm": True, "bias": False}
CONFIGS = {"learned": ModelConfig(**BASE), "rope": ModelConfig(**BASE, **ROPE)}
prompts = st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=CONTEXT), min_size=1, max_size=4)
GREEDY = Sampling(temperature=0)


def build(position: str) -> Transformer:
    model = Transformer(CONFIGS[position]).initialize(0).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return model


MODELS = {position: build(position) for position in CONFIGS}


def decode(model, prompts, sampling, n, seeds=None, finish=lambda step: set()):
    """n tokens of each prompt; finish(step) says which sequences end after that step."""
    decoder = Decoder(model, prompts, sampling, seeds or [0] * len(prompts), VOCAB, n)
    out = [[] for _ in prompts]
    for step in range(n):
        for row, token in decoder.step():
            out[row].append(token)
        decoder.finish(finish(step))
        if not decoder.rows:
            break
    return out


def without_cache(model, prompt, n):
    """The definition: each token computes its window anew; past the context it begins again from its newest half."""
    window, out = list(prompt), []
    for _ in range(n):
        if len(window) > CONTEXT:
            window = window[-(CONTEXT // 2) :]
        with torch.no_grad():
            logits_V = model(torch.tensor([window]))[0, -1, :VOCAB]
        out.append(int(logits_V.argmax()))
        window.append(out[-1])
    return out


@pytest.mark.parametrize("position", CONFIGS)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(prompts=prompts)
def test_greedy_with_cache_in_a_batch_is_greedy_without_cache_alone(position, prompts):
    model = MODELS[position]
    assert decode(model, prompts, GREEDY, 40) == [without_cache(model, prompt, 40) for prompt in prompts]


@pytest.mark.parametrize("position", CONFIGS)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(prompts=prompts, penalty=st.sampled_from([1.0, 1.5]), k=st.none() | st.just(5), p=st.none() | st.just(0.8))
def test_sampled_in_a_batch_is_sampled_alone(position, prompts, penalty, k, p):
    model, sampling = MODELS[position], Sampling(1.0, k, p, penalty)
    seeds = list(range(len(prompts)))
    together = decode(model, prompts, sampling, 30, seeds)
    assert together == [decode(model, [prompts[i]], sampling, 30, [i])[0] for i in seeds]


@pytest.mark.parametrize("position", CONFIGS)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(prompts=prompts, lasts=st.lists(st.integers(0, 25), min_size=4, max_size=4))
def test_a_sequence_that_ends_changes_none_of_the_others(position, prompts, lasts):
    model, sampling = MODELS[position], Sampling(1.0, repetition_penalty=1.2)
    whole = decode(model, prompts, sampling, 26)
    cut = decode(model, prompts, sampling, 26, finish=lambda step: {i for i, last in enumerate(lasts) if last == step})
    assert cut == [tokens[: last + 1] for tokens, last in zip(whole, lasts, strict=False)]


@pytest.mark.parametrize("position", CONFIGS)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(prompts=prompts)
def test_logits_in_a_padded_batch_with_cache(position, prompts):
    """Within float32 of a forward pass over the whole sequence, for each row."""
    model = MODELS[position]
    n = CONTEXT - max(map(len, prompts)) + 1
    decoder = Decoder(model, prompts, GREEDY, [0] * len(prompts), VOCAB, n)
    for _ in range(n):
        windows = [list(window) for window in decoder.windows]
        with torch.inference_mode():
            logits_BV = decoder._next_logits()
            for i, window in enumerate(windows):
                alone_V = model(torch.tensor([window]))[0, -1]
                assert (logits_BV[i] - alone_V).norm() <= 1e-5 * alone_V.norm()
            decoder.newest_B1 = torch.tensor([[1]] * len(prompts))
        for window in decoder.windows:
            window.append(1)


def test_tokens_beyond_the_tokenizer_are_never_chosen():
    model = build("rope")
    with torch.no_grad():
        model.head.weight[VOCAB:] *= 100
    for sampling in (GREEDY, Sampling(5.0)):
        (tokens,) = decode(model, [[1]], sampling, 60)
        assert max(tokens) < VOCAB


def test_the_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    decode(MODELS["rope"], [[1, 2], [3]], Sampling(1.0), 5)
    assert torch.equal(before, torch.get_rng_state())


def test_the_penalty_sees_the_prompt_and_what_was_generated():
    """A strong one leaves no repetition until every token was used."""
    (tokens,) = decode(MODELS["learned"], [[4, 5]], Sampling(0, repetition_penalty=100.0), 5)
    assert len({4, 5, *tokens}) == 7


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_refused(value):
    model = build("rope")
    with torch.no_grad():
        model.final_norm.weight[0] = value
    with pytest.raises(NumericsError, match="not finite"):
        decode(model, [[1, 2]], Sampling(1.0), 3)
