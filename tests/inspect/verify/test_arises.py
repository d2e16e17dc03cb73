"""Of a whole gradient that is wrong though each operation is right it is said between which lines that arises."""

from pathlib import Path

import torch
from torch import nn

import kiem


class Tanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        y = torch.tanh(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return g * (1 - y.detach() * y)  # between


def penalty(activation, *, beside=False):
    enter, leave = nn.Linear(4, 6), nn.Linear(6, 1)
    x = torch.randn(5, 4, requires_grad=True)
    hidden = activation(enter(x))
    (g,) = torch.autograd.grad(hidden.sum(), x, create_graph=True)
    return g.square().sum() + (leave(hidden).sum() if beside else 0)


def line_of(mark):
    lines = Path(__file__).read_text().splitlines()
    return next(number for number, line in enumerate(lines, 1) if line.endswith(f"# {mark}"))


def test_the_line_at_which_a_second_derivative_is_cut_is_named():
    for beside in (False, True):
        torch.manual_seed(0)
        with kiem.record(verify=True) as trace:
            penalty(Tanh.apply, beside=beside).backward()
        found = trace.verify()
        assert found.ok is False and not found.wrong
        (note,) = (note for note in found.result.notes if "the first gradient that differs" in note)
        assert "of the result of Tanh at" in note and f"test_arises.py:{line_of('between')}" in note
        assert note.split(": ")[-1] in " ".join(str(found).split())


def test_nothing_is_said_of_what_is_right_or_of_an_operation_that_is_wrong():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, g):
            return g

    for activation, right in ((torch.tanh, True), (Double.apply, False)):
        torch.manual_seed(0)
        with kiem.record(verify=True) as trace:
            activation(torch.randn(3, requires_grad=True) * 1.5).exp().sum().backward()
        found = trace.verify()
        assert found.ok is right and not [note for note in found.result.notes if "that differs" in note]
