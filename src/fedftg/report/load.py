"""A run folder as one value."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedftg.errors import InputError, first_line, flat
from fedftg.rundir import pictures, records
from fedftg.rundir.folder import RunFolder
from fedftg.rundir.records import Series

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NO_SETTINGS = ("name", "seed", "device", "threads", "plugins", "executor", "checkpoint", "track")
"""Sections of a config that do not make two runs different settings."""


class RunViews:
    """What a run's folder shows, for notebooks; each is read when it is called."""

    folder: Path

    def plot(self) -> Figure:
        """Returns test accuracies over rounds."""
        from fedftg.report.plots import accuracy_figure

        return accuracy_figure([load_run(self.folder)])

    def table(self) -> Any:
        """Returns a pandas DataFrame with a row a round and columns such as ``accuracy.refined``."""
        try:
            import pandas
        except ImportError:
            raise InputError("table() needs pandas, which is not installed; pip install pandas") from None
        rows = [flat(record) for record in load_run(self.folder).rounds]
        return pandas.DataFrame(rows, columns=None if rows else ["round"]).set_index("round")

    def images(self) -> Figure:
        """Returns images that the refiner showed, a grid a round, by class if labelled; `InputError` without any."""
        from fedftg.report.plots import images_figure

        files = RunFolder(self.folder)
        if found := [*pictures.found(files.images)]:
            return images_figure(found, files.read_partition()["class_names"])
        raise InputError(f"{self.folder} has no images: its refiner showed none")


@dataclass(frozen=True)
class RunRecord(RunViews):
    """What a run wrote: its config, one record a round, and a summary once it is done."""

    folder: Path
    config: dict[str, Any]
    rounds: list[dict[str, Any]]
    summary: dict[str, Any] | None
    """None while the run is unfinished."""

    def accuracy(self, kind: str) -> Series:
        """Returns ``record["accuracy"][kind]`` of the rounds that have it; null becomes NaN."""
        return self.series("accuracy", kind)

    def series(self, part: str, name: str) -> Series:
        """Returns ``record[part][name]`` of the rounds that have it; null becomes NaN."""
        return records.series(self.rounds, part, name)

    def read(self, file: str) -> dict[str, Any]:
        """Returns the object in a JSON file of the folder; empty where there is no such file."""
        try:
            return records.read_json(self.folder / file) if (self.folder / file).exists() else {}
        except (OSError, ValueError) as error:
            raise InputError(f"cannot read {self.folder / file}: {first_line(error)}") from None

    @property
    def name(self) -> str:
        """Returns the folder's name."""
        return self.folder.resolve().name

    @property
    def seed(self) -> int:
        """Returns the seed."""
        return int(self.config.get("seed", 0))

    @property
    def algorithm(self) -> str:
        """Returns the algorithm's name."""
        return str(self.config["algorithm"]["name"])

    @property
    def refiner(self) -> str:
        """Returns the refiner's name, with a preset of another name: ``none``, ``fedftg``, ``fedftg (paper)``."""
        settings = self.config["refiner"]
        preset = settings.get("preset", settings["name"])
        return str(settings["name"]) if preset == settings["name"] else f"{settings['name']} ({preset})"

    @property
    def method(self) -> str:
        """Returns algorithm and refiner: ``fedavg``, ``fedavg + fedftg (paper)``."""
        return self.algorithm if self.refiner == "none" else f"{self.algorithm} + {self.refiner}"

    @property
    def seconds(self) -> float:
        """Returns the sum over all phases of the rounds on record."""
        return math.fsum(part for row in self.rounds for part in row["seconds"].values())


def load_run(folder: Path | str) -> RunRecord:
    """Reads a run folder; a torn last line of ``rounds.jsonl`` (the process was killed while it wrote) is left out.

    Raises:
        InputError: the folder is no run folder, or one of its files is damaged.
    """
    files = RunFolder(Path(folder))
    config = files.read_config()
    try:
        summary = records.read_json(files.summary_file) if files.finished else None
        return RunRecord(files.path, config, records.read(files.rounds_file), summary)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the records in {files.path}: {first_line(error)}") from None


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but the seed, by seed."""

    name: str
    runs: tuple[RunRecord, ...]

    @property
    def first(self) -> RunRecord:
        """Returns the run of the lowest seed, for what all have in common."""
        return self.runs[0]


def _settings(run: RunRecord, besides: Sequence[str] = ()) -> dict[str, Any]:
    found, out = flat(run.config), {*_NO_SETTINGS, *besides}
    return {key: value for key, value in found.items() if not out & {key, key.split(".")[0]}}


def differing(runs: Sequence[RunRecord], besides: Sequence[str] = ()) -> dict[str, list[Any]]:
    """Returns the settings in which runs differ, with each run's value, None where it has none.

    Sections and keys ``besides`` are left out, as is what does not make a setting, such as the seed.
    """
    settings = [_settings(run, besides) for run in runs]
    values = {key: [one.get(key) for one in settings] for one in settings for key in one}
    return {key: found for key, found in values.items() if any(value != found[0] for value in found)}


def grouped(runs: Sequence[RunRecord]) -> list[Group]:
    """Returns groups in the order of their first runs; a run whose seed is there already is a group of its own."""
    names = [run.name for run in runs]
    found: dict[str, dict[int, RunRecord]] = {}
    for run in runs:
        key = repr(sorted(_settings(run).items()))
        if run.seed in found.get(key, {}):
            key += str(run.folder)
        found.setdefault(key, {})[run.seed] = run
    groups = []
    for by_seed in found.values():
        ordered = tuple(by_seed[seed] for seed in sorted(by_seed))
        name = ordered[0].name if names.count(ordered[0].name) == 1 else str(ordered[0].folder)
        groups.append(Group(re.sub(r"-s\d+$", "", name) if len(ordered) > 1 else name, ordered))
    return groups
