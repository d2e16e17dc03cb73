"""One update: the same whatever way the batch is cut (T1), refused when not finite (T2), and it reaches everything
(T18)."""

import math

import pytest
import torch
import torch.multiprocessing as mp

from kiem.config.model import ModelConfig
from kiem.config.run import TrainConfig
from kiem.data.loader import Batch
from kiem.errors import NumericsError
from kiem.model.transformer import Transformer
from kiem.optim.groups import build_optimizer
from kiem.optim.state import state_tensors
from kiem.parallel.ranks import Ranks
from kiem.training.objective import NextToken
from kiem.training.step import train_step

B, T, V = 8, 16, 40
GPT2 = ModelConfig(vocab_size=V, context_length=T, emb_dim=16, n_heads=2, n_layers=2, qkv_bias=True)
QWEN3 = ModelConfig(
    vocab_size=V,
    context_length=T,
    emb_dim=16,
    n_heads=4,
    n_kv_heads=2,
    n_layers=2,
    norm="rmsnorm",
    position="rope",
    qk_norm=True,
    activation="swiglu",
    bias=False,
    tie_embeddings=False,
)
TRAIN = TrainConfig(
    tokens=10 * B * T,
    batch_tokens=B * T,
    lr=0.01,
    matrix_lr=0.02,
    weight_decay=0.01,
    warmup_tokens=0,
    cooldown_tokens=0,
    init="zero_output",
)
ADAMW = TRAIN.model_copy(update={"optimizer": "adamw", "matrix_lr": None, "init": "gpt2"})


def make_batch(seed=0):
    """Uneven masks: row r keeps every (r + 1)-th target."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, V, (B, T), generator=generator)
    targets = torch.randint(0, V, (B, T), generator=generator)
    for row in range(B):
        targets[row][torch.arange(T) % (row + 1) != 0] = -100
    positions = torch.arange(T).expand(B, T)
    return Batch(tokens, targets, positions, torch.zeros(B, T, dtype=torch.int32), int((targets != -100).sum()))


def make_model(config=QWEN3, init="gpt2"):
    return Transformer(config).initialize(0, init)


def gradients(rows_per_micro_batch):
    """Gradients as the step computes them, taken before the update (a clip of everything is off, lr does not
    matter)."""
    model = make_model()
    optimizer = build_optimizer(model, TRAIN)
    train = TRAIN.model_copy(update={"max_grad_norm": 0.0})
    result = train_step(NextToken(), model, optimizer, make_batch().micro(rows_per_micro_batch), train, 0)
    return result, {name: p.grad for name, p in model.named_parameters()}


def assert_same(a, b):
    # float32 sums over the same terms in another order: norm-wise 1e-6
    for name in a:
        assert (a[name] - b[name]).norm() <= 1e-6 * b[name].norm(), name


@pytest.mark.parametrize("rows", [4, 2, 1, 3])
def test_accumulation_changes_nothing(rows):
    whole, reference = gradients(B)
    parts, found = gradients(rows)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-6) and parts.weight == whole.weight == make_batch().n_valid
    assert_same(found, reference)


def _rank(rank, port, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    rows = make_batch().micro(4)[rank]
    model = make_model()
    train = TRAIN.model_copy(update={"max_grad_norm": 0.0})
    result = train_step(NextToken(), model, build_optimizer(model, train), rows.micro(2), train, 0, Ranks.here())
    torch.save(
        {
            "loss": result.loss,
            "weight": result.weight,
            "grad_norm": result.grad_norm,
            **{n: p.grad for n, p in model.named_parameters()},
        },
        f"{folder}/{rank}.pt",
    )
    torch.distributed.destroy_process_group()


def test_two_ranks_change_nothing(tmp_path):
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.start_processes(_rank, (port, str(tmp_path)), nprocs=2, start_method="fork")
    whole, reference = gradients(B)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert found.pop("loss") == pytest.approx(whole.loss, rel=1e-6)
        assert found.pop("weight") == whole.weight
        assert found.pop("grad_norm") == pytest.approx(whole.grad_norm, rel=1e-6)
        assert_same(found, reference)


def test_loss_is_a_mean_over_valid_tokens():
    """A model whose logits are all equal loses ln V on each token, whatever the mask."""
    model = make_model(init="zero_output")  # the head is zero
    result = train_step(NextToken(), model, build_optimizer(model, TRAIN), make_batch().micro(2), TRAIN, 0)
    assert result.loss == pytest.approx(math.log(V), rel=1e-6)


@pytest.mark.parametrize("train", [TRAIN, ADAMW], ids=["muon", "adamw"])
@pytest.mark.parametrize("config", [GPT2, QWEN3], ids=["gpt2", "qwen3"])
def test_everything_learns_in_ten_steps(config, train):
    model = make_model(config, train.init)
    optimizer = build_optimizer(model, train)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    had_gradient = set()
    losses = []
    for step in range(10):
        losses.append(train_step(NextToken(), model, optimizer, [make_batch()], train, step * B * T).loss)
        had_gradient |= {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    # A key's bias shifts all scores of a query alike, which softmax ignores: its gradient is rounding, not learning.
    names = set(before)
    assert had_gradient == names
    assert {n for n, p in model.named_parameters() if not torch.equal(p, before[n])} == names
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_is_refused_before_the_update(where):
    model = make_model()
    optimizer = build_optimizer(model, TRAIN)
    train_step(NextToken(), model, optimizer, [make_batch()], TRAIN, 0)
    if where == "loss":
        with torch.no_grad():
            model.blocks[0].mlp.up.weight[0, 0] = float("nan")
    else:
        model.blocks[1].attn.v.weight.register_hook(lambda g: g.index_fill(0, torch.tensor([3]), float("inf")))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    state = {n: t.clone() for n, t in state_tensors(optimizer, model).items()}
    with pytest.raises(NumericsError, match="update was refused"):
        train_step(NextToken(), model, optimizer, [make_batch(1)], TRAIN, B * T)
    for name, p in model.named_parameters():
        assert torch.equal(torch.nan_to_num(p), torch.nan_to_num(before[name])), name
    for name, t in state_tensors(optimizer, model).items():
        assert torch.equal(t, state[name]), name


def test_clipping_by_hand():
    """The update of plain AdamW does not show the gradient's length; the gradients left behind do."""
    model = make_model()
    train = TRAIN.model_copy(update={"max_grad_norm": 0.01})
    result = train_step(NextToken(), model, build_optimizer(model, train), [make_batch()], train, 0)
    norm = torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in model.parameters()])).item()
    assert result.grad_norm > 0.01
    assert norm == pytest.approx(0.01, rel=1e-5)


def test_memory_is_flat_in_accumulation():
    """A step of 16 micro-batches holds no more at once than a step of 2: the graph of each is freed before the next."""
    from torch.autograd.graph import saved_tensors_hooks

    held, most = 0, 0

    class Kept:
        def __init__(self, tensor):
            nonlocal held, most
            self.tensor = tensor
            held += tensor.numel()
            most = max(most, held)

        def __del__(self):
            nonlocal held
            held -= self.tensor.numel()

    peaks = []
    for n in (2, 16):
        held = most = 0
        model = make_model()
        with saved_tensors_hooks(Kept, lambda kept: kept.tensor):
            train_step(NextToken(), model, build_optimizer(model, TRAIN), [make_batch()] * n, TRAIN, 0)
        peaks.append(most)
    assert 0 < peaks[1] <= peaks[0]


def test_checkpointing_blocks_changes_no_number():
    plain = make_model()
    saving = Transformer(QWEN3, checkpoint_blocks=True).initialize(0, "gpt2")
    for model in (plain, saving):
        train_step(NextToken(), model, build_optimizer(model, TRAIN), make_batch().micro(4), TRAIN, 0)
    for (name, p), q in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert torch.equal(p, q), name
