"""Beside a gradient that is NaN or infinite stands what the derivative is there, by number, where there is one."""

import pytest
import torch

import kiem


def root_of_what_is_left_out(x):
    return torch.where(x > 0, x.sqrt(), x)


def root_of_a_square(x):
    return x.square().sqrt()


def quotient_that_is_left_out(x):
    return torch.where(x != 0, 1 - x.cos() / x, 3 * x)


def softplus_by_hand(x):
    return torch.where(x > 50, x, (1 + x.exp()).log())


def root(x):
    return x.sqrt()


@pytest.mark.parametrize(("function", "at", "due"), [
    (root_of_what_is_left_out, 0.0, 1.0), (quotient_that_is_left_out, 0.0, 3.0), (softplus_by_hand, 800.0, 1.0),
])  # fmt: skip
def test_the_derivative_stands_beside_a_gradient_that_is_not_finite(function, at, due):
    x = torch.tensor([2.0, at, 5.0], requires_grad=True)
    with kiem.record(verify=True) as trace:
        function(x).sum().backward()
    found = trace.verify()
    assert found.ok is False
    ((_, leaf),) = found.result.parameters
    assert leaf.verdict == "nonfinite" and leaf.element == (1,) and leaf.got != leaf.got
    assert leaf.expected == pytest.approx(due, rel=1e-6)
    assert f"The gradient of x[1] is nan; moved by itself, the derivative is {due:g}." in found.result.notes
    assert "the derivative is" in str(found)


def test_at_a_corner_both_sides_are_said():
    x = torch.tensor([1.0, 0.0], requires_grad=True)
    with kiem.record(verify=True) as trace:
        root_of_a_square(x).sum().backward()
    notes = trace.verify().result.notes
    assert (
        "The gradient of x[1] is nan; moved by itself, the derivative is -1 from one side and 1 from the other."
        in notes
    )


def test_nothing_is_said_where_there_is_no_derivative():
    x = torch.tensor([1.0, 0.0], requires_grad=True)
    with kiem.record(verify=True) as trace:
        root(x).sum().backward()
    found = trace.verify()
    assert found.ok is False and not [note for note in found.result.notes if "the derivative is" in note]
