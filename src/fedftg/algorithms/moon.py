"""MOON.

Li, He, Song, "Model-Contrastive Federated Learning", CVPR 2021, https://arxiv.org/abs/2103.16257.

    client:  SGD on L_k + mu * l_con,
             l_con = -log( e^{s(z, z_glob)/tau} / (e^{s(z, z_glob)/tau} + e^{s(z, z_prev)/tau}) )
    server:  as FedAvg

s is the cosine similarity; z, z_glob and z_prev enter the last linear layer of the model in training, of the received
global model and of the client's previous upload, both in evaluation mode. Differences: docs/algorithms/moon.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from fedftg import params as tree
from fedftg.algorithms.base import Algorithm, AlgorithmConfig, Batch, LocalTask, Memory
from fedftg.algorithms.fedavg import AverageServer, PlainLocal, Weighting
from fedftg.models.functional import FunctionalModel
from fedftg.params import Params

_PARAMS, _BUFFERS = "params/", "buffers/"


def contrastive(current: Tensor, positive: Tensor, negative: Tensor, temperature: float) -> Tensor:
    """Returns MOON's model-contrastive loss, mean over the batch; all three representations are ``(B, F)``.

    Equal similarities give ``log 2``. The lower the temperature, the more a small difference counts.
    """
    to_positive = F.cosine_similarity(current, positive, dim=1)
    to_negative = F.cosine_similarity(current, negative, dim=1)
    return F.softplus((to_negative - to_positive) / temperature).mean()


@dataclass(frozen=True)
class ContrastiveLocal(PlainLocal):
    """Draws the representation to the global model's and away from the client's previous one."""

    mu: float
    temperature: float

    def init_memory(self, params: Params, buffers: Params) -> Memory:
        """Returns the initial global model, which stands for the previous upload."""
        return {**tree.prefixed(params, _PARAMS), **tree.prefixed(buffers, _BUFFERS)}

    def loss(self, model: FunctionalModel, params: Params, buffers: Params, batch: Batch, task: LocalTask) -> Tensor:
        """Returns cross-entropy plus ``mu`` times the contrastive term; ``mu = 0`` gives FedAvg, bit for bit."""
        logits, current = model.with_features(params, buffers, batch.images, train=True)
        with torch.no_grad():
            _, to_global = model.with_features(task.params, task.buffers, batch.images, train=False)
            previous = tree.unprefixed(task.memory, _PARAMS), tree.unprefixed(task.memory, _BUFFERS)
            _, to_previous = model.with_features(*previous, batch.images, train=False)
        term = contrastive(current, to_global, to_previous, self.temperature)
        return F.cross_entropy(logits, batch.labels) + self.mu * term

    def finish(self, params: Params, buffers: Params, task: LocalTask, num_steps: int) -> tuple[Params, Memory]:  # noqa: ARG002
        """Remembers the trained model."""
        return {}, {**tree.prefixed(params, _PARAMS), **tree.prefixed(buffers, _BUFFERS)}


class MoonConfig(AlgorithmConfig):
    """``algorithm.name = "moon"``: pulls clients' features to the global model's, away from their last (CVPR 2021)."""

    name: Literal["moon"] = "moon"
    mu: float = Field(default=0.5, ge=0, description="0 gives FedAvg (FedFTG paper: 0.5)")
    temperature: float = Field(default=5.0, gt=0, description="low values sharpen the contrast (FedFTG paper: 5)")
    weighting: Weighting = "samples"

    def build(self, num_clients: int) -> Algorithm:  # noqa: ARG002
        """Returns the rules, which do not depend on the number of clients."""
        return Algorithm(ContrastiveLocal(self.mu, self.temperature), AverageServer(self.weighting))
