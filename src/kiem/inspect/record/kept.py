"""Tensors that a recording holds on to, so that operations can be run again: by reference, copied only before they
are changed."""

from __future__ import annotations

import torch

from kiem.inspect.graph.model import Value


class Kept:
    """What operations read, by value, up to `limit` bytes (None: no limit); parameters are held by the program anyway
    and do not count. Once there was too much, nothing is held any more and `complete` is False: a later verification
    is not possible."""

    def __init__(self, limit: int | None):
        self.tensors: dict[int, torch.Tensor] = {}
        self.limit = limit
        self.complete = True
        self._bytes = 0
        self._by_storage: dict[int, set[int]] = {}

    def add(self, value: Value, tensor: torch.Tensor) -> None:
        """Hold a tensor as it is now."""
        if value.index in self.tensors or not self.claim(0 if isinstance(tensor, torch.nn.Parameter) else value.nbytes):
            return
        with torch.no_grad():
            self.tensors[value.index] = tensor.detach()
        self._by_storage.setdefault(value.storage, set()).add(value.index)

    def claim(self, nbytes: int) -> bool:
        """Whether so many further bytes may be held."""
        self._bytes += nbytes
        if self.limit is not None and self._bytes > self.limit:
            self.drop()
            self.limit, self.complete = 0, False
        return self.limit != 0

    def before_write(self, storage: int) -> None:
        """This memory is about to change: what is held of it is copied."""
        for index in self._by_storage.pop(storage, ()):
            self.tensors[index] = self.tensors[index].clone()

    def keep_only(self, values: set[int]) -> None:
        """Let go of everything else."""
        self.tensors = {v: t for v, t in self.tensors.items() if v in values}
        self._by_storage = {s: left for s, held in self._by_storage.items() if (left := held & values)}

    def drop(self) -> None:
        """Let go of everything."""
        self.tensors.clear()
        self._by_storage.clear()
