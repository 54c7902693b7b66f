"""The folder of a run: its files, and how they are written and checked."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedftg.errors import InputError
from fedftg.rundir import records
from fedftg.rundir.records import PUT_BACK, Record

# What a run that died before it was set up may leave; config.toml, written last, makes a folder a run.
_FIRST_FILES = {"environment.json", "partition.json"}


class RunFolder:
    """The files of a run; ``path`` need not exist yet."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.toml"
        self.rounds_file = path / "rounds.jsonl"
        self.summary_file = path / "summary.json"  # exists once all rounds are done
        self.environment_file = path / "environment.json"
        self.partition_file = path / "partition.json"
        self.checkpoint = path / "checkpoint"
        self.evaluation_file = path / "evaluation.json"
        self.images = path / "images"

    @property
    def finished(self) -> bool:
        """Returns whether all rounds were done."""
        return self.summary_file.exists()

    def check_free(self) -> None:
        """Raises InputError where the folder holds something already."""
        try:
            names = {item.name for item in self.path.iterdir()} if self.path.exists() else set()
        except OSError as error:
            raise self._not_writable(error) from None
        if {name for name in names if not name.endswith(".part")} - _FIRST_FILES:
            raise InputError(f"{self.path} exists already; resume it by --resume, or give another --out")

    def create(self, config_toml: str, environment: Record, partition: Record) -> None:
        """Makes the folder and writes what is known before the first round; raises InputError as `check_free` does."""
        self.check_free()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            records.write_json(self.environment_file, {"sessions": [environment]})
            records.write_json(self.partition_file, partition)
            records.write_atomically(self.config_file, config_toml.encode())
        except OSError as error:
            raise self._not_writable(error) from None

    def reopen(self, config_toml: str, environment: Record, num_rounds: int) -> None:
        """Prepares the folder to resume after ``num_rounds`` rounds: what lies beyond them is dropped."""
        self.summary_file.unlink(missing_ok=True)  # first: a summary says that the run is finished
        sessions = records.read_json(self.environment_file)["sessions"]
        session = {**environment, "resumed_after_round": num_rounds}
        records.write_json(self.environment_file, {"sessions": [*sessions, session]})
        records.write_atomically(self.config_file, config_toml.encode())
        records.cut(self.rounds_file, num_rounds)

    def amend_session(self, **changed: Any) -> None:
        """Corrects the last session of ``environment.json``."""
        *before, last = records.read_json(self.environment_file)["sessions"]
        records.write_json(self.environment_file, {"sessions": [*before, {**last, **changed}]})

    def read_partition(self) -> Record:
        """Returns who holds what, as it was written when the run started."""
        try:
            return records.read_json(self.partition_file)
        except (OSError, ValueError) as error:
            raise InputError(f"{self.partition_file} cannot be read ({error}); start a new run") from None

    def check_records(self, num_rounds: int) -> None:
        """Raises InputError where records or the checkpoint, of ``num_rounds`` rounds (0: none), were taken away."""
        try:
            found = [row["round"] for row in records.read(self.rounds_file)]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self.rounds_file} cannot be read ({error}); {PUT_BACK}") from None
        missing = next((number for number in range(1, num_rounds + 1) if found[number - 1 : number] != [number]), None)
        if missing is not None:
            raise InputError(f"{self.rounds_file} lacks round {missing} of {num_rounds}; {PUT_BACK}")
        # A run that dies between a record and its checkpoint has one of `every` rounds at most.
        every = self.read_config().get("checkpoint", {}).get("every", 1)
        if num_rounds == 0 and (self.finished or len(found) > every):
            raise InputError(f"{self.path} has {len(found)} rounds, but checkpoint/checkpoint.json is gone; {PUT_BACK}")

    def read_config(self) -> dict[str, Any]:
        """Returns the settings of the run; raises InputError where the folder is none."""
        try:
            return tomllib.loads(self.config_file.read_text(encoding="utf-8"))
        except OSError:
            raise InputError(f"{self.path} holds no run (no config.toml); give the folder of a run") from None
        except ValueError as error:
            raise InputError(f"{self.config_file} is not valid TOML: {error}") from None

    def _not_writable(self, error: OSError) -> InputError:
        return InputError(f"cannot write to {self.path}: {error.strerror}; choose another folder by --out")


def summarise(header: Record, rows: Sequence[Record], targets: Sequence[float], peak_memory_mb: float) -> Record:
    """Returns the content of ``summary.json`` from the records of all rounds.

    ``rounds_to`` is, for each target, the first round whose ``refined`` accuracy reached it, or None.
    """
    scores = {kind: records.score(records.series(rows, "accuracy", kind)) for kind in records.ACCURACIES}
    refined = list(zip(*records.series(rows, "accuracy", "refined"), strict=True))
    clients: Record = next((row["client_accuracy"] for row in reversed(rows) if "client_accuracy" in row), {})
    reached = {
        str(target): next((number for number, accuracy in refined if accuracy >= target), None) for target in targets
    }
    seconds = {phase: sum(row["seconds"].get(phase, 0.0) for row in rows) for phase in records.PHASES}
    return {
        **header,
        "rounds": len(rows),
        "accuracy": {kind: score for kind, score in scores.items() if score},
        **({"client_accuracy": clients} if clients else {}),
        "rounds_to": reached,
        "seconds": {**seconds, "total": sum(seconds.values())},
        "rejected_updates": sum(len(row.get("rejected", ())) for row in rows),
        "peak_memory_mb": peak_memory_mb,
    }
