"""The command line as a person or a script uses it."""

import json
import math
import os
import re
import subprocess
import sys
import time

import pytest

CHAPTER = """GPT_CONFIG_124M = {
"vocab_size": 50257,  // Vocabulary size of the BPE tokenizer
"context_length": 1024, // Context length
"emb_dim": 768,       // Embedding dimension
"n_heads": 12,        // Number of attention heads
"n_layers": 12,       // Number of layers
"drop_rate": 0.1,     // Dropout rate: 10%
"qkv_bias": False     // Query-Key-Value bias
}
"""
VERBS = ("train", "prepare", "eval", "generate", "plan", "completion")


def run(*arguments, **more):
    return subprocess.run([sys.executable, "-m", "kiem", *arguments], capture_output=True, text=True, **more)


@pytest.mark.parametrize("verb", [None, *VERBS])
def test_help_is_light_and_has_examples(verb):
    code = f"""
import sys
from kiem.cli.main import main
main({[*([verb] if verb else []), "--help"]!r})
print([m for m in ("torch", "numpy", "pydantic", "yaml", "tokenizers") if m in sys.modules], file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    assert "Examples:" in done.stdout and "kiem " in done.stdout


@pytest.mark.parametrize("verb", [None, *VERBS])
def test_help_reads_few_modules(verb):
    """A count, which a busy machine does not change as it does a time. Besides what click needs, about 40 modules
    are read, most of the standard library, each in about half a millisecond."""
    code = f"""
import sys
before = len(sys.modules)
import click
needed = len(sys.modules) - before
from kiem.cli.main import main
main({[*([verb] if verb else []), "--help"]!r})
print(len(sys.modules) - before - needed, file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stderr) < 60


def test_version():
    assert re.fullmatch(r"kiem \d+\.\d+\.\d+\S*\n", run("--version", check=True).stdout)


@pytest.mark.parametrize("name", ["config.txt", "config.json", "config.py", "config", "config.cfg"])
def test_the_chapters_config_as_it_stands(kiem, place, name):
    (place / name).write_text(CHAPTER)
    plan = json.loads(kiem("plan", name, "--no-measure", "--json").out)
    assert plan["parameters"] == 124_412_160


def test_json_is_one_document_and_progress_goes_elsewhere(kiem):
    prepared = json.loads(kiem("prepare", "text.txt", "--tokenizer", "bytes", "--json").out)
    assert prepared["vocab_size"] == 257 and prepared["documents"] >= 1
    evaluated = json.loads(kiem("eval", "run", "--json").out)
    # A byte is a token here; the ends of text are predicted too and stand for no bytes.
    per_token = evaluated["loss"] / math.log(2)
    assert evaluated["bits_per_byte"] == pytest.approx(per_token * evaluated["tokens"] / evaluated["bytes"])
    assert evaluated["bits_per_byte"] > per_token
    texts = json.loads(kiem("generate", "run", "--n", "2", "--seed", "5", "--max-tokens", "8", "--json").out)["texts"]
    assert len(texts) == 2


def test_generate_repeats_with_a_seed(kiem):
    one, two = (kiem("generate", "run", "--prompt", "line ", "--seed", "3", "--max-tokens", "12") for _ in range(2))
    assert one.code == 0 and one.out == two.out and one.out.startswith("line ")


def test_train_resume_longer_and_the_run_folder(kiem, place):
    tiny = ["data.tokenizer=bytes", "model.vocab_size=257", "model.context_length=32", "model.emb_dim=16",
            "model.n_heads=2", "model.n_layers=1", "train.batch_tokens=64"]  # fmt: skip
    first = kiem("train", "--data", "text.txt", "--tokens", "256", "--out", "longer", *tiny)
    assert first.code == 0, first.err
    assert "parameters" in first.err and "step 4/4" in first.err  # the plan before, plain progress lines
    assert "bits per byte" in first.out and "plan against measured" in first.out
    names = {"config.yaml", "plan.json", "metrics.jsonl", "samples.jsonl", "tokenizer", "checkpoints", "report.json",
             "report.html"}  # fmt: skip
    assert names <= {p.name for p in (place / "longer").iterdir()}
    second = kiem("train", "longer", "--tokens", "512", "--json")
    assert second.code == 0, second.err
    report = json.loads(second.out)["report"]
    assert report["step"] == 8
    steps = [json.loads(line) for line in (place / "longer" / "metrics.jsonl").read_text().splitlines()]
    assert [s["step"] for s in steps if s["kind"] == "step"] == list(range(1, 9))


def test_completion_scripts(kiem):
    for shell in ("bash", "zsh", "fish"):
        assert "_KIEM_COMPLETE" in kiem("completion", shell).out


def test_completion_completes():
    done = run(env={**os.environ, "_KIEM_COMPLETE": "bash_complete", "COMP_WORDS": "kiem tr", "COMP_CWORD": "1"})
    assert "train" in done.stdout


def test_a_reader_that_leaves_is_no_error(place):
    command = f"{sys.executable} -m kiem --help | head -c 1"
    done = subprocess.run(["bash", "-c", f"{command}; exit ${{PIPESTATUS[0]}}"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr


def test_python_api(place, monkeypatch):
    monkeypatch.setenv("KIEM_CACHE", str(place / "cache"))
    monkeypatch.chdir(place)
    import kiem

    model = kiem.load("run")
    assert model.generate("line", max_tokens=5, seed=1) == model.generate("line", max_tokens=5, seed=1)
    assert kiem.evaluate("run").bits_per_byte > 0
    config = {"model": {"vocab_size": 257, "context_length": 32, "emb_dim": 16, "n_heads": 2, "n_layers": 1},
              "data": {"tokenizer": "bytes"}, "train": {"batch_tokens": 64}}  # fmt: skip
    trained = kiem.train(config, data="text.txt", tokens=128, out="from-python", quiet=True)
    assert trained.load().generate("line", max_tokens=3, temperature=0) is not None


@pytest.mark.slow
def test_a_time_budget_is_kept(kiem, place):
    began = time.monotonic()
    done = kiem("train", "--data", "text.txt", "--minutes", "0.4", "--out", "timed", "data.tokenizer=bytes", "--json")
    assert done.code == 0, done.err
    report = json.loads(done.out)["report"]
    assert report
    # A shared machine may be slower while it trains than while it was measured.
    assert time.monotonic() - began < 2 * 0.4 * 60
