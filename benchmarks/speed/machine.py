"""What this machine can do: the floor that measured times are held against."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path

import torch

SIDE = 2048
"""Of the square matrices: large enough for the peak, small enough for a fraction of a second."""


def matmul_peak(dtype: torch.dtype, device: torch.device, tries: int = 5) -> float:
    """FLOP/s of the best of ``tries`` products of two 2048x2048 matrices, with torch's present number of threads."""
    left, right = (torch.randn(SIDE, SIDE, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(tries + 1):  # the first one warms up
        _wait(device)
        start = time.perf_counter()
        torch.mm(left, right)
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return 2 * SIDE**3 / best


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 products run on hardware that has them; in software they take a hundred times as long."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def describe(device: torch.device) -> str:
    """One line: processor or GPU, cores, threads, load, torch."""
    load = os.getloadavg()[0]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return (
        f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, load {load:.1f}, torch {torch.__version__}"
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
