"""A run that must end in time: cut while it runs, with a learning rate that does not jump."""

from itertools import pairwise

import pytest

from kiem.config.run import TrainConfig
from kiem.optim.schedule import lr_scale
from kiem.training.deadline import TOLERANCE, Deadline, shortened

BATCH = 100


def settings(tokens=100_000, **changes):
    values = {"cooldown_tokens": tokens * 2 // 5, "warmup_tokens": tokens // 50} | changes
    return TrainConfig(tokens=tokens, batch_tokens=BATCH, lr=1.0, matrix_lr=1.0, weight_decay=0.0, **values)


def simulate(seconds_of, minutes=1000.0, ending=10.0, train=None):
    """(seconds at the end of the last step, settings then, scales of all steps) of a run whose step k takes
    seconds_of(k)."""
    train, now, seen, scales = train or settings(), 0.0, 0, []
    deadline = Deadline(minutes, clock=lambda: now)
    while seen < train.tokens:
        scales.append(lr_scale(seen, train))
        now += seconds_of(len(scales))
        seen += BATCH
        train = deadline.shortened(train, seen, ending) or train
    return now, train, scales


def test_a_run_at_the_planned_pace_is_left_alone():
    now, train, _ = simulate(lambda step: 0.99)
    assert train == settings() and now == pytest.approx(990)


@pytest.mark.parametrize("slower", [1.2, 2.0, 10.0])
@pytest.mark.parametrize("since", [1, 300, 700])
def test_a_slower_run_ends_in_time_with_its_cool_down(slower, since):
    """Slower from some step on, in the plateau or in the cool-down."""
    now, train, scales = simulate(lambda step: 0.98 if step < since else 0.98 * slower)
    assert now + 10.0 <= 1000 * (1 + TOLERANCE)
    assert now > 900  # and the time is used
    assert train.tokens < 100_000 and train.tokens % BATCH == 0
    assert scales[-1] < 0.05  # it ends at the end of the fall
    # No jump: in the plan a step of the fall is 1/400; it is as much steeper as the run is shorter.
    assert max(a - b for a, b in pairwise(scales[20:])) < 1 / 400 * 12 * slower


def test_a_slow_first_step_and_one_slow_evaluation_decide_nothing():
    _, train, _ = simulate(lambda step: 20.0 if step == 1 else 5.0 if step == 4 else 0.9)
    assert train == settings()


def test_without_time_one_step_is_left():
    train = settings()
    clock = iter([0.0, 500.0, 1500.0, 2500.0, 3500.0])
    deadline = Deadline(1000.0, clock=lambda: next(clock))
    found = [deadline.shortened(train, BATCH * k, 10.0) for k in range(1, 6)]
    cut = next(f for f in found if f is not None)
    assert cut.tokens == BATCH * (found.index(cut) + 1) + BATCH


@pytest.mark.parametrize("seen", [0, 10_000, 60_000, 61_000, 99_000])
@pytest.mark.parametrize("shape", ["linear", "cosine", "none"])
def test_the_rate_is_continuous_and_ends_at_the_end(seen, shape):
    train = settings(cooldown=shape, **({"cooldown_tokens": 0} if shape == "none" else {}), warmup_tokens=0)
    cut = shortened(train, seen, 500)
    assert cut.tokens == seen + 500
    at = lambda settings: lr_scale(seen - BATCH // 2, settings)  # noqa: E731, the rate at this very token
    # cooldown_tokens is a whole number: one token of it at most
    assert at(cut) == pytest.approx(at(train), abs=2 / 500)
    if shape != "none":
        assert lr_scale(cut.tokens - BATCH // 2, cut) == 0.0
