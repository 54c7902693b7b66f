"""A run folder as one value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedftg.errors import InputError, first_line
from fedftg.rundir import records
from fedftg.rundir.folder import RunFolder

Series = tuple[list[int], list[float]]
"""Round numbers and values."""


@dataclass(frozen=True)
class RunRecord:
    """What a run wrote: its config, one record a round, and a summary once it is done."""

    folder: Path
    config: dict[str, Any]
    rounds: list[dict[str, Any]]
    summary: dict[str, Any] | None
    """None while the run is unfinished."""

    def accuracy(self, kind: str) -> Series:
        """Returns ``record["accuracy"][kind]`` of the rounds that have it; null becomes NaN."""
        found = [(row["round"], row["accuracy"][kind]) for row in self.rounds if kind in row.get("accuracy", {})]
        return [number for number, _ in found], [math.nan if value is None else value for _, value in found]

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


def display_names(runs: Sequence[RunRecord]) -> list[str]:
    """Returns the runs' names; where several are the same, their folders."""
    names = [run.name for run in runs]
    return [name if names.count(name) == 1 else str(run.folder) for run, name in zip(runs, names, strict=True)]
