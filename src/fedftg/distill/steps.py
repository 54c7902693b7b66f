"""One batch of FedFTG: the generator's steps, then the student's steps on what it makes of the same noise and labels.

Modes: the teachers evaluate always; the generator trains (BatchNorm by batch) in its own steps and evaluates in the
student's; the student evaluates in the generator's steps, and in its own does what ``student_mode`` says.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.func import functional_call

from fedftg.distill import losses
from fedftg.distill.config import DistillConfig
from fedftg.distill.generator import Generator
from fedftg.distill.labels import sample_labels
from fedftg.distill.teachers import Teachers
from fedftg.errors import InputError
from fedftg.params import Params

MOST_AT_ONCE = 32
"""Teachers whose graphs are in memory at a time unless the settings say so."""


@dataclass(frozen=True)
class Task:
    """What stays the same through one call of `fedftg.distill.distiller.Distiller.refine`."""

    config: DistillConfig
    generator: Generator
    generator_optimizer: torch.optim.Optimizer
    averaged_generator: Params
    """Empty where there is none (yet)."""
    student: nn.Module
    trainable: list[nn.Parameter]
    """The student's parameters that are trained."""
    student_optimizer: torch.optim.Optimizer
    teachers: Teachers
    class_counts: Tensor
    """``(K, C)`` float64 on the CPU."""
    class_weights: Tensor
    """``a_k(y)``: ``(K, C)`` on the device, in the generator's type."""
    rng: torch.Generator
    device: torch.device

    def draw(self, num_batches: int) -> tuple[Float[Tensor, "I B Z"], Int[Tensor, "I B"]]:
        """Noise ``(I, B, Z)`` and labels ``(I, B)`` for ``num_batches``, drawn on the CPU, on the device."""
        batch_size = self.config.batch_size
        labels = sample_labels(self.class_counts, num_batches, batch_size, self.config.label_sampling, rng=self.rng)
        noise = torch.randn(num_batches, batch_size, self.config.noise_dim, generator=self.rng)
        dtype = next(self.generator.parameters()).dtype
        return noise.to(self.device, dtype), labels.to(self.device)

    def chunks(self, start: int, stop: int) -> list[tuple[int, int]]:
        """The ranges of teachers whose graphs are in memory at a time."""
        size = self.config.teacher_chunk or MOST_AT_ONCE
        return [(first, min(first + size, stop)) for first in range(start, stop, size)]

    def reduced_precision(self) -> torch.autocast:
        """What the frozen teachers and the generator run in; the student and all losses stay in full precision."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16")

    def images(self, noise: Float[Tensor, "B Z"], labels: Int[Tensor, " B"]) -> Float[Tensor, "B D H W"]:
        """``(B, D, H, W)`` of the generator in its present mode."""
        with self.reduced_precision():
            images: Tensor = self.generator(noise, labels)
        return images.to(noise.dtype)

    def student_logits(self, images: Float[Tensor, "B D H W"]) -> Float[Tensor, "B C"]:
        """Logits ``(B, C)`` of the student in its present mode.

        Raises:
            InputError: another number of classes than the class counts have.
        """
        logits: Tensor = self.student(images)
        expected = (images.shape[0], self.class_weights.shape[1])
        if tuple(logits.shape) != expected:
            raise InputError(
                f"the student's logits must have shape (batch, classes) = {expected}, got {tuple(logits.shape)}; "
                "class_counts needs one column per class of the student"
            )
        return logits

    def teacher_logits(self, images: Float[Tensor, "B D H W"], start: int, stop: int) -> Float[Tensor, "K B C"]:
        """Logits ``(stop - start, B, C)`` of some teachers.

        Raises:
            InputError: another number of classes than the class counts have.
        """
        with self.reduced_precision():
            logits = self.teachers.part(start, stop)(images)
        logits = logits.to(images.dtype)
        expected = (stop - start, images.shape[0], self.class_weights.shape[1])
        if tuple(logits.shape) != expected:
            raise InputError(
                f"the teachers' logits must have shape (teachers, batch, classes) = {expected}, "
                f"got {tuple(logits.shape)}; student, teachers and class_counts must have the same classes"
            )
        return logits

    @torch.no_grad()
    def ensemble(self, images: Float[Tensor, "B D H W"], labels: Int[Tensor, " B"]) -> Float[Tensor, "B C"]:
        """``(B, C)``: the class-weighted mean of the teachers' probabilities, without a graph."""
        weights = self.class_weights[:, labels]
        parts = [
            losses.ensemble_probabilities(
                self.teacher_logits(images, first, last), weights[first:last], self.config.temperature
            )
            for first, last in self.chunks(0, len(self.teachers))
        ]
        return torch.stack(parts).sum(dim=0)

    @torch.no_grad()
    def transferable(
        self, images: Tensor, teacher_logits: Tensor | None, student_logits: Tensor, labels: Tensor
    ) -> Bool[Tensor, " B"]:
        """``(B,)``: samples that count in L_md; ``teacher_logits`` are those of all teachers where they are there."""
        if teacher_logits is None:
            ensemble = self.ensemble(images, labels)
        else:
            weights = self.class_weights[:, labels]
            ensemble = losses.ensemble_probabilities(teacher_logits, weights, self.config.temperature)
        return losses.transferable(ensemble, student_logits, labels)


def require_grad(parameters: list[nn.Parameter], flag: bool) -> None:
    """Sets the flag on all of them."""
    for parameter in parameters:
        parameter.requires_grad_(flag)


def generator_steps(task: Task, noise: Float[Tensor, "B Z"], labels: Int[Tensor, " B"]) -> Float[Tensor, " 3"]:
    """``(3,)``: discrepancy, fidelity and diversity, mean over the ``generator_steps`` on one batch."""
    task.generator.train()
    task.student.eval()
    # Without weight gradients the backward pass through the student costs about a third less.
    require_grad(task.trainable, False)
    num_teachers = len(task.teachers)
    joint = task.config.generator_update == "joint"
    parts = [(0, num_teachers)] if joint else [(k, k + 1) for k in range(num_teachers)]
    total = torch.zeros(3, device=task.device)
    for _ in range(task.config.generator_steps):
        for start, stop in parts:
            total += _generator_step(task, noise, labels, start, stop)
    return total / task.config.generator_steps


def _generator_step(task: Task, noise: Tensor, labels: Tensor, start: int, stop: int) -> Float[Tensor, " 3"]:
    """One Adam step on the teachers ``start <= k < stop``; returns their share of the three metrics.

    No gradient of a teacher's or the student's weights is computed.
    """
    images = task.images(noise, labels)
    task.generator_optimizer.zero_grad()
    if len(task.chunks(start, stop)) == 1:
        metrics = _backward_at_once(task, images, noise, labels, start, stop)
    else:
        metrics = _backward_in_chunks(task, images, noise, labels, start, stop)
    task.generator_optimizer.step()
    return metrics


def _backward_at_once(
    task: Task, images: Tensor, noise: Tensor, labels: Tensor, start: int, stop: int
) -> Float[Tensor, " 3"]:
    """The generator's gradient through one graph of all teachers, in the public code's order of operations.

    The order matters to the ``official`` preset: the biases before a BatchNorm have no gradient but rounding errors,
    which Adam scales up to whole steps, so another order ends in visibly different weights.
    """
    teacher_logits = task.teacher_logits(images, start, stop)
    student_logits = task.student_logits(images)
    mask = None
    if task.config.discrepancy_mask == "transferable":
        whole = len(task.teachers) == stop - start
        mask = task.transferable(images, teacher_logits if whole else None, student_logits, labels)
    discrepancy, fidelity = _terms(task, teacher_logits, student_logits, labels, slice(start, stop), mask)
    diversity = losses.diversity(noise, images)
    loss = _weighted(task.config, discrepancy, fidelity)
    if task.config.lambda_dis:
        # Each of K single steps carries 1/K of the diversity, so that they and the joint step have the same sum.
        loss = loss + task.config.lambda_dis * diversity / (len(task.teachers) / (stop - start))
    if loss.requires_grad:
        loss.backward()  # type: ignore[no-untyped-call]
    share = (stop - start) / len(task.teachers)
    return torch.stack([discrepancy.detach(), fidelity.detach(), share * diversity.detach()])


def _backward_in_chunks(
    task: Task, images: Tensor, noise: Tensor, labels: Tensor, start: int, stop: int
) -> Float[Tensor, " 3"]:
    """The same gradient, collected at the images and at the student's logits with one chunk's graphs in memory."""
    config, share = task.config, (stop - start) / len(task.teachers)
    leaf = images.detach().requires_grad_()
    student_logits = task.student_logits(leaf)
    student_leaf = student_logits.detach().requires_grad_()
    mask = None
    if config.discrepancy_mask == "transferable":
        mask = task.transferable(leaf.detach(), None, student_leaf, labels)
    diversity = share * losses.diversity(noise, leaf)
    (config.lambda_dis * diversity).backward(inputs=[leaf])  # type: ignore[no-untyped-call]
    sums = torch.zeros(2, device=task.device)
    for first, last in task.chunks(start, stop):
        logits = task.teacher_logits(leaf, first, last)
        discrepancy, fidelity = _terms(task, logits, student_leaf, labels, slice(first, last), mask)
        loss = _weighted(config, discrepancy, fidelity)
        if loss.requires_grad:
            loss.backward(inputs=[leaf, student_leaf])  # type: ignore[no-untyped-call]
        sums += torch.stack([discrepancy.detach(), fidelity.detach()])
    if student_leaf.grad is not None:
        student_logits.backward(student_leaf.grad, inputs=[leaf])  # type: ignore[no-untyped-call]
    images.backward(leaf.grad)  # type: ignore[no-untyped-call]
    return torch.cat([sums, diversity.detach()[None]])


def _terms(
    task: Task, teacher_logits: Tensor, student_logits: Tensor, labels: Tensor, part: slice, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``L_md`` and ``L_cls`` of some teachers, weighted and summed."""
    config = task.config
    weights = task.class_weights[part][:, labels]
    discrepancy = losses.model_discrepancy(
        teacher_logits.detach() if config.teacher_gradient == "detached" else teacher_logits,
        student_logits,
        weights,
        kind=config.discrepancy,
        temperature=config.temperature,
        mask=mask,
    )
    return discrepancy, losses.fidelity(teacher_logits, labels, weights, weighting=config.fidelity_weighting)


def _weighted(config: DistillConfig, discrepancy: Tensor, fidelity: Tensor) -> Tensor:
    """``lambda_cls L_cls - lambda_md L_md``; a term of weight 0 is left out, so it cannot turn the others into NaN."""
    loss = -config.lambda_md * discrepancy if config.lambda_md else discrepancy.new_zeros(())
    return loss + config.lambda_cls * fidelity if config.lambda_cls else loss


def student_steps(task: Task, noise: Float[Tensor, "B Z"], labels: Int[Tensor, " B"]) -> Float[Tensor, " 2"]:
    """``(2,)``: the student's loss, mean over its steps, and the teachers' agreement with the labels of the first."""
    config = task.config
    task.generator.eval()
    task.student.train(config.student_mode == "train")
    require_grad(task.trainable, True)
    if config.fresh_batches and config.student_steps:
        batches = list(zip(*task.draw(config.student_steps), strict=True))
    else:
        batches = [(noise, labels)]
    total = torch.zeros((), device=task.device)
    agreement = total
    for step in range(max(config.student_steps, 1)):
        # The images and targets of a batch are the same in all the student's steps on it: made once.
        if step < len(batches):
            images, ensemble, agreed = _targets(task, *batches[step])
            agreement = agreed if step == 0 else agreement
        if config.student_steps:
            total = total + _student_step(task, images, ensemble)
    return torch.stack([total / max(config.student_steps, 1), agreement])


def _student_step(task: Task, images: Tensor, ensemble: Tensor) -> Float[Tensor, ""]:
    config = task.config
    loss = losses.student_loss(
        task.student_logits(images), ensemble, kind=config.student_loss, temperature=config.temperature
    )
    task.student_optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    task.student_optimizer.step()
    return loss.detach()


@torch.no_grad()
def _targets(task: Task, noise: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Images, the ensemble's probabilities for them, and the share of those that are right."""
    images = task.images(noise, labels)
    if task.averaged_generator:
        with task.reduced_precision():
            remembered: Tensor = functional_call(task.generator, task.averaged_generator, (noise, labels))
        images, labels = torch.cat([images, remembered.to(images.dtype)]), torch.cat([labels, labels])
    ensemble = task.ensemble(images, labels)
    agreement = (ensemble.argmax(dim=-1) == labels).to(torch.float32).mean()
    return images, ensemble, agreement
