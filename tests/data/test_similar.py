"""Copies and near copies are found, other texts are not taken for them."""

import random

import numpy as np
import pytest

from kiem.data import similar
from kiem.data.similar import Sketcher, group, sketch

WORDS = [
    f"{a}{b}{c}" for a in "bdfgklmnprst" for b in ("a", "ei", "o", "u") for c in ("ld", "nt", "rk", "s", "th", "v")
]


def text(seed, words=120):
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def groups(texts):
    return group(sketch([t.encode() for t in texts])).tolist()


def test_copies_are_found_whatever_their_case_and_white_space():
    assert groups(["A b\tc", "something else", "a  B C\n", "", " \n"]) == [0, 1, 0, 3, 3]
    assert groups([text(1), text(2), text(1).upper().replace(" ", "\n")]) == [0, 1, 0]


@pytest.mark.parametrize("length", [80, 400, 5000])
def test_near_copies_are_found_and_others_are_not(length):
    """One word in 60 is another one: at least nine tenths of the shingles are the same."""
    rng = random.Random(length)
    originals = [text(seed, length) for seed in range(40)]
    changed = []
    for original in originals:
        words = original.split()
        for at in rng.sample(range(length), length // 60):
            words[at] = f"q{rng.randrange(1000)}z"
        changed.append(" ".join(words))
    label = groups(originals + changed)
    assert label == [*range(40), *range(40)]


def test_a_chain_of_near_copies_is_one_group():
    versions, words = [], text(5).split()
    for step in range(20):
        words[6 * step % len(words)] = f"version{step}"
        versions.append(" ".join(words))
    assert set(groups(versions)) == {0}


def test_many_texts_that_share_a_header_stay_apart():
    header = text(0, 30)
    assert len(set(groups([f"{header} {text(seed, 150)}" for seed in range(1, 400)]))) > 390


def test_texts_that_repeat_themselves_are_equal_at_any_length():
    assert groups(["one line\n" * n for n in (10, 30, 100, 2000)] + ["another line\n" * 300]) == [0, 0, 0, 0, 4]


def test_batches_do_not_matter(monkeypatch):
    texts = [text(seed, 1 + seed).encode() for seed in range(60)]
    whole = sketch(texts)
    monkeypatch.setattr(similar, "BATCH", 3000)
    sketcher = Sketcher()
    for each in texts:
        sketcher.add(each)
    parts = sketcher.finish()
    assert np.array_equal(parts.exact_N, whole.exact_N) and np.array_equal(parts.bands_NB, whole.bands_NB)
    assert len(Sketcher().finish().exact_N) == 0
