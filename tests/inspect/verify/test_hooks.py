"""A hook that changes a gradient is said and not judged, wherever it hangs; what it changes is no excuse for anything
else."""

import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import kiem


def verification(program):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with kiem.record(verify=True) as trace:
            program()
    return trace.verify()


def kinds(verification):
    return sorted(v.verdict for _, v in verification.result.parameters)


def network(hang):
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    hang(net)
    net(torch.randn(5, 3)).square().sum().backward()


HOOKS = {
    "full backward": lambda net: net[1].register_full_backward_hook(lambda module, into, out: (into[0] / 2,)),
    "full backward pre": lambda net: net[1].register_full_backward_pre_hook(lambda module, out: (out[0] / 2,)),
    "backward, as it was once": lambda net: net[1].register_backward_hook(lambda module, into, out: (into[0] / 2,)),
}  # fmt: skip


@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_of_a_module(name):
    found = verification(lambda: network(HOOKS[name]))
    assert found.ok is True and kinds(found) == ["hook", "hook", "ok", "ok"]
    assert "hook" in {v.verdict for v in found.result.verdicts} and not found.wrong


def test_a_hook_of_the_container_reaches_all_that_is_in_it():
    found = verification(lambda: network(lambda net: net.register_full_backward_pre_hook(lambda m, out: (-out[0],))))
    assert found.ok is True and kinds(found) == ["hook"] * 4


@pytest.mark.parametrize("before", [False, True])
def test_a_hook_of_a_node(before):
    def program():
        w = torch.randn(3, requires_grad=True)
        node = (y := (w * 3).exp()).grad_fn
        if before:
            node.register_prehook(lambda out: (2 * out[0],))
        else:
            node.register_hook(lambda into, out: (2 * into[0],))
        y.sum().backward()

    found = verification(program)
    assert found.ok is True and kinds(found) == ["hook"]


@pytest.mark.parametrize("of", ["leaf", "between"])
def test_a_hook_on_what_autograd_grad_is_asked_for(of):
    def program():
        w = torch.randn(3, requires_grad=True)
        h = w * 3
        (w if of == "leaf" else h).register_hook(lambda g: 2 * g)
        torch.autograd.grad(h.sin().sum(), w if of == "leaf" else h)

    found = verification(program)
    assert found.ok is True and kinds(found) == ["hook"]


def test_a_mask_that_is_drawn_again_is_no_hook():
    """Run by itself the node gives something else again, and just as wrong."""

    def program():
        layer = nn.Linear(8, 8)
        drop = lambda x: torch.dropout(layer(x), 0.5, True)  # noqa: E731
        checkpoint(drop, torch.randn(4, 8), use_reentrant=False, preserve_rng_state=False).square().sum().backward()

    found = verification(program)
    assert found.ok is False and "hook" not in {v.verdict for v in found.result.verdicts}


def test_a_wrong_operation_with_a_hook_on_it_is_wrong():
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**2

        @staticmethod
        def backward(ctx, g):
            return g * ctx.saved_tensors[0]

    def program():
        w = torch.randn(3, requires_grad=True)
        y = Square.apply(w * 2)
        y.grad_fn.register_hook(lambda into, out: (3 * into[0],))
        y.sum().backward()

    assert verification(program).ok is False
