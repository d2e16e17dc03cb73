"""Several processes: sums, gathered values, one decision; a step under DDP and FSDP2 has one process's gradients."""

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from kiem.config.model import ModelConfig
from kiem.config.run import TrainConfig
from kiem.data.loader import Batch
from kiem.model.transformer import Transformer
from kiem.optim.groups import build_optimizer
from kiem.parallel.ranks import Ranks
from kiem.training.objective import NextToken
from kiem.training.step import train_step

V, B, T = 40, 4, 16
CONFIG = ModelConfig(vocab_size=V, context_length=T, emb_dim=16, n_heads=2, n_layers=2, qkv_bias=True)


def batch():
    tokens_BT = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(0))
    targets_BT = tokens_BT.roll(-1, 1)
    targets_BT[0, 5:] = -100  # ranks have unequal weights
    positions_BT = torch.arange(T).expand(B, T)
    docs_BT = torch.zeros(B, T, dtype=torch.int32)
    return Batch(tokens_BT, targets_BT, positions_BT, docs_BT, int((targets_BT != -100).sum()))


def spawn(work, tmp_path, n=2):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.start_processes(_rank, (work, n, port, str(tmp_path)), nprocs=n, start_method="fork")
    return [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(n)]


def _rank(rank, work, n, port, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=n)
    torch.save(work(rank), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_one_process_does_nothing():
    alone, x = Ranks(), torch.tensor([1.0, 2.0])
    assert alone.sum_(x) is x and x.tolist() == [1.0, 2.0]
    assert alone.gather("a") == ["a"] and alone.first("a") == "a" and Ranks.here() == alone
    with pytest.raises(ValueError, match="rank 2 of 2"):
        Ranks(2, 2)


def two(rank):
    ranks = Ranks.here()
    x = torch.tensor([1.0 + rank, 10.0])
    return {
        "same": ranks.sum_(x) is x,
        "sum": x,
        "gather": ranks.gather({"rank": rank}),
        "first": ranks.first(f"decided by {rank}"),
        "place": [ranks.rank, ranks.size],
    }


def test_two_processes(tmp_path):
    found = spawn(two, tmp_path)
    for rank, one in enumerate(found):
        assert one["same"] and one["sum"].tolist() == [3.0, 20.0]
        assert one["gather"] == [{"rank": 0}, {"rank": 1}]
        assert one["first"] == "decided by 0"
        assert one["place"] == [rank, 2]


def reference():
    """The gradients of one process with the whole batch."""
    model = Transformer(CONFIG).initialize(0)
    nats, _, _ = NextToken().loss(model, batch())
    (nats / batch().n_valid).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def wrapped(rank, wrap):
    """A step as a wrapper's user writes it: the wrapper averages gradients, so each rank's share is scaled by ranks."""
    model = Transformer(CONFIG).initialize(0)
    names = [name for name, _ in model.named_parameters()]
    model = wrap(model)
    mine = batch().micro(B // dist.get_world_size())[rank]
    nats, _, _ = NextToken().loss(model, mine)
    (nats * dist.get_world_size() / batch().n_valid).backward()
    full = lambda g: g.full_tensor() if hasattr(g, "full_tensor") else g  # noqa: E731
    return {name: full(p.grad) for name, p in zip(names, model.parameters(), strict=True)}


def ddp(rank):
    return wrapped(rank, torch.nn.parallel.DistributedDataParallel)


def fsdp(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    def shard(model):
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    return wrapped(rank, shard)


@pytest.mark.parametrize("work", [ddp, fsdp])
def test_a_wrapped_model_has_the_gradients_of_one_process(work, tmp_path):
    expected = reference()
    for one in spawn(work, tmp_path):
        assert one.keys() == expected.keys()
        for name, gradient in expected.items():
            # float32 sums over the same terms in another order
            assert (one[name] - gradient).norm() <= 1e-6 * max(gradient.norm(), 1e-3), name


def step(rank):
    model = Transformer(CONFIG).initialize(0)
    size = B * T
    train = TrainConfig(tokens=10 * size, batch_tokens=size, lr=0.01, matrix_lr=0.02, weight_decay=0.0)
    ranks = Ranks.here()
    mine = batch().micro(B // ranks.size)[ranks.rank]
    result = train_step(NextToken(), model, build_optimizer(model, train), mine.micro(1), train, 0, ranks)
    return {"loss": result.loss, "weight": result.weight, **{n: p.detach() for n, p in model.named_parameters()}}


def test_a_step_on_two_ranks_is_the_same_on_both(tmp_path):
    one, other = spawn(step, tmp_path)
    alone = step(0)
    for name, value in one.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(other[name])), name
    assert one["weight"] == alone["weight"] == batch().n_valid
    assert one["loss"] == pytest.approx(alone["loss"], rel=1e-6)
