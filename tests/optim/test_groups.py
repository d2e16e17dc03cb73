"""Which parameter gets what, and the state that a checkpoint holds (T11)."""

import pytest
import torch

from kiem.config.model import ModelConfig
from kiem.config.run import TrainConfig
from kiem.model.transformer import Transformer
from kiem.optim.groups import build_optimizer

SMALL = ModelConfig(vocab_size=20, context_length=8, emb_dim=8, n_heads=2, n_layers=2)
UNTIED = SMALL.model_copy(update={"tie_embeddings": False})


def build(optimizer="muon", config=SMALL, init="zero_output", weight_decay=0.1):
    model = Transformer(config).initialise(0, init)
    train = TrainConfig(
        tokens=100,
        batch_tokens=8,
        optimizer=optimizer,
        lr=0.01,
        weight_decay=weight_decay,
        init=init,
        matrix_lr=0.02 if optimizer == "muon" else None,
        warmup_tokens=0,
        cooldown_tokens=0,
    )
    return model, build_optimizer(model, train)


def backward(model, seed=0):
    tokens = torch.randint(0, 20, (2, 8), generator=torch.Generator().manual_seed(seed))
    model(tokens).logsumexp(-1).sum().backward()


@pytest.mark.parametrize("config", [SMALL, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_every_parameter_is_updated_exactly_once(optimizer, config):
    model, opt = build(optimizer, config)
    seen = [id(p) for group in opt.adamw.param_groups for p in group["params"]]
    seen += [id(p) for p in (opt.muon.parameters.values() if opt.muon else ())]
    assert sorted(seen) == sorted(id(p) for p in model.parameters())


def test_weight_decay_reaches_matrices_only():
    """With a gradient of zero an update is the decay alone."""
    for optimizer, decayed in (("adamw", {2}), ("muon", {2})):
        model, opt = build(optimizer)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        opt.step(1.0)
        for name, p in model.named_parameters():
            tables_rest = optimizer == "muon" and not name.startswith("blocks.")
            lr = 0.02 if optimizer == "muon" else 0.01
            expected = before[name] * (1 - lr * 0.1) if p.ndim in decayed and not tables_rest else before[name]
            torch.testing.assert_close(p.detach(), expected, rtol=1e-6, atol=0)


def test_embedding_of_deviation_one_moves_faster():
    _, opt = build(config=UNTIED)
    rates = {opt.names[id(p)]: group["lr"] for group in opt.adamw.param_groups for p in group["params"]}
    assert rates["tok_emb.weight"] == pytest.approx(0.01 * 50)
    assert rates["head.weight"] == rates["final_norm.weight"] == pytest.approx(0.01)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_state_goes_out_and_comes_back(optimizer):
    model, opt = build(optimizer)
    for seed in range(3):
        opt.zero_grad()
        backward(model, seed)
        opt.step(1.0)
    state = {name: t.clone() for name, t in opt.state_tensors().items()}
    twin, twin_opt = build(optimizer)
    twin.load_state_dict(model.state_dict())
    twin_opt.load_state_tensors(state)
    assert twin_opt.state_tensors().keys() == state.keys()
    for m, o in ((model, opt), (twin, twin_opt)):
        o.zero_grad()
        backward(m, 9)
        o.step(0.5)
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q), name
    for name, value in opt.state_tensors().items():
        assert torch.equal(value, twin_opt.state_tensors()[name]), name


def test_state_of_another_model_is_refused():
    _, opt = build()
    with pytest.raises(KeyError, match="unknown"):
        opt.load_state_tensors(opt.state_tensors() | {"nobody.exp_avg": torch.zeros(1)})
