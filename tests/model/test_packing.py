"""Packed documents: what a document gets does not depend on what else is in the row (T6)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kiem.config.model import ModelConfig
from kiem.model.transformer import Transformer

BASE = {"vocab_size": 37, "context_length": 24, "emb_dim": 24, "n_heads": 4, "n_layers": 2}
CONFIGS = {
    "learned": ModelConfig(**BASE, qkv_bias=True),
    "rope": ModelConfig(
        **BASE, n_kv_heads=2, norm="rmsnorm", activation="swiglu", position="rope", qk_norm=True, bias=False
    ),
}
lengths = st.lists(st.integers(1, 8), min_size=2, max_size=5).filter(lambda n: sum(n) <= 24)


def build(position: str, recompute: bool = False) -> Transformer:
    model = Transformer(CONFIGS[position], checkpoint_blocks=recompute).initialize(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return model


def pack(n_tokens: list[int], seed: int = 0):
    """tokens, positions, docs of one row, (1, T) each, and the documents' slices."""
    T = sum(n_tokens)
    tokens_BT = torch.randint(37, (1, T), generator=torch.Generator().manual_seed(seed))
    positions_BT = torch.cat([torch.arange(n) for n in n_tokens])[None]
    docs_BT = torch.cat([torch.full((n,), i, dtype=torch.int32) for i, n in enumerate(n_tokens)])[None]
    ends = torch.tensor(n_tokens).cumsum(0).tolist()
    return tokens_BT, positions_BT, docs_BT, [slice(end - n, end) for n, end in zip(n_tokens, ends, strict=True)]


def close(a: torch.Tensor, b: torch.Tensor, bound: float) -> bool:
    return (a - b).norm().item() <= bound * b.norm().item()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("position", CONFIGS)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(n_tokens=lengths)
def test_packed_logits_and_gradients_are_those_of_each_document_alone(position, recompute, n_tokens):
    model = build(position, recompute)
    tokens_BT, positions_BT, docs_BT, parts = pack(n_tokens)
    targets_BT = (tokens_BT * 7 + 3) % 37
    model(tokens_BT, positions_BT=positions_BT, docs_BT=docs_BT, targets_BT=targets_BT)[0].backward()
    packed = {name: p.grad.clone() for name, p in model.named_parameters()}
    logits_BTV = model(tokens_BT, positions_BT=positions_BT, docs_BT=docs_BT)
    model.zero_grad()
    for part in parts:
        assert close(model(tokens_BT[:, part]), logits_BTV[:, part], 1e-5)
        model(tokens_BT[:, part], targets_BT=targets_BT[:, part])[0].backward()
    for name, p in model.named_parameters():
        if not name.endswith("attn.k.bias"):  # its true gradient is zero: see test_parity.py
            assert close(packed[name], p.grad, 1e-5), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("position", CONFIGS)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(n_tokens=lengths, data=st.data())
def test_changing_a_document_changes_no_bit_of_another(position, dtype, n_tokens, data):
    model = build(position).eval()
    model.compute_dtype = dtype
    tokens_BT, positions_BT, docs_BT, parts = pack(n_tokens)
    changed = data.draw(st.integers(0, len(parts) - 1))
    other_BT = tokens_BT.clone()
    other_BT[:, parts[changed]] = (tokens_BT[:, parts[changed]] + 1) % 37
    with torch.no_grad():
        before, after = (model(tokens, positions_BT=positions_BT, docs_BT=docs_BT) for tokens in (tokens_BT, other_BT))
    for i, part in enumerate(parts):
        assert torch.equal(before[:, part], after[:, part]) == (i != changed)


@pytest.mark.parametrize("position", CONFIGS)
def test_rows_are_packed_each_in_its_own_way(position):
    """Two rows with other boundaries, one of them a single document."""
    model = build(position).eval()
    rows = [pack([3, 9], seed=1), pack([12], seed=2)]
    with torch.no_grad():
        tokens_BT, positions_BT, docs_BT = (torch.cat([row[i] for row in rows]) for i in range(3))
        together = model(tokens_BT, positions_BT=positions_BT, docs_BT=docs_BT)
        for b, (tokens_BT, positions_BT, docs_BT, _) in enumerate(rows):
            assert close(together[b : b + 1], model(tokens_BT, positions_BT=positions_BT, docs_BT=docs_BT), 1e-5)


@pytest.mark.parametrize("position", CONFIGS)
def test_across_documents_when_asked_for(position):
    """Without document numbers a later document sees the earlier one, and the first is as it was."""
    model = build(position).eval()
    tokens_BT, positions_BT, docs_BT, (first, second) = pack([5, 6])
    with torch.no_grad():
        apart = model(tokens_BT, positions_BT=positions_BT, docs_BT=docs_BT)
        across = model(tokens_BT, positions_BT=positions_BT)
    assert close(across[:, first], apart[:, first], 1e-5)
    assert not close(across[:, second], apart[:, second], 1e-2)
