"""What may be set, who must agree, and one line for what is wrong."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fedftg
from fedftg import config as configs
from fedftg.flower.settings import agreement, app_settings, node_settings, on_node, on_server


def test_wrong_settings_are_one_line() -> None:
    for read, given, message in (
        (app_settings, {"wait-second": 3}, "did you mean"),
        (app_settings, {"min-clients": 0}, "must be >= 1, got 0"),
        (app_settings, {"lost-memory": "guess"}, "'refuse' or 'reset'"),
        (node_settings, {"partition-id": "three"}, "node config.partition-id must be a whole number"),
    ):
        with pytest.raises(fedftg.InputError, match=message) as caught:
            read(given)
        assert "\n" not in str(caught.value)
    assert node_settings({"partition-id": 3, "num-partitions": 10}).partition_id == 3  # others' keys are theirs


def test_a_node_has_its_own_places_and_the_runs_settings(federation: Callable[..., Any], tmp_path: Path) -> None:
    fed = federation()
    app = app_settings({"set": "rounds=9 local.lr=0.2"})
    node = node_settings({"partition-id": 0, "data-root": "/data/a b", "device": "cpu", "threads": 2, "cache": "none"})
    config = on_node(fed.recipe, app, node)
    assert config.data.root == Path("/data/a b")
    assert (config.rounds, config.local.lr, config.device, config.threads) == (9, 0.2, "cpu", 2)
    assert config.data.cache == "none"
    server = on_server(fed.recipe, app_settings({"set": "rounds=9 local.lr=0.2", "server-data": "/server"}))
    assert server.data.root == Path("/server")
    assert agreement(server) == agreement(config)


def test_what_server_and_nodes_must_have_in_common(federation: Callable[..., Any]) -> None:
    fed = federation()
    mine = agreement(fed.config)
    for change in ("rounds=99", "device=cpu", "threads=4", "evaluation.every=5", "name=other", "checkpoint.every=3",
                   "executor.name=sequential", "data.root=elsewhere"):  # fmt: skip
        assert agreement(configs.load(fed.recipe, [change])) == mine, change
    for change in ("seed=4", "local.lr=0.3", "partition.alpha=1.0", "model.name=cnn", "algorithm.name=moon",
                   "data.max_train=100", "cohort.size=2"):  # fmt: skip
        assert agreement(configs.load(fed.recipe, [change])) != mine, change
