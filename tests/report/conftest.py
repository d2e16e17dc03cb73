"""A run folder made by hand from the documented formats."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

MODEL = {"vocab_size": 300, "context_length": 8, "emb_dim": 8, "n_heads": 2, "n_layers": 1}
CONFIG = {
    "model": MODEL,
    "data": {"sources": [{"path": "python", "weight": 1.0}]},
    "train": {"tokens": 400, "batch_tokens": 100},
    "seed": 0,
    "device": "cpu",
}
PLAN = {
    "peak_memory_bytes": 1_100_000,
    "step_seconds": 0.5,
    "tokens_per_second": 200.0,
    "machine": {"processor": "test", "cores": 2},
}


def step(number: int, loss: float = 2.0, seconds: float = 0.5, **other) -> dict:
    return {
        "kind": "step",
        "step": number,
        "tokens": 100 * number,
        "loss": loss,
        "grad_norm": 1.0,
        "lr_scale": 1.0,
        "lr": 1e-3,
        "matrix_lr": 2e-2,
        "tokens_per_second": 100 / seconds,
        "matmul_share": 0.25 / seconds,
        "step_seconds": seconds,
        "memory_bytes": 1_000_000 + number,
    } | other


def evaluation(number: int, loss: float, bits: float) -> dict:
    return {
        "kind": "eval",
        "step": number,
        "tokens": 100 * number,
        "loss": loss,
        "perplexity": 12.5,
        "bits_per_byte": bits,
        "eval_tokens": 64,
        "eval_bytes": 200,
        "seconds": 0.25,
    }


def mark(kind: str, number: int, reason: str) -> dict:
    return {
        "kind": kind,
        "step": number,
        "tokens": 100 * number,
        "reason": reason,
        "time": f"2026-11-24T08:0{number}:00+00:00",
    }


def sample(number: int, text: str, prompt: str = "") -> dict:
    return {"step": number, "tokens": 100 * number, "prompt": prompt, "text": text, "seed": 1, "temperature": 0.8}


WHOLE = [
    mark("start", 0, "new"),
    step(1, 4.0),
    step(2, 3.0, 1.0),
    evaluation(2, 2.5, 1.5),
    {"kind": "save", "step": 2, "tokens": 200, "path": "checkpoints/step-00000002", "bytes": 10, "seconds": 0.125},
    mark("stop", 2, "SIGTERM"),
    mark("start", 2, "resumed") | {"changed": {"train.save_every": [2, 1]}},
    step(3, 2.0),
    step(4, 1.0),
    evaluation(4, 2.75, 1.65),
    mark("end", 4, "finished"),
]
SAMPLES = [sample(1, "x = (\n"), sample(1, "x = )\n"), sample(4, "f():\n    return 1\nhalf a li", "def ")]


@pytest.fixture
def records() -> SimpleNamespace:
    return SimpleNamespace(
        step=step,
        evaluation=evaluation,
        mark=mark,
        sample=sample,
        whole=WHOLE,
        samples=SAMPLES,
        config=CONFIG,
        plan=PLAN,
    )


@pytest.fixture
def make_run(tmp_path):
    """make_run(metrics=..., samples=..., config=..., plan=...): None leaves the file out."""

    def make(metrics=WHOLE, samples=SAMPLES, config=CONFIG, plan=PLAN, name="demo") -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for file, lines in (("metrics.jsonl", metrics), ("samples.jsonl", samples)):
            if lines is not None:
                (folder / file).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        if config is not None:
            (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        if plan is not None:
            (folder / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
        return folder

    return make


@pytest.fixture
def dataset():
    """A data set of plain bytes with the end of text as 256: the parts that a report uses."""
    texts = [b"import os\n", "é".encode() * 50, b"x = 1\n" * 20]
    tokens = [256] + [t for text in texts for t in (*text, 256)]
    split = SimpleNamespace(n_tokens=len(tokens), tokens=lambda start, stop: tokens[start:stop])
    tokenizer = SimpleNamespace(eot_id=256, decode=lambda ids: bytes(ids).decode())
    amounts = {"documents": 3, "bytes": 230, "tokens": 234}
    report = {
        **amounts,
        "training": {"documents": 0, "bytes": 0, "tokens": 0},
        "validation": {**amounts, "rule": "1 % <b>"},
        "sources": [{"path": "python", **amounts}],
        "problems": [{"origin": "a<b>.py", "line": 3, "what": "not UTF-8", "action": "left out"}],
        "n_problems": 1,
        "problem_counts": {"not UTF-8": 1},
    }
    return SimpleNamespace(validation=split, tokenizer=tokenizer, report=report, text=b"".join(texts))
