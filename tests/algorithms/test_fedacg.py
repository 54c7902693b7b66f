"""FedACG deploys the mean and sends another model."""

from pathlib import Path

import torch

import fedftg
from fedftg.build import build
from fedftg.config import from_mapping
from fedftg.progress import Progress
from fedftg.rundir import records

SETTINGS = {
    "rounds": 3,
    "threads": 1,
    "data": {"name": "digits", "max_train": 150, "max_test": 40},
    "partition": {"num_clients": 5},
    "cohort": {"size": 3},
    "model": {"name": "lenet_bn"},
    "local": {"epochs": 1, "batch_size": 20},
    "algorithm": {"name": "fedacg", "momentum": 0.5},
    "executor": {"name": "sequential"},
}


def test_refiners_start_from_the_deployed_model(tmp_path: Path) -> None:
    """The mean of the last aggregate alone is that aggregate, and clients receive 0.5 m more."""
    alone = fedftg.run({**SETTINGS, "refiner": {"name": "none"}}, out=tmp_path / "alone")
    refined = fedftg.run({**SETTINGS, "refiner": {"name": "wima", "window": 1}}, out=tmp_path / "wima")
    for run in (alone, refined):
        for row in records.read(run.folder / "rounds.jsonl"):
            assert row["accuracy"]["refined"] == row["accuracy"]["selected"]
        mean, _ = run.state.model
        for name, sent in run.state.params.items():
            assert torch.equal(run.model.state_dict()[name], mean[name])
            assert torch.equal(sent, mean[name] + 0.5 * run.state.server[name])
        assert all(torch.equal(alone.state.params[name], sent) for name, sent in run.state.params.items())


def test_before_the_first_evaluation_the_mean_of_the_round_is_deployed() -> None:
    settings = {**SETTINGS, "refiner": {"name": "wima"}, "evaluation": {"every": 3}}
    experiment = build(from_mapping(settings))
    for _ in range(2):
        experiment.run_round(Progress())
    sent, momentum = experiment.state.params, experiment.state.server
    for name, mean in experiment.state.model[0].items():
        torch.testing.assert_close(mean, sent[name] - 0.5 * momentum[name])
