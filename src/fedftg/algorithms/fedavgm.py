"""FedAvgM.

Hsu, Qi, Brown, "Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification", 2019,
https://arxiv.org/abs/1909.06335.

    client:  as FedAvg
    server:  m <- beta m + (mean_k w_k - w);  w <- w + server_lr m
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pydantic import Field

from fedftg import params as tree
from fedftg.algorithms.base import Algorithm, AlgorithmConfig, ClientResult, Memory, Metrics, ServerState
from fedftg.algorithms.fedavg import AverageServer, PlainLocal, Weighting, aggregate, update_norm
from fedftg.params import Params


@dataclass(frozen=True)
class MomentumServer(AverageServer):
    """Momentum over the rounds' mean updates; buffers are averaged."""

    beta: float = 0.9
    server_lr: float = 1.0

    def init(self, params: Params) -> Memory:
        """Returns ``m = 0``, so round 1 is FedAvg."""
        return tree.zeros_like(params)

    def step(self, state: ServerState, results: Sequence[ClientResult]) -> tuple[ServerState, Metrics]:
        """Makes the step, written so that ``beta = 0`` and rate 1 give the mean bit for bit."""
        mean, buffers = aggregate(results, self.weighting)
        update = tree.sub(mean, state.params)
        momentum = tree.add(update, state.server, scale=self.beta)
        params = tree.add(
            tree.add(mean, update, scale=self.server_lr - 1), state.server, scale=self.server_lr * self.beta
        )
        metrics = {**update_norm(state, params), "momentum_norm": tree.norm(momentum)}
        return replace(state, params=params, buffers=buffers, server=momentum), metrics


class FedAvgMConfig(AlgorithmConfig):
    """``algorithm.name = "fedavgm"``: is FedAvg with momentum on the server (2019)."""

    name: Literal["fedavgm"] = "fedavgm"
    beta: float = Field(
        default=0.9, ge=0, lt=1, description="server momentum; 0 gives FedAvg (the paper tries 0.7 to 0.997)"
    )
    server_lr: float = Field(default=1.0, gt=0, description="factor on the momentum in a step (paper: 1)")
    weighting: Weighting = "samples"

    def build(self, num_clients: int) -> Algorithm:  # noqa: ARG002
        """Returns the rules, which do not depend on the number of clients."""
        return Algorithm(PlainLocal(), MomentumServer(self.weighting, self.beta, self.server_lr))
