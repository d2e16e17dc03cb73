"""The memory-saving feed-forward is its plain twin, in value and every gradient, and keeps what it says."""

import pytest
import torch

from kiem.model.ops.feed_forward import gelu_linear, gelu_linear_plain, swiglu_linear, swiglu_linear_plain

N, F, D = (3, 7), 40, 24


def inputs(kind, bias, dtype):
    generator = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()  # noqa: E731
    hidden = [make(*N, F)] if kind.startswith("gelu") else [make(*N, F), make(*N, F)]
    return [*hidden, make(D, F), make(D) if bias else None]


def run(function, args):
    out = function(*args)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return [out, *torch.autograd.grad((out * weights).sum(), [a for a in args if a is not None])]


@pytest.mark.parametrize("kind", ["gelu tanh", "gelu none", "swiglu"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equals_its_twin(kind, bias, dtype):
    args = inputs(kind, bias, dtype)
    if kind == "swiglu":
        fast, plain = run(swiglu_linear, args), run(swiglu_linear_plain, args)
    else:
        approximate = kind.split()[1]
        fast = run(lambda *a: gelu_linear(*a, approximate), args)
        plain = run(lambda *a: gelu_linear_plain(*a, approximate), args)
    for a, b in zip(fast, plain, strict=True):
        # The same products in another association: two roundings a factor, sums of at most F = 40 terms (sqrt 40 < 7).
        assert (a - b).norm() <= 14 * torch.finfo(dtype).eps * b.norm()


@pytest.mark.parametrize("kind", ["gelu tanh", "gelu none", "swiglu"])
def test_gradcheck(kind):
    args = inputs(kind, True, torch.float64)
    function = swiglu_linear if kind == "swiglu" else (lambda *a: gelu_linear(*a, kind.split()[1]))
    assert torch.autograd.gradcheck(function, args)


def test_keeps_two_tensors_and_not_four():
    kept = []
    args = inputs("swiglu", False, torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        swiglu_linear(*args)
    assert sorted(kept) == sorted([(*N, F), (*N, F), (D, F)])
