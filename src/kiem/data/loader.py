"""Tokens become batches: batch k of a run is read by seeking, never by replaying the ones before it.

Shapes: B sequences, T positions.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from kiem.data.order import Order
from kiem.data.shards import Dataset, Split
from kiem.errors import ConfigError, DataError

IGNORE = -100  # the target of a position that has no loss


@dataclass(frozen=True)
class Batch:
    """`tokens_BT`, `targets_BT` (int64; -100: no loss), `positions_BT` (int64, from 0 at each document), `docs_BT`
    (int32, which document of its row). A document that began before its row has its position 0 where the row begins."""

    tokens_BT: torch.Tensor
    targets_BT: torch.Tensor
    positions_BT: torch.Tensor
    docs_BT: torch.Tensor
    n_valid: int
    places: tuple[tuple[Split, int, int], ...] = ()  # of each row: where its tokens are

    @property
    def documents(self) -> list[str]:
        """Where the text of the batch came from, for messages."""
        names = [name for split, start, stop in self.places for name in split.document_names(start, stop)]
        return list(dict.fromkeys(names))

    def target_bytes(self) -> int:
        """How many bytes of text the targets stand for (an end of text for none)."""
        return sum(split.text_bytes(start + 1, stop + 1) for split, start, stop in self.places)

    def micro(self, size: int) -> list["Batch"]:
        """Batches of `size` rows each, the last with what is left."""
        if size < 1:
            raise ConfigError(f"a micro-batch needs at least one sequence, given: {size}")
        parts = []
        for start in range(0, len(self.tokens_BT), size):
            rows = slice(start, start + size)
            targets_BT = self.targets_BT[rows]
            parts.append(
                Batch(
                    self.tokens_BT[rows],
                    targets_BT,
                    self.positions_BT[rows],
                    self.docs_BT[rows],
                    int((targets_BT != IGNORE).sum()),
                    self.places[rows],
                )
            )
        return parts

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on a device."""
        names = ("tokens_BT", "targets_BT", "positions_BT", "docs_BT")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in names})


def n_windows(split: Split, context_length: int) -> int:
    """Windows of T inputs whose targets are all there: window w is tokens [w*T, w*T + T]."""
    return (split.n_tokens - 1) // context_length


class Loader:
    """`batch(step)` is a pure function of data, context length, batch size, seed and step; the rank picks its rows."""

    def __init__(
        self, dataset: Dataset, context_length: int, batch_size: int, seed: int, rank: int = 0, ranks: int = 1
    ) -> None:
        """`batch_size`: sequences of one update, over all ranks. Raises DataError if a source has no whole window."""
        if batch_size < 1 or context_length < 1:
            raise ConfigError(f"batch_size {batch_size} and context_length {context_length} must be at least 1")
        if not 0 <= rank < ranks or ranks > batch_size:
            raise ConfigError(
                f"rank {rank} of {ranks} with {batch_size} sequences a batch: ranks count from 0, and "
                "each needs at least one sequence"
            )
        for split, _ in dataset.train:
            if n_windows(split, context_length) < 1:
                raise DataError(
                    f"{split.name} has {split.n_tokens:,} training tokens, one context of {context_length:,} needs "
                    f"{context_length + 1:,}. Give more text, or set context_length to {max(2, split.n_tokens - 1)} or "
                    "less."
                )
        self.dataset, self.context_length, self.batch_size = dataset, context_length, batch_size
        self.splits = [split for split, _ in dataset.train]
        self.rows = range(rank * batch_size // ranks, (rank + 1) * batch_size // ranks)
        self.sizes = [n_windows(split, context_length) for split in self.splits]
        weights = None if dataset.proportional else [share for _, share in dataset.train]
        self.order = Order(self.sizes, weights, dataset.fingerprint, seed)

    def samples(self, step: int) -> list[tuple[int, int, int]]:
        """(source, window, epoch) of each of this rank's rows."""
        return [self.order.sample(step * self.batch_size + row) for row in self.rows]

    def batch(self, step: int) -> Batch:
        """This rank's rows of the batch of update `step`, counted from 0."""
        size = self.context_length
        places = [(self.splits[source], window * size, (window + 1) * size) for source, window, _ in self.samples(step)]
        return _read(places, size)


def validation_batches(
    split: Split, context_length: int, batch_size: int, max_tokens: int | None = None
) -> Iterator[Batch]:
    """Windows one after the other over the whole split, each position once; the last is padded with targets of -100.

    `max_tokens`: evenly spread windows with about so many targets instead, the same ones every time.
    """
    if split.n_tokens < 2:
        raise DataError(
            "there is no held-out text to evaluate on: set data.validation, or a larger data.validation_fraction"
        )
    total = -(-(split.n_tokens - 1) // context_length)
    count = total if max_tokens is None else min(total, max(1, max_tokens // context_length))
    windows = [number * total // count for number in range(count)]
    for start in range(0, count, batch_size):
        places = [
            (split, window * context_length, min((window + 1) * context_length, split.n_tokens - 1))
            for window in windows[start : start + batch_size]
        ]
        yield _read(places, context_length)


def _read(places: list[tuple[Split, int, int]], size: int) -> Batch:
    """Rows of inputs [start, stop) and targets one further; padding up to `size` is a document of its own."""
    tokens = np.zeros((len(places), size), np.int64)
    targets = np.full((len(places), size), IGNORE, np.int64)
    begins = np.zeros((len(places), size), np.int64)  # 1 where a document begins after the first position
    for row, (split, start, stop) in enumerate(places):
        length = stop - start
        ids = split.tokens(start, stop + 1)
        tokens[row, :length], targets[row, :length] = ids[:-1], ids[1:]
        begins[row, split.document_starts(start, stop) - start] = 1
        if length < size:
            begins[row, length] = 1
    begins[:, 0] = 0
    steps = np.arange(size)
    positions = steps - np.maximum.accumulate(begins * steps, axis=1)
    documents = begins.cumsum(axis=1).astype(np.int32)
    return Batch(
        torch.from_numpy(tokens),
        torch.from_numpy(targets),
        torch.from_numpy(positions),
        torch.from_numpy(documents),
        sum(stop - start for _, start, stop in places),
        tuple(places),
    )
