"""Processes give the numbers of the sequential executor with one thread, bit for bit, and never outlive it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import fedftg
from fedftg import build
from fedftg import config as configs
from fedftg.errors import ClientError, InputError
from fedftg.progress import Progress

SETTINGS: dict[str, Any] = {
    "rounds": 3,
    "threads": 1,
    "data": {"name": "digits", "max_train": 150, "max_test": 40},
    "partition": {"num_clients": 5, "sizes": "lognormal", "sigma": 0.5},
    "cohort": {"size": 4},
    "model": {"name": "lenet_bn"},
    "local": {"epochs": 1, "batch_size": 20, "momentum": 0.5},
    "refiner": {"name": "none"},
    "executor": {"name": "workers", "workers": 2},
}

# Fails, dies or waits where its arguments say so; trains like FedAvg elsewhere.
PLUGIN = """
import os, signal, time
from typing import Literal
import fedftg
from fedftg.algorithms.base import Algorithm
from fedftg.algorithms.fedavg import AverageServer, FedAvgConfig, PlainLocal

class Local(PlainLocal):
    def __init__(self, do, at, client):
        self.do, self.at, self.client = do, at, client
    def loss(self, model, params, buffers, batch, task):
        if (task.round, task.client) == (self.at, self.client):
            if self.do == "raise":
                raise ZeroDivisionError("by hand")
            if self.do == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.do == "wait":
                time.sleep(600)
        return super().loss(model, params, buffers, batch, task)

class Config(FedAvgConfig):
    name: Literal["NAME"] = "NAME"
    do: str = "nothing"
    at: int = 2
    client: int = 1
    def build(self, num_clients):
        return Algorithm(Local(self.do, self.at, self.client), AverageServer())

fedftg.register_algorithm("NAME", Config)
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a module and of the algorithm that it registers."""
    from fedftg.algorithms.registry import ALGORITHMS

    name = f"workers_plugin_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(PLUGIN.replace("NAME", name))
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    ALGORITHMS.pop(name, None)


def failing(plugin: str, do: str) -> dict[str, Any]:
    return {
        **SETTINGS,
        "plugins": [plugin],
        "cohort": {},
        "algorithm": {"name": plugin, "do": do},
    }


def rows(folder: Path) -> list[dict[str, Any]]:
    from fedftg.rundir import records

    found = records.read(folder / "rounds.jsonl")
    return [{key: value for key, value in row.items() if key != "seconds"} for row in found]


@pytest.mark.parametrize(
    ("algorithm", "model"),
    [("fedavg", "lenet"), *((name, "lenet_bn") for name in ("fedprox", "feddyn", "scaffold", "moon"))],
)
def test_same_bits_as_sequential(algorithm: str, model: str, tmp_path: Path) -> None:
    settings = {**SETTINGS, "rounds": 2, "algorithm": {"name": algorithm}, "model": {"name": model}}
    ours = fedftg.run(settings, out=tmp_path / "workers")
    reference = fedftg.run({**settings, "executor": {"name": "sequential"}}, out=tmp_path / "sequential")
    assert rows(tmp_path / "workers") == rows(tmp_path / "sequential")
    for part in ("params", "buffers", "server"):
        left, right = getattr(ours.state, part), getattr(reference.state, part)
        assert list(left) == list(right)
        assert all(torch.equal(left[name], right[name]) for name in right), part


def test_resumed_by_another_executor_gives_the_same(tmp_path: Path) -> None:
    settings = {**SETTINGS, "algorithm": {"name": "scaffold"}, "executor": {"name": "sequential"}}
    whole = fedftg.run(settings, out=tmp_path / "whole")
    fedftg.run({**settings, "rounds": 1}, out=tmp_path / "parts")
    overrides = ["rounds=3", "executor.name=workers", "executor.workers=2"]
    parts = fedftg.run(None, overrides=overrides, out=tmp_path / "parts", resume=True)
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    assert all(torch.equal(parts.state.params[name], whole.state.params[name]) for name in whole.state.params)


def test_a_client_that_raises_is_named_and_the_run_can_go_on(tmp_path: Path, plugin: str) -> None:
    with pytest.raises(ClientError, match="round 2, client 1, local training: ZeroDivisionError: by hand") as caught:
        fedftg.run(failing(plugin, "raise"), out=tmp_path / "run")
    assert "in loss" in caught.value.__notes__[0] if hasattr(caught.value, "__notes__") else True
    assert len(rows(tmp_path / "run")) == 1


def test_a_process_that_is_killed_is_named(tmp_path: Path, plugin: str) -> None:
    with pytest.raises(ClientError, match=r"round 2, client 1, local training: .*SIGKILL; out of memory\?"):
        fedftg.run(failing(plugin, "die"), out=tmp_path / "run")


def test_after_a_failure_the_executor_starts_anew(plugin: str) -> None:
    run = build.build(configs.from_mapping(failing(plugin, "die")))
    run.run_round(Progress())
    with pytest.raises(ClientError):
        run.run_round(Progress())
    assert run.state.round == 1
    tasks = list(run._tasks(1, [0, 2]))
    assert [result.client for result in run.executor.run(run.algorithm.local, tasks)] == [0, 2]
    run.executor.close()


def test_a_plugin_that_cannot_be_imported_there(tmp_path: Path, plugin: str) -> None:
    run = build.build(configs.from_mapping(failing(plugin, "nothing")))
    (tmp_path / f"{plugin}.py").unlink()
    with pytest.raises(ClientError, match=rf"round 1, client [01], start of a worker process: .*{plugin}"):
        run.run_round(Progress())
    run.executor.close()


def test_a_generator_that_is_closed_early_leaves_nothing_behind() -> None:
    run = build.build(fedftg.RunConfig(**{**SETTINGS, "cohort": {}}))
    whole = list(run.executor.run(run.algorithm.local, run._tasks(2, [0, 1, 2, 3])))
    started = run.executor.run(run.algorithm.local, run._tasks(1, [0, 1, 2, 3]))
    next(iter(started))
    started.close()  # type: ignore[attr-defined]
    again = list(run.executor.run(run.algorithm.local, run._tasks(2, [0, 1, 2, 3])))
    for left, right in zip(whole, again, strict=True):
        assert left.client == right.client
        assert all(torch.equal(left.params[name], right.params[name]) for name in left.params)
    run.executor.close()
    run.executor.close()


def test_an_algorithm_of_the_started_script_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedftg.algorithms.fedavg import FedAvgConfig

    class Local(FedAvgConfig):
        pass

    with pytest.raises(InputError, match=r"executor\.name=workers: .* put it into a module"):
        build.build(fedftg.RunConfig(**{**SETTINGS, "algorithm": Local()}))


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


FIVE_CLIENTS = [
    "threads=1", "rounds=3", "data.name=digits", "data.max_train=150", "partition.num_clients=5", "cohort.size=5",
    "model.name=lenet_bn", "local.epochs=1", "refiner.name=none",
]  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `FIVE_CLIENTS` that nothing interrupted, in one process."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    fedftg.run("default", overrides=[*FIVE_CLIENTS, "executor.name=sequential"], out=folder)
    return folder


@pytest.mark.skipif(not Path(f"/proc/self/task/{os.getpid()}/children").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_processes_end_with_the_parent(tmp_path: Path, plugin: str, whole: Path, how: signal.Signals) -> None:
    """Killed or interrupted in the middle of a client that takes minutes; then resumed to the same numbers."""
    settings = [*FIVE_CLIENTS, "executor.name=workers", "executor.workers=2", f'plugins=["{plugin}"]',
                f"algorithm.name={plugin}", "algorithm.do=wait"]  # fmt: skip
    options = [part for setting in settings for part in ("--set", setting)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "fedftg.cli", "run", "default", *options, "--out", "run"], cwd=tmp_path, env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # A shell that starts tests in the background has them, and what they start, ignore the signal.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "checkpoint" / "checkpoint.json").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    time.sleep(1)
    workers = children(process.pid)
    assert len(workers) == 2
    process.send_signal(how)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (-9 if how == signal.SIGKILL else 130), errors
    assert "Traceback" not in errors
    while any(alive(pid) for pid in workers):
        assert time.monotonic() < deadline, "a process outlived its parent"
        time.sleep(0.05)
    # What makes client 1 wait is part of the settings: taken out by hand, as no override may.
    config = tmp_path / "run" / "config.toml"
    config.write_text(config.read_text().replace('do = "wait"', 'do = "nothing"'))
    fedftg.run(None, out=tmp_path / "run", resume=True)
    assert rows(tmp_path / "run") == rows(whole)
