"""What there is on this machine: a time instead of a length, and the memory that a trained model needs."""

import time
from math import prod
from pathlib import Path

from kiem import runtime
from kiem.config.model import ModelConfig
from kiem.config.presets import depth_for, resolve
from kiem.config.run import RunConfig
from kiem.errors import ConfigError
from kiem.format import bytes_text
from kiem.planning.count import flops_per_token, parameter_shapes
from kiem.planning.memory import FLOAT32
from kiem.planning.predict import tokens_for_minutes

MATMUL_SHARE = 0.5  # of the machine's matmul throughput that training reaches, about


class Budget:
    """The minutes that a user gave; they begin when this is made. `ends`: on the clock of time.monotonic."""

    def __init__(self, minutes: float) -> None:
        self.minutes, self.began = minutes, time.monotonic()
        self.ends = self.began + 60 * minutes

    def minutes_left(self) -> float:
        return max(0.0, (self.ends - time.monotonic()) / 60)

    def flops(self, config: RunConfig) -> float:
        """What the machine can do in the time that is left, about."""
        device = runtime.select_device(config.device)
        rate = runtime.matmul_rate(device, runtime.select_precision(config.train.precision, device))
        return MATMUL_SHARE * rate * 60 * self.minutes_left()

    def with_depth(self, config: RunConfig) -> RunConfig:
        """The depth that learns most in the time, if the user has named no model."""
        if config.model is not None or config.depth is not None:
            return config
        return config.model_copy(update={"depth": depth_for(self.flops(config))})

    def with_length(self, config: RunConfig, vocab_size: int) -> RunConfig:
        """The tokens that fit the time: guessed from FLOPs, which settles the batch, then from measured steps."""

        def lasting(tokens: int) -> RunConfig:
            return config.model_copy(update={"train": config.train.model_copy(update={"tokens": tokens})})

        per_token = flops_per_token(resolve(config, vocab_size).model).total
        guess = max(int(self.flops(config) / per_token), config.train.batch_tokens or 1)
        guessed = resolve(lasting(max(guess, resolve(config, vocab_size).model.context_length)), vocab_size)
        return lasting(tokens_for_minutes(guessed, self.minutes, time.monotonic() - self.began))


def require_room(model: ModelConfig, device: str, of: str | Path, twice: str = "as read and in the model") -> None:
    """Raise ConfigError if the weights of a model do not fit into memory twice, before anything is allocated.

    of: whose model it is, and twice: why its weights are there twice, for the message. (On an accelerator: once.)
    """
    weights = FLOAT32 * sum(map(prod, parameter_shapes(model).values()))
    place = runtime.select_device(device)
    found = [("this machine", 2 * weights, f" ({twice})", runtime.available_memory())]
    if place.type == "cuda":
        found.append((str(place), weights, "", runtime.available_memory(place)))
    for where, needed, why, available in found:
        if needed > available:
            raise ConfigError(
                f"{of}: its model does not fit: {bytes_text(weights)} of weights need {bytes_text(needed)} of "
                f"memory{why}, and {bytes_text(available)} are available on {where}: close other programs, or use a "
                "smaller model or a machine with more memory"
            )
