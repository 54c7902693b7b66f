"""The ServerApp: the simulator's rounds, run folder and checkpoints, with nodes of a Flower grid as clients."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp
from rich.console import Console

from fedftg import build, loop
from fedftg.algorithms.base import ClientResult, LocalRule, LocalTask
from fedftg.config import RunConfig
from fedftg.data import sources
from fedftg.engine import sampling
from fedftg.engine.evaluate import Measured, over_clients
from fedftg.engine.executors import Executor, Rejected
from fedftg.engine.machine import resolve_device
from fedftg.errors import InputError
from fedftg.experiment import Experiment, Models
from fedftg.flower import wire
from fedftg.flower.nodes import Log, NodeFederation, Nodes, exchange, facts_of, joint_normalisation
from fedftg.flower.settings import AppSettings, agreement, app_settings, on_server
from fedftg.flower.wire import ARRAYS, CLASS_COUNTS, CONFIG, LOSS, MESSAGE, NUM_EXAMPLES, PARTITION_ID, Order
from fedftg.loop import Run
from fedftg.params import to_device
from fedftg.progress import PlainLines, Progress
from fedftg.rundir import records
from fedftg.rundir.clients import ClientStore
from fedftg.rundir.folder import RunFolder
from fedftg.rundir.records import Record

RUNS = Path("runs")
LAST_COUNTED = "round"
"""The server's memory of a client: its last round that counted. What the client itself keeps stays on its node."""
_LOG_SECONDS = 20.0
"""How often a server that waits logs how many nodes are connected."""


def server_app(recipe: str | Path) -> ServerApp:
    """Returns the app that a SuperLink runs; its nodes run `fedftg.flower.client_app` on the same recipe.

    Args:
        recipe: a TOML recipe. What ``flwr run -c`` may set is in `fedftg.flower.settings.AppSettings`.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        console = Console(soft_wrap=True)
        try:
            run = serve(grid, Path(recipe), context.run_config, PlainLines(console))
        except InputError as error:
            line = " ".join(str(error).replace("--resume", "resume=true").replace("--out", "out").split())
            console.print(f"fedftg: {line}", highlight=False, markup=False)
            raise InputError(line) from None  # Flower shows where it was raised
        console.print(f"run folder: {run.folder.resolve()}", highlight=False, markup=False)

    return app


def serve(grid: Grid, recipe: Path, run_config: Mapping[str, Any], progress: Progress) -> Run:
    """Runs a recipe on the nodes of a grid, or resumes a run.

    Raises:
        InputError: wrong settings, too few nodes within the bound, nodes that do not fit together, or other data than
            the resumed run had. A run that had started can be resumed.
    """
    settings = app_settings(run_config)
    config = on_server(recipe, settings)
    folder = Path(settings.out) if settings.out else RUNS / config.name
    console = Console(soft_wrap=True)

    def log(text: str) -> None:
        console.print(text, highlight=False, markup=False)

    log(f"run folder: {folder.resolve()}")
    return loop.execute(
        config,
        folder,
        lambda: prepare(grid, config, settings, RunFolder(folder), log),
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
    folder: RunFolder
    run_key: str
    log: Log
    weighed: frozenset[int]
    """The clients whose sizes the average of all uploads is weighted by."""

    def __post_init__(self) -> None:
        self.executor = GridExecutor(self)

    def run_round(self, progress: Progress) -> Record:
        """Runs one round with the nodes that are connected.

        Raises:
            InputError: no client at all is connected within the bound.
        """
        number = self.state.round + 1
        self.nodes.ask_again()
        self.nodes.refresh()
        cohort = self._cohort(number)
        enough = min(self.min_results, len(cohort))
        if not self.nodes.wait(lambda: self.nodes.connected(cohort) >= enough, self.settings.wait_seconds):
            line = (
                f"round {number}: {self.nodes.connected(cohort)} of the {len(cohort)} clients drawn are there after "
                f"{self.settings.wait_seconds:g} s"
            )
            if not self.nodes.by_client:
                raise InputError(f"{line}, and no other; start SuperNodes, and run again with resume=true")
            self.log(f"{line}, min-clients is {self.min_results}: nothing is trained in this round")
        self._reweigh()
        return super().run_round(progress)

    def order(self, round: int, client: int, last: int = 0, floor: int = 0) -> ConfigRecord:
        """Returns the order to a client, whose last round that counted is ``last``; see `Order` for ``floor``."""
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

    def _cohort(self, number: int) -> list[int]:
        """Returns a cohort that is smaller than ``cohort.size`` where newcomers turned out to hold nothing."""
        given, candidates = self.config.cohort, self._candidates
        if given.size is not None and given.size > len(candidates):
            given = given.model_copy(update={"size": len(candidates)})
        return sampling.cohort(given, candidates, self.config.seed, number)

    @property
    def _candidates(self) -> list[int]:
        """A client whose node was never connected may hold something, and is drawn too."""
        return [client for client in range(self.data.num_clients) if self.data.may_train(client)]

    def _reweigh(self) -> None:
        """Records clients that have joined since the last round, and weighs uploads by the sizes now known."""
        known = frozenset(self.data.known)
        if known == self.weighed:
            return
        sizes = [self.data.num_samples(client) for client in range(self.data.num_clients)]
        self.partition_record = self.data.record(self.run_key) | {"joined_late": True}
        records.write_json(self.folder.path / "partition.json", self.partition_record)
        self.clients = self.clients.reweighed(sizes)
        self.weighed = known

    def _evaluate_clients(self, number: int, models: Models, into: Measured) -> None:
        """Fills in accuracy over the clients that answer; those that do not go to ``not_measured``."""
        held_back = {client: facts.held_back for client, facts in sorted(self.data.known.items()) if facts.held_back}
        if not held_back:
            return
        nodes = {client: node for client, node in self.nodes.by_client.items() if client in held_back}
        arrays = {kind: wire.encode({**params, **buffers}) for kind, (params, buffers) in models.items()}
        contents = {node: RecordDict({CONFIG: self.order(number, client), **arrays}) for client, node in nodes.items()}
        seconds, refresh = self.settings.evaluate_seconds, self.nodes.refresh
        replies = exchange(self.nodes.grid, "evaluate", contents, str(number), seconds, refresh)
        correct: dict[int, list[int]] = {}
        for client, size in held_back.items():
            reply = replies[nodes[client]] if client in nodes else self.nodes.why_missing(client)
            found = _counts(reply, client, size, list(models))
            if isinstance(found, str):
                into.not_measured.append({"client": client, "reason": found})
            else:
                correct[client] = found
        if correct:
            sizes = torch.tensor([held_back[client] for client in correct])
            for kind, counts in zip(models, torch.tensor(list(correct.values())).T, strict=True):
                into.clients[kind] = over_clients(counts, sizes)


def _counts(reply: Message | str, client: int, size: int, kinds: list[str]) -> list[int] | str:
    """Returns how many samples a node counted as correct for each kind of model, or why that cannot be used."""
    problem = reply if isinstance(reply, str) else wire.error_of(reply)
    if problem is not None:
        return problem
    metrics = wire.all_metrics(reply.content)  # type: ignore[union-attr]
    got = [metrics.get(name) for name in (PARTITION_ID, NUM_EXAMPLES)]
    if got != [client, size]:
        return f"its reply is for another task: client and samples are {got}, not {[client, size]}"
    counts: list[Any] = [metrics.get(kind) for kind in kinds]
    if not all(isinstance(count, int) and 0 <= count <= size for count in counts):
        return f"its counts must be whole numbers from 0 to {size}, got {counts}"
    return counts


class GridExecutor:
    """Sends the tasks of a round at once, and yields results in the order of the tasks."""

    description = "flower"

    def __init__(self, experiment: NodesExperiment) -> None:
        self._experiment, self._first_round = experiment, 0
        state = experiment.state
        self._params, self._buffers = state.params, state.buffers
        self._extra = experiment.algorithm.local.upload_like(state.params)

    def run(self, rule: LocalRule, tasks: Iterable[LocalTask]) -> Iterator[ClientResult | Rejected]:  # noqa: ARG002
        """Yields one result or reason a task; an update that does not fit the model is a reason."""
        given = list(tasks)
        if not given:
            return
        self._first_round = self._first_round or given[0].round
        nodes, settings = self._experiment.nodes, self._experiment.settings
        connected = dict(nodes.by_client)
        asked = [task for task in given if task.client in connected]
        few = f"not asked: {len(asked)} of the round's clients are there, at least {settings.min_clients} are needed"
        if len(asked) < settings.min_clients:  # the round cannot count
            asked = []
        contents = dict(zip((connected[task.client] for task in asked), self._contents(asked), strict=True))
        # A node that joins while the others train is asked at once, and takes part from the next round.
        replies = exchange(nodes.grid, "train", contents, str(given[0].round), settings.round_seconds, nodes.refresh)
        for task in given:
            if task.client not in connected:
                yield Rejected(task.client, nodes.why_missing(task.client))
            else:
                # Removed, so that a decoded reply is freed with its result.
                yield self._result(task, replies.pop(connected[task.client], few))

    def close(self) -> None:
        """Does nothing: the grid is Flower's."""

    def _contents(self, tasks: list[LocalTask]) -> Iterator[RecordDict]:
        if not tasks:
            return
        arrays = {ARRAYS: wire.encode({**tasks[0].params, **tasks[0].buffers})}
        if tasks[0].message:
            arrays[MESSAGE] = wire.encode(tasks[0].message)
        # The server's last checkpoint: that of this session, or the one that it was resumed from.
        every = self._experiment.config.checkpoint.every
        floor = max(self._first_round - 1, (tasks[0].round - 1) // every * every)
        for task in tasks:
            order = self._experiment.order(task.round, task.client, int(task.memory[LAST_COUNTED]), floor)
            yield RecordDict({CONFIG: order, **arrays})

    def _result(self, task: LocalTask, reply: Message | str) -> ClientResult | Rejected:
        if isinstance(reply, str):
            return Rejected(task.client, reply)
        counts = self._experiment.data.known[task.client].class_counts
        # Values that are not finite are rejected by the round, as the simulator's are.
        template = {**self._params, **self._buffers}
        read = wire.read_reply(reply, template, extra=self._extra, num_classes=len(counts), finite=False)
        if read.problem is not None:
            return Rejected(task.client, read.problem)
        wanted = {PARTITION_ID: task.client, NUM_EXAMPLES: task.num_samples, CLASS_COUNTS: list(counts)}
        got, loss = {name: read.metrics.get(name) for name in wanted}, read.metrics.get(LOSS)
        if got != wanted or not isinstance(loss, float):
            return Rejected(task.client, f"its reply is not for this client and its data: {str(got)[:200]}")
        device = self._experiment.data.device
        return ClientResult(
            client=task.client,
            num_samples=task.num_samples,
            class_counts=torch.tensor(counts, dtype=torch.int64),
            params=to_device({name: read.arrays[name] for name in self._params}, device),
            buffers=to_device({name: read.arrays[name] for name in self._buffers}, device),
            extra=to_device(read.extra, device),
            memory={LAST_COUNTED: torch.tensor(task.round)},
            loss=loss,
        )


def prepare(grid: Grid, config: RunConfig, settings: AppSettings, folder: RunFolder, log: Log) -> NodesExperiment:
    """Waits for the nodes, and makes every object of a run; nothing is written.

    Raises:
        InputError: see `serve`.
    """
    before = folder.read_partition() if settings.resume else None
    test = None if settings.server_data == "none" else sources.load(config.data)
    nodes = Nodes(grid, config, test, {} if before is None else facts_of(before, agreement(config)), log)
    remembered = frozenset(nodes.known)
    _gather(nodes, settings, log)
    nodes.rounds_started = True
    if before is None:
        facts = [nodes.known[client] for client in sorted(nodes.known)]
        run, weighed, normalisation = secrets.token_hex(8), frozenset(nodes.known), joint_normalisation(facts)
    else:
        # Where clients joined late, the checkpoint's sum may rest on fewer sizes: it is computed anew.
        run, weighed = str(before["run"]), frozenset() if before.get("joined_late") else remembered
        normalisation = tuple(before["mean"]), tuple(before["std"])
    federation = NodeFederation(nodes.known, normalisation, test, resolve_device(config.device))
    # A resumed run was possible when it began, whoever has joined since.
    may_train = [client for client in range(federation.num_clients) if before or federation.may_train(client)]
    parts = build.parts(config, federation, len(may_train))
    clients = ClientStore(
        lambda: {LAST_COUNTED: torch.tensor(0)},
        {**parts.state.params, **parts.state.buffers},
        [federation.num_samples(client) for client in range(federation.num_clients)],
        config.evaluation.track_all,
    )
    return NodesExperiment(
        **vars(parts),
        config=config,
        data=federation,
        clients=clients,
        partition_record=before or federation.record(run),
        min_results=settings.min_clients,
        nodes=nodes,
        settings=settings,
        folder=folder,
        run_key=run,
        log=log,
        weighed=weighed,
    )


def _gather(nodes: Nodes, settings: AppSettings, log: Log) -> None:
    """Waits for all nodes, or for at least ``min-clients`` of them until the time is over."""
    log(f"waiting for nodes, at most {settings.wait_seconds:g} s")
    logged = time.monotonic()

    def complete() -> bool:
        nonlocal logged
        expected = range(nodes.num_clients)
        count = nodes.connected(expected)
        if time.monotonic() - logged > _LOG_SECONDS:
            logged = time.monotonic()
            log(f"{count} of {len(expected)} clients are there{nodes.first_refusal()}")
        return count == len(expected) and not nodes.undecided

    nodes.wait(complete, settings.wait_seconds)
    count = nodes.num_clients
    if len(nodes.by_client) < min(settings.min_clients, count):
        starting = "" if nodes.by_client else " (they may still be starting: a node needs some seconds)"
        raise InputError(
            f"{len(nodes.by_client)} of {count} clients are there after {settings.wait_seconds:g} s, min-clients is "
            f"{settings.min_clients}; start more SuperNodes, or raise wait-seconds{starting}{nodes.first_refusal()}"
        )
    if not sum(facts.num_samples for facts in nodes.known.values()):
        raise InputError("no client that is there holds training data; look at the nodes' data-root and partition-id")
    missing = [client for client in range(count) if client not in nodes.by_client]
    if missing:
        shown = ", ".join(map(str, missing[:20]))
        log(f"{len(missing)} of {count} clients are not there: {shown}; the run starts without them")
