"""Batches by hand, and the promises that a run's data order stands on (T7, T8, T10, T12, T13 of docs)."""

import gc
import time
from collections import Counter

import psutil
import pytest
import torch

from kiem.config.run import DataConfig, Source
from kiem.data.loader import IGNORE, Loader, n_windows, validation_batches
from kiem.data.prepare import prepare
from kiem.errors import ConfigError, DataError

EOT = 256


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """make(training documents of each source, validation documents, weights) -> Dataset of byte tokens."""

    def build(*sources, validation=("held out text",), weights=None):
        folder = tmp_path_factory.mktemp("text")
        for number, documents in enumerate([*sources, validation]):
            (folder / str(number)).mkdir()
            for i, text in enumerate(documents):
                (folder / str(number) / f"{i:04d}.txt").write_text(text)
        weights = weights or [None] * len(sources)
        return prepare(
            DataConfig(
                sources=[Source(path=str(folder / str(i)), weight=weight) for i, weight in enumerate(weights)],
                validation=[Source(path=str(folder / str(len(sources))))],
                tokenizer="bytes",
            ),
            0,
            folder / "cache",
        )

    return build


@pytest.fixture(scope="module")
def dataset(make):
    return make([f"document {i} " * (1 + i % 9) for i in range(200)])


def test_a_row_by_hand(make):
    # EOT a b c d EOT e f EOT g h i EOT: with T = 4 the windows are 0..3, 4..7, 8..11
    loader = Loader(make(["abcd", "ef", "ghi"]), 4, 3, seed=0)
    batch = loader.batch(0)
    rows = {tuple(tokens): row for row, tokens in enumerate(batch.tokens_BT.tolist())}
    a, b, c, d, e, f, g, h, i = b"abcdefghi"
    assert set(rows) == {(EOT, a, b, c), (d, EOT, e, f), (EOT, g, h, i)}

    def row(name, *tokens):
        return getattr(batch, name)[rows[tokens]].tolist()

    assert row("targets_BT", EOT, a, b, c) == [a, b, c, d]
    assert row("targets_BT", d, EOT, e, f) == [EOT, e, f, EOT]
    assert row("targets_BT", EOT, g, h, i) == [g, h, i, EOT]
    assert row("positions_BT", d, EOT, e, f) == [0, 0, 1, 2] and row("docs_BT", d, EOT, e, f) == [0, 1, 1, 1]
    assert row("positions_BT", EOT, g, h, i) == [0, 1, 2, 3] and row("docs_BT", EOT, g, h, i) == [0, 0, 0, 0]
    assert batch.n_valid == 12
    assert [x.dtype for x in (batch.tokens_BT, batch.targets_BT, batch.positions_BT, batch.docs_BT)] == [
        torch.int64,
        torch.int64,
        torch.int64,
        torch.int32,
    ]


def test_names_of_a_batch(make):
    dataset = make(["abcd", "ef", "ghi"])
    names = Loader(dataset, 4, 3, seed=0).batch(0).documents
    assert sorted(name[-8:] for name in names) == ["0000.txt", "0001.txt", "0002.txt"]
    parts = Loader(dataset, 4, 3, seed=0).batch(0).micro(1)
    assert sorted(len(part.documents) for part in parts) == [1, 1, 2]


def test_what_is_left_of_a_window_is_not_a_window(make):
    split = make(["abcdefg"]).train[0][0]  # 9 tokens with both ends of text
    assert [n_windows(split, size) for size in (1, 2, 4, 8, 9)] == [8, 4, 2, 1, 0]


def test_micro_batches_are_the_rows_in_order(dataset):
    batch = Loader(dataset, 16, 5, seed=1).batch(3)
    parts = batch.micro(2)
    assert [len(part.tokens_BT) for part in parts] == [2, 2, 1] and sum(part.n_valid for part in parts) == batch.n_valid
    for name in ("tokens_BT", "targets_BT", "positions_BT", "docs_BT"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))
    with pytest.raises(ConfigError, match="at least one sequence"):
        batch.micro(0)


def test_t8_t10_batches_after_a_restart_are_those_without(dataset):
    loader = Loader(dataset, 64, 7, seed=3)
    steps = 3 * loader.sizes[0] // 7 + 1  # over the end of three epochs
    undisturbed = [loader.samples(step) for step in range(steps)]
    for stop in (1, steps // 3, steps - 1):
        resumed = Loader(dataset, 64, 7, seed=3)
        assert [resumed.samples(step) for step in range(stop, steps)] == undisturbed[stop:]
    seen = Counter(sample for samples in undisturbed for sample in samples)
    assert max(seen.values()) == 1
    windows = Counter(window for _, window, epoch in seen if epoch < 3)
    assert windows == dict.fromkeys(range(loader.sizes[0]), 3)
    assert torch.equal(Loader(dataset, 64, 7, 3).batch(9).tokens_BT, loader.batch(9).tokens_BT)
    assert not torch.equal(Loader(dataset, 64, 7, 4).batch(9).tokens_BT, loader.batch(9).tokens_BT)


@pytest.mark.parametrize("batch_size", [8, 11])
def test_t12_ranks_share_a_batch_without_overlap(dataset, batch_size):
    whole = Loader(dataset, 32, batch_size, seed=0)
    for ranks in range(1, 9):
        loaders = [Loader(dataset, 32, batch_size, 0, rank, ranks) for rank in range(ranks)]
        for step in (0, 5):
            rows = [loader.samples(step) for loader in loaders]
            assert [sample for some in rows for sample in some] == whole.samples(step)
            assert max(map(len, rows)) - min(map(len, rows)) <= 1
    tokens = torch.cat([Loader(dataset, 32, batch_size, 0, rank, 3).batch(2).tokens_BT for rank in range(3)])
    assert torch.equal(tokens, whole.batch(2).tokens_BT)


def test_t7_far_away_is_as_near(dataset):
    started = time.perf_counter()
    assert Loader(dataset, 32, 10, 0).batch(10**8).tokens_BT.shape == (10, 32)
    assert time.perf_counter() - started < 2


def test_t13_memory_does_not_grow_with_what_was_read(make):
    dataset = make(["x" * 500_000 for _ in range(30)])  # 30 MB of tokens
    loader, process = Loader(dataset, 512, 1, 0), psutil.Process()
    for step in range(200):
        loader.batch(step)
    gc.collect()
    before = process.memory_info().rss
    for step in range(10_000):
        loader.batch(step)
    assert process.memory_info().rss - before < 10e6


def test_weighted_sources_come_in_their_shares(make):
    dataset = make(["a" * 50] * 20, ["b" * 50] * 400, weights=[3.0, 1.0])
    loader = Loader(dataset, 16, 64, 0)
    letters = Counter()
    for step in range(16):  # one block of 1024 samples
        letters.update(source for source, _, _ in loader.samples(step))
    assert letters == {0: 768, 1: 256}
    even = Loader(make(["a" * 50] * 20, ["b" * 50] * 400), 16, 1, 0)
    drawn = Counter(even.samples(step)[0][0] for step in range(sum(even.sizes)))
    assert [drawn[0], drawn[1]] == even.sizes


@pytest.mark.parametrize("context", [3, 5, 8, 100])
def test_validation_covers_every_position_once(make, context):
    split = make(["text to train on"], validation=["abcd", "ef", "ghi"]).validation
    ids = split.tokens(0, split.n_tokens).tolist()
    inputs, targets = [], []
    for batch in validation_batches(split, context, 2):
        valid = batch.targets_BT != IGNORE
        assert batch.n_valid == int(valid.sum()) and batch.tokens_BT.shape[1] == context
        inputs += batch.tokens_BT[valid].tolist()
        targets += batch.targets_BT[valid].tolist()
        for row in range(len(valid)):  # padding is at the end, and is a document of its own
            length = int(valid[row].sum())
            assert valid[row, :length].all()
            assert not set(batch.docs_BT[row, length:].tolist()) & set(batch.docs_BT[row, :length].tolist())
    assert inputs == ids[:-1] and targets == ids[1:]


def test_a_part_of_validation_is_evenly_spread(make):
    split = make(["text to train on"], validation=[f"{i:09d}" for i in range(101)]).validation  # 1011 tokens
    part = [place for batch in validation_batches(split, 10, 4, max_tokens=55) for place in batch.places]
    assert [start for _, start, _ in part] == [0, 200, 400, 600, 800]
    assert sum(b.n_valid for b in validation_batches(split, 10, 4, max_tokens=10**9)) == 1010
    assert len(list(validation_batches(split, 10, 4, max_tokens=1))) == 1


def test_text_that_is_too_short(make):
    dataset = make(["abcdefg"], ["a long enough text"])
    assert Loader(dataset, 8, 1, 0).batch(0).n_valid == 8
    says = r"source .*0 has 9 training tokens, one context of 9 needs 10\. Give more text, or set context_length to 8"
    with pytest.raises(DataError, match=says):
        Loader(dataset, 9, 1, 0)


@pytest.mark.parametrize(("batch_size", "rank", "ranks"), [(0, 0, 1), (4, 4, 4), (4, -1, 2), (2, 0, 3)])
def test_impossible_sizes(dataset, batch_size, rank, ranks):
    with pytest.raises(ConfigError):
        Loader(dataset, 8, batch_size, 0, rank, ranks)
