"""The numeric tests on other processors: torch's kernels by ATEN_CPU_CAPABILITY, oneDNN's by ONEDNN_MAX_CPU_ISA, and
other numbers of threads, which sum in another order. A bound that is right holds for all of them.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
NUMERIC = ["model", "optim", "training", "generation", "interop", "model_checks", "inspect/rules", "inspect/verify",
           "inspect/explain", "inspect/test_trace.py"]  # fmt: skip
LEVELS = ["default", "avx2", "avx512"]


def available(level: str) -> bool:
    flags = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
    return level == "default" or level in flags or f"{level}f" in flags


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("isa", ["", "SSE41", "AVX2"])
@pytest.mark.parametrize("level", LEVELS)
def test_numeric_tests_pass(level, isa, threads):
    if not available(level):
        pytest.skip(f"this processor has no {level}")
    if isa and (threads != 1 or level != "default"):
        pytest.skip("oneDNN's kernels are chosen apart from torch's: once is enough")
    env = {**os.environ, "ATEN_CPU_CAPABILITY": level, "OMP_NUM_THREADS": str(threads)}
    env |= {"ONEDNN_MAX_CPU_ISA": isa} if isa else {}
    workers = [] if "PYTEST_XDIST_WORKER" in os.environ else ["-n", str(max(1, (os.cpu_count() or 1) // threads))]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow and not gpu", "-p", "no:cacheprovider", *workers]
    done = subprocess.run([*command, *(str(TESTS / name) for name in NUMERIC)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:]
