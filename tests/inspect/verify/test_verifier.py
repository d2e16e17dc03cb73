"""Programs with a wrong derivative are found at the right line; right programs give no alarm; nothing is said without
a check."""

import contextlib
import io
import math
import runpy
import warnings
from pathlib import Path

import pytest
import torch

from kiem.inspect.record.recorder import Recorder
from kiem.inspect.verify import verifier as verify
from kiem.inspect.verify.verifier import Verifier, verify_recorded

PROGRAMS = Path(__file__).parents[1] / "programs"
WRONG = sorted((PROGRAMS / "wrong").glob("*.py"))
RIGHT = sorted((PROGRAMS / "right").glob("*.py"))


def verified(program, end_to_end=True):
    """The recorder and the result of a program, a file or a function."""
    verifier = Verifier(end_to_end)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        with Recorder(observer=verifier, keep=None) as recorder:
            runpy.run_path(str(program), run_name="__main__") if isinstance(program, Path) else program()
    return recorder, verifier.ended()


@pytest.mark.parametrize("path", WRONG, ids=lambda p: p.stem)
def test_a_wrong_derivative_is_found_at_its_line(path):
    marked = {i for i, line in enumerate(path.read_text().splitlines(), 1) if "# wrong:" in line}
    recorder, result = verified(path)
    found = {recorder.graph.op(v.op).source for v in result.wrong}
    assert {s.line for s in found} == marked
    assert {Path(s.file).name for s in found} == {path.name}
    assert not result.ok
    defined = [i for i, line in enumerate(path.read_text().splitlines(), 1) if "# defined" in line]
    op = recorder.graph.op(result.wrong[0].op)
    if op.backward_source is not None and defined:
        assert op.backward_source.line in defined


@pytest.mark.parametrize("path", RIGHT, ids=lambda p: p.stem)
def test_a_right_program_gives_no_alarm(path):
    recorder, result = verified(path)
    assert [recorder.graph.op(v.op).source for v in result.wrong] == []
    assert [p.argument for p in result.wrong_parameters] == []
    assert [v.text for v in result.verdicts if v.verdict == "unchecked"] == []
    assert result.verdict == "right"


def test_a_parameter_is_verified_end_to_end_through_its_whole_way():
    def program():
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        net(torch.randn(5, 4)).pow(2).mean().backward()

    recorder, result = verified(program)
    assert sorted(recorder.graph.title(p.value) for _, p in result.parameters) == [
        "net.0.bias", "net.0.weight", "net.2.bias", "net.2.weight"]  # fmt: skip
    assert all(p.verdict == "ok" and p.units < p.bound for _, p in result.parameters)
    for _, p in result.parameters:
        assert abs(p.along - p.numeric) <= 1e-5 * abs(p.numeric) + p.numeric_error


class Twice(torch.autograd.Function):
    """Right at first; from the second call on its backward is half of what is due."""

    calls = 0

    @staticmethod
    def forward(ctx, x):
        Twice.calls += 1
        ctx.share = 1.0 if Twice.calls == 1 else 0.5
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return 2 * g * ctx.share


def test_a_loop_is_checked_beyond_its_first_step_and_folded():
    def program():
        Twice.calls = 0
        w = torch.ones(3, requires_grad=True)
        for _ in range(6):
            w.grad = None
            Twice.apply(w).sum().backward()

    recorder, result = verified(program)
    assert len(result.wrong) >= 1 and recorder.graph.repeats
    assert all(recorder.graph.op(v.op).name == "Twice" for v in result.wrong)


def test_what_comes_after_a_long_loop_is_checked(monkeypatch):
    monkeypatch.setattr(verify, "SECONDS", 0.0)

    def program():
        w = torch.ones(3, requires_grad=True)
        for _ in range(8):
            (w * 2).sum().backward()
        Twice.calls = 1
        Twice.apply(w.exp()).sum().backward()

    recorder, result = verified(program)
    assert [recorder.graph.op(v.op).name for v in result.wrong] == ["Twice"]
    assert any("do the same" in note and "3 were not" in note for note in result.notes)


def test_an_operation_without_a_row_is_checked_by_number():
    def program():
        x = torch.linspace(0.1, 0.9, 7, requires_grad=True)
        torch.special.i0e(x).sum().backward()

    _, result = verified(program)
    assert [(v.verdict, v.closed_form) for v in result.verdicts] == [("ok", True), ("ok", False)]


def test_a_hook_that_changes_a_gradient_is_said_and_not_judged():
    def program():
        w = torch.ones(3, requires_grad=True)
        w.register_hook(lambda g: g * 0.5)
        (w * 3).sum().backward()

    _, result = verified(program)
    assert [p.verdict for _, p in result.parameters] == ["hook"] and result.ok
    assert any("hook" in note for note in result.notes)


def test_a_program_without_backward_is_not_called_right():
    _, result = verified(lambda: torch.ones(3).sum())
    assert not result.ok and not result.verdicts


def test_a_gradient_of_zero_proves_nothing():
    def program():
        w = torch.ones(3, requires_grad=True)
        (w.exp() * 0).sum().backward()

    _, result = verified(program)
    assert "zero" in {v.verdict for v in result.verdicts}


def test_the_program_is_left_as_it_was():
    apply, engine = torch.autograd.Function.__dict__["apply"], torch.autograd._engine_run_backward
    w = torch.randn(4, requires_grad=True)
    plain = torch.autograd.grad((w.sin() * w).sum(), w)[0]
    with pytest.raises(RuntimeError), Recorder(observer=Verifier(), keep=None):
        seen = torch.autograd.grad((w.sin() * w).sum(), w)[0]
        w @ torch.ones(5)
    assert torch.equal(plain, seen)
    assert torch.autograd.Function.__dict__["apply"] is apply and torch.autograd._engine_run_backward is engine
    assert not torch.nn.modules.module._global_forward_hooks and not torch.nn.modules.module._global_forward_pre_hooks


def test_verifying_afterwards_says_the_same_as_while_running():
    for name in ("wrong/square.py", "wrong/softmax_sum.py", "right/qwen3.py", "right/cnn.py"):
        with contextlib.redirect_stdout(io.StringIO()), Recorder() as recorder:
            runpy.run_path(str(PROGRAMS / name), run_name="__main__")
        after = verify_recorded(recorder.state)
        _, during = verified(PROGRAMS / name)
        assert [v.verdict for v in after.verdicts] == [v.verdict for v in during.verdicts]
        assert after.ok == during.ok == name.startswith("right")


def made_nan(name):
    """Programs in which a gradient is not finite, with the operation that makes it."""
    if name == "where sqrt":
        x = torch.tensor([0.0, 0.0, 9.0], requires_grad=True)
        torch.where(x > 0, x.sqrt(), x).sum().backward()
    elif name == "norm at zero":
        w, x = torch.zeros(3, requires_grad=True), torch.tensor([0.0, 1.0, -1.0])
        (w * x).abs().sqrt().sum().backward()
    elif name == "masked row":
        scores = torch.randn(3, 4, requires_grad=True)
        mask = torch.tensor([[0, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 1]]).bool()
        (scores.masked_fill(mask, -math.inf).softmax(-1) @ torch.randn(4, 2)).sum().backward()
    elif name == "targets":
        w, target = torch.randn(4, requires_grad=True), torch.tensor([1.0, math.nan, 0.0, 2.0])
        error = (w - target) ** 2
        torch.where(target.isnan(), torch.zeros(4), error).sum().backward()
    elif name == "second derivative":
        x = torch.zeros(2, requires_grad=True)
        (g,) = torch.autograd.grad(((x**2).sum(0) * torch.ones(2)).pow(1.5).sum(), x, create_graph=True)
        g.sum().backward()


@pytest.mark.parametrize(("name", "label"), [
    ("where sqrt", "sqrt"), ("norm at zero", "sqrt"), ("masked row", "_softmax"), ("targets", "pow"),
    ("second derivative", "pow"),
])  # fmt: skip
def test_a_gradient_that_is_not_finite_is_a_verdict_of_its_own(name, label):
    recorder, result = verified(lambda: made_nan(name))
    assert result.verdict == "wrong" and result.ok is False
    assert result.wrong[0].verdict == "nonfinite"
    assert recorder.graph.op(result.wrong[0].op).label == label
    finite = name == "masked row"  # of its gradients none flows through the mask: its loss is NaN
    assert finite or any(p.verdict == "nonfinite" for _, p in result.parameters)


def test_a_loss_that_is_nan_is_said_with_the_operation_that_made_it():
    def program():
        w = torch.randn(3, requires_grad=True)
        hidden = w.square() - 5
        hidden.log().sum().backward()

    recorder, result = verified(program)
    first = result.wrong[0]
    assert first.verdict == "nonfinite" and recorder.graph.op(first.op).label == "log"
    assert "the loss itself is NaN" in first.text


def test_what_is_not_finite_and_dropped_again_is_no_fault():
    """sqrt(relu(x)): infinite at 0, of which relu keeps nothing."""

    def program():
        x = torch.tensor([-1.0, 4.0, 9.0], requires_grad=True)
        torch.relu(x).sqrt().sum().backward()

    _, result = verified(program)
    assert not result.wrong and not result.wrong_parameters and result.ok
