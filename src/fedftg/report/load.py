"""A run folder as one value."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedftg.errors import InputError, first_line, flat
from fedftg.rundir import records
from fedftg.rundir.folder import RunFolder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Series = tuple[list[int], list[float]]
"""Round numbers and values."""

_NOT_IN_A_GROUP = ("name", "seed", "device", "threads", "executor", "checkpoint", "track")
"""Sections in which the runs of a group may differ."""


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
        return pandas.DataFrame([flat(record) for record in load_run(self.folder).rounds]).set_index("round")

    def images(self) -> Figure:
        """Returns images that the refiner made, a grid a round and a row a class; `InputError` where there are none."""
        from fedftg.report.plots import images_figure

        files = sorted((self.folder / "images").glob("*.png"))
        if not files:
            makers = "fedftg, leaves, dafl, adi, dfrd, dense and coboosting"
            raise InputError(f"{self.folder} has no images; {makers} make some, other refiners none")
        return images_figure(files, RunFolder(self.folder).read_partition()["class_names"])


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
        found = [(row["round"], row[part][name]) for row in self.rounds if name in row.get(part, {})]
        return [number for number, _ in found], [math.nan if value is None else value for _, value in found]

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


def grouped(runs: Sequence[RunRecord]) -> list[Group]:
    """Returns groups in the order of their first runs; a run whose seed is there already is a group of its own."""
    names = [run.name for run in runs]
    found: dict[tuple[object, ...], dict[int, RunRecord]] = {}
    for run in runs:
        settings = flat({key: value for key, value in run.config.items() if key not in _NOT_IN_A_GROUP})
        key: tuple[object, ...] = tuple(sorted((name, repr(value)) for name, value in settings.items()))
        if int(run.config.get("seed", 0)) in found.get(key, {}):
            key = (*key, run.folder)
        found.setdefault(key, {})[int(run.config.get("seed", 0))] = run
    groups = []
    for by_seed in found.values():
        ordered = tuple(by_seed[seed] for seed in sorted(by_seed))
        name = ordered[0].name if names.count(ordered[0].name) == 1 else str(ordered[0].folder)
        groups.append(Group(re.sub(r"-s\d+$", "", name) if len(ordered) > 1 else name, ordered))
    return groups
