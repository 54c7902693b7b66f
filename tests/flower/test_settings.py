"""What may be set, who must agree, and one line for what is wrong."""

from collections.abc import Callable
from typing import Any

from fedftg import config as configs
from fedftg.flower.settings import agreement


def test_what_server_and_nodes_must_have_in_common(federation: Callable[..., Any]) -> None:
    fed = federation()
    mine = agreement(fed.config)
    for change in ("rounds=99", "device=cpu", "threads=4", "evaluation.every=5", "name=other", "checkpoint.every=3",
                   "executor.name=sequential", "data.root=elsewhere"):  # fmt: skip
        assert agreement(configs.load(fed.recipe, [change])) == mine, change
    for change in ("seed=4", "local.lr=0.3", "partition.alpha=1.0", "model.name=cnn", "algorithm.name=moon",
                   "data.max_train=100", "cohort.size=2"):  # fmt: skip
        assert agreement(configs.load(fed.recipe, [change])) != mine, change
