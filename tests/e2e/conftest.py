import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
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


class ForkServer:
    """A process of ``fork_server.py``, and the files that take what its forks print."""

    def __init__(self, folder: Path) -> None:
        self._output = {name: folder / name for name in ("stdout", "stderr")}
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("fork_server.py"))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def run(
        self, arguments: Sequence[str], folder: Path, environment: dict[str, str], path: Path | None
    ) -> subprocess.CompletedProcess[str]:
        for file in self._output.values():
            file.write_bytes(b"")
        command = {
            "arguments": arguments, "folder": str(folder), "environment": environment,
            "path": [] if path is None else [str(path)], **{name: str(file) for name, file in self._output.items()},
        }  # fmt: skip
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        status = int(self._process.stdout.readline())
        texts = (self._output[name].read_text() for name in ("stdout", "stderr"))
        return subprocess.CompletedProcess(["fedftg", *arguments], status, *texts)

    def close(self) -> None:
        self._process.communicate()


@pytest.fixture(scope="session")
def fork_servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Iterator[ForkServer]]:
    """Two in turn: commands that follow each other hash strings differently, as processes of their own do."""
    servers = [ForkServer(tmp_path_factory.mktemp("fork_server")) for _ in range(2)]
    yield itertools.cycle(servers)
    for server in servers:
        server.close()


def environment_of(path: Path | None) -> dict[str, str]:
    """The environment of a command, with ``path`` first on Python's path."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80"}
    if path is not None:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(path), os.environ.get("PYTHONPATH")]))
    return environment


@pytest.fixture
def fedftg(tmp_path: Path, fork_servers: Iterator[ForkServer]) -> Fedftg:
    """Runs the command line in an empty folder, in a process of its own that is forked."""

    def call(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
        return next(fork_servers).run(arguments, tmp_path, environment_of(path), path)

    return call


@pytest.fixture
def python_m_fedftg(tmp_path: Path) -> Fedftg:
    """The same by an interpreter that is started for it, as a user does."""

    def call(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "fedftg.cli", *arguments],
            cwd=tmp_path, env=environment_of(path), capture_output=True, text=True, check=False, timeout=300,
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


def classifiers() -> dict[str, Any]:
    """Returns what code about refining takes for granted: small classifiers and class counts."""
    import torch
    from torch import nn

    import fedftg

    def classifier(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(3, 4, 3, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10))

    counts = torch.randint(0, 50, (3, 10), generator=torch.Generator().manual_seed(0))
    teachers = [classifier(seed) for seed in (1, 2, 3)]
    return {"fedftg": fedftg, "torch": torch, "student": classifier(0), "teachers": teachers, "class_counts": counts}


def own_images() -> dict[str, Any]:
    """Returns what code about own data takes for granted."""
    import numpy as np

    import fedftg

    images, labels = np.random.default_rng(0).integers(0, 256, (200, 8, 8), dtype=np.uint8), np.arange(200) % 10
    names = {f"{split}_images": images for split in ("train", "test")}
    return {"fedftg": fedftg, **names, **{f"{split}_labels": labels for split in ("train", "test")}}


@pytest.fixture
def page_names() -> Callable[[str], dict[str, Any]]:
    """Returns the names that the code blocks of a page may use without defining them."""
    pages = {"README.md": classifiers, "docs/refine.md": classifiers, "docs/data.md": own_images}
    return lambda page: pages.get(page, dict)()


@pytest.fixture
def tiny_settings() -> list[str]:
    return TINY


@pytest.fixture
def fedftg_command(fedftg: Fedftg) -> Fedftg:
    """The same command where a test needs the package's name."""
    return fedftg
