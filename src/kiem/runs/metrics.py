"""The numbers of a run: metrics.jsonl and samples.jsonl, append-only, one JSON object a line; and the rates in them.

A line is written by one system call, so that a killed process leaves whole lines. A number that JSON cannot hold is
written by its name (files.NON_FINITE): hiding it as null would hide a broken run.
"""

import math
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kiem.errors import DataError, StorageError
from kiem.files import NON_FINITE, from_json, open_regular, storage_error, to_json, write_atomically

# kind -> key -> what it is. The table in docs/report.md is held equal to this one by a test.
RECORDS: dict[str, dict[str, str]] = {
    "start": {
        "step": "updates done before this start (0 for a new run)",
        "tokens": "training tokens seen before this start",
        "reason": "`new`, `resumed`, or where the weights of a fork are from",
        "changed": "settings that differ from those before: {key: [before, now]}; null if there are none",
        "time": "ISO 8601, with the offset from UTC",
    },
    "step": {
        "step": "number of the update, from 1",
        "tokens": "training tokens seen after it",
        "loss": "nats per token: sum over the step's valid tokens / their number, before the update",
        "grad_norm": "L2 norm of the whole gradient, before clipping",
        "lr_scale": "0..1: the schedule's factor on every learning rate",
        "lr": "learning rate of AdamW in this update",
        "matrix_lr": "learning rate of Muon in this update; null with optimizer adamw",
        "tokens_per_second": "the step's training tokens / step_seconds",
        "matmul_share": "0..1: FLOPs of the step per second / the machine's measured matrix-product rate",
        "step_seconds": "seconds from the batch's request to the end of the update",
        "memory_bytes": "peak memory of the process so far (on a GPU: of the device)",
    },
    "eval": {
        "step": "updates done",
        "tokens": "training tokens seen",
        "loss": "nats per held-out token",
        "perplexity": "exp(loss)",
        "bits_per_byte": "held-out loss in bits / bytes of the held-out text; null where the tokenizer loses text",
        "eval_tokens": "held-out tokens evaluated",
        "eval_bytes": "bytes of UTF-8 text those tokens stand for",
        "part": "`sample`: of the held-out text, the same at every point of the curve; `whole`: all of it, at the end",
        "seconds": "seconds the evaluation took",
    },
    "save": {
        "step": "updates done",
        "tokens": "training tokens seen",
        "path": "the checkpoint's folder, relative to the run folder",
        "bytes": "its size in bytes",
        "seconds": "seconds the save took",
    },
    "shortened": {
        "step": "updates done",
        "tokens": "training tokens seen",
        "total_tokens": "training tokens of the whole run from now on, so that it ends in the time it was given",
        "cooldown_tokens": "its cool-down from now on",
        "time": "ISO 8601, with the offset from UTC",
    },
    "stop": {
        "step": "updates done",
        "tokens": "training tokens seen",
        "reason": "why the run ended before its last token",
        "time": "ISO 8601, with the offset from UTC",
    },
    "end": {
        "step": "updates done",
        "tokens": "training tokens seen",
        "reason": "`finished`",
        "warning": "what is wrong with a run that learned nothing; null if it did",
        "time": "ISO 8601, with the offset from UTC",
    },
}
SAMPLE_KEYS: dict[str, str] = {
    "step": "updates done",
    "tokens": "training tokens seen",
    "prompt": "text the sample continues; empty: the start of a document",
    "text": "generated text, without the prompt",
    "seed": "of the sampling",
    "temperature": "of the sampling; 0 is greedy",
}
SYNCED_KINDS = frozenset({"save", "stop", "end"})
TEXT_KEYS = frozenset({"kind", "reason", "time", "path", "prompt", "text"})
MOST_LINE_BYTES = 64 << 20


def tokens_per_second(tokens: int, seconds: float) -> float:
    """Training tokens (every valid target of the step, all ranks) per second of wall time. NaN for no time."""
    return tokens / seconds if seconds > 0 else math.nan


def matmul_share(flops_per_token: float, tokens_per_second: float, matmul_rate: float) -> float:
    """Share (0..1) of the machine's own matrix-product rate that training turns into useful work.

    FLOPs per token (forward and backward by plan.count, without recomputation) x tokens/s / FLOP/s of a large matrix
    product in the same data type on the same machine (runtime.matmul_rate). NaN for a rate that is not positive.
    """
    return flops_per_token * tokens_per_second / matmul_rate if matmul_rate > 0 else math.nan


class Smoothed:
    """Exponential mean of the last about `window` values, free of the start's bias (Adam's correction); skips NaN."""

    def __init__(self, window: float) -> None:
        self.keep = 1.0 - 1.0 / max(window, 1.0)
        self.total = self.weight = 0.0

    def update(self, x: float) -> float:
        """Take in x and return the mean now; NaN before the first finite value."""
        if math.isfinite(x):
            self.total = self.keep * self.total + (1.0 - self.keep) * x
            self.weight = self.keep * self.weight + (1.0 - self.keep)
        return self.total / self.weight if self.weight else math.nan


class JsonLines:
    """An append-only file of JSON objects, one a line. Raises StorageError when the disk does not take a line."""

    def __init__(self, path: str | Path) -> None:
        self.path, self._file = Path(path), -1
        self._open()

    def _open(self) -> None:
        with _storage(self.path):
            self.close()
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
            self._file = os.open(self.path, flags, 0o666)
            if not stat.S_ISREG(os.fstat(self._file).st_mode):
                self.close()
                raise OSError("not a regular file")

    def append(self, record: Mapping[str, Any], sync: bool = False) -> None:
        """Write one record. With `sync` it is on the disk, not only with the operating system, when this returns."""
        line = (to_json(record) + "\n").encode()
        with _storage(self.path):
            before = os.fstat(self._file).st_size
            try:
                written = 0
                while written < len(line):
                    written += os.write(self._file, line[written:])
                if sync:
                    os.fsync(self._file)
            except OSError:
                os.ftruncate(self._file, before)  # no half line stays
                raise

    def sync(self) -> None:
        """Wait until every record is on the disk, not only with the operating system."""
        with _storage(self.path):
            os.fsync(self._file)

    def truncate(self, step: int) -> list[str]:
        """Drop the records after `step`, and lines that are not whole records; what a resume begins with.

        The file is replaced at once: whenever the process dies, it is the old one or the new one. Returns one text for
        each damaged line that was dropped (a half-written last line is none).
        """
        problems: list[str] = []
        with open_regular(self.path) as old:
            kept = [line for line, record in _lines(old, self.path.name, problems) if _step_of(record) <= step]
            whole = old.tell()
        if sum(map(len, kept)) != whole:
            self.close()  # Windows replaces no open file
            try:
                write_atomically(self.path, b"".join(kept))
            finally:
                self._open()
        return problems

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> "JsonLines":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class MetricsLog(JsonLines):
    """metrics.jsonl of a run."""

    def write(self, kind: str, **fields: Any) -> None:
        """Append a record of one of the kinds in RECORDS. Saves and ends are on the disk when this returns."""
        if kind not in RECORDS:
            raise ValueError(f"metrics record of kind {kind!r}; the kinds are {', '.join(RECORDS)}")
        self.append({"kind": kind, **fields}, sync=kind in SYNCED_KINDS)

    def last_kind(self) -> str | None:
        """The kind of the last record."""
        kind = None
        for record in iter_records(self.path):
            kind = record.get("kind")
        return kind


def iter_records(path: str | Path, problems: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """Records of a JSONL file in order. A missing file has none; a half-written last line is left out in silence;
    any other line that is not a record is left out and named in `problems`. Raises DataError if it cannot be read."""
    try:
        with open_regular(Path(path)) as file:
            for _, record in _lines(file, Path(path).name, problems if problems is not None else []):
                yield record
    except FileNotFoundError:
        return
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """All whole records of a metrics.jsonl or samples.jsonl; non-finite numbers are floats again."""
    return list(iter_records(path))


def _lines(file: Any, name: str, problems: list[str]) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Each whole line that is a record, and the record; the others are named in `problems`."""
    number, before = 0, None
    while line := file.readline(MOST_LINE_BYTES):
        number += 1
        record = parse_line(line)
        if record is None:
            if line.endswith(b"\n"):
                problems.append(f"{name}, line {number}: damaged, left out")
            continue
        if record.get("kind") == "step" and isinstance(step := record.get("step"), int):
            if before is not None and step > before + 1:
                problems.append(
                    f"{name}, line {number}: no record of step {before + 1}"
                    + (f" to {step - 1}" if step > before + 2 else "")
                )
            before = step
        yield line, record


def parse_line(line: bytes) -> dict[str, Any] | None:
    """The record on a whole line, or None."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = from_json(line)
    except ValueError:
        return None
    if not isinstance(record, dict):
        return None
    for key, value in record.items():
        if isinstance(value, str) and value in NON_FINITE and key not in TEXT_KEYS:
            record[key] = NON_FINITE[value]
    return record


def _step_of(record: dict[str, Any]) -> float:
    step = record.get("step")
    return step if isinstance(step, int | float) else math.inf


@contextmanager
def _storage(path: Path) -> Iterator[None]:
    """Turns the operating system's refusal into a StorageError that names the file."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise storage_error(error, str(path), path.parent) from error
