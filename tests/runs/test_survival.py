"""The promise: a run that is killed anywhere, or whose disk fills up, ends as the undisturbed one, bit for bit.

The runs are children of survival_server.py, which knows how to disturb them at a given operation on the disk: that is
how kills inside a save are certain.
"""

import contextlib
import importlib.util
import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

PROGRAM = Path(__file__).with_name("survival_server.py")
STEPS = 12
UNCOMPARED = {"tokens_per_second", "matmul_share", "step_seconds", "memory_bytes", "seconds", "time", "bytes", "path"}

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


class Server:
    """The forking server, and the text that its runs train on."""

    def __init__(self, folder, data=None):
        self.folder, self.data, self.jobs, self.pid = folder, data or folder, 0, None
        self.process = subprocess.Popen(
            [sys.executable, PROGRAM],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        if data is None:
            assert self.train(None) == 0, self.output()
            (folder / "where").write_text(self.output().strip())

    def start(self, run, command=None, **fault):
        """Begin a run, or a command of the command line; its process id. With neither, prepare the data instead."""
        self.jobs += 1
        self.log = self.folder / f"job{self.jobs}.log"
        job = {
            "data": str(self.data),
            "steps": STEPS,
            "run": run and str(run),
            "log": str(self.log),
            "fault": fault,
            "command": command,
        }
        self.process.stdin.write((json.dumps(job) + "\n").encode())
        self.pid = self.answer()  # the first comes when the server has imported everything
        return self.pid

    def wait(self):
        """The end of what was begun: its exit code, negative if a signal ended it."""
        return self.answer()

    def answer(self, seconds=300):
        """The next number that the server says. The limit is far beyond any run here, also on a busy machine."""
        if not select.select([self.process.stdout], [], [], seconds)[0]:
            os.kill(self.pid or self.process.pid, signal.SIGKILL)
            pytest.fail(f"no end after {seconds} s: {self.log.read_text() if self.log.exists() else 'no output'}")
        return int(self.process.stdout.readline())

    def train(self, run, **fault):
        self.start(run, **fault)
        return self.wait()

    def kiem_train(self, run, **fault):
        """`kiem train CONFIG --out RUN`, always the same command."""
        return self.train(None, command=["train", str(self.folder / "config.yaml"), "--out", str(run), "-q"], **fault)

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


@pytest.fixture(scope="module")
def by_command(server, tmp_path_factory):
    """(what the undisturbed run by the command line ends as, its operations on the disk)."""
    from kiem.config.read import write_config

    spec = importlib.util.spec_from_file_location("survival_server", PROGRAM)
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    write_config(program.configuration(server.data, STEPS), server.folder / "config.yaml")
    run = tmp_path_factory.mktemp("by_command") / "run"
    assert server.kiem_train(run) == 0, server.output()
    return outcome(run), server.count()


def first_operations(slow):
    """Operations of a new run before its first step: a kill at one is a kill in its first second."""
    return range(1, 25) if slow else (1, 2, 3, 5, 8, 12, 17)


@pytest.mark.parametrize("slow", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["some", "all"])
def test_killed_in_its_first_second_the_same_command_trains_it(server, by_command, tmp_path, slow):
    expected, _ = by_command
    for n in first_operations(slow):
        run = tmp_path / f"run{n}"
        assert server.kiem_train(run, kind="signal", n=n) == -signal.SIGKILL
        assert server.kiem_train(run) == 0, server.output()
        assert outcome(run) == expected
        assert not [path for path in run.rglob("*") if path.name.startswith(".tmp-")]


@pytest.mark.parametrize("slow", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["some", "all"])
def test_a_fork_killed_in_its_first_second(server, by_command, tmp_path, slow):
    """It begins with the weights of the other run, also when its first start was killed."""
    parent = tmp_path / "parent"
    assert server.kiem_train(parent) == 0, server.output()
    fork = ["train", str(parent), "-q", "train.lr=0.001", "--fork"]
    assert server.train(None, command=[*fork, str(tmp_path / "whole")]) == 0, server.output()
    expected = outcome(tmp_path / "whole")[2]
    for n in first_operations(slow):
        run = tmp_path / f"run{n}"
        assert server.train(None, command=[*fork, str(run)], kind="signal", n=n) == -signal.SIGKILL
        assert server.train(None, command=[*fork, str(run)]) == 0, server.output()
        assert outcome(run)[2] == expected


@pytest.mark.slow
def test_forty_ends_each_resumed_by_the_command_that_a_user_types(server, by_command, tmp_path):
    """20 kills at an operation on the disk, 10 after a random time of a new run's first second, 10 full disks."""
    expected, operations = by_command
    rng, done, equal, number = random.Random(2), {"operation": 0, "first second": 0, "full disk": 0}, 0, 0
    wanted = {"operation": 20, "first second": 10, "full disk": 10}
    while done != wanted:
        how = next(how for how in wanted if done[how] < wanted[how])
        number += 1
        assert number < 80
        run = tmp_path / f"run{number}"
        if how == "first second":
            pid = server.start(None, command=["train", str(server.folder / "config.yaml"), "--out", str(run), "-q"])
            time.sleep(rng.uniform(0, 1))
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            code = server.wait()
        else:
            kind = "signal" if how == "operation" else "full"
            code = server.kiem_train(run, kind=kind, n=rng.randint(1, operations))
        if code == 0:  # it had ended before
            continue
        assert code == (7 if how == "full disk" else -signal.SIGKILL), server.output()
        done[how] += 1
        if number % 2 and (run / "config.yaml").exists():
            code = server.train(None, command=["train", str(run), "-q"])
        else:
            code = server.kiem_train(run)
        assert code == 0, server.output()
        equal += outcome(run) == expected
    print(f"ends: {done}; resumed and equal bit for bit: {equal} of {sum(done.values())}")
    assert equal == 40


@pytest.mark.parametrize("slow", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["some", "all"])
def test_a_disk_that_is_full_from_the_start(server, by_command, tmp_path, slow):
    """config.yaml, tokenizer/, plan.json, the first records: told with exit code 7, and nothing half made stays."""
    expected, _ = by_command
    for n in first_operations(slow):
        run = tmp_path / f"run{n}"
        assert server.kiem_train(run, kind="full", n=n) == 7, server.output()
        assert "No space left on device" in server.output() and "Traceback" not in server.output()
        assert not [path for path in run.rglob("*") if path.name.startswith(".tmp-")]
        assert server.kiem_train(run) == 0, server.output()
        assert outcome(run) == expected


def outcome(run):
    """Everything that two equal runs have in common: the bytes of every tensor, the state, every logged number."""
    newest = sorted((run / "checkpoints").iterdir())[-1]
    files = {entry.name: entry.read_bytes() for entry in sorted(newest.iterdir())}
    assert set(files) >= {"model.safetensors", "optimizer.safetensors", "random.safetensors", "state.json"}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    logged = [
        {key: value for key, value in line.items() if key not in UNCOMPARED}
        for line in lines
        if line["kind"] in ("step", "eval")
    ]
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


def test_killed_around_the_last_records(server, undisturbed, tmp_path):
    """Between the final evaluation, the last save and the end there is no moment at which a record is lost or
    doubled."""
    expected, operations, _ = undisturbed
    for before_end in range(12):
        run = tmp_path / f"run{before_end}"
        assert server.train(run, kind="signal", n=operations - before_end) == -signal.SIGKILL
        assert server.train(run) == 0, server.output()
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
    starts = [
        line["step"]
        for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        if line["kind"] == "start"
    ]
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


@pytest.mark.parametrize("what", ["a weight", "a moment", "a gradient"])
@pytest.mark.parametrize("at", [7, 8])
def test_one_bad_number_stops_the_run_is_named_and_never_saved(server, undisturbed, tmp_path, what, at):
    """T14. The checkpoint before it stays the newest; going on from there, the run ends as the undisturbed."""
    run = tmp_path / "run"
    assert server.train(run, kind=what, n=at) == 5, server.output()
    assert "blocks.1.mlp.up" in server.output()
    assert sorted(entry.name for entry in (run / "checkpoints").iterdir()) == ["step-00000003", "step-00000006"]
    assert server.train(run) == 0, server.output()
    assert outcome(run) == undisturbed[0]
