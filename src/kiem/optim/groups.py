"""Which parameter is updated by what.

1. Matrices inside the blocks (2-D): Muon, or AdamW with weight decay.
2. Embeddings and the head: AdamW. With Muon they are not decayed, and an embedding that starts with a deviation of 1
   (scheme zero_output) is moved proportionally faster: AdamW moves every entry by about its rate, whatever its size.
3. Norm weights and biases: AdamW, never decayed.
"""

import torch
from torch import Tensor

from kiem.config.run import TrainConfig
from kiem.model.transformer import Transformer
from kiem.optim.muon import Muon


class Optimizer:
    """AdamW and, if any matrices are its, Muon: one step, one flat state by name."""

    def __init__(self, adamw: torch.optim.AdamW, names: dict[int, str], muon: Muon | None):
        self.adamw, self.names, self.muon = adamw, names, muon
        self.peaks = [group["lr"] for group in adamw.param_groups]

    def zero_grad(self) -> None:
        """Drop every gradient (to None)."""
        self.adamw.zero_grad(set_to_none=True)
        for p in self.muon.parameters.values() if self.muon else ():
            p.grad = None

    def step(self, scale: float) -> None:
        """One update with every peak learning rate times `scale`."""
        for group, peak in zip(self.adamw.param_groups, self.peaks, strict=True):
            group["lr"] = peak * scale
        self.adamw.step()
        if self.muon:
            self.muon.step(scale)

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything that the next update depends on besides weights and gradients, by parameter and moment."""
        state = {}
        for p, moments in self.adamw.state.items():
            for key, value in moments.items():
                state[f"{self.names[id(p)]}.{key}"] = value
        for name, moment in (self.muon.moments if self.muon else {}).items():
            state[f"{name}.momentum"] = moment
        return state

    def load_state_tensors(self, state: dict[str, Tensor]) -> None:
        """Undo of state_tensors(). Raises KeyError if a tensor is missing or left over."""
        left = dict(state)
        for group in self.adamw.param_groups:
            for p in group["params"]:
                prefix = self.names[id(p)]
                keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{prefix}.{key}" in left]
                if keys:
                    # step stays on the CPU in float32 or follows the parameter when fused, as torch keeps it
                    self.adamw.state[p] = {
                        key: left.pop(f"{prefix}.{key}").to(device=p.device, dtype=torch.float32, copy=True)
                        for key in keys
                    }
        for name, moment in (self.muon.moments if self.muon else {}).items():
            moment.copy_(left.pop(f"{name}.momentum"))
        if left:
            raise KeyError(f"optimiser state for unknown parameters: {', '.join(sorted(left)[:5])}")


def build_optimizer(model: Transformer, train: TrainConfig) -> Optimizer:
    """The optimiser of a resolved TrainConfig for the parameters of `model` that train."""
    muon = train.optimizer == "muon"
    matrices, tables, vectors = {}, {}, {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        kind = vectors if p.ndim < 2 else matrices if name.startswith("blocks.") else tables
        kind[name] = p
    decay = train.weight_decay
    groups = []

    def add(params: list[Tensor], lr: float, weight_decay: float) -> None:
        if params:
            groups.append({"params": params, "lr": lr, "weight_decay": weight_decay})

    if not muon:
        add([*matrices.values(), *tables.values()], train.lr, decay)
    else:
        faster = {
            n: p
            for n, p in tables.items()
            if train.init == "zero_output" and n != "head.weight" and not model.config.tie_embeddings
        }
        add(list(faster.values()), train.lr * EMBEDDING_RATE, 0.0)
        add([p for n, p in tables.items() if n not in faster], train.lr, 0.0)
    add(list(vectors.values()), train.lr, 0.0)
    adamw = torch.optim.AdamW(groups, betas=(train.beta1, train.beta2), eps=1e-8 if not muon else 1e-10, fused=True)
    names = {id(p): n for n, p in model.named_parameters()}
    return Optimizer(adamw, names, Muon(matrices, train.matrix_lr, decay) if muon and matrices else None)


EMBEDDING_RATE = 50.0  # initial deviation of such an embedding (1.0) over the usual one (0.02)
