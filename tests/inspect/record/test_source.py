"""What tensors and modules are called: by the outermost module around them, and by the user's dicts and lists."""

import sys
import types

import torch
from torch import nn

from kiem.inspect.record.recorder import Recorder
from kiem.inspect.record.source import MOST_ENTRIES, source_of, variables
from kiem.inspect.verify.verifier import Verifier


def leaves(program) -> list[str | None]:
    with Recorder() as recorder:
        program()
    return [v.name for v in recorder.graph.leaves()]


def both(*paths: str) -> set[str]:
    return {f"{path}.{part}" for path in paths for part in ("weight", "bias")}


class ByHand(nn.Module):
    """Calls its layers from a method that is no forward, under a receiver that is not called self."""

    def __init__(this, count=2):
        super().__init__()
        this.layers = nn.ModuleList([nn.Linear(2, 2) for _ in range(count)])

    def run(this, x):
        for one in this.layers:
            x = torch.tanh(one(x))
        return x


shared = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))


def test_layers_that_a_method_calls_are_named_by_the_path_from_the_outermost_variable():
    def program():
        net = ByHand()
        net.run(torch.ones(1, 2)).sum().backward()

    def inside():
        outer = nn.ModuleDict({"part": ByHand(1)})
        outer["part"].run(torch.ones(1, 2)).sum().backward()

    def nameless():
        ByHand(1).run(torch.ones(1, 2)).sum().backward()

    assert set(leaves(program)) == both("net.layers.0", "net.layers.1")
    assert set(leaves(inside)) == both("outer.part.layers.0")
    assert set(leaves(nameless)) == both("ByHand.layers.0")


def test_a_model_that_only_the_file_shows():
    def program():
        x = torch.ones(1, 2)
        for layer in shared:
            x = layer(x)
        x.sum().backward()

    assert set(leaves(program)) == both("shared.0", "shared.1")


def test_names_that_are_known_stay_when_a_module_around_them_appears():
    def program():
        first = nn.Linear(2, 2)
        x = first(torch.ones(1, 2))
        net = nn.Sequential(first, nn.Linear(2, 2))
        (net(x) + net[1](x)).sum().backward()

    assert set(leaves(program)) == both("first", "net.1")


def test_two_living_modules_never_share_a_name():
    def program():
        held = {"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)}
        x = torch.ones(1, 2)
        for layer in held.values():
            x = layer(x)
        x.sum().backward()

    assert sorted(leaves(program)) == sorted(both("layer", "layer#2"))


def test_the_name_of_a_module_that_is_gone_is_free_again():
    def program():
        for _ in range(2):
            net = nn.Linear(2, 2)
            net(torch.ones(1, 2)).sum().backward()
            del net

    assert set(leaves(program)) == both("net")


def test_tensors_of_a_dict_or_a_list():
    def program():
        params = {"w1": torch.ones(2, 2, requires_grad=True), 3: torch.ones(2, requires_grad=True)}
        ws = [torch.ones(2, 2, requires_grad=True) for _ in range(2)]
        x = params["w1"] + params[3]
        for w in ws:
            x = x @ w
            x = torch.tanh(x)
        x.sum().backward()

    assert leaves(program) == ['params["w1"]', "params[3]", "ws[0]", "ws[1]"]


def test_variables_of_their_own_are_the_better_names():
    def program():
        a, b = (torch.ones(2, requires_grad=True) for _ in range(2))
        params = [a, b]
        loss = (a * b).sum()
        loss.backward()
        assert params

    assert leaves(program) == ["a", "b"]


def test_other_containers_are_not_looked_through():
    def program():
        t = torch.ones(1)
        mixed, nested, many = [0, t], {"inner": {"w": t}}, [torch.ones(1) for _ in range(MOST_ENTRIES + 1)]
        empty, odd = {}, {("a", 1): torch.ones(1), "w": torch.ones(1)}
        import sys

        return variables(sys._getframe()), (mixed, nested, many, empty, odd)

    (own, held), _ = program()
    assert [name for name, _ in own] == ["t"]
    assert [name for name, _ in held] == [*(f"many[{i}]" for i in range(MOST_ENTRIES)), 'odd["w"]']


def test_results_keep_the_names_of_variables():
    def program():
        batch = {"x": torch.ones(2), "unused": torch.ones(2)}
        x = batch["x"]
        y = x * torch.ones(2, requires_grad=True)
        loss = y.sum()
        loss.backward()

    with Recorder() as recorder:
        program()
    assert {"x", "y", "loss"} <= {v.name for v in recorder.graph.values}


def test_each_parameter_of_a_loop_is_verified_under_its_own_name():
    def program():
        net = ByHand()
        net.run(torch.ones(1, 2)).sum().backward()

    seen = Verifier()
    with Recorder(observer=seen, keep=None) as recorder:
        program()
    found = [recorder.graph.title(v.value) for _, v in seen.result.parameters]
    assert sorted(found) == sorted(both("net.layers.0", "net.layers.1"))


def test_a_line_of_a_notebook_is_named_by_its_cell(monkeypatch):
    file = "/tmp/ipykernel_1/1822453615.py"
    shell = types.SimpleNamespace(compile=types.SimpleNamespace(_filename_map={file: 3}))
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    assert str(source_of(file, 5, "<module>")) == "In[3]:5"
    assert str(source_of("/tmp/ipykernel_1/other.py", 5, "<module>")) == "/tmp/ipykernel_1/other.py:5"
