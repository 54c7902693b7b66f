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
    "round": torch.int64,
    "client": torch.int64,
    "num_samples": torch.int64,
    "relative_size": torch.float64,
    "lr": torch.float64,
    "seed": torch.int64,
}
"""Numbers of a task that are tensors in a recorded step, so that one recording serves all clients and rounds."""


class RoundInputs:
    """What all clients of a round receive."""

    def __init__(self, task: LocalTask, rule: LocalRule) -> None:
        like = next(iter(task.params.values()))
        self.rule = rule
        self.task = task
        self.params, self.buffers = tree.clone(task.params), tree.clone(task.buffers)
        self.message = tree.clone(task.message)
        self._memory_shapes = _shapes(task.memory)
        # In the parameters' type: with another one, an update of all parameters in one call is slower.
        self.lr = torch.tensor(task.lr, dtype=like.dtype, device=like.device)

    @property
    def numbers(self) -> dict[str, Any]:
        """Round and rate, where the rule may branch on them: a recording then holds for one round only."""
        reads_round = getattr(self.rule, "reads_round", True)
        return {"round": self.task.round, "lr": self.task.lr} if reads_round else {}

    def fits(self, task: LocalTask, rule: LocalRule) -> bool:
        """Whether the rule is the recorded one, and all tensors of the task have the same names and shapes."""
        pairs = ((self.params, task.params), (self.buffers, task.buffers), (self.message, task.message))
        same_shapes = all(_shapes(own) == _shapes(new) for own, new in pairs)
        return rule is self.rule and same_shapes and _shapes(task.memory) == self._memory_shapes

    @torch.no_grad()
    def fill(self, task: LocalTask) -> None:
        """Copies another round's values in."""
        if not (task.lr == self.task.lr and _same_model(task, self.task)):
            _copy(self.params, task.params)
            _copy(self.buffers, task.buffers)
            _copy(self.message, task.message)
            self.lr.fill_(task.lr)
        self.task = task


class ClientSlot:
    """The tensors that one client at a time is trained in."""

    def __init__(self, task: LocalTask, inputs: RoundInputs, settings: LocalConfig) -> None:
        self.params = {name: tensor.detach().clone().requires_grad_() for name, tensor in task.params.items()}
        self.buffers = tree.clone(task.buffers)
        self.memory = tree.clone(task.memory)
        self.velocity = tree.zeros_like(task.params) if settings.momentum else {}
        device = next(iter(self.params.values())).device
        self.numbers = {
            name: torch.tensor(getattr(task, name), dtype=kind, device=device) for name, kind in _NUMBERS.items()
        }
        numbers: dict[str, Any] = {**self.numbers, **inputs.numbers}
        self.task = LocalTask(
            params=inputs.params, buffers=inputs.buffers, message=inputs.message, memory=self.memory, **numbers
        )
        self.sgd = Sgd(self.params, inputs.lr, settings, list(self.velocity.values()) or None)
        self.loss = torch.zeros((), device=device)
        self.images: dict[torch.Size, tuple[Tensor, Tensor]] = {}
        """Images and labels of a step, by the shape of the images."""

    @torch.no_grad()
    def load(self, task: LocalTask, inputs: RoundInputs) -> None:
        """Starts a client: the received model, its memory, no momentum."""
        _copy(self.params, task.params)
        _copy(self.buffers, task.buffers)
        _copy(self.memory, task.memory)
        for tensor in self.velocity.values():
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
        """All tensors that a step changes."""
        return [*self.params.values(), *self.buffers.values(), *self.velocity.values()]

    def step(self, model: FunctionalModel, rule: LocalRule, shape: torch.Size, max_grad_norm: float) -> None:
        """Makes one step on the last batch of this shape."""
        batch = Batch(*self.images[shape])
        loss = client_step(model, rule, self.params, self.buffers, batch, self.task, self.sgd, max_grad_norm)
        self.loss.copy_(loss)


def groups(tasks: Iterable[LocalTask], size: int) -> Iterator[list[LocalTask]]:
    """Yields up to ``size`` tasks at a time, in order, with the same model and memories of the same shapes."""
    group: list[LocalTask] = []
    for task in tasks:
        if group and (len(group) == size or not _fit_together(group[0], task)):
            yield group
            group = []
        group.append(task)
    if group:
        yield group


def _fit_together(left: LocalTask, right: LocalTask) -> bool:
    return _same_model(left, right) and _shapes(left.memory) == _shapes(right.memory)


def _same_model(left: LocalTask, right: LocalTask) -> bool:
    received = ((task.params, task.buffers, task.message) for task in (left, right))
    return all(a is b for a, b in zip(*received, strict=True))


def _shapes(tensors: Params) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def _copy(into: Params, values: Params) -> None:
    for name, tensor in into.items():
        tensor.copy_(values[name])
