"""A run folder read for reporting: curves, evaluations, samples, configuration, plan. Missing parts are empty."""

import math
from array import array
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from kiem.config.formats import read_mapping
from kiem.errors import CheckpointError, ConfigError
from kiem.format import is_number, number_text
from kiem.runs.metrics import Smoothed, iter_records
from kiem.runs.run import Run as RunFolder

COLUMNS = (
    "step",
    "tokens",
    "loss",
    "grad_norm",
    "lr",
    "matrix_lr",
    "tokens_per_second",
    "matmul_share",
    "step_seconds",
    "memory_bytes",
)


@dataclass
class Run:
    """What a run folder holds. `steps`: a column of doubles per key, NaN where a value is missing; `seconds`: training
    seconds up to and with each step (evaluations and saves not counted); `smoothed`: the smoothed loss."""

    folder: Path
    steps: dict[str, array] = field(default_factory=lambda: {name: array("d") for name in COLUMNS})
    seconds: array = field(default_factory=lambda: array("d"))
    smoothed: array = field(default_factory=lambda: array("d"))
    smoothing_steps: int = 0
    evals: list[dict[str, Any]] = field(default_factory=list)
    saves: list[dict[str, Any]] = field(default_factory=list)
    marks: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    newest_checkpoint: int = 0  # its step

    @property
    def curve_evals(self) -> list[dict[str, Any]]:
        """Evaluations that can be compared: of the sample that every point has, or all if none is of a sample."""
        return [e for e in self.evals if e.get("part") == "sample"] or self.evals

    def __len__(self) -> int:
        return len(self.seconds)


def read_run(folder: str | Path) -> Run:
    """Read everything a report needs. Raises CheckpointError if `folder` is no run folder."""
    folder = Path(folder)
    if not any((folder / name).is_file() for name in ("config.yaml", "metrics.jsonl")):
        raise CheckpointError(
            f"{folder} is not a run folder: it has neither config.yaml nor metrics.jsonl. "
            "Name the folder that `kiem train` printed, for example runs/demo"
        )
    run = Run(folder)
    for record in iter_records(folder / "metrics.jsonl", run.problems):
        _take(run, record)
    for record in iter_records(folder / "samples.jsonl", run.problems):
        _take_sample(run, record)
    run.config = _mapping(folder / "config.yaml", run.problems)
    run.plan = _mapping(folder / "plan.json", run.problems)
    run.newest_checkpoint = RunFolder(folder).newest_step
    logged = int(run.steps["step"][-1]) if run.steps["step"] else 0
    if logged < run.newest_checkpoint:
        run.problems.append(
            f"metrics.jsonl has no record of steps {logged + 1} to {run.newest_checkpoint}: they are lost"
        )
    _finish_curves(run)
    return run


def _take(run: Run, record: dict[str, Any]) -> None:
    kind = record.get("kind")
    if kind == "step":
        if not (as_number(record.get("step")) >= 0 and as_number(record.get("tokens")) >= 0):
            run.problems.append("metrics.jsonl: a step record without its step or tokens, left out")
            return
        for name, column in run.steps.items():
            column.append(as_number(record.get(name)))
        if not math.isfinite(run.steps["loss"][-1]):
            run.problems.append(f"the loss at step {record['step']} is {number_text(record.get('loss'))}")
    elif kind == "eval":
        run.evals.append(record)
    elif kind == "save":
        run.saves.append(record)
    elif kind in ("start", "stop", "end"):
        run.marks.append(record)
        if isinstance(warning := record.get("warning"), str):
            run.problems.append(warning)


def _take_sample(run: Run, record: dict[str, Any]) -> None:
    if is_number(record.get("step")) and isinstance(record.get("text"), str) and isinstance(record.get("prompt"), str):
        run.samples.append(record)
    else:
        run.problems.append("samples.jsonl: a sample without its step, prompt or text, left out")


def _finish_curves(run: Run) -> None:
    """Cumulative seconds and the smoothed loss. A record that stands for several steps counts for each of them."""
    total, before = 0.0, 0.0
    first = run.steps["step"][0] if run.steps["step"] else 0.0
    if first > 1:
        before = first - 1  # the log begins later: what was before it is unknown, not free
    run.smoothing_steps = min(max(len(run.steps["step"]) // 50, 5), 1000)
    smooth = Smoothed(run.smoothing_steps)
    for step, seconds, loss in zip(run.steps["step"], run.steps["step_seconds"], run.steps["loss"], strict=True):
        gone = seconds * max(step - before, 0.0)
        total += gone if math.isfinite(gone) else 0.0
        before = step
        run.seconds.append(total)
        run.smoothed.append(smooth.update(loss))


def as_number(x: Any) -> float:
    """x as a float; NaN for anything that is not a finite number."""
    return float(x) if is_number(x) else math.nan


def _mapping(path: Path, problems: list[str]) -> dict[str, Any]:
    """The mapping in a file; empty, with a problem noted, when the file is missing or is not one."""
    if not path.is_file():
        problems.append(f"{path.name} is missing")
        return {}
    try:
        return read_mapping(path)[0]
    except ConfigError as error:
        problems.append(" ".join(str(error).replace(str(path), path.name).split()))
        return {}


def thin(xs: array, buckets: int, columns: list[array], extremes: bool = True) -> list[int]:
    """Indices that keep the shape of the columns at about `buckets` places, even on a linear and a logarithmic axis.

    With `extremes`, each bucket keeps where the first column is lowest and highest, so that a spike is never lost;
    else its last finite point.
    """
    count = len(xs)
    if count <= 2 * buckets:
        return [i for i in range(count) if math.isfinite(columns[0][i])]
    borders = {round(count * k / buckets) for k in range(buckets + 1)}
    borders |= {min(round(count ** (k / (buckets / 2))), count) for k in range(buckets // 2 + 1)}
    edges = sorted(borders | {0, count})
    kept: set[int] = set()
    ys = columns[0]
    for start, stop in pairwise(edges):
        inside = [i for i in range(start, stop) if math.isfinite(ys[i])]
        if inside and extremes:
            kept |= {min(inside, key=ys.__getitem__), max(inside, key=ys.__getitem__)}
        elif inside:
            kept.add(inside[-1])
    return sorted(kept)
