"""The program for a bug report shows the error alone, and no longer once it is mended; where it cannot, it says so."""

import contextlib
import io
import runpy
import subprocess
from pathlib import Path

import pytest
import torch

from kiem.grad import minimal
from kiem.grad.carry import exact, expression
from kiem.grad.minimal import minimal_program
from kiem.grad.record import Recorder
from kiem.grad.verify import Verifier

PROGRAMS = Path(__file__).parent / "programs"


class Evidence(Verifier):
    """Keeps what the first wrong operation read and what arrived."""

    wrong = None

    def node_ran(self, recorder, step, op, node, into, out):
        super().node_ran(recorder, step, op, node, into, out)
        if self.wrong is None and self.result.wrong:
            inputs = {v: recorder.kept.tensors[v].clone() for _, v in op.inputs}
            self.wrong = op, self.result.wrong[0], inputs, tuple(into)


def first_wrong(path):
    seen = Evidence(end_to_end=False)
    with contextlib.redirect_stdout(io.StringIO()), Recorder(observer=seen, keep=None) as recorder:
        runpy.run_path(str(path), run_name="__main__")
    return recorder.graph, *seen.wrong


@pytest.fixture
def runs(monkeypatch):
    """The runs of programs: files in the folder, and how each ended."""
    seen, run = [], subprocess.run

    def spy(command, **options):
        seen.append(([p.name for p in Path(options["cwd"]).iterdir()], run(command, **options)))
        return seen[-1][1]

    monkeypatch.setattr(subprocess, "run", spy)
    return seen


FAST = ["square", "one_element", "tied_twice", "bfloat16_silu", "custom_op"]
SLOW = ["softmax_sum", "layernorm_mean", "none_returned", "conv_flip", "noncontiguous", "dropout_scale",
        "inplace_leaky", "rounded_float32"]  # fmt: skip


@pytest.mark.parametrize("name", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_it_shows_the_error_alone(name, runs):
    program = minimal_program(*first_wrong(PROGRAMS / "wrong" / f"{name}.py"))
    files, done = runs[-1]
    said = done.stdout.decode()
    assert files == ["program.py"] and done.returncode == 1, done.stderr.decode()
    assert "expected" in said and "got" in said and minimal.SAID in said
    assert program.startswith("# The gradient of") and f"{name}.py:" in program.replace("\n# ", "")
    assert "import kiem" not in program and "from kiem" not in program
    compile(program, "program.py", "exec")


def test_values_are_those_of_the_program(runs):
    graph, op, verdict, inputs, into = first_wrong(PROGRAMS / "wrong" / "square.py")
    minimal_program(graph, op, verdict, inputs, into)
    wrong = verdict.inputs[0]
    assert f"expected {wrong.expected:.6g}"[:16] in runs[-1][1].stdout.decode()
    assert f"got {wrong.got:.9g}" in runs[-1][1].stdout.decode()


@pytest.mark.parametrize(("name", "wrong", "right"), [
    ("square", "grad * x", "grad * 2 * x"),
    pytest.param("softmax_sum", "grad * probs", "probs * (grad - (grad * probs).sum(-1, keepdim=True))",
                 marks=pytest.mark.slow),
    pytest.param("one_element", "out[tile - 1 :] += g[tile - 1 :] * flat[tile - 1 :]",
                 "out[tile:] += g[tile:] * flat[tile:]", marks=pytest.mark.slow),
    pytest.param("bfloat16_silu", "grad * x.sigmoid()", "grad * x.sigmoid() * (1 + x * (1 - x.sigmoid()))",
                 marks=pytest.mark.slow),
])  # fmt: skip
def test_mended_it_ends_with_zero(name, wrong, right):
    program = minimal_program(*first_wrong(PROGRAMS / "wrong" / f"{name}.py"))
    assert program.count(f"return {wrong}\n") + program.count(f"        {wrong}\n") == 1
    assert minimal._try(program.replace(wrong, right)) == "right"


@pytest.mark.parametrize(("name", "cause"), [
    ("stale_data", "clamp_ at"), pytest.param("stale_inplace", "add_ at", marks=pytest.mark.slow),
])  # fmt: skip
def test_a_stale_tensor_is_explained(name, cause):
    program = minimal_program(*first_wrong(PROGRAMS / "wrong" / f"{name}.py")).replace("\n# ", " ")
    assert program.startswith("# THIS PROGRAM DOES NOT SHOW THE ERROR")
    assert cause in program and "ctx.save_for_backward" in program


def test_what_the_source_uses_comes_along(tmp_path, monkeypatch):
    (tmp_path / "parts.py").write_text("import torch\nSCALE = 3\n\n\ndef helper(t):\n    return torch.mul(t, SCALE)\n")
    script = tmp_path / "script.py"
    script.write_text('''from __future__ import annotations
import math
from functools import partial
import torch
from torch.nn import functional as F
from parts import helper as scaled

EPS, TABLE = 1e-3, torch.arange(4.0)
x = torch.randn(4)


class Base(torch.autograd.Function):
    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * math.pi, None, None


def inner(x: torch.Tensor):
    return F.softplus(scaled(x)) + EPS * TABLE


class Odd(Base):
    @staticmethod
    def forward(ctx, x, function, options):
        ctx.save_for_backward(x)
        return function(x) * options["gain"]


print("the script runs")
Odd.apply(torch.randn(4, requires_grad=True), inner, {"gain": float("inf") if False else 2.0}).sum().backward()
''')
    monkeypatch.syspath_prepend(tmp_path)
    program = minimal_program(*first_wrong(script))
    assert program.startswith("# The gradient of Odd"), program
    for text in ("import math", "functional as F", "SCALE = 3", "def helper", "scaled = helper", "EPS = 0.001"):
        assert text in program, text
    assert "the script runs" not in program and "partial" not in program
    assert program.index("class Base") < program.index("class Odd")


def test_a_function_defined_inside_another():
    gain = 3.0

    class Local(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * gain

        @staticmethod
        def backward(ctx, grad):
            return grad

    seen = Evidence(end_to_end=False)
    with Recorder(observer=seen, keep=None) as recorder:
        Local.apply(torch.randn(3, requires_grad=True)).sum().backward()
    program = minimal_program(recorder.graph, *seen.wrong)
    assert "gain = 3.0" in program and program.startswith("# The gradient of Local")


def test_what_cannot_be_written_is_said(tmp_path):
    script = tmp_path / "script.py"
    script.write_text('''import torch
class Holder: pass
class F(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, holder):
        return x * x
    @staticmethod
    def backward(ctx, grad):
        return grad, None
F.apply(torch.randn(4, requires_grad=True), Holder()).sum().backward()
''')
    program = minimal_program(*first_wrong(script)).replace("\n# ", " ")
    assert program.startswith("# No standalone program for F at") and "Holder" in program


@pytest.mark.parametrize("tensor", [
    torch.randn(3, 5), torch.randn(3, 5).to(torch.bfloat16), torch.randn(6, 4).T, torch.tensor(-0.0), torch.ones(9, 9),
    torch.tensor([float("nan"), float("-inf"), 1.0]), torch.randn(1, 5).expand(4, 5), torch.randn(40, 40),
    torch.randint(9, (30, 30)), torch.rand(4, 4) < 0.5, torch.randn(2, 2, dtype=torch.complex64), torch.zeros(0, 3),
    torch.rand(20, 20, dtype=torch.float64), torch.tensor(7),
], ids=lambda t: f"{t.dtype}{list(t.shape)}")  # fmt: skip
def test_a_tensor_is_written_to_the_bit(tensor):
    import base64

    made = eval(exact(tensor), {"torch": torch, "b64decode": base64.b64decode})
    assert made.dtype == tensor.dtype and made.shape == tensor.shape
    assert torch.equal(made.isnan(), tensor.isnan()) and torch.equal(made.nan_to_num(), tensor.nan_to_num())
    assert tensor.numel() == 0 or 0 in tensor.stride() or made.stride() == tensor.stride()


def test_arguments_as_source():
    value = [1, (2.5,), "a'b", None, torch.float32, float("nan"), slice(1, None), {"k": [True]}]
    text = expression(value, {})
    made = eval(text, {"torch": torch})
    assert made[1:5] == value[1:5] and made[5] != made[5] and made[6:] == value[6:]
