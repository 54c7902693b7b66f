"""From a config to an experiment: the one place where names become objects."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fedftg.algorithms.base import Algorithm, Batch, LocalTask, Refiner, RefinerContext, ServerState
from fedftg.config import RunConfig
from fedftg.data import federated
from fedftg.data.dataset import ImageDataset
from fedftg.data.federated import FederatedData
from fedftg.engine import executors
from fedftg.engine.executors import Executor, RunRecipe, SequentialExecutor
from fedftg.engine.local_train import local_model
from fedftg.engine.machine import resolve_device
from fedftg.errors import InputError, first_line
from fedftg.experiment import Experiment
from fedftg.models import registry as models
from fedftg.models.functional import FunctionalModel
from fedftg.models.registry import ModelConfig
from fedftg.params import clone
from fedftg.precision import autocast
from fedftg.progress import Progress
from fedftg.rundir.clients import ClientStore
from fedftg.rundir.records import Record
from fedftg.seeds import SERVER, seed_for, torch_rng


@dataclass(frozen=True)
class Parts:
    """What a config names besides clients and data, and the state before the first round."""

    model: FunctionalModel
    models: tuple[FunctionalModel, ...]
    """Of the clients, where these have their own."""
    algorithm: Algorithm
    refiner: Refiner
    state: ServerState
    shown: list[tuple[torch.Tensor, torch.Tensor | None]]
    """The images that the refiner shows."""


def parts(config: RunConfig, data: FederatedData, with_data: int) -> Parts:
    """Builds model, algorithm, refiner and initial state; ``with_data`` clients may take part.

    Raises:
        InputError: the model, the cohort or the algorithm is impossible for this federation.
    """
    if config.cohort.size is not None and config.cohort.size > with_data:
        raise InputError(f"cohort.size must be at most {with_data}, the clients with data, got {config.cohort.size}")
    for section in (config.local, config.refiner):
        autocast(getattr(section, "precision", "float32"), data.device)  # refuses what the hardware lacks
    named = [config.model, *(ModelConfig(name=name) for name in config.model.clients)]
    seeds = [seed_for(config.seed, 0, SERVER, "model" if one is config.model else one.name) for one in named]
    shape = data.num_classes, data.image_shape
    built = [models.build(one, *shape, seed).to(data.device) for one, seed in zip(named, seeds, strict=True)]
    model, *own = map(FunctionalModel, built)
    params, buffers = model.init()
    algorithm = config.algorithm.build(data.num_clients)
    _check_fit(config, algorithm, model, data)
    normalisation = data.dataset.mean, data.dataset.std
    context = RefinerContext(model, *shape, data.device, *normalisation, tuple(own), data.unlabelled_images)
    refiner = config.refiner.build(context)
    state = ServerState(
        round=0,
        params=params,
        buffers=buffers,
        server=algorithm.server.init(params),
        refiner=refiner.init(params, torch_rng(config.seed, 0, SERVER, "refiner")),
    )
    return Parts(model, tuple(own), algorithm, refiner, state, context.shown)


def keeps_uploads(config: RunConfig, refiner: Refiner) -> bool:
    """Returns whether the server keeps every client's last upload."""
    tracked = config.evaluation.track_all and not config.model.clients
    return tracked or getattr(refiner, "reads_previous", False)


def build(config: RunConfig, dataset: ImageDataset | None = None, progress: Progress | None = None) -> Experiment:
    """Loads and partitions the data, and builds every object of a run; writes nothing but the cache of images.

    Raises:
        InputError: the data, the partition, the model or the cohort is impossible.
    """
    device = torch.device(resolve_device(config.device))
    loading = progress.loading if progress is not None else None
    data = federated.load(config.data, config.partition, config.seed, device, dataset=dataset, progress=loading)
    sizes = [data.num_samples(client) for client in range(data.num_clients)]
    with_data = sum(size > 0 for size in sizes)
    made = parts(config, data, with_data)
    params, buffers, local = made.state.params, made.state.buffers, made.algorithm.local
    keep = keeps_uploads(config, made.refiner)
    clients = ClientStore(lambda: local.init_memory(params, buffers), {**params, **buffers}, sizes, keep)
    recipe = RunRecipe(
        config.plugins,
        config.model,
        seed_for(config.seed, 0, SERVER, "model"),
        config.algorithm,
        config.rounds,
        config.cohort.size or round((config.cohort.probability or 1.0) * with_data),
        config.threads,
    )
    if made.models:
        executor: Executor = SequentialExecutor(made.model, data, config.local, made.models)
    else:
        executor = executors.build(config.executor, made.model, data, config.local, recipe)
    record: Record = {
        "class_names": list(data.dataset.class_names),
        "class_counts": data.class_counts.tolist(),
        "digest": data.digest,
        "image_shape": list(data.image_shape),
    }
    if data.holds_back:
        record["held_back"] = [data.num_held_back(client) for client in range(data.num_clients)]
    if data.dataset.converted:
        record["converted"] = dict(data.dataset.converted)
    return Experiment(
        **vars(made), config=config, data=data, executor=executor, clients=clients, partition_record=record
    )


def _check_fit(config: RunConfig, algorithm: Algorithm, model: FunctionalModel, data: FederatedData) -> None:
    """Computes the loss of two images, so that a model that cannot be trained fails before anything is written."""
    if model.has_batchnorm and config.local.batch_size < 2:
        raise InputError("local.batch_size must be >= 2 for a model with BatchNorm, got 1; or take a GroupNorm model")
    images = torch.zeros(2, *data.image_shape, device=data.device)
    if data.image_shape[0] == 1:
        images = images.to(memory_format=torch.channels_last)  # as the data's
    labels = torch.zeros(2, dtype=torch.int64, device=data.device)
    params, buffers = model.init()
    memory = algorithm.local.init_memory(params, buffers)
    task = LocalTask(1, 0, params, buffers, memory, {}, len(labels), 1.0, config.local.lr, config.seed)
    leaves = {name: value.requires_grad_() for name, value in clone(params).items()}
    trained = local_model(model, config.local, torch.ones(data.num_classes, device=data.device))
    try:
        loss = algorithm.local.loss(trained, leaves, clone(buffers), Batch(images, labels), task)
        torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    except RuntimeError as error:
        raise InputError(f"model {config.model.name!r} cannot be trained ({first_line(error)})") from error
