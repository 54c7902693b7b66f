"""ADI (Adaptive DeepInversion) as a refiner: images that are optimised against the ensemble and the student.

Yin, Molchanov, Alvarez, Li, Mallya, Hoiem, Jha, Kautz, "Dreaming to Distill: Data-free Knowledge Transfer via
DeepInversion", CVPR 2020, https://arxiv.org/abs/1912.08795.

    min_x CE(D(x), y) + lambda_variation TV(x) + lambda_norm ||x|| + lambda_bn L_bn(x)
          + lambda_adversarial (1 - JS(D(x), student(x)))

D is the ensemble, x starts from noise, or from dead leaves (leaves.py). What differs from the paper:
docs/algorithms/adi.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from fedftg.algorithms.base import RefinerContext
from fedftg.algorithms.distilled import ONE_STEP_STUDENT, DistilledConfig
from fedftg.augment import Augmentation, augment, moved
from fedftg.distill.config import LabelSampling
from fedftg.distill.descent import descend
from fedftg.distill.images import Call
from fedftg.distill.labels import sample_labels
from fedftg.distill.leaves import dead_leaves


class AdiConfig(DistilledConfig):
    """``refiner.name = "adi"``: optimises noise into images by ensemble and student (DeepInversion, CVPR 2020)."""

    paper: ClassVar[Mapping[str, Any]] = {
        **ONE_STEP_STUDENT,
        "iterations": 20,
        "student_weight_decay": 5e-4,
        "pool_size": 2560,
        "pool_batches": 50,
    }
    name: Literal["adi"] = "adi"
    image_start: Literal["noise", "leaves"] = Field(
        default="noise", description="what the images start from: noise, or dead leaves (random overlapping shapes)"
    )
    image_steps: int = Field(default=200, ge=1, description="Adam steps on the pixels of each batch")
    image_lr: float = Field(default=0.05, ge=0, description="rate of these steps, before decay")
    image_augment: Augmentation = Field(
        default="flip_crop", description="random changes of the images in each of these steps, those of data.augment"
    )
    label_sampling: LabelSampling = "uniform"
    lambda_variation: float = Field(default=2.5e-5, ge=0, description="weight of the images' total variation")
    lambda_norm: float = Field(default=3e-8, ge=0, description="weight of the images' norm")
    lambda_bn: float = Field(default=10.0, ge=0, description="weight of L_bn; teachers without BatchNorm count 0")
    lambda_adversarial: float = Field(
        default=10.0, ge=0, description="weight of 1 - JS(ensemble, student); 0 is DeepInversion, which is not adaptive"
    )

    def images(self, context: RefinerContext, rng: torch.Generator) -> AdiImages:  # noqa: ARG002
        """Returns images that start anew in each batch."""
        return AdiImages(self, context)


class AdiImages:
    """Images without a generator: the pixels of each batch are optimised for given labels."""

    def __init__(self, config: AdiConfig, context: RefinerContext) -> None:
        self._config, self._context = config, context
        self._weights = {
            "fidelity": 1.0,
            "variation": config.lambda_variation,
            "norm": config.lambda_norm,
            "adversarial": config.lambda_adversarial,
            "batchnorm": config.lambda_bn,
        }

    def start(self, call: Call) -> Sequence[Int[Tensor, " B"]]:
        """Returns the labels of each iteration."""
        size, counts = (call.iterations, self._config.batch_size), call.ensemble.class_counts
        return sample_labels(counts, *size, self._config.label_sampling, rng=call.rng).to(self._context.device).unbind()

    def improve(self, call: Call, draw: Int[Tensor, " B"]) -> dict[str, Tensor]:
        """Takes ``image_steps`` on new images; returns the mean of each term of their loss."""
        number, shape = len(draw), self._context.image_shape
        leaves = self._config.image_start == "leaves"
        start = dead_leaves(number, shape, call.rng) if leaves else torch.randn(number, *shape, generator=call.rng)
        self._images = moved(start, draw.device).requires_grad_()
        optimizer = torch.optim.Adam([self._images], lr=self._config.image_lr * call.lr_scale)
        return descend(optimizer, self._config.image_steps, self._weights, lambda: self.terms(call, self._images, draw))

    def make(self, draw: Int[Tensor, " B"]) -> tuple[Float[Tensor, "B D H W"], Int[Tensor, " B"]]:
        """Returns the images that were improved last."""
        return self._images.detach(), draw

    def terms(
        self, call: Call, images: Float[Tensor, "B D H W"], labels: Int[Tensor, " B"]
    ) -> dict[str, Float[Tensor, ""]]:
        """Returns the terms of the loss whose weight is not 0, means over the batch."""
        ensemble, shown = call.ensemble, augment(images, self._config.image_augment, call.rng)
        logits, found = ensemble.with_batchnorm(shown, labels, 0, len(ensemble), self._config.lambda_bn)
        predicted = ensemble.log_probabilities(logits, labels)
        found["fidelity"] = F.nll_loss(predicted, labels)
        if self._config.lambda_variation:
            found["variation"] = total_variation(images)
        if self._config.lambda_norm:
            found["norm"] = images.flatten(1).norm(dim=1).mean()
        if self._config.lambda_adversarial:
            found["adversarial"] = 1 - jensen_shannon(predicted, call.predict(shown).log_softmax(dim=1))
        return found


def total_variation(images: Float[Tensor, "B D H W"]) -> Float[Tensor, ""]:
    """Returns the scalar sum over four directions of ``||image - image moved by a pixel||_2``, mean over images."""
    pairs = [
        (images[..., 1:], images[..., :-1]),
        (images[..., 1:, :], images[..., :-1, :]),
        (images[..., 1:, 1:], images[..., :-1, :-1]),
        (images[..., 1:, :-1], images[..., :-1, 1:]),
    ]
    return torch.stack([(left - right).flatten(1).norm(dim=1) for left, right in pairs]).sum(dim=0).mean()


def jensen_shannon(left: Float[Tensor, "B C"], right: Float[Tensor, "B C"]) -> Float[Tensor, ""]:
    """Returns the scalar divergence of log-probabilities, in nats (0 to ln 2), mean over the batch."""
    middle = torch.logsumexp(torch.stack([left, right]), dim=0) - math.log(2)
    both = [(one.exp() * (one - middle)).sum(dim=1) for one in (left, right)]
    return torch.stack(both).mean()
