"""The atomic write, the lock, and JSON that every reader takes."""

import errno
import fcntl
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kiem import files
from kiem.errors import BusyError, StorageError

# -- writing -----------------------------------------------------------------------------------------------------------


def test_a_write_replaces_text_and_bytes(tmp_path):
    path = tmp_path / "a.json"
    files.write_atomically(path, "é\ud800\n")
    assert path.read_bytes() == "é\\ud800\n".encode()
    files.write_atomically(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, call):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(StorageError, match=r"a\.txt: No space left.*Make room"):
        patch.setattr(os, call, fail)
        files.write_atomically(path, "new")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_write_is_synced_before_it_has_its_name_and_the_folder_after(tmp_path, monkeypatch):
    done = []
    for call in ("fsync", "replace"):
        real = getattr(os, call)
        monkeypatch.setattr(os, call, lambda *a, real=real, call=call: (done.append(call), real(*a))[1])
    files.write_atomically(tmp_path / "a", "x")
    assert done == ["fsync", "replace", "fsync"]


# -- the lock ----------------------------------------------------------------------------------------------------------

HOLDER = """
import fcntl, sys, errno, time
from pathlib import Path
from kiem import files
if sys.argv[2] != "0":
    def flock(*_):
        raise OSError(int(sys.argv[2]), "none here")
    fcntl.flock = flock
with files.lock(Path(sys.argv[1]), "the run"):
    print("held", flush=True)
    time.sleep(60)
"""


def holder(folder, code=0):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder), str(code)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize("code", [0, errno.ENOTSUP, errno.ENOSYS], ids=["flock", "ENOTSUP", "ENOSYS"])
def test_one_holder_whoever_tries_and_a_killed_one_lets_go(tmp_path, monkeypatch, code):
    """The second and the third are refused; the holder's note is as it was."""
    process = holder(tmp_path, code)
    if code:

        def missing(*_):
            raise OSError(code, "none here")

        monkeypatch.setattr(fcntl, "flock", missing)
    try:
        note = (tmp_path / files.OWNER).read_bytes()
        for _ in range(2):
            with pytest.raises(BusyError, match=f"process {process.pid} on .*, since"), files.lock(tmp_path, "the run"):
                pytest.fail("a second holder")
            assert (tmp_path / files.OWNER).read_bytes() == note
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    for _ in range(2):
        with files.lock(tmp_path, "the run"):
            assert json.loads((tmp_path / files.OWNER).read_text())["pid"] == os.getpid()


def test_the_lock_holds_within_a_process_and_ends(tmp_path):
    refused = pytest.raises(BusyError, match=f"process {os.getpid()}")
    with files.lock(tmp_path, "it"), refused, files.lock(tmp_path, "it"):
        pass
    with files.lock(tmp_path, "it"):
        pass


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_that_leaves_the_lock_does_not_open_it(tmp_path):
    code = f"""
import os, sys
from pathlib import Path
from kiem import files
from kiem.errors import BusyError
folder = Path({str(tmp_path)!r})
child = -1
try:
    with files.lock(folder, "it"):
        child = os.fork()
        if child:
            os.waitpid(child, 0)
            try:
                with files.lock(folder, "it"):
                    print("open")
            except BusyError:
                print("held")
finally:
    if child == 0:
        os._exit(0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "held\n", done.stderr


@pytest.mark.parametrize("text", ["", "[]", "{", '{"pid": "x"}', "\x00" * 50, "[" * 100_000])
def test_a_lock_with_any_text_in_it_can_be_taken(tmp_path, text):
    for name in (files.LOCK, files.OWNER):
        (tmp_path / name).write_text(text)
    with files.lock(tmp_path, "it"):
        pass


def test_an_unreadable_note_of_the_holder(tmp_path):
    with files.lock(tmp_path, "it"):
        (tmp_path / files.OWNER).write_text("[" * 100_000)
        with pytest.raises(BusyError, match="another process"), files.lock(tmp_path, "it"):
            pass


def test_a_full_disk_does_not_stop_the_lock(tmp_path, monkeypatch):
    def full(*_):
        raise StorageError("full")

    monkeypatch.setattr(files, "write_atomically", full)
    with files.lock(tmp_path, "it"):
        pass


def test_a_folder_that_cannot_be_locked(tmp_path):
    (tmp_path / files.LOCK).mkdir()
    with pytest.raises(StorageError, match="cannot write it"), files.lock(tmp_path, "it"):
        pass


# -- JSON --------------------------------------------------------------------------------------------------------------


def strict(text):
    return json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(values)
def test_json_is_valid_for_any_value(value):
    for text in (files.to_json(value), files.to_json(value, indent=1), files.embedded_json(value)):
        text.encode("utf-8")
        assert strict(text) == files.plain(value)


def test_non_finite_numbers_have_one_spelling():
    text = files.to_json({"a": math.nan, "b": [math.inf, (-math.inf, 1.5)]})
    assert strict(text) == {"a": "NaN", "b": ["Infinity", ["-Infinity", 1.5]]}
    assert math.isnan(files.NON_FINITE["NaN"]) and files.NON_FINITE["-Infinity"] == -math.inf


def test_scalars_of_numpy_and_torch_and_paths():
    numpy, torch = pytest.importorskip("numpy"), pytest.importorskip("torch")
    value = {"n": numpy.float32("nan"), "i": numpy.int64(3), "t": torch.tensor(0.5), "p": Path("a") / "\udcff"}
    assert strict(files.to_json(value)) == {"n": "NaN", "i": 3, "t": 0.5, "p": "a/\udcff"}


@pytest.mark.parametrize("text", [b"", b"{", b"[" * 100_000, b"\xff\xfe", b"1" * 5000])
def test_what_is_no_json_is_a_value_error(tmp_path, text):
    (tmp_path / "x").write_bytes(text)
    with pytest.raises(ValueError):
        files.read_json(tmp_path / "x")


def test_a_long_file_and_a_pipe_are_not_read(tmp_path):
    (tmp_path / "long").write_text('"' + "x" * 100 + '"')
    with pytest.raises(ValueError, match="more than 50 B"):
        files.read_json(tmp_path / "long", 50)
    os.mkfifo(tmp_path / "pipe")
    began = time.monotonic()
    with pytest.raises(OSError, match="not a regular file"):
        files.read_json(tmp_path / "pipe")
    assert time.monotonic() - began < 5
