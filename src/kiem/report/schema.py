"""report.json: its version, and every key with its unit and meaning; the tables of docs/report.md are made here."""

import re

from kiem.runs.metrics import RECORDS, SAMPLE_KEYS

SCHEMA_VERSION = 1

# Dotted paths; `[]` stands for each element of a list, `*` for each key. A number that is not known is null.
KEYS: dict[str, str] = {
    "schema_version": "integer; grows when a key changes its meaning or goes; new keys do not change it",
    "kiem_version": "version of Kiem that wrote the report",
    "name": "the run folder's name",
    "written_at": "ISO 8601, when the report was written",
    "status": "`finished`, `stopped` (before its last token; see reason), `unfinished` (still going, or killed)",
    "reason": "text of the last stop or end; null while unfinished",
    "starts": "how many times the run was started or resumed",
    "started_at": "ISO 8601, the first start; null if unknown",
    "ended_at": "ISO 8601, the last stop or end; null while unfinished",
    "parameters": "trainable parameters, a tied head counted once",
    "step": "updates done",
    "steps_planned": "updates the configuration asks for",
    "tokens": "training tokens seen",
    "tokens_planned": "training tokens the configuration asks for",
    "loss": "nats per held-out token, last evaluation",
    "perplexity": "exp(loss), last evaluation",
    "bits_per_byte": "bits per byte of held-out text, last evaluation",
    "loss_step": "step of the last evaluation",
    "eval_tokens": "held-out tokens of the last evaluation",
    "eval_bytes": "bytes of held-out text of the last evaluation",
    "best_bits_per_byte": "lowest bits per byte of any evaluation",
    "best_step": "its step",
    "train_loss": "nats per training token, smoothed over the last `smoothing_steps` steps",
    "smoothing_steps": "window of the exponential mean, in steps",
    "seconds": "seconds spent in training steps, over all starts; evaluations, samples and saves not counted",
    "last_start_seconds": "the same since the newest start or resume",
    "eval_seconds": "seconds spent in evaluations",
    "save_seconds": "seconds spent in saves",
    "tokens_per_second": "training tokens / seconds, over the steps that were logged",
    "matmul_share": "0..1: mean over training time of the steps' matmul_share",
    "step_seconds": "seconds, median of the steps",
    "peak_memory_bytes": "bytes, most that any step saw",
    "planned.peak_memory_bytes": "bytes: `planned` before the start, `measured` in the run, and their `ratio`",
    "planned.step_seconds": "the same of the seconds of one update",
    "planned.tokens_per_second": "the same of training tokens per second",
    "planned.*.planned": "number in the unit of the key above; null if there was no plan",
    "planned.*.measured": "number in the same unit; null before the first step",
    "planned.*.ratio": "planned / measured; 1 is a perfect plan",
    "compression.text_bytes": "bytes of held-out text the compressors were given (null: the text was not available)",
    "compression.gzip_9_bits_per_byte": "8 x size of `gzip -9` / text_bytes",
    "compression.xz_9_bits_per_byte": "8 x size of `xz -9` / text_bytes",
    "python_samples": "list, one entry per step with samples, for a corpus of Python source; else null",
    "python_samples[].step": "updates done when they were drawn",
    "python_samples[].judged": "samples with at least one complete line that is not blank",
    "python_samples[].accepted": "of those, how many begin a valid program (codeop), cut after the last line",
    "python_samples[].accepted_share": "0..1: accepted / judged",
    "data": "facts of the prepared text as `kiem prepare` reports them; null: not available",
    "evaluations": "list, oldest first: all of one sample of the held-out text; `loss` is of the whole of it",
    "evaluations[].step": "updates done",
    "evaluations[].tokens": "training tokens seen",
    "evaluations[].loss": "nats per held-out token",
    "evaluations[].perplexity": "exp(loss)",
    "evaluations[].bits_per_byte": "bits per byte of held-out text",
    "curve.step": "list: steps of the curve, thinned to about 200 points",
    "curve.tokens": "list: training tokens seen at those steps",
    "curve.seconds": "list: training seconds up to those steps",
    "curve.train_loss": "list: nats per token, smoothed as `train_loss`",
    "changes": "list: settings that had another value when the run was resumed",
    "changes[].step": "updates done when it was resumed",
    "changes[].time": "ISO 8601, when it was resumed",
    "changes[].key": "the setting",
    "changes[].before": "its value until then",
    "changes[].now": "its value from then on",
    "samples": "list: samples of at most 8 steps spread over training, the first and the last among them",
    "samples[].step": "updates done",
    "samples[].tokens": "training tokens seen",
    "samples[].prompt": "text the sample continues",
    "samples[].text": "generated text, unchanged; escape it before showing it",
    "samples[].seed": "of the sampling",
    "samples[].temperature": "of the sampling",
    "environment": "mapping: versions of python, torch and kiem, platform, and the plan's machine",
    "config": "the resolved configuration, config.yaml",
    "problems": "list of texts: what was missing or odd in the run folder",
}
OPAQUE = ("data", "environment", "config")  # their inner keys belong to others


def document(text: str) -> str:
    """`text` (docs/report.md) with the tables between `<!-- table NAME -->` and `<!-- end -->` written anew."""
    tables = {"report.json": _table("key", KEYS), "samples.jsonl": _table("key", SAMPLE_KEYS)}
    tables["metrics.jsonl"] = "\n\n".join(f"`{kind}`\n\n{_table('key', keys)}" for kind, keys in RECORDS.items())
    pattern = re.compile(r"(<!-- table (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
    return pattern.sub(lambda found: f"{found[1]}\n{tables[found[2]]}\n\n{found[3]}", text)


def _table(name: str, keys: dict[str, str]) -> str:
    rows = [f"| `{key}` | {meaning} |" for key, meaning in keys.items()]
    return "\n".join([f"| {name} | what it is |", "| --- | --- |", *rows])
