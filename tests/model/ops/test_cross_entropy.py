"""The chunked loss is its plain twin, for every mask, data type and chunk size."""

import math

import pytest
import torch

from kiem.model.ops import cross_entropy
from kiem.model.ops.cross_entropy import linear_cross_entropy, linear_cross_entropy_plain

EPS = torch.finfo(torch.float32).eps


def both(x_ND, weight_VD, targets_N):
    results = []
    for loss_of in (linear_cross_entropy, linear_cross_entropy_plain):
        x, w = x_ND.clone().requires_grad_(), weight_VD.clone().requires_grad_()
        loss = loss_of(x, w, targets_N)
        (loss / 7).backward()
        results.append((loss.detach(), x.grad, w.grad))
    return results


def relative_error(a, b):
    return ((a - b).norm() / b.norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize("mask", ["none", "some", "first", "all but one", "all"])
@pytest.mark.parametrize("rows", [1, 3, 64])
def test_equals_its_twin(monkeypatch, mask, rows):
    N, D, V = 37, 24, 101
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", rows * V)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, D, generator=generator)
    weight = torch.randn(V, D, generator=generator)
    targets = torch.randint(0, V, (N,), generator=generator)
    hidden = {"none": [], "some": range(0, N, 3), "first": range(20), "all but one": range(1, N), "all": range(N)}[mask]
    targets[list(hidden)] = -100
    fast, plain = both(x, weight, targets)
    # A sum of V exponentials and N losses in another order: at most sqrt(V * N) roundings, 4 for the chain.
    bound = 4 * EPS * math.sqrt(V * N)
    for a, b in zip(fast, plain, strict=True):
        assert relative_error(a, b) < bound
    if mask == "all":
        assert fast[0] == 0 and not fast[1].any() and not fast[2].any()


def test_value_by_hand():
    # Two classes with logits 0 and ln 3: probabilities 1/4 and 3/4.
    x, weight = torch.tensor([[1.0]]), torch.tensor([[0.0], [math.log(3.0)]])
    assert linear_cross_entropy(x, weight, torch.tensor([0])).item() == pytest.approx(math.log(4), rel=1e-6)
    assert linear_cross_entropy(x, weight, torch.tensor([1])).item() == pytest.approx(math.log(4 / 3), rel=1e-6)


def test_large_logits_stay_finite():
    x, weight = torch.tensor([[1e4]]), torch.tensor([[1.0], [-1.0]])
    assert linear_cross_entropy(x, weight, torch.tensor([0])).item() == 0.0
    assert linear_cross_entropy(x, weight, torch.tensor([1])).item() == pytest.approx(2e4)


def test_bfloat16_features_and_float32_weights():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 32, generator=generator).bfloat16()
    weight = torch.randn(50, 32, generator=generator)
    targets = torch.randint(0, 50, (64,), generator=generator)
    fast, plain = both(x, weight, targets)
    assert fast[1].dtype == torch.bfloat16 and fast[2].dtype == torch.float32
    # The twin rounds the gradient of the logits to bfloat16 as the fast path does; sums of N and V terms follow.
    for a, b in zip(fast, plain, strict=True):
        assert relative_error(a.float(), b.float()) < 4 * torch.finfo(torch.bfloat16).eps


def test_never_holds_the_full_logits():
    """The largest tensor made in forward and backward is a chunk, not (N, V)."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else (out,):
                if isinstance(t, torch.Tensor):
                    self.elements = max(self.elements, t.numel())
            return out

    N, D, V = 4096, 8, 50_000
    x, weight = torch.randn(N, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    with Largest() as seen:
        linear_cross_entropy(x, weight, torch.zeros(N, dtype=torch.int64)).backward()
    assert cross_entropy.CHUNK_ELEMENTS // 2 < seen.elements <= cross_entropy.CHUNK_ELEMENTS < N * V


def test_a_second_backward_is_refused_not_wrong():
    x, weight = torch.randn(4, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    loss = linear_cross_entropy(x, weight, torch.arange(4)) / 3
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_without_gradients_none_are_made(monkeypatch):
    """In an evaluation the head's gradient, as large as the head, must not be made."""
    made = []
    zeros_like = torch.zeros_like
    monkeypatch.setattr(torch, "zeros_like", lambda *a, **k: made.append(a[0].shape) or zeros_like(*a, **k))
    weight = torch.randn(50, 8, requires_grad=True)
    with torch.no_grad():
        linear_cross_entropy(torch.randn(6, 8), weight, torch.arange(6))
    assert made == []
