"""The mathematics of one update. No input, no output."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kiem.config.run import TrainConfig
from kiem.errors import NumericsError
from kiem.optim.schedule import lr_scale, set_lr
from kiem.parallel.ranks import Ranks
from kiem.training.objective import Objective


@dataclass(frozen=True)
class StepResult:
    """loss: loss sum over weight of the whole step (nats per valid token); weight: that weight; grad_norm: global
    2-norm before clipping; lr_scale: 0..1; metrics: the objective's, divided by the weight."""

    loss: float
    weight: float
    grad_norm: float
    lr_scale: float
    metrics: Mapping[str, float] = field(default_factory=dict)


def train_step(
    objective: Objective,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: Sequence[Any],
    settings: TrainConfig,
    tokens_seen: int,
    ranks: Ranks | None = None,
) -> StepResult:
    """Forward and backward over all micro-batches, then one update at the learning rate of `tokens_seen`.

    The loss is the objective's sum divided by its weight in the whole step, over micro-batches and ranks, so that no
    split of the batch changes it. Ranks: `micro_batches` are this rank's, the model is whole on each, and gradients are
    summed over them here. Raises NumericsError, before anything is updated, if the loss or the gradient is not finite;
    the gradients are left in place for the search for the cause.
    """
    ranks = ranks or Ranks()
    parameters = [p for p in model.parameters() if p.requires_grad]
    device = parameters[0].device
    weight = torch.tensor(sum(map(objective.weight, micro_batches)), dtype=torch.float64, device=device)
    ranks.sum_(weight)
    optimizer.zero_grad(set_to_none=True)
    total = torch.zeros((), dtype=torch.float32, device=device)
    metrics: dict[str, Tensor] = {}
    for batch in micro_batches:
        loss_sum, _, more = objective.loss(model, batch)
        loss = loss_sum / weight.float()
        loss.backward()
        total += loss.detach()
        for name, value in more.items():
            metrics[name] = metrics.get(name, 0.0) + value / weight.float()
    gradients = [p.grad for p in parameters if p.grad is not None]
    for tensor in (*gradients, total, *metrics.values()):
        ranks.sum_(tensor)
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    loss_value, norm_value = total.item(), norm.item()
    if not torch.isfinite(total + norm):
        what = "loss" if not torch.isfinite(total) else "gradient norm"
        raise NumericsError(f"the {what} is {loss_value if what == 'loss' else norm_value}: the update was refused")
    if settings.max_grad_norm and norm_value > settings.max_grad_norm:
        torch._foreach_mul_(gradients, settings.max_grad_norm / norm_value)
    scale = lr_scale(tokens_seen, settings)
    set_lr(optimizer, scale)
    optimizer.step()
    found = {name: value.item() for name, value in metrics.items()}
    return StepResult(loss_value, weight.item(), norm_value, scale, found)
