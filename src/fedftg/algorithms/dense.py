"""DENSE as a refiner: a generator fills a pool of images, on which the student learns from the ensemble.

Zhang, Chen, Li, Lyu, Wu, Ding, Shen, Wu, "DENSE: Data-Free One-Shot Federated Learning", NeurIPS 2022,
https://arxiv.org/abs/2112.12371.

    min_theta E [ CE(D(x), y) - lambda_adv m KL(D(x) || student(x)) ] + lambda_bn L_bn
    x = G(z, y; theta),  m = 1 where D and the student predict different classes, else 0

D is the ensemble: the softmax of the mean of the teachers' logits. What differs from paper and public code:
docs/algorithms/dense.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from fedftg.algorithms.base import RefinerContext
from fedftg.algorithms.distilled import ONE_STEP_STUDENT, DistilledConfig
from fedftg.distill import losses
from fedftg.distill.config import GeneratorConfig
from fedftg.distill.descent import descend
from fedftg.distill.generator import Generator, new_generator
from fedftg.distill.images import Call, NoiseAndLabels, generated, noise_and_labels
from fedftg.seeds import drawn_seed

Losses = Callable[[Float[Tensor, "B C"], Float[Tensor, "B C"], Int[Tensor, " B"]], dict[str, Float[Tensor, ""]]]
"""``(log-probabilities of the ensemble, logits of the student, labels) -> fidelity and discrepancy``."""


class DenseSettings(GeneratorConfig, DistilledConfig):
    """What DENSE and Co-Boosting have in common."""

    paper: ClassVar[Mapping[str, Any]] = {
        **ONE_STEP_STUDENT,
        "iterations": 50,
        "student_weight_decay": 0.0,
        "temperature": 4.0,
        "pool_size": 6400,
        "pool_batches": 40,
        "generator_steps": 30,
        "generator_lr": 0.001,
        "noise_dim": 256,
    }
    lambda_adv: float = Field(
        default=0.5, ge=0, description="weight of the discrepancy of ensemble and student, which the generator raises"
    )
    lambda_bn: float = Field(
        default=1.0, ge=0, description="weight of L_bn (DeepInversion); teachers without BatchNorm count 0"
    )


class DenseConfig(DenseSettings):
    """``refiner.name = "dense"``: trains a generator that fills a pool of images, for one round (NeurIPS 2022)."""

    name: Literal["dense"] = "dense"

    def images(self, context: RefinerContext, rng: torch.Generator) -> DenseImages:  # noqa: ARG002
        """Returns images of new generators."""
        return DenseImages(self, context, boundary_losses)


def boundary_losses(
    ensemble: Float[Tensor, "B C"], student: Float[Tensor, "B C"], labels: Int[Tensor, " B"]
) -> dict[str, Float[Tensor, ""]]:
    """Returns ``fidelity``, the cross-entropy, and ``discrepancy``, the KL where the two disagree: means, in nats."""
    disagree = ensemble.argmax(dim=-1) != student.argmax(dim=-1)
    discrepancy = losses.kl_divergence(ensemble[None], student)[0]
    return {"fidelity": F.nll_loss(ensemble, labels), "discrepancy": (disagree * discrepancy).mean()}


class DenseImages:
    """Images of a conditional generator, which starts anew for each batch and is trained on that batch alone."""

    _generator: Generator

    def __init__(self, config: DenseSettings, context: RefinerContext, losses: Losses) -> None:
        self._config, self._context, self._losses = config, context, losses
        self._weights = {"fidelity": 1.0, "discrepancy": -config.lambda_adv, "batchnorm": config.lambda_bn}

    def start(self, call: Call) -> Sequence[NoiseAndLabels]:
        """Returns noise and labels of each iteration; every class that some teacher saw is drawn equally often."""
        config = self._config
        return noise_and_labels(call, config.batch_size, config.noise_dim, "uniform", self._context.device)

    def improve(self, call: Call, draw: NoiseAndLabels) -> dict[str, Tensor]:
        """Takes ``generator_steps`` of a new generator on one batch; returns the mean of each term of their loss."""
        config, context = self._config, self._context
        seed = drawn_seed(call.rng)
        self._generator = new_generator(config, context.num_classes, context.image_shape, seed).to(context.device)
        rate = config.generator_lr * call.lr_scale
        optimizer = torch.optim.Adam(self._generator.parameters(), lr=rate, betas=(0.5, 0.999))
        steps, weights = config.generator_steps, self._weights
        return descend(optimizer, steps, weights, lambda: self._terms(call, self._images(draw), draw[1]))

    @torch.no_grad()
    def make(self, draw: NoiseAndLabels) -> tuple[Float[Tensor, "B D H W"], Int[Tensor, " B"]]:
        """Returns images with the batch statistics that the generator is trained with, and their labels."""
        return self._images(draw), draw[1]

    def _images(self, draw: NoiseAndLabels) -> Float[Tensor, "B D H W"]:
        return generated(self._config, self._generator, *draw)

    def _terms(self, call: Call, images: Float[Tensor, "B D H W"], labels: Int[Tensor, " B"]) -> dict[str, Tensor]:
        ensemble = call.ensemble
        logits, batchnorm = ensemble.with_batchnorm(images, labels, 0, len(ensemble), self._config.lambda_bn)
        predicted = ensemble.log_probabilities(logits, labels)
        return {**self._losses(predicted, call.predict(images), labels), **batchnorm}
