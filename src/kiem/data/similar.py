"""Which texts are copies or near copies of one another: sketches of bounded size, and the groups that they form.

A sketch stands for the set of a text's shingles (8 bytes each, letter case and white space left out): 24 minima under
keyed permutations (Broder 1997), paired into 12 bands. Two texts belong together if they are equal but for case and
white space, or if at least 5 of their bands agree: texts with nine tenths of their shingles in common do so in 999
of 1,000 cases, texts with three tenths in 2 of 1,000.
"""

import hashlib
import math
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

SHINGLE = 8  # bytes
SAMPLES = 192  # shingles of a text that are looked at, about: those with the smallest hashes
BANDS = 12
AGREE = 5  # bands that near copies have in common
BATCH = 512 * 1024  # bytes of text that are sketched at once
NEIGHBORS = 3  # texts of an equal band are compared with the next ones in its order
_WHITE = b" \t\r\n\v\f"
_LOWER = bytes(range(256)).lower()
_ODD = np.uint64(0x9E3779B97F4A7C15)
_KEYS = np.frombuffer(hashlib.shake_256(b"permutations").digest(2 * BANDS * 8), "<u8") | np.uint64(1)


class Sketches(NamedTuple):
    """N texts: `exact_N` (uint64: equal for copies) and `bands_NB` (uint32)."""

    exact_N: np.ndarray
    bands_NB: np.ndarray


class Sketcher:
    """Collects the sketches of texts, in order. Works in a thread beside the one that reads."""

    def __init__(self) -> None:
        self._texts: list[bytes] = []
        self._size = 0
        self._done: list[Sketches] = []
        self._pool = ThreadPoolExecutor(1)
        self._running: Future[Sketches] | None = None

    def add(self, text: bytes) -> None:
        """The UTF-8 bytes of one text."""
        self._texts.append(text)
        self._size += len(text)
        if self._size >= BATCH:
            self._flush()

    def finish(self) -> Sketches:
        """The sketches of all texts. Ends the thread."""
        self._flush()
        self._collect()
        self._pool.shutdown()
        if not self._done:
            return Sketches(np.empty(0, np.uint64), np.empty((0, BANDS), np.uint32))
        return Sketches(*(np.concatenate(part) for part in zip(*self._done, strict=True)))

    def _flush(self) -> None:
        if self._texts:
            self._collect()
            self._running = self._pool.submit(sketch, self._texts)
            self._texts, self._size = [], 0

    def _collect(self) -> None:
        if self._running is not None:
            self._done.append(self._running.result())
            self._running = None


def sketch(texts: list[bytes], samples: float = SAMPLES) -> Sketches:
    """The sketches of some texts; of longer ones, about `samples` shingles are looked at."""
    plain = [text.translate(_LOWER, _WHITE) for text in texts]
    exact_N = np.array(
        [int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") for text in plain], np.uint64
    )
    bands_NB = np.repeat((exact_N >> np.uint64(32)).astype(np.uint32)[:, None], BANDS, axis=1)
    sizes_N = np.array([len(text) for text in plain])
    counts_N = np.maximum(0, sizes_N - SHINGLE + 1)
    if not counts_N.any():
        return Sketches(exact_N, bands_NB)
    joined = b"".join([*plain, bytes(SHINGLE)])
    hashes = np.ndarray((len(joined) - SHINGLE,), "<u8", joined, strides=(1,)) * _ODD
    share_N = np.minimum(1 - 2.0**-53, samples / np.maximum(counts_N, 1))
    limits_N = share_N * 2.0**64
    limits = np.stack([limits_N.astype(np.uint64), np.zeros(len(texts), np.uint64)], axis=1)
    kept = np.flatnonzero(hashes <= np.repeat(limits, np.stack([counts_N, sizes_N - counts_N], axis=1).ravel()))
    owner = np.searchsorted(np.cumsum(sizes_N), kept, side="right")
    found, first = np.unique(owner, return_index=True)
    if len(found):
        minima_KF = np.stack([np.minimum.reduceat(_mixed(hashes[kept] ^ key), first) for key in _KEYS])
        bands_NB[found] = (_mixed(minima_KF[::2] + _KEYS[0] * minima_KF[1::2]) >> np.uint64(32)).T
    # A text that repeats itself has few shingles: it is looked at whole.
    one_of_each = np.unique(hashes[kept] ^ _mixed(owner.astype(np.uint64)), return_index=True)[1]
    distinct_N = np.bincount(owner[one_of_each], minlength=len(texts))
    few = np.flatnonzero((counts_N > samples) & (distinct_N < samples / 4))
    if few.size:
        bands_NB[few] = sketch([plain[index] for index in few], math.inf).bands_NB
    return Sketches(exact_N, bands_NB)


def _mixed(x: np.ndarray) -> np.ndarray:
    """splitmix64's finalizer."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def group(sketches: Sketches) -> np.ndarray:
    """For each text the number of the first text of its group, int64 (N,)."""
    exact_N, bands_NB = sketches
    label_N = np.arange(len(exact_N))
    _join(label_N, _pairs(np.argsort(exact_N, kind="stable"), exact_N, 1))
    for band in range(BANDS):
        order = np.lexsort((bands_NB[:, (band + 1) % BANDS], bands_NB[:, band]))
        for distance in range(1, NEIGHBORS + 1):
            pairs = _pairs(order, bands_NB[:, band], distance)
            pairs = pairs[:, label_N[pairs[0]] != label_N[pairs[1]]]
            _join(label_N, pairs[:, (bands_NB[pairs[0]] == bands_NB[pairs[1]]).sum(axis=1) >= AGREE])
    return label_N


def _join(label_N: np.ndarray, pairs: np.ndarray) -> None:
    """Give both texts of each pair, and those that they were with, the smallest number of them."""
    while pairs.size:
        roots = label_N[pairs]
        np.minimum.at(label_N, roots[0], roots[1])
        np.minimum.at(label_N, roots[1], roots[0])
        while not np.array_equal(label_N, label_N[label_N]):
            label_N[:] = label_N[label_N]
        pairs = pairs[:, label_N[pairs[0]] != label_N[pairs[1]]]


def _pairs(order: np.ndarray, values: np.ndarray, distance: int) -> np.ndarray:
    """Pairs of texts with equal values, `distance` apart in an order that sorts them, (2, P)."""
    pairs = np.stack([order[:-distance], order[distance:]])
    return pairs[:, values[pairs[0]] == values[pairs[1]]]


def chosen_by_hash(exact_N: np.ndarray, label_N: np.ndarray, fraction: float) -> np.ndarray:
    """Whole groups of `group`, each with probability `fraction`, by a hash of their text: bool (N,)."""
    least_N = np.full(len(exact_N), np.iinfo(np.uint64).max)
    np.minimum.at(least_N, label_N, exact_N)
    return _mixed(least_N[label_N]) < np.uint64(min(fraction * 2.0**64, 2.0**64 - 2048))
