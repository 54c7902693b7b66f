"""DFRD as a refiner: a generator that finds what the ensemble of the clients knows and the student does not.

Luo, Wang, Fu, Li, Lan, Gao, "DFRD: Data-Free Robustness Distillation for Heterogeneous Federated Learning",
NeurIPS 2023, https://arxiv.org/abs/2309.13546.

    min_theta E [ CE(D(x), y) - lambda_transfer m KL(D(x) || student(x)) ] + lambda_diversity L_div
    x = G(h; theta),  h = z * e(y),  m = 1 where D predicts y and the student does not, else 0

D is the ensemble: the softmax of the teachers' logits, averaged with weights ``a_k(y)``. The generator and a moving
average of it over rounds persist; the student sees images of both. Differences: docs/algorithms/dfrd.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

from fedftg.algorithms.base import ClientResult, Memory, Metrics, Refiner, RefinerContext, ServerState
from fedftg.algorithms.distilled import Distilled, DistilledConfig
from fedftg.distill import losses
from fedftg.distill.config import GeneratorConfig, LabelSampling
from fedftg.distill.descent import descend
from fedftg.distill.generator import Generator
from fedftg.distill.images import Call, NoiseAndLabels, noise_and_labels
from fedftg.params import Params, clone, prefixed, unprefixed, weighted_mean
from fedftg.precision import autocast
from fedftg.seeds import drawn_seed, forked

_GENERATOR, _AVERAGE = "generator.", "average."


class DfrdConfig(GeneratorConfig, DistilledConfig):
    """``refiner.name = "dfrd"``: trains a generator to find what the student lacks of the ensemble (NeurIPS 2023)."""

    paper: ClassVar[Mapping[str, Any]] = {
        "iterations": 300,
        "batch_size": 64,
        "student_steps": 5,
        "student_lr": 0.01,
        "student_weight_decay": 0.0,
        "ensemble_mean": "logits",
        "temperature": 10.0,
        "generator_steps": 2,
        "generator_lr": 0.005,
    }
    name: Literal["dfrd"] = "dfrd"
    label_sampling: LabelSampling = "iid"
    lambda_transfer: float = Field(default=1.0, ge=0, description="weight of the masked discrepancy")
    lambda_diversity: float = Field(default=1.0, ge=0, description="weight of L_div")
    average_decay: float = Field(
        default=0.5, ge=0, lt=1, description="weight of the earlier average when the generator is averaged over rounds"
    )
    average_share: float = Field(
        default=0.5, ge=0, le=1, description="images of the averaged generator for each image of the generator"
    )

    def build(self, context: RefinerContext) -> Refiner:
        """Returns the refiner for one experiment."""
        return Dfrd(self, context)


@dataclass(frozen=True)
class Dfrd(Distilled):
    """Keeps the generator from round to round, and its moving average."""

    config: DfrdConfig

    def init(self, params: Params, rng: torch.Generator) -> Memory:  # noqa: ARG002
        """Returns the generator's initial weights, drawn from ``rng``."""
        return prefixed(clone(self._generator(drawn_seed(rng)).state_dict()), _GENERATOR)

    def refine(
        self, state: ServerState, results: Sequence[ClientResult], rng: torch.Generator
    ) -> tuple[ServerState, Metrics]:
        """Distils this round's clients into the student; rates decay as ``lr_decay ** state.round``."""
        images = DfrdImages(self.config, self._generator(seed=0), state.refiner)
        refined, metrics = self.distil(images, state, results, rng)
        return replace(refined, refiner=images.memory()), metrics

    def _generator(self, seed: int) -> LabelledNoise:
        with forked(seed, torch.device("cpu")):
            return LabelledNoise(self.config, self.context).to(self.context.device)


class LabelledNoise(nn.Module):
    """A generator that knows its label by the noise alone, which is multiplied by an embedding of the label."""

    def __init__(self, config: DfrdConfig, context: RefinerContext) -> None:
        super().__init__()
        self.embedding = nn.Embedding(context.num_classes, config.noise_dim)
        self.generator = Generator(
            config.noise_dim, 1, context.image_shape, config.generator_width, config.memory_format
        )

    def forward(
        self, noise: Float[Tensor, "B Z"], labels: Int[Tensor, " B"]
    ) -> tuple[Float[Tensor, "B Z"], Float[Tensor, "B D H W"]]:
        """Returns the noise times the labels' embeddings, and images of that."""
        merged = noise * self.embedding(labels)
        return merged, self.generator(merged, torch.zeros_like(labels))


class DfrdImages:
    """Images of a generator, and for the student also of the average of former rounds' generators, if there is one."""

    def __init__(self, config: DfrdConfig, generator: LabelledNoise, memory: Memory) -> None:
        self._config, self._generator = config, generator
        generator.load_state_dict(unprefixed(memory, _GENERATOR))
        self._averaged = unprefixed(memory, _AVERAGE)
        self._weights = {
            "fidelity": 1.0,
            "discrepancy": -config.lambda_transfer,
            "diversity": config.lambda_diversity,
        }
        self._optimizer = torch.optim.Adam(generator.parameters())

    def start(self, call: Call) -> Sequence[NoiseAndLabels]:
        """Returns noise and labels of each iteration."""
        config, device = self._config, self._generator.embedding.weight.device
        self._optimizer.param_groups[0]["lr"] = config.generator_lr * call.lr_scale
        return noise_and_labels(call, config.batch_size, config.noise_dim, config.label_sampling, device)

    def improve(self, call: Call, draw: NoiseAndLabels) -> dict[str, Tensor]:
        """Takes ``generator_steps`` on one batch; returns the mean of each term of their loss."""
        self._generator.train()
        steps = self._config.generator_steps
        return descend(self._optimizer, steps, self._weights, lambda: terms(call, draw[1], *self._images(*draw)))

    @torch.no_grad()
    def make(self, draw: NoiseAndLabels) -> tuple[Float[Tensor, "N D H W"], Int[Tensor, " N"]]:
        """Returns images of the generator, and ``average_share`` as many of its average, from the same draw."""
        noise, labels = draw
        self._generator.eval()
        images, number = self._images(*draw)[1], round(self._config.average_share * len(labels))
        if not self._averaged or not number:
            return images, labels
        more = self._images(noise[:number], labels[:number], self._averaged)[1]
        return torch.cat([images, more]), torch.cat([labels, labels[:number]])

    def memory(self) -> Memory:
        """Returns what the next round needs: the generator, and its average, at first the generator itself."""
        values, keep = clone(self._generator.state_dict()), self._config.average_decay
        averaged = weighted_mean([self._averaged, values], [keep, 1 - keep]) if self._averaged else clone(values)
        return prefixed(values, _GENERATOR) | prefixed(averaged, _AVERAGE)

    def _images(self, noise: Tensor, labels: Tensor, values: Params | None = None) -> tuple[Tensor, Tensor]:
        with autocast(self._config.precision, noise.device):
            merged, images = functional_call(self._generator, values or {}, (noise, labels))
        return merged.to(noise.dtype), images.to(noise.dtype)


def terms(
    call: Call, labels: Int[Tensor, " B"], merged: Float[Tensor, "B Z"], images: Float[Tensor, "B D H W"]
) -> dict[str, Float[Tensor, ""]]:
    """Returns ``fidelity`` and ``discrepancy``, means over the batch in nats, and ``diversity``."""
    logits, student = call.ensemble.logits(images, 0, len(call.ensemble)), call.predict(images)
    predicted = call.ensemble.log_probabilities(logits, labels)
    discrepancy = losses.kl_divergence(predicted[None], student)[0]
    return {
        "fidelity": F.nll_loss(predicted, labels),
        "discrepancy": (losses.transferable(predicted, student, labels) * discrepancy).mean(),
        "diversity": losses.diversity(merged, images),
    }
