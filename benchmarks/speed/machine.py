"""What this machine is and can do: the floor that measured times are compared with."""

from __future__ import annotations

import os
import time

import torch

from fedftg.engine.machine import environment

SIDE = 2048
"""Of the square matrices: large enough for the peak, small enough for a fraction of a second."""


def matmul_peak(dtype: torch.dtype, device: torch.device, tries: int = 5) -> float:
    """FLOP/s of the best of ``tries`` products of two 2048x2048 matrices, with torch's present number of threads."""
    left, right = (torch.randn(SIDE, SIDE, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(tries + 1):  # the first one warms up
        wait(device)
        start = time.perf_counter()
        torch.mm(left, right)
        wait(device)
        best = min(best, time.perf_counter() - start)
    return 2 * SIDE**3 / best


def describe(device: torch.device) -> str:
    """One line: processor or GPU, cores, threads, load, torch."""
    found = environment(torch.get_num_threads(), str(device))
    processor = f"{found['processor']} ({torch.backends.cpu.get_cpu_capability()})"
    name = found["device"] if device.type == "cuda" else processor
    load, version = os.getloadavg()[0], found["packages"]["torch"]
    return f"{name}, {found['cores']} cores, {found['threads']} threads, load {load:.1f}, torch {version}"


def wait(device: torch.device | str) -> None:
    """Waits until a GPU has done what it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
