"""Every key of a run's config.yaml, edited: an execution key is said and recorded, any other edit is refused with a
way."""

import json
import re
import shlex
import shutil

import pytest
import yaml

from kiem.config.keys import execution_keys, identity_keys, kind
from kiem.runs import checkpoint
from kiem.runs.resume import flat

# Another valid value of each key, and of those that must change with it.
ROPE = {"model.position": "rope", "model.rope_base": 5000.0}
LINEAR = {**ROPE, "model.rope_scaling": "linear", "model.rope_factor": 2.0}
LLAMA3 = {
    **LINEAR,
    "model.rope_scaling": "llama3",
    "model.rope_original_context_length": 8,
    "model.rope_low_freq_factor": 1.0,
    "model.rope_high_freq_factor": 4.0,
}
OTHER = {
    "model.vocab_size": 300,
    "model.context_length": 32,
    "model.emb_dim": 32,
    "model.n_heads": 4,
    "model.n_layers": 2,
    "model.drop_rate": 0.1,
    "model.qkv_bias": True,
    "model.hidden_dim": 32,
    "model.n_kv_heads": 1,
    "model.head_dim": 4,
    "model.norm": {"model.norm": "layernorm", "model.norm_bias": True},
    "model.norm_eps": 1e-4,
    "model.norm_bias": {"model.norm": "layernorm", "model.norm_bias": True},
    "model.activation": "gelu",
    "model.position": {"model.position": "learned", "model.rope_base": None},
    "model.rope_base": ROPE,
    "model.rope_scaling": LINEAR,
    "model.rope_factor": LINEAR,
    "model.rope_original_context_length": LLAMA3,
    "model.rope_low_freq_factor": LLAMA3,
    "model.rope_high_freq_factor": LLAMA3,
    "model.qk_norm": False,
    "model.bias": True,
    "model.tie_embeddings": True,
    "depth": 2,
    "data.sources": [{"path": "other.txt"}],
    "data.validation": [{"path": "other.txt"}],
    "data.validation_fraction": 0.2,
    "data.tokenizer": "chars",
    "data.tokenizer_vocab_size": 300,
    "data.text_key": "body",
    "data.on_bad_text": "replace",
    "data.cross_document_attention": True,
    "train.tokens": 640,
    "train.batch_tokens": 128,
    "train.micro_batch_tokens": 32,
    "train.optimizer": {"train.optimizer": "adamw", "train.matrix_lr": None},
    "train.lr": 0.123,
    "train.matrix_lr": 0.123,
    "train.weight_decay": 0.5,
    "train.beta1": 0.8,
    "train.beta2": 0.99,
    "train.max_grad_norm": 2.0,
    "train.warmup_tokens": 77,
    "train.cooldown_tokens": 77,
    "train.cooldown": "cosine",
    "train.final_lr_fraction": 0.1,
    "train.init": "gpt2",
    "train.precision": "float32",
    "train.compile": True,
    "train.activation_checkpointing": True,
    "train.skip_batches": "3,4",
    "train.stop_on_divergence": False,
    "train.eval_every": 7,
    "train.eval_tokens": 33,
    "train.sample_every": 7,
    "train.save_every": 7,
    "train.keep_checkpoints": 5,
    "train.tensorboard": True,
    "seed": 7,
    "device": "cpu",
}


def edit(run, key):
    """Change the key in config.yaml, and those that have to change with it; [value before, value now]."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    values = OTHER[key] if isinstance(OTHER[key], dict) else {key: OTHER[key]}
    found = []
    for path, value in values.items():
        *sections, name = path.split(".")
        group = config
        for section in sections:
            group = group[section]
        if path == key:
            found = [group.get(name), value]
        group[name] = value
    assert found[0] != found[1]
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    return found


def test_every_key_has_another_value_here():
    assert set(OTHER) == execution_keys() | identity_keys()


@pytest.mark.parametrize("key", OTHER)
def test_an_edit_is_recorded_or_refused_with_a_way(kiem, run, place, key):
    (place / "other.txt").write_text("another text, line by line\n" * 300)
    newest, log = checkpoint.newest_first(run)[0], (run / "metrics.jsonl").read_bytes()
    before, now = edit(run, key)
    code, _, err = kiem("train", "run")
    if kind(key) == "execution":
        assert code == 0, err
        assert f"changed: {key} from {before} to {now}" in err
        start = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        start = [record for record in start if record["kind"] == "start"][-1]
        assert start["changed"] == {key: [before, now]}
        return
    assert code == 2, err
    assert key in err
    assert checkpoint.newest_first(run)[0] == newest and (run / "metrics.jsonl").read_bytes() == log
    fork = re.search(r"kiem (train run --fork run-2.*)", err)
    assert fork or any(way in err for way in ("start a new run", "longer, not shorter", "keep one", "remove it"))
    if fork and not key.startswith("data."):
        assert kiem(*shlex.split(fork[1]), "-q")[0] == 0


def test_every_line_of_a_configuration_can_be_lost(kiem, run, place):
    """Each key that config.yaml has is removed, then null: what follows is the same run, or a refusal with a way."""
    text, newest = (run / "config.yaml").read_text(), checkpoint.newest_first(run)[0]
    found = flat(yaml.safe_load(text))
    assert len(found) > 40
    for path in found:
        for gone in (True, False):
            config = yaml.safe_load(text)
            *sections, name = path.split(".")
            group = config
            for section in sections:
                group = group[section]
            if gone:
                del group[name]
            else:
                group[name] = None
            (run / "config.yaml").write_text(yaml.safe_dump(config))
            code, _, err = kiem("train", "run")
            assert code in (0, 2), (path, err)
            if code == 0:
                assert "changed:" in err or yaml.safe_load((run / "config.yaml").read_text()) == yaml.safe_load(text), (
                    path
                )
            else:
                assert path.rpartition(".")[2] in err or "incomplete" in err, (path, err)
            assert checkpoint.newest_first(run)[0] == newest
            (run / "config.yaml").write_text(text)


def test_a_run_without_a_checkpoint_and_without_its_vocabulary(kiem, run):
    shutil.rmtree(run / "checkpoints")
    config = yaml.safe_load((run / "config.yaml").read_text())
    del config["model"]["vocab_size"]
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    for command in ("train", "eval", "generate", "plan"):
        code, _, err = kiem(command, "run")
        assert code == 4 and "has no model.vocab_size" in err, (command, err)
