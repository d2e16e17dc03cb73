"""What belongs to one thread: autograd runs backward in a thread of its own for each device, and numbers the nodes of
each thread from 0."""

from __future__ import annotations

import threading
from typing import Any

BITS = 40
LOW = (1 << BITS) - 1
MADE_BY = "kiem: the operation whose derivative it is"  # among the metadata of an autograd node


class Local(threading.local):
    """Of a recorder, in the thread that asks."""

    def __init__(self) -> None:
        self.paused = 0
        self.parents: list[int] = []  # custom Functions that are running
        self.floor = 0  # how many of them ran before the backward call that is under way
        self.last: tuple[Any, ...] = ()  # the operation before: its number, its place, its outputs
        self.kernels: list[list[str]] = []  # of the backward nodes that are running
        self.nodes: list[Any] = []  # they themselves


class Numbers:
    """Numbers of autograd nodes that are unique among threads."""

    def __init__(self) -> None:
        self._threads: dict[int, int] = {}

    def number(self, sequence: int) -> int:
        """Of a node of this thread."""
        return self._threads.setdefault(threading.get_ident(), len(self._threads)) << BITS | sequence
