"""Co-Boosting as a refiner: DENSE with hard samples, moved on the fly, that also decide how much each teacher counts.

Dai, Zhang, Li, Liu, Yang, Han, "Enhancing One-Shot Federated Learning Through Data and Ensemble Co-Boosting",
ICLR 2024, https://arxiv.org/abs/2402.15070.

    min_theta E [ (1 - D(x)_y) CE(D(x), y) - lambda_adv KL(D(x) || student(x)) ],   x = G(z, y; theta)
    x~ = x + step sign(grad_x u . D_T(x)),  u ~ U(-1, 1)^C                what the student sees
    w <- clip(w - weight_step / K sign(grad_w CE(D(x), y)), 0, 1) / sum   on each batch of the pool

D is the ensemble: the softmax of the teachers' logits, averaged with the weights w, at first 1 / K; D_T has a
temperature. The factor 1 - D(x)_y has no gradient. What differs from paper and public code:
docs/algorithms/coboosting.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from fedftg.algorithms.base import RefinerContext
from fedftg.algorithms.dense import DenseImages, DenseSettings
from fedftg.augment import moved
from fedftg.distill import losses
from fedftg.distill.images import Call
from fedftg.distill.pool import PooledImages


class CoBoostingConfig(DenseSettings):
    """``refiner.name = "coboosting"``: is DENSE on harder images, with learnt weights of the clients (ICLR 2024)."""

    paper: ClassVar[Mapping[str, Any]] = {
        **DenseSettings.paper,
        "lambda_adv": 1.0,
        "lambda_bn": 0.0,
        "student_weight_decay": 1e-4,
        "student_schedule": "cosine",
    }
    name: Literal["coboosting"] = "coboosting"
    image_step: float = Field(
        default=8 / 255, ge=0, description="step of the student's images in a random direction of the ensemble's output"
    )
    weight_step: float = Field(
        default=0.1,
        ge=0,
        lt=1,
        description="step of the teachers' weights, as a share of 1 / K; 0 leaves them as they are",
    )
    weight_decay: float = Field(default=0.99, gt=0, le=1, description="factor on weight_step per iteration")

    def images(self, context: RefinerContext, rng: torch.Generator) -> BoostedImages:  # noqa: ARG002
        """Returns a pool of images of new generators."""
        return BoostedImages(self, DenseImages(self, context, hard_losses))


def hard_losses(
    ensemble: Float[Tensor, "B C"], student: Float[Tensor, "B C"], labels: Int[Tensor, " B"]
) -> dict[str, Float[Tensor, ""]]:
    """Returns ``fidelity``, cross-entropy times the probability of the other classes, and ``discrepancy``: means."""
    entropy = F.nll_loss(ensemble, labels, reduction="none")
    hardness = 1 - (-entropy).exp().detach()
    return {
        "fidelity": (hardness * entropy).mean(),
        "discrepancy": losses.kl_divergence(ensemble[None], student).mean(),
    }


class BoostedImages(PooledImages):
    """A pool whose batches adapt the teachers' weights when they are shown, and then are moved."""

    def __init__(self, config: CoBoostingConfig, source: DenseImages) -> None:
        super().__init__(config, source)
        self._settings = config

    def start(self, call: Call) -> Sequence[Any]:
        """Returns the draws of the pool; all teachers count the same again."""
        ensemble = call.ensemble
        self._step = self._settings.weight_step / len(ensemble)
        self._weights = ensemble.weights(torch.arange(ensemble.num_classes), 0, len(ensemble)).mean(dim=1)
        return super().start(call)

    def improve(self, call: Call, draw: Any) -> dict[str, Tensor]:
        """Improves the source on a draw; the weights' step decays with each."""
        if draw is not None:
            self._step *= self._settings.weight_decay
        return super().improve(call, draw)

    def make(self, draw: Any) -> tuple[Float[Tensor, "B D H W"], Int[Tensor, " B"]]:
        """Returns a batch of the pool, moved, after a step of the teachers' weights on it."""
        images, labels = super().make(draw)
        assert labels is not None  # DENSE's images have them
        ensemble, images = self._call.ensemble, images.detach().requires_grad_()
        logits = ensemble.logits(images, 0, len(ensemble))
        self._boost(logits.detach(), labels)
        softened = ensemble.log_probabilities(logits / self._settings.temperature, labels).exp()
        direction = moved(2 * torch.rand(softened.shape, generator=self._call.rng) - 1, images.device)
        (slope,) = torch.autograd.grad((direction * softened).sum(), images)
        return images.detach() + self._settings.image_step * slope.sign(), labels

    def _boost(self, logits: Float[Tensor, "K B C"], labels: Int[Tensor, " B"]) -> None:
        ensemble, weights = self._call.ensemble, self._weights.requires_grad_()
        ensemble.reweight(weights)
        (slopes,) = torch.autograd.grad(F.nll_loss(ensemble.log_probabilities(logits, labels), labels), weights)
        self._weights = (weights.detach() - self._step * slopes.sign()).clamp(0, 1)
        self._weights /= self._weights.sum()
        ensemble.reweight(self._weights)
