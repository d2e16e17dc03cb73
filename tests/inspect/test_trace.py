"""kiem.record(): what a program or a notebook asks of a trace."""

import json
import re
from html import unescape

import pytest
import torch
from torch import nn

import kiem
from kiem.errors import ConfigError
from kiem.inspect import trace as trace_module


def small():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    x = torch.randn(4, 2)
    loss = net(x).pow(2).mean()
    loss.backward()
    return net, loss


@pytest.fixture(scope="module")
def recorded():
    with kiem.record() as trace:
        net, loss = small()
    return trace, net, loss


class Half(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, g):
        return g


def test_explain_by_name_and_by_tensor(recorded):
    trace, net, _ = recorded
    by_name, by_tensor = trace.explain("net.0.weight"), trace.explain(net[0].weight)
    assert str(by_name) == str(by_tensor) == repr(by_name) and "dL/dnet.0.weight" in str(by_name)
    assert by_name.chain.ok and by_name.chain.gradient.stats.norm == pytest.approx(net[0].weight.grad.norm().item())


@pytest.mark.parametrize(("leaf", "backward", "told"), [
    ("net.0.wieght", -1, "net.0.weight"),
    (torch.ones(2), -1, "took no part"),
    ("net.0.weight", 1, "made 1 backward call"),
    ("net.0.weight", -2, "made 1 backward call"),
])  # fmt: skip
def test_what_is_not_there(recorded, leaf, backward, told):
    with pytest.raises(ConfigError, match=told):
        recorded[0].explain(leaf, backward)


def test_a_parameter_is_found_by_name_after_the_optimizer_changed_it():
    with kiem.record() as trace:
        net = nn.Linear(2, 1)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            net(torch.ones(1, 2)).sum().backward()
            optimizer.step()
    for call in range(len(trace.graph.backwards)):
        assert trace.explain("net.weight", call).chain.gradient.data == [[1.0, 1.0]]
    assert trace.explain(net.weight).chain.ok


def test_a_name_that_two_calls_of_a_function_use():
    def step(factor):
        w = torch.tensor(1.0, requires_grad=True)
        (w * factor + factor).backward()

    with kiem.record() as trace:
        step(2.0)
        step(torch.tensor(5.0))
    assert trace.explain("w", 0).chain.gradient.data == 2.0 and trace.explain("w").chain.gradient.data == 5.0


def test_verify_afterwards_and_while_running(recorded):
    after = recorded[0].verify()
    with kiem.record(verify=True) as trace:
        small()
    during = trace.verify()
    assert after.ok and during.ok and after.wrong == during.wrong == []
    assert "Every gradient is right" in str(after) and len(after.result.parameters) == 4
    assert [v.verdict for v in after.result.verdicts] == [v.verdict for v in during.result.verdicts]
    json.dumps(during.to_dict(), allow_nan=False)


@pytest.mark.parametrize("verify", [False, True])
def test_a_wrong_gradient_is_named(verify):
    with kiem.record(verify=verify) as trace:
        w = torch.ones(3, requires_grad=True)
        Half.apply(w).sum().backward()
    found = trace.verify()
    assert not found.ok and len(found.wrong) == 1 and re.search(r"test_trace\.py:\d+$", found.wrong[0])
    assert found.to_dict()["operations"][found.to_dict()["first_wrong"]]["label"] == "Half"
    assert "Wrong" in str(found)


def test_too_large_to_keep_says_what_to_do(monkeypatch):
    monkeypatch.setattr(trace_module, "KEEP_BYTES", 1000)
    with kiem.record() as trace:
        w = torch.ones(1000, requires_grad=True)
        w.sin().exp().sum().backward()
    with pytest.raises(ConfigError, match=r"kiem\.record\(verify=True\)"):
        trace.verify()
    assert trace.explain("w").chain.ok  # the rest is there
    with kiem.record(verify=True) as trace:
        w = torch.ones(1000, requires_grad=True)
        w.sin().exp().sum().backward()
    assert trace.verify().ok


def test_in_plain_types_and_as_a_page(recorded, tmp_path):
    trace, *_ = recorded
    told = trace.to_dict()
    json.dumps(told, allow_nan=False)
    assert told["summary"]["backward_calls"] == 1 and len(told["ops"]) == len(trace.graph.ops)
    text = trace.html(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text() == text and text.startswith("<!doctype html>")
    assert {row["name"] for row in trace.tensors()} >= {"net.0.weight", "x", "loss"}
    colored = trace.to_dict(trace.verify().result)
    assert {v["verdict"] for v in colored["verdicts"].values()} == {"ok"}


def test_in_a_notebook_nothing_of_the_program_becomes_html():
    with kiem.record() as trace:
        net = nn.ModuleDict({'"><script>alert(1)</script>': nn.Linear(2, 1)})
        x = torch.ones(1, 2)
        for layer in net.values():
            x = layer(x)
        x.sum().backward()
    shown = trace._repr_html_()
    assert shown.startswith('<iframe srcdoc="') and shown.count("<") == 2 and 'sandbox="allow-scripts"' in shown
    inner = unescape(shown[len('<iframe srcdoc="') : shown.index('" sandbox=')])
    assert inner == trace.html() and "<script>alert" not in inner


def test_str_is_the_summary(recorded):
    text = str(recorded[0])
    assert "recorded program" in text and "backward pass 1 from loss" in text and "dL/dnet.2.bias" in text


def test_an_empty_recording():
    with kiem.record() as trace:
        pass
    assert "0 operations" in str(trace) and not trace.verify().ok and trace.small_chains() == []
    assert trace.html() and trace._repr_html_()
    with pytest.raises(ConfigError, match="made 0 backward calls"):
        trace.explain("x")


def test_an_exception_passes_and_is_explained():
    trace = kiem.record()
    with pytest.raises(RuntimeError, match="cannot be multiplied"), trace:
        x = torch.ones(2, 3)
        x @ x
    failure = trace.graph.failure
    assert failure.kind == "RuntimeError" and failure.source.text == "x @ x" and failure.explanation
    assert "cannot be multiplied" in str(trace) and trace.to_dict()["failure"]["explanation"] == failure.explanation


def test_a_trace_while_it_still_records():
    with kiem.record() as trace:
        w = torch.ones(2, requires_grad=True)
        (w * 3).sum().backward()
        inside = str(trace.explain("w"))
        count = len(trace.graph.ops)
        assert trace.verify().ok
        assert len(trace.graph.ops) == count  # to ask is no part of the program
    assert inside == str(trace.explain("w"))
