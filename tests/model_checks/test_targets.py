"""What explain and verify run: every kind of target, what is refused, and that nothing is left behind."""

import random
import shutil
import sys

import pytest
import torch

from kiem.config.presets import resolve
from kiem.config.read import read_config
from kiem.data.prepare import prepare
from kiem.errors import CheckpointError, ConfigError, DataError
from kiem.model_checks.targets import load_program
from kiem.runs.run import Run
from kiem.training import loop

SMALL = {"vocab_size": 257, "context_length": 16, "emb_dim": 16, "n_heads": 2, "n_layers": 2, "drop_rate": 0.1}
CONFIG = "GPT = {" + ", ".join(f'"{key}": {value}' for key, value in SMALL.items()) + "}  # a small one\n"


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = sys.argv, list(sys.argv), sys.path, list(sys.path), sys.modules["__main__"]
    yield
    assert (sys.argv, list(sys.argv), sys.path, list(sys.path), sys.modules["__main__"]) == state
    assert sys.argv is state[0]
    assert sys.path is state[2]


def write(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return str(path)


def test_a_configuration_is_a_model_with_one_loss(tmp_path):
    for name in ("config.txt", "config.py", "config.json"):
        text = CONFIG if name != "config.json" else CONFIG[6:].replace("  # a small one", "")
        program = load_program(write(tmp_path / name, text))
        assert program.loss().item() == program.loss().item()
        state = torch.get_rng_state()
        program.run()
        assert torch.equal(torch.get_rng_state(), state)
        assert program.namespace["batch"].tokens_BT.shape == (1, 16)
        assert all(p.grad is not None for p in program.model.parameters())
        assert program.model.training


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("KIEM_CACHE", str(tmp_path / "cache"))
    rng = random.Random(1)
    text = "\n\n".join(" ".join(rng.choice(["alpha", "beta", "gamma"]) for _ in range(9)) for _ in range(60))
    config = read_config(
        {
            "model": SMALL,
            "seed": 5,
            "device": "cpu",
            "data": {"sources": [{"path": write(tmp_path / "text.txt", text)}], "tokenizer": "bytes"},
            "train": {"tokens": 128, "batch_tokens": 64, "micro_batch_tokens": 32},
        }
    )
    dataset = prepare(config.data, 257, tmp_path / "cache")
    loop.train(resolve(config, 257), Run(tmp_path / "run"), dataset, quiet=True)
    return tmp_path / "run"


def test_a_run_is_its_newest_model_on_its_next_batch(run, tmp_path):
    program = load_program(str(run))
    assert "step-00000002 on the batch of step 3, the first 2 of its 4 rows" in program.title
    program.run()
    assert program.namespace["batch"].tokens_BT.shape == (2, 16)
    assert program.loss().item() == program.namespace["loss"].item()
    assert load_program(str(run / "checkpoints" / "step-00000002")).loss().item() == program.loss().item()
    (tmp_path / "text.txt").unlink()
    load_program(str(run))  # its tokens are in the cache
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(DataError, match=r"text.txt.*no such file.*config.yaml"):
        load_program(str(run))
    write(tmp_path / "text.txt", "another text, " * 200)
    with pytest.raises(DataError, match="has changed since it was trained"):
        load_program(str(run))
    for file in run.glob("checkpoints/*/manifest.json"):
        file.unlink()
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        load_program(str(run))


BAD = {  # target: (files, arguments, what the message says)
    "absent.py": ({}, [], "absent.py: there is no such file"),
    "gpt2-124n": ({}, [], r"did you mean gpt2-124m\?"),
    "jop.py": ({"job.py": ""}, [], r"did you mean job.py\?"),
    "broken.py": ({"broken.py": "x = = 1"}, [], "broken.py:1: is not valid Python"),
    "noise.dat": ({"noise.dat": "\0\1 ((( "}, [], "neither a Python program nor a configuration"),
    "book.ipynb": ({"book.ipynb": "{}"}, [], "is a notebook"),
    "part.yaml": ({"part.yaml": "emb_dim: 3"}, [], "the model section is incomplete"),
    "gpt2-124m": ({}, ["x"], "takes no arguments, given: x"),
    "empty": ({"empty/x": ""}, [], "has no config.yaml"),
    "job.py:main": ({}, [], "write job:main"),
}


@pytest.mark.parametrize("target", BAD)
def test_a_target_that_is_none_is_refused_with_one_message(target, tmp_path):
    files, arguments, said = BAD[target]
    for name, text in files.items():
        write(tmp_path / name, text)
    with pytest.raises(ConfigError, match=said):
        load_program(target, arguments)
