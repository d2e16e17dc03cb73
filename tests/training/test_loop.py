"""The loop of a run: its curve, its end, and the time it was given."""

import json
import time

import pytest

import kiem
from kiem.errors import Stopped
from kiem.optim.schedule import lr_scale
from kiem.runs.metrics import read_metrics
from kiem.runs.run import Run
from kiem.training import loop
from kiem.training.deadline import Deadline

MODEL = {"vocab_size": 256 + 1, "context_length": 16, "emb_dim": 16, "n_heads": 2, "n_layers": 1}


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Trains a small model on a small text: `small(tokens=..., **train)` gives the run's folder."""
    monkeypatch.setenv("KIEM_CACHE", str(tmp_path / "cache"))
    lines = [f"{i} squared is {i * i}, and the line before it says {i - 1}\n" for i in range(2000)]
    (tmp_path / "text.txt").write_text("".join(lines))

    def train(steps=20, out="run", **settings):
        train = {"tokens": 64 * steps, "batch_tokens": 64, "eval_every": 5, "eval_tokens": 64, "sample_every": 100}
        config = {"model": MODEL, "data": {"sources": [str(tmp_path / "text.txt")], "tokenizer": "bytes"}}
        kiem.train(config | {"train": train | settings}, out=tmp_path / out, quiet=True)
        return tmp_path / out

    return train


def evals(folder):
    return [r for r in read_metrics(folder / "metrics.jsonl") if r["kind"] == "eval"]


def test_every_point_of_the_curve_is_of_the_same_sample_and_the_full_figure_stands_apart(small):
    found = evals(folder := small())
    assert [(r["step"], r["part"]) for r in found] == [
        (5, "sample"), (10, "sample"), (15, "sample"), (20, "sample"), (20, "whole"),
    ]  # fmt: skip
    assert len({(r["eval_tokens"], r["eval_bytes"]) for r in found[:4]}) == 1 and found[0]["eval_tokens"] == 64
    assert found[4]["eval_tokens"] > 64
    report = json.loads((folder / "report.json").read_text())
    assert [e["loss"] for e in report["evaluations"]] == [r["loss"] for r in found[:4]]
    assert report["loss"] == found[4]["loss"] and report["eval_tokens"] == found[4]["eval_tokens"]
    assert kiem.evaluate(folder).loss == pytest.approx(found[4]["loss"], rel=1e-6)
    assert report["problems"] == []


def test_a_sample_of_everything_is_the_whole(small):
    found = evals(folder := small(eval_tokens=1_000_000))
    assert [(r["step"], r["part"]) for r in found] == [(s, "whole") for s in (5, 10, 15, 20)]
    assert len(json.loads((folder / "report.json").read_text())["evaluations"]) == 4


def test_a_run_that_diverged_does_not_just_say_finished(small):
    """Too few steps for it to be stopped: G9, I7."""
    folder = small(steps=10, lr=10.0, matrix_lr=10.0, max_grad_norm=0.0, warmup_tokens=0, stop_on_divergence=False)
    end = read_metrics(folder / "metrics.jsonl")[-1]
    assert end["kind"] == "end" and "nothing was learned" in end["warning"] and "diverged" in end["warning"]
    assert end["warning"] in json.loads((folder / "report.json").read_text())["problems"]


def test_a_run_that_learns_ends_without_a_warning(small):
    assert read_metrics(small() / "metrics.jsonl")[-1]["warning"] is None


def test_a_run_slower_than_planned_ends_in_its_time_with_its_cool_down(small, monkeypatch, tmp_path):
    """Planned for minutes, slowed down by whatever else the machine does."""
    real, began = loop.train_step, time.monotonic()

    def slow(*args):
        time.sleep(0.02)
        return real(*args)

    monkeypatch.setattr(loop, "train_step", slow)
    train = loop.train
    monkeypatch.setattr(loop, "train", lambda *a, **k: train(*a, **k | {"deadline": Deadline(time.monotonic() + 8)}))
    folder = small(steps=20_000, eval_every=1_000_000, save_every=1_000_000)
    records = read_metrics(folder / "metrics.jsonl")
    cuts = [r for r in records if r["kind"] == "shortened"]
    assert cuts and records[-1]["reason"] == "finished"
    run = Run.at(folder)
    assert run.config.train.tokens == cuts[-1]["total_tokens"] == records[-1]["tokens"] < 64 * 20_000
    steps = [r for r in records if r["kind"] == "step"]
    last, before = steps[-1], steps[-2]
    assert last["lr_scale"] == lr_scale(before["tokens"], run.config.train) < 0.1
    assert max(s["step_seconds"] for s in steps) < time.monotonic() - began
    # what was cut is the run now: it resumes as it is, finished
    kiem.train(folder, quiet=True)
    assert read_metrics(folder / "metrics.jsonl")[-1] == records[-1]


def test_a_run_stopped_after_it_was_cut_resumes_with_its_new_length(small, monkeypatch, tmp_path):
    cut, train = loop.Trainer.keep_deadline, loop.train

    def cut_and_stop(trainer):
        before = trainer.steps
        cut(trainer)
        if trainer.steps < before:
            trainer.on_signal(2)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "keep_deadline", cut_and_stop)
        late = {"deadline": Deadline(time.monotonic() + 3)}
        patch.setattr(loop, "train", lambda *a, **k: train(*a, **k | late))
        with pytest.raises(Stopped):
            small(steps=20_000, eval_every=1_000_000, save_every=1_000_000)
    length = Run.at(tmp_path / "run").config.train.tokens
    assert length < 64 * 20_000
    kiem.train(tmp_path / "run", quiet=True)
    end = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
    assert (end["reason"], end["tokens"]) == ("finished", length)
