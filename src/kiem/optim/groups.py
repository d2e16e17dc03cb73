"""Which parameter is updated by what, and the optimizer that does it.

1. Matrices inside the blocks: Muon, or AdamW with weight decay.
2. Embeddings and the head: AdamW. With Muon they are not decayed, and an embedding that starts with a deviation of 1
   (scheme zero_output) is moved proportionally faster: AdamW moves every entry by about its rate, whatever its size.
3. Norm weights, biases and whatever else is not a matrix: AdamW, never decayed.
"""

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from kiem.config.run import TrainConfig
from kiem.optim.muon import Muon

Role = Literal["matrix", "embedding", "head", "vector"]
EMBEDDING_RATE = 50.0  # initial deviation of such an embedding (1.0) over the usual one (0.02)


def parameter_roles(model: nn.Module) -> dict[str, Role]:
    """The role of each parameter by its name (shared ones once, under their first name), from the module it is in.

    embedding: of an nn.Embedding; head: of the module at `model.head`; matrix: any other 2-D parameter; vector: the
    rest. Works for any model, also with adapters and parametrizations inside.
    """
    roles: dict[str, Role] = {}
    seen: set[Tensor] = set()

    def visit(module: nn.Module, prefix: str, role: Role) -> None:
        role = "embedding" if isinstance(module, nn.Embedding) else role
        for name, p in module.named_parameters(recurse=False):
            if p not in seen:
                seen.add(p)
                roles[prefix + name] = role if p.ndim == 2 else "vector"
        for name, child in module.named_children():
            visit(child, f"{prefix}{name}.", "head" if child is getattr(model, "head", None) else role)

    visit(model, "", "matrix")
    return roles


class MuonAdamW(Muon):
    """Muon for the groups with `muon: True`, AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) for the others.

    A group has lr and weight_decay, and momentum (Muon) or betas and eps (AdamW).
    """

    def __init__(self, groups: Iterable[dict[str, Any]], betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8):
        self._adamw_defaults = {"betas": betas, "eps": eps, "fused": True}
        super().__init__(groups)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        param_group.setdefault("muon", False)
        if not param_group["muon"]:
            param_group |= {**self._adamw_defaults, **param_group}
        super().add_param_group(param_group)

    def initial_state(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        if group["muon"]:
            return super().initial_state(p, group)
        # The fused kernel wants the count beside the parameter, in float32.
        count = torch.zeros((), dtype=torch.float32, device=p.device)
        return {"step": count, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}

    def update(self, group: dict[str, Any]) -> None:
        if group["muon"]:
            return super().update(group)
        params = [p for p in group["params"] if p.grad is not None]
        grads = [p.grad for p in params if p.grad is not None]
        means, squares, counts = ([self.state[p][key] for p in params] for key in ("exp_avg", "exp_avg_sq", "step"))
        beta1, beta2 = group["betas"]
        adamw(
            params, grads, means, squares, [], counts, fused=True, amsgrad=False, beta1=beta1, beta2=beta2,
            lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
        )  # fmt: skip
        return None


def build_optimizer(model: nn.Module, train: TrainConfig) -> MuonAdamW:
    """The optimizer of a resolved TrainConfig for the parameters of `model` that train."""
    muon, decay = train.optimizer == "muon", train.weight_decay
    roles = parameter_roles(model)
    of: dict[Role, list[Tensor]] = {"matrix": [], "embedding": [], "head": [], "vector": []}
    for name, p in model.named_parameters():
        if p.requires_grad:
            of[roles[name]].append(p)
    groups: list[dict[str, Any]] = []
    if muon:
        # A tied embedding is the head as well and starts as small as one.
        tied = "head" not in roles.values()
        faster = train.init == "zero_output" and not tied
        groups.append({"params": of["matrix"], "lr": train.matrix_lr, "weight_decay": decay, "muon": True})
        embedding_lr = train.lr * EMBEDDING_RATE if faster else train.lr
        groups.append({"params": of["embedding"], "lr": embedding_lr, "weight_decay": 0.0})
        groups.append({"params": of["head"], "lr": train.lr, "weight_decay": 0.0})
    else:
        params = [*of["matrix"], *of["embedding"], *of["head"]]
        groups.append({"params": params, "lr": train.lr, "weight_decay": decay})
    groups.append({"params": of["vector"], "lr": train.lr, "weight_decay": 0.0})
    groups = [{**group, "initial_lr": group["lr"]} for group in groups if group["params"]]
    return MuonAdamW(groups, betas=(train.beta1, train.beta2), eps=1e-10 if muon else 1e-8)
