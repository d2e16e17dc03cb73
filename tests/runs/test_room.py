"""A model that the machine has no memory for is refused before anything is allocated."""

import json
import re

import pytest
from small_run import newest, resign

from kiem import runtime
from kiem.planning.budget import require_room
from kiem.runs.run import Run

LARGEST = {"emb_dim": 65_536, "n_layers": 1_024, "n_heads": 64, "n_kv_heads": 64, "head_dim": 1_024,
           "hidden_dim": 262_144}  # fmt: skip


@pytest.mark.parametrize(
    "command", [["generate", "run"], ["eval", "run"], ["explain", "run"], ["eval", "run", "--json"]], ids=" ".join
)
def test_weights_larger_than_memory_are_one_message(kiem, run, command):
    resign(newest(run).path, lambda state, manifest: state["config"]["model"].update(LARGEST))
    before = runtime.peak_memory()
    code, out, err = kiem(*command)
    assert code == 2
    assert re.search(r"its model does not fit: [\d.,]+ TiB of weights need [\d.,]+ TiB of memory", err), err
    assert re.search(r"and [\d.,]+ GiB are available on this machine: close other programs", err), err
    assert runtime.peak_memory() - before < 64 << 20
    if "--json" in command:
        assert json.loads(out)["error"]["kind"] == "ConfigError"


def test_the_weights_are_there_twice(run, monkeypatch):
    """The bound is exact: one byte less than twice the weights is refused."""
    found = Run(run)
    weights = sum(t.numel() * t.element_size() for t in found.read(("model",)).tensors["model"].values())
    monkeypatch.setattr(runtime, "available_memory", lambda *_: 2 * weights)
    require_room(found.config.model, "cpu", run)
    monkeypatch.setattr(runtime, "available_memory", lambda *_: 2 * weights - 1)
    with pytest.raises(Exception, match="close other programs"):
        require_room(found.config.model, "cpu", run)


def test_available_memory_is_not_more_than_there_is():
    assert 0 < runtime.available_memory() <= runtime.machine_memory()


def test_a_configuration_is_refused_too(kiem, place):
    (place / "large.json").write_text(json.dumps({"vocab_size": 257, "context_length": 16, **LARGEST}))
    for command in ("explain", "verify"):
        code, _, err = kiem(command, "large.json")
        assert code == 2 and "its model does not fit" in err and "and their gradients" in err, err
