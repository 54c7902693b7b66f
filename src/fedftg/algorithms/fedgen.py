"""FedGen.

Zhu, Hong, Zhou, "Data-Free Knowledge Distillation for Heterogeneous Federated Learning", ICML 2021,
https://arxiv.org/abs/2105.10056.

    server:  w <- as FedAvg;  min_G E_{y ~ p(y), e ~ N(0, I)} sum_k a_k(y) CE(h_k(G(e, y)), y)
    client:  SGD on L_k + weight E_{y ~ p(y), e ~ N(0, I)} CE(h(G(e, y)), y)

G makes features, what enters the last linear layer h; p(y) are the classes of the last round's clients. Differences:
docs/algorithms/fedgen.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

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
from fedftg.algorithms.fedavg import AverageServer, PlainLocal, Weighting
from fedftg.distill.labels import ensemble_weights
from fedftg.distill.losses import fidelity
from fedftg.errors import InputError
from fedftg.models.functional import FunctionalModel
from fedftg.params import Params

_COUNTS = "class_counts"


def head(params: Params) -> str:
    """Returns the name of the last linear layer's weight ``(C, F)``: the last matrix among the parameters."""
    names = [name for name, value in params.items() if value.ndim == 2]
    if not names:
        raise InputError("fedgen needs a model with a trainable nn.Linear at its end, and this one has none")
    return names[-1]


def predict(params: Params, features: Tensor) -> Tensor:
    """Returns the last layer's logits ``(B, C)`` of features ``(B, F)``."""
    weight = head(params)
    return F.linear(features, params[weight], params.get(weight.removesuffix("weight") + "bias"))


def generate(generator: Params, noise: Tensor, labels: Tensor) -> Tensor:
    """Returns features ``(B, F)`` of noise ``(B, Z)`` and labels ``(B,)``: one hidden layer with ReLU."""
    classes = generator["hidden.weight"].shape[1] - noise.shape[1]
    inputs = torch.cat([noise, F.one_hot(labels, classes).to(noise)], dim=1)
    hidden = F.linear(inputs, generator["hidden.weight"], generator["hidden.bias"]).relu()
    return F.linear(hidden, generator["out.weight"], generator["out.bias"])


@dataclass(frozen=True)
class GeneratedLocal(PlainLocal):
    """Trains the last layer on generated features too; in the first round there are none."""

    weight: float
    noise_dim: int
    draws = True

    def loss(self, model: FunctionalModel, params: Params, buffers: Params, batch: Batch, task: LocalTask) -> Tensor:
        """Returns cross-entropy plus ``weight`` times that of as many generated features; weight 0 gives FedAvg."""
        loss = super().loss(model, params, buffers, batch, task)
        counts = task.message.get(_COUNTS)
        if not self.weight or counts is None or not bool(counts.any()):
            return loss
        labels = torch.multinomial(counts.cpu(), len(batch.labels), replacement=True).to(batch.labels)
        noise = torch.randn(len(labels), self.noise_dim).to(batch.images)
        generated = generate(task.message, noise, labels)
        return loss + self.weight * F.cross_entropy(predict(params, generated), labels)


@dataclass(frozen=True)
class GeneratorServer(AverageServer):
    """Averages, then trains the generator on the clients' last layers; it lives on the server and is sent to all."""

    noise_dim: int = 32
    hidden: int = 256
    steps: int = 50
    batch_size: int = 128
    lr: float = 1e-3

    def init(self, params: Params) -> Memory:
        """Returns an untrained generator, the same for every run, and no samples of any class."""
        classes, features = params[head(params)].shape
        rng = torch.Generator().manual_seed(0)

        def uniform(*shape: int, inputs: int) -> Tensor:  # as nn.Linear
            return ((2 * torch.rand(shape, generator=rng) - 1) / math.sqrt(inputs)).to(params[head(params)])

        wide = self.noise_dim + classes
        return {
            "hidden.weight": uniform(self.hidden, wide, inputs=wide),
            "hidden.bias": uniform(self.hidden, inputs=wide),
            "out.weight": uniform(features, self.hidden, inputs=self.hidden),
            "out.bias": uniform(features, inputs=self.hidden),
            _COUNTS: torch.zeros(classes).to(params[head(params)]),
        }

    def message(self, state: ServerState) -> Params:
        """Returns the generator and the classes of the last round's clients."""
        return state.server

    def step(self, state: ServerState, results: Sequence[ClientResult]) -> tuple[ServerState, Metrics]:
        """Averages the models and improves the generator; the metric ``generator_loss`` is its last loss."""
        after, metrics = super().step(state, results)
        ordered = sorted((r for r in results if r.num_samples), key=lambda result: result.client)
        generator, loss = self._trained(state, ordered)
        return replace(after, server=generator), {**metrics, "generator_loss": loss}

    @torch.enable_grad()
    def _trained(self, state: ServerState, results: Sequence[ClientResult]) -> tuple[Memory, float]:
        counts = torch.stack([result.class_counts for result in results]).double().cpu()
        weights, rng = ensemble_weights(counts), torch.Generator().manual_seed(state.round)
        leaves = {n: value.clone().requires_grad_() for n, value in state.server.items() if n != _COUNTS}
        like = leaves["out.bias"]
        optimizer = torch.optim.Adam(leaves.values(), lr=self.lr)
        loss = torch.zeros(())
        for _ in range(self.steps):
            labels = torch.multinomial(counts.sum(dim=0), self.batch_size, replacement=True, generator=rng)
            noise = torch.randn(self.batch_size, self.noise_dim, generator=rng).to(like)
            features = generate(leaves, noise, labels.to(like.device))
            logits = torch.stack([predict(result.params, features) for result in results])
            loss = fidelity(logits, labels.to(like.device), weights[:, labels].to(like))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        trained = {name: value.detach() for name, value in leaves.items()}
        return {**trained, _COUNTS: counts.sum(dim=0).to(like.detach())}, float(loss.detach())


class FedGenConfig(AlgorithmConfig):
    """``algorithm.name = "fedgen"``: clients train on features of the server's generator too (ICML 2021)."""

    name: Literal["fedgen"] = "fedgen"
    weight: float = Field(default=1.0, ge=0, description="of the generated features' loss; 0 gives FedAvg (paper: 1)")
    noise_dim: int = Field(default=32, ge=1, description="length of the noise e")
    hidden: int = Field(default=256, ge=1, description="width of the generator's hidden layer")
    generator_steps: int = Field(default=50, ge=1, description="steps of the generator's Adam in a round")
    generator_batch: int = Field(default=128, ge=1, description="features in a step of the generator")
    generator_lr: float = Field(default=1e-3, gt=0, description="rate of the generator's Adam")
    weighting: Weighting = "samples"

    def build(self, num_clients: int) -> Algorithm:  # noqa: ARG002
        """Returns the rules, which do not depend on the number of clients."""
        server = GeneratorServer(
            self.weighting, self.noise_dim, self.hidden, self.generator_steps, self.generator_batch, self.generator_lr
        )
        return Algorithm(GeneratedLocal(self.weight, self.noise_dim), server)
