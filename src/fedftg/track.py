"""Sends the rounds of a run to TensorBoard, MLflow, Weights & Biases and trackio.

A tracker is asked for the last round that it holds, so nothing is lost or sent twice when a run is resumed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from fedftg.errors import InputError, first_line, flat
from fedftg.rundir import records
from fedftg.rundir.folder import RunFolder
from fedftg.rundir.records import Record

Name = Literal["tensorboard", "mlflow", "wandb", "trackio"]
Tracker = tuple[int, Callable[[dict[str, float], int], Any], Callable[[bool], Any]]
"""The last round that a tracker holds of a run (0 or less: none); sends a round; ends, with whether it was the last."""


class TrackConfig(BaseModel):
    """Where each round is sent while the run proceeds; no part of the experiment."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    to: Annotated[tuple[Name, ...], BeforeValidator(lambda to: [to] if isinstance(to, str) else to)] = Field(
        default=(), description="where each round is sent: tensorboard, mlflow, wandb, trackio"
    )


def _tensorboard(folder: Path, id: str, config: dict[str, Any]) -> Tracker:
    """Writes event files to ``track/tensorboard``; a round is one event, flushed."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams.summary_v2 import hparams_pb
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(folder / "track" / "tensorboard")
    kept = EventAccumulator(str(writer.log_dir)).Reload()
    last = kept.Scalars("rejected")[-1].step if "rejected" in kept.Tags()["scalars"] else 0
    plain = {key: value if isinstance(value, int | float) else str(value) for key, value in config.items()}
    writer.file_writer.add_summary(hparams_pb(plain, trial_id=id))

    def log(scalars: dict[str, float], step: int) -> None:
        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        writer.file_writer.add_summary(Summary(value=values), step)
        writer.flush()

    return last, log, lambda _: writer.close()


def _mlflow(folder: Path, id: str, config: dict[str, Any]) -> Tracker:
    """Logs to experiment MLFLOW_EXPERIMENT_NAME or ``fedftg`` of MLFLOW_TRACKING_URI or MLflow's own store."""
    import mlflow

    client = mlflow.MlflowClient()
    experiment = mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", "fedftg")).experiment_id
    runs = client.search_runs([experiment], f"tags.fedftg_run = '{id}'")
    made = runs[0] if runs else client.create_run(experiment, run_name=folder.name, tags={"fedftg_run": id})
    run, params = made.info.run_id, [] if runs else list(config.items())
    client.update_run(run, "RUNNING")
    for start in range(0, len(params), 100):  # MLflow's limit
        mlflow.log_params(dict(params[start : start + 100]), run_id=run)
    return (
        max((metric.step for metric in client.get_metric_history(run, "rejected")), default=0),
        lambda scalars, step: mlflow.log_metrics(scalars, step, run_id=run),
        lambda done: client.set_terminated(run, "FINISHED" if done else "KILLED"),
    )


def _wandb(folder: Path, id: str, config: dict[str, Any]) -> Tracker:
    """Logs to project WANDB_PROJECT or ``fedftg``; its files are in WANDB_DIR or ``wandb`` of the run folder.

    Offline it cannot say what it holds: each session then has all rounds, and only the last one is to be synced.
    """
    import wandb

    project, place = os.environ.get("WANDB_PROJECT", "fedftg"), os.environ.get("WANDB_DIR", folder)
    new: Any = {"id": id, "name": folder.name, "config": config, "resume": "allow", "reinit": "create_new"}
    run = wandb.init(project=project, dir=place, **new)
    return run.step - 1, partial(run.log, commit=True), lambda done: run.finish(exit_code=int(not done))


def _trackio(folder: Path, id: str, config: dict[str, Any]) -> Tracker:
    """Logs to project ``fedftg`` in TRACKIO_DIR, TRACKIO_SPACE_ID or trackio's own cache."""
    import trackio

    new: Any = {"config": config, "resume": "allow", "auto_log_gpu": False, "auto_log_cpu": False}
    run = trackio.init("fedftg", f"{folder.name}-{id}", **new)
    return run._next_step - 1, run.log, lambda _: trackio.finish()


TRACKERS = {"tensorboard": _tensorboard, "mlflow": _mlflow, "wandb": _wandb, "trackio": _trackio}


def check(names: Sequence[str]) -> None:
    """Raises InputError where the package of a tracker is missing."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise InputError(f"track.to: {name} is not installed; pip install {name}, or leave it out")


def scalars(record: Record) -> dict[str, float]:
    """Returns the finite numbers of a round as ``{"accuracy/refined": 0.9, ...}``, and how many were rejected."""
    found = {key.replace(".", "/"): value for key, value in flat(record).items() if key != "round"}
    found["rejected"] = len(record.get("rejected", ()))
    return {key: float(v) for key, v in found.items() if isinstance(v, int | float) and math.isfinite(v)}


class Sink:
    """Sends the rounds on record, then those given to `log`, to each tracker that lacks them.

    A tracker that fails is left out and ``note`` receives a line: no training is lost to a server's failure.
    """

    def __init__(self, folder: Path, names: Sequence[str], note: Callable[[str], object]) -> None:
        self._folder, self._note, self._last = RunFolder(folder), note, 0
        self._config = self._folder.read_config()
        self._trackers: dict[str, Tracker] = {}
        for name in dict.fromkeys(names):
            with self._left_out(name):
                # A run that is started anew in the same place is another one.
                started = records.read_json(self._folder.environment_file)["sessions"][0].get("started")
                id = hashlib.sha256(f"{folder.resolve()} {started}".encode()).hexdigest()[:8]
                self._trackers[name] = TRACKERS[name](folder.resolve(), id, flat(self._config))
        for record in records.read(self._folder.rounds_file) if names else ():
            self.log(record)

    @contextmanager
    def _left_out(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._trackers.pop(name, None)
            later = f"fedftg track {self._folder.path} --to {name}"
            self._note(f"{name} is left out: {first_line(error)}; what it lacks is sent by: {later}")

    def log(self, record: Record) -> None:
        """Sends a round."""
        self._last = record["round"]
        for name, (held, log, _) in list(self._trackers.items()):
            with self._left_out(name):
                if self._last > held:
                    log(scalars(record), self._last)

    def close(self) -> None:
        """Closes all trackers."""
        for name, (_, _, close) in list(self._trackers.items()):
            with self._left_out(name):
                close(self._last == self._config["rounds"])
