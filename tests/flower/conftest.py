"""Flower is imported here once: what its own dependencies warn about on import is not ours to mend."""

from __future__ import annotations

import logging
import os
import sys
import warnings

os.environ.update(FLWR_TELEMETRY_ENABLED="0", FLWR_DISABLE_UPDATE_CHECK="1", RAY_USAGE_STATS_ENABLED="0")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import flwr.app
    import flwr.clientapp
    import flwr.serverapp  # noqa: F401

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from small_federation import FaultyGrid

from fedftg import config as configs
from fedftg.flower.client import client_app
from fedftg.flower.server import serve
from fedftg.progress import Progress
from fedftg.rundir import records

# Digits, four clients of which three a round, and a step or two of everything.
TINY = [
    "data.max_train=160", "data.max_test=60", "partition.num_clients=4", "partition.alpha=0.3", "cohort.size=3",
    "model.name=lenet_bn", "rounds=3", "threads=1", "seed=3",
    "local.epochs=1", "local.batch_size=20", "refiner.iterations=2", "refiner.batch_size=8",
    "refiner.generator_width=4", "algorithm.name=fedavg",
]  # fmt: skip


class Federation:
    """A recipe, its nodes in this process, and its simulation."""

    def __init__(self, folder: Path, overrides: tuple[str, ...]) -> None:
        self.folder = folder
        self.recipe = folder / "recipe.toml"
        own = any(override.startswith("data.name=") for override in overrides)
        tiny = [setting for setting in TINY if not (own and setting.startswith("data."))]
        given = configs.apply({"refiner": {"name": "fedftg"}}, tiny)
        self.config = configs.from_mapping(configs.apply(given, overrides))
        self.recipe.write_text(self.config.to_toml())
        self.settings: dict[str, Any] = {"wait-seconds": 0.2, "round-seconds": 0.3}

    def node(self, client: int, **more: Any) -> dict[str, Any]:
        return {"partition-id": client, "state-dir": str(self.folder / f"node-{client}"), **more}

    def grid(self, clients: Any = None, **settings: Any) -> FaultyGrid:
        clients = range(self.config.partition.num_clients) if clients is None else clients
        given = {**self.settings, **settings}
        return FaultyGrid(client_app(self.recipe), {client + 1: self.node(client) for client in clients}, given)

    def serve(self, grid: FaultyGrid, out: str = "served", **settings: Any) -> Any:
        given = {**self.settings, "out": str(self.folder / out), **settings}
        return serve(grid, self.recipe, given, Progress())

    def simulate(self, out: str = "simulated", *overrides: str) -> Any:
        import fedftg

        return fedftg.run(str(self.recipe), overrides=overrides, out=self.folder / out)

    def rows(self, out: str) -> list[dict[str, Any]]:
        rows = records.read(self.folder / out / "rounds.jsonl")
        for row in rows:
            row.pop("seconds")
        return rows


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where clients keep their memory without ``state_dir``."""
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """Flower's logger does not propagate."""
    logger = logging.getLogger("flwr")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


@pytest.fixture
def federation(tmp_path: Path) -> Callable[..., Federation]:
    return lambda *overrides: Federation(tmp_path, overrides)
