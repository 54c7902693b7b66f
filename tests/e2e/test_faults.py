"""Clients and fine-tunings that go wrong are named, recorded, and cost nothing."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fedftg
from fedftg import build, experiment
from fedftg.algorithms.base import ClientResult, ServerState
from fedftg.engine import executors
from fedftg.params import Params
from fedftg.progress import Progress
from fedftg.rundir import records

SETTINGS = {
    "rounds": 3,
    "threads": 1,
    "data": {"name": "digits", "max_train": 120, "max_test": 40},
    "partition": {"num_clients": 4, "law": "iid"},
    "model": {"name": "lenet"},
    "local": {"epochs": 1},
    "refiner": {"name": "fedftg", "iterations": 1, "batch_size": 4, "generator_width": 4},
}


def spoil(monkeypatch: pytest.MonkeyPatch, clients: Sequence[int], round: int) -> None:
    train = executors.train

    def spoiled(model, rule, task, *rest):  # type: ignore[no-untyped-def]
        result = train(model, rule, task, *rest)
        if task.client in clients and task.round == round:
            next(iter(result.params.values()))[0] = float("nan")
        return result

    monkeypatch.setattr(executors, "train", spoiled)


def test_non_finite_update_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Client 2 sends NaN in round 2: the round is that of the other three, and client 2 keeps its memory."""
    config = fedftg.RunConfig(**{**SETTINGS, "algorithm": {"name": "scaffold"}})
    by_hand = build.build(config)
    by_hand.run_round(Progress())
    memory = by_hand.clients.memory(2)
    monkeypatch.setattr(experiment.sampling, "cohort", lambda *_: [0, 1, 3])
    by_hand.run_round(Progress())
    monkeypatch.undo()

    spoil(monkeypatch, [2], 2)
    spoiled = build.build(config)
    first, second = (spoiled.run_round(Progress()) for _ in range(2))
    name = next(iter(spoiled.state.params))
    assert "rejected" not in first
    assert second["rejected"] == [{"client": 2, "reason": f"non-finite parameter {name}"}]
    assert second["clients"] == [0, 1, 2, 3]
    for part in ("params", "server", "refiner"):
        ours, theirs = getattr(spoiled.state, part), getattr(by_hand.state, part)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), part
    assert all(torch.equal(spoiled.clients.memory(2)[key], memory[key]) for key in memory)
    run = fedftg.run(config, out=tmp_path / "run")
    assert run.summary["rejected_updates"] == 1


def test_round_without_usable_update_keeps_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, range(4), 1)
    fedftg.run({**SETTINGS, "rounds": 1}, out=tmp_path / "run")
    config = fedftg.RunConfig(**{**SETTINGS, "rounds": 1})
    (row,) = records.read(tmp_path / "run" / "rounds.jsonl")
    assert len(row["rejected"]) == 4
    assert "no client update was usable" in row["rolled_back"]
    assert row["accuracy"]["selected"] == row["accuracy"]["refined"] == row["accuracy"]["all"]
    initial = build.build(config).state.params
    kept = fedftg.run(config, out=tmp_path / "run", resume=True).state.params
    assert all(torch.equal(kept[name], initial[name]) for name in initial)


def test_non_finite_fine_tuning_is_rolled_back(tmp_path: Path) -> None:
    """A student rate of 1e30 overflows; the aggregate and the generator of before are kept, in every round."""
    settings = {**SETTINGS, "refiner": {**SETTINGS["refiner"], "lacking": 0, "student_lr": 1e30, "student_steps": 20}}
    run = fedftg.run(settings, out=tmp_path / "run")
    rows = records.read(tmp_path / "run" / "rounds.jsonl")
    assert all("rolled back to the aggregate" in row["rolled_back"] for row in rows)
    assert all(row["accuracy"]["refined"] == row["accuracy"]["selected"] for row in rows)
    initial = build.build(fedftg.RunConfig(**settings)).state.refiner
    assert all(torch.equal(run.state.refiner[name], initial[name]) for name in initial)
    base = fedftg.run({**SETTINGS, "refiner": {"name": "none"}}, out=tmp_path / "base")
    assert all(torch.equal(run.state.params[name], base.state.params[name]) for name in base.state.params)


def test_non_finite_aggregate_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedftg.algorithms import fedavg

    step = fedavg.AverageServer.step

    def overflow(self, state: ServerState, results: Sequence[ClientResult]):  # type: ignore[no-untyped-def]
        after, metrics = step(self, state, results)
        bad: Params = {name: tensor * float("inf") for name, tensor in after.params.items()}
        return (replace(after, params=bad) if state.round == 1 else after), metrics

    monkeypatch.setattr(fedavg.AverageServer, "step", overflow)
    config = fedftg.RunConfig(**{**SETTINGS, "algorithm": {"name": "moon"}})
    watched = build.build(config)
    watched.run_round(Progress())
    before, memories = watched.state, [watched.clients.memory(client) for client in range(4)]
    watched.run_round(Progress())
    assert all(torch.equal(watched.state.params[name], before.params[name]) for name in before.params)
    for client, memory in enumerate(memories):
        assert all(torch.equal(watched.clients.memory(client)[name], value) for name, value in memory.items())
    run = fedftg.run(config, out=tmp_path / "run")
    rows = records.read(tmp_path / "run" / "rounds.jsonl")
    assert "the aggregate was not finite" in rows[1]["rolled_back"]
    assert "rolled_back" not in rows[2]
    assert all(torch.isfinite(tensor).all() for tensor in run.state.params.values())
