"""A run that must end at a given time: planned from measured speed, and cut while it runs if it turns out slower.

The schedule stays a function of tokens seen. A shorter run gets a proportionally shorter cool-down, from where it is:
the learning rate does not jump.
"""

import time
from collections import deque
from collections.abc import Callable

from kiem.config.run import TrainConfig

LEAST_STEPS = 3  # before a pace is believed
LEAST_SHARE = 0.05  # of the time that must have passed for it, so that one slow evaluation decides nothing
WINDOW_SHARE = 0.1  # of the time: the newest pace is that over so much
SLOWER = 1.25  # by as much the newest pace must differ from that of the whole run to be taken instead
TOLERANCE = 0.02  # of the time; to be later by less is left alone


class Deadline:
    """When the run must have ended, on the clock of time.monotonic; and its pace since this was first asked."""

    def __init__(self, ends: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.ends, self._clock = ends, clock
        self._marks: deque[tuple[float, int]] = deque()  # (time, tokens) after the newest steps, and after the first

    def shortened(self, train: TrainConfig, tokens_seen: int, ending_seconds: float) -> TrainConfig | None:
        """The settings with which the run ends in time, or None if it does as it is. To be asked after every step.

        ending_seconds: what comes after the last step (the last evaluation, sample and save). The pace is that of all
        that happened since the first step, evaluations and saves included. At least one more step is left.
        """
        now = self._clock()
        self._marks.append((now, tokens_seen))
        pace, left = self._seconds_per_token(), train.tokens - tokens_seen
        if pace is None or left <= train.batch_tokens:
            return None
        available = max(0.0, self.ends - now - ending_seconds)
        if left * pace - available <= TOLERANCE * (self.ends - self._marks[0][0]):
            return None
        possible = int(available / pace)
        return shortened(train, tokens_seen, max(1, possible // train.batch_tokens) * train.batch_tokens)

    def _seconds_per_token(self) -> float | None:
        """Of the whole run since its first step, which is slow; where the newest steps are much slower, of these."""
        (began, first), (now, newest) = self._marks[0], self._marks[-1]
        total = self.ends - began
        if len(self._marks) <= LEAST_STEPS or now - began < LEAST_SHARE * total:
            return None
        while len(self._marks) > LEAST_STEPS + 2 and self._marks[2][0] < now - WINDOW_SHARE * total:
            del self._marks[1]
        whole = (now - began) / (newest - first)
        since, before = self._marks[1]
        recent = (now - since) / (newest - before)
        return recent if recent > SLOWER * whole else whole


def shortened(train: TrainConfig, tokens_seen: int, left: int) -> TrainConfig:
    """The settings of a run that ends after `left` more tokens (whole batches), its learning rate continuous."""
    tokens, cooldown = tokens_seen + left, train.cooldown_tokens
    if cooldown:
        if tokens_seen > train.tokens - cooldown:  # in it: what is left of the fall, in the time that is left
            cooldown = round(cooldown * left / (train.tokens - tokens_seen))
        else:
            cooldown = min(left, round(cooldown * tokens / train.tokens))
    return train.model_copy(
        update={
            "tokens": tokens,
            "cooldown_tokens": min(cooldown, tokens),
            "warmup_tokens": min(train.warmup_tokens, tokens),
        }
    )
