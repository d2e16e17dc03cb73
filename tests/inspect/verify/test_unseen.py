"""What went by unseen makes a program incomplete, never right; what autograd.grad gives is seen."""

import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import kiem


def seen(w):
    (w * 3).sum().backward()


def in_a_thread(w):
    seen(w)
    thread = threading.Thread(target=w.exp().sum().backward)
    thread.start()
    thread.join()


def by_torch_func(w):
    seen(w)
    torch.func.grad(lambda x: x.sin().sum())(torch.randn(3))


def by_torch_func_of_many(w):
    seen(w)
    torch.vmap(torch.func.grad(lambda x: x.sin().sum()))(torch.randn(2, 3))


def many_at_once(w):
    seen(w)
    torch.autograd.grad(w.sin(), w, torch.eye(3), is_grads_batched=True)


@pytest.mark.parametrize("program", [in_a_thread, by_torch_func, by_torch_func_of_many, many_at_once])
def test_a_program_of_which_a_gradient_was_not_seen_is_incomplete(program):
    w = torch.randn(3, requires_grad=True)
    with kiem.record(verify=True) as trace:
        program(w)
    found = trace.verify()
    assert found.ok is None and found.result.verdict == "incomplete" and found.result.gaps
    assert str(found).startswith("Incomplete: ") and "right" not in str(found).splitlines()[0]


def test_a_program_that_is_recorded_in_part_is_incomplete(monkeypatch):
    from kiem.inspect.record import recorder

    monkeypatch.setattr(recorder, "MAX_OPS", 4)
    w = torch.randn(3, requires_grad=True)
    with kiem.record(verify=True) as trace:
        seen(w)
        w.exp().sin().sum().backward()
    assert trace.verify().ok is None


class Double(torch.autograd.Function):
    """Its backward is half of what is due."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return g


class Tanh(torch.autograd.Function):
    """Its backward is right; differentiated again it is not."""

    @staticmethod
    def forward(ctx, x):
        y = torch.tanh(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return g * (1 - y.detach() * y)


def of_leaves(f):
    w, x = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
    torch.autograd.grad(f(w * x).sin().sum(), [w, x])


def of_something_between(f):
    w = torch.randn(3, requires_grad=True)
    h = w * 2
    torch.autograd.grad(f(h).sin().sum(), h)


def of_both(f):
    w = torch.randn(3, requires_grad=True)
    h = w * 2
    torch.autograd.grad(f(h).sin().sum() + w.exp().sum(), [w, h])


def of_the_last_layers(f):
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    hidden = net[:2](torch.randn(5, 3))
    torch.autograd.grad(f(net[2](hidden)).square().mean(), [hidden, net[2].weight])


@pytest.mark.parametrize(("program", "count"), [
    (of_leaves, 2), (of_something_between, 1), (of_both, 2), (of_the_last_layers, 2),
])  # fmt: skip
def test_what_autograd_grad_gives_is_checked_end_to_end(program, count):
    for f, right in ((torch.tanh, True), (Double.apply, False)):
        torch.manual_seed(0)
        with kiem.record(verify=True) as trace:
            program(f)
        found = trace.verify()
        assert found.ok is right and len(found.result.parameters) == count
        assert {v.verdict for _, v in found.result.parameters} == {"ok" if right else "wrong"}


def test_afterwards_what_autograd_grad_gave_is_checked_as_well():
    for f, right in ((torch.tanh, True), (Double.apply, False)):
        with kiem.record() as trace:
            of_both(f)
        found = trace.verify()
        assert found.ok is right and len(found.result.parameters) == 2


def test_a_second_derivative_by_autograd_grad_alone_is_checked():
    for f, right in ((torch.tanh, True), (Tanh.apply, False)):
        torch.manual_seed(0)
        with kiem.record(verify=True) as trace:
            x = torch.randn(3, requires_grad=True)
            (g,) = torch.autograd.grad(f(x * 1.5).sum(), x, create_graph=True)
            torch.autograd.grad(g.sum(), x)
        found = trace.verify()
        assert found.ok is right and [v.verdict for _, v in found.result.parameters] == [
            "ok",
            "ok" if right else "wrong",
        ]


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_parameters_inside_a_reentrant_checkpoint_are_checked_end_to_end():
    """Their gradients come from a backward call inside the other one."""
    torch.manual_seed(0)
    layer, x = nn.Linear(3, 3), torch.randn(4, 3, requires_grad=True)
    with kiem.record(verify=True) as trace:
        checkpoint(layer, x, use_reentrant=True).tanh().sum().backward()
    found = trace.verify()
    names = {trace.graph.title(v.value) for _, v in found.result.parameters}
    assert found.ok is True and {"layer.weight", "layer.bias"} <= names
