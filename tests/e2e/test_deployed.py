"""Models that are deployed and not sent: training is that without a refiner, and every way out gives that model."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fedftg as package
from fedftg import build, experiment
from fedftg.algorithms.averages import Averaged
from fedftg.algorithms.registry import REFINERS
from fedftg.config import apply, from_mapping
from fedftg.progress import Progress

Rows = list[dict[str, Any]]
Run = Callable[..., tuple[Any, Rows]]


@pytest.fixture
def settings(tiny_settings: list[str]) -> list[str]:
    return [*(one for one in tiny_settings if not one.startswith("refiner.")), "algorithm.name=scaffold"]


@pytest.fixture
def run(settings: list[str], tmp_path: Path, read_records: Callable[[Path], Rows]) -> Run:
    def call(name: str, *overrides: str) -> tuple[Any, Rows]:
        done = package.run("default", overrides=[*settings, *overrides], out=tmp_path / name)
        return done, read_records(tmp_path / name)

    return call


@pytest.mark.parametrize("name", [name for name in REFINERS if name != "none"])
def test_what_is_not_sent_cannot_harm_training(run: Run, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Also where nobody takes part in round 3: what clients receive stays, and what was deployed too."""
    draw = experiment.sampling.cohort
    monkeypatch.setattr(experiment.sampling, "cohort", lambda *given: [] if given[-1] == 3 else draw(*given))
    sizes = {"iterations": 2, "batch_size": 8, "generator_width": 4, "image_steps": 2, "pool_batches": 1}
    small = [f"refiner.{key}={size}" for key, size in sizes.items() if key in REFINERS[name].model_fields]
    _, plain = run("plain", "refiner.name=none", "partition.unlabelled_share=0.2")
    done, rows = run("run", f"refiner.name={name}", "refiner.broadcast=0", "partition.unlabelled_share=0.2", *small)
    for one, other in zip(plain, rows, strict=True):
        assert one["server"] == other["server"]
        for kind in ("selected", "all"):
            assert one["accuracy"][kind] == other["accuracy"][kind]
            assert one["loss"][kind] == other["loss"][kind]
    refined, selected = ([row["loss"][kind] for row in rows] for kind in ("refined", "selected"))
    assert refined[2] == refined[1] != selected[2]
    assert refined[3] != refined[1]
    assert done.summary["accuracy"]["refined"]["final"] == rows[-1]["accuracy"]["refined"]
    sent, deployed = done.state.params, done.state.model[0]
    assert any(not torch.equal(sent[key], deployed[key]) for key in sent)


def test_every_way_out_gives_the_deployed_model(run: Run, fedftg_command: Any, tmp_path: Path) -> None:
    done, _ = run("run", "refiner.name=all", "refiner.prior_tau=0.5")
    assert fedftg_command("export", "run", "--to", "model.safetensors", path=tmp_path).returncode == 0
    exported, deployed = load_file(tmp_path / "model.safetensors"), done.model.state_dict()
    params, buffers = done.state.model
    for key, value in {**params, **buffers}.items():
        assert torch.equal(exported[key], value), key
        assert torch.equal(deployed[key], value), key
    assert not torch.equal(exported[next(iter(params))], next(iter(done.state.params.values())))


def test_refining_waits_for_an_evaluation(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every third of four rounds, and the last; each evaluation is that of a run that refines in every round."""
    seen: list[int] = []
    refine = Averaged.refine
    monkeypatch.setattr(Averaged, "refine", lambda self, *given: seen.append(given[0].round) or refine(self, *given))
    _, rows = run("run", "refiner.name=ema", "evaluation.every=3")
    assert seen == [2, 3]  # rounds done before
    _, always = run("always", "refiner.name=ema", "refiner.when=round")
    assert len(seen) == 6
    assert [row["loss"].get("refined") for row in rows] == [None, None, *(row["loss"]["refined"] for row in always[2:])]


def test_all_without_the_accuracy_of_all(run: Run) -> None:
    _, tracked = run("tracked", "refiner.name=all")
    _, untracked = run("untracked", "refiner.name=all", "evaluation.track_all=false")
    assert [row["loss"]["refined"] for row in tracked] == [row["loss"]["refined"] for row in untracked]
    assert "all" not in untracked[-1]["loss"]


def test_a_model_that_is_not_finite_leaves_the_average(settings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Round 2 deploys the aggregate, round 3 the average that it would have had."""
    config = from_mapping(apply({}, [*settings, "refiner.name=ema", "refiner.ema_decay=0.5"]))
    refine = Averaged.refine

    def spoiled(self: Averaged, state: Any, *given: Any) -> Any:
        after, metrics = refine(self, state, *given)
        bad = {name: value + float("inf") for name, value in after.params.items()}
        return (replace(after, params=bad) if state.round == 1 else after), metrics

    whole, broken = build.build(config), build.build(config)
    for number in (1, 2, 3):
        expected = whole.run_round(Progress())
        monkeypatch.setattr(Averaged, "refine", spoiled)
        row = broken.run_round(Progress())
        monkeypatch.undo()
        assert row["accuracy"]["selected"] == expected["accuracy"]["selected"]
        if number == 2:
            assert "fine-tuning was not finite" in row["rolled_back"]
            assert not broken.state.deployed
            assert row["loss"]["refined"] == row["loss"]["selected"] != expected["loss"]["refined"]
    assert row["loss"]["refined"] == expected["loss"]["refined"] != expected["loss"]["selected"]


def test_a_server_rule_may_deploy_another_model_than_it_sends(settings: list[str]) -> None:
    """The refiner's aggregate is what the rule deploys, and its weight moves what the rule sends."""

    class Leading:
        """Sends the aggregate plus 1."""

        def __init__(self, rule: Any) -> None:
            self.rule, self.aggregate = rule, dict[str, torch.Tensor]()
            self.message = rule.message

        def step(self, state: Any, results: Any) -> Any:
            assert not state.deployed
            after, metrics = self.rule.step(state, results)
            self.aggregate = after.params
            sent = {name: value + 1 for name, value in after.params.items()}
            return replace(after, params=sent, deployed={**after.params, **after.buffers}), metrics

    for refiner in (["refiner.name=wima", "refiner.window=1"], ["refiner.name=none"]):
        made = build.build(from_mapping(apply({}, [*settings, *refiner])))
        rule = Leading(made.algorithm.server)
        made.algorithm = replace(made.algorithm, server=rule)  # type: ignore[arg-type]
        for _ in range(2):
            row = made.run_round(Progress())
            for name, value in rule.aggregate.items():
                assert torch.equal(made.state.model[0][name], value)
                assert torch.equal(made.state.params[name], value + 1)
            assert row["loss"]["refined"] == row["loss"]["selected"]


@pytest.mark.parametrize("refiner", [["refiner.name=all", "refiner.prior_tau=0.5"], ["refiner.name=wima"]])
def test_four_rounds_are_two_and_two(
    run: Run, read_records: Callable[[Path], Rows], tmp_path: Path, refiner: list[str]
) -> None:
    whole, rows = run("whole", *refiner)
    run("half", *refiner, "rounds=2")
    rest = package.run(None, overrides=["rounds=4"], out=tmp_path / "half", resume=True)
    assert read_records(tmp_path / "half") == rows
    for part in ("params", "refiner", "deployed"):
        ours, theirs = getattr(rest.state, part), getattr(whole.state, part)
        assert list(ours) == list(theirs)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), part
