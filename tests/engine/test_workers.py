"""Processes give the numbers of the sequential executor with one thread, bit for bit, and end with their parent."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fedftg
from fedftg import build
from fedftg import config as configs
from fedftg.algorithms.fedavg import FedAvgConfig
from fedftg.algorithms.registry import ALGORITHMS
from fedftg.data.dataset import ImageDataset
from fedftg.engine import workers
from fedftg.engine.workers import WorkersExecutor
from fedftg.errors import ClientError, InputError
from fedftg.models.registry import ModelConfig
from fedftg.progress import Progress
from fedftg.rundir import records

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
SEQUENTIAL = {"executor": {"name": "sequential"}}

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
            if self.do == "refuse":
                raise fedftg.InputError("not with this data")
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
    name = f"workers_plugin_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(PLUGIN.replace("NAME", name))
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    ALGORITHMS.pop(name, None)


def failing(plugin: str, do: str) -> dict[str, Any]:
    return {**SETTINGS, "plugins": [plugin], "cohort": {}, "algorithm": {"name": plugin, "do": do}}


def rows(folder: Path) -> list[dict[str, Any]]:
    found = records.read(folder / "rounds.jsonl")
    return [{key: value for key, value in row.items() if key != "seconds"} for row in found]


def assert_same_runs(ours: fedftg.Run, theirs: fedftg.Run) -> None:
    assert rows(ours.folder) == rows(theirs.folder)
    for part in ("params", "buffers", "server", "deployed"):
        left, right = getattr(ours.state, part), getattr(theirs.state, part)
        assert list(left) == list(right)
        assert all(torch.equal(left[name], right[name]) for name in left), part


@pytest.mark.parametrize(
    ("algorithm", "model", "loss"),
    [
        ("fedavg", "lenet", "cross_entropy"),
        *((name, "lenet_bn", "cross_entropy") for name in ("fedprox", "feddyn", "scaffold", "moon")),
        ("moon", "lenet_bn", "balanced_softmax"),
        ("fedacg", "lenet_bn", "fedrs"),
        ("fedgen", "lenet_bn", "balanced_softmax"),
    ],
)
def test_same_bits_as_sequential(algorithm: str, model: str, loss: str, tmp_path: Path) -> None:
    settings = {**SETTINGS, "rounds": 2, "algorithm": {"name": algorithm}, "model": {"name": model}}
    settings["local"] = {**SETTINGS["local"], "loss": loss}
    ours = fedftg.run(settings, out=tmp_path / "workers")
    assert_same_runs(ours, fedftg.run({**settings, **SEQUENTIAL}, out=tmp_path / "sequential"))


def test_same_bits_from_memory_mapped_images_and_with_noise(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.save(tmp_path / "images.npy", rng.integers(0, 256, (160, 3, 8, 8), dtype=np.uint8))
    images, labels = np.load(tmp_path / "images.npy", mmap_mode="c"), np.arange(160) % 4
    dataset = ImageDataset.from_tensors(torch.from_numpy(images), labels, images[:20], labels[:20], augment="flip_crop")
    settings = {**SETTINGS, "rounds": 1, "partition": {"num_clients": 5, "feature_noise": 0.3}}
    ours = fedftg.run(settings, out=tmp_path / "workers", dataset=dataset)
    assert_same_runs(ours, fedftg.run({**settings, **SEQUENTIAL}, out=tmp_path / "sequential", dataset=dataset))


def test_a_client_that_fails_is_named(tmp_path: Path, plugin: str) -> None:
    """With the cause's class and, in a note, the process's traceback; an InputError passes through."""
    with pytest.raises(ClientError, match="round 2, client 1, local training: ZeroDivisionError: by hand") as caught:
        fedftg.run(failing(plugin, "raise"), out=tmp_path / "raise")
    assert "in loss" in caught.value.__notes__[0]
    assert len(rows(tmp_path / "raise")) == 1
    with pytest.raises(InputError, match="not with this data"):
        fedftg.run(failing(plugin, "refuse"), out=tmp_path / "refuse")


def test_a_process_that_is_killed_is_named_and_replaced(plugin: str) -> None:
    run = build.build(configs.from_mapping(failing(plugin, "die")))
    run.run_round(Progress())
    with pytest.raises(ClientError, match=r"round 2, client 1, local training: .*SIGKILL; out of memory\?"):
        run.run_round(Progress())
    assert run.state.round == 1
    tasks = list(run._tasks(1, [0, 2]))
    assert [result.client for result in run.executor.run(run.algorithm.local, tasks)] == [0, 2]
    run.executor.close()


def test_what_other_processes_cannot_train() -> None:
    class Local(FedAvgConfig):
        pass

    run = build.build(fedftg.RunConfig(**SETTINGS))

    def refusal(**changed: Any) -> str:
        with pytest.raises(InputError) as caught:
            WorkersExecutor(replace(run.executor._recipe, **changed), run.data, run.config.local, 2)  # type: ignore
        return str(caught.value)

    advice = "; put it into a module, or take executor.name=sequential"
    assert refusal(algorithm=Local()).endswith(f"Local is defined in the started script{advice}")
    assert f"model __main__:Own is defined in the started script{advice}" in refusal(
        model=ModelConfig(name="__main__:Own")
    )
    run.data.device = torch.device("meta")  # type: ignore[misc]
    assert "needs device=cpu, got meta" in refusal()


def test_sent_tensors_keep_strides_and_identity() -> None:
    image = torch.randn(3, 8, 8, 1).permute(0, 3, 1, 2)
    tensors = {
        "image": image,
        "turned": torch.randn(4, 5).t().requires_grad_(),
        "gaps": torch.arange(12.0)[::2],
        "part": torch.arange(12.0)[3:9],
        "count": torch.tensor(7),
        "none": torch.empty(0, 3),
        "half": torch.randn(3, dtype=torch.bfloat16),
        "flags": torch.tensor([True, False]),
    }
    ours, theirs = multiprocessing.Pipe()
    with workers._shared_file() as file:
        workers._Channel(ours, file).send({"a": tensors, "b": image})
        found = workers._Channel(theirs, file).receive()
    for name, tensor in tensors.items():
        assert torch.equal(found["a"][name], tensor), name
        assert found["a"][name].dtype == tensor.dtype
        assert name == "gaps" or found["a"][name].stride() == tensor.stride()
    assert found["b"] is found["a"]["image"]


def test_a_script_without_a_guard_runs_once(tmp_path: Path) -> None:
    script = (
        f"import fedftg\nprint('started')\nfedftg.run(fedftg.RunConfig(**{SETTINGS!r}), out='run')\nprint('done')\n"
    )
    (tmp_path / "script.py").write_text(script)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert (done.stdout, done.stderr) == ("started\ndone\n", "")


def children(pid: int) -> dict[int, str]:
    """Command lines by process."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return {int(child): Path(f"/proc/{child}/cmdline").read_text() for child in found}


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


SHARED_MEMORY = Path("/dev/shm")
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
    before = set(SHARED_MEMORY.glob("*"))
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
    started = children(process.pid)
    assert sum("spawn_main" in command for command in started.values()) == 2
    process.send_signal(how)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (-9 if how == signal.SIGKILL else 130), errors
    assert "Traceback" not in errors
    while any(alive(pid) for pid in started):
        assert time.monotonic() < deadline, "a process outlived its parent"
        time.sleep(0.05)
    assert not [path for path in SHARED_MEMORY.glob("*") if path not in before]
    # What makes client 1 wait is part of the settings: taken out by hand, as no override may.
    config = tmp_path / "run" / "config.toml"
    config.write_text(config.read_text().replace('do = "wait"', 'do = "nothing"'))
    fedftg.run(None, out=tmp_path / "run", resume=True)
    assert rows(tmp_path / "run") == rows(whole)
