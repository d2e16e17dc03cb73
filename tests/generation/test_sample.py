"""Logits to tokens: equal to transformers' processors, exact by hand, and a draw that follows the probabilities."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kiem.errors import ConfigError
from kiem.generation.sample import (
    Sampling,
    draw,
    keep_top_k,
    keep_top_p,
    penalize_repetition,
    scale_temperature,
    shape_logits,
)

INF = math.inf


def logits(seed: int, rows: int = 3, vocab: int = 40, ties: bool = False) -> torch.Tensor:
    x = 3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))
    return x.round() if ties else x


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 999),
    ties=st.booleans(),
    temperature=st.sampled_from([0.1, 0.7, 1.0, 3.0]),
    k=st.none() | st.integers(1, 60),
    p=st.none() | st.sampled_from([0.01, 0.3, 0.9, 1.0]),
    penalty=st.sampled_from([1.0, 1.3, 0.6]),
)
def test_equal_to_transformers(seed, ties, temperature, k, p, penalty):
    process = pytest.importorskip("transformers").generation.logits_process
    x = logits(seed, ties=ties)
    ids = torch.randint(40, (3, 7), generator=torch.Generator().manual_seed(seed))
    theirs = process.RepetitionPenaltyLogitsProcessor(penalty)(ids, x.clone())
    theirs = process.TemperatureLogitsWarper(temperature)(ids, theirs)
    theirs = process.TopKLogitsWarper(k)(ids, theirs) if k else theirs
    theirs = process.TopPLogitsWarper(p)(ids, theirs) if p and p < 1 else theirs
    seen = torch.zeros(3, 40, dtype=torch.bool).scatter_(1, ids, True)
    ours = shape_logits(x, Sampling(temperature, k, p, penalty), seen)
    assert torch.equal(ours == -INF, theirs == -INF)
    torch.testing.assert_close(ours.softmax(-1), theirs.softmax(-1), rtol=1e-5, atol=1e-7)


def test_penalty_by_hand():
    x = torch.tensor([[2.0, -2.0, 2.0, -2.0]])
    seen = torch.tensor([[True, True, False, False]])
    assert penalize_repetition(x, seen, 2.0).tolist() == [[1.0, -4.0, 2.0, -2.0]]


def test_top_k_by_hand():
    x = torch.tensor([[1.0, 3.0, 2.0, 3.0, 2.0]])
    assert keep_top_k(x, 2).tolist() == [[-INF, 3.0, -INF, 3.0, -INF]]
    assert keep_top_k(x, 3).tolist() == [[-INF, 3.0, 2.0, 3.0, 2.0]]  # both that are tied for the third place
    assert torch.equal(keep_top_k(x, 99), x)


@pytest.mark.parametrize(
    ("p", "kept"), [(0.001, [1]), (0.5, [1]), (0.51, [1, 3]), (0.8, [1, 3]), (0.81, [1, 2, 3]), (0.99, [0, 1, 2, 3])]
)
def test_top_p_by_hand(p, kept):
    """Probabilities 0.05, 0.5, 0.15, 0.3: the token that crosses p is kept."""
    x = torch.tensor([[0.05, 0.5, 0.15, 0.3]]).log()
    assert keep_top_p(x, p).isfinite().nonzero()[:, 1].tolist() == kept


def test_a_tiny_temperature_is_greedy_and_finite():
    x = logits(0) * 1e4
    probabilities = scale_temperature(x, 1e-4).softmax(-1)
    assert torch.equal(probabilities.argmax(-1), x.argmax(-1)) and bool((probabilities.max(-1).values > 0.999).all())


def test_greedy_takes_the_likeliest_after_the_penalty():
    x = torch.tensor([[5.0, 4.0]])
    shaped = shape_logits(x, Sampling(temperature=0, top_k=1, repetition_penalty=2.0), torch.tensor([[True, False]]))
    assert shaped.tolist() == [[2.5, 4.0]]


def test_draw_by_hand():
    """Probabilities 0.25, 0, 0.5, 0.25: where each number of [0, 1) falls."""
    x = torch.tensor([[0.25, 0.0, 0.5, 0.25]]).log()
    points = [0.0, 0.2499, 0.2501, 0.7499, 0.7501, 1 - 2**-53]
    drawn = draw(x.expand(len(points), 4), torch.tensor(points, dtype=torch.float64))
    assert drawn.tolist() == [0, 0, 2, 2, 3, 3]


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 9999), u=st.floats(0, 1, exclude_max=True), k=st.integers(1, 5))
def test_draw_never_takes_a_token_that_was_ruled_out(seed, u, k):
    x = keep_top_k(logits(seed), k)
    tokens = draw(x, torch.full((3,), u, dtype=torch.float64))
    assert bool(x.gather(1, tokens[:, None]).isfinite().all())


def test_draw_follows_the_probabilities():
    x = logits(1, rows=1, vocab=8)
    n = 20_000
    uniform = torch.rand(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    share = draw(x.expand(n, 8), uniform).bincount(minlength=8) / n
    p = x.softmax(-1)[0]
    assert bool(((share - p).abs() < 5 * (p * (1 - p) / n).sqrt()).all())  # five standard errors


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"temperature": -0.1}, "temperature -0.1"),
        ({"temperature": math.nan}, "temperature nan"),
        ({"temperature": math.inf}, "temperature inf"),
        ({"temperature": 1e-9}, "from 0.0001 to 100"),
        ({"temperature": "hot"}, "temperature 'hot'"),
        ({"temperature": True}, "temperature True"),
        ({"top_k": 0}, "top_k 0"),
        ({"top_k": 2.5}, "top_k 2.5"),
        ({"top_p": 0}, "top_p 0"),
        ({"top_p": 1.01}, "top_p 1.01"),
        ({"repetition_penalty": 0}, "repetition_penalty 0"),
        ({"repetition_penalty": -1.0}, "repetition_penalty -1.0"),
    ],
)
def test_values_out_of_range(values, words):
    with pytest.raises(ConfigError, match=words.replace(".", r"\.")):
        Sampling(**values)


def test_every_bad_value_is_named():
    with pytest.raises(ConfigError) as caught:
        Sampling(temperature=-1, top_k=0, top_p=2, repetition_penalty=0)
    assert len(str(caught.value).splitlines()) == 4
