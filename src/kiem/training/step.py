"""The mathematics of one update. No input, no output."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from kiem.config.run import TrainConfig
from kiem.data.loader import Batch
from kiem.errors import NumericsError
from kiem.model.ops.cross_entropy import linear_cross_entropy
from kiem.model.transformer import Transformer
from kiem.optim.groups import Optimizer
from kiem.optim.schedule import lr_scale


@dataclass(frozen=True)
class StepResult:
    """loss: nats per valid token over the whole step; grad_norm: global 2-norm before clipping; lr_scale: 0..1."""

    loss: float
    tokens: int
    grad_norm: float
    lr_scale: float


def loss_sum(model: Transformer, batch: Batch, documents_apart: bool = True) -> torch.Tensor:
    """Sum of the cross-entropy in nats over the batch's valid targets.

    documents_apart: attention and positions begin anew at each document; else a row is one text.
    """
    packing = (batch.positions_BT, batch.docs_BT) if documents_apart else (None, None)
    x_BTD = model.features(batch.tokens_BT, *packing)
    return linear_cross_entropy(x_BTD.flatten(0, 1), model.head_weight, batch.targets_BT.flatten())


def train_step(
    model: Transformer,
    optimizer: Optimizer,
    micro_batches: Sequence[Batch],
    train: TrainConfig,
    tokens_seen: int,
    documents_apart: bool = True,
) -> StepResult:
    """Forward and backward over all micro-batches, then one update.

    The loss is the sum over valid tokens divided by the number of valid tokens in the whole step, over micro-batches
    and ranks, so that no split of the batch changes it. Raises NumericsError, before anything is updated, if the loss
    or the gradient is not finite; the gradients are left in place for the search for the cause.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    device = parameters[0].device
    valid = _sum_over_ranks(
        torch.tensor(float(sum(b.n_valid for b in micro_batches)), dtype=torch.float64, device=device)
    )
    optimizer.zero_grad()
    total = torch.zeros((), dtype=torch.float32, device=device)
    for batch in micro_batches:
        loss = loss_sum(model, batch, documents_apart) / valid.float()
        loss.backward()
        total += loss.detach()
    gradients = [p.grad for p in parameters if p.grad is not None]
    for gradient in gradients:
        _sum_over_ranks(gradient)
    total = _sum_over_ranks(total)
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    loss_value, norm_value = total.item(), norm.item()
    if not torch.isfinite(total + norm):
        what = "loss" if not torch.isfinite(total) else "gradient norm"
        raise NumericsError(f"the {what} is {loss_value if what == 'loss' else norm_value}: the update was refused")
    if train.max_grad_norm and norm_value > train.max_grad_norm:
        torch._foreach_mul_(gradients, train.max_grad_norm / norm_value)
    scale = lr_scale(tokens_seen, train)
    optimizer.step(scale)
    return StepResult(loss_value, int(valid.item()), norm_value, scale)


def _sum_over_ranks(x: torch.Tensor) -> torch.Tensor:
    """In-place sum over data-parallel ranks; itself when there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(x)
    return x
