"""In a program of fine and coarse types each leaf is held to the roundings on its own way to the loss."""

import pytest
import torch
from torch import nn

import kiem


class Scaled(torch.autograd.Function):
    """Right; differentiated again, off by what is lost where one of two factors is held constant."""

    @staticmethod
    def forward(ctx, x, lost):
        ctx.save_for_backward(x)
        ctx.lost = lost
        return x**3

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 3 * g * (x * x * (1 - ctx.lost) + ctx.lost * x.detach() * x), None


def side_branch(lost=0.0, coarse=torch.bfloat16):
    """A penalty on a derivative in float32, and beside it a head in a coarse type."""
    torch.manual_seed(0)
    w, head = nn.Parameter(torch.randn(8, 8) / 3), nn.Parameter((torch.randn(8, 8) / 3).to(coarse))
    x = torch.randn(16, 8, requires_grad=True)
    with kiem.record(verify=True) as trace:
        h = x @ w
        (g,) = torch.autograd.grad(Scaled.apply(h, lost).mean(), x, create_graph=True)
        side = torch.tanh(h.detach().to(coarse) @ head).float().square().mean()
        (g.square().sum() + side).backward()
    found = trace.verify()
    return found, {trace.graph.value(v.value).dtype: v for _, v in found.result.parameters}


def test_a_leaf_in_float32_is_held_to_float32_beside_a_coarse_branch():
    found, leaves = side_branch()
    assert found.ok is True
    assert leaves[torch.float32].sharpness < 1e-4 < leaves[torch.bfloat16].sharpness


@pytest.mark.parametrize("lost", [1e-2, 1e-3])
@pytest.mark.parametrize("coarse", [torch.bfloat16, torch.float16])
def test_a_small_error_is_found_beside_a_coarse_branch(lost, coarse):
    found, leaves = side_branch(lost, coarse)
    assert found.ok is False and leaves[coarse].verdict == "ok"


@pytest.mark.parametrize("seed", range(8))
def test_a_leaf_in_float32_whose_way_leads_through_a_coarse_type_is_held_to_that(seed):
    """The roundings of the coarse part reach the gradient, by value and by derivative, and are no fault."""
    torch.manual_seed(seed)
    enter, leave = nn.Linear(12, 24), nn.Linear(24, 1)
    table = nn.Parameter(torch.randn(24, 24).bfloat16() / 5)
    with kiem.record(verify=True) as trace:
        h = torch.tanh(enter(torch.randn(32, 12)))
        h = h + torch.tanh(h.bfloat16() @ table).float()
        (leave(torch.nn.functional.layer_norm(h, (24,))) + 2).square().mean().backward()
    found = trace.verify()
    assert found.ok is True
    sharp = {trace.graph.title(v.value): v.sharpness for _, v in found.result.parameters}
    assert all(0 < s < 0.5 for s in sharp.values()), sharp
