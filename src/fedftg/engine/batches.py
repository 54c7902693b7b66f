"""What executors that take several clients at a time share: their batches, and which clients go together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from fedftg.algorithms.base import LocalTask
from fedftg.data.federated import FederatedData
from fedftg.engine.local_train import LocalConfig
from fedftg.models.functional import FunctionalModel
from fedftg.params import Params

OWN_FIELDS = {"client": torch.int64, "num_samples": torch.int64, "relative_size": torch.float64, "seed": torch.int64}
"""Fields of a task in which clients differ: what a rule sees of several at once are tensors of these types."""


def client_batches(
    model: FunctionalModel, data: FederatedData, settings: LocalConfig, task: LocalTask
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images and labels of each step; order and augmentation come from the task's seed alone."""
    return data.batches(
        task.client,
        num_epochs=settings.epochs,
        num_steps=settings.steps,
        batch_size=settings.batch_size,
        rng=torch.Generator().manual_seed(task.seed),
        min_batch=2 if model.has_batchnorm else 1,
    )


def groups(tasks: Iterable[LocalTask], size: int) -> Iterator[list[LocalTask]]:
    """Up to ``size`` tasks at a time, in order, that start from the same values and whose memories look the same."""
    group: list[LocalTask] = []
    for task in tasks:
        if group and (len(group) == size or not _alike(group[0], task)):
            yield group
            group = []
        group.append(task)
    if group:
        yield group


def shapes(tensors: Params) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """What two memories must have in common to lie side by side."""
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def _alike(left: LocalTask, right: LocalTask) -> bool:
    sent = ((task.params, task.buffers, task.message) for task in (left, right))
    return all(a is b for a, b in zip(*sent, strict=True)) and shapes(left.memory) == shapes(right.memory)
