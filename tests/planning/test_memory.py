"""The arithmetic of memory against what autograd saves and what a real step allocates."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from kiem.config.model import ModelConfig
from kiem.config.presets import resolve
from kiem.config.run import RunConfig, TrainConfig
from kiem.data.loader import Batch
from kiem.model.ops import cross_entropy
from kiem.model.transformer import Transformer
from kiem.optim.groups import build_optimizer
from kiem.optim.state import state_tensors
from kiem.planning import memory as plan_memory
from kiem.planning.memory import block_activations, memory, micro_batch, outer_activations
from kiem.training.objective import NextToken
from kiem.training.step import train_step

GPT2 = {"vocab_size": 300, "context_length": 64, "emb_dim": 64, "n_heads": 4, "n_layers": 3}
MODERN = {
    "norm": "rmsnorm",
    "activation": "swiglu",
    "position": "rope",
    "qk_norm": True,
    "bias": False,
    "n_kv_heads": 2,
    "hidden_dim": 160,
}


def resolved(model: dict, rows: int, micro_batches: int = 1, **train) -> RunConfig:
    tokens = rows * model["context_length"]
    train = TrainConfig(
        tokens=100 * tokens * micro_batches, batch_tokens=tokens * micro_batches, micro_batch_tokens=tokens, **train
    )
    return resolve(RunConfig(model=ModelConfig(**model), train=train), 2)


def random_batch(model: ModelConfig, rows: int, packed: bool) -> Batch:
    T = model.context_length
    tokens_BT = torch.randint(0, model.vocab_size, (rows, T))
    docs_BT = (torch.arange(T) >= (T // 2 if packed else T)).int().expand(rows, T).contiguous()
    return Batch(tokens_BT, tokens_BT.clone(), torch.arange(T).expand(rows, T).contiguous(), docs_BT, rows * T)


def saved_bytes(model: Transformer, batch: Batch) -> int:
    """Bytes of distinct storages kept for backward, without weights and the batch itself."""
    given = [*model.parameters(), batch.tokens_BT, batch.positions_BT]
    model.head = torch.nn.Identity()  # what the head keeps is counted with the loss
    known = {t.untyped_storage().data_ptr() for t in given}
    saved = {}

    def pack(t):
        if (place := t.untyped_storage().data_ptr()) not in known:
            saved[place] = t.detach()  # held, so that no other tensor takes its place
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(batch.tokens_BT, positions_BT=batch.positions_BT, docs_BT=batch.docs_BT)
    return sum(t.untyped_storage().nbytes() for t in saved.values())


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"drop_rate": 0.1},
        {"qkv_bias": True, "activation": "gelu"},
        MODERN,
        {**MODERN, "qk_norm": False},
        {**MODERN, "drop_rate": 0.1, "tie_embeddings": False},
        {"position": "rope", "n_kv_heads": 1, "head_dim": 8},
    ],
)
def test_activations_are_what_autograd_saves(fields, dtype, packed):
    model = ModelConfig(**{**GPT2, **fields})
    built = Transformer(model, compute_dtype=dtype).initialize(0).train()
    saved = saved_bytes(built, random_batch(model, 2, packed))
    rows = plan_memory.Rows(2, model.context_length, dtype.itemsize, packed)
    counted = outer_activations(model, rows) + model.n_layers * block_activations(model, rows)
    assert counted == pytest.approx(saved, rel=0.005)


def step_bytes(config: RunConfig, dtype: torch.dtype) -> int:
    """Most bytes allocated at one time inside a step, on top of weights and moments, by the allocator's own record."""
    model = Transformer(config.model, dtype, config.train.activation_checkpointing).initialize(0).train()
    optimizer = build_optimizer(model, config.train)
    context = config.model.context_length
    rows, micro = config.train.batch_tokens // context, config.train.micro_batch_tokens // context
    batches = random_batch(config.model, rows, True).micro(micro)
    train_step(NextToken(), model, optimizer, batches, config.train, 0)
    optimizer.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as record:
        train_step(NextToken(), model, optimizer, batches, config.train, 0)
    events = [(e.start_ns(), e.nbytes()) for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for _, change in sorted(events):
        now += change
        most = max(most, now)
    return most


@pytest.mark.parametrize(
    ("model", "rows", "train"),
    [
        (GPT2, 8, {}),  # the peak is at the end of forward
        ({**GPT2, "drop_rate": 0.1}, 4, {"optimizer": "adamw"}),
        ({**GPT2, **MODERN}, 8, {"micro_batches": 2}),  # with gradients of the first beside the second
        ({**GPT2, **MODERN, "vocab_size": 5000}, 1, {"optimizer": "adamw"}),  # in the loss
        ({**GPT2, "emb_dim": 128}, 1, {}),  # in the update
        ({**GPT2, **MODERN, "n_layers": 6}, 8, {"activation_checkpointing": True}),
    ],
)
def test_the_peak_of_a_step_is_what_it_allocates(model, rows, train, monkeypatch):
    for module, name in ((cross_entropy, "CHUNK_ELEMENTS"), (plan_memory, "LOSS_CHUNK_ELEMENTS")):
        monkeypatch.setattr(module, name, 1 << 17)  # several chunks also here
    config = resolved(model, rows, **train)
    needs = memory(config.model, config.train, 4)
    assert needs.peak - needs.weights - needs.optimizer - needs.batch == pytest.approx(
        step_bytes(config, torch.float32), rel=0.05
    )


def test_the_optimizer_is_its_state():
    for name in ("muon", "adamw"):
        config = resolved({**GPT2, **MODERN}, 1, optimizer=name)
        model = Transformer(config.model).initialize(0)
        optimizer = build_optimizer(model, config.train)
        train_step(NextToken(), model, optimizer, [random_batch(config.model, 1, False)], config.train, 0)
        counted = memory(config.model, config.train, 4).optimizer
        assert sum(t.nbytes for t in state_tensors(optimizer, model).values()) == counted


def test_constants_are_those_of_the_code():
    assert plan_memory.LOSS_CHUNK_ELEMENTS == cross_entropy.CHUNK_ELEMENTS
    batch = random_batch(ModelConfig(**GPT2), 2, True)
    tensors = (batch.tokens_BT, batch.targets_BT, batch.positions_BT, batch.docs_BT)
    assert sum(t.nbytes for t in tensors) == 2 * 64 * plan_memory.BATCH_BYTES_PER_TOKEN


def test_kinds_follow_their_causes():
    config = resolved(GPT2, 8, micro_batches=4)
    base = memory(config.model, config.train, 4)

    def changed(**fields):
        return memory(config.model, config.train.model_copy(update=fields), 4)

    assert changed(micro_batch_tokens=config.train.micro_batch_tokens // 2).activations == base.activations // 2
    assert changed(activation_checkpointing=True).activations < base.activations / 4
    twice = changed(batch_tokens=2 * config.train.batch_tokens)
    assert twice.peak - base.peak == base.batch  # accumulation is flat but for the tokens themselves
    assert changed(optimizer="adamw").optimizer > base.optimizer
    assert memory(config.model, config.train, 4, packed=False).activations < base.activations
    assert config.train.micro_batch_tokens == micro_batch(config.model, config.train, 4, True).N
