"""How the clients of a round are run: settings, interface, the reference, and what `auto` takes."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field

from fedftg.algorithms.base import AlgorithmConfig, ClientResult, LocalRule, LocalTask
from fedftg.data.federated import FederatedData
from fedftg.engine.local_train import LocalConfig, client_batches, train
from fedftg.errors import ClientError, InputError
from fedftg.models.functional import FunctionalModel
from fedftg.models.registry import ModelConfig
from fedftg.seeds import forked, seed_for

ExecutorName = Literal["auto", "sequential", "workers", "cuda_graph"]
INTERCHANGEABLE = ("auto", "sequential", "workers")
"""Executors that give the same numbers on the CPU, bit for bit, given one thread."""

WORKERS_FROM = 1_000
"""Local steps in a run from which ``auto`` takes ``workers``: to start processes takes some seconds.

It lies between the default recipe (about 500 steps) and the smallest runs on CIFAR-10 in our benchmarks (2,000 steps).
"""


class ExecutorConfig(BaseModel):
    """How the clients of a round are run."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: ExecutorName = Field(
        default="auto",
        description="sequential: one client after the other; workers: in processes of one CPU thread, the numbers of "
        "sequential with threads = 1; cuda_graph: recorded steps on an NVIDIA GPU; auto takes one by device and "
        "number of local steps, and `environment.json` says which",
    )
    workers: int = Field(
        default=0, ge=0, description="processes of workers; 0 is one a core, and no more than clients a round"
    )
    group: int = Field(default=0, ge=0, description="clients whose steps cuda_graph records together; 0 is 1")


@dataclass(frozen=True)
class Rejected:
    """A client without a usable update, in a round that continues without it."""

    client: int
    reason: str


class Executor(Protocol):
    """Trains the clients of rounds."""

    @property
    def description(self) -> str:
        """Returns what runs the clients, and why where `auto` chose it."""

    def run(self, rule: LocalRule, tasks: Iterable[LocalTask]) -> Iterator[ClientResult | Rejected]:
        """Yields one result per task, in order; a `ClientError` names a client whose training failed."""

    def close(self) -> None:
        """Frees what is held between rounds; a later `run` makes it again."""


@dataclass
class SequentialExecutor:
    """One client after the other in this process: the reference that every other executor is compared with."""

    model: FunctionalModel
    data: FederatedData
    settings: LocalConfig
    models: tuple[FunctionalModel, ...] = ()
    """Where clients have models of their own: client k the k-th, over and over."""
    description: str = "sequential"

    def run(self, rule: LocalRule, tasks: Iterable[LocalTask]) -> Iterator[ClientResult]:
        """Yields one result per task; a `ClientError` names the client whose training failed."""
        for task in tasks:
            try:
                yield self.run_one(rule, task)
            except InputError:
                raise
            except Exception as error:
                raise ClientError(task.round, task.client, "local training", error) from error

    def close(self) -> None:
        """Does nothing: no state is held."""

    def run_one(self, rule: LocalRule, task: LocalTask) -> ClientResult:
        """Trains one client."""
        model = self.models[task.client % len(self.models)] if self.models else self.model
        batches = client_batches(model, self.data, self.settings, task)
        # Dropout draws from the global generator.
        with forked(seed_for(task.seed, task.round, task.client, "model"), self.data.device):
            return train(model, rule, task, batches, self.data.class_counts[task.client], self.settings)


@dataclass(frozen=True)
class RunRecipe:
    """How another process makes the same model and rule, and how much there is to train."""

    plugins: tuple[str, ...]
    model: ModelConfig
    model_seed: int
    algorithm: AlgorithmConfig
    rounds: int
    cohort: int  # clients a round, on average
    threads: int  # 0 leaves the number to torch

    def obstacle(self) -> str | None:
        """Returns why other processes cannot train this, or None."""
        cls = type(self.algorithm)
        if cls.__module__ == "__main__" or "<locals>" in cls.__qualname__:
            return f"algorithm class {cls.__qualname__} is defined in the started script; put it into a module"
        if self.model.name.startswith("__main__"):
            return f"model {self.model.name} is defined in the started script; put it into a module"
        if multiprocessing.current_process().daemon:
            return "a daemonic process of multiprocessing may not start others"
        return None


def build(
    config: ExecutorConfig, model: FunctionalModel, data: FederatedData, settings: LocalConfig, recipe: RunRecipe
) -> Executor:
    """Builds the executor that a config names; raises InputError where it cannot run this."""
    # Both import this module.
    from fedftg.engine.cuda_graph import CudaGraphExecutor
    from fedftg.engine.workers import WorkersExecutor

    name, why = config.name, ""
    count = max(1, min(config.workers or cores(), recipe.cohort))  # more would only wait
    if name == "auto":
        name, reason, count = choose(model, data, settings, recipe, count)
        why = f" (auto: {reason})"
    executor: SequentialExecutor | WorkersExecutor | CudaGraphExecutor
    if name == "workers":
        executor = WorkersExecutor(recipe, data, settings, count)
    elif name == "cuda_graph":
        executor = CudaGraphExecutor(model, data, settings, config.group or 1, may_fall_back=config.name == "auto")
    else:
        executor = SequentialExecutor(model, data, settings)
    executor.description += why
    return executor


def choose(
    model: FunctionalModel, data: FederatedData, settings: LocalConfig, recipe: RunRecipe, most: int
) -> tuple[ExecutorName, str, int]:
    """Returns an executor's name, why ``auto`` chooses it, and the number of processes, at most ``most``."""
    if data.device.type == "cuda" and not model.has_dropout:
        return "cuda_graph", f"device {data.device}", 1
    count = min(most, recipe.cohort, recipe.threads if recipe.threads > 1 else most)
    steps = local_steps(data, settings, recipe)
    reason = recipe.obstacle()
    if data.device.type == "cuda":
        reason = "a model with dropout cannot be recorded"
    elif data.device.type != "cpu":
        reason = f"device {data.device}"
    elif count < 2:
        reason = "one core or one client a round"
    elif steps < WORKERS_FROM:
        reason = f"about {steps:.0f} local steps, workers from {WORKERS_FROM}"
    if reason is not None:
        return "sequential", reason, 1
    return "workers", f"about {steps:.0f} local steps; the numbers are those of threads = 1", count


def local_steps(data: FederatedData, settings: LocalConfig, recipe: RunRecipe) -> float:
    """Returns the expected number of local steps of all clients in a run."""
    clients = [client for client in range(data.num_clients) if data.num_samples(client)]
    an_epoch = sum(data.steps_per_epoch(client, settings.batch_size) for client in clients) / max(len(clients), 1)
    return recipe.rounds * recipe.cohort * (settings.steps or settings.epochs * an_epoch)


def cores() -> int:
    """Returns the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
