"""Where the images come from on which a student learns from its teachers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor, nn

from fedftg.distill import losses
from fedftg.distill.config import DistillConfig, LabelSampling, StudentConfig
from fedftg.distill.generator import Generator
from fedftg.distill.labels import sample_labels
from fedftg.distill.teachers import Ensemble
from fedftg.errors import InputError
from fedftg.params import Params, clone, prefixed, unprefixed
from fedftg.precision import autocast

Draw = TypeVar("Draw")
NoiseAndLabels = tuple[Float[Tensor, "B Z"], Int[Tensor, " B"]]

_GENERATOR, _OPTIMIZER = "generator.", "optimizer."


@dataclass(frozen=True)
class Call:
    """What stays the same through one call of `fedftg.distill.distiller.distil`."""

    student: nn.Module
    """In evaluation mode and without gradients of its weights."""
    ensemble: Ensemble
    iterations: int
    rng: torch.Generator
    lr_scale: float

    def predict(self, images: Float[Tensor, "B D H W"]) -> Float[Tensor, "B C"]:
        """Returns the student's logits."""
        return self.ensemble.computed(self.student, images)


class Images(Protocol[Draw]):
    """A source of images. A ``Draw`` is what one batch is made of, such as noise and labels."""

    def start(self, call: Call) -> Sequence[Draw]:
        """Prepares a call and returns the draw of each iteration."""

    def improve(self, call: Call, draw: Draw) -> dict[str, Tensor]:
        """Adapts the source to teachers and student on one draw; returns scalars by name for the metrics."""

    def make(self, draw: Draw) -> tuple[Float[Tensor, "B D H W"], Int[Tensor, " B"] | None]:
        """Returns images without a graph, and their labels, None where they are unknown."""


class ProxyImages:
    """Real images without labels (FedDF), each shown once per pass, in random order.

    They are on the student's device; ``B`` may be larger than ``N``. ``prepare`` makes of a batch what the teachers
    take, such as normalised images of bytes; None where ``images`` are that already.
    """

    def __init__(
        self,
        images: Num[Tensor, "N d h w"],
        batch_size: int,
        prepare: Callable[[Tensor], Float[Tensor, "B D H W"]] | None = None,
    ) -> None:
        self._images, self._batch_size, self._prepare = images, batch_size, prepare

    def start(self, call: Call) -> Sequence[Tensor]:
        """Returns the rows ``(B,)`` of each batch."""
        number, size = call.iterations * self._batch_size, len(self._images)
        passes = [torch.randperm(size, generator=call.rng) for _ in range(math.ceil(number / size))]
        return torch.split(torch.cat(passes)[:number].to(self._images.device), self._batch_size)

    def improve(self, call: Call, draw: Tensor) -> dict[str, Tensor]:  # noqa: ARG002
        """Returns no metrics: real images stay as they are."""
        return {}

    def make(self, draw: Int[Tensor, " B"]) -> tuple[Float[Tensor, "B D H W"], None]:
        """Returns the images of these rows."""
        images = self._images[draw]
        return images if self._prepare is None else self._prepare(images), None


class GeneratorImages:
    """Images of a generator that is trained, in place, against teachers and student (FedFTG).

    The images have its device, type and noise length. In its own steps it is in training mode, in `make` it evaluates.
    """

    def __init__(self, config: DistillConfig, generator: Generator) -> None:
        parameter = next(generator.parameters())
        self._device, self._dtype = parameter.device, parameter.dtype
        self._config, self._generator = config, generator
        self._optimizer = self._new_optimizer()

    def start(self, call: Call) -> Sequence[NoiseAndLabels]:
        """Returns noise and labels of each iteration."""
        config, classes, expected = self._config, call.ensemble.num_classes, self._generator.num_classes
        if classes != expected:
            raise InputError(
                f"class_counts must have a column for each of the generator's {expected} classes, got {classes}"
            )
        if config.generator_optimizer_state == "reset":
            self._optimizer = self._new_optimizer()
        for group in self._optimizer.param_groups:
            group["lr"] = config.generator_lr * call.lr_scale
        self._optimizer.zero_grad()
        kind, noise_dim = config.label_sampling, self._generator.noise_dim
        return noise_and_labels(call, config.batch_size, noise_dim, kind, self._device, self._dtype)

    def improve(self, call: Call, draw: NoiseAndLabels) -> dict[str, Float[Tensor, ""]]:
        """Takes ``generator_steps`` on one batch; returns the mean of each term of their loss."""
        config, number = self._config, len(call.ensemble)
        parts = [(0, number)] if config.generator_update == "joint" else [(k, k + 1) for k in range(number)]
        names = ("discrepancy", "fidelity", "diversity", *(["batchnorm"] if config.lambda_bn else []))
        total = torch.zeros(len(names), device=self._device)
        self._generator.train()
        for _ in range(config.generator_steps):
            for part in parts:
                total += self._step(call, draw, *part)
        return dict(zip(names, total / config.generator_steps, strict=True))

    @torch.no_grad()
    def make(self, draw: NoiseAndLabels) -> tuple[Float[Tensor, "B D H W"], Int[Tensor, " B"]]:
        """Returns images of the generator in evaluation mode, and the labels that they were drawn for."""
        self._generator.eval()
        return generated(self._config, self._generator, *draw), draw[1]

    def memory(self) -> Params:
        """Returns copies of all that the next call needs: the generator, and Adam's moments where they are kept."""
        memory = prefixed(clone(self._generator.state_dict()), _GENERATOR)
        if self._config.generator_optimizer_state == "kept":
            for name, parameter in self._generator.named_parameters():
                memory |= prefixed(clone(self._optimizer.state.get(parameter, {})), f"{_OPTIMIZER}{name}:")
        return memory

    def load_memory(self, memory: Params) -> None:
        """Restores what `memory` returned with a generator of the same sizes, bit for bit; the tensors are copied."""
        self._generator.load_state_dict(unprefixed(memory, _GENERATOR))
        self._optimizer = self._new_optimizer()
        if self._config.generator_optimizer_state == "kept":
            for name, parameter in self._generator.named_parameters():
                moments = clone(unprefixed(memory, f"{_OPTIMIZER}{name}:"))
                if moments:
                    # Adam counts its steps on the CPU, wherever the moments are.
                    self._optimizer.state[parameter] = {
                        key: tensor.to("cpu" if key == "step" else self._device) for key, tensor in moments.items()
                    }

    def _new_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self._generator.parameters(), lr=self._config.generator_lr)

    def _step(self, call: Call, draw: NoiseAndLabels, start: int, stop: int) -> Tensor:
        # The gradient is collected at the images, with the graphs of one chunk of teachers in memory at a time.
        images = generated(self._config, self._generator, *draw)
        leaf = images.detach().requires_grad_()
        mask = self._mask(call, leaf.detach(), draw[1])
        total: Tensor = torch.zeros((), device=self._device)
        for chunk in call.ensemble.ranges(start, stop):
            loss, terms = self._loss(call, draw, leaf, mask, *chunk)
            if loss.requires_grad:
                loss.backward()  # type: ignore[no-untyped-call]
            total = total + terms
        if leaf.grad is not None:
            images.backward(leaf.grad)  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self._optimizer.zero_grad()
        return total

    @torch.no_grad()
    def _mask(self, call: Call, images: Tensor, labels: Tensor) -> Tensor | None:
        if self._config.discrepancy_mask == "none":
            return None
        return losses.transferable(call.ensemble.probabilities(images, labels), call.predict(images), labels)

    def _loss(
        self, call: Call, draw: NoiseAndLabels, images: Tensor, mask: Tensor | None, start: int, stop: int
    ) -> tuple[Tensor, Tensor]:
        # The order of operations is the public code's: the biases before a BatchNorm have no gradient but rounding
        # errors, which Adam scales up to whole steps, so another order ends in visibly different weights.
        config, (noise, labels) = self._config, draw
        weights = call.ensemble.weights(labels, start, stop)
        teacher_logits, batchnorm = call.ensemble.with_batchnorm(images, labels, start, stop, config.lambda_bn)
        discrepancy = losses.model_discrepancy(
            teacher_logits.detach() if config.teacher_gradient == "detached" else teacher_logits,
            call.predict(images),
            weights,
            kind=config.discrepancy,
            temperature=config.temperature,
            mask=mask,
        )
        fidelity = losses.fidelity(teacher_logits, labels, weights, weighting=config.fidelity_weighting)
        # A term of weight 0 is left out, so that it cannot turn the others into NaN.
        loss = -config.lambda_md * discrepancy if config.lambda_md else discrepancy.new_zeros(())
        loss = loss + config.lambda_cls * fidelity if config.lambda_cls else loss
        # Some of K teachers carry their share of the diversity, so that all of them have the sum of the joint step.
        number, size, diversity = len(call.ensemble), stop - start, losses.diversity(noise, images)
        loss = loss + config.lambda_dis * diversity / (number / size) if config.lambda_dis else loss
        loss = loss + config.lambda_bn * batchnorm["batchnorm"] if batchnorm else loss
        return loss, torch.stack([discrepancy, fidelity, size / number * diversity, *batchnorm.values()]).detach()


def noise_and_labels(
    call: Call, size: int, noise_dim: int, kind: LabelSampling, device: torch.device, dtype: torch.dtype | None = None
) -> list[NoiseAndLabels]:
    """Returns noise and labels of a batch of this size for each iteration."""
    shape = (call.iterations, size)
    # Labels first: another order would change every run.
    labels = sample_labels(call.ensemble.class_counts, *shape, kind, rng=call.rng)
    noise = torch.randn(*shape, noise_dim, generator=call.rng)
    return list(zip(noise.to(device, dtype), labels.to(device), strict=True))


def generated(
    config: StudentConfig, generator: nn.Module, noise: Float[Tensor, "B Z"], labels: Int[Tensor, " B"]
) -> Float[Tensor, "B D H W"]:
    """Returns images by the config's precision, in the type of the noise."""
    with autocast(config.precision, noise.device):
        images: Tensor = generator(noise, labels)
    return images.to(noise.dtype)
