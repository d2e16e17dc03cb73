"""The promise: a run that is killed anywhere, or whose disk fills up, ends as the undisturbed one, bit for bit.

This file is also a program (`python test_survival.py serve`): it imports everything once and then forks a child for
each run, so that a killed run costs a fraction of a second. A child may be told to die, or to find the disk full, at
its n-th operation on the disk: that is how kills inside a save are certain.
"""

import builtins
import contextlib
import errno
import faulthandler
import json
import os
import random
import select
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import psutil
import pytest

STEPS = 12
OPERATIONS = ("write", "fsync", "rename", "replace", "mkdir", "rmdir", "unlink", "ftruncate")
UNCOMPARED = {"tokens_per_second", "matmul_share", "step_seconds", "memory_bytes", "seconds", "time", "bytes", "path"}

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


# The child's side -----------------------------------------------------------------------------------------------------


def serve():
    """Read jobs, one JSON a line: fork a child for each, answer with its pid, then with its exit code."""
    import torch
    import torch._dynamo  # by the first optimiser, and it takes seconds

    from kiem import runtime
    from kiem.train import loop  # noqa: F401 (by the children)

    faulthandler.enable()
    runtime.matmul_rate = lambda *args: 1e9  # takes a third of a second and changes nothing that is compared
    torch.set_num_threads(1)
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            with open(job["log"], "wb") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            os._exit(child(job))
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def child(job):
    """One job in this process, with the fault that it asks for; its exit code."""
    from kiem.errors import KiemError

    fault = Fault(**job["fault"])
    code = 0
    try:
        if job["run"] is None:
            make_data(Path(job["data"]))
        else:
            run_training(Path(job["data"]), Path(job["run"]), fault)
    except KiemError as problem:
        code = problem.exit_code
        print(problem, flush=True)
    except BaseException:
        code = 99
        traceback.print_exc()
    fault.active = False
    Path(job["log"] + ".count").write_text(str(fault.count))
    return code


def configuration(folder):
    from kiem.config.read import read_config

    return read_config({
        "model": {"vocab_size": 257, "context_length": 16, "emb_dim": 16, "n_heads": 2, "n_layers": 2,
                  "drop_rate": 0.1},
        "data": {"sources": [{"path": str(folder / "text.txt")}], "tokenizer": "bytes", "validation_fraction": 0.1},
        "train": {"tokens": 64 * STEPS, "batch_tokens": 64, "micro_batch_tokens": 32, "save_every": 3, "eval_every": 4,
                  "eval_tokens": 64},
        "seed": 5, "device": "cpu",
    })


def make_data(folder):
    from kiem.data.prepare import prepare

    rng = random.Random(1)
    text = "\n\n".join(" ".join(rng.choice(["alpha", "beta", "gamma", "delta"]) for _ in range(9)) for _ in range(60))
    (folder / "text.txt").write_text(text)
    config = configuration(folder)
    print(prepare(config.data, 257, config.seed, folder).path, flush=True)


def run_training(folder, run, fault):
    from kiem.config.presets import resolve
    from kiem.data.shards import open_dataset
    from kiem.train.loop import train

    dataset = open_dataset((folder / "where").read_text())
    config = resolve(configuration(folder), dataset.tokenizer.vocab_size)
    fault.install()
    train(config, run, dataset, quiet=True)


class Fault:
    """Counts operations on the disk. At the n-th: `signal` sends this process a signal; `full` fails this and every
    later write."""

    def __init__(self, kind="none", n=0, number=signal.SIGKILL):
        self.kind, self.n, self.number, self.count, self.active = kind, n, number, 0, True

    def install(self):
        for name in OPERATIONS:
            setattr(os, name, self.around(getattr(os, name), grows=name == "write"))
        real_open = builtins.open

        def counted_open(file, mode="r", *args, **kwargs):
            opened = real_open(file, mode, *args, **kwargs)
            return CountedFile(opened, self) if set(mode) & set("xwa+") and "b" in mode else opened

        builtins.open = counted_open

    def around(self, real, grows):
        def call(*args, **kwargs):
            self.happen(grows)
            return real(*args, **kwargs)
        return call

    def happen(self, grows, do_half=lambda: None):
        """One more operation; `grows`: it needs room; `do_half` does half of it."""
        if not self.active:
            return
        self.count += 1
        if self.kind == "signal" and self.count == self.n:
            do_half()
            os.kill(os.getpid(), self.number)
        elif self.kind == "full" and self.count >= self.n and grows:
            do_half()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class CountedFile:
    """A binary file whose writes count."""

    def __init__(self, file, fault):
        self.file, self.fault = file, fault

    def write(self, data):
        done = 0

        def do_half():
            nonlocal done
            done = self.file.write(memoryview(data)[:len(data) // 2])
            self.file.flush()

        self.fault.happen(True, do_half)
        return done + self.file.write(memoryview(data)[done:])

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)


# The test's side ------------------------------------------------------------------------------------------------------


class Server:
    """The forking server, and the text that its runs train on."""

    def __init__(self, folder, data=None):
        self.folder, self.data, self.jobs = folder, data or folder, 0
        self.process = subprocess.Popen([sys.executable, __file__, "serve"], bufsize=0, stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
        if data is None:
            assert self.train(None) == 0, self.output()
            (folder / "where").write_text(self.output().strip())

    def start(self, run, **fault):
        """Begin a run; its process id. With run None, prepare the data instead."""
        self.jobs += 1
        self.log = self.folder / f"job{self.jobs}.log"
        job = {"data": str(self.data), "run": run and str(run), "log": str(self.log), "fault": fault}
        self.process.stdin.write((json.dumps(job) + "\n").encode())
        self.pid = self.answer()
        return self.pid

    def wait(self):
        """The end of what was begun: its exit code, negative if a signal ended it."""
        return self.answer()

    def answer(self, seconds=60):
        if not select.select([self.process.stdout], [], [], seconds)[0]:
            os.kill(self.pid, signal.SIGKILL)
            pytest.fail(f"no end after {seconds} s: {self.output()}")
        return int(self.process.stdout.readline())

    def train(self, run, **fault):
        self.start(run, **fault)
        return self.wait()

    def output(self):
        return self.log.read_text()

    def count(self):
        """Operations on the disk of the last run (of one that was not killed)."""
        return int(Path(f"{self.log}.count").read_text())

    def close(self):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def undisturbed(server, tmp_path_factory):
    """(what the undisturbed run ends as, its operations on the disk, its seconds)."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    start = time.perf_counter()
    assert server.train(run) == 0, server.output()
    return outcome(run), server.count(), time.perf_counter() - start


def outcome(run):
    """Everything that two equal runs have in common: the bytes of every tensor, the state, every logged number."""
    newest = sorted((run / "checkpoints").iterdir())[-1]
    files = {entry.name: entry.read_bytes() for entry in sorted(newest.iterdir())}
    assert set(files) >= {"model.safetensors", "optimizer.safetensors", "random.safetensors", "state.json"}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    logged = [{key: value for key, value in line.items() if key not in UNCOMPARED}
              for line in lines if line["kind"] in ("step", "eval")]
    assert [line["step"] for line in logged if line["kind"] == "step"] == list(range(1, STEPS + 1))
    return newest.name, files, logged


def in_a_save(run):
    """Whether what is on the disk was left by a kill inside a save or a removal."""
    folder = run / "checkpoints"
    return folder.is_dir() and any(not entry.name.startswith("step-") for entry in folder.iterdir())


def test_two_undisturbed_runs_are_equal(server, undisturbed, tmp_path):
    """Without this, no comparison below would mean anything."""
    assert server.train(tmp_path / "run") == 0
    assert outcome(tmp_path / "run") == undisturbed[0]
    assert server.count() == undisturbed[1]


def test_killed_at_30_moments(server, undisturbed, tmp_path):
    """Six runs, each killed five times before it may end: at an operation on the disk, or after a time."""
    expected, operations, seconds = undisturbed
    rng = random.Random(0)
    kills = inside = attempts = 0
    for number in range(6):
        run, mine = tmp_path / f"run{number}", 0
        while mine < 5:
            attempts += 1
            assert attempts < 60
            if mine % 2:
                pid = server.start(run)
                time.sleep(rng.uniform(0, seconds))
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                code = server.wait()
            else:
                code = server.train(run, kind="signal", n=rng.randint(1, operations // 3))
            assert code in (0, -signal.SIGKILL), server.output()
            mine += code != 0
            inside += code != 0 and in_a_save(run)
            if code == 0 and mine < 5:  # it ended before the blow: begin again
                run = tmp_path / f"run{number}-{attempts}"
        kills += mine
        assert server.train(run) == 0, server.output()
        assert outcome(run) == expected
    assert kills == 30
    assert inside >= 5


def test_killed_again_and_again_a_little_later(server, undisturbed, tmp_path):
    """From the start, through the first save, into the second: every 7th operation, in one run."""
    expected, operations, _ = undisturbed
    run = tmp_path / "run"
    kills = 0
    for n in range(3, operations, 7):
        code = server.train(run, kind="signal", n=n)
        if code == 0:
            break
        assert code == -signal.SIGKILL, server.output()
        kills += 1
    assert code == 0
    assert kills > 15
    assert outcome(run) == expected


def test_a_damaged_checkpoint_is_passed_over(server, undisturbed, tmp_path):
    """After a kill, a byte of the newest checkpoint flips: the one before is used, and the end is the same."""
    expected, operations, _ = undisturbed
    run = tmp_path / "run"
    assert server.train(run, kind="signal", n=int(0.9 * operations)) == -signal.SIGKILL
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    weights = bytearray((newest / "model.safetensors").read_bytes())
    weights[len(weights) // 2] ^= 1
    (newest / "model.safetensors").write_bytes(weights)
    assert server.train(run) == 0, server.output()
    starts = [line["step"] for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
              if line["kind"] == "start"]
    assert starts[-1] == int(newest.name[5:]) - 3
    assert outcome(run) == expected


def test_two_runs_cannot_write_one_folder(server, undisturbed, tmp_path):
    """The second is refused with exit code 6 and touches nothing; the first ends as if alone."""
    run = tmp_path / "run"
    second = Server(tmp_path, data=server.folder)
    pid = server.start(run, kind="signal", n=int(0.4 * undisturbed[1]), number=signal.SIGSTOP)
    try:
        while psutil.Process(pid).status() != psutil.STATUS_STOPPED:
            time.sleep(0.005)
        code = second.train(run)
        os.kill(pid, signal.SIGCONT)
        assert server.wait() == 0, server.output()
        assert code == 6, second.output()
        assert f"process {pid} on " in second.output()
        assert outcome(run) == undisturbed[0]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
        second.close()


@pytest.mark.parametrize("part", [0.3, 0.55, 0.8])
def test_a_disk_that_fills_up(server, undisturbed, tmp_path, part):
    """It is told with exit code 7, what was saved stays whole, and with room again the run ends as the others."""
    expected, operations, _ = undisturbed
    run = tmp_path / "run"
    code = server.train(run, kind="full", n=int(part * operations))
    assert code == 7, server.output()
    assert "No space left on device" in server.output()
    assert "free" in server.output()
    assert not in_a_save(run)
    assert server.train(run) == 0, server.output()
    assert outcome(run) == expected


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("part", [0.2, 0.6])
def test_a_signal_saves_and_says_how_to_go_on(server, undisturbed, tmp_path, number, part):
    expected, operations, _ = undisturbed
    run = tmp_path / "run"
    code = server.train(run, kind="signal", n=int(part * operations), number=number)
    assert code == 130, server.output()
    assert f"kiem train {run}" in server.output()
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["kind"] == "stop"
    assert (run / f"checkpoints/step-{last['step']:08d}").is_dir()
    assert server.train(run) == 0
    assert outcome(run) == expected


if __name__ == "__main__" and sys.argv[1:] == ["serve"]:
    serve()
