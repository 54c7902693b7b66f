"""Tensors with fixed addresses that recorded steps read and write; filled for each round and client."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fedftg import params as tree
from fedftg.algorithms.base import Batch, LocalRule, LocalTask
from fedftg.engine.local_train import LocalConfig, Sgd, client_step
from fedftg.models.functional import FunctionalModel
from fedftg.params import Params

_NUMBERS = {
    **dict.fromkeys(("round", "client", "num_samples", "seed"), torch.int64),
    **dict.fromkeys(("relative_size", "lr"), torch.float64),
}
"""Numbers of a task that are tensors in a recorded step, so that one recording serves all clients and rounds."""


class RoundInputs:
    """What all clients of a round receive."""

    def __init__(self, task: LocalTask, rule: LocalRule) -> None:
        like = next(iter(task.params.values()))
        self.rule = rule
        self.params, self.buffers = tree.clone(task.params), tree.clone(task.buffers)
        self.message = tree.clone(task.message)
        # In the parameters' type: with another one, an update of all parameters in one call is slower.
        self.lr = torch.tensor(task.lr, dtype=like.dtype, device=like.device)
        self._shapes = _shapes(task)
        self.numbers: dict[str, Any] = {}
        """Round and rate, where the rule may branch on them: a recording then holds for one round only."""

    def fits(self, task: LocalTask, rule: LocalRule) -> bool:
        """Whether the rule is the recorded one, and all tensors of the task have the same names and shapes."""
        return rule is self.rule and _shapes(task) == self._shapes

    @torch.no_grad()
    def fill(self, task: LocalTask) -> None:
        """Copies another round's values in."""
        _copy(self.params, task.params)
        _copy(self.buffers, task.buffers)
        _copy(self.message, task.message)
        self.lr.fill_(task.lr)
        self.numbers = {"round": task.round, "lr": task.lr} if getattr(self.rule, "reads_round", True) else {}


class ClientSlot:
    """The tensors that one client at a time is trained in."""

    def __init__(self, task: LocalTask, inputs: RoundInputs, settings: LocalConfig) -> None:
        self.params = {name: tensor.detach().clone().requires_grad_() for name, tensor in task.params.items()}
        self.buffers = tree.clone(task.buffers)
        self.memory = tree.clone(task.memory)
        device = inputs.lr.device
        self.numbers: dict[str, Any] = {
            name: torch.tensor(getattr(task, name), dtype=kind, device=device) for name, kind in _NUMBERS.items()
        }
        self.task = LocalTask(
            params=inputs.params, buffers=inputs.buffers, message=inputs.message, memory=self.memory, **self.numbers
        )
        self.sgd = Sgd(self.params, inputs.lr, settings)
        self.loss = torch.zeros((), device=device)
        self.images: dict[torch.Size, tuple[Tensor, Tensor]] = {}
        """Images and labels of a step, by the shape of the images."""

    @torch.no_grad()
    def load(self, task: LocalTask, inputs: RoundInputs) -> None:
        """Starts a client: the received model, its memory, no momentum."""
        _copy(self.params, task.params)
        _copy(self.buffers, task.buffers)
        _copy(self.memory, task.memory)
        for tensor in self.sgd.velocity:
            tensor.zero_()
        for name, tensor in self.numbers.items():
            tensor.fill_(getattr(task, name))
        self.task = replace(self.task, **inputs.numbers)

    def feed(self, images: Tensor, labels: Tensor) -> None:
        """Copies the next batch in."""
        own = self.images.setdefault(images.shape, (torch.empty_like(images), torch.empty_like(labels)))
        own[0].copy_(images)
        own[1].copy_(labels)

    def state(self) -> list[Tensor]:
        """Returns all tensors that a step changes."""
        return [*self.params.values(), *self.buffers.values(), *self.sgd.velocity]

    def step(self, model: FunctionalModel, rule: LocalRule, shape: torch.Size, max_grad_norm: float) -> None:
        """Makes one step on the last batch of this shape."""
        batch = Batch(*self.images[shape])
        loss = client_step(model, rule, self.params, self.buffers, batch, self.task, self.sgd, max_grad_norm)
        self.loss.copy_(loss)


def groups(tasks: Iterable[LocalTask], size: int) -> Iterator[list[LocalTask]]:
    """Yields up to ``size`` tasks of a round at a time, in order, with memories of the same shapes."""
    group: list[LocalTask] = []
    for task in tasks:
        if group and (len(group) == size or _shapes(group[0]) != _shapes(task)):
            yield group
            group = []
        group.append(task)
    if group:
        yield group


def _shapes(task: LocalTask) -> list[dict[str, tuple[torch.Size, torch.dtype]]]:
    received = (task.params, task.buffers, task.message, task.memory)
    return [{name: (tensor.shape, tensor.dtype) for name, tensor in part.items()} for part in received]


def _copy(into: Params, values: Params) -> None:
    for name, tensor in into.items():
        tensor.copy_(values[name])
