"""After a step that cannot be, or a loss that explodes: what the message advises is possible, and works."""

import re
import shlex
from dataclasses import replace

import pytest
import torch

from kiem.cli import main as cli
from kiem.errors import NumericsError
from kiem.planning import predict
from kiem.runs.metrics import read_metrics
from kiem.training import loop

TINY = [
    *("data.tokenizer=bytes", "model.vocab_size=257", "model.context_length=16", "model.emb_dim=16", "model.n_heads=2"),
    *("model.n_layers=1", "train.batch_tokens=64", "train.micro_batch_tokens=64", "train.save_every=2", "seed=1"),
]
RUN = "a run"  # the name has to be quoted in what is advised


@pytest.fixture
def kiem(tmp_path, monkeypatch, capfd):
    """kiem(arguments...) -> (exit code, standard error), in a folder with a text."""
    monkeypatch.setenv("KIEM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("kiem.runtime.matmul_rate", lambda *_, **__: 1e9)
    plan = predict.plan
    monkeypatch.setattr(predict, "plan", lambda config, measure: plan(config, measure=False))
    monkeypatch.setattr("kiem.api.SAMPLES_AT_ENDS", 1)
    monkeypatch.chdir(tmp_path)
    lines = [f"{i} squared is {i * i}, and the line before it says {i - 1}\n" for i in range(1000)]
    (tmp_path / "text.txt").write_text("".join(lines))

    def call(*arguments):
        capfd.readouterr()
        return cli.main([str(a) for a in arguments]), capfd.readouterr().err

    return call


def new(steps, *options, out=RUN):
    return ["train", "--data", "text.txt", "--tokens", 64 * steps, "--out", out, "-q", *TINY, *options]


def advised(err, option):
    """The arguments of the command in a message that has this option."""
    commands = [found.rstrip(".") for found in re.findall(r"kiem (train .*?)(?=; or |\. |\n|$)", err)]
    (found,) = [command for command in commands if option in command]
    return shlex.split(found)


def steps(folder):
    return [r for r in read_metrics(folder / "metrics.jsonl") if r["kind"] == "step"]


CAUSES = {
    "the batch": ("train.skip_batches=5", RUN),
    "the precision": ("train.precision=float32", RUN),
    "the learning rate": ("--fork", f"{RUN}-2"),
}


@pytest.mark.parametrize("cause", CAUSES)
def test_after_a_nan_each_advice_helps_against_its_cause(kiem, tmp_path, monkeypatch, cause):
    """What is in the way is there again when the step is: only the advice for it gets around it."""
    real, seen = loop.train_step, {}

    def step(objective, model, optimizer, micro_batches, settings, tokens_seen):
        tokens_BT = micro_batches[0].tokens_BT
        if tokens_seen == 4 * 64:
            seen.setdefault("the batch", tokens_BT.clone())
            seen.setdefault("the learning rate", settings.lr)
        bad = {
            "the batch": "the batch" in seen and torch.equal(tokens_BT, seen["the batch"]),
            "the precision": tokens_seen >= 4 * 64 and model.compute_dtype == torch.bfloat16,
            "the learning rate": tokens_seen >= 4 * 64 and settings.lr == seen["the learning rate"],
        }
        if bad[cause]:
            raise NumericsError("the loss is NaN")
        return real(objective, model, optimizer, micro_batches, settings, tokens_seen)

    monkeypatch.setattr(loop, "train_step", step)
    code, err = kiem(*new(10, "train.precision=bfloat16"))
    assert code == 5 and "step 5: the loss is NaN" in err
    again, _ = kiem("train", RUN, "-q")
    assert again == 5
    option, folder = CAUSES[cause]
    code, err = kiem(*advised(err, option), "-q")
    assert code == 0, err
    assert [r["step"] for r in steps(tmp_path / folder)] == list(range(1, 11))


def test_a_batch_that_is_skipped_is_replaced_and_nothing_else_changes(kiem, tmp_path, monkeypatch):
    """Also the next skip keeps the one before it."""
    real, batches = loop.train_step, {}

    def step(objective, model, optimizer, micro_batches, settings, tokens_seen):
        batches[settings.skip_batches, tokens_seen // 64 + 1] = micro_batches[0].tokens_BT.clone()
        return real(objective, model, optimizer, micro_batches, settings, tokens_seen)

    monkeypatch.setattr(loop, "train_step", step)
    assert kiem(*new(8, out="plain"))[0] == 0
    assert kiem(*new(8, "train.skip_batches=3,6", out="skipped"))[0] == 0
    differ = [n for n in range(1, 9) if not torch.equal(batches[None, n], batches["3,6", n])]
    assert differ == [3, 6]
    plain, skipped = (steps(tmp_path / name) for name in ("plain", "skipped"))
    assert [r["loss"] for r in plain[:2]] == [r["loss"] for r in skipped[:2]]


@pytest.fixture
def explodes(monkeypatch):
    """From step 40 on every loss is 50 nats higher, at the learning rate of the first run."""
    real, first = loop.train_step, []

    def step(objective, model, optimizer, micro_batches, settings, tokens_seen):
        result = real(objective, model, optimizer, micro_batches, settings, tokens_seen)
        first.append(settings.lr)
        return replace(result, loss=result.loss + 50) if tokens_seen >= 40 * 64 and settings.lr == first[0] else result

    monkeypatch.setattr(loop, "train_step", step)


def test_an_explosion_stops_the_run_and_both_ways_on_are_possible(kiem, tmp_path, explodes):
    code, err = kiem(*new(120, "train.sample_every=1000", "train.eval_every=1000", "train.save_every=10"))
    assert code == 5 and "since step 41" in err and "The run was stopped" in err
    for option, folder in (("--fork", f"{RUN}-2"), ("train.stop_on_divergence=false", RUN)):
        done, said = kiem(*advised(err, option), "-q")
        assert done == 0, said
        assert [r["step"] for r in steps(tmp_path / folder)] == list(range(1, 121))
    assert read_metrics(tmp_path / RUN / "metrics.jsonl")[-1]["kind"] == "end"


def test_the_watch_can_be_set_from_the_start(kiem, tmp_path, explodes):
    assert kiem(*new(120, "train.stop_on_divergence=false", "train.eval_every=1000", "train.save_every=10"))[0] == 0
