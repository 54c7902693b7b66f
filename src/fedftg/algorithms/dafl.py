"""DAFL as a refiner: a generator whose images the ensemble of the clients takes for its own data.

Chen, Wang, Xu, Yang, Liu, Shi, Xu, Xu, Tian, "Data-Free Learning of Student Networks", ICCV 2019,
https://arxiv.org/abs/1904.01186.

    min_theta E_z [ CE(D(x), argmax D(x)) - lambda_activation |f(x)| ] - lambda_entropy H(E_z D(x)),  x = G(z; theta)

D is the ensemble, f the features before the last layer. What differs from the paper: docs/algorithms/dafl.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from fedftg.algorithms.base import RefinerContext
from fedftg.algorithms.distilled import ONE_STEP_STUDENT, DistilledConfig
from fedftg.distill.config import GeneratorConfig
from fedftg.distill.descent import descend
from fedftg.distill.generator import Generator, new_generator
from fedftg.distill.images import Call, generated
from fedftg.distill.teachers import Ensemble
from fedftg.seeds import drawn_seed


class DaflConfig(GeneratorConfig, DistilledConfig):
    """``refiner.name = "dafl"``: trains a generator whose images the ensemble takes for its own data (ICCV 2019)."""

    paper: ClassVar[Mapping[str, Any]] = {
        **ONE_STEP_STUDENT,
        "iterations": 300,
        "student_weight_decay": 5e-4,
        "pool_size": 6400,
        "pool_batches": 5,
        "generator_lr": 0.001,
    }
    name: Literal["dafl"] = "dafl"
    lambda_activation: float = Field(
        default=0.1, ge=0, description="weight of the teachers' mean absolute features, which the generator raises"
    )
    lambda_entropy: float = Field(
        default=5.0, ge=0, description="weight of the entropy of a batch's mean prediction, which the generator raises"
    )

    def images(self, context: RefinerContext, rng: torch.Generator) -> DaflImages:
        """Returns images of a new generator."""
        return DaflImages(self, new_generator(self, 1, context.image_shape, drawn_seed(rng)).to(context.device))


def terms(ensemble: Ensemble, images: Float[Tensor, "B D H W"]) -> dict[str, Float[Tensor, ""]]:
    """Returns ``one_hot`` (in nats), ``activation`` and ``entropy`` (in nats), the means over batch and teachers."""
    weights = images.new_ones(len(ensemble), len(images))
    logits, activation = ensemble.measured(_features, images, weights, 0, len(ensemble))
    predicted = ensemble.log_probabilities(logits, None)
    mean = predicted.exp().mean(dim=0)
    return {
        "one_hot": -predicted.amax(dim=1).mean(),
        "activation": activation.mean(),
        "entropy": -torch.xlogy(mean, mean).sum(),
    }


def _features(terms: list[Tensor], layer: nn.Module, inputs: tuple[Any, ...], weights: Tensor) -> None:  # noqa: ARG001
    """Keeps the mean absolute input of the last layer that has parameters."""
    if inputs and next(layer.parameters(recurse=False), None) is not None:
        terms[:] = [inputs[0].float().abs().mean()]


class DaflImages:
    """Images of an unconditional generator: noise is all they are made of, so they have no labels."""

    def __init__(self, config: DaflConfig, generator: Generator) -> None:
        self._config, self._generator = config, generator.train()
        self._optimizer = torch.optim.Adam(generator.parameters())
        self._weights = {"one_hot": 1.0, "activation": -config.lambda_activation, "entropy": -config.lambda_entropy}

    def start(self, call: Call) -> Sequence[Float[Tensor, "B Z"]]:
        """Returns the noise of each iteration."""
        self._optimizer.param_groups[0]["lr"] = self._config.generator_lr * call.lr_scale
        shape = (call.iterations, self._config.batch_size, self._config.noise_dim)
        return torch.randn(shape, generator=call.rng).to(next(self._generator.parameters())).unbind()

    def improve(self, call: Call, draw: Float[Tensor, "B Z"]) -> dict[str, Tensor]:
        """Takes ``generator_steps`` on one batch; returns the mean of each term of their loss."""
        steps = self._config.generator_steps
        return descend(self._optimizer, steps, self._weights, lambda: terms(call.ensemble, self._images(draw)))

    @torch.no_grad()
    def make(self, draw: Float[Tensor, "B Z"]) -> tuple[Float[Tensor, "B D H W"], None]:
        """Returns images with the batch statistics that the generator is trained with."""
        return self._images(draw), None

    def _images(self, noise: Float[Tensor, "B Z"]) -> Float[Tensor, "B D H W"]:
        labels = torch.zeros(len(noise), dtype=torch.int64, device=noise.device)
        return generated(self._config, self._generator, noise, labels)
