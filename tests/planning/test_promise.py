"""The promise of a plan, by a real run in a process of its own: peak memory within 10 %, time of a step within 25 %."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

RUN = """
import json, statistics, sys
from pathlib import Path
from kiem.config.presets import resolve
from kiem.config.run import RunConfig
from kiem.data.prepare import prepare
from kiem.planning import predict
from kiem.runs.run import Run
from kiem.training import loop

folder, values = Path(sys.argv[1]), json.loads(sys.argv[2])
config = RunConfig(data={"sources": [{"path": str(folder / "text.txt")}], "tokenizer": "bytes"}, **values)
dataset = prepare(config.data, 258, folder / "cache")
config = resolve(config, dataset.tokenizer.vocab_size)
plan = predict.plan(config)
loop.train(config, Run(folder / "run"), dataset, quiet=True)
records = map(json.loads, (folder / "run/metrics.jsonl").read_text().splitlines())
steps = [r for r in records if r["kind"] == "step"]
seconds = statistics.median(r["step_seconds"] for r in steps[1:])
print(json.dumps({"step": plan.step_seconds / seconds, "peak": plan.peak_memory_bytes / steps[-1]["memory_bytes"]}))
"""

GPT2 = {"vocab_size": 2048, "context_length": 128, "emb_dim": 128, "n_heads": 4, "n_layers": 4}
MODERN = {
    "vocab_size": 1024,
    "context_length": 256,
    "emb_dim": 256,
    "n_heads": 4,
    "n_kv_heads": 2,
    "n_layers": 4,
    "hidden_dim": 704,
    "norm": "rmsnorm",
    "activation": "swiglu",
    "position": "rope",
    "qk_norm": True,
    "bias": False,
}


def ratios(folder: Path, model: dict, **train) -> dict[str, float]:
    """planned / measured of one run of a few steps."""
    folder.mkdir()
    lines = (f"line {i} of a text that is long enough, {i * i % 977}\n" for i in range(8_000))
    (folder / "text.txt").write_text("".join(lines))
    values = json.dumps({"model": model, "train": {"eval_tokens": 2_048, **train}})
    command = [sys.executable, "-c", RUN, str(folder), values]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def check(tmp_path: Path, model: dict, **train) -> None:
    """Memory holds in every run. A time can be spoilt by what else the machine does: one run of three must hold."""
    seen = []
    for attempt in range(3):
        seen.append(ratios(tmp_path / str(attempt), model, **train))
        assert 0.9 <= seen[-1]["peak"] <= 1.1, seen
        if 0.75 <= seen[-1]["step"] <= 1.25:
            return
    pytest.fail(f"planned / measured: {seen}")


def test_the_promise_on_a_small_gpt2(tmp_path):
    check(tmp_path, GPT2, tokens=8 * 1_024, batch_tokens=1_024)


@pytest.mark.slow
def test_the_promise_with_accumulation_and_the_default_family(tmp_path):
    check(tmp_path, MODERN, tokens=5 * 4_096, batch_tokens=4_096, micro_batch_tokens=2_048)


@pytest.mark.slow
def test_the_promise_on_a_model_too_deep_to_time_whole(tmp_path):
    deep = {**GPT2, "emb_dim": 512, "n_heads": 8, "n_layers": 10, "vocab_size": 16_384, "drop_rate": 0.1}
    check(tmp_path, deep, tokens=5 * 1_024, batch_tokens=1_024, optimizer="adamw")


@pytest.mark.slow
def test_the_promise_with_recomputation(tmp_path):
    check(tmp_path, {**MODERN, "n_layers": 8}, tokens=4 * 4_096, batch_tokens=4_096, activation_checkpointing=True)
