"""A run that was given minutes keeps them, wherever its first start was killed."""

import pytest
import yaml
from small_run import TINY

from kiem.runs import checkpoint
from kiem.training import loop

FIRST = [*("train", "--data", "text.txt", "--out", "run", "-q"), *(word for word in TINY if "save_every" not in word)]
WITH_MINUTES = [*FIRST, "--minutes", "5"]


class Killed(BaseException):
    """Stands for the end of the process: nothing between it and the command catches it."""


@pytest.fixture
def killed_at(kiem, monkeypatch):
    """killed_at(owner, name, words): run the command, which ends where the function is called."""

    def run(owner, name, words):
        def kill(*_, **__):
            raise Killed

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(owner, name, kill)
            kiem(*words)

    return run


@pytest.fixture
def planned(monkeypatch):
    """No measuring: a run with minutes is of 20 steps."""
    monkeypatch.setattr("kiem.planning.budget.tokens_for_minutes", lambda *_: 1280)
    monkeypatch.setattr("kiem.planning.budget.Budget.flops", lambda *_: 1e12)


@pytest.fixture
def deadlines(monkeypatch):
    """The deadline of each start."""
    found, train = [], loop.train

    def noted(*arguments, **options):
        found.append(options["deadline"])
        train(*arguments, **options)

    monkeypatch.setattr(loop, "train", noted)
    return found


@pytest.mark.parametrize(
    ("owner", "name", "exists"),
    [
        ("kiem.runs.run.Run", "write_facts", False),
        ("kiem.training.loop.Trainer", "open_logs", True),
        ("kiem.training.loop.Trainer", "one_step", True),
        ("kiem.runs.checkpoint", "save", True),
    ],
    ids=["before config.yaml", "after config.yaml", "before the first step", "before the first checkpoint"],
)
@pytest.mark.usefixtures("planned")
def test_the_same_command_has_a_deadline_again(kiem, place, killed_at, deadlines, owner, name, exists):
    killed_at(*_attribute(owner, name), WITH_MINUTES)
    assert (place / "run" / "config.yaml").exists() == exists
    assert kiem(*WITH_MINUTES)[0] == 0
    assert len(deadlines) == 2 and None not in deadlines
    assert deadlines[1].ends > deadlines[0].ends  # minutes of its own
    assert checkpoint.newest(place / "run")[0].state["step"] == 20


def _attribute(owner, name):
    import importlib

    try:
        return importlib.import_module(owner), name
    except ModuleNotFoundError:
        module, _, of = owner.rpartition(".")
        return getattr(importlib.import_module(module), of), name


def test_killed_between_the_shorter_checkpoint_and_config_yaml(kiem, place, killed_at, monkeypatch):
    """The run stays as short as it was made: config.yaml was not edited."""
    with monkeypatch.context() as patch:
        _cut_at_step_5(patch)
        killed_at(loop, "write_config", [*FIRST, "--tokens", "1280"])
        assert yaml.safe_load((place / "run/config.yaml").read_text())["train"]["tokens"] == 1280
    code, _, err = kiem("train", "run")
    assert code == 0 and "resumed from step-00000005" in err and "longer" not in err and "changed:" not in err
    assert checkpoint.newest(place / "run")[0].state["step"] == 8
    assert yaml.safe_load((place / "run/config.yaml").read_text())["train"]["tokens"] == 8 * 64
    code, _, err = kiem("train", "run", "tokens=1280")  # what the user wants now counts
    assert code == 0 and "longer" in err
    assert checkpoint.newest(place / "run")[0].state["step"] == 20


def _cut_at_step_5(patch):
    """As if the machine had become slow: after 5 steps the run is made one of 8."""
    from kiem.training import deadline

    def cut(self, train, seen, _):
        return deadline.shortened(train, seen, 3 * 64) if seen == 5 * 64 and train.tokens == 1280 else None

    patch.setattr(deadline.Deadline, "shortened", cut)
    trainer = loop.Trainer.__init__
    patch.setattr(loop.Trainer, "__init__", lambda self, *args: trainer(self, *args[:-1], deadline.Deadline(1e12)))
