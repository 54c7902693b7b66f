"""All randomness of a run comes from seeds derived here: no random state is carried from round to round.

A seed depends on what it is for (run, round, client, purpose), not on order, executor, processes or interruptions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

SERVER = -1
"""The ``client`` of randomness that belongs to no client."""


def seed_for(run_seed: int, round: int, client: int, purpose: str) -> int:
    """Returns a seed in ``[0, 2**63)``: the first 63 bits of the SHA-256 of the four values.

    ``round`` is 0 for what happens before the first round; ``client`` is `SERVER` where no client is concerned.
    """
    digest = hashlib.sha256(f"{run_seed}/{round}/{client}/{purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def torch_rng(run_seed: int, round: int, client: int, purpose: str) -> torch.Generator:
    """Returns a CPU generator seeded with `seed_for`; draw on the CPU and move: all devices get the same numbers."""
    return torch.Generator().manual_seed(seed_for(run_seed, round, client, purpose))


def numpy_rng(run_seed: int, round: int, client: int, purpose: str) -> np.random.Generator:
    """Returns a NumPy generator (PCG64) seeded with `seed_for`."""
    return np.random.default_rng(seed_for(run_seed, round, client, purpose))


def drawn_seed(rng: torch.Generator) -> int:
    """Returns a seed in ``[0, 2**62)`` drawn from a CPU generator."""
    return int(torch.randint(2**62, (), generator=rng))


@contextmanager
def forked(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds torch's global generators (CPU, and ``device`` if a GPU), and puts them back afterwards."""
    on_cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_cuda else []):
        torch.default_generator.manual_seed(seed)
        if on_cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
