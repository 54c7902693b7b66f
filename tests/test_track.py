"""Each tracker holds every round once, read back by its own reader."""

import importlib.util
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedftg import cli, loop, track
from fedftg import config as configs
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
    status, until, rows = "", time.monotonic() + 20, []
    while not any(row.HasField("exit") for row in rows) and time.monotonic() < until:  # its process writes in its time
        rows = [Record.FromString(data) for data in log_records(sessions[-1].read_bytes()[7:], start=7)]
    for found in rows:
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


def test_scalars() -> None:
    """Lists, the number of the round, null and NaN are left out."""
    found = track.scalars(record(2) | {"rolled_back": "not finite"})
    assert found == {
        "seconds/local": 1.0, "accuracy/refined": 0.25, "client_accuracy/refined/mean": 0.25, "rejected": 1.0,
    }  # fmt: skip
    assert track.scalars({"round": 1, "clients": [2]}) == {"rejected": 0.0}


class Kept:
    """A tracker in memory, which fails at some round."""

    def __init__(self, fails_at: int = 0) -> None:
        self.fails_at = fails_at
        self.steps: list[int] = []
        self.ids: list[str] = []
        self.done: list[bool] = []

    def __call__(self, folder: Path, id: str, config: dict[str, Any]) -> track.Tracker:
        self.ids.append(id)
        return max(self.steps, default=-1), self.log, self.done.append

    def log(self, scalars: dict[str, float], step: int) -> None:
        if step == self.fails_at:
            raise ConnectionError("server is gone\nand more")
        self.steps.append(step)


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Kept:
    made = Kept()
    monkeypatch.setitem(track.TRACKERS, "wandb", made)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    return made


def test_a_failing_tracker_costs_no_training(kept: Kept, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept.fails_at = 2
    config = TINY | {"track": {"to": "wandb"}}
    assert loop.run(config, out=tmp_path / "a").summary["rounds"] == 3
    (line,) = (entry.getMessage() for entry in caplog.records)
    assert line.startswith("wandb is left out: ConnectionError: server is gone; ")
    assert line.endswith(f"fedftg track {tmp_path / 'a'} --to wandb")
    assert (kept.steps, kept.done) == ([1], [])
    kept.fails_at = 0
    track.Sink(tmp_path / "a", ["wandb", "wandb"], refuse).close()
    assert (kept.steps, kept.done) == ([1, 2, 3], [True])


def test_tracking_is_no_part_of_the_experiment(kept: Kept, tmp_path: Path) -> None:
    """A run that was stopped is resumed with a tracker, which receives all rounds; the records are the same."""
    plain = loop.run(TINY, out=tmp_path / "plain")
    short = loop.run(TINY | {"rounds": 1}, out=tmp_path / "a")
    resumed = loop.run(TINY, overrides=["track.to=wandb"], out=short.folder, resume=True)
    assert (kept.steps, kept.done) == ([1, 2, 3], [True])
    with_times, without = (
        [{**row, "seconds": None} for row in records.read(run.folder / "rounds.jsonl")] for run in (resumed, plain)
    )
    assert with_times == without
    assert loop.same_run(configs.from_mapping(TINY), configs.from_mapping(TINY | {"track": {"to": ["mlflow"]}}))


def test_an_interrupted_run_is_not_done(kept: Kept, tmp_path: Path) -> None:
    track.Sink(run_folder(tmp_path / "a", rounds=3), ["wandb"], refuse).close()
    assert (kept.steps, kept.done) == ([1, 2, 3], [False])


def test_a_run_started_anew_is_another(kept: Kept, tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "a", rounds=1)
    for started in ("2026-01-01", "2026-01-01", "2026-01-02"):
        records.write_json(folder / "environment.json", {"sessions": [{"started": started}, {"started": "now"}]})
        track.Sink(folder, ["wandb"], refuse).close()
    assert kept.ids[0] == kept.ids[1] != kept.ids[2]


def test_a_missing_package_is_one_line_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"^track.to: mlflow is not installed; pip install mlflow, or leave it out$"):
        loop.run(TINY, overrides=["track.to=mlflow"], out=tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_settings() -> None:
    for given, expected in (("wandb", ("wandb",)), ('["wandb", "mlflow"]', ("wandb", "mlflow"))):
        assert configs.from_mapping(configs.apply({}, [f"track.to={given}"])).track.to == expected
    with pytest.raises(InputError, match="must be 'tensorboard', 'mlflow', 'wandb' or 'trackio', got 'excel'"):
        configs.from_mapping({"track": {"to": "excel"}})


def test_command(kept: Kept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run_folder(tmp_path / "a", rounds=2)
    monkeypatch.setitem(track.TRACKERS, "mlflow", other := Kept(fails_at=1))
    command = ["track", str(folder), "--to", "wandb", "--to", "mlflow"]
    with pytest.raises(InputError, match="mlflow is left out: ConnectionError"):
        cli.cli.main(command, standalone_mode=False)
    assert kept.steps == [1, 2]
    other.fails_at = 0
    cli.cli.main([*command, "--to", "wandb"], standalone_mode=False)
    assert kept.steps == other.steps == [1, 2]
