"""The program for a bug report shows the error alone, and no longer once it is mended; where it cannot, it says so."""

import ast
import contextlib
import io
import runpy
import subprocess
import types
from pathlib import Path

import pytest
import torch

from kiem.inspect.graph.layouts import elements
from kiem.inspect.record.recorder import Recorder
from kiem.inspect.repro import program as minimal
from kiem.inspect.repro.program import minimal_program
from kiem.inspect.repro.source_text import CannotWrite, exact, expression, like, registers
from kiem.inspect.verify.verifier import Verifier

PROGRAMS = Path(__file__).parents[1] / "programs"


class Evidence(Verifier):
    """Keeps what the first wrong operation read and what arrived."""

    wrong = None

    def node_ran(self, state, step, op, node, into, out):
        super().node_ran(state, step, op, node, into, out)
        if self.wrong is None and self.result.wrong:
            inputs = {v: state.kept.tensors[v].clone() for _, v in op.inputs}
            self.wrong = op, self.result.wrong[0], inputs, tuple(into)


def first_wrong_in(run):
    seen = Evidence(end_to_end=False)
    with contextlib.redirect_stdout(io.StringIO()), Recorder(observer=seen, keep=None) as recorder:
        run()
    return recorder.graph, *seen.wrong


def first_wrong(path):
    return first_wrong_in(lambda: runpy.run_path(str(path), run_name="__main__"))


def run_here(program, seconds=None):
    """What `_try` says of a program, without a process of its own."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), torch.random.fork_rng(devices=[]):
        try:
            exec(compile(program, "program.py", "exec"), {"__name__": "__main__"})
        except SystemExit as end:
            return "shown" if end.code and minimal.SAID in said.getvalue() else "right"
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    raise AssertionError("it ended without an exit code")


@pytest.fixture
def runs(monkeypatch):
    """The runs of programs: files in the folder, and how each ended."""
    seen, run = [], subprocess.run

    def spy(command, **options):
        seen.append(([p.name for p in Path(options["cwd"]).iterdir()], run(command, **options)))
        return seen[-1][1]

    monkeypatch.setattr(subprocess, "run", spy)
    monkeypatch.setattr(minimal, "BUDGET", 600)  # on a busy machine, too
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
    script.write_text("""from __future__ import annotations
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
""")
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

    program = minimal_program(*first_wrong_in(lambda: Local.apply(torch.randn(3, requires_grad=True)).sum().backward()))
    assert "gain = 3.0" in program and program.startswith("# The gradient of Local")


def test_what_cannot_be_written_is_said(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("""import torch
class Holder: pass
class F(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, holder):
        return x * x
    @staticmethod
    def backward(ctx, grad):
        return grad, None
F.apply(torch.randn(4, requires_grad=True), Holder()).sum().backward()
""")
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


# -- devices -----------------------------------------------------------------------------------------------------------


class Halved(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, device):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * x, None


def halved_on(device, shape=(3, 2)):
    """A wrong case that says that it ran on a device."""
    torch.manual_seed(0)
    x = torch.randn(shape, requires_grad=True)
    case = first_wrong_in(lambda: Halved.apply(x, torch.device(device)).sum().backward())
    for value in case[0].values:
        value.device = device
    return case


def tried(monkeypatch, outcome):
    """The programs that are tried. `outcome`: of a program."""
    programs = []
    monkeypatch.setattr(minimal, "_try", lambda program, seconds=0: programs.append(program) or outcome(program))
    return programs


def test_tensors_are_made_where_they_were(monkeypatch):
    programs = tried(monkeypatch, lambda program: "shown")
    program = minimal_program(*halved_on("cuda:1"))
    ast.parse(program)
    assert programs == [program] and program.startswith("# The gradient of Halved")
    assert 'Halved.apply(x, torch.device("cuda:1"))' in program
    assert '.reshape((3, 2)).to("cuda:1"),  # x' in program
    assert 'arriving = [torch.full((1, 1), 1.0, dtype=torch.float32).to("cuda:1").expand((3, 2))]' in program


def test_what_fails_there_is_shown_on_the_cpu(monkeypatch):
    failure = "RuntimeError: CUDA error: out of memory"
    tried(monkeypatch, lambda program: failure if "cuda" in program else run_here(program))
    program = minimal_program(*halved_on("cuda:1"))
    first, rest = program.replace("\n# ", " ", 1).split("\n", 1)
    assert first == f"# Shown on the CPU; the program ran on cuda:1, where it fails alone: {failure}."
    assert "cuda" not in rest and 'torch.device("cpu")' in rest and run_here(rest) == "shown"


@pytest.mark.slow
def test_a_device_that_is_not_there():
    program = minimal_program(*halved_on("cuda:99")).replace("\n# ", " ")
    assert program.startswith("# Shown on the CPU; the program ran on cuda:99, where it fails alone: ")


def test_right_on_the_device_and_wrong_on_the_cpu(monkeypatch):
    tried(monkeypatch, lambda program: "right" if "cuda" in program else "shown")
    program = minimal_program(*halved_on("cuda:1")).replace("\n# ", " ")
    assert program.startswith("# Shown on the CPU; the program ran on cuda:1, where called alone, the gradient is ")


def test_what_fails_everywhere_says_where(monkeypatch):
    programs = tried(monkeypatch, lambda program: "no memory" if "cuda" in program else "no kernel")
    program = minimal_program(*halved_on("cuda:1")).replace("\n# ", " ")
    assert program.startswith("# THIS PROGRAM COULD NOT BE RUN ALONE (6 runs took 0 s): on cuda:1: no memory; "
                              "on the CPU: no kernel The gradient of")  # fmt: skip
    assert len(programs) == 6  # a run for each way, as there is nothing to draw anew


def test_tensors_of_a_device_keep_their_layout():
    tensor = torch.randn(6, 4)
    made = 'torch.empty_strided((4, 6), (1, 4), dtype=torch.float32, device="cuda:1").copy_('
    assert exact(tensor.T, "cuda:1").startswith(made)
    assert exact(tensor[:1].expand(5, 4), "mps").endswith('.to("mps").expand((5, 4))')
    assert like(torch.arange(99), "cuda:1").endswith('.to(torch.int64).to("cuda:1")')
    assert exact(torch.zeros(3)) == exact(torch.zeros(3), "cpu") == "torch.full((3,), 0.0, dtype=torch.float32)"
    assert expression([torch.device("cuda", 1)], {}) == '[torch.device("cuda:1")]'
    assert expression([torch.device("cuda", 1)], {}, place="cpu") == '[torch.device("cpu")]'


def test_the_module_that_registers_a_device(monkeypatch):
    module = types.ModuleType("torch.tpx")
    module.is_available = first_wrong  # any function that is defined elsewhere
    monkeypatch.setattr(torch._C, "_get_privateuse1_backend_name", lambda: "tpx")
    monkeypatch.setattr(torch, "tpx", module, raising=False)
    assert registers("tpx:0") == first_wrong.__module__.split(".")[0]
    assert registers("cuda:0") is None and registers("cpu") is None


def test_of_an_import_only_what_is_used_comes_along(tmp_path, monkeypatch):
    (tmp_path / "own_parts.py").write_text("print('imported')\n")
    script = tmp_path / "script.py"
    script.write_text("""import own_parts, torch
from math import pi, tau
class F(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * tau
    @staticmethod
    def backward(ctx, grad):
        return grad
F.apply(torch.randn(4, requires_grad=True)).sum().backward()
""")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(minimal, "_try", run_here)
    program = minimal_program(*first_wrong(script))
    assert [line for line in program.splitlines() if "import " in line] == ["from math import tau", "import torch"]


# -- why it does not show ----------------------------------------------------------------------------------------------


def relu_case():
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.relu()

        @staticmethod
        def backward(ctx, grad):
            return grad * 2

    return first_wrong_in(lambda: Doubled.apply(torch.ones(3, requires_grad=True)).sum().backward())


def by_number():
    graph, op, verdict, inputs, into = halved_on("cpu")
    verdict.inputs[0].element, verdict.inputs[0].wrong_elements = None, 0
    return graph, op, verdict, inputs, into


@pytest.mark.parametrize(("make", "cause"), [
    (lambda: halved_on("cpu"), "Likely cause: a tensor that backward uses changed after forward. Keep it with ctx."),
    (lambda: halved_on("cuda:1"), "Possible causes: cuda:1 gives other results at other times."),
    (relu_case, "Possible causes: its derivative jumps at some points"),
    (by_number, "Possible causes: the verdict rests on one derivative by number"),
    (lambda: halved_on("cpu", (200, 200)), "Possible causes: random numbers stand for large tensors here."),
])  # fmt: skip
def test_causes_are_those_that_can_be(make, cause, monkeypatch):
    tried(monkeypatch, lambda program: "right")
    program = minimal_program(*make()).replace("\n# ", " ")
    assert program.startswith(f"# {minimal.ALONE} {cause}"), program[:400]
    assert ("save_for_backward, which" in program) == cause.startswith("Likely")


def test_advice_on_ctx_is_for_custom_functions(monkeypatch):
    tried(monkeypatch, lambda program: "right")
    graph, op, verdict, inputs, into = halved_on("cpu")
    op.kind = "op"
    first = minimal_program(graph, op, verdict, inputs, into).replace("\n# ", " ").splitlines()[0]
    assert first.startswith(f"# {minimal.ALONE} Likely cause: {minimal.STALE}. The gradient of")


def test_right_only_on_the_cpu_names_the_device(monkeypatch):
    tried(monkeypatch, lambda program: "no kernel" if "cuda" in program else "right")
    program = minimal_program(*halved_on("cuda:1")).replace("\n# ", " ")
    assert "Possible causes: the program ran on cuda:1, this one on the CPU. " in program


def test_right_only_in_float64_names_the_types(monkeypatch):
    tried(monkeypatch, lambda program: "right" if "inputs = [wide(t)" in program else "not for this type")
    program = minimal_program(*halved_on("cpu")).replace("\n# ", " ")
    assert "Possible causes: backward computes in float64 here and did not in the program. " in program


def test_what_changes_after_backward_is_no_cause(monkeypatch):
    def train():
        x = torch.randn(3, requires_grad=True)
        Halved.apply(x, None).sum().backward()
        torch.optim.SGD([x], lr=0.1).step()

    tried(monkeypatch, lambda program: "right")
    program = minimal_program(*first_wrong_in(train)).replace("\n# ", " ")
    assert "Likely cause" in program and "changed memory" not in program


# -- how long it takes -------------------------------------------------------------------------------------------------


def test_random_numbers_are_not_drawn_again_after_a_failure(monkeypatch):
    programs = tried(monkeypatch, lambda program: "no kernel")
    minimal_program(*halved_on("cpu", (20, 20)))
    assert [("torch.randn((" in p, "b64decode(" in p) for p in programs] == 3 * [(True, False), (False, True)]


def test_no_run_goes_beyond_the_time_of_all(monkeypatch):
    now, given = [0.0], []

    def run(program, seconds):
        given.append(seconds)
        now[0] += min(seconds, 20)
        return "no kernel"

    monkeypatch.setattr(minimal, "_try", run)
    monkeypatch.setattr(minimal, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    program = minimal_program(*halved_on("cuda:1"))
    assert given == [45, 25, 5] and now == [minimal.BUDGET] and "(3 runs took 45 s)" in program
    assert minimal_program(*halved_on("cpu")).count("no kernel") == 1


def test_a_run_that_takes_too_long_is_ended():
    assert minimal._try("import time\ntime.sleep(60)\n", 0.2) == "it ran longer than 0.2 s"


# -- tensors that are not strided --------------------------------------------------------------------------------------

PLACES = torch.tensor([[0, 0, 1, 2], [0, 2, 1, 2]])
ROWS, COLUMNS = torch.tensor([0, 2, 3, 4]), torch.tensor([0, 2, 1, 2])
LAID_OUT = {
    "csr": lambda v: torch.sparse_csr_tensor(ROWS, COLUMNS, v, (3, 3)),
    "csc": lambda v: torch.sparse_csc_tensor(ROWS, COLUMNS, v, (3, 3)),
    "bsr": lambda v: torch.sparse_bsr_tensor(torch.tensor([0, 1, 2]), torch.tensor([1, 0]), v.reshape(2, 1, 2), (2, 4)),
    "coo": lambda v: torch.sparse_coo_tensor(PLACES, v, (3, 3)),
    "coalesced": lambda v: torch.sparse_coo_tensor(PLACES, v, (3, 3)).coalesce(),
    "jagged": lambda v: torch.nested.nested_tensor_from_jagged(v.reshape(4, 1), torch.tensor([0, 3, 4])),
}


@pytest.mark.parametrize("layout", LAID_OUT)
def test_a_tensor_that_is_not_strided_is_written_to_the_bit(layout):
    tensor = LAID_OUT[layout](torch.randn(4))
    made = eval(exact(tensor), {"torch": torch})
    assert made.layout == tensor.layout and made.dtype == tensor.dtype
    assert torch.equal(elements(made), elements(tensor))
    if layout == "jagged":
        assert torch.equal(made.offsets(), tensor.offsets())
    else:
        assert torch.equal(made.to_dense(), tensor.to_dense())
        assert not tensor.is_sparse or made.is_coalesced() == tensor.is_coalesced()


def test_nested_tensors_that_are_not_jagged_cannot_be_written():
    with pytest.raises(CannotWrite, match="nested and not jagged"):
        exact(torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]))


class DenseOfSparse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, w):
        ctx.save_for_backward(a, w)
        return a @ w

    @staticmethod
    def backward(ctx, grad):
        a, w = ctx.saved_tensors
        return 2.0 * (grad @ w.T), a.mT @ grad


class RowsOfRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return a * b

    @staticmethod
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        return 2.0 * (grad * b), grad * a


@pytest.mark.parametrize("layout", ["csr", "coo", "coalesced"])
def test_a_wrong_gradient_of_a_sparse_tensor_is_shown(layout, monkeypatch):
    def run():
        torch.manual_seed(0)
        a = LAID_OUT[layout](torch.randn(4)).requires_grad_()
        DenseOfSparse.apply(a, torch.randn(3, 2)).square().sum().backward()

    monkeypatch.setattr(minimal, "_try", run_here)
    program = minimal_program(*first_wrong_in(run))
    assert program.startswith("# The gradient of DenseOfSparse with respect to a is wrong."), program
    kind = "csr" if layout == "csr" else "coo"
    assert f"    a = torch.sparse_{kind}_tensor(places_0_, " in program
    assert program.count("2.0 * (grad @ w.T)") == 1
    assert run_here(program.replace("2.0 * (grad @ w.T)", "grad @ w.T")) == "right"


def test_a_wrong_gradient_of_jagged_tensors_is_shown(monkeypatch):
    def run():
        torch.manual_seed(0)
        rows = torch.tensor([0, 3, 4])
        a, b = (torch.nested.nested_tensor_from_jagged(torch.randn(4, 2), rows) for _ in range(2))
        RowsOfRows.apply(a.requires_grad_(), b).values().square().sum().backward()

    monkeypatch.setattr(minimal, "_try", run_here)
    program = minimal_program(*first_wrong_in(run))
    assert program.startswith("# The gradient of RowsOfRows with respect to a is wrong."), program
    assert program.count("nested_tensor_from_jagged(") == 2 and program.count("places_0_ = ") == 1
    assert "places_1_" not in program, "rows that go together share their offsets"
    assert run_here(program.replace("2.0 * (grad * b)", "grad * b")) == "right"


def test_a_nested_tensor_that_is_not_jagged_is_said(monkeypatch):
    graph, op, verdict, inputs, into = halved_on("cpu")
    inputs = {v: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]) for v in inputs}
    program = minimal_program(graph, op, verdict, inputs, into).replace("\n# ", " ")
    assert program.startswith("# No standalone program for Halved at ")
    assert "a nested tensor that is not jagged" in program
