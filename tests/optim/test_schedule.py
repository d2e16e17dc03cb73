"""The schedule is a function of tokens (T19), with values by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kiem.config.run import TrainConfig
from kiem.optim.schedule import lr_scale


def make(**changes):
    base = {"tokens": 1000, "batch_tokens": 10, "warmup_tokens": 100, "cooldown_tokens": 400}
    return TrainConfig(**(base | changes))


def test_by_hand():
    train = make()
    assert lr_scale(0, train) == pytest.approx(0.05)  # the middle of the first batch: 5 of 100 tokens
    assert lr_scale(95, train) == 1.0
    assert lr_scale(500, train) == 1.0
    assert lr_scale(795, train) == pytest.approx(0.5)
    assert lr_scale(990, train) == pytest.approx(5 / 400)


def test_cosine_and_final_fraction():
    train = make(cooldown="cosine", final_lr_fraction=0.1)
    assert lr_scale(795, train) == pytest.approx(0.1 + 0.9 * 0.5)
    assert lr_scale(995, train) == pytest.approx(0.1)


def test_none_and_no_warmup():
    train = make(cooldown="none", cooldown_tokens=0, warmup_tokens=0)
    assert {lr_scale(at, train) for at in range(0, 1000, 10)} == {1.0}


@given(st.integers(0, 10**6), st.sampled_from(["linear", "cosine"]))
def test_between_zero_and_one_and_independent_of_micro_batches(at, cooldown):
    whole, halves = make(cooldown=cooldown), make(cooldown=cooldown, micro_batch_tokens=5)
    assert 0.0 <= lr_scale(at, whole) <= 1.0
    assert lr_scale(at, whole) == lr_scale(at, halves)
