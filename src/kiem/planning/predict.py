"""The plan of a run: what it will cost, before it starts. Everything but speed works without torch."""

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from kiem import runtime
from kiem.config.run import RunConfig
from kiem.errors import ConfigError
from kiem.format import bytes_text, count_text, integer_text, percent_text, plural, seconds_text
from kiem.planning.count import Flops, flops_per_token, parameters_by_module
from kiem.planning.devices import DEVICES, Machine, find_device, this_machine
from kiem.planning.memory import Memory, memory

if TYPE_CHECKING:
    from rich.console import RenderableType

    from kiem.planning.measure import Speed

PROCESS_BYTES = 330 * 2**20  # Python, torch and Kiem before the model, where not measured: torch 2.13 on Linux
USUAL_HEAP_RATIO = 1.5  # resident memory over bytes in use where not measured: 1.1 to 2.5 were seen with glibc 2.36
START_SECONDS = 10.0  # of a timed run: loading, checkpoints, samples and report, about
RESERVE = 0.05  # of its time, for what steps take longer than measured
EVALUATIONS = 11  # in a run: config/presets.py, item 13
SHOWN_ELSEWHERE = ("H100", "A100", "RTX 4090", "RTX 3090", "T4")


@dataclass(frozen=True)
class Plan:
    """What a run will cost. `speed` and what follows from it are None where it was not measured; notes say why."""

    config: RunConfig
    parameters_by_module: dict[str, int]
    flops: Flops
    memory: Memory
    process_bytes: int  # of the process before the model; 0 on an accelerator, whose memory holds only the run
    process_peak_bytes: int  # reached by this process before the run, while it prepared text and measured
    precision: str
    device: str
    machine: Machine
    memory_capacity_bytes: int  # of the accelerator, else of the machine
    speed: "Speed | None" = None
    notes: list[str] = field(default_factory=list)
    workspace_bytes: int = 0  # of an accelerator's matrix products

    @property
    def parameters(self) -> int:
        return sum(self.parameters_by_module.values())

    @property
    def steps(self) -> int:
        return self.config.train.tokens // self.config.train.batch_tokens

    @property
    def micro_steps_per_step(self) -> int:
        return self.config.train.batch_tokens // self.config.train.micro_batch_tokens

    @property
    def peak_memory_bytes(self) -> int:
        """Most memory used at one time: resident memory of the process, or allocated on an accelerator."""
        beside = self.process_bytes + self.allocator_bytes + self.workspace_bytes
        return max(self.process_peak_bytes, self.memory.peak + beside)

    @property
    def allocator_bytes(self) -> int:
        """What the heap of a process keeps beside the bytes in use: measured, else as usual."""
        if self.process_bytes and self.speed is not None:
            return int((self.speed.heap_ratio - 1) * self.memory.peak)
        return _usual_heap_bytes(self.memory, self.process_bytes)

    @property
    def step_seconds(self) -> float | None:
        """One update: its micro-batches forward and backward, and the optimizer."""
        if self.speed is None:
            return None
        return self.micro_steps_per_step * self.speed.micro_step_seconds + self.speed.update_seconds

    @property
    def tokens_per_second(self) -> float | None:
        """Training tokens per second inside steps."""
        return self.config.train.batch_tokens / self.step_seconds if self.step_seconds else None

    @property
    def share_of_peak(self) -> float | None:
        """Model FLOPs per second over this device's peak, 0..1; None if either is not known."""
        known = find_device(self.device)
        if known is None or self.tokens_per_second is None:
            return None
        return self.tokens_per_second * self.flops.total / known.peak_flops

    @property
    def evaluation_seconds(self) -> float | None:
        """All evaluations, each taken as `eval_tokens` long (the last one takes all held-out text)."""
        train = self.config.train
        if self.speed is None:
            return None
        on_the_way = max(0, self.steps - 1) // train.eval_every
        return (on_the_way + 1) * train.eval_tokens * self.speed.evaluation_seconds_per_token

    @property
    def total_seconds(self) -> float | None:
        """All steps and evaluations; without preparing text, samples and checkpoints."""
        if self.step_seconds is None or self.evaluation_seconds is None:
            return None
        return self.steps * self.step_seconds + self.evaluation_seconds

    @property
    def total_flops(self) -> int:
        return self.flops.total * self.steps * self.config.train.batch_tokens

    def to_dict(self) -> dict[str, Any]:
        """plan.json: numbers with their unit in the key; null where unknown."""
        train = self.config.train
        flops = {f"{name}_flops": value for name, value in asdict(self.flops).items()}
        return {
            "parameters": self.parameters,
            "parameters_by_module": self.parameters_by_module,
            "flops_per_token": flops | {"total_flops": self.flops.total},
            "total_flops": self.total_flops,
            "memory": self.memory.to_dict()
            | {
                "allocator_bytes": self.allocator_bytes,
                "workspace_bytes": self.workspace_bytes,
                "process_bytes": self.process_bytes,
                "process_peak_bytes": self.process_peak_bytes,
            },
            "peak_memory_bytes": self.peak_memory_bytes,
            "total_tokens": self.steps * train.batch_tokens,
            "batch_tokens": train.batch_tokens,
            "micro_batch_tokens": train.micro_batch_tokens,
            "steps": self.steps,
            "micro_steps_per_step": self.micro_steps_per_step,
            "precision": self.precision,
            "device": self.device,
            "micro_step_seconds": self.speed and self.speed.micro_step_seconds,
            "update_seconds": self.speed and self.speed.update_seconds,
            "step_seconds": self.step_seconds,
            "tokens_per_second": self.tokens_per_second,
            "share_of_peak": self.share_of_peak,
            "evaluation_seconds": self.evaluation_seconds,
            "total_seconds": self.total_seconds,
            "speed_method": self.speed and self.speed.method,
            "machine": self.machine.to_dict(),
            "elsewhere": list(elsewhere(self)),
            "notes": self.notes,
        }


def _usual_heap_bytes(needs: Memory, process_bytes: int) -> int:
    """What the heap usually keeps beside the bytes in use, for what comes and goes; what stays leaves no holes."""
    if not process_bytes:
        return 0  # an accelerator's memory is counted as allocated
    return int((USUAL_HEAP_RATIO - 1) * max(0, needs.peak - needs.weights - needs.optimizer - needs.batch))


def elsewhere(plan: Plan) -> list[dict[str, Any]]:
    """The run on known accelerators: whether its step fits, and the least time it can take, at peak FLOP/s."""
    return [
        {"device": d.name, "fits": plan.memory.peak <= d.memory_bytes, "least_seconds": plan.total_flops / d.peak_flops}
        for d in DEVICES
    ]


def plan(config: RunConfig, measure: bool = True) -> Plan:
    """The plan of a resolved config. measure: time training steps on this machine (some seconds); needs torch."""
    notes: list[str] = []
    machine, place = this_machine(), _place(config, measure, notes)
    capacity = place.memory_bytes or machine.memory_bytes
    packed = not config.data.cross_document_attention
    needs = memory(config.model, config.train, place.compute_bytes, packed)
    fits = _whole(place, needs) <= capacity
    if not fits:
        notes.append(_does_not_fit(config, needs, place, capacity))
    elif not place.memory_bytes and _whole(place, needs) - place.loaded_bytes > machine.memory_available_bytes:
        notes.append(
            f"only {bytes_text(machine.memory_available_bytes)} of this machine's memory is free now: close other "
            "programs, or lower train.micro_batch_tokens"
        )
    speed = None
    if place.torch and fits:
        from kiem.planning.measure import measure_speed

        speed = measure_speed(config)
        if not place.memory_bytes:
            place = replace(place, peak_bytes=runtime.peak_memory())  # measuring is a part of what the process does
        if config.train.compile:
            notes.append("speed was measured without train.compile")
    return Plan(
        config,
        parameters_by_module(config.model),
        flops_per_token(config.model),
        needs,
        place.process_bytes,
        place.peak_bytes,
        place.precision,
        place.device,
        machine,
        capacity,
        speed,
        notes,
        place.workspace_bytes,
    )


@dataclass(frozen=True)
class _Place:
    """Where the run would be: what is known of it with torch (device memory, process size) or assumed without."""

    torch: bool
    device: str
    precision: str
    process_bytes: int
    peak_bytes: int = 0
    loaded_bytes: int = 0  # of process_bytes, what this process has taken already
    memory_bytes: int | None = None  # of an accelerator
    workspace_bytes: int = 0  # of an accelerator

    @property
    def compute_bytes(self) -> int:
        return 2 if self.precision == "bfloat16" else 4


def _place(config: RunConfig, measure: bool, notes: list[str]) -> _Place:
    if measure:
        try:
            import torch
        except ImportError:
            notes.append(
                "speed is not predicted: it is measured by training steps, and torch is not installed "
                "(pip install torch)"
            )
        else:
            from kiem.planning.measure import load_all

            device = runtime.select_device(config.device)
            precision = str(runtime.select_precision(config.train.precision, device)).removeprefix("torch.")
            if device.type == "cuda":
                facts = torch.cuda.get_device_properties(device)
                taken = runtime.matmul_workspace(device)
                return _Place(True, facts.name, precision, 0, memory_bytes=facts.total_memory, workspace_bytes=taken)
            load_all()
            now = runtime.memory_now()
            return _Place(True, "cpu", precision, now, loaded_bytes=now)
    precision = config.train.precision
    if precision == "auto":
        precision = "float32"
        notes.append("precision auto is taken as float32: run without --no-measure to detect bfloat16 support")
    return _Place(False, "cpu" if config.device == "auto" else config.device, precision, PROCESS_BYTES)


def _whole(place: _Place, needs: Memory) -> int:
    return place.process_bytes + needs.peak + _usual_heap_bytes(needs, place.process_bytes)


def _does_not_fit(config: RunConfig, needs: Memory, place: _Place, capacity: int) -> str:
    """What is too large, and the first smaller settings that fit."""
    on = place.device if place.memory_bytes else "this machine"
    said = f"this run does not fit: it needs {bytes_text(_whole(place, needs))} of memory and {on} has "
    said += f"{bytes_text(capacity)}."
    least, smallest = _whole(place, needs), needs
    for changes in _smaller(config):
        train = config.train.model_copy(update=changes)
        less = memory(config.model, train, place.compute_bytes, not config.data.cross_document_attention)
        whole = _whole(place, less)
        if whole <= capacity:
            settings = " ".join(f"train.{name}={str(value).lower()}" for name, value in changes.items())
            return f"{said} It fits with {settings} ({bytes_text(whole)})"
        if whole < least:
            least, smallest = whole, less
    parts = ("weights", "gradients", "optimizer", "update")
    largest = ", ".join(f"{name} {bytes_text(getattr(smallest, name))}" for name in parts)
    return (
        f"{said} No micro-batch makes it fit: one sequence at a time, with blocks recomputed, still needs "
        f"{bytes_text(least)} ({largest}). Use a smaller model"
    )


def require_memory(planned: Plan) -> None:
    """Raise ConfigError if the run surely does not fit, before anything is allocated: even without what an allocator
    keeps beside the bytes in use, a step needs more than the machine or its accelerator has."""
    needed, place = planned.process_bytes + planned.memory.peak, planned.memory_capacity_bytes
    if needed > place:
        raise ConfigError("; ".join(note for note in planned.notes if "does not fit" in note))


def _smaller(config: RunConfig) -> Iterator[dict[str, Any]]:
    """Changes that need less memory, the cheapest in time first: shorter micro-batches, then recomputation too."""
    context, batch, micro = config.model.context_length, config.train.batch_tokens, config.train.micro_batch_tokens
    rows = [n for n in range(micro // context - 1, 0, -1) if batch // context % n == 0]
    yield from ({"micro_batch_tokens": n * context} for n in rows)
    if not config.train.activation_checkpointing:
        yield {"activation_checkpointing": True}
        yield from ({"micro_batch_tokens": n * context, "activation_checkpointing": True} for n in rows)


def tokens_for_minutes(config: RunConfig, minutes: float, gone_seconds: float = 0.0) -> int:
    """Training tokens, in whole batches, with which a run of this resolved config ends within `minutes`, all included.

    minutes: as the user gave them. gone_seconds: what of them had passed before this call, with preparing text.
    At least one batch. Raises ConfigError if not even that fits the time, or speed cannot be measured.
    """
    began = time.perf_counter()
    planned = plan(config, measure=True)
    if planned.speed is None or planned.step_seconds is None:
        raise ConfigError(f"--minutes {minutes:g}: the speed was not measured: {'; '.join(planned.notes)}")
    measuring = time.perf_counter() - began  # the run measures once more, for its plan
    evaluating = EVALUATIONS * config.train.eval_tokens * planned.speed.evaluation_seconds_per_token
    beside = gone_seconds + 2 * measuring + START_SECONDS
    steps = int(((minutes * 60 - beside) * (1 - RESERVE) - evaluating) / planned.step_seconds)
    if steps < 1:
        least = (beside + (evaluating + planned.step_seconds) / (1 - RESERVE)) / 60
        raise ConfigError(
            f"--minutes {minutes:g} is too short: {seconds_text(gone_seconds + measuring)} were spent on reading "
            f"text and measuring speed, {seconds_text(measuring + START_SECONDS + evaluating)} more go into the "
            f"start, evaluations, samples and saving, and one step takes {seconds_text(planned.step_seconds)} on this "
            f"machine. Give at least --minutes {math.ceil(least * 10) / 10:g}, or a smaller model, train.batch_tokens "
            "or train.eval_tokens"
        )
    return steps * config.train.batch_tokens


def render(plan: Plan) -> "RenderableType":
    """The plan for a terminal."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(justify="right")
    table.add_column(style="dim")
    for row in _rows(plan):
        table.add_row(*map(Text, row))
    return Group(table, *(Text(f"note: {note}", style="yellow") for note in plan.notes))


def _rows(plan: Plan) -> Iterator[tuple[str, str, str]]:
    """(what, value with unit, how it comes about)."""
    train, needs = plan.config.train, plan.memory
    largest = sorted(plan.parameters_by_module.items(), key=lambda item: -item[1])[:3]
    shares = (f"{name} {percent_text(count / plan.parameters)}" for name, count in largest)
    tied = "; head tied to tok_emb" if plan.config.model.tie_embeddings else ""
    yield "parameters", integer_text(plan.parameters), ", ".join(shares) + tied
    attention = plan.flops.forward_attention + plan.flops.backward_attention
    yield "FLOPs per token", count_text(plan.flops.total), f"attention {percent_text(attention / plan.flops.total)}"
    yield (
        "tokens",
        integer_text(plan.steps * train.batch_tokens),
        f"{plural(plan.steps, 'step')} x {integer_text(train.batch_tokens)} tokens "
        f"({plural(plan.micro_steps_per_step, 'micro-batch', 'micro-batches')} of "
        f"{integer_text(train.micro_batch_tokens)} = "
        f"{plural(train.micro_batch_tokens // plan.config.model.context_length, 'sequence')}), {plan.precision}",
    )
    names = ("weights", "gradients", "optimizer", "activations", "loss", "update")
    kinds = {name: getattr(needs, name) for name in names}
    kinds |= {"allocator": plan.allocator_bytes, "process": plan.process_bytes}
    yield "peak memory", bytes_text(plan.peak_memory_bytes), ", ".join(f"{k} {bytes_text(n)}" for k, n in kinds.items())
    if plan.process_bytes:  # an accelerator's memory is in the notes
        fits = plan.peak_memory_bytes <= plan.machine.memory_bytes
        yield "fits in memory", "yes" if fits else "no", f"{bytes_text(plan.machine.memory_bytes)} on this machine"
    if plan.speed is not None:
        yield (
            "time of one step",
            seconds_text(plan.step_seconds),
            f"including {seconds_text(plan.speed.update_seconds)} for the optimizer; {plan.speed.method}",
        )
        on = plan.device if plan.process_bytes == 0 else f"{plan.machine.processor}, {plan.machine.cores} cores"
        if plan.share_of_peak is not None:
            on += f", {percent_text(plan.share_of_peak)} of peak FLOP/s"
        yield "speed", f"{integer_text(plan.tokens_per_second)} tokens/s", on
        yield (
            "time",
            seconds_text(plan.total_seconds),
            f"including {seconds_text(plan.evaluation_seconds)} for evaluations",
        )
    else:
        there = [of for of in elsewhere(plan) if of["fits"] and of["device"] in SHOWN_ELSEWHERE]
        least = ", ".join(f"{of['device']} {seconds_text(of['least_seconds'])}" for of in there)
        if least:
            yield "lower bound on time", "", f"at peak FLOP/s: {least}"
