"""Who runs the clients of a round."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from pydantic import BaseModel, ConfigDict

from fedftg.algorithms.base import ClientResult, LocalRule, LocalTask
from fedftg.data.federated import FederatedData
from fedftg.engine.local_train import LocalConfig, train
from fedftg.errors import ClientError, InputError
from fedftg.models.functional import FunctionalModel
from fedftg.seeds import forked, seed_for


class ExecutorConfig(BaseModel):
    """How the clients of a round are run."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: Literal["sequential"] = "sequential"


class Executor(Protocol):
    """Runs clients and yields their results in the order of the tasks."""

    def run(self, rule: LocalRule, tasks: Iterable[LocalTask]) -> Iterator[ClientResult]:
        """One result per task, as soon as it is there."""
        ...


@dataclass(frozen=True)
class SequentialExecutor:
    """One client after the other in this process: the reference that every other executor is compared with."""

    model: FunctionalModel
    data: FederatedData
    settings: LocalConfig

    def run(self, rule: LocalRule, tasks: Iterable[LocalTask]) -> Iterator[ClientResult]:
        """Trains each client on its own data; an exception is raised again naming round, client and stage."""
        for task in tasks:
            try:
                yield self._run_one(rule, task)
            except InputError:
                raise
            except Exception as error:
                raise ClientError(task.round, task.client, "local training", error) from error

    def _run_one(self, rule: LocalRule, task: LocalTask) -> ClientResult:
        batches = self.data.batches(
            task.client,
            num_epochs=self.settings.epochs,
            num_steps=self.settings.steps,
            batch_size=self.settings.batch_size,
            rng=torch.Generator().manual_seed(task.seed),
            min_batch=2 if self.model.has_batchnorm else 1,
        )
        # Dropout and the like draw from the global generator: give each client its own, and leave ours as it was.
        with forked(seed_for(task.seed, task.round, task.client, "model"), self.data.device):
            return train(self.model, rule, task, batches, self.data.class_counts[task.client], self.settings)


EXECUTORS = ("sequential",)


def build(config: ExecutorConfig, model: FunctionalModel, data: FederatedData, settings: LocalConfig) -> Executor:
    """The executor that a config names."""
    assert config.name == "sequential"
    return SequentialExecutor(model, data, settings)
