"""Printing never ends a run: a closed or full stream gives an exit code, not a traceback."""

import io
import json
import os
import subprocess
import sys

import pytest

from kiem.cli import main as cli
from kiem.cli.console import print_json

COMMANDS = [
    ["plan", "gpt2-124m", "--no-measure"],
    ["prepare", "text.txt", "--tokenizer", "bytes"],
    ["train", "run", "-q"],
    ["eval", "run"],
    ["generate", "run", "--max-tokens", "3"],
    ["explain", "adds.py"],
    ["verify", "adds.py", "-q"],
    ["completion", "bash"],
    ["plan", "gpt2-124m", "--no-measure", "--json"],
    ["--help"],
]


class Full(io.StringIO):
    """A stream on a full device."""

    def write(self, _):
        raise OSError(28, "No space left on device")


class Gone(io.StringIO):
    """A stream whose reader has left."""

    def write(self, _):
        raise BrokenPipeError(32, "Broken pipe")


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("stream", [Full(), None], ids=["full", "closed"])
def test_standard_output_that_cannot_be_written(kiem, place, monkeypatch, capfd, words, stream):
    (place / "adds.py").write_text("import torch\nx = torch.ones(2, requires_grad=True)\n(x * 3).sum().backward()\n")
    monkeypatch.setattr(sys, "stdout", stream)
    code = cli.main(words)
    monkeypatch.undo()
    err = capfd.readouterr().err
    assert code == 7 and "cannot write to standard output" in err and "Traceback" not in err


@pytest.mark.parametrize("words", COMMANDS[:1] + COMMANDS[4:5], ids=" ".join)
def test_a_reader_that_leaves_is_no_error(kiem, monkeypatch, capfd, words):
    monkeypatch.setattr(sys, "stdout", Gone())
    assert cli.main(words) == 0
    monkeypatch.undo()
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("stream", [Full(), None], ids=["full", "closed"])
def test_standard_error_that_cannot_be_written_is_no_matter(kiem, monkeypatch, capfd, stream):
    for words, code in ((["plan", "gpt2-124m", "--no-measure"], 0), (["eval", "nowhere"], 4), (["train", "run"], 0)):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", stream)
            assert cli.main(words) == code


@pytest.mark.parametrize(
    ("redirect", "code"),
    [
        ("> /dev/full", 7),
        (">&-", 7),
        ("2>&-", 0),
        ("2> /dev/full", 0),
        ("> /dev/full 2> /dev/full", 7),
        ("<&- >&- 2>&-", 7),
        ("<&-", 0),
    ],
)
@pytest.mark.parametrize(
    "words",
    [
        "plan gpt2-124m --no-measure",
        "completion bash",
        "--help",
        pytest.param("explain adds.py", marks=pytest.mark.slow),
        pytest.param("verify adds.py -q", marks=pytest.mark.slow),
    ],
)
def test_the_installed_program(tmp_path, words, redirect, code):
    """Through the interpreter's own end, which flushes the streams once more."""
    (tmp_path / "adds.py").write_text("import torch\nx = torch.ones(2, requires_grad=True)\n(x * 3).sum().backward()\n")
    command = f"{sys.executable} -m kiem {words} {redirect}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == code
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    assert ("cannot write to standard output" in done.stderr) == (code == 7 and "2>" not in redirect)


def test_json_of_any_text_and_number(capsys):
    print_json({"text": "a\ud800", "path": os.fsdecode(b"caf\xe9"), "loss": float("nan"), "n": [float("inf")]})
    out = capsys.readouterr().out
    out.encode("utf-8")
    assert json.loads(out, parse_constant=lambda word: pytest.fail(f"{word} is no JSON")) == {
        "text": "a\ud800",
        "path": "caf\udce9",
        "loss": "NaN",
        "n": ["Infinity"],
    }


def test_a_run_in_a_notebook(place, monkeypatch):
    import kiem as package

    monkeypatch.chdir(place)
    run = package.Run("run")
    assert "finished at step 4 of 4" in repr(run)
    html = run._repr_html_()
    assert html.startswith("<table>") and "bits per byte" in html
    assert "no report" in repr(package.Run("nowhere")) and "no report" in package.Run("nowhere")._repr_html_()
