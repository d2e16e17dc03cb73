"""Where torch's own derivative is wrong: the operation is found, and the whole gradient does not count it as a
witness."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import kiem

TWICE, ONCE = torch.tensor([0, 0, 1, 2]), torch.tensor([3, 0, 1, 2])  # documented: "behavior is nondeterministic"


def written_over(write, places):
    """What is written twice to one place: only one of both is there, and torch gives a gradient to both."""
    w = nn.Parameter(torch.randn(4))
    write(torch.zeros(5), places, w * 2).square().sum().backward()


OVERWRITING = {
    "scatter": lambda x, places, values: x.scatter(0, places, values),
    "index_put": lambda x, places, values: x.index_put((places,), values),
    "index_copy": lambda x, places, values: x.index_copy(0, places, values),
}  # fmt: skip


def memory_seen_twice():
    w, rows = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(2, 2))
    torch.as_strided_scatter(w * 1, rows * 1, (2, 2), (1, 1)).square().sum().backward()


def no_hermitian_matrix():
    w = nn.Parameter(torch.randn(3, 3))
    torch.linalg.pinv(w * 1, hermitian=True).square().sum().backward()


def verification(program):
    torch.manual_seed(0)
    with kiem.record(verify=True) as trace:
        program()
    return trace.verify()


@pytest.mark.parametrize("name", OVERWRITING)
def test_a_value_that_was_written_over_has_no_gradient(name):
    found = verification(lambda: written_over(OVERWRITING[name], TWICE))
    assert [v.verdict for v in found.result.wrong] == ["wrong"] and len(found.result.wrong_parameters) == 1
    assert verification(lambda: written_over(OVERWRITING[name], ONCE)).ok is True


@pytest.mark.parametrize("program", [memory_seen_twice, no_hermitian_matrix])
def test_a_parameter_whose_way_leads_through_a_wrong_operation_is_not_right(program):
    """Its reference is torch's derivative in float64, wrong in the same way: the number decides."""
    found = verification(program)
    assert len(found.result.wrong) == 1
    for _, leaf in found.result.parameters:
        agrees = abs(leaf.along - leaf.numeric) <= 1e-4 * abs(leaf.numeric) + leaf.numeric_error
        assert leaf.verdict == ("ok" if agrees else "wrong")
    assert found.result.wrong_parameters


def test_a_random_slope_that_a_checkpoint_loses_is_wrong():
    """Whether torch loses it depends on what was in the memory before."""

    def gradients(block, run):
        torch.manual_seed(1)
        block.zero_grad()
        run(block).square().sum().backward()
        return [p.grad.clone() for p in block.parameters()]

    block, x = nn.Sequential(nn.Linear(8, 8), nn.RReLU(0.1, 0.4)), torch.randn(16, 8)
    plain = gradients(block, lambda block: block(x))
    with kiem.record(verify=True) as trace:
        got = gradients(block, lambda block: checkpoint(block, x, use_reentrant=False))
    right = all(map(torch.allclose, got, plain))
    assert trace.verify().ok is right
    with kiem.record(verify=True) as trace:
        gradients(block, lambda block: block(x))
    assert trace.verify().ok is True
