"""The learning rate, a pure function of tokens seen: the same for any number of ranks, micro-batches or restarts."""

import math
from typing import TYPE_CHECKING

from kiem.config.run import TrainConfig

if TYPE_CHECKING:
    import torch


def lr_scale(tokens_seen: int, train: TrainConfig) -> float:
    """Factor (0..1) on the peak learning rates for an update that begins after `tokens_seen` tokens.

    Linear warm-up over `warmup_tokens`, then constant, then over the last `cooldown_tokens` of `tokens` a fall to
    `final_lr_fraction`, linear or as half a cosine. Taken at the middle of the update's batch, so that neither the
    first nor the last update is wasted on a rate of zero. `train` is resolved.
    """
    assert train.batch_tokens is not None and train.tokens is not None
    at = tokens_seen + train.batch_tokens / 2
    rise = min(1.0, at / train.warmup_tokens) if train.warmup_tokens else 1.0
    if train.cooldown == "none" or not train.cooldown_tokens:
        return rise
    left = min(1.0, max(0.0, (train.tokens - at) / train.cooldown_tokens))
    shape = left if train.cooldown == "linear" else 0.5 - 0.5 * math.cos(math.pi * left)
    return rise * (train.final_lr_fraction + (1.0 - train.final_lr_fraction) * shape)


def set_lr(optimizer: "torch.optim.Optimizer", scale: float) -> None:
    """Set every group's `lr` to `scale` times its peak, `initial_lr` (the key that torch's schedulers use)."""
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * scale
