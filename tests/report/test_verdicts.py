"""What verification says: the first wrong operation, tables, JSON; any width and encoding; foreign text is harmless."""

import contextlib
import io
import json
import runpy
from pathlib import Path

import pytest
import torch
from rich.console import Console

from kiem.grad.check import InputVerdict, Verdict
from kiem.grad.graph import Graph, Op, Source, Value
from kiem.grad.record import Recorder
from kiem.grad.verify import Result, Verifier
from kiem.report.verdicts import headline, print_result, result_dict

PROGRAMS = Path(__file__).parents[1] / "grad" / "programs"


def shown(graph, result, width=80, encoding="utf-8") -> str:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding)
    print_result(graph, result, Console(file=file, width=width, force_terminal=False, color_system=None))
    file.flush()
    return raw.getvalue().decode(encoding)


def verified(name):
    seen = Verifier()
    with contextlib.redirect_stdout(io.StringIO()), Recorder(observer=seen, keep=None) as recorder:
        runpy.run_path(str(PROGRAMS / f"{name}.py"), run_name="__main__")
    return recorder.graph, seen.result


def made(name="mul", module="model.layers.0", parameter="model.weight", **given):
    """A graph of one operation with one input, and a result in which its gradient is wrong."""
    value = Value(0, (2, 3), torch.float32, "cpu", (3, 1), 0, 0, 0, True, True, name=parameter)
    line = Source("train.py", 7, "f", "y = a * b")
    op = Op(0, f"aten.{name}.Tensor", "op", (("self", 0),), (), {}, line, module, "Mul",
            backward_source=Source("ops.py", 31, "backward", "def backward(ctx, g):"))  # fmt: skip
    known = {"along": 1.5, "numeric": 2.5, "numeric_error": 1e-12, "reference": "rule", "units": 2e6, "bound": 12.0,
             "element": (1, 2), "expected": 0.5, "got": 0.25, "wrong_elements": 4, "shape": (2, 3)}  # fmt: skip
    wrong = InputVerdict("self", 0, "wrong", torch.float32, **known | given)
    return Graph(ops=[op], values=[value]), Result([Verdict(0, "wrong", "", [wrong], True)], [(0, wrong)])


def test_the_first_wrong_operation():
    graph, result = made()
    text = " ".join(shown(graph, result).split())
    for words in ("Wrong: the gradient of mul at train.py:7.", "Checked: 1 operation, 1 parameter end to end.",
                  "mul in model.layers.0 (Mul)", "called at train.py:7 y = a * b", "backward at ops.py:31",
                  "argument self (model.weight), float32[2, 3], 4 of 6 elements wrong",
                  "element [1, 2] expected 0.5, got 0.25", "numeric derivative 2.5 ± 1e-12, autograd 1.5",
                  "error 2.0e+06 units of precision; rounding explains 12", "mul 1 2.0e+06 12 wrong rule",
                  "model.weight 1 2.0e+06 12 wrong"):  # fmt: skip
        assert words in text, words


def test_none_was_returned():
    assert "got None" in shown(*made(got=None)) and "which stands for zero" in shown(*made(got=None, element=None))


def test_json():
    graph, result = made(units=float("inf"))
    made_ = result_dict(graph, result)
    assert json.loads(json.dumps(made_, allow_nan=False)) == made_
    assert set(made_) == {"ok", "headline", "seconds", "counts", "first_wrong", "operations", "parameters", "notes"}
    assert made_["ok"] is False and made_["first_wrong"] == 0 and made_["counts"] == {"wrong": 1}
    operation = made_["operations"][0]
    assert operation["source"] == "train.py:7" and operation["backward_source"] == "ops.py:31"
    assert operation["checked_by"] == "rule" and operation["closed_form"] is True
    one = operation["inputs"][0]
    assert (one["name"], one["dtype"], one["element"], one["expected"], one["got"], one["units"]) == (
        "model.weight", "float32", [1, 2], 0.5, 0.25, None)  # fmt: skip
    assert made_["parameters"][0] == {"backward": 0, **one}


@pytest.mark.parametrize("width", [30, 80, 200])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "cp1252"])
def test_foreign_names_are_harmless(width, encoding):
    evil = "[bold red]x[/]\x1b[2J\u202e日本\r\nfoo"
    graph, result = made("mul" + evil, f"m.{evil}", evil)
    graph.ops[0].source = Source(f"{evil}.py", 1, "f", evil)
    result.notes.append(f"note {evil}")
    result.verdicts.append(Verdict(0, "unchecked", evil))
    text = shown(graph, result, width, encoding)
    assert not {"\x1b", "\u202e", "\r"} & set(text)
    assert "[boldred]x[/]" in "".join(text.split())
    assert max(map(len, text.splitlines())) <= width


def test_many_parameters_are_folded_by_module():
    graph, result = made()
    result.parameters = []
    for layer in range(18):
        for name in ("a.weight", "a.bias", "b.weight", "b.bias"):
            graph.values.append(Value(len(graph.values), (3,), torch.float32, "cpu", (1,), 0, 0, 0, True, True,
                                      name=f"model.{layer}.{name}"))  # fmt: skip
            units = 9.0 if (layer, name) == (7, "b.bias") else 0.5
            one = InputVerdict("", len(graph.values) - 1, "ok", torch.float32, units=units, bound=10.0)
            result.parameters.append((0, one))
    text = shown(graph, result)
    assert "model.7.b" not in text and "model.17" in text
    assert "model.7 4 9 10 ok" in " ".join(text.split())
    assert len(result_dict(graph, result)["parameters"]) == 72


def test_operations_right_by_themselves_with_a_wrong_whole():
    graph, result = made()
    result.verdicts[0].verdict = "ok"
    text = " ".join(shown(graph, result).split())
    assert "Wrong: the whole gradient of model.weight; no single operation." in text and "such as a hook" in text


def test_nothing_was_checked():
    assert headline(Graph(), Result()).startswith("Nothing was checked")
    assert "Nothing was checked" in shown(Graph(), Result(notes=["there was no backward call"]))


def test_a_program_with_a_wrong_gradient():
    graph, result = verified("wrong/square")
    text = shown(graph, result)
    assert "Wrong: the gradient of Square" in text and "square.py:21" in text and "square.py:13" in text
    assert "operations inside" in text and max(map(len, text.splitlines())) <= 80
    json.dumps(result_dict(graph, result), allow_nan=False)


@pytest.mark.parametrize("name", ["right/mlp", "right/gpt2"])
def test_a_program_with_right_gradients(name):
    graph, result = verified(name)
    text = shown(graph, result)
    assert "Every gradient is right" in text and "Wrong" not in text
    assert ("kink: relu at" in text) == (name == "right/mlp")
    assert result_dict(graph, result)["ok"] is True
