"""Custom Functions are recorded and judged however they are called."""

import torch

import kiem
from kiem.inspect.program import function


class Tripled(torch.autograd.Function):
    """x², with a derivative that is 3/2 times too large."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 3 * g * x


square = Tripled.apply  # before anything is recorded, as torch's documentation does


def one_step():
    """A target as `kiem verify module:function` takes it; the module is imported before recording begins."""
    w = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    square(w).sum().backward()


def test_an_apply_taken_before_recording_is_judged():
    with kiem.record(verify=True) as trace:
        one_step()
    assert [op.name for op in trace.graph.ops if op.kind == "function"] == ["Tripled"]
    verification = trace.verify()
    assert verification.ok is False and len(verification.wrong) == 1
    assert verification.wrong[0].startswith("tests/inspect/record/test_functions.py:")


def test_a_function_of_a_module_is_judged(tmp_path, monkeypatch):
    (tmp_path / "a_module_with_one_step.py").write_text(
        "import torch\n"
        "class Tripled(torch.autograd.Function):\n"
        "    forward = staticmethod(lambda ctx, x: ctx.save_for_backward(x) or x * x)\n"
        "    backward = staticmethod(lambda ctx, g: 3 * g * ctx.saved_tensors[0])\n"
        "square = Tripled.apply\n"
        "def step():\n"
        "    return square(torch.tensor([1.0, 2.0], requires_grad=True)).sum()\n"
    )
    monkeypatch.chdir(tmp_path)
    program = function("a_module_with_one_step:step")
    with kiem.record(verify=True) as trace:
        program.run()
    assert trace.verify().ok is False


def test_a_compiled_function_is_judged_in_each_recording():
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: (x.sin() * x).sum(), backend="aot_eager")
    for _ in range(2):
        w = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
        with kiem.record(verify=True) as trace:
            compiled(w).backward()
        (op,) = [op for op in trace.graph.ops if op.kind == "compiled"]
        assert [(v.op, v.verdict) for v in trace.verify().result.verdicts] == [(op.index, "ok")]


def test_recording_leaves_apply_as_it_was():
    below = torch.autograd.function._SingleLevelFunction
    apply = torch.autograd.Function.__dict__["apply"]
    with kiem.record(), kiem.record():
        assert torch.autograd.Function.__dict__["apply"] is apply
        one_step()
    assert "apply" not in below.__dict__


def test_the_operations_inside_are_its_children_alone():
    with kiem.record() as trace:
        w = torch.ones(3, requires_grad=True)
        (square(w) + square(w)).sum().backward()
    first, other = [op for op in trace.graph.ops if op.kind == "function"]
    assert [op.label for op in trace.graph.inside(first)] == ["mul"]
    assert [op.label for op in trace.graph.inside(other)] == ["mul"]
