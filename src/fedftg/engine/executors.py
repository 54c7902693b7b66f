"""Who runs the clients of a round."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field

from fedftg.algorithms.base import ClientResult, LocalRule, LocalTask
from fedftg.data.federated import FederatedData
from fedftg.engine.batches import client_batches
from fedftg.engine.choice import Work, choose, cores
from fedftg.engine.cuda_graph import CudaGraphExecutor
from fedftg.engine.local_train import LocalConfig, train
from fedftg.engine.vectorized import VectorizedExecutor
from fedftg.engine.workers import Origin, WorkersExecutor
from fedftg.errors import ClientError, InputError
from fedftg.models.functional import FunctionalModel
from fedftg.seeds import forked, seed_for


class ExecutorConfig(BaseModel):
    """How the clients of a round are run."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: Literal["auto", "sequential", "workers", "vectorized", "cuda_graph"] = Field(
        default="auto",
        description="sequential: one client after the other; workers: in processes of one CPU thread, the numbers of "
        "sequential with threads = 1; vectorized: several in one call, equal up to rounding; cuda_graph: recorded "
        "steps on an NVIDIA GPU; auto takes one by device and size, and `environment.json` says which",
    )
    workers: int = Field(default=0, ge=0, description="processes of workers; 0 is one a core")
    group: int = Field(
        default=0, ge=0, description="clients a call (vectorized, 0: 10) or a recorded step (cuda_graph, 0: 1)"
    )


INTERCHANGEABLE = ("auto", "sequential", "workers")
"""Executors that give the same numbers on the CPU, bit for bit, given one thread."""


@dataclass(frozen=True)
class Rejected:
    """A client that gave no update, where the round goes on without it."""

    client: int
    reason: str


class Executor(Protocol):
    """Runs clients and yields their results in the order of the tasks."""

    @property
    def description(self) -> str:
        """What runs the clients, and why where that was chosen."""
        ...

    def run(self, rule: LocalRule, tasks: Iterable[LocalTask]) -> Iterator[ClientResult | Rejected]:
        """One result per task, as soon as it is there."""
        ...

    def close(self) -> None:
        """Gives up what is held between rounds; nothing is lost by it."""
        ...


@dataclass(frozen=True)
class SequentialExecutor:
    """One client after the other in this process: the reference that every other executor is compared with."""

    model: FunctionalModel
    data: FederatedData
    settings: LocalConfig
    description: str = "sequential"

    def run(self, rule: LocalRule, tasks: Iterable[LocalTask]) -> Iterator[ClientResult]:
        """Trains each client on its own data; an exception is raised again naming round, client and stage."""
        for task in tasks:
            try:
                yield self.run_one(rule, task)
            except InputError:
                raise
            except Exception as error:
                raise ClientError(task.round, task.client, "local training", error) from error

    def close(self) -> None:
        """Nothing is held."""

    def run_one(self, rule: LocalRule, task: LocalTask) -> ClientResult:
        """Trains one client."""
        batches = client_batches(self.model, self.data, self.settings, task)
        # Dropout and the like draw from the global generator: give each client its own, and leave ours as it was.
        with forked(seed_for(task.seed, task.round, task.client, "model"), self.data.device):
            return train(self.model, rule, task, batches, self.data.class_counts[task.client], self.settings)


EXECUTORS = ("auto", "sequential", "workers", "vectorized", "cuda_graph")


def build(
    config: ExecutorConfig,
    model: FunctionalModel,
    data: FederatedData,
    settings: LocalConfig,
    origin: Origin | None = None,
    work: Work | None = None,
) -> Executor:
    """The executor that a config names.

    Args:
        origin: how another process makes model and algorithm; without it there is no ``workers``.
        work: how much there is to do; without it ``auto`` is ``sequential``.

    Raises:
        InputError: an executor that cannot run this.
    """
    name: str = config.name
    why, count = "", config.workers or cores()
    if name == "auto":
        chosen = choose(model, data, settings, origin, work, count)
        name, why, count = chosen.name, f" (auto: {chosen.reason})", chosen.workers
    if name == "workers":
        if origin is None:
            raise InputError("executor.name=workers needs a model and an algorithm that a config names")
        workers = WorkersExecutor(origin, data, settings, count)
        workers.description += why
        return workers
    if name == "vectorized":
        return VectorizedExecutor(model, data, settings, config.group or 10)
    if name == "cuda_graph":
        # What auto took falls back where a model cannot be recorded; what the user named says so.
        reference = SequentialExecutor(model, data, settings)
        graph = CudaGraphExecutor(model, data, settings, config.group or 1, fallback=reference if why else None)
        graph.description += why
        return graph
    return SequentialExecutor(model, data, settings, f"sequential{why}")
