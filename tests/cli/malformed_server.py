"""The program behind test_malformed.py: it imports Kiem once and forks a child for each command.

So a command costs a fraction of a second, and one that dies or hangs takes only its child with it.
"""

import json
import os
import resource
import select
import signal
import sys
import time
import traceback

MOST_MEMORY = 6 << 30  # address space: a command that needs more than this for a small file is out of bounds


def serve():
    """Read jobs, one JSON a line; answer each with {code, seconds, out, err}. A code below 0 is a signal."""
    import torch
    import torch._dynamo  # by the first optimizer, and it takes seconds

    from kiem import api, runtime
    from kiem.cli import main  # noqa: F401  by the children
    from kiem.report import summary  # noqa: F401
    from kiem.training import loop  # noqa: F401

    assert api
    runtime.matmul_rate = lambda *args, **kwargs: 1e9
    torch.set_num_threads(1)
    for line in sys.stdin:
        job = json.loads(line)
        print(json.dumps(answer(job)), flush=True)


def answer(job):
    began = time.monotonic()
    files = [os.path.join(job["folder"], f"{name}.captured") for name in ("out", "err")]
    pid = os.fork()
    if pid == 0:
        for target, path in zip((1, 2), files, strict=True):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), target)
        os.dup2(os.open(job.get("stdin") or os.devnull, os.O_RDONLY), 0)
        resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
        os.setsid()
        os.chdir(job["folder"])
        os._exit(command(job["arguments"]))
    code = wait(pid, job["limit"])
    texts = []
    for path in files:
        with open(path, errors="replace") as file:
            texts.append(file.read()[-6000:])
    return {"code": code, "seconds": time.monotonic() - began, "out": texts[0], "err": texts[1]}


def wait(pid, limit):
    """The exit code, or "hang" after `limit` seconds. Seconds in which a busy machine kept it waiting do not count."""
    handle, began, own = os.pidfd_open(pid), time.monotonic(), 0.0
    try:
        while own < limit:
            ended, _, _ = select.select([handle], [], [], limit - own)
            if ended:
                break
            own = time.monotonic() - began - kept_waiting(pid)
    finally:
        os.close(handle)
    if not ended:
        os.killpg(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return status if ended else "hang"


def kept_waiting(pid):
    """Seconds in which the process was ready to run and no processor was free."""
    try:
        with open(f"/proc/{pid}/schedstat") as file:
            return int(file.read().split()[1]) / 1e9
    except (OSError, IndexError):
        return 0.0


def command(arguments):
    from kiem.cli.main import main

    sys.stdout, sys.stderr = (os.fdopen(os.dup(n), "w", errors="backslashreplace") for n in (1, 2))
    try:
        code = main(arguments)
    except BaseException:
        traceback.print_exc()
        code = 99
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    return code


if __name__ == "__main__":
    serve()
