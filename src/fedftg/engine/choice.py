"""Builds the executor that a config names, and chooses one for ``auto``."""

from __future__ import annotations

import os
from typing import NamedTuple

from fedftg.data.federated import FederatedData
from fedftg.engine.cuda_graph import CudaGraphExecutor
from fedftg.engine.executors import Executor, ExecutorConfig, SequentialExecutor
from fedftg.engine.local_train import LocalConfig
from fedftg.engine.workers import RunRecipe, WorkersExecutor
from fedftg.errors import InputError
from fedftg.models.functional import FunctionalModel

SHARED_FROM = 1_000
"""Local steps in a run from which ``auto`` takes ``workers``.

To start processes takes some seconds, for each imports torch. It lies between the default recipe (about 500 steps of a
few milliseconds, which sharing would slow down) and the smallest runs on CIFAR-10 in our benchmarks (2,000 steps).
"""


class Choice(NamedTuple):
    """An executor and why it was chosen."""

    name: str
    reason: str
    workers: int = 0


def build(
    config: ExecutorConfig,
    model: FunctionalModel,
    data: FederatedData,
    settings: LocalConfig,
    recipe: RunRecipe | None = None,
) -> Executor:
    """Builds the executor that a config names.

    Args:
        recipe: what the run trains; without it ``workers`` is not possible, and ``auto`` does not take it.

    Raises:
        InputError: the executor cannot run this.
    """
    choice = Choice(config.name, "", config.workers or cores())
    why = ""
    if config.name == "auto":
        choice = choose(model, data, settings, recipe, choice.workers)
        why = f" (auto: {choice.reason})"
    if choice.name == "workers":
        if recipe is None:
            raise InputError("executor.name=workers needs a model and an algorithm that a config names")
        workers = WorkersExecutor(recipe, data, settings, choice.workers)
        workers.description += why
        return workers
    if choice.name == "cuda_graph":
        # With auto, a model that cannot be recorded runs sequentially; where cuda_graph was asked for, it is an error.
        fallback = SequentialExecutor(model, data, settings) if why else None
        graph = CudaGraphExecutor(model, data, settings, config.group or 1, fallback=fallback)
        graph.description += why
        return graph
    return SequentialExecutor(model, data, settings, f"sequential{why}")


def choose(
    model: FunctionalModel, data: FederatedData, settings: LocalConfig, recipe: RunRecipe | None, most: int
) -> Choice:
    """``cuda_graph`` on an NVIDIA GPU; ``workers`` on a CPU from `SHARED_FROM` local steps on; else ``sequential``.

    On a CPU the choice does not change the numbers of a run with ``threads = 1``.

    Args:
        most: the maximum number of processes.
    """
    if data.device.type == "cuda" and not model.has_dropout:
        return Choice("cuda_graph", f"device {data.device}")
    if data.device.type == "cuda":
        return Choice("sequential", "a model with dropout cannot be recorded")
    if data.device.type != "cpu" or recipe is None:
        return Choice("sequential", f"device {data.device}")
    obstacle = recipe.obstacle()
    if obstacle is not None:
        return Choice("sequential", obstacle)
    count = min(most, recipe.cohort, recipe.threads if recipe.threads > 1 else most)
    if count < 2:
        return Choice("sequential", "one core or one client a round")
    steps = local_steps(data, settings, recipe)
    if steps < SHARED_FROM:
        return Choice("sequential", f"about {steps:.0f} local steps, workers from {SHARED_FROM}")
    return Choice("workers", f"about {steps:.0f} local steps; the numbers are those of threads = 1", count)


def local_steps(data: FederatedData, settings: LocalConfig, recipe: RunRecipe) -> float:
    """The expected number of local steps of all clients in a run."""
    clients = [client for client in range(data.num_clients) if data.num_samples(client)]
    an_epoch = sum(data.steps_per_epoch(client, settings.batch_size) for client in clients) / max(len(clients), 1)
    return recipe.rounds * recipe.cohort * (settings.steps or settings.epochs * an_epoch)


def cores() -> int:
    """The number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
