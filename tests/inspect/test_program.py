"""What explain and verify run of a person's own: a file or a function; nothing is left behind."""

import os
import sys

import pytest
import torch

from kiem.errors import ConfigError
from kiem.inspect.program import function, script


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = sys.argv, list(sys.argv), sys.path, list(sys.path), sys.modules["__main__"]
    yield
    assert (sys.argv, list(sys.argv), sys.path, list(sys.path), sys.modules["__main__"]) == state
    assert sys.argv is state[0]
    assert sys.path is state[2]


def write(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return str(path)


def test_a_file_runs_as_main_with_its_arguments(tmp_path):
    write(tmp_path / "lib" / "helper_of_test.py", "value = 7")
    file = write(
        tmp_path / "lib" / "job.py",
        """
import os, sys, helper_of_test
assert sys.modules["__main__"].__dict__ is globals()
place, path = os.getcwd(), sys.path[0]
def main():
    global got
    got = (sys.argv, helper_of_test.value)
    os.chdir("lib")
    sys.path = []
    sys.exit()
if __name__ == "__main__":
    main()
""",
    )
    program = script(file, ["--rate", "3"])
    program.run()
    assert program.namespace["got"] == ([file, "--rate", "3"], 7)
    assert program.namespace["place"] == str(tmp_path)
    assert program.namespace["path"] == str(tmp_path / "lib")
    assert os.getcwd() == str(tmp_path)
    assert "helper_of_test" not in sys.modules
    assert (program.title, program.library) == (file, ())


def test_two_programs_have_each_its_own_helper(tmp_path):
    for n in (1, 2):
        write(tmp_path / f"p{n}" / "twin_helper.py", f"value = {n}")
        program = script(write(tmp_path / f"p{n}" / "job.py", "from twin_helper import value"))
        program.run()
        assert program.namespace["value"] == n


def test_what_the_program_raises_passes_through_and_its_names_stay(tmp_path):
    program = script(write(tmp_path / "job.py", "x = 1\nraise KeyError('mine')"))
    with pytest.raises(KeyError, match="mine"):
        program.run()
    assert program.namespace["x"] == 1
    with pytest.raises(SystemExit):
        script(write(tmp_path / "job.py", "raise SystemExit(3)")).run()


FUNCTIONS = """
import torch
w = torch.tensor(2.0, requires_grad=True)
def loss(): return (w * w).sin()
def done():
    loss = (w * w).sin()
    loss.backward()
    return loss
def differentiated():
    loss = (w * w).sin()
    torch.autograd.grad(loss, w)
    return loss
def named(a, b="2"): return a + b
number = 3
"""


def test_a_function_is_called_and_its_loss_goes_backward_once(tmp_path):
    write(tmp_path / "functions_of_test.py", FUNCTIONS)
    for name, gradient in (
        ("loss", 4 * torch.tensor(4.0).cos()),
        ("done", 4 * torch.tensor(4.0).cos()),
        ("differentiated", None),
    ):
        program = function(f"functions_of_test:{name}")
        program.run()
        assert program.namespace["w"].grad == gradient
    program = function("functions_of_test:named", ["1"])
    program.run()
    assert program.namespace["result"] == "12"


def test_a_program_that_leaves_by_os_exit_is_still_looked_at(tmp_path):
    file = write(tmp_path / "job.py", "import os, torch\nx = 1\nos._exit(0)")
    leave = os._exit
    program = script(file)
    program.run()
    assert program.namespace["x"] == 1 and os._exit is leave
    with pytest.raises(SystemExit) as caught:
        script(write(tmp_path / "job.py", "import os\nos._exit(3)")).run()
    assert caught.value.code == 3


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_process_that_a_program_forked_ends_by_os_exit(tmp_path):
    text = """
import os
child = os.fork()
if child == 0:
    os._exit(7)
ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
"""
    program = script(write(tmp_path / "job.py", text))
    program.run()
    assert program.namespace["ended"] == 7


BAD = {  # target: (files, arguments, what the message says)
    "no_such_module:f": ({}, [], "there is no module no_such_module in"),
    "imports_absent:f": (
        {"imports_absent.py": "x = 1\nimport absent_too"},
        [],
        r"ModuleNotFoundError: No module named 'absent_too' at .*imports_absent.py:2",
    ),
    "raises:f": ({"raises.py": "\n1 / 0"}, [], r"ZeroDivisionError: division by zero at .*raises.py:2"),
    "exits:f": ({"exits.py": "raise SystemExit(2)"}, [], "ends the process"),
    "bad_syntax:f": ({"bad_syntax.py": "def"}, [], "does not import: SyntaxError"),
    "functions:lost": ({"functions.py": FUNCTIONS}, [], r"lost does not exist in .*did you mean functions:loss\?"),
    "functions:number": ({"functions.py": FUNCTIONS}, [], "number is not a function"),
    "functions:named": ({"functions.py": FUNCTIONS}, [], r"named\(a, b='2'\) cannot be called with 0 arguments"),
    "functions:loss": ({"functions.py": FUNCTIONS}, ["3"], r"loss\(\) cannot be called with 1 argument"),
}


@pytest.mark.parametrize("target", BAD)
def test_a_function_that_is_none_is_refused_with_one_message(target, tmp_path):
    files, arguments, said = BAD[target]
    for name, text in files.items():
        write(tmp_path / name, text)
    with pytest.raises(ConfigError, match=said):
        function(target, arguments)
