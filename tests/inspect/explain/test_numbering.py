"""A training loop's passes: numbered as they ran, those that do the same shown together, gradients by name."""

import io
import re

import pytest
import torch
from rich.console import Console
from torch import nn

import kiem
from kiem.inspect.explain.numbering import alike, numbered, numbers_text, with_number
from kiem.inspect.show.document import document
from kiem.inspect.show.summary import print_summary


def trained(optimizer, steps):
    net = nn.Linear(4, 1)
    step = optimizer(net.parameters())
    x = torch.randn(8, 4)
    with kiem.record() as trace:
        for _ in range(steps):
            step.zero_grad()
            loss = net(x).square().mean()
            loss.backward()
            step.step()
    return trace.graph


def said(graph):
    console = Console(file=io.StringIO(), width=200)
    print_summary(graph, console)
    return console.file.getvalue()


OPTIMIZERS = {
    "none": lambda p: torch.optim.SGD(p, 0.0),
    "SGD": lambda p: torch.optim.SGD(p, 0.1),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("steps", [2, 3, 20])
def test_the_steps_of_a_loop_are_shown_as_one(name, steps):
    graph = trained(OPTIMIZERS[name], steps)
    text = said(graph)
    assert re.search(rf"backward passes 1 to {steps} from loss: \d nodes, 2 gradients each", text)
    assert text.count("from loss") == 1
    assert f"ran {steps} times" in text or not graph.repeats
    (group,) = alike(graph)
    assert sum(one.times for one in group) == steps


def test_profiler_markers_are_not_operations():
    assert not [op.name for op in trained(OPTIMIZERS["AdamW"], 3).ops if "record_function" in op.name]


def test_two_networks_in_turn_and_what_comes_after_have_the_numbers_of_their_turn():
    a, b = torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)
    with kiem.record() as trace:
        for _ in range(10):
            (a * 2).sum().backward()
            (b * 3).sum().backward()
        (a * b[:2]).sum().backward()
    graph = trace.graph
    assert [numbers_text(group) for group in alike(graph)] == [
        "passes 1, 3, … 19 (10)", "passes 2, 4, … 20 (10)", "pass 21",
    ]  # fmt: skip
    assert [call["numbers"] for call in document(graph, "")["backwards"]][-1] == "pass 21"
    kept = graph.backwards
    for number in range(1, 22):
        call = kept[with_number(graph, number)]
        leaves = {graph.value(v).name for v in call.leaf_grads}
        assert leaves == ({"a", "b"} if number == 21 else {"a"} if number % 2 else {"b"})
    assert with_number(graph, 0) is None and with_number(graph, 22) is None
    assert sum(one.times for one in numbered(graph)) == 21


def test_a_loop_in_a_loop_counts_all_its_passes():
    w = torch.ones(3, requires_grad=True)
    with kiem.record() as trace:
        for _ in range(6):
            for _ in range(5):
                loss = (w * 2).sum()
                loss.backward()
            loss.item()
    assert sum(one.times for one in numbered(trace.graph)) == 30


def test_an_accumulated_gradient_has_its_name():
    w = torch.tensor([2.0, 3.0], requires_grad=True)
    x = torch.tensor([1.0, 4.0])
    with kiem.record() as trace:
        for _ in range(3):
            (w * x).sum().backward()
        with torch.no_grad():
            w -= 0.1 * w.grad
    (read,) = [op for op in trace.graph.ops if op.label == "mul" and not op.grad_enabled]
    assert trace.graph.title(read.inputs[0][1]) == "w.grad"
