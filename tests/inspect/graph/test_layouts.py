"""Tensors that are not strided: what they hold and back, and gradients at what they hold."""

import pytest
import torch

from kiem.inspect.graph import layouts
from kiem.inspect.graph.layouts import at_elements, elements, sums_modulo, with_elements, written_out
from kiem.inspect.verify.float64 import attention, grouped_mm, lstm_layer, without_out
from kiem.inspect.verify.precision import unit_of_products


def dense():
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).relu()


def uncoalesced():
    places = torch.tensor([[0, 1, 1, 4], [1, 2, 2, 0]])
    return torch.sparse_coo_tensor(places, torch.arange(1.0, 5, dtype=torch.float64), (5, 4))


def jagged():
    rows = [torch.randn(n, 3, dtype=torch.float64) for n in (2, 4)]
    return torch.nested.nested_tensor(rows, layout=torch.jagged)


SPARSE = {
    "coo": lambda: dense().to_sparse(), "csr": lambda: dense().to_sparse_csr(), "csc": lambda: dense().to_sparse_csc(),
    "hybrid": lambda: dense().to_sparse(1), "not coalesced": uncoalesced,
    "bsr": lambda: torch.arange(16.0).reshape(4, 4).to_sparse_bsr((2, 2)),
}  # fmt: skip
ALL = SPARSE | {"jagged": jagged}


@pytest.mark.parametrize("layout", ALL)
def test_there_and_back(layout):
    tensor = ALL[layout]()
    held = elements(tensor).detach().clone().requires_grad_()
    back = with_elements(tensor, held)
    assert back.layout == tensor.layout and back.requires_grad
    assert torch.equal(elements(back), held)
    if layout in SPARSE:
        assert torch.equal(back.to_dense(), tensor.to_dense())


@pytest.mark.parametrize("layout", ["coo", "csr", "hybrid", "not coalesced"])
@pytest.mark.parametrize("given", ["strided", "coo", "csr"])
def test_a_gradient_at_the_elements(layout, given):
    like = SPARSE[layout]()
    gradient = torch.randn(5, 4, dtype=torch.float64)
    gradient[2] = 0  # a sparse one does not hold it
    made = {"strided": gradient, "coo": gradient.to_sparse(), "csr": gradient.to_sparse_csr()}[given]
    expected = with_elements(like, torch.ones_like(elements(like))).to_dense().ne(0) * gradient
    if layout == "not coalesced":
        expected = expected.clone()
    assert torch.equal(with_elements(like, at_elements(made, like)).to_dense(), expected)


def test_a_sparse_gradient_of_a_strided_tensor_is_written_out():
    assert torch.equal(at_elements(dense().to_sparse(), torch.zeros(5, 4)), dense())


@pytest.mark.parametrize("layout", ["coo", "csr", "hybrid", "not coalesced"])
@pytest.mark.parametrize("modulus", [3, 4, 64])
def test_the_digest_of_a_sparse_tensor_is_that_of_what_it_stands_for(layout, modulus):
    tensor = SPARSE[layout]()
    flat = written_out(tensor).sum(0) if modulus <= tensor.shape[-1] else written_out(tensor).reshape(-1)
    expected = torch.zeros(modulus, dtype=torch.float64)
    expected.index_add_(0, torch.arange(flat.numel()) % modulus, flat)
    assert torch.allclose(sums_modulo(tensor, modulus), expected, rtol=1e-14)


def test_a_large_sparse_tensor_is_never_written_out():
    places = torch.randint(0, 1 << 20, (2, 10), generator=torch.Generator().manual_seed(0))
    huge = torch.sparse_coo_tensor(places, torch.ones(10), (1 << 20, 1 << 20)).coalesce()
    assert not layouts.can_be_written_out(huge)
    assert sums_modulo(huge, 64).sum() == 10 and layouts.readable(huge).numel() == 10
    assert torch.equal(at_elements(huge, huge), torch.ones(10))


def test_an_lstm_layer_written_out_is_torchs():
    torch.manual_seed(0)
    for reverse in (False, True):
        module = torch.nn.LSTM(3, 4, bidirectional=True, dtype=torch.float64)
        x = torch.randn(5, 2, 3, dtype=torch.float64)
        suffix = "_reverse" if reverse else ""
        weights = [getattr(module, f"{name}_l0{suffix}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
        zero = torch.zeros(1, 2, 4, dtype=torch.float64)
        y, h, c = lstm_layer(x, *weights, zero, zero, reverse, [], 2, 4, 1, True, False, False, True)
        expected, (hidden, cell) = module(x)
        assert torch.allclose(y, expected[..., 4 * reverse : 4 * reverse + 4], rtol=0, atol=1e-14)
        assert torch.allclose(h[0], hidden[int(reverse)], rtol=0, atol=1e-14)
        assert torch.allclose(c[0], cell[int(reverse)], rtol=0, atol=1e-14)
    with pytest.raises(NotImplementedError, match="no LSTM"):
        lstm_layer(x, *weights, zero, zero, False, [], 3, 4, 1, True, False, False, True)


@pytest.mark.parametrize("heads", [4, 2])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_written_out_is_torchs(heads, causal):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, h, 6, 8, dtype=torch.float64) for h in (4, heads, heads))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    given, sums = attention(q, k, v, causal=causal)
    assert torch.allclose(given, expected, rtol=0, atol=1e-13) and sums.shape == (2, 4, 6)


@pytest.mark.parametrize(
    "shapes", [((12, 8), (3, 8, 4)), ((3, 4, 8), (8, 12)), ((4, 12), (12, 8)), ((3, 4, 8), (3, 8, 4))]
)
def test_grouped_products_written_out_are_torchs(shapes):
    torch.manual_seed(0)
    a, b = (torch.randn(shape) for shape in shapes)
    offs = None if a.dim() == 3 == b.dim() else torch.tensor([3, 8, 12], dtype=torch.int32)
    columns = b.mT.contiguous().mT  # torch wants them so
    (given,) = grouped_mm(a.double(), columns.double(), offs)
    assert torch.allclose(given.float(), torch.ops.aten._grouped_mm(a, columns, offs), rtol=1e-5, atol=1e-5)


def test_an_operation_that_writes_its_result_has_one_that_returns_it():
    aten = torch.ops.aten
    assert without_out(aten.mm.out) == (aten.mm.default, {"out"})
    assert without_out(aten.add.out) == (aten.add.Tensor, {"out"})
    assert without_out(aten.add_.Tensor) == (aten.add_.Tensor, frozenset())


@pytest.mark.parametrize(
    "label, backend", [("convolution", torch.backends.cudnn.conv), ("mm", torch.backends.cuda.matmul)]
)
def test_products_that_torch_may_round_are_known(label, backend):
    before = backend.fp32_precision
    try:
        for setting, unit in (("ieee", 0), ("tf32", 2**-10)):
            backend.fp32_precision = setting
            assert unit_of_products(label, "cuda") == unit
            assert unit_of_products("add", "cuda") == 0 == unit_of_products(label, "mps")
    finally:
        backend.fp32_precision = before
