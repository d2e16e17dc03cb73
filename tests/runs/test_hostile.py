"""Checkpoints of somebody else, with right checksums: one message, whatever is in them."""

import hashlib
import json
import shutil
import struct

import pytest
import torch
from small_run import newest, resign

from kiem.errors import CheckpointError
from kiem.runs import checkpoint

HOSTILE = {
    "state: step is text": lambda s, m: s.update(step="x"),
    "state: step is missing": lambda s, m: s.pop("step"),
    "state: step is below 0": lambda s, m: s.update(step=-5),
    "state: tokens is a list": lambda s, m: s.update(tokens=[1]),
    "state: data is a number": lambda s, m: s.update(data=1),
    "state: config is text": lambda s, m: s.update(config="x"),
    "state: config is empty": lambda s, m: s.update(config={}),
    "state: model is a list": lambda s, m: s["config"].update(model=[1]),
    "state: model of another size": lambda s, m: s["config"]["model"].update(n_layers=2),
    "state: watch is text": lambda s, m: s.update(watch="x"),
    "state: watch of unknown keys": lambda s, m: s.update(watch={"loss": {"x": 1}}),
    "state: watch of text": lambda s, m: s.update(watch={"loss": {"start": ["a"] * 20}}),
    "state: tokenizer is a list": lambda s, m: s.update(tokenizer=[1]),
    "state: data_folder climbs": lambda s, m: s.update(data_folder="../../../etc"),
    "manifest: files is a list": lambda s, m: m.update(files=[1]),
    "manifest: a file elsewhere": lambda s, m: m["files"].update({"../x.safetensors": {"bytes": 1, "sha256": "x"}}),
    "manifest: no state": lambda s, m: m["files"].pop("state.json"),
    "manifest: no optimizer": lambda s, m: m["files"].pop("optimizer.safetensors"),
    "manifest: bytes is text": lambda s, m: m["files"]["model.safetensors"].update(bytes="x"),
    "manifest: step is text": lambda s, m: m.update(step="x"),
    "manifest: version is a list": lambda s, m: m.update(version=[1]),
}  # fmt: skip


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_checkpoint_is_one_message(kiem, run, change):
    for path in checkpoint.newest_first(run)[1:]:
        shutil.rmtree(path)
    resign(newest(run).path, change)
    for command in (["train", "run", "tokens=1920"], ["generate", "run", "--max-tokens", "2"], ["eval", "run"]):
        code, _, err = kiem(*command)
        assert code in (0, 2, 3, 4), err


TENSORS = {
    "offsets beyond the file": lambda h: h["norm"].update(data_offsets=[0, 10**6]),
    "a shape that is larger": lambda h: h["norm"].update(shape=[10**6]),
    "a shape below 0": lambda h: h["norm"].update(shape=[-1]),
    "an unknown type": lambda h: h["norm"].update(dtype="F99"),
    "no offsets": lambda h: h["norm"].pop("data_offsets"),
    "an alias to nothing": lambda h: h["__metadata__"].update({"kiem.aliases": '{"x": "y"}'}),
    "aliases that are no mapping": lambda h: h["__metadata__"].update({"kiem.aliases": "[1]"}),
    "aliases that are no JSON": lambda h: h["__metadata__"].update({"kiem.aliases": "["}),
}


@pytest.mark.parametrize("change", TENSORS.values(), ids=TENSORS)
def test_hostile_tensors_are_one_message_and_no_foreign_memory(tmp_path, change):
    path = checkpoint.save(tmp_path / "r", 1, {"model": {"norm": torch.ones(4)}}, {})
    file = path / "model.safetensors"
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    def sign(state, manifest):
        content = file.read_bytes()
        manifest["files"]["model.safetensors"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    resign(path, sign)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        checkpoint.load(path)
