"""Statistics of tensors, of those without memory as well: to look never ends a program."""

import math

import pytest
import torch
from torch.func import grad, hessian, jacfwd, jvp, vmap

import kiem
from kiem.inspect.graph.model import Graph
from kiem.inspect.graph.stats import UNKNOWN, gradient, statistics
from kiem.inspect.show.document import document
from kiem.inspect.show.summary import totals


def test_zeros_without_memory_are_zeros():
    """Autograd's tangents that are zero: torch's norm reads memory that they do not have."""
    zeros = torch._efficientzerotensor((3, 3), dtype=torch.float64)
    assert statistics(zeros.unsqueeze(0).expand(9, 3, 3)).norm == 0.0
    record = gradient(zeros)
    assert record.data == [[0.0] * 3] * 3 and record.sketch.tolist() == [0.0] * 9


def test_what_has_no_memory_is_unknown_and_not_zero():
    freed = torch.ones(5)
    freed.untyped_storage().resize_(0)
    for tensor in (freed, torch.ones(5, device="meta")):
        assert statistics(tensor) is UNKNOWN and math.isnan(gradient(tensor).stats.norm)


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize(
    "program",
    [
        lambda x: hessian(torch.prod)(x[0]),
        lambda x: hessian(torch.linalg.det)(x),
        lambda x: jacfwd(torch.linalg.det)(x),
        lambda x: jvp(torch.linalg.inv, (x,), (torch.ones_like(x),)),
        lambda x: torch.func.functionalize(lambda y: y.clone().mul_(2))(x),
        lambda x: vmap(jacfwd(torch.sin))(x),
        lambda x: torch.autograd.functional.hessian(torch.prod, x[0]),
    ],
    ids=["prod", "det", "jacfwd", "jvp", "functionalize", "vmap", "autograd"],
)
def test_function_transforms_are_recorded(program, verify):
    x = torch.tensor([[2.0, 0.3, 0.1], [0.2, 1.5, 0.4], [0.5, 0.6, 3.0]], dtype=torch.float64)
    expected = program(x)
    with kiem.record(verify=verify) as trace:
        got = program(x)
    torch.testing.assert_close(got, expected)
    assert trace.graph.ops and str(trace) and trace.verify().ok is not False
    assert not any("could not be recorded" in note for note in trace.graph.notes)


def test_forward_mode_tensors_are_recorded():
    x = torch.tensor([1.0, 2.0])
    with kiem.record() as trace, torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones(2))
        torch.autograd.forward_ad.unpack_dual(dual.sin().sum()).tangent.item()
    assert [op for op in trace.graph.ops if op.label == "sin"]


def test_gradients_inside_vmap_are_those_of_the_batch():
    x = torch.tensor([[3.0, 4.0], [0.0, 12.0]])
    with kiem.record() as trace:
        per_row = vmap(grad(lambda row: row.square().sum() / 2))(x)
    (call,) = trace.graph.backwards
    (of_x,) = call.leaf_grads.values()
    assert torch.equal(per_row, x) and of_x.shape == (2, 2) and of_x.stats.norm == pytest.approx(13.0)


def test_a_document_looks_at_each_operation_once(monkeypatch):
    """Not at all values for each operation: 20,000 operations took minutes."""

    def looks(count):
        with kiem.record() as trace:
            h = torch.ones(2, requires_grad=True)
            for _ in range(count):
                h = h * 1.01
            h.sum().backward()
        seen = []
        values = Graph.values.fget
        monkeypatch.setattr(Graph, "values", property(lambda graph: seen.append(1) or values(graph)))
        told = document(trace.graph, "loop")
        monkeypatch.undo()
        assert len(told["ops"]) > count and totals(trace.graph)["operations"] == len(told["ops"])
        return len(seen)

    assert looks(40) == looks(10)
