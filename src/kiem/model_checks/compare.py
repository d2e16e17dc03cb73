"""The configurations of one model against each other: the same weights and batch, computed in other ways.

All are held against one reference: float64, no fused path, attention without a kernel. Each way changes one thing of
another. Where that one differs from the reference itself, agreeing with it is enough, so that a mistake is shown once,
where it is made.

Bounds. An algorithm that is stable errs as if each number in it had been rounded a few times. The reference is made
again with every weight and everything that an operation gives, forward and backward, changed by relative noise of
2^-26, which shows how far one rounding of each moves the loss and each gradient element: `moved`. (Noise on what
forward keeps is not enough: the gradient of a key bias is a sum that cancels to zero, and its roundings are those of
backward.) One unit is the precision of the data type times
(|gradient| + moved). Allowed are 8 units; and for sums of n terms, kept in float32 at least in 16 parts, sqrt(n) / 4 of
float32's units. Nothing here is a setting.

Shapes: B batch, T time, N positions, D embedding, V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from kiem import runtime
from kiem.config.run import TrainConfig
from kiem.data.loader import IGNORE, Batch
from kiem.format import bytes_text, seconds_text
from kiem.model.ops import cross_entropy
from kiem.model.transformer import Transformer
from kiem.training.objective import NextToken
from kiem.training.step import train_step

NOISE = 2.0**-26  # relative; far above float64's rounding, far below where formulas stop being straight
REPEATS = 2
SECONDS = 180.0  # what has not begun by then is skipped
SLOW_BFLOAT16 = 12.0  # times the float32 of a processor without instructions for it (measured: GPT-2 124M)
BYTES_PER_PARAMETER = 40  # float64: weights, gradient, reference, what noise does to it; float32: weights, gradient

Gradients = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Way:
    """One way to compute loss and gradients. `base`: the way of which it changes one thing; `change`: which."""

    name: str
    base: str
    change: str
    dtype: torch.dtype = torch.float32
    fused: tuple[str, ...] = ()  # of loss, feed-forward, attention
    trained: bool = False  # through the training step
    parts: int = 1  # micro-batches
    recomputed: bool = False
    compiled: bool = False


REFERENCE = Way("reference", "", "float64, no fused path", dtype=torch.float64)
_FUSED = ("loss", "feed-forward", "attention")
_TRAINED = Way("as trained", "fused attention", "the training step", fused=_FUSED, trained=True)
WAYS = (
    Way("float32", "reference", "float32 for float64"),
    Way("fused loss", "float32", "cross-entropy in chunks, with its gradient made in forward", fused=_FUSED[:1]),
    Way("fused MLP", "fused loss", "activation and product in one, less kept", fused=_FUSED[:2]),
    Way("fused attention", "fused MLP", "torch's attention kernel", fused=_FUSED),
    _TRAINED,
    replace(_TRAINED, name="accumulated", base="as trained", change="3 uneven micro-batches for one batch", parts=3),
    replace(_TRAINED, name="recomputed", base="as trained", change="blocks run again in backward", recomputed=True),
    replace(_TRAINED, name="compiled", base="as trained", change="blocks through torch.compile", compiled=True),
    replace(_TRAINED, name="bfloat16", base="as trained", change="bfloat16 for float32", dtype=torch.bfloat16),
)


@dataclass(slots=True)
class Comparison:
    """What one way gave against another. `loss_units`, `units`: the difference of the loss, and the largest of a
    gradient element, in units of the data type's precision; both are allowed `bound`.."""

    name: str
    change: str
    base: str  # the way of which it changes one thing
    against: str  # the way that it was held against
    dtype: torch.dtype
    verdict: str = "ok"  # ok, wrong, skipped
    reason: str = ""
    loss: float = math.nan
    expected_loss: float = math.nan
    loss_units: float = 0.0
    units: float = 0.0
    bound: float = 0.0
    parameter: str = ""  # of the worst gradient element
    element: tuple[int, ...] | None = None
    expected: float | None = None
    got: float | None = None
    wrong_parameters: list[str] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(slots=True)
class Comparisons:
    """All ways, in the order in which they ran. `loss`: the reference's; `terms`: of the longest sum."""

    rows: list[Comparison] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    loss: float = math.nan
    parameters: int = 0
    tokens: int = 0
    terms: int = 1
    seconds: float = 0.0

    @property
    def wrong(self) -> list[Comparison]:
        """Ways that differ by more than rounding explains."""
        return [row for row in self.rows if row.verdict == "wrong"]

    @property
    def ok(self) -> bool:
        """Nothing is wrong, and something was compared."""
        return not self.wrong and any(row.verdict == "ok" for row in self.rows)


def compare(model: Transformer, batch: Batch, documents_apart: bool = True, seconds: float = SECONDS) -> Comparisons:
    """Loss and gradients of this model's weights on this batch, computed in every way of WAYS.

    The model and its gradients stay as they are; dropout is off. Ways that have not begun after `seconds`, that this
    machine cannot run, or that there is no memory for are skipped, with the reason.
    """
    began = time.perf_counter()
    devices = [p.device for p in model.parameters() if p.device.type == "cuda"][:1]
    with torch.random.fork_rng(devices), torch.enable_grad():
        result = _Comparing(model, batch, documents_apart).run(seconds)
    result.seconds = time.perf_counter() - began
    return result


def bound(dtype: torch.dtype, terms: int) -> float:
    """Units that are allowed: 8 roundings, and those of a sum of so many terms in the type in which sums are kept."""
    unit = torch.finfo(dtype).eps
    return 8 + terms**0.5 / 4 * min(unit, torch.finfo(torch.float32).eps) / unit


class _Comparing:
    def __init__(self, model: Transformer, batch: Batch, documents_apart: bool):
        self.config = model.config.model_copy(update={"drop_rate": 0.0})
        self.batch, self.objective = batch, NextToken(documents_apart)
        self.result = Comparisons(parameters=sum(p.numel() for p in model.parameters()), tokens=batch.tokens_BT.numel())
        self.result.terms = max(self.result.tokens, *(size for p in model.parameters() for size in p.shape))
        if model.config.drop_rate:
            self.result.notes.append("Dropout is off: each way would drop other elements.")
        self.weights = self._flowing({name: p.detach() for name, p in model.named_parameters()})
        self.device = next(iter(self.weights.values())).device
        self.generator = torch.Generator().manual_seed(0)
        self.kept: dict[str, tuple[float, Gradients]] = {}  # ways unlike the reference, if others build on them
        self.broken: set[str] = set()  # ways that gave no numbers

    def _flowing(self, weights: Gradients) -> Gradients:
        """Matrices that are all zero pass no gradient on, and no mistake would be seen: they get random numbers."""
        zero = [name for name, w in weights.items() if w.ndim > 1 and not w.any()]
        generator = torch.Generator().manual_seed(1)
        for name in zero:
            random = torch.randn(weights[name].shape, generator=generator) * weights[name].shape[1] ** -0.5
            weights[name] = random.to(weights[name])
        if zero:
            self.result.notes.append(
                f"A matrix of zeros passes no gradient on, so random numbers stand in for "
                f"{len(zero)} that are still zero ({zero[0]}, ...)."
            )
        return weights

    def run(self, seconds: float) -> Comparisons:
        began = time.perf_counter()
        reason = self._no_room()
        if not reason:
            self.loss, self.gradients = self._evaluate(REFERENCE)
            self.result.loss = self.loss
            if not _all_finite(self.loss, self.gradients):
                reason = f"the reference itself is not finite (loss {self.loss:.6g}): there is nothing to compare with"
        if not reason:
            self._noise()
        for way in WAYS:
            why = reason or self._no_time(way, began + seconds - time.perf_counter())
            self.result.rows.append(self._skipped(way, why) if why else self._one(way))
        return self.result

    def _no_time(self, way: Way, left: float) -> str:
        """Why a way would take too long; empty if it would not."""
        if left < 0:
            return "the ways before it used up the time"
        took = sum(row.seconds for row in self.result.rows if row.name == way.base)
        slow = way.dtype == torch.bfloat16 and not runtime.has_fast_bfloat16(self.device)
        if not slow or SLOW_BFLOAT16 * took < left:
            return ""
        return f"without instructions for bfloat16 it would take {seconds_text(SLOW_BFLOAT16 * took)}"

    def _no_room(self) -> str:
        """Why the reference cannot be made; empty if it can."""
        need = self.result.parameters * BYTES_PER_PARAMETER
        have = runtime.machine_memory()
        if self.device.type == "cuda":
            have = torch.cuda.get_device_properties(self.device).total_memory
        elif self.device.type == "mps":
            return "the reference is float64, which this device does not have"
        if need < 0.8 * have:
            return ""
        return f"the reference in float64 needs about {bytes_text(need)}, there are {bytes_text(have)}"

    def _model(self, way: Way, weights: Gradients | None = None) -> Transformer:
        """The model of a way; float32 ways share the weights."""
        with torch.device("meta"):
            model = Transformer(self.config, way.dtype, way.recomputed)
        wide = torch.float64 if way.dtype == torch.float64 else torch.float32
        model.load_state_dict({name: w.to(wide) for name, w in (weights or self.weights).items()}, assign=True)
        if "loss" not in way.fused:
            _unfuse(model.head)
        for block in model.blocks:
            if "feed-forward" not in way.fused:
                _unfuse(block.get_submodule("mlp.down"))
            if way.compiled:
                block.compile(dynamic=False)
        return model.train()

    def _noise(self) -> None:
        """Sets `loss_scale` and, for each gradient element, `scale`: its size, and how far a rounding everywhere moves
        it (root mean square, in multiples of the rounding)."""
        squares = {name: torch.zeros_like(g, dtype=torch.float32) for name, g in self.gradients.items()}
        loss_squares = 0.0
        for _ in range(REPEATS):
            weights = {name: self._shaken(w.double()) for name, w in self.weights.items()}
            with _Rounding(self._shaken):
                loss, gradients = self._evaluate(REFERENCE, weights)
            loss_squares += ((loss - self.loss) / NOISE) ** 2 / REPEATS
            for name, g in gradients.items():
                squares[name] += g.sub_(self.gradients[name]).div_(NOISE).square_().div_(REPEATS)
        self.loss_scale = abs(self.loss) + loss_squares**0.5
        self.scale = {}
        for name, square in squares.items():
            # Of two draws one element may by chance have moved little: its row says what is usual. The size of the
            # whole gradient is there for cancellation inside an operation, as in a GELU far below zero.
            whole = float(torch.linalg.vector_norm(self.gradients[name])) / square.numel() ** 0.5
            usual = square.mean(-1, keepdim=True).sqrt().add_(whole)
            self.scale[name] = square.sqrt_().add_(usual).add_(self.gradients[name].abs())

    def _shaken(self, x: Tensor) -> Tensor:
        noise = torch.empty(x.shape, dtype=torch.float32).uniform_(-(3**0.5), 3**0.5, generator=self.generator)
        return noise.to(x).mul_(NOISE).add_(1).mul_(x)

    def _evaluate(self, way: Way, weights: Gradients | None = None) -> tuple[float, Gradients]:
        """Loss in nats per valid token, and the gradient of each parameter."""
        model, batch = self._model(way, weights), self.batch
        if way.trained:
            size = max(2, batch.tokens_BT.numel())
            train = TrainConfig(tokens=size, batch_tokens=size, max_grad_norm=0.0)
            still = _NoUpdate(model.parameters())
            loss = train_step(self.objective, model, still, split(batch, way.parts), train, 0).loss
        else:
            with ExitStack() as stack:
                if "attention" not in way.fused:
                    stack.enter_context(sdpa_kernel(SDPBackend.MATH))
                if "loss" in way.fused:
                    stack.enter_context(_chunks_of(batch.tokens_BT.numel() // 3, self.config.vocab_size))
                mean = self.objective.loss(model, batch)[0] / batch.n_valid
                mean.backward()
            loss = float(mean.detach())
        return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    def _skipped(self, way: Way, reason: str) -> Comparison:
        return Comparison(way.name, way.change, way.base, "", way.dtype, "skipped", reason)

    def _one(self, way: Way) -> Comparison:
        if way.base in self.broken:
            self.broken.add(way.name)
            return self._skipped(way, f"{way.base}, on which it builds, gave nothing to compare with")
        began = time.perf_counter()
        allowed = bound(way.dtype, self.result.terms)
        row = Comparison(way.name, way.change, way.base, REFERENCE.name, way.dtype, bound=allowed)
        try:
            if way.compiled:
                _compiler()
            loss, gradients = self._evaluate(way)
        except Exception as error:
            cannot = way.compiled or isinstance(error, NotImplementedError | torch.OutOfMemoryError)
            row.verdict = "skipped" if cannot else "wrong"
            row.reason = f"{type(error).__name__}: {error}".split("\n")[0]
            self.broken.add(way.name)
        else:
            row = self._held(row, way.base, loss, gradients)
        row.seconds = time.perf_counter() - began
        return row

    def _held(self, row: Comparison, base: str, loss: float, gradients: Gradients) -> Comparison:
        """Against the reference; and where that fails and the base failed as well, against the base."""
        fresh = replace(row, against=base, wrong_parameters=[])
        self._judge(row, loss, gradients, self.loss, self.gradients)
        if not _all_finite(loss, gradients):
            row.verdict, row.reason = "wrong", "loss or gradient is not finite"
            self.broken.add(row.name)
        elif row.verdict == "wrong":
            if base in self.kept:
                self._judge(fresh, loss, gradients, *self.kept[base])
                row = fresh
            if any(way.base == row.name for way in WAYS):
                self.kept[row.name] = loss, gradients
        return row

    def _judge(self, row: Comparison, loss: float, got: Gradients, expected_loss: float, expected: Gradients) -> None:
        unit, tiny = torch.finfo(row.dtype).eps, torch.finfo(row.dtype).tiny
        row.loss, row.expected_loss = loss, expected_loss
        row.loss_units = abs(loss - expected_loss) / (unit * self.loss_scale)
        for name, reference in expected.items():
            grad = got.get(name)
            error = reference.double().clone() if grad is None else grad.double().sub_(reference)
            ratio = error.abs_().div_(self.scale[name].clamp_min(tiny / unit))
            worst = float(ratio.nan_to_num_(nan=math.inf).max()) / unit
            if worst > row.bound:
                row.wrong_parameters.append(name)
            if worst > row.units or not row.parameter:
                where = torch.unravel_index(ratio.argmax(), ratio.shape)
                row.units, row.parameter, row.element = worst, name, tuple(int(i) for i in where)
                row.expected = float(reference[row.element])
                row.got = None if grad is None else float(grad[row.element])
        if row.wrong_parameters or row.loss_units > row.bound:
            row.verdict = "wrong"


def _unfuse(layer: nn.Module) -> None:
    """A layer that somebody watches is called as it stands, in no fused operation (model/layers.py)."""
    layer.register_forward_hook(lambda *_: None)


class _Rounding(TorchDispatchMode):
    """Everything that an operation gives, forward and backward, passes through `rounded`; views and what is written in
    place are no new numbers."""

    def __init__(self, rounded: Callable[[Tensor], Tensor]):
        super().__init__()
        self._rounded = rounded

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = func(*args, **(kwargs or {}))
        results = given if isinstance(given, tuple) else (given,)
        for result, returned in zip(results, func._schema.returns, strict=False):
            if returned.alias_info is None and isinstance(result, Tensor) and result.dtype == torch.float64:
                result.copy_(self._rounded(result))
        return given


class _NoUpdate(torch.optim.Optimizer):
    """An optimizer that leaves the weights as they are."""

    def __init__(self, params: Iterable[Tensor]):
        super().__init__(params, {"lr": 0.0})

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Nothing."""


def split(batch: Batch, parts: int) -> list[Batch]:
    """The batch as micro-batches with 1, 2, 3, ... shares of its targets, so that a mean of means shows. Where a row's
    targets are shared out, each part has the row and a mask."""
    if parts == 1:
        return [batch]
    valid = (batch.targets_BT != IGNORE).flatten()
    rank_N = valid.cumsum(0) - 1  # the how many-th target
    shares = parts * (parts + 1) // 2
    ends = [batch.n_valid * k * (k + 1) // 2 // shares for k in range(parts + 1)]
    found = []
    for start, end in pairwise(ends):
        mine_BT = (valid & (rank_N >= start) & (rank_N < end)).view_as(batch.targets_BT)
        rows = mine_BT.any(1)
        if end > start:
            targets_BT = batch.targets_BT.where(mine_BT, IGNORE)
            packing = batch.positions_BT[rows], batch.docs_BT[rows]
            found.append(Batch(batch.tokens_BT[rows], targets_BT[rows], *packing, end - start))
    return found


@contextmanager
def _chunks_of(rows: int, vocab_size: int) -> Iterator[None]:
    """At most so many positions in a chunk of the fused loss: a small batch would fit into one."""
    before = cross_entropy.CHUNK_ELEMENTS
    cross_entropy.CHUNK_ELEMENTS = min(before, max(1, rows) * vocab_size)
    try:
        yield
    finally:
        cross_entropy.CHUNK_ELEMENTS = before


def _compiler() -> None:
    """Make torch.compile compile anew: at its limit of variants, or switched off, it runs eagerly and says nothing."""
    if torch._dynamo.config.disable:
        raise RuntimeError("torch.compile is switched off in this process")
    torch.compiler.reset()


def _all_finite(loss: float, gradients: Gradients) -> bool:
    return math.isfinite(loss) and all(bool(g.isfinite().all()) for g in gradients.values())
