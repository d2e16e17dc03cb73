"""Muon: momentum, made orthogonal, as the update of a matrix.

Keller Jordan et al. 2024 (kellerjordan.github.io/posts/muon); coefficients of the polynomial iteration after
Amsel et al. 2025, "The Polar Express", arXiv:2505.16932.

Shapes: M matrices of one shape, R rows (the smaller side), C columns.
"""

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


def orthogonalise(g_MRC: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
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


class Muon:
    """Muon with Nesterov momentum and decoupled weight decay, matrices of one shape handled together.

    The update of an (out, in) matrix is scaled by sqrt(max(1, out / in)), so that one rate serves every shape.
    """

    def __init__(self, parameters: dict[str, Tensor], lr: float, weight_decay: float, momentum: float = 0.95):
        self.lr, self.weight_decay, self.momentum = lr, weight_decay, momentum
        self.parameters = parameters
        self.moments = {name: torch.zeros_like(p) for name, p in parameters.items()}

    @torch.no_grad()
    def step(self, scale: float) -> None:
        """One update with learning rate lr * scale from the parameters' .grad. Parameters without a gradient stay."""
        shapes: dict[torch.Size, list[str]] = {}
        for name, p in self.parameters.items():
            if p.grad is not None:
                shapes.setdefault(p.shape, []).append(name)
        for shape, names in shapes.items():
            params = [self.parameters[n] for n in names]
            grads = [p.grad for p in params]
            moments = [self.moments[n] for n in names]
            torch._foreach_lerp_(moments, grads, 1.0 - self.momentum)
            ahead = torch._foreach_lerp(grads, moments, self.momentum)
            lr = self.lr * scale
            if self.weight_decay:
                torch._foreach_mul_(params, 1.0 - lr * self.weight_decay)
            rate = -lr * max(1.0, shape[0] / shape[1]) ** 0.5
            for p, update in zip(params, orthogonalise(torch.stack(ahead)), strict=True):
                p.add_(update, alpha=rate)
