"""What runs on a node: one client, of a recipe (`client_app`) or of an app of your own (`local_train`)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor, nn

from fedftg.algorithms.base import LocalTask, Memory, ServerState
from fedftg.algorithms.registry import ALGORITHMS
from fedftg.config import parse
from fedftg.data import sources
from fedftg.data.config import DataConfig, PartitionConfig
from fedftg.data.dataset import ImageDataset
from fedftg.data.federated import FederatedData, partition_dataset
from fedftg.data.partition import Indices, hold_back, needed_columns, noise_levels
from fedftg.engine.evaluate import correct_held_back
from fedftg.engine.local_train import LocalConfig, client_batches, train
from fedftg.engine.machine import cpu_threads, keep_freed_memory, resolve_device
from fedftg.errors import InputError
from fedftg.flower import wire
from fedftg.flower.nodes import ClientFacts
from fedftg.flower.settings import AppSettings, NodeSettings, agreement, on_node
from fedftg.flower.wire import CONFIG, METRICS, NUM_EXAMPLES, PARTITION_ID, Layout, Order
from fedftg.models import registry
from fedftg.models.functional import ComputedModel, FunctionalModel
from fedftg.params import Params, copied, first_non_finite, to_device
from fedftg.rundir.tensors import read_tensors, write_tensors
from fedftg.seeds import SERVER, forked, numpy_rng, seed_for

Batches = Iterable[tuple[Tensor, Tensor]]


def client_app(recipe: str | Path) -> ClientApp:
    """Returns the app that a SuperNode runs on a TOML recipe, the same as the server's."""
    app, recipe = ClientApp(), Path(recipe)

    @app.query()
    def query(message: Message, context: Context) -> Message:
        return Message(_Node(recipe, context).facts(), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        keep_freed_memory()
        node = _Node(recipe, context)
        with cpu_threads(node.config.threads):
            return node.train(message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        node = _Node(recipe, context)
        with cpu_threads(node.config.threads):
            return Message(node.evaluate(message.content), reply_to=message)

    return app


class _Node:
    def __init__(self, recipe: Path, context: Context) -> None:
        self.app = parse(AppSettings, dict(context.run_config), "app config")
        self.settings = parse(NodeSettings, dict(context.node_config), "node config")
        self.config = on_node(recipe, self.app, self.settings)
        self.client = self.settings.partition_id
        self._context = context

    def facts(self) -> RecordDict:
        data = self._data("cpu")
        facts = ClientFacts(
            partition_id=self.client,
            num_clients=data.num_clients,
            class_counts=tuple(data.class_counts[self.client].tolist()),
            held_back=data.num_held_back(self.client),
            class_names=tuple(data.dataset.class_names),
            image_shape=data.image_shape,
            mean=data.dataset.mean,
            std=data.dataset.std,
            data_digest=data.digest,
            agreement=agreement(self.config),
        )
        return RecordDict({CONFIG: ConfigRecord(facts.model_dump(mode="json"))})

    def train(self, message: Message) -> Message:
        data, module, model = self._prepared(message.content)
        return local_train(
            message,
            self._context,
            model=module,
            batches=lambda task, local: client_batches(model, data, local, task),
            class_counts=data.class_counts[self.client].tolist(),
            state_dir=self.settings.state_dir,
            lost_memory=self.app.lost_memory,
            initial=model.init(),
        )

    def evaluate(self, content: RecordDict) -> RecordDict:
        data, _, model = self._prepared(content)
        local = Order.of(content).local
        model = ComputedModel(model, local.precision, local.memory_format)
        counts = {PARTITION_ID: self.client, NUM_EXAMPLES: data.num_held_back(self.client)}
        params, buffers = model.init()
        for kind, arrays in content.array_records.items():
            sent = to_device(wire.decode(arrays, {**params, **buffers}, finite=True), data.device)
            values = {name: sent[name] for name in params}, {name: sent[name] for name in buffers}
            correct = correct_held_back(model, *values, data, self.config.evaluation.batch_size)
            counts[kind] = int(correct[self.client])
        return RecordDict({METRICS: MetricRecord(counts)})  # type: ignore[arg-type]

    def _prepared(self, content: RecordDict) -> tuple[FederatedData, nn.Module, FunctionalModel]:
        order = Order.of(content)
        data = self._data(resolve_device(self.config.device), order)
        seed = seed_for(self.config.seed, 0, SERVER, "model")
        module = registry.build(self.config.model, data.num_classes, data.image_shape, seed).to(data.device)
        return data, module, FunctionalModel(module)

    def _data(self, device: str, order: Order | None = None) -> FederatedData:
        """Returns the client's own data; the other clients hold nothing in it."""
        config, client = self.config, self.client
        owner = client if self.settings.own_data else None
        dataset, train, held_back = _partitioned(config.data, config.partition, config.seed, owner)
        if client >= len(train):
            raise InputError(f"partition-id must be below {len(train)}, partition.num_clients, got {client}")
        rows = torch.from_numpy(np.concatenate([train[client], held_back[client]]))
        own = replace(
            dataset,
            train_images=dataset.train_images[rows],
            train_labels=dataset.train_labels[rows],
            test_images=dataset.test_images[:0],
            test_labels=dataset.test_labels[:0],
            columns={},
            mean=order.mean if order and order.mean else dataset.mean,
            std=order.std if order and order.std else dataset.std,
        )
        split = len(train[client])
        parts, kept = (_only(client, len(train), part) for part in np.split(np.arange(len(rows)), [split]))
        noise = noise_levels(len(train), config.partition.feature_noise)
        return FederatedData(own, parts, device, held_back=kept, noise=noise)


@lru_cache(maxsize=2)
def _partitioned(
    data: DataConfig, partition: PartitionConfig, seed: int, owner: int | None
) -> tuple[ImageDataset, list[Indices], list[Indices]]:
    """Returns the data set and, per client, the rows to train on and to hold back; an ``owner`` has all rows."""
    dataset = sources.load(data, columns=needed_columns(partition))
    if owner is None:
        return dataset, *partition_dataset(dataset, partition, seed)[1:]
    labels = dataset.train_labels.numpy()
    whole = _only(owner, partition.num_clients, np.arange(len(labels)))
    return dataset, *hold_back(whole, labels, partition.test_share, numpy_rng(seed, 0, SERVER, "hold_back"))


def _only(client: int, count: int, rows: Indices) -> list[Indices]:
    nothing: Indices = np.empty(0, dtype=np.int64)
    return [rows if other == client else nothing for other in range(count)]


def class_counts(labels: Tensor | np.ndarray[Any, Any] | Sequence[int], num_classes: int) -> list[int]:
    """Returns how many samples of each class a client trains on, for a ``MetricRecord``.

    Args:
        labels: of the client's training samples, whole numbers from 0; may be empty. Of a ``torch`` data set often
            ``dataset.targets``.
        num_classes: that of the model, even where the client does not hold all classes.
    """
    given = torch.as_tensor(labels).detach().cpu()
    if given.numel() == 0:
        return [0] * num_classes
    if given.ndim != 1 or given.is_floating_point() or int(given.min()) < 0 or int(given.max()) >= num_classes:
        got = f"{given.dtype} of shape {tuple(given.shape)}, {given.min()} to {given.max()}"
        raise InputError(f"labels must be a list of whole numbers from 0 to {num_classes - 1}, got {got}")
    return [int(count) for count in torch.bincount(given.long(), minlength=num_classes)]


@torch.inference_mode(False)  # gradients are on in here
def local_train(
    message: Message,
    context: Context,
    *,
    model: nn.Module,
    batches: Batches | Callable[[LocalTask, LocalConfig], Batches],
    class_counts: Sequence[int],
    state_dir: str | Path | None = None,
    lost_memory: Literal["refuse", "reset"] = "refuse",
    initial: tuple[Params, Params] | None = None,
) -> Message:
    """Trains one client as a `FedDyn`, `Scaffold` or `Moon` strategy asks for, and returns the reply.

    It is the local loop of ``fedftg run``: SGD with the rates, epochs and clipping that the strategy sends. What is
    random (dropout, the order of a shuffling ``DataLoader`` without workers) depends only on the run's seed, the round
    and the client. Batches of one sample are skipped where the model has BatchNorm.

    Args:
        message: the one that the ``@app.train()`` function got.
        context: likewise; ``node_config["partition-id"]`` names the client, else the node id does, which changes with
            each start of a SuperNode.
        model: the classifier, on the device to train on; its structure is used, its values are the message's.
        batches: images ``(B, D, H, W)`` and labels ``(B,)`` of one epoch, such as a ``DataLoader``; iterated once an
            epoch. Or a function of task and settings that returns the batches of the whole round.
        class_counts: ``C`` whole numbers: how many training samples of each class the client has (`class_counts`).
        state_dir: a folder of this node for what the method keeps on the client, which changes only with rounds that
            counted on the server; None: ``fedftg-state`` in the home folder.
        lost_memory: ``reset`` lets a client whose memory is gone start as one that never took part.
        initial: parameters and buffers of the run's initial model, where the message does not hold them.
    """
    order = Order.of(message.content)
    algorithm = ALGORITHMS[order.algorithm["name"]](**order.algorithm).build(order.num_clients)
    named = PARTITION_ID in context.node_config
    client = int(context.node_config[PARTITION_ID]) if named else wire.client_of(context.node_id)
    records = dict(message.content.array_records)
    sent, first = records.pop(wire.MESSAGE, ArrayRecord()), records.pop(wire.INITIAL, None)
    if len(records) != 1:
        raise InputError(f"the message must hold one ArrayRecord with the model, got {len(records)}")
    ((arrays_key, arrays),) = records.items()
    layout = Layout(model, arrays)
    received = layout.split(wire.decode(arrays, layout.template, finite=True))
    if initial is None:
        initial = received if first is None else layout.split(wire.decode(first, layout.template, finite=True))

    functional = FunctionalModel(copied(model).float())
    device = next(model.parameters()).device
    params, buffers = (to_device(part, device) for part in received)
    template = algorithm.server.message(ServerState(0, params, buffers, algorithm.server.init(params), {}))
    folder = Path(state_dir) if state_dir else Path.home() / "fedftg-state"
    kept, last = ClientMemory(folder, order.run, client), order.counted.get(client, 0)
    start = to_device(algorithm.local.init_memory(*initial), "cpu")
    memory = kept.take(last, last if order.floor is None else order.floor, start, reset=lost_memory == "reset")
    counts = torch.tensor(list(class_counts))
    num_samples = int(counts.sum())
    task = LocalTask(
        round=order.round,
        client=client,
        params=params,
        buffers=buffers,
        memory=to_device(memory, device),
        message=to_device(wire.decode(sent, template, finite=True), device),
        num_samples=num_samples,
        relative_size=num_samples / order.mean_examples if order.mean_examples else 1.0,
        lr=order.local.lr_at(order.round),
        seed=seed_for(order.seed, order.round, client, "local"),
    )

    def usable() -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in batches(task, order.local) if callable(batches) else _epochs(batches, order.local):
            if len(labels) > 1 or not functional.has_batchnorm:
                yield images.to(device), labels.to(device)

    # Dropout draws from the global generator.
    with forked(seed_for(task.seed, task.round, client, "model"), device):
        result = train(functional, algorithm.local, task, usable(), counts, order.local)
    bad = first_non_finite(result.memory)
    if bad is None and result.memory:
        kept.write(order.round, result.memory)
    elif bad is not None and first_non_finite({**result.params, **result.buffers, **result.extra}) is None:
        raise InputError(f"non-finite memory {bad}")
    reply = RecordDict({arrays_key: wire.encode(layout.join(result.params, result.buffers))})
    if result.extra:
        reply[wire.EXTRA] = wire.encode(result.extra)
    metrics: Any = {NUM_EXAMPLES: num_samples, wire.CLASS_COUNTS: counts.tolist(), wire.LOSS: result.loss}
    reply[METRICS] = MetricRecord(metrics | ({PARTITION_ID: client} if named else {}))
    return Message(reply, reply_to=message)


def _epochs(batches: Batches, settings: LocalConfig) -> Iterator[tuple[Tensor, Tensor]]:
    left = settings.steps
    for number in itertools.count() if left else range(settings.epochs):
        given = 0
        for batch in itertools.islice(batches, left):
            given += 1
            yield batch
        if number and not given:
            raise InputError("batches is an iterator, used up after one pass; pass the DataLoader itself or a list")
        left = left and left - given
        if not given or left == 0:
            return


class ClientMemory:
    """A client's memories of one run in a folder, one file for each round after which one was kept."""

    def __init__(self, state_dir: Path, run: str, client: int) -> None:
        self._folder = state_dir / run / f"client-{client:06d}"

    def rounds(self) -> list[int]:
        """Returns the rounds of all memories, ascending."""
        return sorted(int(path.stem.removeprefix("memory-")) for path in self._folder.glob("memory-*.safetensors"))

    def write(self, round: int, memory: Memory) -> None:
        """Writes a memory, as a whole or not at all."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_tensors(self._path(round), memory)
        except OSError as error:
            raise InputError(f"cannot write to {self._folder} ({error.strerror}); give another state-dir") from None

    def take(self, last: int, floor: int, initial: Memory, *, reset: bool) -> Memory:
        """Returns the memory from which a client starts a round, and removes those that are no longer needed.

        Newer memories than ``last``, the client's last round that counted (0: none), belong to rounds that did not
        count. The server may return to its last checkpoint, so the newest memory up to ``floor`` is kept too. So both
        sides agree, whichever is killed when. Without ``initial`` the method keeps no memory.
        """
        rounds = self.rounds() if initial else []
        needed = max((round for round in rounds if round <= min(floor, last)), default=0)
        for round in rounds:
            if round > last or round < needed:
                self._path(round).unlink()
        if last == 0 or not initial:
            return initial
        try:
            return read_tensors(self._path(last))
        except InputError:
            if reset:
                return initial
            raise InputError(
                f"this node has no memory of round {last} of its client, or a damaged one; put its old state-dir "
                "back, or set lost-memory=reset (local_train: lost_memory='reset')"
            ) from None

    def _path(self, round: int) -> Path:
        return self._folder / f"memory-{round:06d}.safetensors"
