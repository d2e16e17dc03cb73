"""metrics.jsonl: what a reader finds after any death of the writer, and the definitions of the rates."""

import json
import math
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kiem.errors import DataError, StorageError
from kiem.runs.metrics import (
    JsonLines,
    MetricsLog,
    Smoothed,
    iter_records,
    matmul_share,
    read_metrics,
    tokens_per_second,
)


def steps(path: Path) -> list[int]:
    return [r["step"] for r in read_metrics(path)]


def test_rates_by_hand():
    # 8,192 tokens in 0.5 s are 16,384 tokens/s; at 3e6 FLOPs a token that is 49.152e9 FLOP/s, a quarter of 196.608e9.
    assert tokens_per_second(8192, 0.5) == 16384.0
    assert matmul_share(3e6, 16384.0, 196.608e9) == pytest.approx(0.25, rel=1e-12)
    assert math.isnan(tokens_per_second(8192, 0.0))
    assert math.isnan(matmul_share(3e6, 16384.0, 0.0))


def test_smoothed_by_hand():
    # Window 2 keeps one half: after 4 and 8 the weights are 1/4 and 1/2 of a total of 3/4.
    smooth = Smoothed(2)
    assert smooth.update(4.0) == pytest.approx(4.0)
    assert smooth.update(8.0) == pytest.approx((4 * 0.25 + 8 * 0.5) / 0.75)
    assert smooth.update(math.nan) == pytest.approx(20 / 3)
    assert math.isnan(Smoothed(2).update(math.inf))


@given(st.floats(-100, 100, allow_subnormal=False), st.integers(1, 50), st.floats(1, 100))
def test_smoothed_keeps_a_constant(x, n, window):
    smooth = Smoothed(window)
    for _ in range(n):
        mean = smooth.update(x)
    assert mean == pytest.approx(x, rel=1e-9, abs=1e-9)


def test_each_line_is_there_when_write_returns(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write("step", step=1, loss=2.5)
        assert path.read_text() == '{"kind": "step", "step": 1, "loss": 2.5}\n'
        log.write("end", step=1, tokens=8, reason="finished")
        assert read_metrics(path)[1] == {"kind": "end", "step": 1, "tokens": 8, "reason": "finished"}


def test_unknown_kind_is_a_mistake_of_the_caller(tmp_path):
    with MetricsLog(tmp_path / "metrics.jsonl") as log, pytest.raises(ValueError, match="'steps'"):
        log.write("steps", step=1)


def test_non_finite_numbers_stay_valid_json_and_come_back(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write("step", step=1, loss=math.nan, grad_norm=math.inf, lr=-math.inf, extra=[math.nan])
        log.write("stop", step=1, reason="NaN", time="t")

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    first = json.loads(path.read_text().splitlines()[0], parse_constant=refuse)
    assert (first["loss"], first["grad_norm"], first["lr"], first["extra"]) == ("NaN", "Infinity", "-Infinity", ["NaN"])
    back = read_metrics(path)
    assert math.isnan(back[0]["loss"]) and back[0]["grad_norm"] == math.inf and back[0]["lr"] == -math.inf
    assert back[1]["reason"] == "NaN"  # text stays text


def test_numpy_numbers_and_paths_are_written(tmp_path):
    numpy = pytest.importorskip("numpy")
    with MetricsLog(tmp_path / "m.jsonl") as log:
        log.write("save", step=numpy.int64(3), bytes=numpy.float32(0.5), path=Path("a/b"), seconds=numpy.float64("nan"))
    record = read_metrics(tmp_path / "m.jsonl")[0]
    assert (record["step"], record["bytes"], record["path"]) == (3, 0.5, os.path.join("a", "b"))
    assert math.isnan(record["seconds"])


@given(st.integers(0, 400))
def test_a_file_cut_anywhere_gives_its_whole_lines_and_goes_on(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("cut") / "metrics.jsonl"
    with MetricsLog(path) as log:
        for step in range(1, 11):
            log.write("step", step=step, loss=1.0 / step)
    whole = path.read_bytes()
    path.write_bytes(whole[:cut])
    complete = whole[:cut].count(b"\n")
    assert steps(path) == list(range(1, complete + 1))
    with MetricsLog(path) as log:
        log.truncate(step=4)
        kept = min(complete, 4)
        for step in range(kept + 1, 11):
            log.write("step", step=step, loss=1.0 / step)
    assert path.read_bytes() == whole


def test_truncate_keeps_what_belongs_to_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write("start", step=0, tokens=0)
        for step in range(1, 6):
            log.write("step", step=step)
            if step == 3:
                log.write("eval", step=step)
                log.write("save", step=step)
        with path.open("ab") as file:
            file.write(b'not json\n{"kind": "step", "st')
        log.truncate(3)
        log.write("start", step=3, tokens=0)
        assert [(r["kind"], r["step"]) for r in read_metrics(path)] == [
            ("start", 0),
            ("step", 1),
            ("step", 2),
            ("step", 3),
            ("eval", 3),
            ("save", 3),
            ("start", 3),
        ]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_truncate_that_dies_leaves_the_old_file_and_a_usable_log(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for step in (1, 2, 3):
        log.write("step", step=step)
    before = path.read_bytes()

    def broken(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(StorageError, match=r"metrics\.jsonl: No space left"):
        patch.setattr(os, "replace", broken)
        log.truncate(1)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]
    log.write("step", step=4)
    assert steps(path) == [1, 2, 3, 4]
    log.close()


def test_a_full_disk_leaves_no_half_line(tmp_path, monkeypatch):
    path = tmp_path / "samples.jsonl"
    log = JsonLines(path)
    log.append({"step": 1})
    real, calls = os.write, []

    def fills_up(handle, data):
        calls.append(1)
        if len(calls) == 1:
            return real(handle, data[:5])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(StorageError, match="No space left"):
        patch.setattr(os, "write", fills_up)
        log.append({"step": 2, "text": "abc"})
    assert path.read_bytes() == b'{"step": 1}\n'
    log.append({"step": 2})
    assert steps(path) == [1, 2]
    log.close()


def test_a_folder_in_the_way_is_a_storage_error(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(StorageError, match=r"cannot write .*metrics\.jsonl"):
        MetricsLog(tmp_path / "metrics.jsonl")
    with pytest.raises(DataError, match="cannot be read"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_damaged_lines_are_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n[1]\n\xff\xfe\n' + b"[" * 100_000 + b'\n{"step": 2}\n{"step"')
    problems: list[str] = []
    assert [r["step"] for r in iter_records(path, problems)] == [1, 2]
    assert [p.split(":")[0] for p in problems] == [f"metrics.jsonl, line {n}" for n in (2, 3, 4)]
    assert read_metrics(tmp_path / "missing.jsonl") == []


@given(st.text())
def test_any_text_comes_back(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("text") / "samples.jsonl"
    with JsonLines(path) as log:
        log.append({"step": 1, "text": text})
    assert read_metrics(path)[0]["text"] == text
    assert path.read_bytes().count(b"\n") == 1
