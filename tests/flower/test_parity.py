"""A run on nodes equals the simulator's, byte for byte: records but for seconds, and the final state."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fedftg.engine.evaluate import correct_held_back
from fedftg.flower import client as node
from fedftg.flower import wire
from fedftg.models.functional import ComputedModel


def assert_same(federation: Any, one: Any, other: Any, names: tuple[str, str] = ("served", "simulated")) -> None:
    assert federation.rows(names[0]) == federation.rows(names[1])
    for part in ("params", "buffers", "server", "refiner", "deployed"):
        left, right = getattr(one.state, part), getattr(other.state, part)
        assert list(left) == list(right)
        assert all(torch.equal(left[name], right[name]) for name in left), part


@pytest.mark.parametrize("refiner", ["none", "fedftg"])
@pytest.mark.parametrize(
    "algorithm", ["fedavg", "fedprox", "feddyn", "scaffold", "moon", "fedavgm", "fedacg", "fedvarp", "fedgen"]
)
def test_three_rounds_are_those_of_the_simulator(federation: Callable[..., Any], algorithm: str, refiner: str) -> None:
    fed = federation(f"algorithm.name={algorithm}", f"refiner.name={refiner}")
    run = fed.serve(fed.grid())
    assert_same(fed, run, fed.simulate())
    assert len(fed.rows("served")) == 3
    moved = [row["server"]["update_norm"] for row in fed.rows("served")]
    assert all(norm > 0 for norm in moved)
    assert "rejected" not in str(fed.rows("served"))


@pytest.mark.parametrize(
    "overrides",
    [
        ("partition.feature_noise=0.3", "partition.law=quantity"),
        ("cohort.probability=0.5", "checkpoint.every=2"),
        ("evaluation.track_all=false", "local.momentum=0.9"),
        ("local.loss=balanced_softmax", "local.loss_tau=0.5"),
        ("local.loss=fedrs", "evaluation.ensemble=true"),
        ("refiner.name=feddf", "refiner.proxy.name=digits", "refiner.batch_size=8", "partition.unlabelled_share=0.2"),
        ("partition.test_share=0.3", "evaluation.every=2", "partition.feature_noise=0.3"),
    ],
)
def test_other_settings_too(federation: Callable[..., Any], overrides: tuple[str, ...]) -> None:
    fed = federation("algorithm.name=feddyn", "refiner.name=none", *overrides)
    assert_same(fed, fed.serve(fed.grid()), fed.simulate())


@pytest.mark.parametrize("refiner", ["leaves", "dense"])
def test_one_round_of_all_clients(federation: Callable[..., Any], refiner: str) -> None:
    few = [f"refiner.{name}=1" for name in ("iterations", "pool_batches")]
    few += (
        ["refiner.image_steps=1"] if refiner == "leaves" else ["refiner.generator_steps=1", "refiner.generator_width=4"]
    )
    fed = federation("rounds=1", "cohort.probability=1", "evaluation.ensemble=true", f"refiner.name={refiner}", *few)
    run = fed.serve(fed.grid())
    assert_same(fed, run, fed.simulate())
    (row,) = fed.rows("served")
    assert row["loss"]["refined"] != row["loss"]["selected"]
    assert {"ensemble", "best_client"} < set(row["accuracy"])


DEPLOYED = [
    ("refiner.name=head_prior",),
    ("refiner.name=all", "refiner.prior_tau=0.5", "evaluation.track_all=false"),
    ("refiner.name=ema", "evaluation.every=2", "partition.test_share=0.3"),
    ("refiner.name=wima", "refiner.window=2"),
    ("refiner.name=fedftg", "refiner.broadcast=0", "refiner.average=all"),
]


@pytest.mark.parametrize("overrides", DEPLOYED, ids=lambda given: given[0])
def test_a_model_that_is_deployed_and_not_sent(federation: Callable[..., Any], overrides: tuple[str, ...]) -> None:
    fed = federation(*overrides)
    run = fed.serve(fed.grid())
    assert_same(fed, run, fed.simulate())
    assert run.state.deployed
    row = fed.rows("served")[-1]
    assert row["loss"]["refined"] != row["loss"]["selected"]


def test_what_clients_hold_back_is_measured_on_their_nodes(federation: Callable[..., Any]) -> None:
    fed = federation("partition.test_share=0.3", "evaluation.every=2", "refiner.absent_weight=0")
    run = fed.serve(fed.grid(), **{"server-data": "none"})
    simulated = fed.simulate()
    assert "client_accuracy" not in fed.rows("served")[0]  # round 1 is not evaluated
    for mine, theirs in zip(fed.rows("served")[1:], fed.rows("simulated")[1:], strict=True):
        assert mine["accuracy"] == {}
        assert set(mine["client_accuracy"]) == {"selected", "all", "refined"}
        assert mine["client_accuracy"] == theirs["client_accuracy"]
        assert "not_measured" not in mine
    assert run.summary["client_accuracy"] == simulated.summary["client_accuracy"]
    assert 0 < run.summary["client_accuracy"]["refined"]["mean"] < 1


def test_nodes_evaluate_in_the_precision_of_local_training(federation: Callable[..., Any], monkeypatch: Any) -> None:
    used: list[Any] = []

    def spy(model: Any, *rest: Any) -> Any:
        used.append(model)
        return correct_held_back(model, *rest)

    monkeypatch.setattr(node, "correct_held_back", spy)
    fed = federation("partition.test_share=0.3", "local.memory_format=channels_last", "rounds=1")
    run = fed.serve(fed.grid())
    assert used
    assert all(isinstance(model, ComputedModel) for model in used)
    assert run.summary["client_accuracy"] == fed.simulate().summary["client_accuracy"]


def test_nodes_with_data_of_their_own(federation: Callable[..., Any], tmp_path: Any) -> None:
    """Each node's folder holds only its own images; accuracy is not measured, since the server has no data."""
    import numpy as np
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = (images.reshape(-1, 8, 8) * 15).astype(np.uint8)
    for client in range(2):
        mine = slice(client * 100, client * 100 + 60 + 10 * client)
        np.savez(tmp_path / f"own{client}.npz", train_images=images[mine], train_labels=labels[mine],
                 test_images=images[:10], test_labels=labels[:10])  # fmt: skip
    fed = federation("data.name=arrays", "partition.num_clients=2", "cohort.size=2")
    brighter = np.clip(images[:100] * 2, 0, 255).astype(np.uint8)
    np.savez(tmp_path / "own0.npz", train_images=brighter[:60], train_labels=labels[:60],
             test_images=images[:10], test_labels=labels[:10])  # fmt: skip
    sent: list[Any] = []

    def grid() -> Any:
        made = fed.grid(())
        for client in range(2):
            own = {"data-root": str(tmp_path / f"own{client}.npz"), "own-data": True}
            made.join(client + 1, fed.node(client, **own))
        made.before_push = lambda messages: sent.extend(
            wire.Order.of(m.content).mean for m in messages if m.metadata.message_type == "train"
        )
        return made

    run = fed.serve(grid(), **{"server-data": "none"})
    row = fed.rows("served")[-1]
    assert row["accuracy"] == {}
    assert "client_accuracy" not in row
    assert row["clients"] == [0, 1]
    assert "rejected" not in row
    assert run.summary["rounds"] == 3
    # Both normalise by the mean of all images, and go on to do so when the run is resumed.
    pixels = (brighter[:60].mean() * 60 + images[100:170].mean() * 70) / 130 / 255
    assert sent == [sent[0]] * 6
    assert sent[0] == pytest.approx((pixels,))
    fed.serve(grid(), "resumed", **{"server-data": "none", "set": "rounds=2"})
    resumed = fed.serve(grid(), "resumed", resume=True, **{"server-data": "none"})
    assert sent == [sent[0]] * 12
    assert_same(fed, resumed, run, ("resumed", "served"))
