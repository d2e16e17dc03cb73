"""Loops: what repeats is kept once and counted, whatever its period; what never repeats stays bounded."""

import pytest
import torch
from torch import nn

from kiem.inspect.record import passes as fold
from kiem.inspect.record.recorder import WITHOUT_GRADIENT, Recorder
from kiem.inspect.verify import verifier as verify
from kiem.inspect.verify.verifier import Verifier


def recorded(program, observer=None):
    with Recorder(observer=observer, keep=None if observer else 0) as recorder:
        program()
    return recorder


def test_accumulated_gradients_are_one_row_of_steps():
    net = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)

    def program():
        for _ in range(10):
            for _ in range(4):
                net(torch.randn(2, 3)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    graph = recorded(program).graph
    # The four backward calls of one update; the first of each comes after the optimizer's operations.
    assert len(graph.backwards) <= 4 and max(r.times for r in graph.repeats) == 9


def test_two_networks_in_turn():
    one, other = nn.Linear(3, 3), nn.Linear(3, 1)

    def program():
        for _ in range(20):
            other(one(torch.randn(2, 3)).detach()).sum().backward()
            other(one(torch.randn(2, 3))).square().sum().backward()

    graph = recorded(program).graph
    assert [r.times for r in graph.repeats] == [19] and len(graph.backwards) == 4  # the first sees new parameters


def test_a_loop_in_a_loop():
    w = torch.ones(3, requires_grad=True)

    def program():
        for i in range(30):
            loss = (w * 2).sum()
            loss.backward()
            if i % 5 == 4:
                loss.item()

    graph = recorded(program).graph
    assert len(graph.ops) < 20 and len(graph.repeats) <= 4
    assert sorted(r.times for r in graph.repeats)[-1] >= 4


def test_the_lengths_of_what_is_prepared_without_gradient_may_differ():
    w = torch.ones(3, requires_grad=True)

    def program():
        for i in range(12):
            data = torch.arange(5 + i).float()
            (w * data.mean()).sum().backward()

    assert [r.times for r in recorded(program).graph.repeats] == [11]  # the first sees a new parameter


def test_steps_through_which_a_gradient_flows_are_not_folded():
    w = torch.ones(3, requires_grad=True)

    def program():
        fast = w
        for _ in range(6):
            (g,) = torch.autograd.grad(fast.square().sum(), fast, create_graph=True)
            fast = fast - 0.1 * g
        fast.sum().backward()

    graph = recorded(program).graph
    assert not graph.repeats and len(graph.backwards) == 7


def test_steps_that_are_all_different_are_bounded(monkeypatch):
    monkeypatch.setattr(fold, "MANY_OPS", 40)
    w = torch.ones(64, requires_grad=True)

    def program():
        for i in range(1, 61):
            (w[:i] * 2).sum().backward()

    recorder = recorded(program)
    assert len(recorder.graph.ops) <= 45 and 8 <= len(recorder.graph.backwards) <= 14
    (note,) = recorder.graph.notes
    assert note.startswith(f"{60 - len(recorder.graph.backwards)} more steps up to ")
    assert w.grad[0] == 120  # the program is as it was


def test_a_step_sees_what_folded_ones_have_changed():
    """With two backward calls per update the row that repeats is (second, first): the weights that the next second one
    reads were changed in a step that is folded away."""
    net = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(net.parameters(), 0.5)
    verifier = Verifier()

    def program():
        for _ in range(6):
            for _ in range(2):
                net(torch.randn(2, 3)).square().sum().backward()
            optimizer.step()

    recorder = recorded(program, verifier)
    assert recorder.graph.repeats
    assert [v.text for v in verifier.ended().verdicts if v.verdict == "unchecked"] == []


def test_a_wrong_step_is_not_dropped(monkeypatch):
    monkeypatch.setattr(fold, "MANY_OPS", 0)

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            return g * x if x.numel() == 16 else 2 * g * x

    w = torch.rand(64, requires_grad=True)
    verifier = Verifier()

    def program():
        for i in range(1, 33):
            Square.apply(w[:i]).sum().backward()

    recorder = recorded(program, verifier)
    (wrong,) = verifier.ended().wrong
    assert recorder.graph.op(wrong.op).name == "Square" and wrong.inputs[0].shape == (16,)


def test_an_evaluation_is_kept_in_part():
    net = nn.Linear(3, 3)

    def program():
        with torch.no_grad():
            for _ in range(200):
                net(torch.ones(2, 3))
        net(torch.ones(2, 3)).sum().backward()

    recorder = recorded(program)
    assert len(recorder.graph.ops) < 5 * WITHOUT_GRADIENT + 20
    assert any("more operations without gradient" in note for note in recorder.graph.notes)


def test_memory_does_not_grow_with_the_length_of_a_loop():
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    sizes = []

    def program():
        for i in range(60):
            net(torch.randn(3, 8)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if i in (20, 59):
                table, graph = recorder.table, recorder.graph
                sizes.append(tuple(map(len, (table._places, table._storages, table._objects, graph.storages))))

    with Recorder(keep=0) as recorder:
        program()
    assert all(late <= early + 8 for early, late in zip(*sizes, strict=True))


@pytest.mark.parametrize("seconds", [0.0, 60.0])
def test_later_passes_are_verified_as_well(seconds, monkeypatch):
    """The first three, then the 4th, 8th, 16th, ...: an error that begins in the 20th is found in the 32nd; all while
    there is time."""
    monkeypatch.setattr(verify, "SECONDS", seconds)

    class Scaled(torch.autograd.Function):
        calls = 0

        @staticmethod
        def forward(ctx, x):
            Scaled.calls += 1
            return 2 * x

        @staticmethod
        def backward(ctx, g):
            return 2 * g if Scaled.calls < 20 else 3 * g

    w, verifier = torch.rand(4, requires_grad=True), Verifier()

    def program():
        for _ in range(40):
            Scaled.apply(w).sum().backward()

    recorder = recorded(program, verifier)
    result = verifier.ended()
    assert {recorder.graph.op(v.op).name for v in result.wrong} == {"Scaled"} and not result.ok
    assert any("were not" in note for note in result.notes) == (seconds == 0)
