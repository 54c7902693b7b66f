"""Which executor ``auto`` takes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedftg.data.federated import FederatedData
from fedftg.engine.local_train import LocalConfig
from fedftg.engine.workers import Origin
from fedftg.models.functional import FunctionalModel

_ARITHMETIC_A_SECOND = 3e10
"""What one core does in a training step of ResNet-18 or LeNet; the right order is enough."""
_SECONDS_A_STEP = 0.001
"""What a step takes however little it computes."""
_WORTH_SECONDS = 20.0
"""Less than this is not worth the start of processes, which is some seconds each for importing torch."""


@dataclass(frozen=True)
class Work:
    """How much local training a run has."""

    rounds: int
    cohort: int
    """Clients a round, on average."""
    threads: int
    """The run's setting; 0 leaves it to torch."""


@dataclass(frozen=True)
class Choice:
    """An executor and why."""

    name: str
    reason: str
    workers: int = 0


def cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def choose(
    model: FunctionalModel,
    data: FederatedData,
    settings: LocalConfig,
    origin: Origin | None,
    work: Work | None,
    most: int,
) -> Choice:
    """``cuda_graph`` on an NVIDIA GPU, ``workers`` where local training on the CPU is long enough, else ``sequential``.

    On the CPU the choice does not change numbers of a run with ``threads = 1``: both give the same bits. With more
    threads ``sequential`` rounds differently, as it does from one number of threads to another; the reason says so.

    Args:
        most: the most processes to take.
    """
    threads = torch.get_num_threads()
    beside = f"; {threads} threads round differently from one" if threads > 1 else ""
    if data.device.type == "cuda":
        if model.has_dropout:
            return Choice("sequential", "a model with dropout cannot be recorded")
        return Choice("cuda_graph", f"device {data.device}")
    if data.device.type != "cpu":
        return Choice("sequential", f"device {data.device}")
    if origin is None or work is None:
        return Choice("sequential", f"one process{beside}")
    obstacle = origin.obstacle()
    if obstacle is not None:
        return Choice("sequential", f"{obstacle}{beside}")
    count = min(most, work.cohort, work.threads if work.threads > 1 else most)
    if count < 2:
        return Choice("sequential", f"one core or one client a round{beside}")
    seconds = local_seconds(model, data, settings, work)
    about = f"about {seconds:.0f} s of local training on one core"
    if seconds * (1 - 1 / count) < _WORTH_SECONDS:
        return Choice("sequential", f"{about} is too little to share{beside}")
    return Choice("workers", f"{about}; the numbers are those of threads = 1", count)


def local_seconds(model: FunctionalModel, data: FederatedData, settings: LocalConfig, work: Work) -> float:
    """A rough estimate of what all local training of a run takes on one core."""
    sizes = [data.num_samples(client) for client in range(data.num_clients)]
    clients = [client for client, size in enumerate(sizes) if size]
    if not clients:
        return 0.0
    steps = settings.epochs * sum(data.steps_per_epoch(client, settings.batch_size) for client in clients)
    steps_a_client = settings.steps or steps / len(clients)
    batch = min(settings.batch_size, sum(sizes) / len(clients))
    # Forward, and backward to inputs and to weights; a multiplication and an addition each.
    arithmetic = 6 * batch * multiplications(model, data.image_shape)
    a_step = _SECONDS_A_STEP + arithmetic / _ARITHMETIC_A_SECOND
    return work.rounds * work.cohort * steps_a_client * a_step


def multiplications(model: FunctionalModel, image_shape: tuple[int, int, int]) -> int:
    """How many multiplications convolutions and linear layers take for one image."""
    module = model.module(*model.init())
    found = 0

    def count(layer: nn.Module, _: Any, output: Tensor) -> None:
        nonlocal found
        weight = layer.weight
        assert isinstance(weight, Tensor)
        found += output.numel() // max(weight.shape[0], 1) * weight.numel() // len(output)

    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            layer.register_forward_hook(count)
    with torch.no_grad():
        module(torch.zeros(2, *image_shape, device=next(module.parameters()).device))
    return found
