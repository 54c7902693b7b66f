"""Where the images come from on which a student learns from its teachers.

`GeneratorImages` makes them, and improves them against teachers and student (FedFTG); `ProxyImages` are real images
without labels (FedDF). Another source is a class with the three methods of `Images`; the student's steps
(`fedftg.distill.distiller.distil`) are the same for all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fedftg.distill import losses
from fedftg.distill.config import DistillConfig
from fedftg.distill.generator import Generator
from fedftg.distill.labels import sample_labels
from fedftg.distill.teachers import Ensemble, autocast
from fedftg.errors import InputError
from fedftg.params import Params, clone, prefixed, unprefixed

Draw = TypeVar("Draw")
NoiseAndLabels = tuple[Float[Tensor, "B Z"], Int[Tensor, " B"]]

_CALLS, _GENERATOR, _OPTIMIZER = "calls", "generator.", "optimizer."


@dataclass(frozen=True)
class Call:
    """What stays the same through one call of `fedftg.distill.distiller.distil`."""

    student: nn.Module
    ensemble: Ensemble
    iterations: int
    rng: torch.Generator
    """The source of all draws, on the CPU."""
    lr_scale: float
    """Factor on every rate."""
    given: Mapping[str, Tensor | None] = field(default_factory=dict)
    """Tensors to use in place of drawn ones, by the source's own names."""

    @contextmanager
    def frozen_student(self) -> Iterator[None]:
        """Evaluation mode and no gradients of weights: the backward pass to the images costs about a third less."""
        self.student.eval()
        trainable = [parameter for parameter in self.student.parameters() if parameter.requires_grad]
        for parameter in trainable:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in trainable:
                parameter.requires_grad_(True)


class Images(Protocol[Draw]):
    """A source of images. A ``Draw`` is what one batch is made of, such as noise and labels."""

    def start(self, call: Call) -> Sequence[Draw]:
        """Prepares a call and returns the draw of each iteration."""
        ...

    def improve(self, call: Call, draw: Draw) -> dict[str, Tensor]:
        """Adapts the source to teachers and student on one draw; returns scalars by name for the metrics."""
        ...

    def make(self, draw: Draw) -> tuple[Float[Tensor, "B D H W"], Int[Tensor, " B"] | None]:
        """Images ``(B, D, H, W)`` without a graph, and their labels ``(B,)``, None where they are unknown."""
        ...


class ProxyImages:
    """Real images without labels, each shown once per pass, in random order.

    Args:
        images: ``(N, D, H, W)``, normalised as the teachers' were, on the student's device.
        batch_size: ``B``; may be larger than ``N``.
    """

    def __init__(self, images: Float[Tensor, "N D H W"], batch_size: int) -> None:
        self._images, self._batch_size = images, batch_size

    def start(self, call: Call) -> Sequence[Tensor]:
        """The rows ``(B,)`` of each batch; ``rows`` ``(I, B)`` may be given."""
        rows = call.given.get("rows")
        if rows is None:
            number, size = call.iterations * self._batch_size, len(self._images)
            passes = [torch.randperm(size, generator=call.rng) for _ in range(math.ceil(number / size))]
            rows = torch.cat(passes)[:number].view(call.iterations, self._batch_size)
        return list(rows.to(self._images.device))

    def improve(self, call: Call, draw: Tensor) -> dict[str, Tensor]:  # noqa: ARG002
        """Real images stay as they are."""
        return {}

    def make(self, draw: Int[Tensor, " B"]) -> tuple[Float[Tensor, "B D H W"], None]:
        """The images of these rows."""
        return self._images[draw], None


class GeneratorImages:
    """Images of a generator that is trained against teachers and student, as FedFTG does.

    In its own steps the generator trains (BatchNorm by batch) and the student evaluates; in `make` it evaluates.

    Args:
        config: see `DistillConfig`.
        generator: trained in place.

    Raises:
        InputError: the generator's noise length is not the config's, or its device has no bfloat16 that is asked for.
    """

    def __init__(self, config: DistillConfig, generator: Generator) -> None:
        parameter = next(generator.parameters())
        self._device, self._dtype = parameter.device, parameter.dtype
        if config.noise_dim != generator.noise_dim:
            raise InputError(
                f"noise_dim must be the generator's, {generator.noise_dim}, got {config.noise_dim}; change one of them"
            )
        if config.precision == "bfloat16" and not _has_bfloat16(self._device):
            raise InputError(
                f"precision 'bfloat16' needs hardware that has it, and {self._device} has not: it would take a hundred "
                "times as long; set precision to 'float32'"
            )
        self._config, self._generator = config, generator
        self._optimizer = self._new_optimizer()
        self._calls = 0

    def start(self, call: Call) -> Sequence[NoiseAndLabels]:
        """Noise ``(B, Z)`` and labels ``(B,)`` of each iteration; the first call warms the generator up before.

        ``noise`` ``(I, B, Z)`` and ``labels`` ``(I, B)`` may be given.

        Raises:
            InputError: class counts of other classes than the generator's.
        """
        config, classes = self._config, call.ensemble.num_classes
        if classes != self._generator.num_classes:
            raise InputError(
                f"class_counts must have a column for each of the generator's {self._generator.num_classes} classes, "
                f"got {classes}"
            )
        if config.generator_optimizer_state == "reset":
            self._optimizer = self._new_optimizer()
        for group in self._optimizer.param_groups:
            group["lr"] = config.generator_lr * call.lr_scale
        self._optimizer.zero_grad()
        if config.generator_warmup and self._calls == 0:
            for draw in self._draw(call, config.generator_warmup, {}):
                self.improve(call, draw)
        self._calls += 1
        return self._draw(call, call.iterations, call.given)

    def improve(self, call: Call, draw: NoiseAndLabels) -> dict[str, Float[Tensor, ""]]:
        """``generator_steps`` on one batch; the mean over them of discrepancy, fidelity and diversity."""
        config, number = self._config, len(call.ensemble)
        parts = [(0, number)] if config.generator_update == "joint" else [(k, k + 1) for k in range(number)]
        total = torch.zeros(3, device=self._device)
        self._generator.train()
        with call.frozen_student():
            for _ in range(config.generator_steps):
                for part in parts:
                    total += self._step(call, draw, part)
        return dict(zip(("discrepancy", "fidelity", "diversity"), total / config.generator_steps, strict=True))

    @torch.no_grad()
    def make(self, draw: NoiseAndLabels) -> tuple[Float[Tensor, "B D H W"], Int[Tensor, " B"]]:
        """Images ``(B, D, H, W)`` of the generator in evaluation mode, and the labels that they were drawn for."""
        self._generator.eval()
        return self._generate(draw), draw[1]

    def memory(self) -> Params:
        """Copies of all that the next call needs: the generator, and Adam's moments where they are kept."""
        memory = {_CALLS: torch.tensor(self._calls)}
        memory |= prefixed(clone(self._generator.state_dict()), _GENERATOR)
        if self._config.generator_optimizer_state == "kept":
            for name, parameter in self._generator.named_parameters():
                memory |= prefixed(clone(self._optimizer.state.get(parameter, {})), f"{_OPTIMIZER}{name}:")
        return memory

    def load_memory(self, memory: Params) -> None:
        """Restores what `memory` returned, bit for bit; the tensors are copied.

        Raises:
            InputError: it was taken with another generator.
        """
        saved, own = unprefixed(memory, _GENERATOR), self._generator.state_dict()
        shapes, expected = ({name: tensor.shape for name, tensor in state.items()} for state in (saved, own))
        wrong = sorted(name for name in {**shapes, **expected} if shapes.get(name) != expected.get(name))
        if wrong or _CALLS not in memory:
            raise InputError(
                f"the saved generator does not fit at {wrong[0] if wrong else _CALLS!r}; load it with the noise_dim, "
                "generator_width, classes and image size that it was saved with"
            )
        self._generator.load_state_dict(saved)
        self._calls = int(memory[_CALLS])
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

    def _draw(self, call: Call, number: int, given: Mapping[str, Tensor | None]) -> list[NoiseAndLabels]:
        shape = (number, self._config.batch_size)
        noise, labels = given.get("noise"), given.get("labels")
        if noise is None or labels is None:
            # Labels first, and both where one is given: another order would change every run.
            drawn = sample_labels(call.ensemble.class_counts, *shape, self._config.label_sampling, rng=call.rng)
            drawn_noise = torch.randn(*shape, self._config.noise_dim, generator=call.rng)
            noise, labels = drawn_noise if noise is None else noise, drawn if labels is None else labels
        return list(zip(noise.to(self._device, self._dtype), labels.to(self._device, torch.int64), strict=True))

    def _generate(self, draw: NoiseAndLabels) -> Float[Tensor, "B D H W"]:
        with autocast(self._config, self._device):
            images: Tensor = self._generator(*draw)
        return images.to(self._dtype)

    def _step(self, call: Call, draw: NoiseAndLabels, part: tuple[int, int]) -> Float[Tensor, " 3"]:
        """One Adam step on the teachers ``part[0] <= k < part[1]``; returns their share of the three losses."""
        images = self._generate(draw)
        backward = self._backward if len(call.ensemble.ranges(*part)) == 1 else self._backward_in_chunks
        values = backward(call, draw, images, part)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return values

    def _backward(self, call: Call, draw: NoiseAndLabels, images: Tensor, part: tuple[int, int]) -> Tensor:
        """The generator's gradient through one graph of all teachers, in the public code's order of operations.

        The order matters to the ``official`` preset: the biases before a BatchNorm have no gradient but rounding
        errors, which Adam scales up to whole steps, so another order ends in visibly different weights.
        """
        ensemble, size = call.ensemble, part[1] - part[0]
        teacher_logits = ensemble.logits(images, *part)
        student_logits = call.student(images)
        mask = self._mask(call, draw, images, student_logits, teacher_logits if size == len(ensemble) else None)
        loss, terms = self._loss(call, draw[1], teacher_logits, student_logits, mask, part)
        diversity = losses.diversity(draw[0], images)
        if self._config.lambda_dis:
            # Each of K single steps carries 1/K of the diversity, so that they and the joint step have the same sum.
            loss = loss + self._config.lambda_dis * diversity / (len(ensemble) / size)
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
        return torch.cat([terms, (size / len(ensemble) * diversity).detach()[None]])

    def _backward_in_chunks(self, call: Call, draw: NoiseAndLabels, images: Tensor, part: tuple[int, int]) -> Tensor:
        """The same gradient, collected at the images and at the student's logits with one chunk's graphs in memory."""
        leaf = images.detach().requires_grad_()
        student_logits = call.student(leaf)
        student_leaf = student_logits.detach().requires_grad_()
        mask = self._mask(call, draw, leaf.detach(), student_leaf, None)
        diversity = (part[1] - part[0]) / len(call.ensemble) * losses.diversity(draw[0], leaf)
        (self._config.lambda_dis * diversity).backward(inputs=[leaf])  # type: ignore[no-untyped-call]
        sums = torch.zeros(2, device=self._device)
        for chunk in call.ensemble.ranges(*part):
            teacher_logits = call.ensemble.logits(leaf, *chunk)
            loss, terms = self._loss(call, draw[1], teacher_logits, student_leaf, mask, chunk)
            if loss.requires_grad:
                loss.backward(inputs=[leaf, student_leaf])  # type: ignore[no-untyped-call]
            sums += terms
        if student_leaf.grad is not None:
            student_logits.backward(student_leaf.grad, inputs=[leaf])
        images.backward(leaf.grad)  # type: ignore[no-untyped-call]
        return torch.cat([sums, diversity.detach()[None]])

    def _mask(
        self, call: Call, draw: NoiseAndLabels, images: Tensor, student_logits: Tensor, teacher_logits: Tensor | None
    ) -> Tensor | None:
        """``(B,)``: the samples that count in L_md; None where all do."""
        if self._config.discrepancy_mask == "none":
            return None
        ensemble = call.ensemble.probabilities(images, draw[1], teacher_logits)
        return losses.transferable(ensemble, student_logits, draw[1])

    def _loss(
        self,
        call: Call,
        labels: Tensor,
        teacher_logits: Tensor,
        student_logits: Tensor,
        mask: Tensor | None,
        part: tuple[int, int],
    ) -> tuple[Tensor, Tensor]:
        """``lambda_cls L_cls - lambda_md L_md`` of some teachers, and both terms ``(2,)`` without a graph."""
        config, weights = self._config, call.ensemble.weights(labels, *part)
        discrepancy = losses.model_discrepancy(
            teacher_logits.detach() if config.teacher_gradient == "detached" else teacher_logits,
            student_logits,
            weights,
            kind=config.discrepancy,
            temperature=config.temperature,
            mask=mask,
        )
        fidelity = losses.fidelity(teacher_logits, labels, weights, weighting=config.fidelity_weighting)
        # A term of weight 0 is left out, so that it cannot turn the others into NaN.
        loss = -config.lambda_md * discrepancy if config.lambda_md else discrepancy.new_zeros(())
        loss = loss + config.lambda_cls * fidelity if config.lambda_cls else loss
        return loss, torch.stack([discrepancy, fidelity]).detach()


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # Without AVX512_BF16 or AMX a product of 2048x2048 measured 0.3 GFLOP/s beside 84 in float32 (AVX2).
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
