"""A run folder as one value."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedftg.errors import InputError

CONFIG = "config.toml"
ROUNDS = "rounds.jsonl"
SUMMARY = "summary.json"


@dataclass(frozen=True)
class RunRecord:
    """What a run wrote: its config, one record a round, and a summary once it is done."""

    folder: Path
    name: str
    config: dict[str, Any]
    rounds: list[dict[str, Any]]
    summary: dict[str, Any] | None
    """None while the run is unfinished."""

    def series(self, kind: str, name: str) -> tuple[list[int], list[float]]:
        """Round numbers and values of ``record[kind][name]``, for the rounds that have one; null becomes NaN."""
        numbers: list[int] = []
        values: list[float] = []
        for record in self.rounds:
            group = record.get(kind)
            if isinstance(group, dict) and name in group:
                numbers.append(int(record["round"]))
                values.append(math.nan if group[name] is None else float(group[name]))
        return numbers, values

    def deployed(self) -> tuple[list[int], list[float]]:
        """The accuracy of the deployed model: `refined`, which equals `selected` where there is no refiner."""
        refined = self.series("accuracy", "refined")
        return refined if refined[0] else self.series("accuracy", "selected")

    @property
    def algorithm(self) -> str:
        """The algorithm's name, ``?`` where the config has none."""
        return str(_table(self.config, "algorithm").get("name", "?"))

    @property
    def refiner(self) -> str:
        """The refiner's name, ``none`` where there is no refiner."""
        return str(_table(self.config, "refiner").get("name", "none"))

    @property
    def refiner_label(self) -> str:
        """The refiner's name, with its preset where that has another name: ``none``, ``fedftg``, ``fedftg (paper)``."""
        preset = _table(self.config, "refiner").get("preset")
        plain = self.refiner == "none" or not preset or preset == self.refiner
        return self.refiner if plain else f"{self.refiner} ({preset})"

    @property
    def method(self) -> str:
        """Algorithm and refiner: ``fedavg``, ``fedavg + fedftg (paper)``."""
        return self.algorithm if self.refiner == "none" else f"{self.algorithm} + {self.refiner_label}"

    @property
    def rounds_done(self) -> int:
        """The number of the last round on record, 0 before the first."""
        return int(self.rounds[-1]["round"]) if self.rounds else 0

    @property
    def rounds_planned(self) -> int | None:
        """The config's ``rounds``."""
        planned = self.config.get("rounds")
        return planned if isinstance(planned, int) else None

    @property
    def seconds(self) -> float:
        """Sum over all phases of the rounds on record."""
        parts = [part for record in self.rounds for part in _table(record, "seconds").values()]
        return float(sum(part for part in parts if part is not None))


def load_run(folder: Path | str) -> RunRecord:
    """Reads a run folder. A torn last line of ``rounds.jsonl`` (the process was killed while it wrote) is left out.

    Raises:
        InputError: the folder is no run folder, or one of its files is damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "it is a file" if folder.exists() else "it does not exist"
        raise InputError(f"{folder} is no run folder: {what}; give a folder that `fedftg run` wrote")
    if not (folder / CONFIG).is_file():
        raise InputError(f"{folder} is no run folder: {CONFIG} is missing; {_runs_inside(folder)}")
    config = _read_toml(folder / CONFIG)
    if not (folder / ROUNDS).is_file() and "algorithm" not in config:
        raise InputError(f"{folder} is no run folder: {ROUNDS} is missing, and {CONFIG} has no [algorithm]")
    return RunRecord(
        folder=folder,
        name=folder.resolve().name,
        config=config,
        rounds=_read_rounds(folder / ROUNDS),
        summary=_read_summary(folder / SUMMARY),
    )


def display_names(runs: Sequence[RunRecord]) -> list[str]:
    """The runs' names; where several are the same, with as many parent folders as tell them apart."""
    names = [run.name for run in runs]
    parts = [run.folder.resolve().parts for run in runs]
    for depth in range(2, max((len(part) for part in parts), default=0) + 1):
        twice = {name for name in names if names.count(name) > 1}
        if not twice:
            break
        names = ["/".join(part[-depth:]) if name in twice else name for name, part in zip(names, parts, strict=True)]
    return names


def _table(value: dict[str, Any], key: str) -> dict[str, Any]:
    found = value.get(key)
    return found if isinstance(found, dict) else {}


def _runs_inside(folder: Path) -> str:
    inside = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
    if not inside:
        return "give a folder that `fedftg run` wrote"
    return f"it holds runs, name one of them: {', '.join(inside[:5])}{', ...' if len(inside) > 5 else ''}"


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {_one_line(error)}") from None


def _read_summary(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {_one_line(error)}") from None
    if not isinstance(summary, dict):
        raise InputError(f"cannot read {path}: got {type(summary).__name__}, need one JSON object")
    return summary


def _read_rounds(path: Path) -> list[dict[str, Any]]:
    if not path.exists():  # the first round is not done yet
        return []
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise InputError(f"cannot read {path}: {_one_line(error)}") from None
    rounds: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8"))
            if not isinstance(record, dict) or not isinstance(record.get("round"), int):
                raise ValueError("a record is a JSON object with a whole number `round`")
        except ValueError as error:
            if number == len(lines):  # no newline follows: the write was cut
                break
            raise InputError(f"{path}, line {number}: {_one_line(error)}") from None
        rounds.append(record)
    return rounds


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
