"""FedAvg.

McMahan, Moore, Ramage, Hampson, Agüera y Arcas, "Communication-Efficient Learning of Deep Networks from Decentralized
Data", AISTATS 2017, https://arxiv.org/abs/1602.05629.

    client:  w_k = SGD on L_k from w
    server:  w <- sum_k (n_k / sum_j n_j) w_k

Differences from paper and public code: none in the update. BatchNorm's running statistics are averaged like parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from fedftg import params as tree
from fedftg.algorithms.base import (
    Algorithm,
    AlgorithmConfig,
    Batch,
    ClientResult,
    LocalTask,
    Memory,
    Metrics,
    ServerState,
)
from fedftg.models.functional import FunctionalModel
from fedftg.params import Params

Weighting = Literal["samples", "uniform"]


def aggregate(results: Sequence[ClientResult], weighting: Weighting) -> tuple[Params, Params]:
    """The mean of the clients' parameters and of their buffers, in the order of client ids.

    ``samples`` weights by the number of samples, ``uniform`` equally; a client without samples never counts.
    """
    ordered = sorted(results, key=lambda result: result.client)
    weights = [float(r.num_samples if weighting == "samples" else r.num_samples > 0) for r in ordered]
    params = tree.weighted_mean([result.params for result in ordered], weights)
    buffers = tree.weighted_mean([result.buffers for result in ordered], weights)
    return params, buffers


def update_norm(before: ServerState, params: Params) -> Metrics:
    """The metric that every server rule logs: how far the global parameters moved in this round."""
    return {"update_norm": tree.norm(tree.sub(params, before.params))}


class PlainLocal:
    """Cross-entropy and plain gradients; the other local rules compose it for the parts that they leave as they are."""

    reads_round = False

    def upload_like(self, params: Params) -> Params:  # noqa: ARG002
        """Nothing besides the model."""
        return {}

    def init_memory(self, params: Params, buffers: Params) -> Memory:  # noqa: ARG002
        """Nothing is remembered."""
        return {}

    def loss(self, model: FunctionalModel, params: Params, buffers: Params, batch: Batch, task: LocalTask) -> Tensor:  # noqa: ARG002
        """Mean cross-entropy of the batch, in training mode."""
        return F.cross_entropy(model(params, buffers, batch.images, train=True), batch.labels)

    def correct(self, grads: Params, params: Params, task: LocalTask) -> Params:  # noqa: ARG002
        """The gradients as they are."""
        return grads

    def finish(self, params: Params, buffers: Params, task: LocalTask, num_steps: int) -> tuple[Params, Memory]:  # noqa: ARG002
        """Nothing besides the model."""
        return {}, {}


@dataclass(frozen=True)
class AverageServer:
    """The new global model is the mean of the clients' models."""

    weighting: Weighting = "samples"

    def init(self, params: Params) -> Memory:  # noqa: ARG002
        """Nothing is remembered."""
        return {}

    def message(self, state: ServerState) -> Params:  # noqa: ARG002
        """Nothing besides the model."""
        return {}

    def step(self, state: ServerState, results: Sequence[ClientResult]) -> tuple[ServerState, Metrics]:
        """``w <- sum_k weight_k w_k``."""
        params, buffers = aggregate(results, self.weighting)
        return replace(state, params=params, buffers=buffers), update_norm(state, params)


class FedAvgConfig(AlgorithmConfig):
    """``algorithm.name = "fedavg"``."""

    name: Literal["fedavg"] = "fedavg"
    weighting: Weighting = Field(default="samples", description="samples: by data size (the paper); uniform: equally")

    def build(self, num_clients: int) -> Algorithm:  # noqa: ARG002
        """FedAvg does not depend on the number of clients."""
        return Algorithm(PlainLocal(), AverageServer(self.weighting))
