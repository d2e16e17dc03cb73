"""Wrong gradients that hide behind what a check must allow: steep functions, jumps, coarse types, kernels of which
nothing is seen. None is called right. And what only looks wrong there is not called wrong."""

import pytest
import torch
from tests.inspect.verify.test_corners import verified

from kiem.inspect.verify.judge import Evidence, InputVerdict
from kiem.inspect.verify.jumps import NEARER, forgive_jumps
from kiem.inspect.verify.numeric import Derivative

STEEP = {
    "x⁴": lambda x: x**4, "square": torch.square, "exp": torch.exp, "sin 10x": lambda x: (10 * x).sin(),
    "1/x": lambda x: 1 / (x.abs() + 0.3),
}  # fmt: skip


def spoilt(forward, factor):
    """A Function with `factor` times the derivative, computed in float64 and rounded once."""

    class Spoilt(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return forward(x)

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            with torch.enable_grad():
                wide = x.detach().double().requires_grad_()
                (grad,) = torch.autograd.grad(forward(wide), wide, g.double())
            return (grad * factor).to(g.dtype)

    return Spoilt.apply


def verdict_of(call, dtype=torch.bfloat16):
    def program():
        x = torch.randn(16, 24).to(dtype).requires_grad_()
        y = call(x)
        y.backward(torch.randn(y.shape).to(y.dtype))

    recorder, result = verified(program)
    kinds = [v.verdict for v in result.verdicts if recorder.graph.op(v.op).kind == "function"]
    assert len(kinds) == 1
    return kinds[0]


@pytest.mark.parametrize("name", STEEP)
def test_a_steep_function_is_no_excuse_for_a_wrong_factor(name):
    assert verdict_of(spoilt(STEEP[name], 1.0)) in ("ok", "coarse")
    for factor in (1.2, 1.3, 1.5, 2.0, -1.0):
        allowed = ("wrong", "coarse") if name == "sin 10x" else ("wrong",)
        assert verdict_of(spoilt(STEEP[name], factor)) in allowed, factor


@pytest.mark.parametrize(("dtype", "factor"), [(torch.bfloat16, 1.5), (torch.bfloat16, -1.0), (torch.float32, 1.05)])
def test_the_registered_derivative_of_an_operation_is_no_witness_for_itself(dtype, factor):
    with torch.library._scoped_library("kiem_adversary", "FRAGMENT") as library:
        library.define("square(Tensor x) -> Tensor")
        library.impl("square", lambda x: x.square(), "CPU")
        torch.library.register_autograd(
            "kiem_adversary::square", lambda ctx, g: factor * 2 * ctx.x * g,
            setup_context=lambda ctx, inputs, output: setattr(ctx, "x", inputs[0]), lib=library,
        )  # fmt: skip
        assert verdict_of(torch.ops.kiem_adversary.square, dtype) in ("wrong", "coarse")


def test_a_kernel_that_computes_in_a_narrower_type_is_not_called_wrong():
    with torch.library._scoped_library("kiem_narrow", "FRAGMENT") as library:
        library.define("half(Tensor x) -> Tensor")
        library.impl("half", lambda x: x.half(), "CPU")
        torch.library.register_autograd("kiem_narrow::half", lambda ctx, g: g.float(), lib=library)
        assert verdict_of(torch.ops.kiem_narrow.half, torch.float32) in ("ok", "coarse")


def test_a_rounding_inside_a_function_is_not_called_wrong():
    class Rounded(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * (1000 * x).round()

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            return (1000 * x).round() * g

    assert verdict_of(Rounded.apply, torch.float32) == "ok"


def test_memory_in_another_order_is_no_noise():
    """What is changed in place was once moved by a million times itself, so that any gradient of it was right."""

    def program():
        x = torch.randn(2, 8, 9, requires_grad=True).mT
        y = torch.empty_like(x)
        for t in range(9):
            y[:, t] = x[:, t].tanh()
        (y * torch.randn(2, 9, 8)).sum().backward()

    _, result = verified(program)
    assert result.ok and max(v.sharpness for one in result.verdicts for v in one.inputs) < 1e-3


@pytest.mark.parametrize(
    ("elements", "jumps", "verdict"), [(200, True, "kink"), (200, False, "wrong"), (4, True, "coarse")]
)
def test_only_what_jumps_is_forgiven(elements, jumps, verdict):
    """What jumps by more than a fifth of the whole can hide as large an error."""
    reference = torch.ones(elements, dtype=torch.float64)
    got = reference.clone()
    got[elements // 2] = 1.5

    def near():
        there = torch.randn(elements, dtype=torch.float64)
        if jumps:
            only = torch.arange(elements) == elements // 2
            return tuple(torch.where((far * there > 0) | ~only, 1.0, 1.5) for far in (1.0, NEARER))
        return 1 + 0.3 * there, 1 + 0.3 * there * NEARER  # steep, and straight

    torch.manual_seed(0)
    result = InputVerdict("x", 0, "wrong", torch.bfloat16, bound=8.0)
    number = Derivative(0.0, 0.0, 0.0, 0.0)
    unit = 2.0**-10
    given = Evidence(got, reference, reference.clone(), unit, reference, number, lambda d: number, lambda: (got, got))
    forgive_jumps(result, given, near)
    assert result.verdict == verdict
