"""Several clients in one call, by ``torch.func.vmap`` over their parameters.

Every client has the batches that it has alone: same order, same augmentation. In each step the clients of a group whose
batches have the same size are taken together; a client with a smaller last batch, or with no batch left, is not padded
or masked but left out of that call and taken in one of its own, so BatchNorm sees real images only. The numbers are
those of the sequential executor up to rounding (the sums run in another order). Measured on a CPU it is half as fast
as one client after the other; it is meant for small models on accelerators.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from fedftg import params as tree
from fedftg.algorithms.base import Batch, ClientResult, LocalRule, LocalTask
from fedftg.data.federated import FederatedData
from fedftg.engine.batches import OWN_FIELDS, client_batches, groups
from fedftg.engine.local_train import LocalConfig
from fedftg.errors import ClientError, InputError
from fedftg.models.functional import FunctionalModel
from fedftg.params import Params
from fedftg.seeds import forked, seed_for


@dataclass
class _Clients:
    """The state of a group, every tensor with the clients as first dimension."""

    tasks: list[LocalTask]
    params: Params
    buffers: Params
    memory: Params
    own: dict[str, Tensor]
    velocity: Params
    losses: list[list[Tensor]]


@dataclass(frozen=True)
class VectorizedExecutor:
    """``group`` clients at a time in one call.

    Dropout draws another mask a client, but not the one that it draws alone: such models agree in distribution only.
    """

    model: FunctionalModel
    data: FederatedData
    settings: LocalConfig
    group: int

    @property
    def description(self) -> str:
        """How many clients a call takes."""
        return f"vectorized: {self.group} clients a call"

    def close(self) -> None:
        """Nothing is held."""

    def run(self, rule: LocalRule, tasks: Iterable[LocalTask]) -> Iterator[ClientResult]:
        """The results of a group at a time, in the order of the tasks.

        Raises:
            ClientError: names the first client of the group that failed.
        """
        for group in groups(tasks, self.group):
            try:
                results = self._train(rule, group)
            except InputError:
                raise
            except Exception as error:
                stage = f"local training of a group of {len(group)} clients"
                raise ClientError(group[0].round, group[0].client, stage, error) from error
            yield from results

    def _train(self, rule: LocalRule, tasks: list[LocalTask]) -> list[ClientResult]:
        clients = _stacked(tasks, self.data.device)
        batches = [client_batches(self.model, self.data, self.settings, task) for task in tasks]
        first = tasks[0]
        with forked(seed_for(first.seed, first.round, first.client, "model"), self.data.device):
            while True:
                sizes: dict[tuple[int, ...], list[int]] = {}
                current: dict[int, tuple[Tensor, Tensor]] = {}
                for index, source in enumerate(batches):
                    batch = next(source, None)
                    if batch is not None:
                        current[index] = batch
                        sizes.setdefault(tuple(batch[0].shape), []).append(index)
                if not current:
                    break
                for members in sizes.values():
                    images, labels = (torch.stack([current[index][part] for index in members]) for part in (0, 1))
                    self._step(rule, clients, members, images, labels)
        return [self._result(rule, clients, index) for index in range(len(tasks))]

    def _step(self, rule: LocalRule, clients: _Clients, members: list[int], images: Tensor, labels: Tensor) -> None:
        """One step of some clients of the group, which all have a batch of the same size."""
        rows = None if len(members) == len(clients.tasks) else torch.tensor(members, device=images.device)
        task = clients.tasks[0]
        params = {name: tensor.requires_grad_() for name, tensor in _take(clients.params, rows).items()}
        buffers = _take(clients.buffers, rows)
        memory, own = _take(clients.memory, rows), _take(clients.own, rows)

        def loss(params: Params, buffers: Params, images: Tensor, labels: Tensor, memory: Params, own: Any) -> Tensor:
            given = replace(task, memory=memory, **own)
            return rule.loss(self.model, params, buffers, Batch(images, labels), given)

        def correct(grads: Params, params: Params, memory: Params, own: Any) -> Params:
            return rule.correct(grads, params, replace(task, memory=memory, **own))

        losses = vmap(loss, randomness="different")(params, buffers, images, labels, memory, own)
        # The clients do not meet in the sum, so its gradient is every client's own.
        found = torch.autograd.grad(losses.sum(), list(params.values()), allow_unused=True, materialize_grads=True)
        with torch.no_grad():
            grads = vmap(correct)(dict(zip(params, found, strict=True)), params, memory, own)
            velocity = _take(clients.velocity, rows)
            self._move(params, _clipped(grads, self.settings.max_grad_norm), velocity, task.lr)
            if rows is not None:
                for state, part in ((clients.params, params), (clients.buffers, buffers), (clients.velocity, velocity)):
                    for name, tensor in part.items():
                        state[name][rows] = tensor
        for index, value in zip(members, losses.detach(), strict=True):
            clients.losses[index].append(value)
        for tensor in params.values():
            tensor.requires_grad_(False)

    def _move(self, params: Params, grads: Params, velocity: Params, lr: float) -> None:
        """The arithmetic of `fedftg.engine.local_train.Sgd`."""
        steps, values = list(grads.values()), list(params.values())
        if self.settings.weight_decay:
            steps = list(torch._foreach_add(steps, values, alpha=self.settings.weight_decay))
        if self.settings.momentum:
            torch._foreach_mul_(list(velocity.values()), self.settings.momentum)
            torch._foreach_add_(list(velocity.values()), steps)
            steps = list(velocity.values())
        torch._foreach_add_(values, steps, alpha=-lr)

    def _result(self, rule: LocalRule, clients: _Clients, index: int) -> ClientResult:
        task, losses = clients.tasks[index], clients.losses[index]
        # Copies: a view would hold the whole group for as long as the client's upload is kept.
        params = {name: tensor[index].clone() for name, tensor in clients.params.items()}
        buffers = {name: tensor[index].clone() for name, tensor in clients.buffers.items()}
        extra, memory = rule.finish(params, buffers, task, len(losses))
        loss = float(torch.stack(losses).double().mean()) if losses else float("nan")
        counts = self.data.class_counts[task.client]
        return ClientResult(task.client, task.num_samples, counts, params, buffers, extra, memory, loss)


def _stacked(tasks: list[LocalTask], device: torch.device) -> _Clients:
    """The clients side by side; all are sent the same model and message."""
    params = tree.stack([{name: tensor.detach() for name, tensor in task.params.items()} for task in tasks])
    own = {}
    for field, kind in OWN_FIELDS.items():
        values = [getattr(task, field) for task in tasks]
        if any(value != values[0] for value in values):
            own[field] = torch.tensor(values, dtype=kind, device=device)
    return _Clients(
        tasks,
        params,
        tree.stack([task.buffers for task in tasks]),
        tree.stack([task.memory for task in tasks]),
        own,
        tree.zeros_like(params),
        [[] for _ in tasks],
    )


def _take(tensors: Params, rows: Tensor | None) -> Params:
    """The rows of some clients; all of them are the tensors themselves."""
    return dict(tensors) if rows is None else {name: tensor[rows] for name, tensor in tensors.items()}


def _clipped(grads: Params, max_norm: float) -> Params:
    """Each client's gradients scaled on their own; see `fedftg.engine.local_train.clip`."""
    if max_norm == 0:
        return grads
    norms = torch.stack([grad.flatten(1).norm(dim=1) for grad in grads.values()]).norm(dim=0)
    factor = (max_norm / (norms + 1e-6)).clamp(max=1.0)
    return {name: grad * factor.view(-1, *(1,) * (grad.dim() - 1)) for name, grad in grads.items()}
