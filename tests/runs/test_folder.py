"""The run folder: one writer, and saves that are whole or absent whatever the disk or a kill does."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from kiem.errors import BusyError, StorageError
from kiem.runs import checkpoint, tensorfile
from kiem.runs.run import Run


def save(run, step):
    tensors = {
        "model": {"weight": torch.full((3, 5), float(step)), "norm": torch.ones(5)},
        "optimizer": {"weight.exp_avg": torch.zeros(3, 5, dtype=torch.bfloat16), "step": torch.tensor(float(step))},
        "random": {"cpu": torch.get_rng_state()},
    }
    return checkpoint.save(run, step, tensors, {"step": step})


def names(run):
    return sorted(entry.name for entry in (run / "checkpoints").iterdir())


# Failing disks --------------------------------------------------------------------------------------------------------

CODES = [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES]


class FailingFile:
    """A file whose n-th write of the process fails as a disk does: after some of the bytes."""

    def __init__(self, file, counter, code):
        self.file, self.counter, self.code = file, counter, code

    def write(self, data):
        self.counter[0] -= 1
        if self.counter[0] < 0:
            self.file.write(bytes(data)[: len(data) // 2])
            raise OSError(self.code, os.strerror(self.code))
        return self.file.write(data)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)


def assert_refused(run, code):
    with pytest.raises(StorageError) as caught:
        save(run, 2)
    text = str(caught.value)
    assert os.strerror(code) in text
    assert "step 2" in text
    assert str(run / "checkpoints") in text
    assert re.search(r"It needs 9\.\d\d KiB, [\d.,]+ \w*B free there", text), text
    assert names(run) == ["step-00000001"]
    found, problems = checkpoint.newest(run)
    assert found.state == {"step": 1} and problems == []


@pytest.mark.parametrize("code", CODES, ids=[errno.errorcode[code] for code in CODES])
@pytest.mark.parametrize("n", [0, 1, 2, 5, 8])
def test_a_failed_write_is_told_and_leaves_what_was(tmp_path, monkeypatch, code, n):
    save(tmp_path, 1)
    counter = [n]

    def opened(path, mode):
        file = open(path, mode)  # noqa: SIM115
        return FailingFile(file, counter, code) if mode == "xb" else file

    monkeypatch.setattr(tensorfile, "open", opened, raising=False)
    monkeypatch.setattr(checkpoint, "open", opened, raising=False)
    assert_refused(tmp_path, code)
    monkeypatch.undo()
    save(tmp_path, 2)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


@pytest.mark.parametrize(("call", "n"), [("mkdir", 1), ("rename", 0), *(("fsync", n) for n in range(7))])
def test_a_failed_system_call_is_told_and_leaves_what_was(tmp_path, monkeypatch, call, n):
    save(tmp_path, 1)
    counter, real = [n], getattr(os, call)

    def failing(*args, **kwargs):
        counter[0] -= 1
        if counter[0] == -1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(*args, **kwargs)

    monkeypatch.setattr(os, call, failing)
    try:
        save(tmp_path, 2)
    except StorageError as problem:
        assert os.strerror(errno.EIO) in str(problem)
        assert names(tmp_path) in (["step-00000001"], ["step-00000001", "step-00000002"])
    else:
        pytest.fail("the failure was swallowed")
    monkeypatch.undo()
    assert checkpoint.latest(tmp_path)[1] == []


def test_a_disk_too_small_is_told_before_anything_is_written(tmp_path, monkeypatch):
    save(tmp_path, 1)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(checkpoint, "write_tensors", lambda *args: pytest.fail("wrote to a full disk"))
    assert_refused(tmp_path, errno.ENOSPC)


def test_a_file_size_limit_of_the_shell(tmp_path):
    resource = pytest.importorskip("resource")
    save(tmp_path, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
    try:
        assert_refused(tmp_path, errno.EFBIG)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_really_full_disk(tmp_path):
    if not hasattr(os, "geteuid") or os.geteuid() != 0 or not sys.platform.startswith("linux"):
        pytest.skip("mounting a small file system needs root on Linux")
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this container may not mount")
    try:
        save(disk, 1)
        real = shutil.disk_usage
        (disk / "filler").write_bytes(b"x" * (shutil.disk_usage(disk).free - 4096))
        assert_refused(disk, errno.ENOSPC)
        try:  # also when the disk fills while the save is under way
            shutil.disk_usage = lambda path: real("/")
            assert_refused(disk, errno.ENOSPC)
        finally:
            shutil.disk_usage = real
        (disk / "filler").unlink()
        save(disk, 2)
        assert checkpoint.latest(disk)[0].name == "step-00000002"
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# Interrupted saves ----------------------------------------------------------------------------------------------------


def in_a_child(work):
    """Run `work` in a fork of this process and return its wait status."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(pid, 0)[1]


def kill_at(n):
    """Make this process kill itself at its n-th call that changes the disk."""
    counter = [n]

    def deadly(real):
        def call(*args, **kwargs):
            counter[0] -= 1
            if counter[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    for name in ("fsync", "rename", "mkdir", "rmdir", "unlink"):
        setattr(os, name, deadly(getattr(os, name)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("existing", [1, 2], ids=["a new step", "the step again"])
def test_a_save_killed_at_any_call_leaves_the_old_or_the_new(tmp_path, existing):
    """The newest whole checkpoint after the next start is the old one or the new one; nothing half made is in sight."""
    seen = set()
    for n in range(40):
        run = tmp_path / str(n)
        checkpoint.save(run, existing, {"model": {"w": torch.ones(9)}}, {"old": 1})

        def work(run=run, n=n):
            kill_at(n)
            checkpoint.save(run, 2, {"model": {"w": torch.ones(9)}, "random": {"cpu": torch.zeros(5)}}, {"new": 2})

        status = in_a_child(work)
        with Run(run).writing():
            assert all(name.startswith("step-") for name in names(run))
        found, problems = checkpoint.newest(run)
        state = found.state
        assert problems == []
        assert state in ({"old": 1}, {"new": 2})
        seen.add(json.dumps(state))
        save(run, 3)
        if status == 0:
            break
    assert status == 0
    assert n > 8
    assert len(seen) == 2


def test_leftovers_are_cleared_by_the_next_start(tmp_path):
    path = save(tmp_path, 1)
    (path.parent / ".tmp-step-00000002-1").mkdir()
    (path.parent / ".tmp-step-00000002-1/model.safetensors").write_bytes(b"half")
    path.rename(path.parent / ".old-step-00000001")
    assert checkpoint.latest(tmp_path) == (None, [])
    with Run(tmp_path).writing():
        assert names(tmp_path) == ["step-00000001"]
    assert checkpoint.latest(tmp_path) == (path, [])


# One writer -----------------------------------------------------------------------------------------------------------


def test_a_run_folder_has_one_writer_and_says_who(tmp_path):
    with Run(tmp_path / "run").writing():
        assert (tmp_path / "run").is_dir()
        with pytest.raises(BusyError, match=f"the run folder .*run is being written by process {os.getpid()} on"):
            Run(tmp_path / "run").writing().__enter__()
    with Run(tmp_path / "run").writing():
        pass


def test_a_run_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"cannot write the run folder .*file"), Run(tmp_path / "file").writing():
        pass
