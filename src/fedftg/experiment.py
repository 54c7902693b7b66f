"""From a config to objects, and the round loop."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch

from fedftg import config as configs
from fedftg.algorithms.base import (
    Algorithm,
    Batch,
    ClientResult,
    LocalTask,
    Metrics,
    Refiner,
    RefinerContext,
    ServerState,
)
from fedftg.config import RunConfig
from fedftg.data import federated
from fedftg.data.dataset import ImageDataset
from fedftg.data.federated import FederatedData
from fedftg.engine import executors, sampling
from fedftg.engine.choice import Work
from fedftg.engine.evaluate import Measured, evaluate, evaluate_clients
from fedftg.engine.executors import Executor
from fedftg.engine.machine import cpu_threads, environment, keep_freed_memory, peak_memory_mb, resolve_device
from fedftg.engine.memory import ClientStore, rejection
from fedftg.engine.workers import Origin
from fedftg.errors import InputError
from fedftg.models import registry as models
from fedftg.models.functional import FunctionalModel
from fedftg.params import Params, clone, first_non_finite, to_device
from fedftg.progress import Progress, Silent
from fedftg.rundir import checkpoint, records
from fedftg.rundir.folder import RunFolder, summarise
from fedftg.rundir.packs import Packs
from fedftg.rundir.records import Record
from fedftg.seeds import SERVER, seed_for, torch_rng


@dataclass(frozen=True)
class Run:
    """A finished run."""

    folder: Path
    summary: Record
    state: ServerState = field(repr=False)
    model: torch.nn.Module = field(repr=False)
    """The deployed (refined) global model, in evaluation mode."""


@dataclass
class Experiment:
    """The objects that a config names."""

    config: RunConfig
    data: FederatedData
    model: FunctionalModel
    algorithm: Algorithm
    refiner: Refiner
    executor: Executor
    state: ServerState
    clients: ClientStore
    partition_record: Record = field(repr=False)

    def run_round(self, progress: Progress) -> Record:
        """One round: local training, aggregation, refining, evaluation. The state moves on only when all is done."""
        number = self.state.round + 1
        clock = _Clock()
        cohort = sampling.cohort(self.config.cohort, self._candidates, self.config.seed, number)
        with clock.phase("local"):
            results, rejected = self._train(number, cohort, progress)
        with clock.phase("aggregate"):
            progress.phase(number, "aggregate", 0, 1)
            selected, server_metrics, undone = self._aggregate(results)
        # A round that was undone is undone for its clients too: their memories belong to the server's.
        results = [] if undone else results
        with clock.phase("refine"):
            refined, refine_metrics, rolled_back = self._refine(number, selected, results, progress)
        with clock.phase("aggregate"):
            clients = self.clients.updated(results)
        with clock.phase("evaluate"):
            due = number % self.config.evaluation.every == 0 or number == self.config.rounds
            measured = self._evaluate(number, selected, refined, clients, progress) if due else Measured()
        with clock.phase("checkpoint"):
            clients.settle(self.clients)
        self.state, self.clients = replace(refined, round=number), clients
        record: Record = {"round": number, "clients": cohort}
        if rejected:
            record["rejected"] = rejected
        record |= {"seconds": clock.seconds, "accuracy": measured.accuracy, "loss": measured.loss}
        if measured.clients:
            record["client_accuracy"] = measured.clients
        record |= {"server": server_metrics, "refine": refine_metrics}
        reasons = [reason for reason in (undone, rolled_back) if reason]
        return record | ({"rolled_back": "; ".join(reasons)} if reasons else {})

    @cached_property
    def _candidates(self) -> list[int]:
        return [client for client in range(self.data.num_clients) if self.data.num_samples(client) > 0]

    def _tasks(self, number: int, cohort: list[int]) -> Iterator[LocalTask]:
        message = self.algorithm.server.message(self.state)
        for client in cohort:
            yield LocalTask(
                round=number,
                client=client,
                params=self.state.params,
                buffers=self.state.buffers,
                memory=to_device(self.clients.memory(client), self.data.device),
                message=message,
                num_samples=self.data.num_samples(client),
                relative_size=self.data.relative_size(client),
                lr=self.config.local.lr_at(number),
                seed=seed_for(self.config.seed, number, client, "local"),
            )

    def _train(self, number: int, cohort: list[int], progress: Progress) -> tuple[list[ClientResult], list[Record]]:
        kept: list[ClientResult] = []
        rejected: list[Record] = []
        progress.phase(number, "local", 0, len(cohort))
        tasks = self._tasks(number, cohort)
        for done, result in enumerate(self.executor.run(self.algorithm.local, tasks), start=1):
            reason = rejection(result)
            if reason is None:
                kept.append(result)
            else:
                rejected.append({"client": result.client, "reason": reason})
            progress.phase(number, "local", done, len(cohort))
        return kept, rejected

    def _aggregate(self, results: list[ClientResult]) -> tuple[ServerState, Metrics, str | None]:
        if not results:
            return self.state, {}, "no client update was usable; the global model stays as it was"
        state, metrics = self.algorithm.server.step(self.state, results)
        bad = _non_finite(state)
        if bad is not None:
            return self.state, {}, f"the aggregate was not finite ({bad}); the global model stays as it was"
        losses = [(result.loss, result.num_samples) for result in results if math.isfinite(result.loss)]
        total = sum(size for _, size in losses)
        if total:
            metrics = {"local_loss": sum(loss * size for loss, size in losses) / total, **metrics}
        return state, metrics, None

    def _refine(
        self, number: int, state: ServerState, results: list[ClientResult], progress: Progress
    ) -> tuple[ServerState, Metrics, str | None]:
        if not results:
            return state, {}, None
        progress.phase(number, "refine", 0, 1)
        rng = torch_rng(self.config.seed, number, SERVER, "refine")
        refined, metrics = self.refiner.refine(state, results, rng)
        bad = _non_finite(refined)
        if bad is not None:
            return state, metrics, f"fine-tuning was not finite ({bad}); rolled back to the aggregate"
        return refined, metrics, None

    def _evaluate(
        self, number: int, selected: ServerState, refined: ServerState, clients: ClientStore, progress: Progress
    ) -> Measured:
        candidates: dict[str, tuple[Params, Params]] = {"selected": (selected.params, selected.buffers)}
        if clients.tracks_uploads:
            average = to_device(clients.average(), self.data.device)
            candidates["all"] = (
                {name: average[name] for name in selected.params},
                {name: average[name] for name in selected.buffers},
            )
        if refined is not selected:
            candidates["refined"] = (refined.params, refined.buffers)
        measured = Measured()
        size = self.config.evaluation.batch_size
        for done, (kind, values) in enumerate(candidates.items()):
            progress.phase(number, "evaluate", done, len(candidates))
            measured.accuracy[kind], measured.loss[kind] = evaluate(self.model, *values, self.data, size)
            if self.data.holds_back:
                measured.clients[kind] = evaluate_clients(self.model, *values, self.data, size)
        measured.accuracy.setdefault("refined", measured.accuracy["selected"])
        measured.loss.setdefault("refined", measured.loss["selected"])
        if measured.clients:
            measured.clients.setdefault("refined", measured.clients["selected"])
        return measured


def build(config: RunConfig, dataset: ImageDataset | None = None, progress: Progress | None = None) -> Experiment:
    """Loads the data, splits it, and makes every object of a run; nothing is written but the cache of images.

    Raises:
        InputError: the data, the partition, the model or the cohort is impossible.
    """
    device = torch.device(resolve_device(config.device))
    loading = progress.loading if progress is not None else None
    data = federated.load(config.data, config.partition, config.seed, device, dataset=dataset, progress=loading)
    with_data = sum(data.num_samples(client) > 0 for client in range(data.num_clients))
    if config.cohort.size is not None and config.cohort.size > with_data:
        raise InputError(
            f"cohort.size must be at most the number of clients with data, {with_data}, got {config.cohort.size}; "
            f"set cohort.size={with_data} or less, or divide the data among more clients"
        )
    module = models.build(config.model, data.num_classes, data.image_shape, seed_for(config.seed, 0, SERVER, "model"))
    model = FunctionalModel(module.to(device))
    params, buffers = model.init()
    algorithm = config.algorithm.build(data.num_clients)
    _check_fit(config, algorithm, model, data)
    context = RefinerContext(model, data.num_classes, data.image_shape, device)
    refiner = config.refiner.build(context)
    state = ServerState(
        round=0,
        params=params,
        buffers=buffers,
        server=algorithm.server.init(params),
        refiner=refiner.init(params, torch_rng(config.seed, 0, SERVER, "refiner")),
    )
    sizes = [data.num_samples(client) for client in range(data.num_clients)]
    clients = ClientStore(
        lambda: algorithm.local.init_memory(params, buffers),
        {**params, **buffers},
        sizes,
        config.evaluation.track_all,
        bound=config.checkpoint.client_memory_mb * 1e6,
    )
    origin = Origin(config.plugins, config.model, seed_for(config.seed, 0, SERVER, "model"), config.algorithm)
    share = config.cohort.probability or 1.0
    work = Work(config.rounds, config.cohort.size or round(share * with_data), config.threads)
    executor = executors.build(config.executor, model, data, config.local, origin, work)
    record: Record = {"class_names": list(data.dataset.class_names), "class_counts": data.class_counts.tolist()}
    record["digest"] = data.digest
    if data.holds_back:
        record["held_back"] = [data.num_held_back(client) for client in range(data.num_clients)]
    if data.dataset.converted:
        record["converted"] = dict(data.dataset.converted)
    return Experiment(config, data, model, algorithm, refiner, executor, state, clients, record)


def run(
    config: RunConfig,
    folder: Path,
    *,
    resume: bool = False,
    progress: Progress | None = None,
    dataset: ImageDataset | None = None,
) -> Run:
    """Runs an experiment to its last round, or goes on with one that was stopped.

    After ``kill -9`` at any moment, resuming gives the same ``rounds.jsonl`` (times aside) and weights as an
    uninterrupted run on the same machine with the same number of threads.

    Args:
        folder: where the run's files go; must not hold another run unless ``resume``.
        resume: goes on after the last whole state in ``folder``; finished runs are returned as they are.
        dataset: used in place of the one that the config names.

    Raises:
        InputError: wrong input; nothing was written, and an existing run is as it was.
        ClientError: a client's training failed; names round, client and stage. The run can be resumed.
    """
    progress = progress or Silent()
    keep_freed_memory()
    run_folder = RunFolder(folder)
    # Before the data, which may take minutes to decode.
    if resume:
        configs.check_resumable(configs.from_mapping(run_folder.read_config()), config)
    else:
        run_folder.check_free()
    with cpu_threads(config.threads) as threads:
        try:
            experiment = build(config, dataset, progress)
        except BaseException:
            progress.finish()
            raise
        experiment.clients.packs = Packs(run_folder.checkpoint)
        session = environment(threads, str(experiment.data.device))
        session["executor"] = experiment.executor.description
        with closing(experiment.executor):
            if resume:
                _restore(experiment, run_folder, session)
            else:
                run_folder.create(config.to_toml(), session, experiment.partition_record)
            _run_rounds(experiment, run_folder, progress)
    header = _header(config)
    if not run_folder.finished:
        rows = records.read(run_folder.rounds_file)
        summary = summarise(header, rows, config.evaluation.targets, peak_memory_mb())
        records.write_json(run_folder.summary_file, summary)
    summary = records.read_json(run_folder.summary_file)
    model = experiment.model.module(experiment.state.params, experiment.state.buffers)
    return Run(folder, summary, experiment.state, model)


def _run_rounds(experiment: Experiment, folder: RunFolder, progress: Progress) -> None:
    config = experiment.config
    progress.start(config, experiment.state.round, experiment.data.num_clients)
    saved = experiment.state.round
    record: Record | None = None
    try:
        while experiment.state.round < config.rounds:
            record = experiment.run_round(progress)
            done = experiment.state.round
            index: checkpoint.Index | None = None
            if done % config.checkpoint.every == 0 or done == config.rounds:
                # All of it but the last rename comes before the record, which says how long it took.
                start = time.perf_counter()
                index = checkpoint.write(folder.checkpoint, experiment.state, experiment.clients)
                seconds = record["seconds"]["checkpoint"] + time.perf_counter() - start
                record["seconds"]["checkpoint"] = round(seconds, 6)
            records.append(folder.rounds_file, record)
            if index is not None:
                checkpoint.commit(folder.checkpoint, index)
                saved = done
            progress.round_done(record)
    except KeyboardInterrupt:
        # Of a round that is done, nothing is lost; one that is not is done again.
        if record is not None and record["round"] == experiment.state.round > saved:
            if len(records.read(folder.rounds_file)) < experiment.state.round:
                records.append(folder.rounds_file, record)
            checkpoint.save(folder.checkpoint, experiment.state, experiment.clients)
        raise
    finally:
        progress.finish()


def _restore(experiment: Experiment, folder: RunFolder, session: Record) -> None:
    config = experiment.config
    before = folder.read_partition()
    # A run of version 0.1 has no digest.
    if before != {key: value for key, value in experiment.partition_record.items() if key != "digest" or key in before}:
        raise InputError(
            f"{folder.path} was started on other data or another division of it (see its partition.json); "
            "give the same data, or start a new run"
        )
    kept = checkpoint.load(folder.checkpoint)
    done = 0
    if kept is not None:
        done = kept.state.round
        if done > config.rounds:
            raise InputError(
                f"{folder.path} is at round {done} already; rounds must be at least that, got {config.rounds}"
            )
        experiment.state = _on(kept.state, experiment.data.device)
        experiment.clients.restore(kept.places, kept.change_sum)
    if folder.finished and done == config.rounds:
        return
    checkpoint.sweep(folder.checkpoint)
    folder.reopen(config.to_toml(), session, done)


def _on(state: ServerState, device: torch.device) -> ServerState:
    parts = {part: to_device(getattr(state, part), device) for part in ("params", "buffers", "server", "refiner")}
    return ServerState(round=state.round, **parts)


def _check_fit(config: RunConfig, algorithm: Algorithm, model: FunctionalModel, data: FederatedData) -> None:
    """Takes the loss of two images, so that what cannot be trained is told before anything is written."""
    if model.has_batchnorm and config.local.batch_size < 2:
        raise InputError("local.batch_size must be >= 2 for a model with BatchNorm, got 1; or take a GroupNorm model")
    images, labels = (part[:2] for part in next(data.test_batches(2)))
    params, buffers = model.init()
    memory = algorithm.local.init_memory(params, buffers)
    task = LocalTask(1, 0, params, buffers, memory, {}, len(labels), 1.0, config.local.lr, config.seed)
    with torch.no_grad():
        algorithm.local.loss(model, clone(params), clone(buffers), Batch(images, labels), task)


def _header(config: RunConfig) -> Record:
    refiner = config.refiner.name
    preset = getattr(config.refiner, "preset", None)
    return {
        "name": config.name,
        "algorithm": config.algorithm.name,
        "refiner": f"{refiner} ({preset})" if preset else refiner,
        "seed": config.seed,
    }


def _non_finite(state: ServerState) -> str | None:
    for part in (state.params, state.buffers, state.server, state.refiner):
        name = first_non_finite(part)
        if name is not None:
            return name
    return None


class _Clock:
    """Adds up seconds per phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(records.PHASES, 0.0)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = round(self.seconds[name] + time.perf_counter() - start, 6)
