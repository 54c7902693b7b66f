"""The ClientApp: one client of a recipe on a node, trained by the same local loop as in the simulator."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from flwr.app import ConfigRecord, ConfigRecordValues, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedftg import __version__
from fedftg.algorithms.base import Algorithm, ClientResult, LocalTask, ServerState
from fedftg.config import RunConfig
from fedftg.data.dataset import Channels
from fedftg.engine.executors import SequentialExecutor
from fedftg.engine.machine import cpu_threads, keep_freed_memory, resolve_device
from fedftg.errors import InputError
from fedftg.flower import node_evaluation, records, shard
from fedftg.flower.client_memory import ClientMemory, ContextMemory, DiskMemory, take
from fedftg.flower.settings import AppSettings, NodeSettings, agreement, app_settings, node_settings, on_node
from fedftg.models import registry
from fedftg.models.functional import FunctionalModel
from fedftg.params import Params, first_non_finite, to_device
from fedftg.seeds import SERVER, seed_for


def client_app(recipe: str | Path) -> ClientApp:
    """The app that a SuperNode runs; it answers ``query``, ``train`` and ``evaluate`` of `fedftg.flower.server_app`.

    Args:
        recipe: a TOML recipe, the same as the server's.
    """
    app, recipe = ClientApp(), Path(recipe)

    @app.query()
    def query(message: Message, context: Context) -> Message:
        node = _Node.of(recipe, context)
        return Message(RecordDict({records.CONFIG: ConfigRecord(node.facts())}), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        keep_freed_memory()
        node = _Node.of(recipe, context)
        with cpu_threads(node.config.threads):
            return Message(node.train(message, context), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        node = _Node.of(recipe, context)
        with cpu_threads(node.config.threads):
            return Message(node.evaluate(message), reply_to=message)

    return app


@dataclass(frozen=True)
class _Node:
    """What a message is worked off with."""

    app: AppSettings
    settings: NodeSettings
    config: RunConfig

    @classmethod
    def of(cls, recipe: Path, context: Context) -> _Node:
        if "partition-id" not in context.node_config:
            raise InputError(
                "this node has no partition-id; start it with --node-config 'partition-id=N', N from 0, for each "
                "SuperNode another one"
            )
        app, settings = app_settings(context.run_config), node_settings(context.node_config)
        return cls(app, settings, on_node(recipe, app, settings))

    def facts(self) -> dict[str, ConfigRecordValues]:
        """What the server must know of this client; class counts are the only thing that says anything of its data."""
        mine = self._shard("cpu", None)
        data, client = mine.data, mine.client
        return {
            records.PARTITION_ID: client,
            "num-clients": mine.num_clients,
            records.NUM_EXAMPLES: data.num_samples(client),
            records.CLASS_COUNTS: records.counts_to_list(data.class_counts[client]),
            "held-back": data.num_held_back(client),
            "class-names": list(data.dataset.class_names),
            "image-shape": list(data.image_shape),
            "mean": list(data.dataset.mean),
            "std": list(data.dataset.std),
            "data-digest": data.digest,
            "settings-digest": agreement(self.config),
            "version": __version__,
        }

    def train(self, message: Message, context: Context) -> RecordDict:
        """Trains the client on its data; the reply holds the model, what the rule uploads, and counts."""
        ask = message.content.config_records[records.CONFIG]
        mine, model = self._data_and_model(ask)
        algorithm = self.config.algorithm.build(int(ask["num-clients"]))  # type: ignore[arg-type]
        round = int(ask["round"])  # type: ignore[arg-type]
        kept = self._memory(context, str(ask["run"]))
        task = self._task(message, model, algorithm, kept, mine)
        result = SequentialExecutor(model, mine.data, self.config.local).run_one(algorithm.local, task)
        bad = first_non_finite(result.memory)
        if result.memory and bad is None:
            kept.write(round, result.memory)
        return _reply(result, round, bad)

    def evaluate(self, message: Message) -> RecordDict:
        """Measures the message's models on what the client holds back."""
        mine, model = self._data_and_model(message.content.config_records[records.CONFIG])
        return node_evaluation.answer(message, mine.data, model, mine.client, self.config.evaluation.batch_size)

    def _data_and_model(self, ask: ConfigRecord) -> tuple[shard.Shard, FunctionalModel]:
        """The client's data, normalised as the message says, and the recipe's model, both on the node's device."""
        if int(ask["client"]) != self.settings.partition_id:  # type: ignore[arg-type]
            raise InputError(
                f"the message is for client {ask['client']!r}, this node is {self.settings.partition_id}; "
                "do not change a node's partition-id while a run goes on"
            )
        device = torch.device(resolve_device(self.config.device))
        mine = self._shard(device, (_channels(ask["mean"]), _channels(ask["std"])))
        seed = seed_for(self.config.seed, 0, SERVER, "model")
        module = registry.build(self.config.model, mine.data.num_classes, mine.data.image_shape, seed)
        return mine, FunctionalModel(module.to(device))

    def _shard(self, device: torch.device | str, normalisation: tuple[Channels, Channels] | None) -> shard.Shard:
        return shard.load(
            self.config,
            self.settings.partition_id,
            device,
            own_data=self.settings.own_data,
            normalisation=normalisation,
        )

    def _memory(self, context: Context, run: str) -> ClientMemory:
        client = self.settings.partition_id
        if not run.isalnum():
            raise InputError(f"a run's key must be letters and digits, got {run!r}")
        if self.app.client_state == "context":
            return ContextMemory(context.state, f"{run}/{client}")
        return DiskMemory(self.settings.state_folder / run / f"client-{client:06d}")

    def _task(
        self, message: Message, model: FunctionalModel, algorithm: Algorithm, kept: ClientMemory, mine: shard.Shard
    ) -> LocalTask:
        content, ask = message.content, message.content.config_records[records.CONFIG]
        numbers = {name: value for name, value in ask.items() if isinstance(value, int | float)}
        params, buffers = model.init()
        template = message_template(algorithm, params, buffers)
        sent = records.decode(content.array_records[records.ARRAYS], {**params, **buffers}, finite=True)
        extra = records.decode(content.array_records[records.MESSAGE], template, finite=True) if template else {}
        memory = take(
            kept,
            int(numbers["memory-round"]),
            int(numbers["memory-floor"]),
            algorithm.local.init_memory(params, buffers),
            reset=self.app.lost_memory == "reset",
        )
        device = mine.data.device
        return LocalTask(
            round=int(numbers["round"]),
            client=mine.client,
            params=to_device({name: sent[name] for name in params}, device),
            buffers=to_device({name: sent[name] for name in buffers}, device),
            memory=to_device(memory, device),
            message=to_device(extra, device),
            num_samples=mine.data.num_samples(mine.client),
            relative_size=float(numbers["relative-size"]),
            lr=float(numbers["lr"]),
            seed=int(numbers["seed"]),
        )


def message_template(algorithm: Algorithm, params: Params, buffers: Params) -> Params:
    """Names, shapes and types of what a server rule sends besides the model; empty where it sends nothing."""
    server = algorithm.server.init(params)
    return algorithm.server.message(ServerState(0, params, buffers, server, {}))


def _reply(result: ClientResult, round: int, bad_memory: str | None) -> RecordDict:
    metrics: Mapping[str, int | float | list[int]] = {
        records.NUM_EXAMPLES: result.num_samples,
        records.PARTITION_ID: result.client,
        records.CLASS_COUNTS: records.counts_to_list(result.class_counts),
        records.LOSS: result.loss,
        "round": round,
    }
    content = RecordDict(
        {
            records.ARRAYS: records.encode({**result.params, **result.buffers}),
            records.METRICS: MetricRecord(dict(metrics)),
        }
    )
    if result.extra:
        content[records.EXTRA] = records.encode(result.extra)
    if bad_memory is not None:
        content[records.CONFIG] = ConfigRecord({"problem": f"non-finite memory {bad_memory}"})
    return content


def _channels(given: object) -> Channels:
    return tuple(float(value) for value in given)  # type: ignore[attr-defined]
