"""The program behind test_survival.py: it imports everything once and forks a child for each run.

So a killed run costs a fraction of a second. A child may be told to die, to stop, or to find the disk full at its n-th
operation on the disk, or to meet a NaN after its n-th update.
"""

import builtins
import errno
import faulthandler
import json
import os
import random
import signal
import sys
import traceback
from pathlib import Path

POISONS = ("a weight", "a moment", "a gradient")
OPERATIONS = ("write", "fsync", "rename", "replace", "mkdir", "rmdir", "unlink", "ftruncate")


def serve():
    """Read jobs, one JSON a line: fork a child for each, answer with its pid, then with its exit code."""
    import torch
    import torch._dynamo  # by the first optimizer, and it takes seconds

    from kiem import api, runtime
    from kiem.cli import main  # noqa: F401  this and what follows by the children
    from kiem.generation import engine  # noqa: F401
    from kiem.planning import predict
    from kiem.report import summary  # noqa: F401
    from kiem.training import loop  # noqa: F401

    faulthandler.enable()
    runtime.matmul_rate = lambda *_, **__: 1e9  # takes a third of a second and changes nothing that is compared
    # So do the speed of this machine, and more than a few samples.
    plan = predict.plan
    predict.plan = lambda config, measure: plan(config, measure=False)
    api.SAMPLES_AT_ENDS, api.SAMPLE_TOKENS = 1, 8
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
        if job["command"]:
            code = run_command(job, fault)
        elif job["run"] is None:
            make_data(Path(job["data"]), job["steps"])
        else:
            run_training(Path(job["data"]), job["steps"], Path(job["run"]), fault)
    except KiemError as problem:
        code = problem.exit_code
        print(problem, flush=True)
    except BaseException:
        code = 99
        traceback.print_exc()
    fault.active = False
    Path(job["log"] + ".count").write_text(str(fault.count))
    return code


def run_command(job, fault):
    """`kiem` with the arguments of the job, as a user types them; its exit code."""
    from kiem.cli.main import main

    os.environ["KIEM_CACHE"] = job["data"]
    fault.install()
    return main(job["command"])


def configuration(folder, steps):
    from kiem.config.read import read_config

    return read_config(
        {
            "model": {
                "vocab_size": 257,
                "context_length": 16,
                "emb_dim": 16,
                "n_heads": 2,
                "n_layers": 2,
                "drop_rate": 0.1,
            },
            "data": {"sources": [{"path": str(folder / "text.txt")}], "tokenizer": "bytes", "validation_fraction": 0.1},
            "train": {
                "tokens": 64 * steps,
                "batch_tokens": 64,
                "micro_batch_tokens": 32,
                "save_every": 3,
                "eval_every": 4,
                "eval_tokens": 64,
            },
            "seed": 5,
            "device": "cpu",
        }
    )


def make_data(folder, steps):
    from kiem.data.prepare import prepare

    rng = random.Random(1)
    text = "\n\n".join(" ".join(rng.choice(["alpha", "beta", "gamma", "delta"]) for _ in range(9)) for _ in range(60))
    (folder / "text.txt").write_text(text)
    config = configuration(folder, steps)
    print(prepare(config.data, 257, folder).path, flush=True)


def run_training(folder, steps, run, fault):
    from kiem.config.presets import resolve
    from kiem.data.shards import open_dataset
    from kiem.runs.run import Run
    from kiem.training.loop import train

    dataset = open_dataset((folder / "where").read_text())
    config = resolve(configuration(folder, steps), dataset.tokenizer.vocab_size)
    fault.install()
    if fault.kind in POISONS:
        poison(fault.kind, fault.n)
    train(config, Run(run), dataset, quiet=True)


def poison(what, at):
    """After the update of step `at`, let one number of the run be NaN."""
    import torch

    from kiem.training import loop

    real, done = loop.train_step, 0

    def step(objective, model, optimizer, *args):
        nonlocal done
        result = real(objective, model, optimizer, *args)
        done += 1
        weight = model.blocks[1].mlp.up.weight
        with torch.no_grad():
            if done == at and what == "a weight":
                weight[3, 2] = float("nan")
            elif done == at and what == "a moment":
                optimizer.state[weight]["momentum"][3, 2] = float("nan")
        if done == at and what == "a gradient":
            weight.register_hook(lambda gradient: gradient / 0)
        return result

    loop.train_step = step


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
            done = self.file.write(memoryview(data)[: len(data) // 2])
            self.file.flush()

        self.fault.happen(True, do_half)
        return done + self.file.write(memoryview(data)[done:])

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)


if __name__ == "__main__":
    serve()
