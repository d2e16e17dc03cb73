"""Muon by its properties: the update is orthogonal, points where the gradient does, and is the same in any company."""

import pytest
import torch

from kiem.optim.muon import Muon, orthogonalize


@pytest.mark.parametrize("shape", [(8, 8), (16, 64), (64, 16), (96, 100)])
def test_singular_values_near_one(shape):
    generator = torch.Generator().manual_seed(0)
    update = orthogonalize(torch.randn(3, *shape, generator=generator))
    values = torch.linalg.svdvals(update)
    assert values.min() > 0.7 and values.max() < 1.3


def test_singular_vectors_stay():
    """U V^T of a matrix with known factors."""
    generator = torch.Generator().manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(12, 12, generator=generator))
    v, _ = torch.linalg.qr(torch.randn(12, 12, generator=generator))
    g = u @ torch.diag(torch.linspace(0.1, 2.0, 12)) @ v
    inner = u.T @ orthogonalize(g[None])[0] @ v.T
    assert (inner - torch.diag(inner.diagonal())).abs().max() < 1e-4
    assert (inner.diagonal() - 1).abs().max() < 0.3


def test_scale_of_the_gradient_does_not_matter():
    g = torch.randn(1, 10, 20, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(orthogonalize(g), orthogonalize(g * 1e4), rtol=1e-3, atol=1e-4)


def test_zero_gradient_gives_zero_update():
    assert not orthogonalize(torch.zeros(2, 4, 6)).any()


def test_first_step_by_hand():
    """A 1x1 matrix: the direction is the sign, the length lr, after weight decay."""
    p = torch.nn.Parameter(torch.tensor([[2.0]]))
    p.grad = torch.tensor([[-3.0]])
    Muon([p], lr=0.05, weight_decay=0.5).step()
    sign = -orthogonalize(torch.tensor([[[-1.0]]])).item()
    assert sign == pytest.approx(1.0, abs=0.3)
    assert p.item() == pytest.approx(2.0 * (1 - 0.05 * 0.5) + 0.05 * sign, rel=1e-5)


def test_momentum_is_a_mean_of_gradients():
    p = torch.nn.Parameter(torch.zeros(2, 2))
    muon = Muon([p], lr=0.1, weight_decay=0.0, momentum=0.75)
    for value in (1.0, 2.0):
        p.grad = torch.full((2, 2), value)
        muon.step()
    assert torch.equal(muon.state[p]["momentum"], torch.full((2, 2), 0.75 * 0.25 * 1.0 + 0.25 * 2.0))


def test_grouping_by_shape_changes_nothing():
    generator = torch.Generator().manual_seed(0)
    grads = {name: torch.randn(6, 9, generator=generator) for name in "abc"}
    together = {n: torch.nn.Parameter(torch.zeros(6, 9)) for n in grads}
    alone = {n: torch.nn.Parameter(torch.zeros(6, 9)) for n in grads}
    for params in (together, alone):
        for n, p in params.items():
            p.grad = grads[n].clone()
    Muon(together.values(), 0.1).step()
    for n, p in alone.items():
        Muon([p], 0.1).step()
        torch.testing.assert_close(together[n], p, rtol=1e-5, atol=1e-6)


def test_what_is_not_a_matrix_is_refused():
    with pytest.raises(ValueError, match="matrices"):
        Muon([torch.nn.Parameter(torch.zeros(3))])
