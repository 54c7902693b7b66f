"""The ServerApp: the simulator's rounds, run folder and checkpoints, with nodes of a Flower grid as clients."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp
from rich.console import Console

from fedftg import build, loop
from fedftg.algorithms.base import ClientResult, LocalRule, LocalTask
from fedftg.config import RunConfig, parse
from fedftg.data import sources
from fedftg.engine.evaluate import Measured
from fedftg.engine.executors import Executor, Rejected
from fedftg.engine.machine import keep_freed_memory, resolve_device
from fedftg.errors import InputError
from fedftg.experiment import Experiment, Models
from fedftg.flower import wire
from fedftg.flower.nodes import Log, NodeFederation, Nodes, facts_of, joint_normalisation
from fedftg.flower.settings import AppSettings, on_server
from fedftg.flower.wire import ARRAYS, CLASS_COUNTS, CONFIG, LOSS, MESSAGE, NUM_EXAMPLES, PARTITION_ID, Order
from fedftg.loop import Run
from fedftg.params import to_device
from fedftg.progress import PlainLines, Progress
from fedftg.rundir.clients import ClientStore
from fedftg.rundir.folder import RunFolder
from fedftg.rundir.records import Record

LAST_COUNTED = "round"
"""The server's memory of a client: its last round that counted. What the client itself keeps stays on its node."""


def server_app(recipe: str | Path) -> ServerApp:
    """Returns the app that a SuperLink runs on a TOML recipe; its nodes run `fedftg.flower.client_app` on the same.

    What ``flwr run -c`` may set is in `fedftg.flower.settings.AppSettings`.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        keep_freed_memory()
        console = Console(soft_wrap=True)
        try:
            serve(grid, Path(recipe), context.run_config, PlainLines(console))
        except InputError as error:
            line = " ".join(str(error).replace("--resume", "resume=true").replace("--out", "out").split())
            console.print(f"fedftg: {line}", highlight=False, markup=False)
            raise InputError(line) from None  # Flower shows where it was raised

    return app


def serve(grid: Grid, recipe: Path, run_config: Mapping[str, Any], progress: Progress) -> Run:
    """Runs a recipe on the nodes of a grid, or resumes a run.

    Raises:
        InputError: wrong settings, too few nodes within the bound, or other data than the resumed run had.
    """
    settings = parse(AppSettings, dict(run_config), "app config")
    config = on_server(recipe, settings)
    folder = Path(settings.out) if settings.out else Path("runs", config.name)
    log = partial(Console(soft_wrap=True).print, highlight=False, markup=False)
    log(f"run folder: {folder.resolve()}")
    return loop.execute(
        config,
        folder,
        lambda: _prepare(grid, config, settings, RunFolder(folder), log),
        resume=settings.resume,
        progress=progress,
    )


@dataclass(kw_only=True)
class NodesExperiment(Experiment):
    """An experiment whose clients are nodes, which come and go between rounds."""

    data: NodeFederation
    executor: Executor = field(init=False)
    nodes: Nodes
    settings: AppSettings
    run_key: str
    log: Log

    def __post_init__(self) -> None:
        self.executor = GridExecutor(self)

    def run_round(self, progress: Progress) -> Record:
        """Runs one round with the nodes that are connected; `InputError` where none is within the bound."""
        number = self.state.round + 1
        self.nodes.refresh()
        cohort = set(self._cohort(number))
        enough = min(self.min_results, len(cohort))
        if not self.nodes.wait(lambda: len(self.nodes.by_client.keys() & cohort) >= enough, self.settings.wait_seconds):
            drawn = f"{len(self.nodes.by_client.keys() & cohort)} of the {len(cohort)} clients drawn are connected"
            line = f"round {number}: {drawn} after {self.settings.wait_seconds:g} s"
            if not self.nodes.by_client:
                raise InputError(f"{line}, and no other; start SuperNodes, and run again with resume=true")
            self.log(f"{line}, min-clients is {self.min_results}: nothing is trained in this round")
        return super().run_round(progress)

    def order(self, round: int, client: int, last: int = 0, floor: int = 0) -> ConfigRecord:
        """Returns the order to a client whose last round that counted is ``last``."""
        order = Order(
            run=self.run_key,
            round=round,
            seed=self.config.seed,
            num_clients=self.data.num_clients,
            mean_examples=self.data.mean_samples,
            counted={client: last},
            floor=floor,
            algorithm=self.config.algorithm.model_dump(mode="json"),
            local=self.config.local,
            client=client,
            mean=self.data.dataset.mean,
            std=self.data.dataset.std,
        )
        return ConfigRecord(dict(order.config()))

    @property
    def _candidates(self) -> list[int]:
        return self.data.candidates

    def _evaluate_clients(self, number: int, models: Models, into: Measured) -> None:
        held_back = {client: facts.held_back for client, facts in sorted(self.data.known.items()) if facts.held_back}
        if not held_back:
            return
        nodes = {client: node for client, node in self.nodes.by_client.items() if client in held_back}
        arrays = {kind: wire.encode({**params, **buffers}) for kind, (params, buffers) in models.items()}
        contents = {node: RecordDict({CONFIG: self.order(number, client), **arrays}) for client, node in nodes.items()}
        replies = self.nodes.exchange("evaluate", contents, str(number), self.settings.round_seconds)
        correct: dict[int, list[int]] = {}
        for client, size in held_back.items():
            reply = replies[nodes[client]] if client in nodes else self.nodes.why_missing(client)
            found = _counts(reply, client, size, list(models))
            if isinstance(found, str):
                into.not_measured.append({"client": client, "reason": found})
            else:
                correct[client] = found
        if correct:
            for place, kind in enumerate(models):
                into.clients[kind] = {client: found[place] / held_back[client] for client, found in correct.items()}


def _counts(reply: Message | str, client: int, size: int, kinds: list[str]) -> list[int] | str:
    """Returns how many samples a node counted as correct for each kind of model, or why that cannot be used."""
    if isinstance(reply, str):
        return reply
    metrics = wire.all_metrics(reply.content)
    got = [metrics.get(name) for name in (PARTITION_ID, NUM_EXAMPLES)]
    if got != [client, size]:
        return f"its reply is for another task: client and samples are {got}, not {[client, size]}"
    return [int(metrics[kind]) for kind in kinds]


class GridExecutor:
    """Sends the tasks of a round at once, and yields results in the order of the tasks."""

    description = "flower"

    def __init__(self, experiment: NodesExperiment) -> None:
        self._experiment = experiment
        self._extra = experiment.algorithm.local.upload_like(experiment.state.params)

    def run(self, rule: LocalRule, tasks: Iterable[LocalTask]) -> Iterator[ClientResult | Rejected]:  # noqa: ARG002
        """Yields one result or reason a task; an update that does not fit the model is a reason."""
        given = list(tasks)
        nodes, settings = self._experiment.nodes, self._experiment.settings
        connected = {task.client: nodes.by_client[task.client] for task in given if task.client in nodes.by_client}
        few = f"not asked: {len(connected)} of the round's clients are connected, min-clients is {settings.min_clients}"
        asked = [task for task in given if task.client in connected]
        if len(asked) < settings.min_clients:  # the round cannot count
            asked = []
        contents = {connected[task.client]: content for task, content in zip(asked, self._contents(asked), strict=True)}
        replies = nodes.exchange("train", contents, str(given[0].round), settings.round_seconds)
        for task in given:
            if task.client in connected:
                # Removed, so that a decoded reply is freed with its result.
                yield self._result(task, replies.pop(connected[task.client], few))
            else:
                yield Rejected(task.client, nodes.why_missing(task.client))

    def close(self) -> None:
        """Does nothing: the grid is Flower's."""

    def _contents(self, tasks: list[LocalTask]) -> Iterator[RecordDict]:
        arrays: dict[str, ArrayRecord] = {}
        every = self._experiment.config.checkpoint.every
        for task in tasks:
            if not arrays:
                arrays[ARRAYS] = wire.encode({**task.params, **task.buffers})
                if task.message:
                    arrays[MESSAGE] = wire.encode(task.message)
            floor = (task.round - 1) // every * every  # the last checkpoint, or one before it
            order = self._experiment.order(task.round, task.client, int(task.memory[LAST_COUNTED]), floor)
            yield RecordDict({CONFIG: order, **arrays})

    def _result(self, task: LocalTask, reply: Message | str) -> ClientResult | Rejected:
        if isinstance(reply, str):
            return Rejected(task.client, reply)
        # Values that are not finite are rejected by the round, as the simulator's are.
        read = wire.read_reply(reply, {**task.params, **task.buffers}, extra=self._extra, finite=False)
        if read.problem is not None:
            return Rejected(task.client, read.problem)
        counts = list(self._experiment.data.known[task.client].class_counts)
        wanted = {PARTITION_ID: task.client, NUM_EXAMPLES: task.num_samples, CLASS_COUNTS: counts}
        got, loss = {name: read.metrics.get(name) for name in wanted}, read.metrics.get(LOSS)
        if got != wanted or not isinstance(loss, float):
            return Rejected(task.client, f"its reply is not for this client and its data: {str(got)[:200]}")
        device = self._experiment.data.device
        return ClientResult(
            client=task.client,
            num_samples=task.num_samples,
            class_counts=torch.tensor(counts, dtype=torch.int64),
            params=to_device({name: read.arrays[name] for name in task.params}, device),
            buffers=to_device({name: read.arrays[name] for name in task.buffers}, device),
            extra=to_device(read.extra, device),
            memory={LAST_COUNTED: torch.tensor(task.round)},
            loss=loss,
        )


def _prepare(grid: Grid, config: RunConfig, settings: AppSettings, folder: RunFolder, log: Log) -> NodesExperiment:
    """Waits for the nodes, and makes every object of a run; nothing is written."""
    before = folder.read_partition() if settings.resume else None
    test = None if settings.server_data == "none" else sources.load(config.data)
    nodes = Nodes(grid, config, test, {} if before is None else facts_of(before), log)
    log(f"waiting for nodes, at most {settings.wait_seconds:g} s")
    everyone = nodes.wait(lambda: len(nodes.by_client) == nodes.num_clients, settings.wait_seconds)
    connected = f"{len(nodes.by_client)} of {nodes.num_clients} clients are connected"
    if len(nodes.by_client) < min(settings.min_clients, nodes.num_clients):
        wait = f"{connected} after {settings.wait_seconds:g} s, min-clients is {settings.min_clients}"
        raise InputError(f"{wait}; start more SuperNodes, or raise wait-seconds{nodes.first_refusal()}")
    if not everyone:
        log(f"{connected}; the run starts without the others")
    if before is None:
        normalisation = joint_normalisation([nodes.known[client] for client in sorted(nodes.known)])
    else:
        normalisation = tuple(before["mean"]), tuple(before["std"])
    federation = NodeFederation(nodes.known, normalisation, test, resolve_device(config.device))
    record = before or federation.record(secrets.token_hex(8))
    if config.model.clients:
        raise InputError("model.clients is for the simulator; a Flower node trains model.name")
    parts = build.parts(config, federation, len(federation.candidates))
    clients = ClientStore(
        lambda: {LAST_COUNTED: torch.tensor(0)},
        {**parts.state.params, **parts.state.buffers},
        [sum(counts) for counts in record["class_counts"]],  # so a resumed run has the weights of its start
        build.keeps_uploads(config, parts.refiner),
    )
    return NodesExperiment(
        **vars(parts),
        config=config,
        data=federation,
        clients=clients,
        partition_record=record,
        min_results=settings.min_clients,
        nodes=nodes,
        settings=settings,
        run_key=str(record["run"]),
        log=log,
    )
