"""Cost of steps on this machine, by real training steps of the model or of a thinner one. Needs torch.

A model whose step is short is timed whole. A larger one is taken apart: one block with the real vocabulary (embeddings,
head, loss), and models of one and of three blocks with a small vocabulary, whose difference is the cost of two blocks.
The cost of a step is linear in the number of blocks, so these three give the cost at any depth.

Memory too: the heap keeps holes between blocks, which no arithmetic foresees (glibc before 2.38 can rarely fill the
hole of an aligned block with another of the same size). What the steps left resident says how much.
"""

import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass

import torch

from kiem import runtime
from kiem.config.model import ModelConfig
from kiem.config.presets import resolve
from kiem.config.run import RunConfig, TrainConfig
from kiem.data.loader import Batch
from kiem.model.transformer import Transformer
from kiem.optim.groups import build_optimizer
from kiem.optim.schedule import set_lr
from kiem.planning.count import flops_per_token
from kiem.planning.memory import memory
from kiem.training.objective import NextToken
from kiem.training.step import train_step

EXPECTED_SHARE = 0.5  # of the machine's matmul throughput, for the estimates that decide what is timed
WHOLE_SECONDS = 0.8  # a micro-step that is estimated shorter is timed on the whole model
ROWS_SECONDS = 1.2  # a micro-step of one block that is estimated longer is timed on fewer rows
ENOUGH_SECONDS = 2.0  # of repetitions of one thing, on a machine that is slower or busier than was estimated
FEW_ENTRIES = 128  # the small vocabulary


@dataclass(frozen=True)
class Speed:
    """Seconds of the parts of a training step, what the allocator adds to its memory, and how they were found."""

    micro_step_seconds: float  # forward and backward of one micro-batch
    update_seconds: float  # the optimizer, once a step
    evaluation_seconds_per_token: float
    heap_ratio: float  # resident memory that steps took over the bytes they hold at one time; at least 1
    method: str


@dataclass(frozen=True)
class Cost:
    """Of a model that was timed: seconds of its parts, bytes resident after steps, and bytes by arithmetic."""

    micro: float
    update: float
    evaluation: float
    resident: float
    counted: float

    def plus(self, factor: float, more: "Cost", less: "Cost") -> "Cost":
        """This and `factor` times the difference of two others, which is at least 0."""
        values = zip(*map(astuple, (self, more, less)), strict=True)
        return Cost(*(here + factor * max(0.0, high - low) for here, high, low in values))


def measure_speed(config: RunConfig) -> Speed:
    """Time steps of a resolved config: about 3 s for a small model, 15 s for GPT-2 124M at 2 x 1024 on two cores."""
    runtime.set_up_process()
    model, device = config.model, runtime.select_device(config.device)
    dtype = runtime.select_precision(config.train.precision, device)
    rate = EXPECTED_SHARE * runtime.matmul_rate(device, dtype, seconds=0.1)
    tokens, context = config.train.micro_batch_tokens, model.context_length
    rows = tokens // context

    def expected(shape: ModelConfig) -> float:
        """Seconds of a micro-step of one row, about."""
        return flops_per_token(shape).total * context / rate

    if model.n_layers <= 3 or rows * expected(model) < WHOLE_SECONDS:
        cost, scale = _cost(config, model, rows, repetitions=5), 1.0
        method = "timed on the whole model"
    else:
        one = model.model_copy(update={"n_layers": 1})
        few_rows = max(1, min(rows, int(ROWS_SECONDS / expected(one))))
        thin = one.model_copy(update={"vocab_size": min(FEW_ENTRIES, one.vocab_size)})
        base = _cost(config, one, few_rows)
        thin_one, thin_three = (_cost(config, thin.model_copy(update={"n_layers": n}), few_rows) for n in (1, 3))
        cost, scale = base.plus((model.n_layers - 1) / 2, thin_three, thin_one), rows / few_rows
        on = "" if few_rows == rows else f" on {few_rows} of {rows} rows"
        method = f"up to 3 of {model.n_layers} blocks were timed{on}, the rest in proportion"
    heap_ratio = max(1.0, cost.resident / cost.counted)
    return Speed(cost.micro * scale, cost.update, cost.evaluation * scale / tokens, heap_ratio, method)


def load_all() -> None:
    """One step of a tiny model: loads all that torch keeps for training, so that it counts as the process's memory."""
    runtime.set_up_process()
    tiny = ModelConfig(vocab_size=8, context_length=4, emb_dim=4, n_heads=1, n_layers=1)
    config = resolve(RunConfig(model=tiny, train=TrainConfig(tokens=8, batch_tokens=8)), tiny.vocab_size)
    _cost(config.model_copy(update={"device": "cpu"}), tiny, rows=2, repetitions=1)


def _cost(config: RunConfig, shape: ModelConfig, rows: int, repetitions: int = 2) -> Cost:
    """What steps of a model of this shape cost."""
    before, most = runtime.memory_now(), runtime.peak_memory()
    dtype = runtime.select_precision(config.train.precision, runtime.select_device(config.device))
    tokens = rows * shape.context_length
    parts = min(2, config.train.batch_tokens // config.train.micro_batch_tokens)  # two are as many for memory
    alone = config.train.model_copy(update={"batch_tokens": parts * tokens, "micro_batch_tokens": tokens})
    counted = memory(shape, alone, dtype.itemsize, not config.data.cross_document_attention).peak
    times, after = _time_steps(config, shape, rows, parts, repetitions)
    if (peak := runtime.peak_memory()) > most:
        after = peak  # else what is resident now is the best that is known
    _give_back()
    return Cost(*times, after - before, counted)


def _time_steps(
    config: RunConfig, shape: ModelConfig, rows: int, parts: int, repetitions: int
) -> tuple[tuple[float, float, float], int]:
    """Seconds of a micro-step, an update and an evaluation's forward pass; the process's memory after them.

    A step has `parts` micro-batches of `rows` rows.
    """
    device = runtime.select_device(config.device)
    dtype = runtime.select_precision(config.train.precision, device)
    model = Transformer(shape, dtype, config.train.activation_checkpointing)
    model.initialize(config.seed, config.train.init).to(device).train()
    optimizer = build_optimizer(model, config.train)
    batch = _random_batch(shape, rows).to(device)
    objective = NextToken(documents_apart=not config.data.cross_document_attention)

    def step() -> None:
        train_step(objective, model, optimizer, [batch] * parts, config.train, 0)

    def update() -> None:
        set_lr(optimizer, 1.0)
        optimizer.step()

    @torch.no_grad()
    def evaluation() -> None:
        objective.loss(model, batch)

    step()  # the first is slow: memory is new, kernels are chosen
    of_step, of_update = (_seconds(action, device, repetitions) for action in (step, update))
    of_evaluation = _seconds(evaluation, device, 1)
    return (max(of_step - of_update, 0.0) / parts, of_update, of_evaluation), runtime.memory_now()


def _give_back() -> None:
    """Return freed memory to the system, so that measuring adds nothing to the run's peak."""
    gc.collect()
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


def _random_batch(shape: ModelConfig, rows: int) -> Batch:
    """Random tokens; every row is two documents, so that attention takes the path of packed text."""
    T = shape.context_length
    generator = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(0, shape.vocab_size, (rows, T), generator=generator)
    docs_BT = (torch.arange(T, dtype=torch.int32) >= T // 2).int().expand(rows, T).contiguous()
    positions_BT = (torch.arange(T) - docs_BT * (T // 2)).contiguous()
    return Batch(tokens_BT, tokens_BT.roll(-1, 1), positions_BT, docs_BT, rows * T)


def _seconds(action: Callable[[], None], device: torch.device, repetitions: int) -> float:
    """Median time of an action."""
    times: list[float] = []
    while len(times) < repetitions and sum(times) < ENOUGH_SECONDS:
        began = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times)
