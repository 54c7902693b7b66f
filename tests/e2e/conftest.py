import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Fedftg = Callable[..., subprocess.CompletedProcess[str]]

# Small enough for seconds, and with everything that a run has.
TINY = [
    "data.name=digits", "data.max_train=200", "data.max_test=60", "partition.num_clients=5", "cohort.size=3",
    "model.name=lenet_bn", "rounds=4", "local.epochs=1", "local.batch_size=20", "threads=1",
    "refiner.iterations=2", "refiner.batch_size=8", "refiner.generator_width=4",
]  # fmt: skip


def options(settings: list[str]) -> list[str]:
    return [part for setting in settings for part in ("--set", setting)]


@pytest.fixture
def fedftg(tmp_path: Path) -> Fedftg:
    """Runs the command line in an empty folder."""

    def call(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80"}
        if path is not None:
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(path), os.environ.get("PYTHONPATH")]))
        return subprocess.run(
            [sys.executable, "-m", "fedftg.cli", *arguments],
            cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=300,
        )  # fmt: skip

    return call


@pytest.fixture
def tiny() -> list[str]:
    return options(TINY)


@pytest.fixture
def no_refiner() -> list[str]:
    return options([item for item in TINY if not item.startswith("refiner.")] + ["refiner.name=none"])


def records(folder: Path) -> list[dict[str, Any]]:
    """The records of a run without what time it took."""
    rows = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


@pytest.fixture
def read_records() -> Callable[[Path], list[dict[str, Any]]]:
    return records
