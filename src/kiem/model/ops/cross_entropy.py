"""Cross-entropy of a linear head, without ever holding the full logits.

Shapes: N positions, D embedding, V vocabulary.

The logits of N positions are N*V numbers: for GPT-2 at 2x1024 tokens 412 MB, held up to four times (logits,
log-softmax, and a gradient of each). Here rows are taken a chunk at a time, and the gradient of a chunk is made while
its logits are at hand: softmax minus one-hot, times the head, forward and backward in three matrix products, none
repeated.
(The idea: Wijmans et al. 2024, arXiv:2411.09009, and Hsu et al. 2024, arXiv:2410.10989.)
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORE = -100
CHUNK_ELEMENTS = 1 << 24  # of logits in one chunk (64 MiB in float32): measured flat from 2^22 to 2^25 on CPU


def linear_cross_entropy_plain(x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    """The reference: sum over positions with a target of -log softmax(x @ weight.T)[target], in nats, in float32."""
    logits_NV = at_least_float32(F.linear(x_ND, weight_VD.to(x_ND.dtype)))
    return F.cross_entropy(logits_NV, targets_N, ignore_index=IGNORE, reduction="sum")


def cross_entropy_of(head: Callable[[Tensor], Tensor], x_ND: Tensor, targets_N: Tensor, vocab_size: int) -> Tensor:
    """-log softmax(head(x))[target] of each position in nats, float32 (N,); 0 where the target is -100.

    For a head of any kind, which is called as a layer is called. If the logits would be large, the positions go through
    it a chunk at a time, and for a gradient each chunk is computed again in backward.
    """
    rows = max(1, CHUNK_ELEMENTS // vocab_size)
    if len(x_ND) <= rows:
        return _nats(head, x_ND, targets_N)
    parts = list(zip(x_ND.split(rows), targets_N.split(rows), strict=True))
    if torch.is_grad_enabled():
        return torch.cat([checkpoint(_nats, head, *part, use_reentrant=False) for part in parts])
    return torch.cat([_nats(head, *part) for part in parts])


def _nats(head: Callable[[Tensor], Tensor], x_ND: Tensor, targets_N: Tensor) -> Tensor:
    return F.cross_entropy(at_least_float32(head(x_ND)), targets_N, ignore_index=IGNORE, reduction="none")


def at_least_float32(x: Tensor) -> Tensor:
    """A narrower float type becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


def linear_cross_entropy(x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    """Sum of the cross-entropy in nats over positions whose target is not -100, as a float32 scalar.

    x_ND: features, any float type; weight_VD: head; targets_N: int64. Equal to linear_cross_entropy_plain up to
    the order of summation. Differentiable once in x_ND and weight_VD.
    """
    if not torch.is_grad_enabled():  # autograd does not tell a function so: it would make gradients that nobody reads
        x_ND, weight_VD = x_ND.detach(), weight_VD.detach()
    return _LinearCrossEntropy.apply(x_ND, weight_VD, targets_N)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
        dtype, vocab_size = x_ND.dtype, weight_VD.shape[0]
        w_VD = weight_VD.to(dtype)
        need_x, need_w = ctx.needs_input_grad[:2]
        grad_x_ND = torch.empty_like(x_ND) if need_x else None
        grad_w_VD = torch.zeros_like(weight_VD) if need_w else None
        loss = torch.zeros((), dtype=torch.float32, device=x_ND.device)
        rows = max(1, CHUNK_ELEMENTS // vocab_size)
        for start in range(0, x_ND.shape[0], rows):
            part = slice(start, start + rows)
            x_nD, targets_n1 = x_ND[part], targets_N[part, None]
            logits_nV = F.linear(x_nD, w_VD).float()
            top_n1 = logits_nV.amax(1, keepdim=True)
            valid_n1 = targets_n1 != IGNORE
            index_n1 = targets_n1.clamp_min(0)
            target_n1 = logits_nV.gather(1, index_n1)
            exp_nV = logits_nV.sub_(top_n1).exp_()
            sum_n1 = exp_nV.sum(1, keepdim=True)
            loss += ((sum_n1.log() + top_n1 - target_n1) * valid_n1).sum()
            if grad_x_ND is None and grad_w_VD is None:
                del logits_nV, exp_nV
                continue
            grad_nV = exp_nV.mul_(valid_n1 / sum_n1)
            grad_nV.scatter_add_(1, index_n1, -valid_n1.float())
            grad_nV = grad_nV.to(dtype)
            if grad_x_ND is not None:
                torch.mm(grad_nV, w_VD, out=grad_x_ND[part])
            if grad_w_VD is not None:
                if grad_w_VD.dtype == dtype:
                    grad_w_VD.addmm_(grad_nV.T, x_nD)
                else:
                    grad_w_VD.add_(grad_nV.T @ x_nD)
            del logits_nV, exp_nV, grad_nV  # or the next chunk would be made beside this one
        ctx.save_for_backward(grad_x_ND, grad_w_VD)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss: Tensor):
        # The saved gradients are ours alone, so the outer factor is applied in place: no second copy of (V, D).
        grad_x_ND, grad_w_VD = (None if g is None else g.mul_(grad_loss) for g in ctx.saved_tensors)
        return grad_x_ND, grad_w_VD, None
