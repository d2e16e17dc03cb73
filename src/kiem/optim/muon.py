"""Muon: momentum, made orthogonal, as the update of a matrix.

Keller Jordan et al. 2024 (kellerjordan.github.io/posts/muon); coefficients of the polynomial iteration after
Amsel et al. 2025, "The Polar Express", arXiv:2505.16932.

Shapes: M matrices of one shape, R rows (the smaller side), C columns.
"""

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor

# Odd polynomials a x + b x^3 + c x^5, one an iteration, that drive singular values in [1e-3, 1] to 1 (Polar Express,
# degree 5, with its safety factor; the last is repeated if more are asked for).
COEFFICIENTS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def orthogonalize(g_MRC: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The nearest matrices with orthonormal rows (or columns, if there are fewer): U V^T of the SVD U S V^T, about.

    Singular values come out between 0.7 and 1.3 wherever they were above a thousandth of the Frobenius norm.
    """
    x_MRC = g_MRC.to(dtype)
    wide = x_MRC.shape[-2] <= x_MRC.shape[-1]
    if not wide:
        x_MRC = x_MRC.mT
    x_MRC = x_MRC / (x_MRC.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-7)
    for a, b, c in COEFFICIENTS:
        s_MRR = x_MRC @ x_MRC.mT
        poly_MRR = torch.baddbmm(s_MRR, s_MRR, s_MRR, beta=b, alpha=c)
        x_MRC = torch.baddbmm(x_MRC, poly_MRR, x_MRC, beta=a)
    return x_MRC if wide else x_MRC.mT


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay, matrices of one shape handled together.

    params: matrices (2-D), or groups of them. The update of an (out, in) matrix is scaled by sqrt(max(1, out / in)), so
    that one rate serves every shape. Parameters without a gradient stay as they are.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 0.02,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
    ):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's, and the state of the parameters is made at once: a checkpoint before the first update has it."""
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            self.state[p].update(self.initial_state(p, self.param_groups[-1]))

    def initial_state(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """The state of a parameter before its first update; its keys are those of every later state."""
        if p.ndim != 2:
            raise ValueError(f"Muon updates matrices, and a parameter has the shape {tuple(p.shape)}")
        return {"momentum": torch.zeros_like(p)}

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update at each group's `lr` from the parameters' .grad. `closure` computes the loss anew."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self.update(group)
        return loss

    def update(self, group: dict[str, Any]) -> None:
        """Update the parameters of one group."""
        shapes: dict[torch.Size, list[Tensor]] = {}
        for p in group["params"]:
            if p.grad is not None:
                shapes.setdefault(p.shape, []).append(p)
        lr, momentum = group["lr"], group["momentum"]
        for shape, params in shapes.items():
            grads = [p.grad for p in params if p.grad is not None]
            moments = [self.state[p]["momentum"] for p in params]
            torch._foreach_lerp_(moments, grads, 1.0 - momentum)
            ahead = torch._foreach_lerp(grads, moments, momentum)
            if group["weight_decay"]:
                torch._foreach_mul_(params, 1.0 - lr * group["weight_decay"])
            rate = -lr * max(1.0, shape[0] / shape[1]) ** 0.5
            for p, update in zip(params, orthogonalize(torch.stack(ahead)), strict=True):
                p.add_(update, alpha=rate)
