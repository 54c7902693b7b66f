"""Where recorded steps find their values: tensors that stay where they are, filled for each client and round."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedftg import params as tree
from fedftg.algorithms.base import Batch, LocalRule, LocalTask
from fedftg.engine.batches import OWN_FIELDS, shapes
from fedftg.engine.local_train import LocalConfig, Sgd, client_step
from fedftg.models.functional import FunctionalModel
from fedftg.params import Params


class Sent:
    """What all clients of a round are given, in tensors that stay where they are from round to round."""

    def __init__(self, task: LocalTask, rule: LocalRule) -> None:
        like = next(iter(task.params.values()))
        self.rule = rule
        self.task = task
        self.params, self.buffers = tree.clone(task.params), tree.clone(task.buffers)
        self.message = tree.clone(task.message)
        # In the parameters' type, or a step of all of them at once would take a slow path.
        self.lr = torch.tensor(task.lr, dtype=like.dtype, device=like.device)
        self.numbers_read = False
        """Whether the rule has looked at the round or the rate."""

    def fits(self, task: LocalTask, rule: LocalRule) -> bool:
        """Whether this rule is the one recorded, and what is sent now has the names and shapes of what was."""
        pairs = ((self.params, task.params), (self.buffers, task.buffers), (self.message, task.message))
        return rule is self.rule and all(shapes(own) == shapes(new) for own, new in pairs)

    @torch.no_grad()
    def fill(self, task: LocalTask) -> bool:
        """Another round's values; False where they are there already."""
        old = self.task
        known = (task.round, task.lr) == (old.round, old.lr) and all(
            new is before
            for new, before in ((task.params, old.params), (task.buffers, old.buffers), (task.message, old.message))
        )
        if not known:
            _copy(self.params, task.params)
            _copy(self.buffers, task.buffers)
            _copy(self.message, task.message)
            self.lr.fill_(task.lr)
        self.task = task
        return not known


class _RecordedTask(LocalTask):
    """A task whose tensors stay, and whose round and rate are those of the moment; that a rule reads them is noted."""

    @staticmethod
    def of(sent: Sent, memory: Params, own: dict[str, Any]) -> _RecordedTask:
        """What a rule sees in a lane."""
        task = _RecordedTask(
            params=sent.params, buffers=sent.buffers, message=sent.message, memory=memory, lr=sent.task.lr,
            round=sent.task.round, **own,
        )  # fmt: skip
        object.__setattr__(task, "_sent", sent)
        return task

    def __getattribute__(self, name: str) -> Any:
        # A copy by `dataclasses.replace` has plain numbers, which it read here.
        sent = object.__getattribute__(self, "__dict__").get("_sent") if name in ("round", "lr") else None
        if sent is None:
            return object.__getattribute__(self, name)
        sent.numbers_read = True
        return getattr(sent.task, name)


class Lane:
    """The tensors that one client at a time is trained in."""

    def __init__(self, task: LocalTask, sent: Sent, settings: LocalConfig) -> None:
        self.params = {name: tensor.detach().clone().requires_grad_() for name, tensor in task.params.items()}
        self.buffers = tree.clone(task.buffers)
        self.memory = tree.clone(task.memory)
        self.velocity = tree.zeros_like(task.params) if settings.momentum else {}
        device = next(iter(self.params.values())).device
        self.own = {
            name: torch.tensor(getattr(task, name), dtype=kind, device=device) for name, kind in OWN_FIELDS.items()
        }
        self.task = _RecordedTask.of(sent, self.memory, self.own)
        self.sgd = Sgd(self.params, sent.lr, settings, list(self.velocity.values()) or None)
        self.loss = torch.zeros((), device=device)
        self.inputs: dict[torch.Size, tuple[Tensor, Tensor]] = {}

    def fits(self, task: LocalTask) -> bool:
        """Whether the client's memory has the names and shapes of this lane's."""
        return shapes(self.memory) == shapes(task.memory)

    @torch.no_grad()
    def load(self, task: LocalTask) -> None:
        """Starts a client: the received model, its memory, no momentum."""
        _copy(self.params, task.params)
        _copy(self.buffers, task.buffers)
        _copy(self.memory, task.memory)
        for tensor in self.velocity.values():
            tensor.zero_()
        for name, tensor in self.own.items():
            tensor.fill_(getattr(task, name))

    def feed(self, images: Tensor, labels: Tensor) -> None:
        """The next batch."""
        kept = self.inputs.setdefault(images.shape, (torch.empty_like(images), torch.empty_like(labels)))
        kept[0].copy_(images)
        kept[1].copy_(labels)

    def state(self) -> list[Tensor]:
        """All that a step changes."""
        return [*self.params.values(), *self.buffers.values(), *self.velocity.values()]

    def step(self, model: FunctionalModel, rule: LocalRule, shape: torch.Size, max_grad_norm: float) -> None:
        """One step on the batch that was fed."""
        batch = Batch(*self.inputs[shape])
        loss = client_step(model, rule, self.params, self.buffers, batch, self.task, self.sgd, max_grad_norm)
        self.loss.copy_(loss)


def _copy(into: Params, values: Params) -> None:
    for name, tensor in into.items():
        tensor.copy_(values[name])
