"""Beside every valid configuration lie a million wrong ones: each is a configuration or one error, in little time."""

import copy
import json
import os
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kiem.config import keys
from kiem.config.presets import resolve, tokenizer_vocab_size
from kiem.config.read import read_config
from kiem.errors import ConfigError
from kiem.planning.count import flops_per_token, total_parameters
from kiem.planning.memory import memory

PUBLISHED = json.loads((Path(__file__).parent / "published.json").read_text())
TINY_LLAMA = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
}
ARGS = {"n_layer": 4, "n_head": 4, "n_embd": 64, "block_size": 128, "vocab_size": 50304, "dropout": 0.0, "bias": False}
PYTHON = [
    """import time
out_dir = 'out'
batch_size = 5 * 8
block_size = 64 # context
n_layer = 2
n_head = 2
n_embd = 32
learning_rate = 1e-3
max_iters = 500
lr_decay_iters = max_iters
min_lr = 1e-4
wandb_run_name = str(time.time())
""",
    """import torch
C = {'vocab_size': 1_000, 'context_length': 64, 'emb_dim': 32, 'n_heads': 2, 'n_layers': 2, 'hidden_dim': 64,
     'n_kv_groups': 1, 'rope_base': 1e4, 'dtype': torch.bfloat16}
""",
    "GPTConfig(block_size=128, vocab_size=50304, n_layer=4, n_head=4, n_embd=64, dropout=0.0, bias=True)",
    "@dataclass\nclass C:\n    block_size: int = 128\n    n_layer: int = 4\n    n_head: int = 4\n    n_embd: int = 6\n",
]
SECONDS = 10  # a generous bound: what hangs takes minutes
RUN = {
    "model": {"vocab_size": 300, "context_length": 32, "emb_dim": 16, "n_heads": 2, "n_layers": 1},
    "data": {"sources": ["a", {"path": "b", "weight": 2}], "tokenizer": "bytes"},
    "train": {"tokens": 3200, "batch_tokens": 64, "lr": 1e-3},
    "seed": 3,
}
SCRATCH = {
    "vocab_size": 300, "context_length": 32, "emb_dim": 16, "n_heads": 2, "n_layers": 1, "n_kv_groups": 1,
    "rope_base": 1e4, "dtype": "bfloat16", "rope_freq": {"factor": 8.0},
}  # fmt: skip
MAPPINGS = [*PUBLISHED.values(), TINY_LLAMA, ARGS, RUN, SCRATCH,
            {"depth": 3, "model": {"context_length": 64}}, {"model": "gpt2-124m", "train": {}}]  # fmt: skip
TEXTS = [json.dumps(values, indent=1) for values in MAPPINGS] + [
    "".join(f"{key}: {json.dumps(value)}\n" for key, value in values.items()) for values in MAPPINGS
]
TEXTS += [*PYTHON, "seed = 1\n[model]\nvocab_size = 300\nn_layers = 2\n"]


def settles(read) -> None:
    """A configuration that can be planned, or one error that can be printed; not a traceback, not a wait."""
    start = time.monotonic()
    try:
        config = read()
        config = resolve(config, tokenizer_vocab_size(config))
        assert total_parameters(config.model) > 0 and flops_per_token(config.model).total > 0
        assert memory(config.model, config.train, 4).peak > 0
    except ConfigError as error:
        text = str(error)
        assert text.encode() and len(text) < 20_000
        assert "pydantic" not in text and "Input should" not in text
    assert time.monotonic() - start < SECONDS


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 70), st.floats(), st.text(max_size=8),
    st.sampled_from([
        2**31, 2**63, 10**19, 10**400, 10**5000, -(10**5000), 1e300, 1e-300, "x" * 5000, "\ud800", b"x", (1, 2),
        {"type": "linear"}, {"rope_type": "llama3", "factor": 2}, {"rope_type": []}, {1: 2}, [[]], [{"path": 1}],
        [None] * 2000, {f"x{i}": i for i in range(3000)}, "llama", "mistral", "rope", "learned", "rmsnorm", "linear",
        "llama3", "swiglu", "adamw", "cosine", "none", 64, 1024, 65_536, 4_194_304,
    ]),
)  # fmt: skip
KEYS = st.sampled_from([
    *keys.schema(), *keys.NEAR_ALIASES, *(alias for part in keys.ALIASES.values() for alias in part), "model_type",
    "rope_parameters", "sliding_window", "layer_types", "rope_freq", "max_iters", "batch_size", "min_lr", "init_from",
    "", "x" * 300, "\ud800", 3, None, "model.model", "a.b",
])  # fmt: skip


def groups(values, found):
    if isinstance(values, dict):
        found.append(values)
        for inner in values.values():
            groups(inner, found)
    return found


@given(st.sampled_from(MAPPINGS), st.lists(st.tuples(KEYS, VALUES, st.integers(0, 9)), min_size=1, max_size=3))
@settings(max_examples=150, deadline=None)
def test_any_value_under_any_key(values, changes):
    values = copy.deepcopy(values)
    for key, value, where in changes:
        inner = groups(values, [])
        inner[where % len(inner)][key] = copy.deepcopy(value)
    settles(lambda: read_config(values))


@given(st.sampled_from([None, "gpt2-124m", RUN]), st.lists(st.tuples(KEYS, VALUES), max_size=3))
@settings(max_examples=100, deadline=None)
def test_any_override(target, changes):
    texts = [f"{key}={str(value)[:200] if isinstance(value, str | float | bool) else 7}" for key, value in changes]
    settles(lambda: read_config(target, texts))


PIECES = st.sampled_from([
    "", "null", "NaN", ".inf", "1e400", "9" * 5000, "0x" + "f" * 6000, "-1", "{}", "[[]]", "''", '"\\ud800"',
    "!!int ''", "!!map [a]", "!!timestamp x", "&a", "*a", "<<: 1", "(", ")", "{", "}", "[", "]", ":", ",", "=",
    "-" * 50, "'''", "#", "//", "/*", "torch.float16", "lambda: 1", "__import__('os')", "1/0", "2**9", "x" * 300,
    "\n", "\t", "- - -", "%", "@", "?", "|", "import os\n", "class A:\n", "def f(): pass\n", "\x00", "\u2028",
])  # fmt: skip


@given(st.sampled_from(TEXTS), st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 12), PIECES), max_size=3),
       st.sampled_from(["", ".json", ".yaml", ".toml", ".py", ".txt"]))  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_any_text_beside_a_valid_one(tmp_path_factory, text, changes, suffix):
    for place, length, piece in changes:
        place %= len(text) + 1
        text = text[:place] + piece + text[place + length :]
    path = tmp_path_factory.getbasetemp() / f"config{suffix}"
    path.write_text(text)
    settles(lambda: read_config(path))


@pytest.mark.parametrize(("name", "text"), [
    ("a.json", json.dumps({f"key_{i}": i for i in range(12_000)})),
    ("a.json", json.dumps({"model": {f"key_{i}": i for i in range(12_000)}})),
    ("a.json", json.dumps({"data": {"sources": [{"path": "x", f"key_{i}": i} for i in range(6_000)]}})),
    ("a.json", json.dumps({"data": {"sources": [{f"key_{i}": i for i in range(12_000)}]}})),
    ("a.json", json.dumps({"data": {"sources": [7] * 60_000}})),
    ("a.json", json.dumps({"n" * 200_000: 1})),
    ("a.json", json.dumps({"model_type": "x" * 200_000})),
    ("a.json", json.dumps(PUBLISHED["LLAMA32"] | {f"key_{i}": i + 1 for i in range(12_000)})),
    ("a.yaml", "".join(f"key_{i}: {i}\n" for i in range(6_000))),
    ("a.yaml", "seed: " + "9" * 200_000),
    ("a.yaml", "a:\n" + "".join(" " * i + "a:\n" for i in range(1, 1000))),
    ("a.toml", "".join(f"key_{i} = {i}\n" for i in range(12_000))),
    ("a.toml", "seed = 0x" + "f" * 200_000),
    ("a.toml", "[" + "a." * 50_000 + "b]\nx = 1"),
    ("a.py", "c = {'seed': " + "9" * 4000 + "}"),
    ("a.py", "c = " + "1 + " * 50_000 + "1"),
    ("a.py", "a" + ".a" * 50_000 + " = 1"),
    ("a", "\n" * 250_000),
    ("a", "a" * 250_000),
    ("a", "'" * 250_000),
    ("a", '"\\' * 120_000),
    ("a", "/*" * 120_000),
    ("a", "a: " * 80_000),
    ("a.json", '{"seed": 1,' + " " * 250_000 + "}"),
])  # fmt: skip
def test_a_large_file_is_settled_in_seconds(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    settles(lambda: read_config(path))


def test_a_file_larger_than_any_configuration_is_not_parsed(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({f"key_{i}": i for i in range(30_000)}))
    with pytest.raises(ConfigError, match="larger than 256 KiB"):
        read_config(path)


def test_what_is_no_file_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for target in (tmp_path / "fifo", tmp_path, "/dev/zero", "/dev/stdin", tmp_path / ("x" * 300), tmp_path / "a\0b"):
        with pytest.raises(ConfigError):
            read_config(target)


def test_the_largest_model_is_planned():
    sizes = ["n_layers=1024", "emb_dim=65536", "vocab_size=4000000", "context_length=4194304"]
    for target in (None, "gpt2-124m"):
        config = resolve(read_config(target, [*sizes, "n_heads=1024"]), 300)
        assert total_parameters(config.model) > 10**13
        assert memory(config.model, config.train, 4).peak > 10**14
