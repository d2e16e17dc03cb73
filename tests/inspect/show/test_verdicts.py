"""What verification says: the first wrong operation, tables, JSON; any width and encoding; foreign text is harmless."""

import contextlib
import dataclasses
import io
import json
import runpy
from pathlib import Path

import pytest
import torch
from rich.console import Console

from kiem.inspect.graph.model import Failure, Graph, Op, Source, Value
from kiem.inspect.record.recorder import Recorder
from kiem.inspect.show.document import document
from kiem.inspect.show.verdicts import headline, print_result, result_dict
from kiem.inspect.trace import Trace
from kiem.inspect.verify.operation import InputVerdict, Verdict
from kiem.inspect.verify.verifier import Gap, Result, Verifier

PROGRAMS = Path(__file__).parents[1] / "programs"


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
    graph = Graph()
    graph.add_op(op)
    graph.add_value(value)
    return graph, Result([Verdict(0, "wrong", "", [wrong], True)], [(0, wrong)])


def test_the_first_wrong_operation():
    graph, result = made()
    text = " ".join(shown(graph, result).split())
    for words in ("Wrong: the gradient of mul at train.py:7.", "Checked: 1 operation, 1 parameter end to end.",
                  "mul in model.layers.0 (Mul)", "called at train.py:7 y = a * b", "backward at ops.py:31",
                  "input `self` (model.weight), float32[2, 3], 4 of 6 elements wrong",
                  "element [1, 2] expected 0.5, got 0.25", "numeric derivative 2.5 ± 1e-12, autograd 1.5",
                  "error 2.0e+06 ulp; rounding explains at most 12 ulp", "mul 1 2.0e+06 12 wrong rule",
                  "model.weight 1 2.0e+06 12 wrong"):  # fmt: skip
        assert words in text, words


def test_none_was_returned():
    assert "got None" in shown(*made(got=None)) and "which means zero" in shown(*made(got=None, element=None))


def test_equal_operations_at_one_place_are_counted():
    graph, result = made()
    for line in (15, 15, 15, 16):
        op = dataclasses.replace(graph.op(0), index=graph.next_op, source=Source("other.py", line, "f", "y"))
        graph.add_op(op)
        result.verdicts.append(dataclasses.replace(result.verdicts[0], op=op.index))
    text = " ".join(shown(graph, result).split())
    assert "also wrong mul at other.py:15 (3 times) also wrong mul at other.py:16" in text
    assert text.count("other.py:15") == 1 and "and 4 other operations" in text


def test_files_of_packages_are_named_without_their_folder():
    graph, result = made()
    graph.op(0).source = Source("/home/me/.venv/lib/python3.11/site-packages/pkg/sub/model.py", 7, "f", "y")
    result.notes.append("seen at /a/dist-packages/x.py:3")
    result.verdicts.append(Verdict(0, "unchecked", r"it ran at C:\v\Lib\site-packages\y.py:4"))
    text = shown(graph, result, 200)
    assert "Wrong: the gradient of mul at pkg/sub/model.py:7." in text and "seen at x.py:3" in text
    assert "packages" not in text and "it ran at y.py:4" in text
    assert "site-packages" in result_dict(graph, result)["operations"][0]["source"]


@pytest.mark.parametrize(
    ("expected", "units", "said"),
    [(0.0, 3.9e42, "expected 0, got 0.25"), (0.0, 5.0, "expected 0, got 0.25"), (1e-30, 2e12, "expected 1e-30, got"),
     (0.5, 1e12, "1.0e+12")],
)  # fmt: skip
def test_units_are_shown_where_they_say_something(expected, units, said):
    text = " ".join(shown(*made(expected=expected, got=0.25000001, units=units), 120).split())
    assert f"mul 1 {said}" in text and f"model.weight 1 {said}" in text
    assert ("ulp; rounding" in text) == ("expected" not in said)
    assert "got 0.25000001" in text


def test_a_complex_number_is_shown():
    assert "expected 1+2j, got 3+0j" in shown(*made(expected="1+2j", got="3+0j"))


def test_the_number_along_a_direction_decided():
    graph, result = made(wrong_elements=0, reference="", expected=0.0, got=0.0)
    text = " ".join(shown(graph, result, 120).split())
    assert "direction numeric derivative 2.5 ± 1e-12, autograd 1.5" in text and "element" not in text


def test_a_coarse_bound_is_relative_to_the_number():
    # autograd 1.5 against 2.5: 0.4 of the number in 2e5 units; a bound of 1e6 units is then 2 of it
    graph, result = made(wrong_elements=0, reference="", element=None, units=2e5, bound=1e6)
    result.verdicts[0].verdict = result.verdicts[0].inputs[0].verdict = "ok"
    text = " ".join(shown(graph, result, 120).split())
    assert "mul 1 0.4 relative 2 relative ok number, no closed form" in text
    assert "largest rounding error: 0 ulp" in headline(graph, result)
    result.verdicts[0].inputs[0].reference = "rule"
    assert "mul 1 2.0e+05 1.0e+06 ok rule" in " ".join(shown(graph, result, 120).split())


def test_what_was_not_checked_is_in_the_headline():
    graph, result = made(units=0.5)
    result.verdicts[0].verdict = result.verdicts[0].inputs[0].verdict = "ok"
    end = "; largest rounding error: 0.5 ulp (float32)."
    what = "1 operation, 1 parameter end to end"
    assert headline(graph, result) == f"Every gradient is right: {what}{end}"
    result.verdicts += [Verdict(0, "unchecked", "why"), Verdict(0, "unchecked", "why")]
    why = "2 operations not checked (mul at train.py:7: why)"
    assert headline(graph, result) == f"Incomplete: {why}. Nothing wrong was found in {what}{end}"
    result.gaps = [Gap("end to end", "why")]
    told = headline(graph, result)
    assert told.startswith(f"Incomplete: {why}, 1 backward call not checked end to end. Nothing wrong")
    result.parameters, result.gaps = [], [Gap("node", "A"), Gap("node", "B"), Gap("program", "KeyError")]
    told = headline(graph, result)
    assert f"{why}, 2 kinds of backward nodes not recorded, no parameter checked end to end. Nothing" in told
    graph.failure = Failure("KeyError", "x", Source("train.py", 9, "f", "d[x]"))
    told = headline(graph, result)
    assert told.startswith("Incomplete: the program failed (KeyError at train.py:9), and what comes after was not")
    assert result.ok is None and "right" not in told


def test_nodes_that_nothing_recorded_made_are_one_note():
    graph, result = made()
    result.notes = ["first", *(f"{n}Backward0: made by no recorded operation; not checked by itself" for n in "ABCDE"),
                    "last"]  # fmt: skip
    text = shown(graph, result, 300)
    assert [line for line in text.splitlines() if line.startswith("note:")] == [
        "note: first",
        "note: 5 kinds of backward nodes belong to no recorded operation and were not checked by themselves: "
        "ABackward0, BBackward0, CBackward0 and 2 more",
        "note: last",
    ]
    assert len(result_dict(graph, result)["notes"]) == 7


def test_leaves_of_one_name_have_rows_of_their_own():
    graph, result = made()
    one = InputVerdict("", 1, "ok", torch.float32, units=0.25, bound=10.0)
    graph.add_value(dataclasses.replace(graph.value(0), index=1))
    result.parameters += [(1, one), (2, one)]
    text = " ".join(shown(graph, result).split())
    assert "model.weight 1 2.0e+06 12 wrong model.weight#2 2 0.25 10 ok" in text


def test_entries_of_a_dict_are_folded_to_it():
    graph, result = made()
    result.parameters = []
    for i in range(40):
        graph.add_value(dataclasses.replace(graph.value(0), index=i + 1, name=f'params["{i}.weight"]'))
        result.parameters.append((0, InputVerdict("", i + 1, "ok", torch.float32, units=0.5, bound=10.0)))
    assert "params 40 0.5 10 ok" in " ".join(shown(graph, result).split())


def test_json():
    graph, result = made(units=float("inf"))
    made_ = result_dict(graph, result)
    assert json.loads(json.dumps(made_, allow_nan=False)) == made_
    assert set(made_) == {
        "verdict",
        "ok",
        "headline",
        "seconds",
        "counts",
        "first_wrong",
        "operations",
        "parameters",
        "notes",
    }
    assert made_["ok"] is False and made_["first_wrong"] == 0 and made_["counts"] == {"wrong": 1}
    operation = made_["operations"][0]
    assert operation["source"] == "train.py:7" and operation["backward_source"] == "ops.py:31"
    assert operation["checked_by"] == "rule" and operation["closed_form"] is True
    one = operation["inputs"][0]
    assert (one["name"], one["dtype"], one["element"], one["expected"], one["got"], one["units"]) == (
        "model.weight", "float32", [1, 2], 0.5, 0.25, "Infinity")  # fmt: skip
    assert made_["parameters"][0] == {"backward": 0, **one}


@pytest.mark.parametrize("width", [30, 80, 200])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "cp1252"])
def test_foreign_names_are_harmless(width, encoding):
    evil = "[bold red]x[/]\x1b[2J\u202e日本\r\nfoo"
    graph, result = made("mul" + evil, f"m.{evil}", evil)
    graph.op(0).source = Source(f"{evil}.py", 1, "f", evil)
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
            graph.add_value(Value(graph.next_value, (3,), torch.float32, "cpu", (1,), 0, 0, 0, True, True,
                                      name=f"model.{layer}.{name}"))  # fmt: skip
            units = 9.0 if (layer, name) == (7, "b.bias") else 0.5
            one = InputVerdict("", graph.next_value - 1, "ok", torch.float32, units=units, bound=10.0)
            result.parameters.append((0, one))
    text = shown(graph, result)
    assert "model.7.b" not in text and "model.17" in text
    assert "model.7 4 9 10 ok" in " ".join(text.split())
    assert len(result_dict(graph, result)["parameters"]) == 72


def test_operations_right_by_themselves_with_a_wrong_whole():
    graph, result = made()
    result.verdicts[0].verdict = "ok"
    text = " ".join(shown(graph, result).split())
    assert (
        "Wrong: the whole gradient of model.weight; no single operation." in text
        and "look for a tensor hook, a change through .data" in text
    )
    graph.value(0).hooks = ("train.py:3",)
    graph.add_op(dataclasses.replace(graph.op(0), index=1, source=Source("train.py", 8, "f", "z = rrelu(y)")))
    result.verdicts.append(Verdict(1, "unchecked", "it is random"))
    text = " ".join(shown(graph, result).split())
    assert "hook train.py:3" in text and "not checked mul at train.py:8: it is random" in text
    assert "look for" not in text


def test_nothing_was_checked():
    assert headline(Graph(), Result()).startswith("Nothing could be checked")
    assert "Nothing could be checked" in shown(Graph(), Result(notes=["there was no backward call"]))


def test_a_program_that_failed_has_no_headline_that_says_right():
    graph = Graph()
    graph.failure = Failure("RuntimeError", "x", Source("train.py", 9, "f", "y"))
    assert headline(graph, Result()) == (
        "Nothing could be checked: the program failed before backward() (RuntimeError at train.py:9)."
    )
    graph, result = made(units=0.5)
    result.verdicts[0].verdict = result.verdicts[0].inputs[0].verdict = "ok"
    result.gaps.append(Gap("program", "it failed"))
    graph.failure = Failure("RuntimeError", "x", None)
    assert headline(graph, result).startswith("Incomplete: the program failed (RuntimeError), and what comes after")


def test_the_page_shows_the_worst_verdict_of_an_operation():
    graph, result = made()
    fine = dataclasses.replace(result.verdicts[0], verdict="ok", backward=1)
    for verdicts in ([*result.verdicts, fine], [fine, *result.verdicts]):
        shown_ = document(graph, "x", dataclasses.replace(result, verdicts=verdicts))["verdicts"]
        assert shown_["0"]["verdict"] == "wrong"


def test_what_was_changed_in_place_is_named_where_it_makes_a_gradient_wrong(tmp_path):
    file = tmp_path / "program.py"
    file.write_text("import torch\nw = torch.linspace(-2, 2, 5, requires_grad=True)\ny = torch.tanh(w)\n"
                    "y.data.clamp_(-0.5, 0.5)\ny.sum().backward()\n")  # fmt: skip
    with Trace(verify=True) as trace:
        runpy.run_path(str(file))
    text = " ".join(shown(trace.graph, trace.verify().result, 200).replace(str(file), "program.py").split())
    assert "the gradient of tanh at program.py:3" in text
    assert "changed y at program.py:4, after this operation and before its backward: y.data.clamp_(-0.5, 0.5)" in text


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
    assert ("not differentiable here: relu at" in text) == (name == "right/mlp")
    assert result_dict(graph, result)["ok"] is True
