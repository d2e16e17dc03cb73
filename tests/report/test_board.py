"""TensorBoard event files, read back."""

import builtins
import math

import pytest

from kiem.errors import ConfigError
from kiem.report.board import Board


def test_events_are_read_back(tmp_path, records):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Board(tmp_path) as board:
        for record in [
            records.mark("start", 0, "new"),
            records.step(1, 4.0),
            records.step(2, 3.0, matrix_lr=None),
            records.step(3, math.nan),
            records.evaluation(2, 2.5, 1.5),
        ]:
            board.record(record)
        board.sample(records.sample(2, "x\x1b\n```", "p"))
    with Board(tmp_path, first_step=2) as board:  # resumed at step 2: the third step is made again
        board.record(records.step(3, 2.0))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    loss = [(e.step, e.value) for e in events.Scalars("train/loss")]
    assert loss == [(1, 4.0), (2, 3.0), (3, 2.0)]
    assert [e.step for e in events.Scalars("train/matrix_lr")] == [1, 3]
    assert [(e.step, e.value) for e in events.Scalars("eval/bits_per_byte")] == [(2, 1.5)]
    text = events.Tensors("samples/text_summary")[0].tensor_proto.string_val[0].decode()
    assert text == "    px\\x1b\n    ```"


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("torch.utils.tensorboard"):
            raise ModuleNotFoundError("No module named 'tensorboard'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"pip install 'kiem\[tensorboard\]'"):
        Board(tmp_path)
    assert list(tmp_path.iterdir()) == []
