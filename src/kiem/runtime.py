"""The process and its machine: device, data type, threads, random state, memory, measured speed.

The only reader of the environment. Nothing here runs on import.
"""

import ctypes
import os
import re
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from kiem.errors import ConfigError

if TYPE_CHECKING:
    import torch

OLDEST_TORCH = (2, 11)


def check_torch() -> None:
    """Raise ConfigError if the installed torch is older than Kiem supports."""
    import torch

    have = tuple(
        int("".join(filter(str.isdigit, part)) or 0) for part in torch.__version__.split("+")[0].split(".")[:2]
    )
    if have < OLDEST_TORCH:
        need = ".".join(map(str, OLDEST_TORCH))
        raise ConfigError(
            f"torch {torch.__version__} is installed; Kiem needs {need} or newer: pip install 'torch>={need}'"
        )


def cache_dir() -> Path:
    """Where prepared data is kept between runs: $KIEM_CACHE, else the platform's cache folder."""
    if chosen := os.environ.get("KIEM_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home())) / "kiem"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "kiem"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kiem"


def set_up_process() -> None:
    """Settings that training on CPU needs and that change no result except denormals, which become zero.

    Zero-initialized projections make denormal gradients, which slow a CPU down several times (PEERS: measured).
    glibc gives freed blocks back to the system at once, so that every large tensor is paid for in page faults.
    """
    import torch

    check_torch()
    torch.set_flush_denormal(True)
    keep_freed_memory()


def keep_freed_memory() -> None:
    """Let glibc keep freed blocks for the next large tensor."""
    if sys.platform == "linux":
        with_glibc = getattr(ctypes.CDLL(None), "mallopt", None)
        if with_glibc is not None:
            mmap_threshold, trim_threshold, keep = -3, -1, 1 << 30
            with_glibc(mmap_threshold, keep)
            with_glibc(trim_threshold, keep)


def select_device(name: str) -> "torch.device":
    """The torch device for a config's `device`. Raises ConfigError if it is not there."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d{1,4})?", name):
        raise ConfigError(f"device: {name!r:.60} is not known: use auto, cpu, cuda or cuda:N")
    if name.startswith("cuda"):
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = int(name.partition(":")[2] or 0)
        if index >= count:
            raise ConfigError(
                f"device: {name} was requested, but this machine has {count} CUDA devices: use auto or cpu"
            )
    return torch.device(name)


def has_fast_bfloat16(device: "torch.device") -> bool:
    """Whether matrix products in bfloat16 run on instructions made for it."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="ignore")
    except OSError:
        return False
    return any(flag in flags for flag in ("avx512_bf16", "amx_bf16"))


def select_precision(name: str, device: "torch.device") -> "torch.dtype":
    """The compute data type for a config's `precision`."""
    import torch

    if name == "auto":
        return torch.bfloat16 if has_fast_bfloat16(device) else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def seed_everything(seed: int) -> None:
    """Seed torch's generators on every device (dropout; initial weights have their own)."""
    import torch

    torch.manual_seed(seed)


def random_state() -> "dict[str, torch.Tensor]":
    """State of torch's global generators, as uint8 tensors."""
    import torch

    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state |= {f"cuda{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    return state


def set_random_state(state: "dict[str, torch.Tensor]") -> None:
    """Undo of random_state()."""
    import torch

    torch.set_rng_state(state["cpu"])
    for name, value in state.items():
        if name.startswith("cuda") and int(name[4:]) < torch.cuda.device_count():
            torch.cuda.set_rng_state(value, int(name[4:]))


def memory_now() -> int:
    """Resident memory of this process in bytes."""
    return psutil.Process().memory_info().rss


def peak_memory(device: "torch.device | None" = None) -> int:
    """Most memory used so far in bytes: of the device for CUDA, else resident memory of this process."""
    if device is not None and device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    if sys.platform == "linux":
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def matmul_workspace(device: "torch.device") -> int:
    """Bytes that cuBLAS takes on a CUDA device for its products: one workspace for the thread that runs forward and
    one for autograd's. 32 MiB each from Hopper on, 8.125 MiB before (CUBLAS_WORKSPACE_CONFIG's defaults in torch)."""
    import torch

    one = 32 << 20 if torch.cuda.get_device_capability(device) >= (9, 0) else 4096 * 1024 * 2 + 16 * 1024 * 8
    return 2 * one


def machine_memory() -> int:
    """Memory this process may use in bytes: the machine's, or its control group's limit if that is lower."""
    total = psutil.virtual_memory().total
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
    except (OSError, ValueError):
        return total
    return min(total, limit)


def available_memory(device: "torch.device | None" = None) -> int:
    """Memory in bytes that this process can still get: of a CUDA device, else of the machine, swap included."""
    if device is not None and device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a container without /proc/vmstat: how much was swapped is not asked
        left = psutil.virtual_memory().available + psutil.swap_memory().free
    return min(left, max(0, machine_memory() - memory_now()))


def matmul_rate(device: "torch.device", dtype: "torch.dtype", seconds: float = 0.3) -> float:
    """Measured rate of a 1024-cubed matrix product in FLOP/s: best of the repetitions that fit `seconds`."""
    import torch

    size = 4096 if device.type == "cuda" else 1024
    a = torch.ones(size, size, device=device, dtype=dtype)
    best, stop = float("inf"), time.perf_counter() + seconds
    while True:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
        if time.perf_counter() > stop:
            return 2 * size**3 / best


def git_version() -> str | None:
    """The commit of the source tree Kiem runs from, or None when it is an installed package."""
    head = Path(__file__).resolve().parents[2] / ".git" / "HEAD"
    try:
        text = head.read_text().strip()
        return text if not text.startswith("ref:") else (head.parent / text[5:].strip()).read_text().strip()
    except OSError:
        return None


@contextmanager
def deferred_signals(handler) -> Iterator[None]:
    """Call `handler(signal number)` on SIGINT and SIGTERM instead of the default, inside the block."""
    import signal
    import threading

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    kinds = (signal.SIGINT, signal.SIGTERM)
    before = {kind: signal.signal(kind, lambda number, _: handler(number)) for kind in kinds}
    try:
        yield
    finally:
        for kind, old in before.items():
            signal.signal(kind, old)
