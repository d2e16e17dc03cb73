"""The report's main facts as text with units: one wording for the terminal and the page."""

from collections.abc import Iterator
from typing import Any

from kiem.format import bytes_text, count_of, integer_text, is_number, number_text, percent_text, plural, seconds_text

RISE = 1.02  # of the lowest held-out loss: what is beyond it is no noise of the evaluation


def headline(report: dict[str, Any]) -> str:
    """One line: how far the run came."""
    done = f"{report['status']} at step {integer_text(report['step'])}"
    of = f" of {integer_text(report['steps_planned'])}" if report["steps_planned"] else ""
    size = f", {count_of(report['parameters'], 'parameter')}" if report["parameters"] else ""
    time = seconds_text(report["seconds"])
    if report["starts"] > 1:
        time += f" in all, {seconds_text(report['last_start_seconds'])} since the resume"
    return f"{done}{of}, {count_of(report['tokens'], 'token')} in {time}{size}"


def facts(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(what, value with unit) of the main results, for the terminal and the page."""
    yield "held-out loss", f"{number_text(report['loss'])} nats per token"
    yield "perplexity", f"{number_text(report['perplexity'], 2)} per token"
    yield "bits per byte", number_text(report["bits_per_byte"])
    compression = report["compression"]
    if compression["text_bytes"]:
        yield "gzip -9, same text", f"{number_text(compression['gzip_9_bits_per_byte'])} bits per byte"
        yield "xz -9, same text", f"{number_text(compression['xz_9_bits_per_byte'])} bits per byte"
    yield "training loss, smoothed", f"{number_text(report['train_loss'])} nats per token"
    yield "speed", f"{integer_text(report['tokens_per_second'])} tokens/s"
    yield "utilization (share of peak matmul throughput)", percent_text(report["matmul_share"])
    yield "time of one step (median)", seconds_text(report["step_seconds"])
    yield "peak memory", bytes_text(report["peak_memory_bytes"])
    yield "evaluations and saves", f"{seconds_text(report['eval_seconds'])} and {seconds_text(report['save_seconds'])}"


def plan_rows(planned: dict[str, dict[str, Any]]) -> Iterator[tuple[str, str, str, str]]:
    """(what, planned, measured, ratio) as text."""
    writers = {
        "peak_memory_bytes": ("peak memory", bytes_text),
        "step_seconds": ("time of one step", seconds_text),
        "tokens_per_second": ("tokens per second", integer_text),
    }
    for key, (name, write) in writers.items():
        of = planned[key]
        yield name, write(of["planned"]), write(of["measured"]), number_text(of["ratio"], 2)


def data_lines(data: dict[str, Any]) -> Iterator[str]:
    """What a user should know of prepared text: how much it is, what is held out, and what was left out."""
    training, held_out = data["training"], data["validation"]
    yield (
        f"text: {plural(data['documents'], 'document')}, {bytes_text(data['bytes'])}; "
        f"{count_of(training['tokens'], 'token')} to train on, {count_of(held_out['tokens'], 'token')} held out "
        f"({held_out['rule']})"
    )
    yield from data["notes"]


def overfitting(report: dict[str, Any]) -> list[str]:
    """What to say of a run whose held-out loss has risen since its lowest; empty if it has not."""
    losses = [(e["loss"], e["step"]) for e in report["evaluations"] if is_number(e["loss"]) and is_number(e["step"])]
    if len(losses) < 3 or losses[-1][0] <= RISE * min(losses)[0]:
        return []
    (lowest, step), last = min(losses), losses[-1][0]
    return [
        f"the held-out loss was lowest at step {integer_text(int(step))} ({lowest:.4f}) and has risen to {last:.4f}: "
        "the model overfits. More text or a shorter run gives a better one"
    ]
