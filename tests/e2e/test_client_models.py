"""Clients with models of their own: one round, nothing is averaged, a fresh student learns from all of them."""

from pathlib import Path
from typing import Any

import pytest

import fedftg
from fedftg import build
from fedftg.config import from_mapping
from fedftg.errors import InputError
from fedftg.progress import Progress

SETTINGS: dict[str, Any] = {
    "name": "mixed",
    "rounds": 1,
    "data": {"name": "digits", "max_train": 600},
    "partition": {"law": "iid", "num_clients": 3, "unlabelled_share": 0.3},
    "model": {"name": "lenet_gn", "clients": ["lenet_gn", "lenet_bn"]},
    "refiner": {"name": "feddf", "start": "fresh", "iterations": 60, "batch_size": 32},
    "local": {"epochs": 8, "lr": 0.05},
    "evaluation": {"ensemble": True},
}


def test_a_fresh_student_learns_from_models_of_two_kinds(tmp_path: Path) -> None:
    run = fedftg.run(SETTINGS, out=tmp_path / "run")
    accuracy = {kind: value["final"] for kind, value in run.summary["accuracy"].items()}
    assert "all" not in accuracy
    assert accuracy["selected"] < 0.3  # the initial weights
    assert accuracy["refined"] > accuracy["selected"] + 0.2
    assert accuracy["ensemble"] > accuracy["selected"] + 0.2


def test_client_k_has_the_kth_model_over_and_over() -> None:
    experiment = build.build(from_mapping(SETTINGS))
    tasks = list(experiment._tasks(1, [0, 1, 2]))
    results = list(experiment.executor.run(experiment.algorithm.local, tasks))
    assert [any("running_mean" in name for name in result.buffers) for result in results] == [False, True, False]
    before = experiment.state.params
    experiment.run_round(Progress())
    assert experiment.state.params.keys() == before.keys()


@pytest.mark.parametrize("change", [{"rounds": 2}, {"algorithm": {"name": "scaffold"}}, {"refiner": {"name": "none"}}])
def test_what_cannot_be_averaged_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"model.clients cannot be averaged: they need rounds = 1"):
        from_mapping({**SETTINGS, **change})
