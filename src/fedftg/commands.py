"""One function per command: finds recipes and run folders, calls the parts, and says what was written where."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedftg import config as configs
from fedftg import experiment, recipes
from fedftg.algorithms.registry import ALGORITHMS, REFINERS
from fedftg.config import RunConfig
from fedftg.data import sources
from fedftg.data.config import DataConfig, PartitionConfig
from fedftg.data.dataset import ImageDataset
from fedftg.data.federated import partition_dataset
from fedftg.data.partition import LAWS, class_counts, describe, needed_columns, save, skew, to_json
from fedftg.distill.config import PRESETS
from fedftg.engine.executors import EXECUTORS
from fedftg.errors import InputError
from fedftg.experiment import Run
from fedftg.models.registry import MODELS
from fedftg.progress import Progress, Silent
from fedftg.report import table
from fedftg.report.load import RunRecord, load_run
from fedftg.rundir import checkpoint
from fedftg.rundir.folder import RunFolder

RUNS = Path("runs")


@dataclass(frozen=True)
class Report:
    """Runs, and the files that a table and a plot of them were written to."""

    runs: list[RunRecord]
    table: Path
    plot: Path


@dataclass(frozen=True)
class PartitionReport:
    """Who holds what, and the files that it was written to."""

    title: str
    """Data set, law with its settings, and seed."""
    class_names: list[str]
    class_counts: list[list[int]]
    skew: dict[str, float]
    held_back: list[int] | None
    """Samples of each client that are for its own test; None where `partition.test_share` is 0."""
    groups: list[str] | None
    """The domain or natural client that each client is; None for the other laws."""
    converted: dict[str, int]
    """How many images were not RGB as stored, by mode."""
    plot: Path
    sizes: Path
    data: Path


def run(
    recipe: RunConfig | Mapping[str, Any] | str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    out: Path | str | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    dataset: ImageDataset | None = None,
) -> Run:
    """One experiment, from its config to its deployed model.

    Args:
        recipe: a `RunConfig`, nested settings as in a recipe, the path or name of a recipe, or None: the default.
        overrides: ``"key=value"`` strings, as after ``--set``.
        out: folder of the run; by default ``runs/NAME``, or the next free ``runs/NAME-2``, ...
        resume: go on with the run in ``out``; without ``out`` with the newest in ``runs`` with the same settings.
            Without a recipe, the settings are those that the run in ``out`` was started with.
        progress: who is told how it goes on; None is silent.
        dataset: images and labels of your own (`ImageDataset.from_tensors`), in place of the recipe's ``data``
            section; give them again to resume.

    Raises:
        InputError: wrong input; nothing was written.
        ClientError: a client's training failed; the run can be resumed.
    """
    folder = Path(out) if out is not None else None
    if resume and folder is not None and recipe is None:
        recipe = RunFolder(folder).read_config()
    config = _config(recipe, overrides)
    if dataset is not None:
        if not isinstance(dataset, ImageDataset):
            raise InputError(
                f"dataset must be an ImageDataset, got {type(dataset).__name__}; make one by "
                "fedftg.ImageDataset.from_tensors(...)"
            )
        if lost := [item for item in overrides if item.partition("=")[0].strip().split(".")[0] == "data"]:
            raise InputError(
                f"{lost[0]!r} has no effect beside dataset=...; leave it out, or change the dataset itself"
            )
        config = config.model_copy(update={"data": DataConfig(name=sources.TENSORS)})
    if folder is None:
        found = _existing(config, RUNS) if resume else None
        if resume and found is None:
            raise InputError(
                f"no run of {config.name!r} with these settings is in {RUNS}/; leave --resume out to start one, "
                "or name its folder by --out"
            )
        folder = found or _fresh(RUNS, config.name)
    return experiment.run(config, folder, resume=resume, progress=progress, dataset=dataset)


def _config(recipe: RunConfig | Mapping[str, Any] | str | Path | None, overrides: Sequence[str]) -> RunConfig:
    if isinstance(recipe, RunConfig):
        recipe = recipe.model_dump(mode="json", exclude_none=True)
    if isinstance(recipe, Mapping):
        return configs.from_mapping(configs.apply(recipe, overrides))
    return configs.load(recipes.find(str(recipe or recipes.DEFAULT)), overrides)


def compare(given: Sequence[str], overrides: Sequence[str], out: Path, progress: Progress) -> Report:
    """Runs what is missing, and writes one table and one plot of all.

    Args:
        given: recipes (path or name), or folders of runs; a recipe whose run is in ``out`` already, with the same
            settings, is not run again, and an unfinished one is resumed.
        out: the folder of run folders.
    """
    if len(given) < 2:
        raise InputError(f"compare needs two or more recipes or run folders, got {len(given)}")
    if len(set(given)) < len(given):
        raise InputError(f"compare got {next(item for item in given if given.count(item) > 1)!r} twice; name it once")
    folders = {item: Path(item) for item in given if RunFolder(Path(item)).config_file.is_file()}
    # All recipes are checked before the first is run, so that a typo in the last one costs no time.
    wanted = {item: _for_comparison(recipes.find(item), overrides) for item in given if item not in folders}
    if overrides and not wanted:
        raise InputError("--set changes recipes, but only folders of runs were given; name recipes to run anew")
    for item, config in wanted.items():
        folders[item] = _run_if_missing(config, out, progress)
    runs = [load_run(folders[item]) for item in given]
    name = "+".join(dict.fromkeys(run.name for run in runs))
    return _write_report(runs, out / "comparisons" / name[:120])


def report(folder: Path) -> Report:
    """Writes the table and the plot of one run into its folder ``report``."""
    return _write_report([load_run(folder)], folder / "report")


def partition(
    recipe: str | None, overrides: Sequence[str], out: Path | None, progress: Progress | None = None
) -> PartitionReport:
    """Splits the data as the recipe would, without training; writes a heatmap, the sizes and the partition itself."""
    from fedftg.report import plots  # half a second of import time that commands without a plot do not need

    config = configs.load(recipes.find(recipe or recipes.DEFAULT), overrides)
    progress = progress or Silent()
    try:
        dataset = sources.load(config.data, columns=needed_columns(config.partition), progress=progress.loading)
    finally:
        progress.finish()
    labels = dataset.train_labels.numpy()
    found = partition_dataset(dataset, config.partition, config.seed)
    parts = found.whole
    held_back = [len(test) for test in found.held_back] if config.partition.test_share > 0 else None
    counts = class_counts(parts, labels, dataset.num_classes)
    names, table_of_counts, measures = list(dataset.class_names), counts.tolist(), skew(counts)
    groups = _groups(dataset, config.partition, parts)
    about: dict[str, Any] = {
        "data": config.data.model_dump(mode="json", exclude_none=True),
        "partition": config.partition.model_dump(mode="json", exclude_none=True),
        "seed": config.seed,
        **({"held_back": held_back} if held_back is not None else {}),
        **({"groups": groups} if groups is not None else {}),
        **({"converted": dict(dataset.converted)} if dataset.converted else {}),
    }
    text = to_json(parts, labels, law=config.partition.law, class_names=names, about=about)
    folder = _partition_folder(out, config.name, text)
    data = save(folder / "partition.json", text)
    title = f"{config.data.name}, {describe(config.partition)}, seed {config.seed}"
    plot = plots.partition_heatmap(table_of_counts, names, folder / "partition.png", title=title)
    sizes = plots.partition_sizes(counts.sum(axis=1).tolist(), folder / "sizes.png", title=title)
    return PartitionReport(
        title, names, table_of_counts, measures, held_back, groups, dict(dataset.converted), plot, sizes, data
    )


def _partition_folder(out: Path | None, name: str, text: str) -> Path:
    """Where a partition is written: never over another one, which a run may be using."""
    folder, number = out or RUNS / "partitions" / name, 1
    while (folder / "partition.json").exists() and (folder / "partition.json").read_text("utf-8") != text:
        if out is not None:
            raise InputError(f"{folder} holds another partition already; give another folder by --out")
        number += 1
        folder = RUNS / "partitions" / f"{name}-{number}"
    _make(folder)
    return folder


def _groups(dataset: ImageDataset, config: PartitionConfig, parts: Sequence[NDArray[np.integer]]) -> list[str] | None:
    """The value of the column that each client's rows have; None for laws without a column."""
    if config.column is None or config.law not in ("domain", "natural"):
        return None
    values = dataset.columns[config.column]
    return [str(values[part[0]]) if len(part) else "-" for part in parts]


def export(folder: Path, to: Path) -> int:
    """Writes the deployed (refined) global model of a run's last checkpoint; returns the round it is from.

    Parameters and buffers lie in one safetensors file under their names in the module, so that
    ``module.load_state_dict(safetensors.torch.load_file(to))`` loads it.

    Raises:
        InputError: no run, no checkpoint yet, or a wrong file name.
    """
    config = RunFolder(folder).read_config()
    if to.suffix != ".safetensors":
        raise InputError(f"--to must end in .safetensors, got {to.name!r}")
    if not to.parent.is_dir():
        raise InputError(f"--to: folder {to.parent} does not exist; make it first")
    state = checkpoint.load_state(RunFolder(folder).checkpoint)
    if state is None:
        raise InputError(f"{folder} has no checkpoint yet; let the run finish a round first")
    metadata = {"model": json.dumps(config["model"]), "round": str(state.round)}
    try:
        checkpoint.write_tensors(to, {**state.params, **state.buffers}, metadata)
    except OSError as error:
        raise InputError(f"cannot write {to}: {error.strerror}; choose another file by --to") from None
    return state.round


def listing() -> dict[str, list[str]]:
    """Every name that a recipe or command may use, by kind."""
    return {
        "data sets": sorted(sources.SOURCES),
        "partition laws": list(LAWS),
        "models": [*sorted(MODELS), "package.module.Class (any nn.Module)"],
        "algorithms": list(ALGORITHMS),
        "refiners": list(REFINERS),
        "presets of fedftg": list(PRESETS),
        "executors": list(EXECUTORS),
        "recipes": recipes.names(),
    }


def _for_comparison(recipe: Path, overrides: Sequence[str]) -> RunConfig:
    """A recipe with the overrides that concern it: settings of a refiner pass a base without one by."""
    if configs.load(recipe).refiner.name == "none" and not any(o.startswith("refiner.name") for o in overrides):
        overrides = [override for override in overrides if not override.startswith("refiner.")]
    return configs.load(recipe, overrides)


def _run_if_missing(config: RunConfig, out: Path, progress: Progress) -> Path:
    folder = _existing(config, out)
    if folder is None:
        folder = _fresh(out, config.name)
        experiment.run(config, folder, progress=progress)
    elif (load_run(folder).summary or {}).get("rounds") != config.rounds:
        experiment.run(config, folder, resume=True, progress=progress)
    return folder


def _existing(config: RunConfig, parent: Path) -> Path | None:
    """The newest run in ``parent`` that is this experiment and not longer than it, or None."""
    found = []
    for path in parent.glob("*/config.toml"):
        try:
            given = RunFolder(path.parent).read_config()
            if tuple(given.get("plugins", ())) != config.plugins:
                continue  # before anything of another experiment is imported
            other = configs.from_mapping(given)
        except InputError:
            continue  # written by another version: not this experiment
        same_machine = (other.device, other.threads) == (config.device, config.threads)
        if configs.first_difference(other, config) is None and same_machine and other.rounds <= config.rounds:
            found.append((path.stat().st_mtime, path.parent))
    return max(found)[1] if found else None


def _fresh(parent: Path, name: str) -> Path:
    path, number = parent / name, 1
    while path.exists():
        number += 1
        path = parent / f"{name}-{number}"
    return path


def _write_report(runs: list[RunRecord], folder: Path) -> Report:
    from fedftg.report import plots

    _make(folder)
    table_file = folder / "table.md"
    try:
        table_file.write_text(table.markdown_table(runs), encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {table_file}: {error.strerror}; make the folder writable") from None
    return Report(runs, table_file, plots.accuracy_plot(runs, folder / "accuracy.png"))


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror}; choose another folder by --out") from None
