"""How the clients of a round are run: settings, interface, and the reference, one client after the other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

from pydantic import BaseModel, ConfigDict, Field

from fedftg.algorithms.base import ClientResult, LocalRule, LocalTask
from fedftg.data.federated import FederatedData
from fedftg.engine.local_train import LocalConfig, client_batches, train
from fedftg.errors import ClientError, InputError
from fedftg.models.functional import FunctionalModel
from fedftg.seeds import forked, seed_for

ExecutorName = Literal["auto", "sequential", "workers", "cuda_graph"]
EXECUTORS: tuple[str, ...] = get_args(ExecutorName)
INTERCHANGEABLE = ("auto", "sequential", "workers")
"""Executors that give the same numbers on the CPU, bit for bit, given one thread."""


class ExecutorConfig(BaseModel):
    """How the clients of a round are run."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: ExecutorName = Field(
        default="auto",
        description="sequential: one client after the other; workers: in processes of one CPU thread, the numbers of "
        "sequential with threads = 1; cuda_graph: recorded steps on an NVIDIA GPU; auto takes one by device and "
        "number of local steps, and `environment.json` says which",
    )
    workers: int = Field(default=0, ge=0, description="processes of workers; 0 is one a core")
    group: int = Field(default=0, ge=0, description="clients whose steps cuda_graph records together; 0 is 1")


@dataclass(frozen=True)
class Rejected:
    """A client without a usable update, in a round that continues without it."""

    client: int
    reason: str


class Executor(Protocol):
    """Trains clients and yields their results in the order of the tasks."""

    @property
    def description(self) -> str:
        """What runs the clients, and why where `auto` chose it."""
        ...

    def run(self, rule: LocalRule, tasks: Iterable[LocalTask]) -> Iterator[ClientResult | Rejected]:
        """Yields one result per task, as soon as it is available."""
        ...

    def close(self) -> None:
        """Frees what is held between rounds; a later `run` makes it again."""
        ...


@dataclass(frozen=True)
class SequentialExecutor:
    """One client after the other in this process: the reference that every other executor is compared with."""

    model: FunctionalModel
    data: FederatedData
    settings: LocalConfig
    description: str = "sequential"

    def run(self, rule: LocalRule, tasks: Iterable[LocalTask]) -> Iterator[ClientResult]:
        """Trains each client on its own data.

        Raises:
            ClientError: names the client whose training raised, round and stage; an `InputError` passes through.
        """
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
        # Dropout draws from the global generator: each client gets its own seed, and the state is restored after it.
        with forked(seed_for(task.seed, task.round, task.client, "model"), self.data.device):
            return train(self.model, rule, task, batches, self.data.class_counts[task.client], self.settings)
