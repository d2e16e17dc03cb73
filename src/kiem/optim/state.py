"""The state of an optimizer by the names of the parameters, as a checkpoint holds it."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from kiem.errors import CheckpointError


def state_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """Everything that the next update depends on besides weights and gradients: `parameter.moment` -> tensor."""
    return {f"{name}.{key}": value for name, state in _by_name(optimizer, model) for key, value in state.items()}


def load_state_tensors(optimizer: torch.optim.Optimizer, model: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Undo of state_tensors(), in place, into an optimizer whose state is made at once (Muon, MuonAdamW).

    Raises CheckpointError, before anything is copied, that names each tensor that is missing, unknown, or of another
    shape: an update with fresh moments would be another training.
    """
    wanted = state_tensors(optimizer, model)
    problems = [f"{name} is missing" for name in wanted if name not in saved]
    problems += [f"{name} belongs to no parameter that trains" for name in saved if name not in wanted]
    problems += [
        f"{name} has shape {list(saved[name].shape)}, but this run needs {list(value.shape)}"
        for name, value in wanted.items()
        if name in saved and saved[name].shape != value.shape
    ]
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise CheckpointError(
            f"the checkpoint's optimizer state does not fit this run: {'; '.join(problems[:5])}{more}. "
            "Resume with the run's own configuration, or start a new run from its weights"
        )
    with torch.no_grad():
        for name, value in wanted.items():
            value.copy_(saved[name])


def _by_name(optimizer: torch.optim.Optimizer, model: nn.Module) -> Iterator[tuple[str, dict[str, Tensor]]]:
    names = {p: name for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        for p in group["params"]:
            yield names[p], optimizer.state[p]
