"""The order of samples: a bijection, exact shares, and nothing but a function of its number."""

import time
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kiem.data.order import BLOCK, Order, Permutation
from kiem.errors import DataError


@given(size=st.integers(1, 600), key=st.integers())
@settings(max_examples=60, deadline=None)
def test_a_permutation_is_a_bijection(size, key):
    permutation = Permutation(size, key)
    assert sorted(map(permutation, range(size))) == list(range(size))


def test_a_permutation_shuffles_and_depends_on_its_key():
    one, two = ([Permutation(5000, "key", k)(i) for i in range(5000)] for k in (1, 2))
    assert one != two
    for values in (one, two):  # of a random permutation: 1 fixed point expected, neighbors 1667 apart on average
        assert sum(i == v for i, v in enumerate(values)) < 10
        steps = [abs(a - b) for a, b in pairwise(values)]
        assert 1600 < sum(steps) / len(steps) < 1735
        assert abs(sum(values[:1000]) / 1000 - 2500) < 200
    with pytest.raises(IndexError):
        Permutation(5, "key")(5)


def test_small_permutations_are_all_reached():
    assert len({tuple(map(Permutation(3, k), range(3))) for k in range(300)}) == 6


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4), epochs=st.integers(1, 3), seed=st.integers(0, 2**63 - 1)
)
@settings(max_examples=40, deadline=None)
def test_without_weights_every_window_appears_once_per_epoch(sizes, epochs, seed):
    order = Order(sizes, None, "print", seed)
    total = sum(sizes)
    seen = Counter(order.sample(i) for i in range(epochs * total))
    assert seen == Counter((s, w, e) for s, n in enumerate(sizes) for w in range(n) for e in range(epochs))
    assert [order.sample(i)[2] for i in range(epochs * total)] == sorted(i // total for i in range(epochs * total))


def test_with_weights_shares_are_exact_and_windows_still_take_turns():
    sizes, weights = [50, 7, 300], [0.7, 0.2, 0.1]
    order = Order(sizes, weights, "print", 3)
    assert order.block == BLOCK
    samples = [order.sample(i) for i in range(3 * BLOCK)]
    for block in range(3):
        counts = Counter(s for s, _, _ in samples[block * BLOCK : (block + 1) * BLOCK])
        now, then = order.drawn(block), order.drawn(block + 1)
        assert [counts[s] for s in range(3)] == [b - a for a, b in zip(now, then, strict=True)]
        for source, weight in enumerate(weights):  # floors of cumulative shares: never more than one sample off
            assert abs(then[source] - weight * (block + 1) * BLOCK) < 1 + 1e-9
    for source, size in enumerate(sizes):
        per_epoch = Counter()
        for s, window, epoch in samples:
            if s == source:
                per_epoch[epoch, window] += 1
        drawn = sum(per_epoch.values())
        assert set(per_epoch.values()) == {1}
        full = [sum(1 for e, _ in per_epoch if e == epoch) for epoch in range(drawn // size)]
        assert full == [size] * (drawn // size)


@given(weights=st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=5), block=st.integers(0, 10**9))
@settings(max_examples=60, deadline=None)
def test_blocks_add_up_whatever_the_weights(weights, block):
    order = Order([10] * len(weights), weights, "print", 0)
    counts = [b - a for a, b in zip(order.drawn(block), order.drawn(block + 1), strict=True)]
    assert sum(counts) == order.block and min(counts) >= 0
    share = [w / sum(weights) * order.block for w in weights]
    assert all(abs(count - exact) < 2 for count, exact in zip(counts, share, strict=True))


def test_equal_weights_are_shares_and_not_sizes():
    order = Order([1000, 10], [2.0, 2.0], "print", 0)
    assert order.drawn(1) == [512, 512]


@pytest.mark.parametrize("weights", [None, [0.999, 0.001]])
def test_seeking_is_as_fast_far_away(weights):
    """T7: a resume at sample 1e9 takes no time."""
    started = time.perf_counter()
    order = Order([10**7, 3 * 10**6 + 1], weights, "print", 0)
    far = [order.sample(10**9 + i) for i in range(500)]
    assert time.perf_counter() - started < 2
    assert len(set(far)) == 500 and far == [
        Order([10**7, 3 * 10**6 + 1], weights, "print", 0).sample(10**9 + i) for i in range(500)
    ]


def test_data_and_seed_and_epoch_change_the_order():
    def windows(fingerprint, seed, start=0):
        order = Order([100], None, fingerprint, seed)
        return [order.sample(start + i)[1] for i in range(100)]

    assert windows("a", 0) == windows("a", 0)
    different = [windows("a", 0), windows("b", 0), windows("a", 1), windows("a", 0, 100)]
    assert len(set(map(tuple, different))) == 4


def test_the_order_is_the_one_of_the_format():
    """These numbers are a promise: another order would break the resume of every run there is."""
    assert [Order([1000], None, "f", 1).sample(i) for i in (0, 1, 999, 1000)] == [
        (0, 894, 0),
        (0, 493, 0),
        (0, 500, 0),
        (0, 791, 1),
    ]
    assert [Order([1000, 30], [3.0, 1.0], "f", 1).sample(i) for i in (0, 1, 5000, 10**12)] == [
        (1, 17, 5),
        (1, 15, 8),
        (0, 239, 3),
        (1, 8, 8333333334),
    ]


@pytest.mark.parametrize(
    ("sizes", "weights"), [([], None), ([5, 0], None), ([5, 5], [1.0]), ([5], [0.0]), ([5], [float("inf")])]
)
def test_what_has_no_order(sizes, weights):
    with pytest.raises(DataError, match="source"):
        Order(sizes, weights, "print", 0)
    with pytest.raises(IndexError, match="count from 0"):
        Order([5], None, "print", 0).sample(-1)
