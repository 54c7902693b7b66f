"""The machine that a run is on: device, threads, versions, memory."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from fedftg.errors import InputError
from fedftg.precision import has_bfloat16


def resolve_device(name: str) -> str:
    """Returns the device of a name; ``auto`` is a GPU if there is one."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"device {name!r} needs an NVIDIA GPU and a CUDA build of torch; use device=cpu")
    if name.startswith("cuda:") and int(name[5:]) >= torch.cuda.device_count():
        raise InputError(f"device {name!r} does not exist; GPUs are cuda:0 to cuda:{torch.cuda.device_count() - 1}")
    return name


@contextmanager
def cpu_threads(wanted: int) -> Iterator[int]:
    """Sets torch's number of threads and restores it; 0 leaves it unchanged (torch's choice, or OMP_NUM_THREADS)."""
    before = torch.get_num_threads()
    torch.set_num_threads(wanted or before)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def keep_freed_memory() -> None:
    """Makes glibc keep freed blocks of up to 32 MB for the next step instead of returning them to the system.

    To map and clear the same pages in each step took about a seventh of a ResNet-18 step (one thread, AVX2). It holds
    for the whole process. Another allocator and settings of malloc in the environment are left alone.
    """
    chosen = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")
    if platform.libc_ver()[0] != "glibc" or any(os.environ.get(name) for name in chosen):
        return
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def environment(threads: int, device: str) -> dict[str, Any]:
    """Returns what the numbers of a run may depend on besides its config."""
    packages = dict.fromkeys(("fedftg", "torch", "numpy", "safetensors", "pydantic"), "not installed")
    for name in packages:
        with contextlib.suppress(PackageNotFoundError):  # imported from its sources
            packages[name] = version(name)
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "packages": packages,
        "platform": platform.platform(),
        "processor": _field("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": threads,
        "has_bfloat16": has_bfloat16(torch.device(device)),  # what precision = "auto" goes by
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "command": ["fedftg", *sys.argv[1:]] if Path(sys.argv[0]).name == "fedftg" else None,
    }


def peak_memory_mb() -> float:
    """Returns the peak memory of this process so far, in MB (10^6 bytes)."""
    # On Linux ru_maxrss of a new process starts from its parent's; VmHWM is of this process alone.
    if kilobytes := _field("/proc/self/status", "VmHWM"):
        return round(int(kilobytes.split()[0]) * 1024 / 1e6, 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak * (1 if sys.platform == "darwin" else 1024) / 1e6, 1)


def _field(path: str, name: str) -> str:
    """Returns the first value of a name in a file of /proc, or an empty string."""
    with contextlib.suppress(OSError):
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            if line.startswith(name):
                return line.partition(":")[2].strip()
    return ""
