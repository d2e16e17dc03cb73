"""A function that torch.compile compiled is one operation, held against the numbers that it gave."""

import warnings

import pytest
import torch
from torch import nn

import kiem


def verification(program):
    torch.manual_seed(0)
    torch._dynamo.reset()
    with kiem.record(verify=True) as trace, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.compile's own
        program()
    return trace.verify()


def changed_input(backend):
    """Eager autograd refuses the backward after this; a compiled one does not notice."""
    table, weight = torch.randn(6, 4), torch.randn(4, 2, requires_grad=True)
    y = torch.compile(lambda table, weight: torch.sigmoid(table @ weight), backend=backend)(table, weight)
    table.mul_(-2.0)
    y.square().sum().backward()


def changed_input_of_a_module(backend):
    net, x = nn.Sequential(nn.Linear(3, 5), nn.Tanh()), torch.randn(2, 4, 3)
    y = torch.compile(net, backend=backend)(x)
    x.zero_()
    y.square().sum().backward()


def left_alone(backend):
    table, weight = torch.randn(6, 4), torch.randn(4, 2, requires_grad=True)
    y = torch.compile(lambda table, weight: torch.sigmoid(table @ weight), backend=backend)(table, weight)
    y.square().sum().backward()
    table.mul_(-2.0)


INDUCTOR = pytest.param("inductor", marks=pytest.mark.slow)  # compiles for half a minute on a cold machine


@pytest.mark.parametrize("backend", [INDUCTOR])  # aot_eager notices
@pytest.mark.parametrize("program", [changed_input, changed_input_of_a_module])
def test_a_change_in_place_that_a_compiled_backward_misses_is_wrong(program, backend):
    found = verification(lambda: program(backend))
    assert found.ok is False and [v.verdict for v in found.result.wrong] == ["wrong"]
    assert "CompiledFunction" in str(found).splitlines()[0]


@pytest.mark.parametrize("backend", ["aot_eager", INDUCTOR])
def test_a_compiled_function_whose_input_is_left_alone_is_not_called_wrong(backend):
    found = verification(lambda: left_alone(backend))
    assert found.ok is None and not found.wrong  # what is inside was not seen


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return torch.tanh(x @ w)

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        inner = g * (1 - torch.tanh(x @ w).square())
        return -inner @ w.mT, x.mT @ inner


def step(backend, dtype, factor):
    x, w = torch.randn(8, 6).to(dtype), torch.randn(6, 4).to(dtype).requires_grad_()
    x.requires_grad_()
    function = Reversed.apply if factor < 0 else lambda x, w: torch.tanh(x @ w)
    torch.compile(lambda x, w: function(x, w).square().mean(), backend=backend)(x, w).backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_compiled_step_with_the_wrong_sign_is_never_right(dtype):
    found = verification(lambda: step("aot_eager", dtype, -1.0))
    assert found.ok is False
    found = verification(lambda: step("aot_eager", dtype, 1.0))
    assert found.ok is not False
