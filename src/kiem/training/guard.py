"""What watches a run: a loss that explodes, early or late, and the search for the first number that is not finite.

`Watch` looks at each step's two numbers and costs microseconds. `require_finite` stands before a save, so that a
poisoned state never becomes the newest checkpoint. `first_nonfinite` runs once, after a refused update.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from kiem.errors import NumericsError
from kiem.training.objective import Objective

START = 16  # values that say where the run began
WINDOW = 64  # calm values that say where it is now
CONFIRM = 4  # steps above the limit before a word is said: one odd batch is not a spike
PATIENCE = 64  # steps above the limit after which a spike is not expected to come back
SIGMAS = 8.0
LEAST_RISE = 0.5  # nats per token; a smaller rise is no explosion, whatever the noise
RISE_ABOVE_START = 1.0  # nats per token
EARLY_NOISE = 0.25  # of the first loss: as much may one of the first steps lie above it
SMALL_RISE = 0.05  # nats per token; a last loss above the first ones by less is called equal to them
RECENT = 8  # values that say where the run ends
NORM_FACTOR, NORM_FACTOR_ABOVE_START = 100.0, 10.0


@dataclass(frozen=True)
class Verdict:
    """What `Watch` has to say: whether to stop, the reason in words, and the first step of the trouble."""

    stop: bool
    reason: str
    since: int


@dataclass
class _Track:
    """The running picture of one number. Values above the limit do not enter the picture they are compared with."""

    start: list[float] = field(default_factory=list)
    calm: list[float] = field(default_factory=list)
    best: float = math.inf  # lowest median of a full window
    hot: int = 0  # steps above the limit; a step below it takes two back
    since: int = 0

    def add(self, step: int, value: float, limit: float) -> bool:
        """Take in a value; whether it is above the limit."""
        if len(self.start) < START:
            self.start.append(value)
        if value > limit:
            self.since = step if self.hot == 0 else self.since
            self.hot += 1
            return True
        self.hot = max(0, self.hot - 2)
        self.calm = [*self.calm[1 - WINDOW :], value]
        if len(self.calm) == WINDOW:
            self.best = min(self.best, median(self.calm))
        return False


class Watch:
    """A running picture of loss and gradient norm that recognizes an explosion.

    The limit of the loss lies above its best level (the lowest median over WINDOW steps) by SIGMAS robust standard
    deviations (1.4826 MAD), by half of all that was learned since the start, and by LEAST_RISE, whichever is most; and
    it is never further above the level of the first steps than RISE_ABOVE_START or their noise. First steps that are
    far above both the first loss and that of a model that gives every token the same chance (`uniform_loss`, ln V) are
    an explosion already and no part of that level. A loss above the limit for PATIENCE steps is an explosion. The
    gradient norm is judged in the same way on its logarithm, without a bound on the first steps. `state()` is JSON and
    goes into the checkpoint: `Watch(state)` continues exactly where it was.
    """

    def __init__(self, state: Mapping[str, Any] | None = None, uniform_loss: float = math.inf) -> None:
        state = state or {}
        self._loss = _Track(**state.get("loss", {}))
        self._norm = _Track(**state.get("log_grad_norm", {}))
        self._recent: list[float] = list(state.get("recent", {}).get("loss", []))
        self._uniform = uniform_loss

    def state(self) -> dict[str, Any]:
        """Everything that the next `add` depends on, as JSON values."""
        recent = {"loss": list(self._recent)}
        return {"loss": _as_json(self._loss), "log_grad_norm": _as_json(self._norm), "recent": recent}

    def ending(self) -> str | None:
        """What to say at the end of a run that learned nothing: the loss is above the first one, or above ln V."""
        if not self._recent:
            return None
        last, first, level = median(self._recent), self._loss.start[0], median(_first_steps(self._loss, self._uniform))
        if last > level + SMALL_RISE or last > first + LEAST_RISE:
            return (
                f"the loss ended at {last:.4f} nats per token and began at {min(first, level):.4f}: nothing was "
                "learned. The run diverged, or its learning rate is too high"
            )
        if last > self._uniform + SMALL_RISE:
            return (
                f"the loss ended at {last:.4f} nats per token, above {self._uniform:.4f} = ln(vocab_size), the loss "
                "of a uniform guess. The run diverged, or its learning rate is too high"
            )
        return None

    @property
    def calm(self) -> bool:
        """Whether nothing is above its limit. While it is not, no older checkpoint should be removed."""
        return self._loss.hot == 0 and self._norm.hot == 0

    def add(self, step: int, loss: float, grad_norm: float) -> Verdict | None:
        """Take in one step (loss in nats per token, gradient norm before clipping). None if there is nothing to say."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return Verdict(True, f"step {step}: loss {loss}, gradient norm {grad_norm}: not finite", step)
        self._recent = [*self._recent[1 - RECENT :], loss]
        loss_limit, norm_limit = _loss_limit(self._loss, self._uniform), _norm_limit(self._norm)
        loss_is_high = self._loss.add(step, loss, loss_limit)
        norm_is_high = self._norm.add(step, math.log(max(grad_norm, 1e-30)), norm_limit)
        verdicts = []
        if loss_is_high and self._loss.hot in (CONFIRM, PATIENCE):
            what = f"the loss ({loss:.4f} nats per token)"
            verdicts.append(_verdict(self._loss, what, f"{loss_limit:.4f}", f"{_usual(self._loss):.4f}"))
        if norm_is_high and self._norm.hot in (CONFIRM, PATIENCE):
            what = f"the gradient norm ({grad_norm:.4g})"
            verdicts.append(_verdict(self._norm, what, _exp_text(norm_limit), _exp_text(_usual(self._norm))))
        return max(verdicts, key=lambda verdict: verdict.stop, default=None)


def _verdict(track: _Track, what: str, limit: str, usual: str) -> Verdict:
    text = f"{what} has been above {limit} since step {track.since}; before that it was about {usual}"
    return Verdict(track.hot == PATIENCE, text, track.since)


def _exp_text(logarithm: float) -> str:
    return f"{math.exp(min(logarithm, 700.0)):.4g}"


def _as_json(track: _Track) -> dict[str, Any]:
    fields = {**vars(track), "start": list(track.start), "calm": list(track.calm)}
    if math.isinf(track.best):
        del fields["best"]
    return fields


def _sigma(values: list[float]) -> float:
    middle = median(values)
    return 1.4826 * median(abs(value - middle) for value in values)


def _usual(track: _Track) -> float:
    return median(track.calm or track.start)


def _unlearned(track: _Track, uniform: float) -> float:
    """The most that a model loses before it has learned anything, noise included."""
    if not track.start:
        return math.inf
    return max(track.start[0], uniform) + max(RISE_ABOVE_START, EARLY_NOISE * track.start[0])


def _first_steps(track: _Track, uniform: float) -> list[float]:
    """Losses that say where the run began; the first is always one of them."""
    most = _unlearned(track, uniform)
    return [loss for loss in track.start if loss <= most]


def _loss_limit(track: _Track, uniform: float) -> float:
    if len(track.start) < START:
        return _unlearned(track, uniform)
    first = _first_steps(track, uniform)
    start = median(first)
    above_start = start + max(SIGMAS * _sigma(first), RISE_ABOVE_START)
    if len(first) < START:  # too few to know their noise by, and it exploded among them
        above_start = min(above_start, _unlearned(track, uniform))
    if math.isinf(track.best):
        return above_start
    rise = max(SIGMAS * _sigma(track.calm), 0.5 * (start - track.best), LEAST_RISE)
    return min(track.best + rise, above_start)


def _norm_limit(track: _Track) -> float:
    """On the logarithm. Gradients that had all but vanished may grow a hundredfold: hence the start's level."""
    if math.isinf(track.best):
        return math.inf
    usual = median(track.calm) + max(SIGMAS * _sigma(track.calm), math.log(NORM_FACTOR))
    return max(usual, median(track.start) + math.log(NORM_FACTOR_ABOVE_START))


def nonfinite(named: Mapping[str, Tensor]) -> list[str]:
    """One line for each tensor that holds a NaN or an infinity: its name, how many, and the first place."""
    return [f"{name} has {text}" for name, tensor in named.items() if (text := _nonfinite_text(tensor))]


def require_finite(groups: Mapping[str, Mapping[str, Tensor]], when: str) -> None:
    """Raise NumericsError naming each weight, moment, ... that is not finite. `when` begins the message."""
    problems = [f"{group}: {text}" for group, named in groups.items() for text in nonfinite(named)]
    if problems:
        rest = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise NumericsError(
            f"{when}: {'; '.join(problems[:5])}{rest}. This is not saved; the newest checkpoint is the "
            "last good state. Resume from it, with a lower learning rate if this comes back."
        )


def _nonfinite_text(tensor: Tensor) -> str:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return ""
    tensor = tensor.detach()  # a check must not enter the graph that it checks
    finite = torch.isfinite(tensor)
    if finite.all():
        return ""
    nans = int(torch.isnan(tensor).sum())
    place = (~finite).nonzero()[0].tolist()
    infinities = int((~finite).sum()) - nans
    parts = [f"{n} {word}" for n, word in ((nans, "NaN"), (infinities, "inf")) if n]
    return f"{' and '.join(parts)} in {tensor.numel()} values, first at {place}"


def first_nonfinite(objective: Objective, model: nn.Module, batch: Any) -> str:
    """Name the first place where this batch's numbers stop being finite: a parameter, a module's output, or a gradient.

    Repeats forward and backward with hooks, in eager mode; random state, parameters and their `.grad` are as before. To
    be called after a failure, with the step's objective: it reads every intermediate result.
    """
    broken = nonfinite(dict(model.named_parameters())) + nonfinite(dict(model.named_buffers()))
    if broken:
        return f"before the forward pass: {'; '.join(broken[:5])}"
    search = _Search(model)
    devices = [device for device in {p.device for p in model.parameters()} if device.type == "cuda"]
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.enable_grad())
        # Over backward too: blocks that are computed again must take the same path.
        stack.enter_context(search.forward_hooks())
        loss = objective.loss(model, batch)[0] / max(objective.weight(batch), 1.0)
        search.label(loss.grad_fn, "the loss")
        if search.found is None and (text := _nonfinite_text(loss)):
            search.found = f"forward: the loss has {text}; every module's output is finite"
        if search.found is None:
            parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
            with search.backward_hooks():
                gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            named = {name: g for name, g in zip(parameters, gradients, strict=True) if g is not None}
            if search.found is None and (broken := nonfinite(named)):
                search.found = f"backward: the gradient of {broken[0]}"
    return search.found or (
        "not found: forward and backward of this batch alone are finite; the cause is elsewhere in the step, in a "
        "different dropout mask, or in the hardware"
    )


class _Search:
    """Hooks that keep the first non-finite value, and know which module made which backward node."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.found: str | None = None
        self._stack = [f"the model ({type(model).__name__})"]
        self._owner: dict[Any, str] = {}

    def forward_hooks(self) -> "_Handles":
        handles = []
        for name, module in self.model.named_modules():
            label = f"{name} ({type(module).__name__})" if name else self._stack[0]
            handles.append(module.register_forward_pre_hook(self._before(label)))
            handles.append(module.register_forward_hook(self._after(label)))
        return _Handles(handles)

    def backward_hooks(self) -> "_Handles":
        return _Handles([node.register_hook(self._at(node, owner)) for node, owner in self._owner.items()])

    def label(self, node: Any, owner: str) -> None:
        """Give `owner` every node from here back to those that have one."""
        waiting = [node]
        while waiting:
            node = waiting.pop()
            if node is not None and node not in self._owner:
                self._owner[node] = owner
                waiting.extend(parent for parent, _ in node.next_functions)

    def _before(self, label: str) -> Any:
        def hook(module: nn.Module, inputs: Any) -> None:
            for tensor in _tensors(inputs):
                self.label(tensor.grad_fn, self._stack[-1])
                if self.found is None and (text := _nonfinite_text(tensor)):
                    self.found = f"forward: {self._stack[-1]}, in its own code: its input to {label} has {text}"
            self._stack.append(label)

        return hook

    def _after(self, label: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            self._stack.pop()
            for tensor in _tensors(output):
                self.label(tensor.grad_fn, label)
                if self.found is None and (text := _nonfinite_text(tensor)):
                    self.found = f"forward: {label}: its output has {text}; its inputs and parameters are finite"

        return hook

    def _at(self, node: Any, owner: str) -> Any:
        def hook(outgoing: Any, incoming: Any) -> None:
            if self.found is not None:
                return
            for what, tensors in (("the sum of the gradients at", incoming), ("the gradient made by", outgoing)):
                texts = [text for tensor in _tensors(tensors) if (text := _nonfinite_text(tensor))]
                if texts:
                    self.found = f"backward: {what} {node.name()} in {owner} has {texts[0]}"
                    return

        return hook


class _Handles:
    """Hooks that are removed at the end of a `with`."""

    def __init__(self, handles: list[Any]) -> None:
        self._handles = handles

    def __enter__(self) -> None:
        return None

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
