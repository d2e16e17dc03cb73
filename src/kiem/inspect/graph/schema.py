"""What the schema of an operation says of its arguments, and the tensors among them."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

# Asked of tensors whose class is written in Python, which answers for them.
ASKING = {
    "dim", "is_contiguous", "is_non_overlapping_and_dense", "is_strides_like_format", "numel", "size", "storage_offset",
    "stride", "sym_is_contiguous", "sym_numel", "sym_size", "sym_storage_offset", "sym_stride",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Signature:
    """`names`: arguments in order; `writes`: those that are changed in place; `defaults`: what is not given."""

    names: tuple[str, ...]
    writes: frozenset[str]
    defaults: tuple[tuple[str, Any], ...]
    random: bool
    detaches: bool
    makes: bool  # a new tensor from Python's numbers
    asks: bool  # of what kind a tensor is (its sizes, its layout), not what it holds; or a profiler's marker

    def bound(self, args: tuple, kwargs: dict) -> dict[str, Any]:
        """Arguments by name, in the order of the schema."""
        given = dict(zip(self.names, args, strict=False)) | kwargs
        return {name: given[name] for name in self.names if name in given}

    def tensors(self, args: tuple, kwargs: dict) -> list[tuple[str, torch.Tensor]]:
        """Tensor arguments: `self`, `other`, `tensors[0]`, ..."""
        found = []
        for name, value in self.bound(args, kwargs).items():
            if isinstance(value, torch.Tensor):
                found.append((name, value))
            elif isinstance(value, list | tuple):
                found += [(f"{name}[{i}]", v) for i, v in enumerate(value) if isinstance(v, torch.Tensor)]
        return found

    def written(self, args: tuple, kwargs: dict) -> list[tuple[str, torch.Tensor]]:
        """Tensors that the operation changes."""
        if not self.writes:
            return []
        return [(name, t) for name, t in self.tensors(args, kwargs) if name.split("[")[0] in self.writes]

    def attributes(self, args: tuple, kwargs: dict) -> dict[str, Any]:
        """Arguments that are not tensors, with defaults filled in."""
        bound = dict(self.defaults) | self.bound(args, kwargs)
        return {
            name: value
            for name, value in bound.items()
            if not isinstance(value, torch.Tensor)
            and not (isinstance(value, list | tuple) and any(isinstance(v, torch.Tensor) for v in value))
        }


@functools.lru_cache(maxsize=4096)
def signature(func: Any) -> Signature:
    """Of an overload such as torch.ops.aten.mul.Tensor."""
    arguments = func._schema.arguments
    return Signature(
        names=tuple(a.name for a in arguments),
        writes=frozenset(a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write),
        defaults=tuple((a.name, a.default_value) for a in arguments if a.has_default_value()),
        random=torch.Tag.nondeterministic_seeded in func.tags,
        makes=func is torch.ops.aten.lift_fresh.default,
        asks=func.namespace in ("prim", "profiler") or func.__name__.split(".")[0] in ASKING,
        detaches=func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default),
    )


_LAZY = (torch._C.DispatchKey.Conjugate, torch._C.DispatchKey.Negative, torch._C.DispatchKey.ZeroTensor)
_excluded = torch._C._dispatch_tls_is_dispatch_key_excluded
_exclude = torch._C._dispatch_tls_set_dispatch_key_excluded


def run(func: Any, args: tuple, kwargs: dict) -> Any:
    """Call an operation from within a dispatch mode as it runs without one. torch leaves out there what reads tensors
    that are conjugated or negated lazily, so that kernels made of such (`linalg.pinv`) give other numbers."""
    left_out = [key for key in _LAZY if _excluded(key)]
    for key in left_out:
        _exclude(key, False)
    try:
        return func(*args, **kwargs)
    finally:
        for key in left_out:
            _exclude(key, True)


def flatten(tree: Any) -> Iterator[torch.Tensor]:
    """The tensors of nested tuples and lists."""
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, list | tuple):
        for part in tree:
            yield from flatten(part)


def generator_state(tensors: list[tuple[str, torch.Tensor]], kwargs: dict) -> torch.Tensor:
    """The state of the generator that a random operation is about to use."""
    generator = kwargs.get("generator")
    if generator is not None:
        return generator.get_state()
    device = kwargs.get("device") or (tensors[0][1].device if tensors else torch.device("cpu"))
    device = torch.device(device)
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def arrived(sign: Signature, args: tuple, kwargs: dict, out: Any) -> None:
    """Wait for a copy to the CPU that does not wait itself."""
    if sign.bound(args, kwargs).get("non_blocking") and isinstance(out, torch.Tensor) and out.device.type == "cpu":
        source = next((t for _, t in sign.tensors(args, kwargs) if t.device.type != "cpu"), None)
        if source is not None:
            torch.accelerator.synchronize(source.device)
