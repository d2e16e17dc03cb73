"""Tensors that are not plainly strided: sparse, nested, lazy, without memory. What they hold, as one strided tensor,
and back.

A sparse tensor is a function of the values that it stores, a jagged one of its rows laid end to end: those are its
elements here, and its gradient is taken at them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy

COMPRESSED = (torch.sparse_csr, torch.sparse_bsr, torch.sparse_csc, torch.sparse_bsc)
WITHOUT_FLOAT64 = {"mps"}  # devices
DENSE = 1 << 24  # a sparse tensor of at most so many elements may be written out


def regular(tensor: Tensor) -> bool:
    """Whether it has a shape and strides: not sparse, nested, or lazy."""
    return tensor.layout == torch.strided and not tensor.is_nested and not is_lazy(tensor)


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    """Of a nested tensor only how many it holds; () of a lazy one."""
    if is_lazy(tensor):
        return ()
    return (tensor.size(0),) if tensor.is_nested else tuple(tensor.shape)


def elements(tensor: Tensor) -> Tensor:
    """What a tensor holds, strided (a sparse one's values, a jagged one's rows); the tensor itself if it is regular.
    Differentiable. Raises NotImplementedError for nested tensors that are not jagged."""
    if tensor.layout == torch.sparse_coo:
        return (tensor if tensor.is_coalesced() else tensor.coalesce()).values()
    if tensor.layout in COMPRESSED or tensor.layout == torch.jagged:
        return tensor.values()
    if tensor.is_nested:
        raise NotImplementedError("a nested tensor that is not jagged")
    return tensor


def held_by(tensor: Tensor) -> int:
    """How many elements a tensor holds."""
    return tensor.numel() if tensor.is_nested else elements(tensor).numel()


def with_elements(like: Tensor, held: Tensor) -> Tensor:
    """A tensor laid out as `like` that holds other elements. Differentiable."""
    if regular(like):
        return held
    if like.layout == torch.jagged:
        jagged: Any = like  # a NestedTensor
        return torch.nested.nested_tensor_from_jagged(
            held, jagged.offsets(), jagged.lengths(), jagged._ragged_idx, jagged._get_min_seqlen(),
            jagged._get_max_seqlen(),
        )  # fmt: skip
    if like.layout == torch.sparse_coo:
        known = like.detach().coalesce()
        return torch.sparse_coo_tensor(
            known.indices(), held, like.shape, is_coalesced=like.is_coalesced(), check_invariants=False
        )
    if like.layout in COMPRESSED:
        rows = like.layout in (torch.sparse_csr, torch.sparse_bsr)
        outer, inner = (like.crow_indices(), like.col_indices()) if rows else (like.ccol_indices(), like.row_indices())
        return torch.sparse_compressed_tensor(
            outer, inner, held, like.shape, layout=like.layout, check_invariants=False
        )
    raise NotImplementedError(f"the layout {like.layout}")


def at_elements(gradient: Tensor, like: Tensor) -> Tensor:
    """A gradient of any layout, at the elements of `like`."""
    if regular(like):
        return gradient.to_dense() if not regular(gradient) else gradient
    if like.layout == torch.jagged:
        return elements(gradient)
    places = _places(like)
    if regular(gradient):
        return gradient.reshape(-1)[places.reshape(-1)].view(places.shape)
    given, values = _places(gradient).reshape(-1), elements(gradient).reshape(-1)
    given, order = given.sort()
    if given.numel() == 0:
        return values.new_zeros(places.shape)
    found = torch.searchsorted(given, places).clamp_max(given.numel() - 1)
    return torch.where(given[found] == places, values[order][found], 0)


def _places(tensor: Tensor) -> Tensor:
    """Of each element of a sparse tensor, its place in the tensor written out (int64, in the shape of the values)."""
    if tensor.layout in (torch.sparse_bsr, torch.sparse_bsc, torch.sparse_csc):
        raise NotImplementedError(f"the layout {tensor.layout}")
    coo = tensor.detach() if tensor.layout == torch.sparse_coo else tensor.detach().to_sparse_coo()
    coo = coo.coalesce()
    strides = torch.empty(coo.shape, device="meta").stride()
    places = (coo.indices() * coo.indices().new_tensor(strides[: coo.sparse_dim()])[:, None]).sum(0)
    for stride, size in zip(strides[coo.sparse_dim() :], coo.shape[coo.sparse_dim() :], strict=True):
        places = places[..., None] + stride * torch.arange(size, device=places.device)
    return places


def can_be_written_out(tensor: Tensor) -> bool:
    """Whether there may be a tensor of all its elements, zeros and all."""
    return regular(tensor) or (not tensor.is_nested and not is_lazy(tensor) and tensor.numel() <= DENSE)


def written_out(tensor: Tensor) -> Tensor:
    """The tensor with all its zeros."""
    return tensor if regular(tensor) else tensor.to_dense()


def unwrapped(tensor: Tensor) -> Tensor:
    """What the wrappers of torch.func hold: one tensor with all batch dimensions of vmap."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    return tensor


def batched(tensor: Tensor) -> bool:
    """Whether it stands for many tensors at once, of `vmap` or of `is_grads_batched`."""
    functorch = torch._C._functorch
    return functorch.is_batchedtensor(tensor) or functorch.is_legacy_batchedtensor(tensor)


def outside_transforms() -> AbstractContextManager:
    """Within it, transforms of torch.func that are under way do not see what is computed."""
    active = torch._C._functorch.peek_interpreter_stack() is not None
    return torch._C._DisableFuncTorch() if active else nullcontext()


def filled(tensor: Tensor) -> Tensor:
    """A tensor with memory: autograd's tangents that are zero have none, and some kernels read it all the same."""
    return torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device) if tensor._is_zerotensor() else tensor


def readable(tensor: Tensor) -> Tensor | None:
    """The elements, strided and without a graph, of a tensor that is `unwrapped`; None if there are none to look at
    (meta, fake, functional, memory that was given back)."""
    tensor = filled(tensor)
    wrapped = batched(tensor) or torch._is_functional_tensor(tensor)
    if wrapped or tensor.device.type == "meta" or isinstance(tensor, FakeTensor):
        return None
    if is_lazy(tensor) or (tensor.is_nested and tensor.layout == torch.strided):
        return None
    values = elements(tensor.detach())
    if not _has_memory(values):
        return None
    if values.device.type in WITHOUT_FLOAT64:
        values = values.cpu()
    return values.dequantize() if values.is_quantized else values


def _has_memory(tensor: Tensor) -> bool:
    """Whether the memory of a strided tensor holds all its elements (FSDP gives that of its weights back)."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided:
        return True  # a class of its own knows what it holds
    return tensor.numel() == 0 or tensor.untyped_storage().nbytes() > int(tensor.storage_offset()) * tensor.itemsize


def sums_modulo(tensor: Tensor, modulus: int) -> Tensor:
    """Of a sparse tensor, the sums over the elements whose place (in the last dimension, if that is at least
    `modulus` long) is equal modulo `modulus`. float64."""
    places, values = _places(tensor), elements(tensor.detach())
    if tensor.dim() > 1 and tensor.shape[-1] >= modulus:
        places = places % tensor.shape[-1]
    sums = values.new_zeros(modulus, dtype=torch.float64)
    return sums.index_add_(0, (places % modulus).reshape(-1), values.reshape(-1).double())
