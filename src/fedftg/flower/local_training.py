"""What a ClientApp of your own calls: class counts for FedFTG, and local training for FedDyn, SCAFFOLD and MOON."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from fedftg.algorithms.base import Algorithm, ClientResult, LocalTask
from fedftg.algorithms.registry import ALGORITHMS
from fedftg.engine.local_train import LocalConfig, train
from fedftg.errors import InputError
from fedftg.flower import records
from fedftg.flower.client_memory import ClientMemory, ContextMemory, DiskMemory, take
from fedftg.flower.model_layout import ModelLayout, TrainableModel
from fedftg.flower.records import CLASS_COUNTS, EXTRA, LOSS, MESSAGE, METRICS, NUM_EXAMPLES, PARTITION_ID
from fedftg.params import to_device
from fedftg.seeds import forked, seed_for

Batches = Iterable[tuple[Tensor, Tensor]]
TASK = "fedftg-task"
"""Where the message's ``ConfigRecord`` has the `TrainOrder`, as JSON."""


INITIAL = "initial"
"""The very first model, for a client that has not taken part yet; only where the method needs it."""


class TrainOrder(BaseModel):
    """What the strategies of `fedftg.flower.rule_strategies` tell a client besides the arrays."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: str
    """Names the run, for the client's memory."""
    round: int
    seed: int
    num_clients: int
    mean_examples: float | None
    """Samples of a client, mean over all; None counts every client as of this size."""
    counted: dict[int, int]
    """Of each client that ever counted, the last round that did; all of them, since the server may not know yet which
    client a node is."""
    algorithm: dict[str, Any]
    local: LocalConfig

    def build(self) -> Algorithm:
        """The algorithm's rules."""
        config = ALGORITHMS[self.algorithm["name"]](**self.algorithm)
        return config.build(self.num_clients)


def client_of(node: int) -> int:
    """A client's number where it has no partition id: the low 63 bits of its node id, for tensors hold no more."""
    return node & (2**63 - 1)


def class_counts(labels: Tensor | np.ndarray[Any, Any] | Sequence[int], num_classes: int) -> list[int]:
    """How many samples of each class a client trains on: ``num_classes`` whole numbers, for a ``MetricRecord``.

    Args:
        labels: of the client's training samples, whole numbers from 0; may be empty. Of a ``torch`` data set often
            ``dataset.targets``, else ``[label for _, label in dataset]``.
        num_classes: ``C``, that of the model, also where the client does not hold all classes.

    Raises:
        InputError: labels that are not whole numbers from 0 to ``num_classes - 1``.
    """
    given = torch.as_tensor(labels).detach().cpu()
    if given.numel() == 0:
        return [0] * num_classes
    wrong = given.ndim != 1 or given.is_floating_point() or given.is_complex()
    if wrong or int(given.min()) < 0 or int(given.max()) >= num_classes:
        found = f"{given.dtype} of shape {tuple(given.shape)}" if wrong else f"{int(given.min())} to {int(given.max())}"
        raise InputError(
            f"labels must be a list of whole numbers from 0 to {num_classes - 1}, got {found}; pass the labels of the "
            "client's training samples, and the model's number of classes"
        )
    return [int(count) for count in torch.bincount(given.long(), minlength=num_classes)]


def local_train(
    message: Message,
    context: Context,
    *,
    model: nn.Module,
    batches: Batches | Callable[[LocalTask, LocalConfig], Batches],
    class_counts: Sequence[int],
    state_dir: str | Path | None = None,
    lost_memory: Literal["refuse", "reset"] = "refuse",
) -> Message:
    """Trains one client as a `FedDyn`, `Scaffold` or `Moon` strategy asks for, and gives the reply.

    It is the local loop of ``fedftg run``: SGD with the rates, epochs and clipping that the strategy sends. What is
    random (dropout, the order of a shuffling ``DataLoader`` without workers) comes from the run's seed, the round and
    the client, and from nothing else.

    What the method keeps on the client lies in ``context.state``, which a restarted SuperNode has lost, or in files.
    It moves on only with rounds that counted on the server.

    Args:
        message: the one that the ``@app.train()`` function got.
        context: likewise; ``node_config["partition-id"]`` names the client, else the node id does.
        model: the classifier, on the device to train on; its structure is used, its values are the message's.
        batches: images ``(B, D, H, W)`` and labels ``(B,)`` of one epoch, such as a ``DataLoader``; gone through once
            an epoch, so no iterator where there are several. Or a function of task and settings that gives the batches
            of the whole round. Batches of one sample are left out where the model has BatchNorm.
        class_counts: ``C`` whole numbers: how many training samples of each class the client has (`class_counts`).
        state_dir: a folder of this node for files, which are found again by the partition id; None: ``context.state``.
        lost_memory: ``reset`` lets a client whose memory is gone start anew, as one that never took part.

    Raises:
        InputError: the message is not of such a strategy, the arrays are not the model's, or the client's memory is
            gone or damaged, a ``state_dir`` without a partition id, or an iterator in the place of ``batches``.
    """
    order = _order(message)
    _check(order, context, batches, state_dir)
    arrays_key, arrays = _arrays(message.content)
    layout = ModelLayout(model, arrays)
    functional = TrainableModel(model)
    device = next(model.parameters()).device
    params, buffers = (to_device(part, device) for part in layout.split(layout.decode(arrays)))
    algorithm = order.build()
    client = int(context.node_config.get("partition-id", client_of(context.node_id)))
    memory_place = _memory_place(context, order.run, client, state_dir)
    counted = order.counted.get(client, 0)
    first = message.content.array_records.get(INITIAL)
    origin = layout.split(layout.decode(first)) if first is not None else (params, buffers)
    initial = to_device(algorithm.local.init_memory(*origin), "cpu")
    memory = take(memory_place, counted, counted, initial, reset=lost_memory == "reset")
    sent = message.content.array_records.get(MESSAGE)
    num_samples = sum(class_counts)
    task = LocalTask(
        round=order.round,
        client=client,
        params=params,
        buffers=buffers,
        memory=to_device(memory, device),
        message=to_device(records.decode(sent, params, finite=True), device) if sent is not None else {},
        num_samples=num_samples,
        relative_size=num_samples / order.mean_examples if order.mean_examples else 1.0,
        lr=order.local.lr_at(order.round),
        seed=seed_for(order.seed, order.round, client, "local"),
    )
    with forked(seed_for(task.seed, task.round, task.client, "model"), device):
        given = batches(task, order.local) if callable(batches) else _epochs(batches, order.local)
        usable = ((x.to(device), y.to(device)) for x, y in given if len(y) > 1 or not functional.has_batchnorm)
        result = train(functional, algorithm.local, task, usable, torch.tensor(list(class_counts)), order.local)
    if result.memory:
        memory_place.write(order.round, to_device(result.memory, "cpu"))
    content = RecordDict({arrays_key: layout.encode(layout.join(result.params, result.buffers))})
    if result.extra:
        content[EXTRA] = records.encode(result.extra)
    content[METRICS] = _metrics(result, context)
    return Message(content, reply_to=message)


def _check(order: TrainOrder, context: Context, batches: object, state_dir: str | Path | None) -> None:
    """Refuses what would go wrong without a word."""
    if state_dir is not None and "partition-id" not in context.node_config:
        raise InputError(
            f"state_dir={str(state_dir)!r} needs a partition id: a node id is another one after each start, and the "
            "files would not be found again; give the SuperNode --node-config 'partition-id=0', or leave state_dir out"
        )
    if isinstance(batches, Iterator) and order.local.steps is None and order.local.epochs > 1:
        raise InputError(
            "batches is an iterator, which ends after one epoch, and the strategy asks for more; pass what can be gone "
            "through again, such as the DataLoader itself or a list"
        )


def _order(message: Message) -> TrainOrder:
    for config in message.content.config_records.values():
        if isinstance(text := config.get(TASK), str):
            return TrainOrder(**json.loads(text))
    raise InputError(
        f"the message has no {TASK!r}; local_train works with the strategies FedDyn, Scaffold and Moon of fedftg.flower"
    )


def _arrays(content: RecordDict) -> tuple[str, ArrayRecord]:
    found = [(key, record) for key, record in content.array_records.items() if key not in (MESSAGE, INITIAL)]
    if len(found) != 1:
        raise InputError(f"the message must hold one ArrayRecord with the model, got {len(found)}")
    return found[0]


def _memory_place(context: Context, run: str, client: int, state_dir: str | Path | None) -> ClientMemory:
    if not run.isalnum():
        raise InputError(f"a run's key must be letters and digits, got {run!r}")
    if state_dir is None:
        return ContextMemory(context.state, f"{run}/{client}")
    return DiskMemory(Path(state_dir) / run / f"client-{client:06d}")


def _epochs(batches: Batches, settings: LocalConfig) -> Iterator[tuple[Tensor, Tensor]]:
    if settings.steps is None:
        for _ in range(settings.epochs):
            yield from batches
        return
    left = settings.steps
    while left > 0:
        before = left
        for batch in itertools.islice(batches, left):
            left -= 1
            yield batch
        if left == before == settings.steps:
            return  # a client without data
        if left == before:
            raise InputError(
                f"batches is an iterator that ended after {settings.steps - left} of {settings.steps} steps; pass what "
                "can be gone through again, such as the DataLoader itself or a list"
            )


def _metrics(result: ClientResult, context: Context) -> MetricRecord:
    metrics = MetricRecord({NUM_EXAMPLES: result.num_samples, CLASS_COUNTS: [int(n) for n in result.class_counts]})
    metrics[LOSS] = result.loss
    if "partition-id" in context.node_config:
        metrics[PARTITION_ID] = result.client
    return metrics
