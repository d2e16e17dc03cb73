"""kiem explain and kiem verify: every kind of target, what is printed where, exit codes."""

import json
import os
import statistics
import subprocess
import sys

import pytest

NET = """
import sys
import torch

torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
scale = float(sys.argv[sys.argv.index("--scale") + 1]) if "--scale" in sys.argv else 1.0
print("scale", scale, sys.argv[1:])
x = torch.ones(2, 3)
loss = scale * net(x).pow(2).mean()
loss.backward()
"""
SCALAR = """
import torch

w = torch.tensor(3.0, requires_grad=True)
(w * w + 2 * w).backward()
loss = (w ** 2).exp().log()
loss.backward()
"""
WRONG = """
import torch


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0]


w = torch.tensor([1.0, 2.0], requires_grad=True)
Square.apply(w).sum().backward()
"""
FAILS = """
import torch

x = torch.ones(2, 3)
w = torch.ones(2, 3, requires_grad=True)
(x * w).sum().backward()
y = x @ w
"""
FUNCTIONS = """
import torch


def step(size="3"):
    w = torch.ones(int(size), requires_grad=True)
    return (w * 2).sum()


def no_backward():
    torch.ones(3) + 1
"""
MODEL = """
model: {vocab_size: 64, context_length: 16, emb_dim: 16, n_heads: 2, n_layers: 1}
data: {tokenizer: bytes}
"""


@pytest.fixture(scope="module")
def programs(place):
    """The folder `place` with the programs in it."""
    for name, text in (("net.py", NET), ("scalar.py", SCALAR), ("wrong_square.py", WRONG), ("fails.py", FAILS),
                       ("functions_of_ours.py", FUNCTIONS), ("tiny_model.yaml", MODEL)):  # fmt: skip
        (place / name).write_text(text)
    return place


def script(place, text):
    path = place / "program_of_a_test.py"
    path.write_text(text)
    return path.name


# -- targets -----------------------------------------------------------------------------------------------------------


def test_a_script_with_arguments_of_its_own(kiem, programs):
    done = kiem("explain", "net.py", "--operations", "--", "--scale", "2.5")
    assert done.code == 0 and done.err == ""
    assert "scale 2.5 ['--scale', '2.5']" in done.out
    assert "recorded program" in done.out and "addmm" in done.out and "net.py:10" in done.out


def test_a_function_with_and_without_arguments(kiem, programs):
    done = kiem("explain", "functions_of_ours:step", "5")
    assert done.code == 0 and "backward pass 1" in done.out and "5 elements" in done.out
    assert kiem("verify", "functions_of_ours:step").code == 0


@pytest.fixture
def few_ways(monkeypatch):
    """A model's ways of computing without the one that takes torch.compile's time."""
    from kiem.model_checks import compare

    monkeypatch.setattr(compare, "WAYS", tuple(way for way in compare.WAYS if not way.compiled))


@pytest.mark.parametrize("verb", ["explain", "verify"])
def test_the_model_of_a_configuration(kiem, programs, few_ways, verb):
    done = kiem(verb, "tiny_model.yaml", "--json")
    assert done.code == 0, done.err
    told = json.loads(done.out)
    if verb == "explain":
        assert told["summary"]["backward_calls"] == 1 and told["title"].startswith("tiny_model.yaml")
    else:
        assert told["ok"] and told["comparison"] is not None


@pytest.mark.parametrize("verb", ["explain", "verify"])
def test_a_run(kiem, place, few_ways, verb):
    done = kiem(verb, "run")
    assert done.code == 0, done.err
    text = " ".join(done.out.split())
    assert "recorded program" in text if verb == "explain" else "Every gradient is right" in text


@pytest.mark.parametrize(("target", "told"), [
    ("missing.py", "no such file"),
    ("gpt2-124", "did you mean gpt2-124m"),
    ("functions_of_ours:stepp", "did you mean functions_of_ours:step"),
    ("functions_of_ours.py:step", "write functions_of_ours:step"),
    ("no_such_module_here:f", "there is no module"),
    (".", "config.yaml"),
])  # fmt: skip
@pytest.mark.parametrize("verb", ["explain", "verify"])
def test_a_target_that_is_none(kiem, programs, verb, target, told):
    done = kiem(verb, target)
    assert done.code == 2 and told in " ".join(done.err.split()) and done.out == "" and "Traceback" not in done.err


def test_arguments_where_none_can_be(kiem, programs):
    done = kiem("explain", "tiny_model.yaml", "extra")
    assert done.code == 2 and "takes no arguments" in done.err
    done = kiem("explain", "functions_of_ours:step", "1", "2")
    assert done.code == 2 and "cannot be called with 2 arguments" in " ".join(done.err.split())


def test_a_preset(kiem, programs, monkeypatch):
    """Of a small one: the smallest that ships takes long to record."""
    from kiem.config import presets

    small = {"vocab_size": 64, "context_length": 8, "emb_dim": 8, "n_heads": 2, "n_kv_heads": 2,
             "head_dim": 4, "hidden_dim": 16, "n_layers": 1}  # fmt: skip
    monkeypatch.setitem(presets.PRESETS, "tiny-of-a-test", presets.PRESETS["gpt2-124m"].model_copy(update=small))
    done = kiem("explain", "tiny-of-a-test")
    assert done.code == 0 and "backward pass 1" in done.out
    done = kiem("explain", "tiny-of-a-test", "--html", "no/such/page.html")
    assert done.code == 2


# -- what is asked -----------------------------------------------------------------------------------------------------


def test_the_chain_to_a_name_and_of_a_call(kiem, programs):
    done = kiem("explain", "net.py", "--wrt", "net.0.weight", "--wrt", "net.2.bias")
    assert done.code == 0 and "dL/dnet.0.weight" in done.out and "dL/dnet.2.bias" in done.out
    first, last = kiem("explain", "scalar.py", "--call", "1"), kiem("explain", "scalar.py")
    assert "dL/dw over all paths = 2 + 3 + 3 = 8" in first.out and "dL/dw" in last.out and first.out != last.out
    assert "= 6" in last.out


@pytest.mark.parametrize(("options", "told"), [
    (["--wrt", "net.0.wieght"], "net.0.weight"),
    (["--wrt", "net.0.weight", "--call", "3"], "made 1 backward call"),
    (["--wrt", "bias"], "several names end so: net.0.bias, net.2.bias"),
    (["--call", "0"], "counted from 1"),
    (["--call", "3"], "made 1 backward call"),
    (["--call", "-2"], "made 1 backward call"),
    (["--call", "3", "--backward"], "made 1 backward call"),
    (["--call", "x"], "integer"),
])  # fmt: skip
def test_a_name_or_call_that_is_not_there(kiem, programs, options, told):
    done = kiem("explain", "net.py", *options)
    assert done.code == 2 and told in " ".join(done.err.split()) and "Traceback" not in done.err


def test_a_name_is_found_by_how_it_ends(kiem, programs):
    done = kiem("explain", "net.py", "--wrt", "2.weight")
    assert done.code == 0 and "dL/dnet.2.weight" in done.out


def test_where_no_chain_rule_is_shown_it_says_how(kiem, programs):
    done = kiem("explain", "tiny_model.yaml")
    assert done.code == 0 and "chain rule: add --wrt NAME, where NAME is" in " ".join(done.out.split())


@pytest.mark.parametrize("text", [
    "print(torch.func.jacfwd(torch.func.jacrev(lambda x: (x ** 3).sum()))(torch.ones(2)))",
    "with fwAD.dual_level(): print(fwAD.unpack_dual(torch.sin(fwAD.make_dual(torch.ones(3), torch.ones(3)))).tangent)",
])  # fmt: skip
def test_without_a_backward_call_nothing_is_said_to_be_right(kiem, programs, text):
    target = script(programs, f"import torch, torch.autograd.forward_ad as fwAD\n{text}\n")
    done = kiem("verify", target)
    assert done.code == 8 and "Nothing could be checked: no backward call ran" in " ".join(done.out.split())
    assert "recorded, not verified" in " ".join(done.out.split())


def test_the_tables(kiem, programs):
    done = kiem("explain", "net.py", "--tensors", "--operations", "--backward", "--all")
    assert done.code == 0
    assert "matrix 4×3 float32 on cpu" in done.out and "parameter" in done.out and "saved for backward by" in done.out
    assert "backward pass 1 from loss" in done.out


def test_explain_in_json(kiem, programs):
    done = kiem("explain", "net.py", "--wrt", "net.2.weight", "--json", "--", "--scale", "3")
    told = json.loads(done.out)
    assert "scale 3.0" in done.err and "scale" not in done.out.split("\n")[0]
    keys = {"title", "summary", "notes", "failure", "values", "ops", "backwards", "repeats", "verdicts", "chains"}
    assert keys <= told.keys()
    assert told["failure"] is None and told["verdicts"] is None and told["summary"]["leaves"] == 4
    (chain,) = told["chains"]
    assert {"path_names", "equations", "modules", "steps"} <= chain.keys()
    json.dumps(told, allow_nan=False)
    op = next(o for o in told["ops"] if o["label"] == "tanh")
    assert op["derivatives"]["self"] and op["source"]["line"] == 10 and op["module"] == "net.1"


def test_verify_in_json(kiem, programs):
    done = kiem("verify", "net.py", "--json")
    told = json.loads(done.out)
    keys = {"target", "ok", "headline", "seconds", "counts", "first_wrong", "operations", "parameters", "notes",
            "minimal_programs", "comparison"}  # fmt: skip
    assert done.code == 0 and keys <= told.keys() and told["ok"] and told["first_wrong"] is None
    assert sorted(p["name"] for p in told["parameters"]) == ["net.0.bias", "net.0.weight", "net.2.bias", "net.2.weight"]
    assert told["comparison"] is None and told["minimal_programs"] == [] and "scale 1.0" in done.err
    assert set(told["counts"]) <= {"ok", "kink", "zero", "unchecked"}
    json.dumps(told, allow_nan=False)


@pytest.mark.parametrize("verb", ["explain", "verify"])
def test_the_page(kiem, programs, verb):
    page = programs / f"{verb}.html"
    done = kiem(verb, "net.py", "--html", page.name)
    assert done.code == 0 and f"page: {page.name}" in done.out
    text = page.read_text()
    assert text.startswith("<!doctype html>") and "net.0.weight" in text and "http-equiv" in text


def test_a_program_that_fails_before_what_is_asked_says_why(kiem, programs):
    early = script(programs, "import torch\ntorch.ones(2) @ torch.ones(3)")
    for options in (["--wrt", "w"], ["--call", "2", "--backward"]):
        done = kiem("explain", early, *options)
        assert done.code == 1 and "program_of_a_test.py:2: RuntimeError" in done.err


@pytest.mark.parametrize("verb", ["explain", "verify"])
@pytest.mark.parametrize("path", ["no/such/folder/page.html", "run"])
def test_a_page_that_cannot_be_written(kiem, programs, verb, path):
    done = kiem(verb, "net.py", "--html", path)
    assert done.code == 2 and path in done.err and "Traceback" not in done.err


# -- how a program ends ------------------------------------------------------------------------------------------------


def test_a_wrong_gradient_is_exit_code_1_and_shown(kiem, programs):
    done = kiem("verify", "wrong_square.py")
    text = " ".join(done.out.split())
    assert done.code == 1 and "Wrong: the gradient of Square at wrong_square.py:17" in text
    assert "A program that reproduces it" in text and "wrong_square.py:12" in text
    told = json.loads(kiem("verify", "wrong_square.py", "--json").out)
    assert not told["ok"] and told["operations"][told["first_wrong"]]["backward_source"] == "wrong_square.py:12"
    assert len(told["minimal_programs"]) == 1
    quiet = kiem("verify", "wrong_square.py", "--quiet")
    assert quiet.code == 1 and "A program that reproduces it" not in quiet.out
    assert kiem("explain", "wrong_square.py").code == 0


@pytest.mark.parametrize("verb", ["explain", "verify"])
def test_a_program_that_fails_is_explained(kiem, programs, verb):
    done = kiem(verb, "fails.py")
    assert done.code == 1 and "Traceback" not in done.out + done.err
    assert "fails.py:7: RuntimeError: mat1 and mat2 shapes cannot be multiplied" in done.err
    assert len(done.err.strip().splitlines()) > 1  # and what to do
    told = json.loads(kiem(verb, "fails.py", "--json").out)
    if verb == "explain":
        assert told["failure"]["source"]["line"] == 7 and told["failure"]["explanation"]
        assert told["ops"][-1]["error"] and len(told["backwards"]) == 1


@pytest.mark.parametrize(("text", "kind"), [
    ("import torch\nraise ValueError('[bold]no[/bold] [/]')", "ValueError: [bold]no[/bold] [/]"),
    ("import torch\nassert torch.ones(2).sum() == 3", "AssertionError"),
    ("import torch, no_such_thing_at_all", "ModuleNotFoundError"),
    ("import torch\nraise type('Odd', (Exception,), {'__str__': lambda s: chr(27) + '[31mred'})()", "Odd"),
])  # fmt: skip
@pytest.mark.parametrize("verb", ["explain", "verify"])
def test_whatever_it_raises(kiem, programs, verb, text, kind):
    done = kiem(verb, script(programs, text))
    assert done.code == 1 and kind in done.err and "Traceback" not in done.err and "\x1b" not in done.err


@pytest.mark.parametrize("verb", ["explain", "verify"])
def test_a_program_that_exits(kiem, programs, verb):
    ends = "import sys, torch\nw = torch.ones(2, requires_grad=True)\n(w * 2).sum().backward()\nsys.exit({})\n"
    for code in ("", "0"):
        done = kiem(verb, script(programs, ends.format(code)))
        assert done.code == 0, done.err
    for code in ("3", "'no data'"):
        done = kiem(verb, script(programs, ends.format(code)))
        assert done.code == 1 and "SystemExit" in done.err and code.strip("'") in done.err
        assert (
            "Incomplete: the program failed (SystemExit at" if verb == "verify" else "recorded program"
        ) in " ".join(done.out.split())


@pytest.mark.parametrize("verb", ["explain", "verify"])
def test_a_program_that_is_interrupted(kiem, programs, verb):
    done = kiem(verb, script(programs, "import torch\nraise KeyboardInterrupt"))
    assert done.code == 130 and done.err.strip() == "stopped"


def test_what_was_checked_in_part_has_an_exit_code_of_its_own(kiem, programs):
    """What torch.func differentiates is recorded, not verified: nothing is wrong, but not everything was checked."""
    text = """
import torch
w = torch.randn(9, requires_grad=True)
torch.func.grad(lambda x: (x**2).sum())(w.detach())
(2 * w).sum().backward()
"""
    done = kiem("verify", script(programs, text), "--json")
    told = json.loads(done.out)
    assert done.code == 8 and told["verdict"] == "incomplete" and told["ok"] is None
    assert told["headline"].startswith("Incomplete: gradients by torch.func are not verified. Nothing wrong")


def test_a_program_without_backward(kiem, programs):
    for target in ("functions_of_ours:no_backward", script(programs, "print('nothing of torch')")):
        assert kiem("explain", target).code == 0
        done = kiem("verify", target)
        assert done.code == 8 and "Nothing could be checked" in done.out
        done = kiem("explain", target, "--wrt", "w")
        assert done.code == 2 and "backward" in done.err


def test_what_looks_like_markup_is_text(kiem, programs):
    text = """
import torch
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_parameter("[red]", torch.nn.Parameter(torch.ones(2)))
    def forward(self): return (getattr(self, "[red]") * 2).sum()  # [/nothing]
net = Net()
print("[bold]printed[/bold] [/]")
net().backward()
"""
    for verb in ("explain", "verify"):
        done = kiem(verb, script(programs, text))
        assert done.code == 0, done.err
        assert "[bold]printed[/bold] [/]" in done.out and "net.[red]" in done.out


def test_a_program_that_changes_folder_and_output(kiem, programs):
    text = """
import os, sys, torch
os.chdir("/")
w = torch.ones(2, requires_grad=True)
(w * 2).sum().backward()
sys.stdout.write("no line's end")
"""
    done = kiem("explain", script(programs, text))
    assert done.code == 0 and "no line's end" in done.out and os.getcwd() == str(programs)


# -- help --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["explain", "verify"])
def test_help_is_light_and_fast(verb):
    code = f"""
import sys
from kiem.cli.main import main
main([{verb!r}, "--help"])
print([m for m in ("torch", "numpy", "rich") if m in sys.modules], file=sys.stderr)
"""
    seconds = []
    for _ in range(3):
        before = os.times()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        after = os.times()
        seconds.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert done.stderr.strip() == "[]" and "Examples:" in done.stdout
    assert statistics.median(seconds) < 0.25
    examples = done.stdout[done.stdout.index("Examples:") :].splitlines()[1:]
    commands = [line.strip() for line in examples if line.strip().startswith("kiem ")]
    assert len(commands) >= 4 and all(line.count("kiem ") == 1 for line in commands)
