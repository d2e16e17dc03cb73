"""The processes that train one model together, as the code of a step sees them.

With one process every method gives back what it was given, so nothing else asks whether there are more.
"""

from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process is `rank` (from 0) of `size`. Over 1, torch.distributed's default group must have as many."""

    rank: int = 0
    size: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank {self.rank} of {self.size}: ranks count from 0")

    @classmethod
    def here(cls) -> "Ranks":
        """Of torch.distributed's default group; one process if there is none."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    def sum_(self, x: Tensor) -> Tensor:
        """The sum over all ranks, in place; the same bits on each. Returns x."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def gather(self, value: T) -> list[T]:
        """The value of each rank, in the order of ranks, on every rank. Values are small and can be pickled."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def first(self, value: T) -> T:
        """Rank 0's value on every rank: for a decision that must be one (to stop, to save, what the time is)."""
        if self.size == 1:
            return value
        values: list[Any] = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]
