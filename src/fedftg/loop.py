"""Runs an experiment to its last round: run folder, records, checkpoints, resume."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fedftg import config as configs
from fedftg import recipes, track
from fedftg.algorithms.base import ServerState
from fedftg.build import build
from fedftg.config import RunConfig
from fedftg.data import sources
from fedftg.data.config import DataConfig
from fedftg.data.dataset import ImageDataset
from fedftg.engine.machine import cpu_threads, environment, peak_memory_mb
from fedftg.errors import InputError
from fedftg.experiment import Experiment
from fedftg.progress import Progress, chosen
from fedftg.report.load import RunViews, load_run
from fedftg.rundir import checkpoint, pictures, records
from fedftg.rundir.folder import RunFolder, summarise
from fedftg.rundir.records import PUT_BACK, Record

RUNS = Path("runs")


@dataclass(frozen=True)
class Run(RunViews):
    """A finished run."""

    folder: Path
    summary: Record
    state: ServerState = field(repr=False)
    model: torch.nn.Module = field(repr=False)
    """The deployed (refined) global model, in evaluation mode."""


@torch.inference_mode(False)  # gradients are on in here
def run(
    recipe: RunConfig | Mapping[str, Any] | str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    out: Path | str | None = None,
    resume: bool = False,
    progress: Progress | bool | None = None,
    dataset: ImageDataset | None = None,
) -> Run:
    """Runs one experiment, from its config to its deployed model.

    Args:
        recipe: a `RunConfig`, nested settings as in a recipe, the path or name of a recipe, or None: the default.
        overrides: ``"key=value"`` strings, as after ``--set``.
        out: folder of the run; by default ``runs/NAME``, or the next free ``runs/NAME-2``, ...
        resume: continue the run in ``out``; without ``out``, the newest in ``runs`` with the same settings. Without a
            recipe, the settings are those that the run in ``out`` was started with.
        progress: receives progress events; True shows a bar or lines, False nothing, None a bar in a notebook only.
        dataset: images and labels of your own (`ImageDataset.from_tensors`), in place of the recipe's ``data``
            section; pass them again to resume.

    Raises:
        InputError: wrong input; nothing was written.
        ClientError: a client's training failed; the run can be resumed.
    """
    overrides = [overrides] if isinstance(overrides, str) else overrides
    folder = Path(out) if out is not None else None
    if resume and folder is not None and recipe is None:
        recipe = RunFolder(folder).read_config()
    config = _config(recipe, overrides)
    if dataset is not None:
        config = _with_dataset(config, dataset, overrides)
    if folder is None:
        found = newest(config, RUNS) if resume else None
        if resume and found is None:
            raise InputError(f"no run of {config.name!r} with these settings is in {RUNS}/; name its folder by --out")
        folder = found or unused(RUNS, config.name)
    shown = chosen(progress)
    return execute(config, folder, lambda: build(config, dataset, shown), resume=resume, progress=shown)


def _config(recipe: RunConfig | Mapping[str, Any] | str | Path | None, overrides: Sequence[str]) -> RunConfig:
    if isinstance(recipe, RunConfig):
        recipe = recipe.model_dump(mode="json", exclude_none=True)
    if isinstance(recipe, Mapping):
        return configs.from_mapping(configs.apply(recipe, overrides))
    return configs.load(recipes.find(str(recipe or recipes.DEFAULT)), overrides)


def _with_dataset(config: RunConfig, dataset: ImageDataset, overrides: Sequence[str]) -> RunConfig:
    if not isinstance(dataset, ImageDataset):
        raise InputError(f"dataset must come from fedftg.ImageDataset.from_tensors(...), got {type(dataset).__name__}")
    if any(item.partition("=")[0].strip().split(".")[0] == "data" for item in overrides):
        raise InputError("data.* has no effect beside dataset=...; leave it out, or change the dataset itself")
    return config.model_copy(update={"data": DataConfig(name=sources.TENSORS)})


def newest(config: RunConfig, parent: Path) -> Path | None:
    """Returns the newest run in ``parent`` that is this experiment and not longer than it, or None."""
    found = []
    for path in parent.glob("*/config.toml"):
        try:
            given = RunFolder(path.parent).read_config()
            if tuple(given.get("plugins", ())) != config.plugins:
                continue  # before anything of another experiment is imported
            other = configs.from_mapping(given)
        except InputError:
            continue  # written by another version: not this experiment
        if same_run(other, config) and other.rounds <= config.rounds:
            found.append((path.stat().st_mtime, path.parent))
    return max(found)[1] if found else None


def same_run(one: RunConfig, other: RunConfig) -> bool:
    """Returns whether two configs, of any number of rounds, are one experiment on the same data and machine."""
    same_place = (one.device, one.threads, one.data.root) == (other.device, other.threads, other.data.root)
    return same_place and configs.first_difference(one, other) is None


def unused(parent: Path, name: str) -> Path:
    """Returns the first of ``NAME``, ``NAME-2``, ... that does not exist in ``parent``."""
    path, number = parent / name, 1
    while path.exists():
        number += 1
        path = parent / f"{name}-{number}"
    return path


def execute(
    config: RunConfig, folder: Path, prepare: Callable[[], Experiment], *, resume: bool, progress: Progress
) -> Run:
    """Runs all rounds of an experiment in a run folder, or those that an earlier session left.

    After ``kill -9`` at any moment, resuming gives the same ``rounds.jsonl`` (times aside) and weights as an
    uninterrupted run on the same machine with the same number of threads.

    Args:
        folder: must not hold another run unless ``resume``.
        prepare: builds the experiment; called once ``folder`` is known to be usable.
        resume: continue after the last checkpoint; finished runs are returned as they are.

    Raises:
        InputError: wrong input; nothing was written, and an existing run is as it was.
        ClientError: a client's training failed. The run can be resumed.
    """
    run_folder = RunFolder(folder)
    # Before the data, which may take minutes to decode.
    if resume:
        configs.check_resumable(configs.from_mapping(run_folder.read_config()), config)
    else:
        run_folder.check_free()
    track.check(config.track.to)
    with ExitStack() as stack:
        threads = stack.enter_context(cpu_threads(config.threads))
        stack.callback(progress.finish)
        experiment = prepare()
        stack.callback(experiment.executor.close)
        experiment.clients.keep_in(run_folder.checkpoint)
        session = environment(threads, str(experiment.data.device))
        session["executor"] = experiment.executor.description
        session |= {"mean": list(experiment.data.dataset.mean), "std": list(experiment.data.dataset.std)}
        if resume:
            _restore(experiment, run_folder, session)
        else:
            run_folder.create(config.to_toml(), session, experiment.partition_record)
        sink = stack.enter_context(closing(track.Sink(folder, config.track.to, logging.getLogger("fedftg").warning)))
        _run_rounds(experiment, run_folder, progress, sink)
    if not run_folder.finished:
        refiner = load_run(folder).refiner
        header = {"name": config.name, "algorithm": config.algorithm.name, "refiner": refiner, "seed": config.seed}
        rows = records.read(run_folder.rounds_file)
        summary = summarise(header, rows, config.evaluation.targets, peak_memory_mb())
        records.write_json(run_folder.summary_file, summary)
    summary = records.read_json(run_folder.summary_file)
    model = experiment.model.module(*experiment.state.model)
    return Run(folder, summary, experiment.state, model)


def _run_rounds(experiment: Experiment, folder: RunFolder, progress: Progress, sink: track.Sink) -> None:
    config = experiment.config
    progress.start(config, experiment.state.round, experiment.data.num_clients)
    for note in (*experiment.data.dataset.notes, *getattr(experiment.refiner, "notes", ())):
        progress.note(note)
    saved = experiment.state.round
    executor = experiment.executor.description
    record: Record | None = None
    try:
        while experiment.state.round < config.rounds:
            record = experiment.run_round(progress)
            done = experiment.state.round
            _write_details(experiment, folder)
            if experiment.executor.description != executor:  # what auto took could not do it
                executor = experiment.executor.description
                folder.amend_session(executor=executor)
            index: checkpoint.Index | None = None
            if done % config.checkpoint.every == 0 or done == config.rounds:
                # All of it but the last rename comes before the record, which says how long it took.
                start = time.perf_counter()
                index = checkpoint.write(experiment.state, experiment.clients)
                record["seconds"]["checkpoint"] = round(time.perf_counter() - start, 6)
            records.append(folder.rounds_file, record)
            if index is not None:
                checkpoint.commit(index, experiment.clients)
                saved = done
            progress.round_done(record)
            sink.log(record)
    except KeyboardInterrupt:
        # A completed round is kept; an unfinished one is run again.
        if record is not None and record["round"] == experiment.state.round > saved:
            _write_details(experiment, folder)
            if len(records.read(folder.rounds_file)) < experiment.state.round:
                records.append(folder.rounds_file, record)
            checkpoint.save(experiment.state, experiment.clients)
        raise


def _write_details(experiment: Experiment, folder: RunFolder) -> None:
    """Writes what the refiner showed, in few rounds, and what the last round measured in detail."""
    done, last, data = experiment.state.round, experiment.config.rounds, experiment.data
    if experiment.evaluation is not None:
        records.write_json(folder.evaluation_file, experiment.evaluation, indent=None)
    if experiment.shown:
        images, labels = experiment.shown.pop()
        if done == last or pictures.due(folder.images, done):
            mosaic = pictures.mosaic(images, labels, data.num_classes, data.dataset.mean, data.dataset.std)
            pictures.write(folder.images, done, mosaic, labelled=labels is not None)


def _restore(experiment: Experiment, folder: RunFolder, session: Record) -> None:
    config = experiment.config
    if folder.read_partition() != experiment.partition_record:
        raise InputError(f"{folder.path} was started on other data or another partition; give the same, or start anew")
    kept = checkpoint.load(experiment.clients, experiment.data.device)
    done = kept.round if kept is not None else 0
    if done > config.rounds:
        raise InputError(f"{folder.path} is at round {done} already; rounds must be at least that, got {config.rounds}")
    if kept is not None:
        _check_model(experiment.state, kept, folder.checkpoint)
        experiment.state = kept
    folder.check_records(done)
    if folder.finished and done == config.rounds:
        return
    checkpoint.sweep(folder.checkpoint)
    folder.reopen(config.to_toml(), session, done)


def _check_model(own: ServerState, kept: ServerState, folder: Path) -> None:
    """Raises InputError where a checkpoint is of another model, as after its class was edited."""
    shapes, found = ({name: value.shape for name, value in {**s.params, **s.buffers}.items()} for s in (own, kept))
    if found != shapes:
        wrong = next(name for name in {**shapes, **found} if shapes.get(name) != found.get(name))
        raise InputError(f"the checkpoint in {folder} is of another model: {wrong} differs; {PUT_BACK}")
