"""Resuming: by the command that a user would type, the same run or a refusal that says how to get the other one."""

import json
import os
import shutil

import pytest
import yaml
from small_run import TINY, newest

from kiem.data.tokenizer import Tokenizer
from kiem.files import write_atomically
from kiem.runs import checkpoint

pytestmark = pytest.mark.usefixtures("place")


def records(run, kind):
    return [r for r in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if r["kind"] == kind]


def edit(run, old, new):
    text = (run / "config.yaml").read_text()
    assert old in text
    (run / "config.yaml").write_text(text.replace(old, new))


# -- identity and execution


IDENTITY = [
    ("lr: 0.004", "lr: 0.002"),
    ("seed: 1", "seed: 2"),
    ("batch_tokens: 64", "batch_tokens: 128"),
    ("cooldown: linear", "cooldown: cosine"),
    ("max_grad_norm: 1.0", "max_grad_norm: 2.0"),
    ("cross_document_attention: false", "cross_document_attention: true"),
    ("warmup_tokens: 25", "warmup_tokens: 26"),
]


@pytest.mark.parametrize(("old", "new"), IDENTITY, ids=[new for _, new in IDENTITY])
def test_an_edit_that_makes_another_run_is_refused_with_the_way_to_fork(kiem, run, old, new):
    before = newest(run).path
    edit(run, f"\n{old}" if old == "seed: 1" else f" {old}", f"\n{new}" if old == "seed: 1" else f" {new}")
    code, _, err = kiem("train", "run")
    assert code == 2
    assert old.split(": ")[0] in err and "no longer be the same run" in err and "kiem train run --fork run-2" in err
    assert newest(run).path == before


def test_an_execution_key_may_change_and_is_said_and_recorded(kiem, run):
    edit(run, "micro_batch_tokens: 64", "micro_batch_tokens: 32")
    code, _, err = kiem("train", "run", "--tokens", 1280 + 640)
    assert code == 0, err
    assert "changed: train.micro_batch_tokens from 64 to 32" in err
    start = records(run, "start")[-1]
    assert start["changed"]["train.micro_batch_tokens"] == [64, 32] and start["time"]
    report = json.loads((run / "report.json").read_text())
    assert {"key": "train.micro_batch_tokens", "before": 64, "now": 32} in [
        {name: change[name] for name in ("key", "before", "now")} for change in report["changes"]
    ]


def test_the_refused_run_can_be_had_as_a_fork_by_the_command_that_is_said(kiem, run):
    _, _, err = kiem("train", "run", "train.lr=0.001")
    command = err[err.index("kiem train run --fork") :].split()
    code, _, err = kiem(*command[1:])
    assert code == 0, err
    fork = run.parent / "run-2"
    assert records(fork, "start")[0]["reason"].startswith("weights of run/checkpoints/step-00000020")
    assert "lr: 0.001" in (fork / "config.yaml").read_text()
    assert Tokenizer.load(fork / "tokenizer").digest == Tokenizer.load(run / "tokenizer").digest
    first = records(fork, "step")[0]["loss"]
    assert first < records(run, "step")[0]["loss"] - 0.1  # it begins with what the run has learned


def test_a_fork_on_another_text_keeps_the_tokenizer(kiem, run, place):
    (place / "other.txt").write_text("ein anderer Text, Zeile für Zeile\n" * 200)
    code, _, err = kiem("train", "run", "--fork", "fork", "--data", "other.txt", "tokens=256")
    assert code == 0, err
    code, _, err = kiem("train", "run", "--fork", "fork2", "data.tokenizer=chars")
    assert code == 2 and "keeps the tokenizer" in err
    shutil.rmtree(run)
    assert kiem("eval", "fork")[0] == 0  # it stands alone


# -- the same command again


def test_the_same_command_again_resumes_and_another_is_refused(kiem, own_run):
    run = own_run
    code, out, err = kiem("train", "--data", "text.txt", "--tokens", 1280, "--out", "run", *TINY)
    assert code == 0 and "resumed from step-00000020" in err and "train longer: kiem train run tokens=" in out
    assert len(records(run, "end")) == 1
    code, _, err = kiem("train", "--data", "text.txt", "--tokens", 1280, "--out", "run", *TINY, "train.lr=0.1")
    assert code == 2 and "train.lr" in err and "--out" in err


def test_a_start_that_was_killed_at_once_is_no_run(kiem, place):
    (place / "run").mkdir()
    for name in (".lock", ".lock.owner", ".tmp-config.yaml-12"):
        (place / "run" / name).write_text("")
    code, _, err = kiem("train", "--data", "text.txt", "--tokens", 128, "--out", "run", "-q", *TINY)
    assert code == 0, err
    assert not list((place / "run").glob(".tmp-*"))


def test_the_default_folder_is_named_by_the_data(kiem, place):
    (place / "books").mkdir()
    (place / "books" / "a.txt").write_text("some text, line by line\n" * 300)
    (place / "other").mkdir()
    shutil.copytree(place / "books", place / "other" / "books")
    (place / "other" / "books" / "a.txt").write_text("other text, line by line\n" * 300)
    assert kiem("train", "--data", "books", "--tokens", 128, "-q", *TINY)[0] == 0
    assert (place / "runs" / "books" / "config.yaml").is_file()
    code, _, err = kiem("train", "--data", "other/books", "--tokens", 128, "-q", *TINY)
    assert code == 2 and "another run (data.sources" in err


def test_a_run_from_standard_input_is_resumed_and_evaluated(kiem, place, monkeypatch):
    class Piped:
        buffer = (place / "text.txt").open("rb")

        @staticmethod
        def isatty():
            return False

    with Piped.buffer:
        monkeypatch.setattr("sys.stdin", Piped)
        code, _, err = kiem("train", "--data", "-", "--tokens", 256, "-q", *TINY)
    assert code == 0, err
    monkeypatch.setattr("sys.stdin", None)
    assert kiem("train", "runs/stdin", "tokens=512", "-q")[0] == 0
    assert kiem("eval", "runs/stdin")[0] == 0


# -- longer


def test_a_longer_run_is_the_run_that_it_would_have_been(kiem, run, place):
    """From before the cool-down: equal to one that was as long, with the same cool-down, from the start."""
    train = yaml.safe_load((run / "config.yaml").read_text())["train"]
    code, _, err = kiem("train", "run", "tokens=1920")
    assert code == 0, err
    assert "continues from step 12, before the cool-down" in err
    whole = [f"train.{key}={train[key]}" for key in ("cooldown_tokens", "warmup_tokens")]
    assert kiem("train", "--data", "text.txt", "--tokens", 1920, "--out", "whole", "-q", *TINY, *whole)[0] == 0
    mine, other = ([r["loss"] for r in records(folder, "step")] for folder in (run, place / "whole"))
    assert mine == other and len(mine) == 30
    assert not list((run / "checkpoints").glob("ended-*"))


def test_longer_without_a_checkpoint_from_before_the_cool_down_is_refused_with_a_way(kiem, run):
    for path in checkpoint.newest_first(run)[2:]:
        shutil.rmtree(path)
    code, _, err = kiem("train", "run", "tokens=1920")
    assert code == 2 and "learning rate has begun to fall" in err and "--fork run-2 train.tokens=1920" in err


# -- what is damaged, and what is another's


def test_the_only_checkpoint_damaged_is_never_trained_over(kiem, run):
    for path in checkpoint.newest_first(run):
        (path / "model.safetensors").write_bytes(b"damaged")
    code, _, err = kiem("train", "run", "-q")
    assert code == 4 and "no complete checkpoint to resume from" in err and "delete run/checkpoints" in err


def test_a_damaged_newest_checkpoint_is_said_with_quiet_too(kiem, run):
    (newest(run).path / "state.json").write_bytes(b"{")
    for command in (["train", "run", "-q"], ["generate", "run", "--max-tokens", "2"]):
        shutil.copytree(run, run.parent / "copy", dirs_exist_ok=True)
        code, _, err = kiem(*[word.replace("run", "copy") for word in command])
        assert code == 0 and "warning:" in err and "state.json" in err


def test_a_checkpoint_of_a_later_version_is_not_damaged(kiem, run, monkeypatch):
    found = newest(run)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "VERSION", 2)
        checkpoint.save(run, 21, found.tensors, found.state)
    for command in (["train", "run"], ["generate", "run"], ["eval", "run"]):
        code, _, err = kiem(*command)
        assert code == 4 and "format version 2" in err


def test_a_changed_tokenizer_is_noticed(kiem, run):
    file = run / "tokenizer" / "tokenizer.json"
    spec = json.loads(file.read_text())
    vocab = spec["model"]["vocab"]
    names = list(vocab)[:100]
    for name, other in zip(names, [*names[1:], names[0]], strict=True):
        vocab[name] = other and list(vocab).index(other)
    write_atomically(file, json.dumps(spec))
    for command in (["generate", "run"], ["eval", "run"]):
        code, _, err = kiem(*command)
        assert code == 4 and "is not the tokenizer that this run was trained with" in err
    code, _, err = kiem("train", "run")
    assert code == 0 and "was written again" in err
    assert kiem("eval", "run")[0] == 0


def test_eval_after_the_text_changed(kiem, own_run, place):
    """While the tokens are in the cache, they are scored; then the text as it is, which is said; never with another
    tokenizer."""
    before = json.loads(kiem("eval", "run", "--json")[1])
    (place / "text.txt").write_text((place / "text.txt").read_text().replace("quick", "slow"))
    assert json.loads(kiem("eval", "run", "--json")[1])["loss"] == before["loss"]
    shutil.rmtree(place / "cache")
    code, out, err = kiem("eval", "run", "--json")
    assert code == 0 and "has changed since it was trained" in err
    assert json.loads(out)["loss"] != before["loss"]
    code, _, err = kiem("train", "run", "tokens=1920")
    assert code == 3 and "changed" in err and "--fork run-2" in err


def test_eval_on_other_text_keeps_the_settings_of_the_run(kiem, place):
    (place / "other.txt").write_text("line 5: the quick brown fox number 25 jumps\n\n" * 100)
    (place / "docs.jsonl").write_text(
        "".join(json.dumps({"text": f"fox {i} jumps over {i}"}) + "\n" for i in range(200))
    )
    losses = {}
    for across in ("true", "false"):
        options = [f"data.cross_document_attention={across}"]
        assert kiem("train", "--data", "docs.jsonl", "--tokens", 640, "--out", across, "-q", *TINY, *options)[0] == 0
        losses[across] = json.loads(kiem("eval", across, "--data", "docs.jsonl", "--json")[1])
    edit(place / "true", "cross_document_attention: true", "cross_document_attention: false")
    again = json.loads(kiem("eval", "true", "--data", "docs.jsonl", "--json")[1])
    assert again["loss"] == losses["true"]["loss"]  # as it was trained, whatever config.yaml says now
    assert losses["true"]["loss"] != losses["false"]["loss"]


def test_bits_of_metrics_that_were_lost_are_named(kiem, run):
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    place = next(i for i, line in enumerate(lines) if b'"kind": "step", "step": 7,' in line)
    lines[place] = lines[place].replace(b"{", b"}", 1)
    (run / "metrics.jsonl").write_bytes(b"".join(lines))
    _, out, err = kiem("train", "run", "--json")
    assert "damaged, left out" in err
    assert any("no record of step 7" in problem for problem in json.loads(out)["report"]["problems"])


def test_without_metrics_the_report_knows_the_step(kiem, run):
    (run / "metrics.jsonl").unlink()
    _, out, _ = kiem("train", "run", "--json")
    report = json.loads(out)["report"]
    assert report["step"] == 20 and any("metrics.jsonl" in problem for problem in report["problems"])


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl", "config.yaml", "report.json"])
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(kiem, run, name):
    (run / name).unlink()
    os.mkfifo(run / name)
    code, _, err = kiem("train", "run", "tokens=1920")
    assert code in (0, 3, 4, 7), err


def test_a_manifest_that_is_a_pipe(kiem, run):
    path = newest(run).path / "manifest.json"
    path.unlink()
    os.mkfifo(path)
    code, _, err = kiem("generate", "run", "--max-tokens", 2)
    assert code == 0 and "manifest.json: not a regular file" in err


@pytest.mark.parametrize(
    "command",
    [["generate", "odd"], ["eval", "odd"], ["train", "odd"], ["explain", "odd"], ["plan", "odd"]],
    ids=" ".join,
)
@pytest.mark.parametrize(
    "what", ["a config of a seed only", "a tokenizer that is a file", "a long name", "an empty folder"]
)
def test_odd_run_folders(kiem, run, place, command, what):
    folder = place / "odd"
    if what == "an empty folder":
        folder.mkdir()
    elif what == "a long name":
        command = [command[0], "x" * 300]
    else:
        shutil.copytree(run, folder)
        if what == "a config of a seed only":
            shutil.rmtree(folder / "checkpoints")
            (folder / "config.yaml").write_text("seed: 1\n")
        else:
            shutil.rmtree(folder / "tokenizer")
            (folder / "tokenizer").write_text("x")
    code, _, err = kiem(*command)
    assert code in (0, 2, 3, 4, 7), err


@pytest.mark.parametrize("verb", ["generate", "eval"])
def test_a_device_that_is_not_known(kiem, run, verb):
    code, _, err = kiem(verb, "run", "--device", "tpu")
    assert code == 2 and "tpu" in err and "cpu" in err
