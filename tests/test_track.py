"""Each tracker holds every round once, read back by its own reader."""

import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedftg import config as configs
from fedftg import loop, track
from fedftg.config import RunConfig
from fedftg.errors import InputError
from fedftg.rundir import records
from fedftg.rundir.folder import RunFolder

TINY = {
    "name": "tiny", "rounds": 3, "threads": 1, "data": {"name": "digits", "max_train": 100, "max_test": 40},
    "partition": {"num_clients": 4}, "cohort": {"size": 2}, "model": {"name": "lenet_gn"},
    "local": {"epochs": 1, "batch_size": 20}, "refiner": {"name": "none"},
}  # fmt: skip
Steps = dict[str, list[tuple[int, float]]]
"""Steps and values of each scalar."""


def record(number: int) -> dict[str, Any]:
    return {
        "round": number,
        "clients": [0, 3],
        "rejected": [{"client": 3, "reason": "late"}],
        "seconds": {"local": 0.5 * number},
        "accuracy": {"selected": None, "refined": 0.125 * number},
        "client_accuracy": {"refined": {"mean": 0.25}},
        "server": {"local_loss": float("nan")},
    }


def run_folder(path: Path, rounds: int) -> Path:
    folder = RunFolder(path)
    folder.create(RunConfig(name="x", rounds=4).to_toml(), {"started": "2026-01-01"}, {})
    for number in range(1, rounds + 1):
        records.append(folder.rounds_file, record(number))
    return path


def read_tensorboard(folder: Path) -> tuple[Steps, dict[str, Any], str]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import metadata

    found = EventAccumulator(str(folder / "track" / "tensorboard")).Reload()
    steps = {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}
    content = found.SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
    given = metadata.parse_session_start_info_plugin_data(content).hparams
    return steps, {key: value.number_value for key, value in given.items()}, ""


def read_mlflow(folder: Path) -> tuple[Steps, dict[str, Any], str]:
    from mlflow import MlflowClient

    client = MlflowClient()
    experiment = client.get_experiment_by_name("fedftg")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    histories = {key: client.get_metric_history(run.info.run_id, key) for key in run.data.metrics}
    steps = {key: [(metric.step, metric.value) for metric in history] for key, history in histories.items()}
    assert run.info.run_name == folder.name
    return steps, {key: float(value) for key, value in run.data.params.items() if key == "local.lr"}, run.info.status


def log_records(data: bytes, start: int) -> Iterator[bytes]:
    """The records of a file in the format of LevelDB's log, which W&B writes; its own reader is not in Python."""
    place, parts = 0, b""
    while place + 7 <= len(data):
        left = 32768 - (start + place) % 32768
        if left < 7:
            place += left
            continue
        size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        parts += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def read_wandb(folder: Path) -> tuple[Steps, dict[str, Any], str]:
    from wandb.proto.wandb_internal_pb2 import Record

    sessions = sorted((folder / "wandb").glob("offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime_ns)
    assert len({file.name for file in sessions}) == 1, "one id"
    steps: Steps = {}
    config: dict[str, Any] = {}
    status = ""
    for data in log_records(sessions[-1].read_bytes()[7:], start=7):
        found = Record.FromString(data)
        items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in found.history.item}
        for key in items.keys() - {"_step", "_timestamp", "_runtime"}:
            steps.setdefault(key, []).append((found.history.step.num or items["_step"], items[key]))
        config |= {item.key: json.loads(item.value_json) for item in found.run.config.update}
        if found.HasField("exit"):
            status = str(found.exit.exit_code)
    return steps, config, status


def read_trackio(folder: Path) -> tuple[Steps, dict[str, Any], str]:
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    (run,) = trackio.Api().runs("fedftg")
    steps: Steps = {}
    for entry in SQLiteStorage.get_logs("fedftg", run.name, run_id=run.id):
        for key in entry.keys() - {"timestamp", "step"}:
            steps.setdefault(key, []).append((entry["step"], entry[key]))
    return steps, dict(run.config or {}), ""


READERS: dict[str, Callable[[Path], tuple[Steps, dict[str, Any], str]]] = {
    "tensorboard": read_tensorboard, "mlflow": read_mlflow, "wandb": read_wandb, "trackio": read_trackio,
}  # fmt: skip


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stores of all trackers, without a network."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    if importlib.util.find_spec("trackio"):
        monkeypatch.setattr("trackio.utils.TRACKIO_DIR", tmp_path / "trackio")
        monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path / "trackio")
    return tmp_path


def refuse(text: str) -> None:
    raise AssertionError(text)


@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")  # MLflow, of SQLAlchemy
@pytest.mark.parametrize("name", READERS)
def test_every_round_once(place: Path, name: str) -> None:
    """Of a run that was sent in part, was killed after round 2, whose checkpoint is of round 1, and was resumed."""
    pytest.importorskip(name)
    folder = run_folder(place / "a", rounds=2)
    track.Sink(folder, [name], refuse).close()
    records.cut(folder / "rounds.jsonl", 1)
    sink = track.Sink(folder, [name], refuse)
    for number in (2, 3, 4):
        sink.log(record(number))
    sink.close()
    steps, config, status = READERS[name](folder)
    assert steps["accuracy/refined"] == [(number, 0.125 * number) for number in (1, 2, 3, 4)]
    assert steps["seconds/local"] == [(number, 0.5 * number) for number in (1, 2, 3, 4)]
    assert steps["client_accuracy/refined/mean"] == [(number, 0.25) for number in (1, 2, 3, 4)]
    assert steps["rejected"] == [(number, 1.0) for number in (1, 2, 3, 4)]
    assert steps.keys() == {"accuracy/refined", "seconds/local", "client_accuracy/refined/mean", "rejected"}
    assert config["local.lr"] == RunConfig().local.lr
    assert status in ("", "FINISHED", "0")
