"""From logits to the next token: pure functions on tensors, one row per sequence.

The order is that of transformers: repetition penalty, temperature, top-k, top-p, then the draw.

B batch, V vocabulary.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kiem.errors import ConfigError


def is_number(value) -> bool:
    """True for an int or a float that is finite; a bool is not a number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_whole(value) -> bool:
    """True for an int; a bool is not one."""
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Raises ConfigError naming every value out of range."""

    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self):
        problems = []
        t = self.temperature
        if not is_number(t) or not (t == 0 or 1e-4 <= t <= 100):
            problems.append(f"temperature {t!r}: use 0 (always the most likely token) or a number from 0.0001 to 100")
        if self.top_k is not None and not (is_whole(self.top_k) and self.top_k >= 1):
            problems.append(
                f"top_k {self.top_k!r}: use a whole number from 1 (the number of tokens to choose from), or omit it"
            )
        if self.top_p is not None and not (is_number(self.top_p) and 0 < self.top_p <= 1):
            problems.append(f"top_p {self.top_p!r}: use a number above 0 and at most 1, or leave it out")
        penalty = self.repetition_penalty
        if not is_number(penalty) or not 0.01 <= penalty <= 100:
            problems.append(f"repetition_penalty {penalty!r}: use a number from 0.01 to 100 (1 is none)")
        if problems:
            raise ConfigError("\n".join(problems))

    @property
    def greedy(self) -> bool:
        """True when the likeliest token is always taken, so that no chance is involved."""
        return self.temperature == 0


def penalize_repetition(logits_BV: Tensor, seen_BV: Tensor, penalty: float) -> Tensor:
    """Make tokens that already occur less likely (penalty > 1): positive logits are divided, negative ones multiplied.

    `seen_BV` is boolean. CTRL, Keskar et al. 2019, section 4.1, with the sign rule that transformers uses.
    """
    penalized_BV = torch.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty)
    return torch.where(seen_BV, penalized_BV, logits_BV)


def scale_temperature(logits_BV: Tensor, temperature: float) -> Tensor:
    """Divide the distances to the largest logit by `temperature` > 0. The same distribution as dividing the logits, but
    a small temperature cannot overflow."""
    return (logits_BV - logits_BV.amax(-1, keepdim=True)) / temperature


def keep_top_k(logits_BV: Tensor, k: int) -> Tensor:
    """Set all but the k largest logits to -inf. Ties with the k-th are kept."""
    kth_B1 = torch.topk(logits_BV, min(k, logits_BV.shape[-1])).values[..., -1:]
    return logits_BV.masked_fill(logits_BV < kth_B1, -math.inf)


def keep_top_p(logits_BV: Tensor, p: float) -> Tensor:
    """Keep the fewest tokens whose probabilities reach p, the one that crosses p included, and so at least one (nucleus
    sampling, Holtzman et al. 2020)."""
    ascending_BV, order_BV = torch.sort(logits_BV)
    dropped_BV = ascending_BV.softmax(-1).cumsum(-1) <= 1 - p
    dropped_BV[..., -1] = False
    return logits_BV.masked_fill(dropped_BV.scatter(-1, order_BV, dropped_BV), -math.inf)


def shape_logits(logits_BV: Tensor, sampling: Sampling, seen_BV: Tensor | None = None) -> Tensor:
    """Apply what `sampling` asks for. `seen_BV` (boolean: occurs so far) is needed with a repetition penalty.

    With temperature 0 only the penalty matters, because nothing else changes which token is likeliest.
    """
    if sampling.repetition_penalty != 1:
        assert seen_BV is not None
        logits_BV = penalize_repetition(logits_BV, seen_BV, sampling.repetition_penalty)
    if sampling.greedy:
        return logits_BV
    if sampling.temperature != 1:
        logits_BV = scale_temperature(logits_BV, sampling.temperature)
    if sampling.top_k is not None:
        logits_BV = keep_top_k(logits_BV, sampling.top_k)
    if sampling.top_p is not None and sampling.top_p < 1:
        logits_BV = keep_top_p(logits_BV, sampling.top_p)
    return logits_BV


def draw(logits_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The token of each row at the point `uniform_B` (float64, in [0, 1)) of the row's cumulative probability.

    One number per row decides it, so a row's token does not depend on the other rows.
    """
    cumulative_BV = logits_BV.float().softmax(-1).double().cumsum(-1)
    total_B1 = cumulative_BV[:, -1:]
    # Below the total even after rounding: the token found then has a probability above 0.
    point_B1 = torch.minimum(uniform_B[:, None] * total_B1, total_B1.nextafter(torch.zeros_like(total_B1)))
    return torch.searchsorted(cumulative_BV, point_B1, right=True).squeeze(-1)
