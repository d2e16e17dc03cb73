"""Known accelerators, and this machine. Facts as data, each with its source.

Peaks are the vendor's dense numbers (not those with structured sparsity) for matrix products in bfloat16, or float16
where the chip has no bfloat16, with float32 accumulation. They bound a run's time from below; the machine at hand is
measured instead.
"""

import os
import platform
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Device:
    """An accelerator: peak_flops in FLOP per second, memory_bytes as sold."""

    name: str
    peak_flops: float
    memory_bytes: int
    source: str


GB = 10**9
GIB = 2**30

DEVICES = (
    Device("H200", 989e12, 141 * GB, "NVIDIA H200 data sheet: 1,979 TFLOP/s with sparsity, half without"),
    Device("H100 NVL", 835e12, 94 * GB, "NVIDIA H100 data sheet: 1,671 TFLOP/s with sparsity, half without"),
    Device("H100 PCIe", 756e12, 80 * GB, "NVIDIA H100 PCIe product brief: 1,513 TFLOP/s with sparsity, half without"),
    Device("H100", 989e12, 80 * GB, "NVIDIA H100 SXM data sheet: 1,979 TFLOP/s with sparsity, half without"),
    Device("A100-SXM4-80GB", 312e12, 80 * GB, "NVIDIA A100 80GB data sheet"),
    Device("A100 80GB PCIe", 312e12, 80 * GB, "NVIDIA A100 80GB data sheet"),
    Device("A100", 312e12, 40 * GB, "NVIDIA A100 white paper"),
    Device("L40S", 362e12, 48 * GB, "NVIDIA L40S data sheet: 733 TFLOP/s with sparsity, half without"),
    Device("L4", 121e12, 24 * GB, "NVIDIA L4 data sheet: 242 TFLOP/s with sparsity, half without"),
    Device("T4", 65e12, 16 * GB, "NVIDIA T4 data sheet, float16"),
    Device("V100", 125e12, 16 * GB, "NVIDIA V100 data sheet, float16, SXM2"),
    Device("RTX 4090", 165.2e12, 24 * GIB, "NVIDIA Ada GPU architecture white paper, appendix A"),
    Device("RTX 4080", 97.5e12, 16 * GIB, "NVIDIA Ada GPU architecture white paper, appendix A"),
    Device("RTX 3090", 71e12, 24 * GIB, "NVIDIA Ampere GA102 GPU architecture white paper, appendix A"),
)

# Words in a driver's name that do not make it another chip. Anything else does (Laptop, Ti, SUPER, D, MIG slices).
_PACKAGING = re.compile(r"(SXM\d?|PCIe|HBM\de?|\d+GB)$", re.IGNORECASE)


def find_device(name: str) -> Device | None:
    """The entry for a name as the driver reports it ("NVIDIA H100 80GB HBM3"); None if none surely is."""
    words = [w for w in re.split(r"[\s-]+", name) if w.lower() not in ("nvidia", "geforce", "tesla")]
    for device in DEVICES:
        own = re.split(r"[\s-]+", device.name)
        if words[: len(own)] == own and all(_PACKAGING.match(w) for w in words[len(own) :]):
            return device
    return None


@dataclass(frozen=True)
class Machine:
    """This machine, as far as this process may use it. Memory in bytes."""

    processor: str
    cores: int
    memory_bytes: int
    memory_available_bytes: int

    def to_dict(self) -> dict[str, str | int]:
        return asdict(self)


def this_machine() -> Machine:
    """The processor, the cores this process may run on, and its memory: of the machine or of the container's limit."""
    import psutil

    memory = psutil.virtual_memory()
    total, available = memory.total, memory.available
    for limit, used in _container_memory(Path("/sys/fs/cgroup")):
        total, available = min(total, limit), min(available, max(0, limit - used))
    return Machine(_processor(), _cores(), total, available)


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _processor() -> str:
    """The processor's name; the platform's word for the architecture where the name is not to be had."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(errors="replace"), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine() or "unknown"


def _container_memory(root: Path) -> Iterable[tuple[int, int]]:
    """(limit, used) in bytes of the memory control group, versions 2 and 1; nothing where there is no limit."""
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            yield int((root / limit).read_text()), int((root / used).read_text())
        except (OSError, ValueError):  # no such file, or "max"
            continue
