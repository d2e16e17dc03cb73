"""Operations with several right results: eigenvectors up to a factor, eigenvalues in any order, a rank that was decided
by rounding. In float64 each must take the result that the program had, or what follows is about another function.

Shapes: `...` batches, M and N rows and columns of a matrix, K the smaller of both."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kiem.inspect.graph.model import Op

# Whose outputs are kept, so that they can be found again.
MANY_VALUED = {"_linalg_eigh", "_linalg_svd", "linalg_eig", "_linalg_eigvals", *(
    POOLED := {"fractional_max_pool2d": 2, "fractional_max_pool3d": 3}
)}  # fmt: skip


def as_it_was(op: Op, outputs: tuple[Tensor, ...], recorded: dict[int, Tensor]) -> tuple[Tensor, ...]:
    """The outputs of an operation run again, with the signs (the phases) and the order that the recorded ones had."""
    had = tuple(recorded.get(v) for v in op.outputs)
    if op.label == "_linalg_eigh" and had[1] is not None:
        return outputs[0], outputs[1] * _phase(_products(outputs[1], had[1]))[..., None, :]
    if op.label == "_linalg_svd":
        return _svd_as_it_was(outputs, had)
    if op.label in ("linalg_eig", "_linalg_eigvals") and had[0] is not None:
        order = _order(outputs[0].detach(), had[0])
        values = outputs[0].gather(-1, order)
        if len(outputs) == 1 or had[1] is None:
            return (values, *outputs[1:])
        vectors = outputs[1].gather(-1, order[..., None, :].expand(outputs[1].shape))
        return values, vectors * _phase(_products(vectors, had[1]))[..., None, :]
    return outputs


def _svd_as_it_was(outputs: tuple[Tensor, ...], had: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    """U (..., M, K) and Vᴴ (..., K, N) turn together; columns of U and rows of Vᴴ that belong to no singular value are
    a basis of nothing that has a derivative, and stay."""
    u, s, vh = outputs
    k = s.shape[-1]
    along = torch.zeros_like(u[..., 0, :k] if u.numel() else s)
    if had[0] is not None and u.numel():
        along = along + _products(u[..., :k], had[0][..., :k])
    if had[2] is not None and vh.numel():
        along = along + _products(vh.mH[..., :k], had[2].mH[..., :k])
    turn = torch.ones_like(u[..., 0, :]) if u.numel() else None
    if turn is None or not vh.numel():
        return outputs
    turn[..., :k] = _phase(along)
    back = torch.ones_like(vh[..., 0])
    back[..., :k] = _phase(along).conj()
    return u * turn[..., None, :], s, vh * back[..., None]


def _products(vectors: Tensor, had: Tensor) -> Tensor:
    """The inner product of each column with the one it was."""
    return (vectors.detach().conj() * had.to(vectors.dtype)).sum(-2)


def _phase(products: Tensor) -> Tensor:
    """By which factor of size 1 a column has to be multiplied."""
    size = products.abs()
    return torch.where(size > 0, products / size.clamp_min(torch.finfo(size.dtype).tiny), 1.0)


def _order(values: Tensor, had: Tensor) -> Tensor:
    """int64 (..., N): where each of the recorded eigenvalues stands now; each is taken once, the nearest first."""
    apart = (values[..., None, :] - had.to(values.dtype)[..., :, None]).abs()
    order = torch.zeros(apart.shape[:-1], dtype=torch.long, device=values.device)
    flat, n = apart.reshape(-1, *apart.shape[-2:]), apart.shape[-1]
    for batch, distances in enumerate(flat):
        for _ in range(n):
            row, column = divmod(int(distances.argmin()), n)
            order.view(-1, n)[batch, row] = column
            distances[row, :] = distances[:, column] = torch.inf
    return order


def taken_as_it_was(op: Op, args: tuple[Any, ...], recorded: dict[int, Tensor]) -> tuple[Tensor, Tensor] | None:
    """The result of a pooling over random windows, whose borders its own type rounds: what it took, by the recorded
    places (..., one plane in a row). None if they were not kept, and for any other operation."""
    places = recorded.get(op.outputs[1]) if op.label in POOLED and len(op.outputs) > 1 else None
    if places is None:
        return None
    n = POOLED[op.label]
    return args[0].flatten(-n).gather(-1, places.flatten(-n)).view(places.shape), places


def cut_at_rank(op: Op, x: Tensor, kwargs: dict[str, Any], recorded: dict[int, Tensor]) -> dict[str, Any]:
    """Arguments of `linalg.pinv` in float64 for x (..., M, N), so that it takes the rank that the matrix had in its own
    type: there, singular values below the rounding of the type count as zero. The pseudoinverse is continuous as long
    as the rank stays."""
    given = dict(op.inputs)
    had, hermitian = recorded[given["self"]], bool(op.attributes.get("hermitian", False))
    limits = {
        name: recorded[given[name]] if name in given else op.attributes.get(name)
        for name in ("atol", "rtol")
        if name in given or op.attributes.get(name) is not None
    }
    if had.numel() == 0:
        return kwargs
    rank = torch.linalg.matrix_rank(had, hermitian=hermitian, **limits)
    sizes = torch.linalg.eigvalsh(x).abs().sort(-1, descending=True)[0] if hermitian else torch.linalg.svdvals(x)
    sizes = torch.cat([sizes.new_full((*sizes.shape[:-1], 1), torch.inf), sizes], -1).detach()
    smallest = sizes.gather(-1, rank[..., None])[..., 0]
    return kwargs | {"atol": smallest / 2, "rtol": torch.zeros_like(smallest)}
