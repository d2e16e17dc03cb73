"""Right gradients in unusual forms: random, in place, recomputed, with several outputs of which one is unused."""

import torch
from torch import nn
from torch.nn import functional as F


class Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, p):
        scale = torch.empty_like(x).bernoulli_(1 - p).div_(1 - p)
        ctx.save_for_backward(scale)
        return x * scale

    @staticmethod
    def backward(ctx, grad):  # defined
        (scale,) = ctx.saved_tensors
        return grad * scale, None


class LeakyReLUInplace(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, slope):
        ctx.mark_dirty(x)
        ctx.slope = slope
        F.leaky_relu_(x, slope)
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx, grad):  # defined
        (y,) = ctx.saved_tensors
        return torch.where(y > 0, grad, ctx.slope * grad), None


class Recompute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, p):
        ctx.state, ctx.p = torch.get_rng_state(), p
        ctx.save_for_backward(x, weight)
        return F.dropout(torch.tanh(x @ weight), p)

    @staticmethod
    def backward(ctx, grad):  # defined
        leaves = [t.detach().requires_grad_() for t in ctx.saved_tensors]
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            torch.set_rng_state(ctx.state)
            out = F.dropout(torch.tanh(leaves[0] @ leaves[1]), ctx.p)
        return *torch.autograd.grad(out, leaves, grad), None


class MeanAndRMS(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x.mean(-1), x.square().mean(-1).sqrt(), x.amax(-1)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(inputs[0], output[1])

    @staticmethod
    def backward(ctx, grad_mean, grad_rms, grad_max):  # defined
        x, rms = ctx.saved_tensors
        assert grad_max is None
        count = x.shape[-1]
        return (grad_mean / count)[..., None] + x * (grad_rms / rms / count)[..., None]


class RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        wide = x.float() if x.dtype == torch.bfloat16 else x
        rrms = torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
        ctx.save_for_backward(x, weight, rrms)
        return (wide * rrms).to(x.dtype) * weight

    @staticmethod
    def backward(ctx, grad):  # defined
        x, weight, rrms = ctx.saved_tensors
        normed = x.to(rrms.dtype) * rrms
        g = grad.to(rrms.dtype) * weight
        grad_x = rrms * (g - normed * (g * normed).mean(-1, keepdim=True))
        return grad_x.to(x.dtype), (grad * normed).flatten(0, -2).sum(0).to(weight.dtype)


@torch.library.custom_op("zoo::cube", mutates_args=())
def cube(x: torch.Tensor) -> torch.Tensor:
    return x**3


cube.register_autograd(
    lambda ctx, grad: 3 * ctx.saved_tensors[0] ** 2 * grad,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]),
)

torch.manual_seed(0)
enter, leave = nn.Linear(8, 16), nn.Linear(16, 4)
weight, gain = nn.Parameter(torch.randn(16, 16) / 4), nn.Parameter(torch.ones(16))
gain_low = nn.Parameter(torch.ones(16, dtype=torch.bfloat16))
x = torch.randn(6, 5, 8)
h = LeakyReLUInplace.apply(enter(x), 0.2)
h = Dropout.apply(h, 0.25)
h = h + Recompute.apply(h, weight, 0.1)
mean, rms, _ = MeanAndRMS.apply(h.transpose(0, 1))
h = RMSNorm.apply(h.transpose(0, 1), gain)
h = h + cube(0.3 * h)
low = RMSNorm.apply(h.bfloat16(), gain_low)
loss = leave(h).square().mean() + mean.mean() + (rms - 1).square().mean() + low.float().sigmoid().mean()
loss.backward()
print(loss.item())
