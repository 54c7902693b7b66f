"""From a config to objects, and the loop over rounds (`fedftg.rounds` has one round)."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fedftg import config as configs
from fedftg.algorithms.base import Algorithm, Batch, LocalTask, Refiner, RefinerContext, ServerState
from fedftg.config import RunConfig
from fedftg.data import federated
from fedftg.data.dataset import ImageDataset
from fedftg.data.federation import Federation
from fedftg.engine import choice
from fedftg.engine.machine import cpu_threads, environment, peak_memory_mb, resolve_device
from fedftg.engine.memory import ClientStore
from fedftg.engine.workers import RunRecipe
from fedftg.errors import InputError
from fedftg.models import registry as models
from fedftg.models.functional import FunctionalModel
from fedftg.params import clone, to_device
from fedftg.progress import Progress, Silent
from fedftg.rounds import Experiment
from fedftg.rundir import checkpoint, records
from fedftg.rundir.folder import RunFolder, summarise
from fedftg.rundir.packs import Packs
from fedftg.rundir.records import Record
from fedftg.seeds import SERVER, seed_for, torch_rng

__all__ = ["Experiment", "Parts", "Run", "build", "execute", "parts", "run"]


@dataclass(frozen=True)
class Run:
    """A finished run."""

    folder: Path
    summary: Record
    state: ServerState = field(repr=False)
    model: torch.nn.Module = field(repr=False)
    """The deployed (refined) global model, in evaluation mode."""


@dataclass(frozen=True)
class Parts:
    """What a config names besides clients and data, and the state before the first round."""

    model: FunctionalModel
    algorithm: Algorithm
    refiner: Refiner
    state: ServerState


def parts(config: RunConfig, data: Federation, with_data: int) -> Parts:
    """Model, algorithm, refiner and initial state for a federation of which ``with_data`` clients may take part.

    Raises:
        InputError: the model, the cohort or the algorithm is impossible for it.
    """
    if config.cohort.size is not None and config.cohort.size > with_data:
        raise InputError(
            f"cohort.size must be at most the number of clients with data, {with_data}, got {config.cohort.size}; "
            f"set cohort.size={with_data} or less, or divide the data among more clients"
        )
    module = models.build(config.model, data.num_classes, data.image_shape, seed_for(config.seed, 0, SERVER, "model"))
    model = FunctionalModel(module.to(data.device))
    params, buffers = model.init()
    algorithm = config.algorithm.build(data.num_clients)
    _check_fit(config, algorithm, model, data)
    refiner = config.refiner.build(RefinerContext(model, data.num_classes, data.image_shape, data.device))
    state = ServerState(
        round=0,
        params=params,
        buffers=buffers,
        server=algorithm.server.init(params),
        refiner=refiner.init(params, torch_rng(config.seed, 0, SERVER, "refiner")),
    )
    return Parts(model, algorithm, refiner, state)


def build(config: RunConfig, dataset: ImageDataset | None = None, progress: Progress | None = None) -> Experiment:
    """Loads the data, splits it, and makes every object of a run; nothing is written but the cache of images.

    Raises:
        InputError: the data, the partition, the model or the cohort is impossible.
    """
    device = torch.device(resolve_device(config.device))
    loading = progress.loading if progress is not None else None
    data = federated.load(config.data, config.partition, config.seed, device, dataset=dataset, progress=loading)
    sizes = [data.num_samples(client) for client in range(data.num_clients)]
    with_data = sum(size > 0 for size in sizes)
    made = parts(config, data, with_data)
    algorithm, params, buffers = made.algorithm, made.state.params, made.state.buffers
    clients = ClientStore(
        lambda: algorithm.local.init_memory(params, buffers),
        {**params, **buffers},
        sizes,
        config.evaluation.track_all,
        bound=config.checkpoint.client_memory_mb * 1e6,
    )
    recipe = RunRecipe(
        config.plugins, config.model, seed_for(config.seed, 0, SERVER, "model"), config.algorithm, config.rounds,
        config.cohort.size or round((config.cohort.probability or 1.0) * with_data), config.threads,
    )  # fmt: skip
    executor = choice.build(config.executor, made.model, data, config.local, recipe)
    record: Record = {"class_names": list(data.dataset.class_names), "class_counts": data.class_counts.tolist()}
    record["digest"] = data.digest
    if data.holds_back:
        record["held_back"] = [data.num_held_back(client) for client in range(data.num_clients)]
    if data.dataset.converted:
        record["converted"] = dict(data.dataset.converted)
    return Experiment(config, data, made.model, algorithm, made.refiner, executor, made.state, clients, record)


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
    return execute(config, folder, lambda: build(config, dataset, progress), resume=resume, progress=progress)


def execute(
    config: RunConfig, folder: Path, prepare: Callable[[], Experiment], *, resume: bool, progress: Progress
) -> Run:
    """As `run`, of whatever ``prepare`` makes: the loop over rounds, with its records and checkpoints.

    Args:
        prepare: makes the experiment; called once ``folder`` is known to be of use.
    """
    run_folder = RunFolder(folder)
    # Before the data, which may take minutes to decode.
    if resume:
        configs.check_resumable(configs.from_mapping(run_folder.read_config()), config)
    else:
        run_folder.check_free()
    with cpu_threads(config.threads) as threads:
        try:
            experiment = prepare()
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
    executor = experiment.executor.description
    record: Record | None = None
    try:
        while experiment.state.round < config.rounds:
            record = experiment.run_round(progress)
            done = experiment.state.round
            if experiment.executor.description != executor:  # what auto took could not do it
                executor = experiment.executor.description
                folder.amend_session(executor=executor)
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
        _check_model(experiment.state, kept.state, folder.checkpoint)
        experiment.state = _on(kept.state, experiment.data.device)
        experiment.clients.restore(kept.places, kept.change_sum)
    folder.check_records(done)
    if folder.finished and done == config.rounds:
        return
    checkpoint.sweep(folder.checkpoint)
    folder.reopen(config.to_toml(), session, done)


def _check_model(own: ServerState, kept: ServerState, folder: Path) -> None:
    """A state that was put there from another run has other tensors."""
    shapes, found = (
        {name: tuple(value.shape) for name, value in {**state.params, **state.buffers}.items()} for state in (own, kept)
    )
    if found != shapes:
        wrong = next(name for name in {**shapes, **found} if shapes.get(name) != found.get(name))
        raise InputError(
            f"the checkpoint in {folder} is of another model: its {wrong} is {found.get(wrong, 'missing')}, the run's "
            f"{shapes.get(wrong, 'missing')}; put the run's own files back, or start a new run with another --out"
        )


def _on(state: ServerState, device: torch.device) -> ServerState:
    parts = {part: to_device(getattr(state, part), device) for part in ("params", "buffers", "server", "refiner")}
    return ServerState(round=state.round, **parts)


def _check_fit(config: RunConfig, algorithm: Algorithm, model: FunctionalModel, data: Federation) -> None:
    """Takes the loss of two images, so that what cannot be trained is told before anything is written."""
    if model.has_batchnorm and config.local.batch_size < 2:
        raise InputError("local.batch_size must be >= 2 for a model with BatchNorm, got 1; or take a GroupNorm model")
    images = torch.zeros(2, *data.image_shape, device=data.device)
    labels = torch.zeros(2, dtype=torch.int64, device=data.device)
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
