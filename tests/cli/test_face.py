"""What the face promises: examples that are commands, one JSON document, documented exit codes, the same in Python."""

import json
import re
import shlex
import subprocess
import sys

import click
import pytest

from kiem import errors
from kiem.cli import main as cli

VERBS = ["train", "prepare", "eval", "generate", "plan", "explain", "verify", "completion"]
HEAVY = ("torch", "numpy", "pydantic", "tokenizers", "rich", "yaml")


def python(code):
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def examples():
    """Every command that a help page shows."""
    for name, command in [("kiem", cli.cli), *cli.cli.commands.items()]:
        text = f"{command.help}\n{command.epilog or ''}"
        for line in text.splitlines():
            if found := re.match(r"\s+(?:[^|]*\| )?(kiem \w.*?)(?:\s{2,}.*)?$", line):
                yield pytest.param(found[1], id=f"{name}: {found[1]}")


# --- help


def test_the_verbs_are_those_of_the_contract():
    assert sorted(cli.cli.commands) == sorted(VERBS)


@pytest.mark.parametrize("command", list(examples()))
def test_every_example_is_a_valid_command(command):
    words = shlex.split(command.partition(" >")[0].partition(" < ")[0])
    assert words.pop(0) == "kiem"
    verb = cli.cli.commands[words.pop(0)]
    context = verb.make_context(verb.name, words)
    assert isinstance(context, click.Context)


def test_there_are_examples():
    assert len(list(examples())) >= 15


def test_exit_codes_are_documented(kiem):
    listed = kiem("--help").out.partition("Exit codes:")[2]
    for error in errors.KiemError.__subclasses__():
        assert re.search(rf"\b{error.exit_code}\b", listed), error
    assert re.search(r"\b0 done", listed)


# --- output


@pytest.mark.parametrize("words", [
    ["plan", "gpt2-124m", "--no-measure", "--json"],
    ["prepare", "text.txt", "--tokenizer", "bytes", "--json"],
    ["eval", "run", "--json"],
    ["generate", "run", "--prompt", "line", "--max-tokens", "3", "--seed", "1", "--json"],
    ["train", "run", "--json"],
    ["eval", "nowhere", "--json"],
    ["plan", "--no-such-option", "--json"],
], ids=" ".join)  # fmt: skip
def test_with_json_standard_output_is_one_document(kiem, words):
    result = kiem(*words)
    document = json.loads(result.out, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert isinstance(document, dict)
    if result.code:
        assert document["error"]["exit_code"] == result.code
        assert document["error"]["message"] in result.err


def test_a_prompt_from_standard_input(kiem, monkeypatch):
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO("line 7"))
    assert kiem("generate", "run", "--prompt", "-", "--max-tokens", "2", "--seed", "1").out.startswith("line 7")


def test_the_plan_of_gpt2_without_torch_has_the_known_number():
    found = json.loads(
        python("""
import sys
sys.modules["torch"] = None
from kiem.cli.main import main
sys.exit(main(["plan", "gpt2-124m", "--no-measure", "--json"]))
""")
    )
    assert 124_439_808 in found.values()


# --- what goes wrong


def test_stopped_says_so_without_calling_it_an_error(kiem, monkeypatch):
    def stop(*_, **__):
        raise errors.Stopped("saved at step 3; go on with: kiem train run")

    monkeypatch.setattr("kiem.api.train", stop)
    result = kiem("train", "run")
    assert result.code == 130 and "go on with" in result.err and "error:" not in result.err


@pytest.mark.parametrize("error", [error for error in errors.KiemError.__subclasses__() if error is not errors.Stopped])
def test_each_error_has_its_exit_code(kiem, monkeypatch, error):
    def fail(*_, **__):
        raise error("what happened")

    monkeypatch.setattr("kiem.api.plan", fail)
    result = kiem("plan")
    assert (result.code, result.err, result.out) == (error.exit_code, "error: what happened\n", "")


def test_an_interrupt_is_130_and_a_bug_keeps_its_traceback(kiem, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    def bug(*_, **__):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("kiem.api.plan", interrupt)
    assert kiem("plan").code == 130
    monkeypatch.setattr("kiem.api.plan", bug)
    with pytest.raises(ZeroDivisionError):
        kiem("plan")


def test_through_the_real_program():
    done = subprocess.run([sys.executable, "-m", "kiem", "trian"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.startswith("error:")


# --- in Python


def test_importing_kiem_loads_nothing_heavy():
    assert (
        python(f"""
import sys
import kiem
kiem.__version__
print([m for m in {HEAVY} if m in sys.modules], [m for m in sys.modules if m.startswith("kiem.")])
""")
        == "[] []\n"
    )


def test_public_names_are_functions_with_signatures_and_docstrings():
    assert (
        python("""
import inspect
import kiem
assert set(dir(kiem)) == {*kiem.__all__, "__version__"}
assert "minutes" in inspect.signature(kiem.train).parameters and "`minutes`" in kiem.train.__doc__
print(kiem.plan("gpt2-124m", measure=False).to_dict()["parameters"])
""")
        == "124439808\n"
    )


def test_every_public_name_is_there():
    import kiem as package

    for name in package.__all__:
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match="trian"):
        _ = package.trian


def test_python_and_the_command_line_agree(kiem, place):
    import kiem as package

    model = package.load("run")
    text = kiem("generate", "run", "--prompt", "line", "--max-tokens", "8", "--seed", "3").out
    assert "line" + model.generate("line", max_tokens=8, seed=3) + "\n" == text
    assert package.evaluate("run").loss == json.loads(kiem("eval", "run", "--json").out)["loss"]
