"""FedAvg.

McMahan, Moore, Ramage, Hampson, Agüera y Arcas, "Communication-Efficient Learning of Deep Networks from Decentralized
Data", AISTATS 2017, https://arxiv.org/abs/1602.05629.

    client:  w_k = SGD on L_k from w
    server:  w <- sum_k (n_k / sum_j n_j) w_k

BatchNorm's running statistics are averaged like parameters.
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
    """Returns the mean of the clients' parameters and of their buffers, in the order of client ids.

    ``samples`` weights by the number of samples, ``uniform`` equally; a client without samples never counts.
    """
    ordered = sorted(results, key=lambda result: result.client)
    weights = [float(r.num_samples if weighting == "samples" else r.num_samples > 0) for r in ordered]
    params = tree.weighted_mean([result.params for result in ordered], weights)
    return params, tree.weighted_mean([result.buffers for result in ordered], weights)


def update_norm(before: ServerState, params: Params) -> Metrics:
    """Returns the metric that every server rule logs: how far the global parameters moved in this round."""
    return {"update_norm": tree.norm(tree.sub(params, before.params))}


class PlainLocal:
    """Plain SGD on the cross-entropy; the other local rules inherit from it what they leave as it is."""

    reads_round = False

    def upload_like(self, params: Params) -> Params:  # noqa: ARG002
        """Returns nothing besides the model."""
        return {}

    def init_memory(self, params: Params, buffers: Params) -> Memory:  # noqa: ARG002
        """Remembers nothing."""
        return {}

    def loss(self, model: FunctionalModel, params: Params, buffers: Params, batch: Batch, task: LocalTask) -> Tensor:  # noqa: ARG002
        """Returns the mean cross-entropy of the batch, in training mode."""
        return F.cross_entropy(model(params, buffers, batch.images, train=True), batch.labels)

    def correct(self, grads: Params, params: Params, task: LocalTask) -> Params:  # noqa: ARG002
        """Returns the gradients as they are."""
        return grads

    def finish(self, params: Params, buffers: Params, task: LocalTask, num_steps: int) -> tuple[Params, Memory]:  # noqa: ARG002
        """Returns nothing besides the model."""
        return {}, {}


@dataclass(frozen=True)
class AverageServer:
    """The new global model is the mean of the clients' models."""

    weighting: Weighting = "samples"

    def init(self, params: Params) -> Memory:  # noqa: ARG002
        """Remembers nothing."""
        return {}

    def message(self, state: ServerState) -> Params:  # noqa: ARG002
        """Returns nothing besides the model."""
        return {}

    def step(self, state: ServerState, results: Sequence[ClientResult]) -> tuple[ServerState, Metrics]:
        """Averages: ``w <- sum_k weight_k w_k``."""
        params, buffers = aggregate(results, self.weighting)
        return replace(state, params=params, buffers=buffers), update_norm(state, params)


class FedAvgConfig(AlgorithmConfig):
    """``algorithm.name = "fedavg"``: averages the clients' models, weighted by their samples (AISTATS 2017)."""

    name: Literal["fedavg"] = "fedavg"
    weighting: Weighting = Field(default="samples", description="samples: by data size (the paper); uniform: equally")

    def build(self, num_clients: int) -> Algorithm:  # noqa: ARG002
        """Returns the rules, which do not depend on the number of clients."""
        return Algorithm(PlainLocal(), AverageServer(self.weighting))
