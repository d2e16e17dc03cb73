"""A custom Function is checked however a program comes to call it; where its forward ran out of sight, nothing is
called right."""

import functools
import threading
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import kiem


class Square(torch.autograd.Function):
    """Its backward is three quarters of what is due."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, g):
        return 1.5 * g * ctx.saved_tensors[0]


class Steeper(Square):
    @staticmethod
    def backward(ctx, g):
        return 1.9 * g * ctx.saved_tensors[0]


class Cube(torch.autograd.Function):
    """Its own backward is right and calls the wrong Function, which counts once it is differentiated again."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        return 3 * g * Square.apply(ctx.saved_tensors[0])


class BySquare(torch.autograd.Function):
    """Its backward differentiates a call of the wrong Function."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, g):
        with torch.enable_grad():
            x = ctx.saved_tensors[0].detach().requires_grad_()
            return torch.autograd.grad(Square.apply(x), x, g)[0]


class Holder:
    square = staticmethod(Square.apply)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.activation = Square.apply

    def forward(self, x):
        return self.activation(x)


# All of this is taken before anything is recorded.
HOLDER, PARTIAL, TABLE, LAYER = Holder(), functools.partial(Square.apply), {"square": Square.apply}, Layer()
COMPILED = torch.compile(lambda x: Square.apply(x * 2).sin(), backend="aot_eager")


def by_default(x, activation=Square.apply):
    return activation(x)


def twice(x):
    (g,) = torch.autograd.grad(Cube.apply(x).sum(), x, create_graph=True)
    return g


WAYS = {
    "an attribute": HOLDER.square, "functools.partial": PARTIAL, "a dictionary": TABLE["square"], "a module": LAYER,
    "a default argument": by_default, "a subclass": Steeper.apply, "inside a backward": BySquare.apply,
    "inside a backward, differentiated again": twice, "compiled": lambda x: COMPILED(x),
    "a checkpoint": lambda x: checkpoint(PARTIAL, x, use_reentrant=False),
    "a reentrant checkpoint": lambda x: checkpoint(PARTIAL, x, use_reentrant=True),
}  # fmt: skip


@pytest.mark.parametrize("name", WAYS)
def test_a_wrong_function_is_found_whichever_way_it_is_called(name):
    for _ in range(2):  # the second time what torch.compile made is there
        w = torch.randn(3, requires_grad=True)
        with kiem.record(verify=True) as trace, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.compile's own
            WAYS[name](w * 2).sum().backward()
        assert trace.verify().ok is False


def out_of_sight(before, name):
    w = torch.randn(3, requires_grad=True)
    made = []
    if name == "before":
        return before
    thread = threading.Thread(target=lambda: made.append(Square.apply(w * 2)))
    thread.start()
    thread.join()
    return made[0]


@pytest.mark.parametrize("name", ["before", "in a thread"])
def test_a_forward_that_was_not_seen_is_never_called_right(name):
    before = Square.apply(torch.randn(3, requires_grad=True) * 2)
    with kiem.record(verify=True) as trace:
        (out_of_sight(before, name) * 3).sum().backward()
    assert trace.verify().ok is None


def test_a_function_of_a_module_is_a_target(tmp_path, monkeypatch, capsys):
    """`kiem verify module:function` imports before it records."""
    from kiem.cli.main import main

    (tmp_path / "taken.py").write_text(
        "import torch\n"
        "class Square(torch.autograd.Function):\n"
        "    @staticmethod\n"
        "    def forward(ctx, x):\n"
        "        ctx.save_for_backward(x)\n"
        "        return x ** 2\n"
        "    @staticmethod\n"
        "    def backward(ctx, g):\n"
        "        return g * ctx.saved_tensors[0]\n"
        "square = Square.apply\n"
        "w = torch.randn(3, requires_grad=True)\n"
        "def loss():\n"
        "    return square(w * 2).sum()\n"
    )
    monkeypatch.chdir(tmp_path)
    assert main(["verify", "taken:loss"]) == 1
    assert "Square" in capsys.readouterr().out
