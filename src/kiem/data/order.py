"""Which window is sample i: a pure function of (fingerprint, seed, i), found without replaying the samples before it.

Every epoch of a source is a keyed permutation of its windows: a Feistel network on the smallest even number of bits
that holds the size, walked along its cycle until it falls inside (Black and Rogaway, "Ciphers with arbitrary finite
domains", 2002). Without weights all sources are one pool, so that each window appears exactly once per epoch. With
weights, samples come in blocks that hold each source's exact share, and inside a block they are permuted.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate

from kiem.errors import DataError

ROUNDS = 8
BLOCK = 1024  # samples: the smallest block of a mixture
_MASK = (1 << 64) - 1


class Permutation:
    """A keyed bijection of range(size)."""

    def __init__(self, size: int, *key: object) -> None:
        self.size = size
        self._half = max(1, ((size - 1).bit_length() + 1) // 2)
        digest = hashlib.shake_256(repr(key).encode()).digest(8 * ROUNDS)
        self._keys = [int.from_bytes(digest[8 * r : 8 * r + 8], "little") for r in range(ROUNDS)]

    def __call__(self, index: int) -> int:
        """Where `index` goes, 0 <= index < size. Fewer than 4 walks are expected, each of ROUNDS rounds."""
        if not 0 <= index < self.size:
            raise IndexError(f"index {index} is not in range({self.size})")
        while True:
            index = self._encrypt(index)
            if index < self.size:
                return index

    def _encrypt(self, x: int) -> int:
        half = self._half
        low = (1 << half) - 1
        left, right = x >> half, x & low
        for key in self._keys:
            z = (right + key) & _MASK  # splitmix64's finalizer as the round function
            z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
            z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
            left, right = right, left ^ ((z ^ (z >> 31)) & low)
        return left << half | right


class Order:
    """`sample(i)` for i = 0, 1, 2, ...; sizes in windows. `weights` None: shares are the sizes."""

    def __init__(self, sizes: Sequence[int], weights: Sequence[float] | None, fingerprint: str, seed: int) -> None:
        if not sizes or min(sizes) < 1:
            raise DataError(f"every source needs at least one window of text, sizes are {list(sizes)}")
        if weights is not None and (len(weights) != len(sizes) or not all(0 < w < float("inf") for w in weights)):
            raise DataError(f"{len(sizes)} sources need as many positive weights, given: {list(weights)}")
        self.sizes, self.fingerprint, self.seed = list(sizes), fingerprint, seed
        self._ends = list(accumulate(sizes))
        self._cache: dict[tuple, Permutation] = {}
        self._counts: tuple[int, list[int], list[int]] = (-1, [], [])
        self._shares = None
        if weights is not None and len(sizes) > 1:
            exact = [Fraction(w) for w in weights]
            self._shares = [end / sum(exact) for end in accumulate(exact)]
            # A block holds at least one sample of the lightest source, so that differences of cumulative floors are
            # never negative.
            rarest = int(sum(exact) / min(exact)) + 1
            self.block = max(BLOCK, 1 << (rarest - 1).bit_length())

    def sample(self, i: int) -> tuple[int, int, int]:
        """(source, window, epoch of that source) of sample i."""
        if i < 0:
            raise IndexError(f"sample {i}: samples count from 0")
        if self._shares is None:
            epoch, position = divmod(i, self._ends[-1])
            place = self._permutation(self._ends[-1], "pool", epoch)(position)
            source = bisect_right(self._ends, place)
            return source, place - (self._ends[source] - self.sizes[source]), epoch
        block, position = divmod(i, self.block)
        before, ends = self._block_counts(block)
        place = self._permutation(self.block, "block", block)(position)
        source = bisect_right(ends, place)
        drawn = before[source] + place - (ends[source - 1] if source else 0)
        epoch, position = divmod(drawn, self.sizes[source])
        return source, self._permutation(self.sizes[source], source, epoch)(position), epoch

    def drawn(self, blocks: int) -> list[int]:
        """Samples taken from each source in the first `blocks` blocks: cumulative floors, so they add up exactly."""
        assert self._shares is not None, "without weights there are no blocks"
        ends = [int(share * blocks * self.block) for share in self._shares]
        return [end - start for start, end in zip([0, *ends], ends, strict=False)]

    def _block_counts(self, block: int) -> tuple[list[int], list[int]]:
        """Per source: samples drawn before the block, and where its places in the block end."""
        if self._counts[0] != block:
            before, after = self.drawn(block), self.drawn(block + 1)
            self._counts = block, before, list(accumulate(b - a for a, b in zip(before, after, strict=True)))
        return self._counts[1:]

    def _permutation(self, size: int, stream: str | int, number: int) -> Permutation:
        key = (size, stream, number)
        if key not in self._cache:
            if len(self._cache) > 4096:
                self._cache.clear()
            self._cache[key] = Permutation(size, self.fingerprint, self.seed, *key)
        return self._cache[key]
