"""The report of a run as data: report.json, and the call that writes it and report.html.

It works on a run that finished, stopped early or is still going, and says what is missing.
"""

import math
import platform
import statistics
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kiem.config.model import ModelConfig
from kiem.files import plain, to_json, write_atomically
from kiem.format import is_number, plural
from kiem.planning.count import total_parameters
from kiem.report.baselines import compression_baselines, is_python_corpus, parse_rates
from kiem.report.facts import overfitting
from kiem.report.page import render_page
from kiem.report.read import Run, as_number, read_run, thin
from kiem.report.schema import SCHEMA_VERSION
from kiem.report.terminal import render_terminal
from kiem.runs.run import Run as RunFolder

if TYPE_CHECKING:
    from kiem.data.shards import Dataset

__all__ = ["build_report", "compression_baselines", "render_terminal", "write"]

CURVE_POINTS = 200
SAMPLED_STEPS = 8
MOST_COMPRESSED_BYTES = 16 << 20  # xz -9 packs about 2 MB in a second
TOKENS_AT_ONCE = 1 << 20


def build_report(run_folder: str | Path, dataset: "Dataset | None" = None) -> dict[str, Any]:
    """The report of a run folder; the keys and units are those of report/schema.py.

    What only the data knows (its facts, the compressors' results on the held-out text) is taken from `dataset`;
    without it, from the report.json that is already there. Raises CheckpointError if the folder is not a run folder.
    """
    return _build(read_run(run_folder), dataset)


def write(run_folder: str | Path, dataset: "Dataset | None" = None) -> dict[str, Any]:
    """Write report.json and report.html into the run folder, each at once, and return the report.

    Raises CheckpointError if it is not a run folder, StorageError if it cannot be written.
    """
    run = read_run(run_folder)
    report = _build(run, dataset)
    write_atomically(run.folder / "report.json", to_json(report, indent=1) + "\n")
    write_atomically(run.folder / "report.html", render_page(report, run))
    return report


def _build(run: Run, dataset: "Dataset | None") -> dict[str, Any]:
    earlier = _earlier_report(run.folder)
    report = {
        "schema_version": SCHEMA_VERSION,
        "kiem_version": _version("kiem"),
        "name": run.folder.resolve().name,
        "written_at": datetime.now(UTC).astimezone().isoformat(timespec="seconds"),
        **_state(run),
        **_amounts(run),
        **_held_out(run),
        **_speed(run),
    }
    report["planned"] = _plan_against_measured(run, report)
    report["compression"] = _compression(dataset, earlier)
    report["python_samples"] = parse_rates(run.samples) if is_python_corpus(run.config) else None
    report["data"] = dict(dataset.report) if dataset is not None else earlier.get("data")
    report["evaluations"] = [
        {name: _number(e, name) for name in ("step", "tokens", "loss", "perplexity", "bits_per_byte")}
        for e in run.curve_evals
    ]
    report["curve"] = _curve(run)
    report["samples"] = _spread_samples(run.samples)
    report["environment"] = _environment(run, earlier if dataset is None else {})
    report["config"] = run.config
    report["changes"] = [
        {"step": mark.get("step"), "time": mark.get("time"), "key": key, "before": values[0], "now": values[1]}
        for mark in run.marks
        if isinstance(mark.get("changed"), dict)
        for key, values in mark["changed"].items()
        if isinstance(values, list) and len(values) == 2
    ]
    report["problems"] = _shortened([*_worse_than_before(run), *overfitting(report), *run.problems])
    return plain(report)


def _number(record: Mapping[str, Any], name: str) -> Any:
    """The record's number of that name, one that is not finite too; None for anything else."""
    value = record.get(name)
    return value if is_number(value) or isinstance(value, float) else None


def _state(run: Run) -> dict[str, Any]:
    starts = [m for m in run.marks if m["kind"] == "start"]
    last = run.marks[-1] if run.marks else {"kind": "start"}
    over = last["kind"] != "start"
    return {
        "status": {"end": "finished", "stop": "stopped"}.get(last["kind"], "unfinished"),
        "reason": last.get("reason") if over else None,
        "starts": len(starts),
        "started_at": starts[0].get("time") if starts else None,
        "ended_at": last.get("time") if over else None,
    }


def _amounts(run: Run) -> dict[str, Any]:
    train = run.config.get("train")
    train = train if isinstance(train, Mapping) else {}
    tokens, batch = as_number(train.get("tokens")), as_number(train.get("batch_tokens"))
    return {
        "parameters": _parameters(run.config),
        "step": max(int(run.steps["step"][-1]) if len(run) else 0, run.newest_checkpoint),
        "steps_planned": math.ceil(tokens / batch) if tokens > 0 and batch > 0 else None,
        "tokens": int(run.steps["tokens"][-1]) if len(run) else 0,
        "tokens_planned": _number(train, "tokens"),
        "train_loss": run.smoothed[-1] if len(run) else None,
        "smoothing_steps": run.smoothing_steps,
    }


def _parameters(config: Mapping[str, Any]) -> int | None:
    try:
        return total_parameters(ModelConfig.model_validate(config.get("model")))
    except ValueError:
        return None


def _held_out(run: Run) -> dict[str, Any]:
    last = run.evals[-1] if run.evals else {}
    scored = [e for e in run.curve_evals if math.isfinite(as_number(e.get("bits_per_byte")))]
    best = min(scored, key=lambda e: e["bits_per_byte"], default={})
    return {
        **{name: _number(last, name) for name in ("loss", "perplexity", "bits_per_byte", "eval_tokens", "eval_bytes")},
        "loss_step": _number(last, "step"),
        "best_bits_per_byte": _number(best, "bits_per_byte"),
        "best_step": _number(best, "step"),
    }


def _speed(run: Run) -> dict[str, Any]:
    """Rates over the whole run. Where the log begins after the first step, they are those of the logged steps."""
    seconds = run.seconds[-1] if len(run) else 0.0
    busy = [
        (share, time)
        for share, time in zip(run.steps["matmul_share"], run.steps["step_seconds"], strict=True)
        if math.isfinite(share) and math.isfinite(time)
    ]
    time_in_all = sum(time for _, time in busy)
    memory = [m for m in run.steps["memory_bytes"] if math.isfinite(m)]
    times = [t for t in run.steps["step_seconds"] if math.isfinite(t)]
    return {
        "seconds": seconds,
        "last_start_seconds": _seconds_since_last_start(run),
        "eval_seconds": _total(run.evals),
        "save_seconds": _total(run.saves),
        "tokens_per_second": _tokens_logged(run) / seconds if seconds > 0 else None,
        "matmul_share": sum(share * time for share, time in busy) / time_in_all if time_in_all > 0 else None,
        "step_seconds": statistics.median(times) if times else None,
        "peak_memory_bytes": int(max(memory)) if memory else None,
    }


def _seconds_since_last_start(run: Run) -> float:
    """Training seconds of the steps after the newest `start`."""
    starts = [mark for mark in run.marks if mark["kind"] == "start"]
    resumed_at = as_number(starts[-1].get("step")) if starts else 0.0
    before = [seconds for step, seconds in zip(run.steps["step"], run.seconds, strict=True) if step <= resumed_at]
    return run.seconds[-1] - (before[-1] if before else 0.0) if len(run) else 0.0


def _tokens_logged(run: Run) -> float:
    """Tokens of the steps whose seconds are counted."""
    tokens, first = run.steps["tokens"], run.steps["step"][0]
    per_step = tokens[0] / first if first else 0.0
    return tokens[-1] - per_step * max(first - 1, 0.0)


def _total(records: list[dict[str, Any]]) -> float:
    return math.fsum(s for s in (as_number(r.get("seconds")) for r in records) if math.isfinite(s))


def _plan_against_measured(run: Run, report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    pairs = {}
    for name in ("peak_memory_bytes", "step_seconds", "tokens_per_second"):
        planned, measured = as_number(run.plan.get(name)), as_number(report.get(name))
        known = math.isfinite(planned) and math.isfinite(measured) and measured > 0
        pairs[name] = {
            "planned": _number(run.plan, name),
            "measured": report[name],
            "ratio": planned / measured if known else None,
        }
    return pairs


def _compression(dataset: "Dataset | None", earlier: dict[str, Any]) -> dict[str, Any]:
    empty = {"text_bytes": None, "gzip_9_bits_per_byte": None, "xz_9_bits_per_byte": None}
    if dataset is None:
        kept = earlier.get("compression")
        return empty | (kept if isinstance(kept, dict) else {})
    return empty | compression_baselines(held_out_text(dataset))


def held_out_text(dataset: "Dataset", most_bytes: int = MOST_COMPRESSED_BYTES) -> bytes:
    """The validation split as UTF-8 text without end-of-text marks: its first documents, until they have `most_bytes`.

    The last of these is cut, so that a longer split gives exactly `most_bytes`.
    """
    split, tokenizer = dataset.validation, dataset.tokenizer
    assert split is not None
    texts, size, document = [], 0, []
    for start in range(0, split.n_tokens, TOKENS_AT_ONCE):
        for token in map(int, split.tokens(start, min(start + TOKENS_AT_ONCE, split.n_tokens))):
            if token != tokenizer.eot_id:
                document.append(token)
                if len(document) < TOKENS_AT_ONCE:
                    continue
            if document:
                texts.append(tokenizer.decode(document).encode("utf-8", "replace"))
                size += len(texts[-1])
                document = []
            if size >= most_bytes:
                return b"".join(texts)[:most_bytes]
    return b"".join([*texts, tokenizer.decode(document).encode("utf-8", "replace")])[:most_bytes]


def _worse_than_before(run: Run) -> list[str]:
    """A run that ended above where it began learned nothing, whatever its status."""
    if len(run) < 2 or not run.smoothed[-1] > run.steps["loss"][0]:
        return []
    return [
        f"the training loss ended at {run.smoothed[-1]:.4f}, above {run.steps['loss'][0]:.4f} of the first step: the "
        "run diverged. Try a lower learning rate (train.lr, train.matrix_lr)"
    ]


def _curve(run: Run) -> dict[str, list[float]]:
    kept = thin(run.steps["step"], CURVE_POINTS, [run.smoothed], extremes=False)
    whole = {name: [int(run.steps[name][i]) for i in kept] for name in ("step", "tokens")}
    return {**whole, "seconds": [run.seconds[i] for i in kept], "train_loss": [run.smoothed[i] for i in kept]}


def _spread_samples(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Samples of SAMPLED_STEPS steps: the first, the last and evenly between."""
    steps = sorted({s["step"] for s in samples})
    if len(steps) > SAMPLED_STEPS:
        steps = [steps[round(k * (len(steps) - 1) / (SAMPLED_STEPS - 1))] for k in range(SAMPLED_STEPS)]
    keys = ("step", "tokens", "prompt", "text", "seed", "temperature")
    return [{key: s.get(key) for key in keys} for s in samples if s["step"] in steps]


def _environment(run: Run, earlier: dict[str, Any]) -> dict[str, Any]:
    """Versions and machine of this process; of the process that trained, if an earlier report is only rewritten."""
    if isinstance(earlier.get("environment"), dict):
        return earlier["environment"]
    machine = run.plan.get("machine")
    return {
        "kiem": _version("kiem"),
        "torch": _version("torch"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        **(machine if isinstance(machine, dict) else {}),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _earlier_report(folder: Path) -> dict[str, Any]:
    report = RunFolder(folder).report
    return report if report.get("schema_version") == SCHEMA_VERSION else {}


def _shortened(problems: list[str], most: int = 20) -> list[str]:
    rest = len(problems) - most
    return problems[:most] + ([f"and {plural(rest, 'more problem')} of this kind"] if rest > 0 else [])
