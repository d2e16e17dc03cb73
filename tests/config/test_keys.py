"""Every key of the configuration: its kind, which decides whether it may change when a run is resumed."""

import pytest

from kiem.config import keys


def test_every_value_is_either_identity_or_execution():
    values = {path for path, key in keys.schema().items() if key.type != "section"}
    assert keys.identity_keys() | keys.execution_keys() == values
    assert not keys.identity_keys() & keys.execution_keys()
    assert {path: keys.kind(path) for path in values} == {
        path: "identity" if path in keys.identity_keys() else "execution" for path in values
    }


def test_execution_is_how_and_where_a_run_is_computed_and_what_it_writes():
    assert keys.execution_keys() == {
        "device",
        "train.micro_batch_tokens",
        "train.precision",
        "train.compile",
        "train.activation_checkpointing",
        "train.skip_batches",
        "train.stop_on_divergence",
        "train.eval_every",
        "train.eval_tokens",
        "train.sample_every",
        "train.save_every",
        "train.keep_checkpoints",
        "train.tensorboard",
    }


@pytest.mark.parametrize("path", ["train", "train.nothing", "nothing"])
def test_only_a_value_has_a_kind(path):
    with pytest.raises(KeyError):
        keys.kind(path)
