"""Which parameter gets what, and the state that a checkpoint holds (T11)."""

import copy
import re

import pytest
import torch
from torch.nn.utils import parametrize

from kiem.config.model import ModelConfig
from kiem.config.run import TrainConfig
from kiem.errors import CheckpointError
from kiem.model.transformer import Transformer
from kiem.optim.groups import build_optimizer, parameter_roles
from kiem.optim.schedule import set_lr
from kiem.optim.state import load_state_tensors, state_tensors

SMALL = ModelConfig(vocab_size=20, context_length=8, emb_dim=8, n_heads=2, n_layers=2)
UNTIED = SMALL.model_copy(update={"tie_embeddings": False})


def build(optimizer="muon", config=SMALL, init="zero_output", weight_decay=0.1):
    model = Transformer(config).initialize(0, init)
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
    seen = [id(p) for group in opt.param_groups for p in group["params"]]
    assert sorted(seen) == sorted(id(p) for p in model.parameters())


def test_weight_decay_reaches_matrices_only():
    """With a gradient of zero an update is the decay alone."""
    for optimizer, decayed in (("adamw", {2}), ("muon", {2})):
        model, opt = build(optimizer)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        opt.step()
        for name, p in model.named_parameters():
            tables_rest = optimizer == "muon" and not name.startswith("blocks.")
            lr = 0.02 if optimizer == "muon" else 0.01
            expected = before[name] * (1 - lr * 0.1) if p.ndim in decayed and not tables_rest else before[name]
            torch.testing.assert_close(p.detach(), expected, rtol=1e-6, atol=0)


def test_embedding_of_deviation_one_moves_faster():
    model, opt = build(config=UNTIED)
    names = {p: name for name, p in model.named_parameters()}
    rates = {names[p]: group["lr"] for group in opt.param_groups for p in group["params"]}
    assert rates["tok_emb.weight"] == pytest.approx(0.01 * 50)
    assert rates["head.weight"] == rates["final_norm.weight"] == pytest.approx(0.01)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("way", ["by name", "as torch"])
def test_state_goes_out_and_comes_back(way, optimizer):
    model, opt = build(optimizer)
    for seed in range(3):
        opt.zero_grad()
        backward(model, seed)
        opt.step()
    twin, twin_opt = build(optimizer)
    twin.load_state_dict(model.state_dict())
    if way == "by name":
        load_state_tensors(twin_opt, twin, {name: t.clone() for name, t in state_tensors(opt, model).items()})
    else:
        twin_opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    for m, o in ((model, opt), (twin, twin_opt)):
        o.zero_grad()
        backward(m, 9)
        set_lr(o, 0.5)
        o.step()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert state_tensors(opt, model).keys() == state_tensors(twin_opt, twin).keys()
    for name, value in state_tensors(opt, model).items():
        assert torch.equal(value, state_tensors(twin_opt, twin)[name]), name


def test_state_that_is_missing_unknown_or_of_another_shape_is_refused_by_name():
    model, opt = build()
    whole = state_tensors(opt, model)
    assert "tok_emb.weight.exp_avg_sq" in whole and "blocks.0.attn.q.weight.momentum" in whole
    before = {name: value.clone() for name, value in whole.items()}
    for changed, said in (
        (
            {n: torch.ones_like(t) for n, t in whole.items() if n != "tok_emb.weight.exp_avg"},
            "tok_emb.weight.exp_avg is missing",
        ),
        (whole | {"nobody.exp_avg": torch.zeros(1)}, "nobody.exp_avg belongs to no parameter"),
        (whole | {"final_norm.weight.exp_avg": torch.zeros(3)}, "final_norm.weight.exp_avg has shape [3]"),
    ):
        with pytest.raises(CheckpointError, match=re.escape(said)):
            load_state_tensors(opt, model, changed)
    assert all(torch.equal(before[name], value) for name, value in state_tensors(opt, model).items())


def test_roles_come_from_the_modules():
    model = Transformer(UNTIED)
    parametrize.register_parametrization(model.head, "weight", torch.nn.Identity())
    parametrize.register_parametrization(model.blocks[0].mlp.up, "weight", torch.nn.Identity())
    roles = parameter_roles(model)
    assert {name for name, role in roles.items() if role == "embedding"} == {"tok_emb.weight", "pos_emb.weight"}
    assert [name for name, role in roles.items() if role == "head"] == ["head.parametrizations.weight.original"]
    assert roles["blocks.0.mlp.up.parametrizations.weight.original"] == "matrix"
    assert {role for name, role in roles.items() if "norm" in name or "bias" in name} == {"vector"}
    assert "head" not in parameter_roles(Transformer(SMALL)).values()
    other = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Conv1d(4, 4, 3), torch.nn.Linear(4, 2))
    assert list(parameter_roles(other).values()) == ["embedding", "vector", "vector", "matrix", "vector"]


def test_torchs_schedulers_and_scaler_drive_it():
    model, opt = build()
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 0.5**step)
    peaks = [group["lr"] for group in opt.param_groups]
    scaler = torch.amp.GradScaler("cpu")
    before = model.blocks[0].mlp.up.weight.detach().clone()
    scaler.scale(model(torch.zeros(1, 8, dtype=torch.int64)).logsumexp(-1).sum()).backward()
    scaler.step(opt)
    scaler.update()
    schedule.step()
    assert [group["lr"] for group in opt.param_groups] == [peak / 2 for peak in peaks]
    assert not torch.equal(before, model.blocks[0].mlp.up.weight)


def test_a_closure_is_called_and_its_loss_returned():
    model, opt = build()

    def closure():
        opt.zero_grad()
        loss = model(torch.zeros(1, 8, dtype=torch.int64)).logsumexp(-1).sum()
        loss.backward()
        return loss

    assert opt.step(closure).item() > 0
    opt.zero_grad(set_to_none=True)
    assert all(p.grad is None for p in model.parameters())


def test_it_is_torchs_adamw_where_it_is_not_muon():
    """The same numbers as torch.optim.AdamW, bit for bit."""
    model, opt = build("adamw")
    twin = copy.deepcopy(model)
    names = {p: name for name, p in model.named_parameters()}
    of_twin = dict(twin.named_parameters())
    groups = [
        {"params": [of_twin[names[p]] for p in g["params"]], "lr": g["lr"], "weight_decay": g["weight_decay"]}
        for g in opt.param_groups
    ]
    theirs = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, fused=True)
    for seed in range(3):
        for m, o in ((model, opt), (twin, theirs)):
            o.zero_grad()
            backward(m, seed)
            o.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
