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

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""As in glibc's malloc.h."""


def resolve_device(name: str) -> str:
    """Returns the device of a name; ``auto`` is a GPU if there is one.

    Raises:
        InputError: the GPU does not exist.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"device {name!r} needs an NVIDIA GPU and a CUDA build of torch; none is here, use device=cpu")
    if name.startswith("cuda:") and int(name[5:]) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise InputError(f"device {name!r} does not exist: GPUs are cuda:0 to cuda:{count - 1}; use one of them")
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

    A training step allocates and frees the same memory again and again; to map and clear its pages each time took about
    a seventh of a ResNet-18 step (one thread, AVX2). It holds for the whole process. Nothing is changed where
    ``MALLOC_MMAP_THRESHOLD_``, ``MALLOC_TRIM_THRESHOLD_``, ``GLIBC_TUNABLES`` or another allocator is set, or without
    glibc.
    """
    chosen = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")
    if platform.libc_ver()[0] != "glibc" or any(os.environ.get(name) for name in chosen):
        return
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def environment(threads: int, device: str) -> dict[str, Any]:
    """Returns what the numbers of a run may depend on besides its config."""
    packages = ("fedftg", "torch", "numpy", "safetensors", "pydantic")
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in packages},
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "command": ["fedftg", *sys.argv[1:]] if Path(sys.argv[0]).name == "fedftg" else None,
    }


def peak_memory_mb() -> float:
    """Returns the peak memory of this process so far, in MB (10^6 bytes)."""
    # On Linux ru_maxrss of a new process starts from its parent's; VmHWM is of this process alone.
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return round(int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024 / 1e6, 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak * (1 if sys.platform == "darwin" else 1024) / 1e6, 1)


def _version(package: str) -> str:
    """Returns the installed version; a package may also be imported from its sources."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
